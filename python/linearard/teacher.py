"""What a stage trains and what it is compared with: the student, and the frozen model with its native RoPE."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from linearard.capture import LayerStates, capture_states
from linearard.errors import UserError
from linearard.rope import RopeScaling, RopeSwitch, restore_float32_rope, scale_rope
from linearard.training_config import StageConfig


class Teacher:
    """The frozen model with its native RoPE.

    With LoRA it is the student's own module, its adapters off and its RoPE native: one copy of the weights. With
    trained weights it is a frozen copy made beforehand.
    """

    def __init__(self, student: nn.Module, switch: RopeSwitch, frozen_copy: nn.Module | None) -> None:
        self._student = student
        self._adapters = [module for module in student.modules() if isinstance(module, BaseTunerLayer)]
        # Without dropout, training and evaluation mode are the same, and a thousand modules need not be told.
        self._has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in student.modules()) or any(
            getattr(module, "attention_dropout", 0.0) for module in student.modules()
        )
        self.switch = switch
        self.frozen_copy = frozen_copy

    def to(self, device: torch.device) -> None:
        """Move the frozen copy, if there is one; the student's own module is moved by its trainer."""
        if self.frozen_copy is not None:
            self.frozen_copy.to(device)

    @contextlib.contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The teacher, for the length of a `with` block."""
        if self.frozen_copy is not None:
            yield self.frozen_copy
            return
        was_training = self._student.training
        if self._has_dropout:
            self._student.eval()
        try:
            with adapters(self._adapters, enabled=False), self.switch.native():
                yield self._student
        finally:
            if self._has_dropout:
                self._student.train(was_training)

    @torch.no_grad()
    def states(self, input_ids: Tensor, layers: frozenset[int] | None = None, **inputs: Any) -> dict[int, LayerStates]:
        """The teacher's queries, keys and values on `input_ids` [B, N], by layer."""
        with self.active() as model:
            return capture_states(model, input_ids, layers, **inputs)


@contextlib.contextmanager
def adapters(modules: list[BaseTunerLayer], *, enabled: bool) -> Iterator[None]:
    """Switch the LoRA adapters of `modules` on or off while the body runs.

    peft's own switch also changes which parameters require gradients, and takes milliseconds of every step.
    """
    before = [module._disable_adapters for module in modules]
    for module in modules:
        module._disable_adapters = not enabled
    try:
        yield
    finally:
        for module, disabled in zip(modules, before, strict=True):
            module._disable_adapters = disabled


def make_student(model: PreTrainedModel, scaling: str, args: StageConfig) -> tuple[nn.Module, Teacher]:
    """Scale the RoPE of `model` in place and choose what is trained; returns the student and its teacher."""
    frozen = None if args.lora_rank > 0 else copy.deepcopy(model).requires_grad_(False).eval()
    switch = scale_rope(model, RopeScaling.parse(scaling))
    student = make_trainable(model, args)
    return student, Teacher(student, switch, frozen)


def make_trainable(model: PreTrainedModel, args: StageConfig) -> nn.Module:
    """Choose what of `model` is trained: LoRA adapters, or float32 weights of modules, or all of them."""
    model.requires_grad_(False)
    if args.lora_rank > 0:
        _check_trainable(model, args.trainable, adapters=True)
        settings = LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=args.trainable,
            task_type="CAUSAL_LM",
        )
        set_seed(args.seed)  # Trainer seeds later, and the adapters begin with random numbers
        student: nn.Module = get_peft_model(model, settings)
        return student
    everything = args.trainable == ["all"]
    if not everything:
        _check_trainable(model, args.trainable, adapters=False)
    model.to(torch.float32)  # small steps vanish in bfloat16 weights
    restore_float32_rope(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(everything or bool(set(name.split(".")) & set(args.trainable)))
    return model


def merged(student: nn.Module) -> PreTrainedModel:
    """The student as a plain transformers model, its adapters merged into weights that are float32 then.

    In bfloat16 weights most of what the adapters add would be rounded away.
    """
    if isinstance(student, PeftModel):
        student.to(torch.float32)
        restore_float32_rope(student)
    model = student.merge_and_unload() if isinstance(student, PeftModel) else student
    assert isinstance(model, PreTrainedModel)
    return model


def _check_trainable(model: nn.Module, names: list[str], adapters: bool) -> None:
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in names:
        found = [module for path, module in model.named_modules() if path == name or path.endswith(f".{name}")]
        if not found:
            raise UserError(
                f"the model has no module {name!r} to train; its linear layers: {', '.join(sorted(linear))}"
            )
        if adapters and not all(isinstance(module, nn.Linear | nn.Embedding) for module in found):
            raise UserError(
                f"LoRA has no adapters for {name!r}, which is no matrix: set lora_rank to 0, or name linear layers: "
                f"{', '.join(sorted(linear))}"
            )
