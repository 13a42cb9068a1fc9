"""Training a model with scaled RoPE to keep the attention relations of the same model with its native RoPE."""

import contextlib
import copy
import inspect
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from linearard.capture import (
    LayerStates,
    capture_states,
    capturing,
    enable_capture,
    few_logits,
    transformers_model,
)
from linearard.config import ARDConfig
from linearard.errors import UserError
from linearard.losses import ARDLoss, parse_relations, sequence_boundaries
from linearard.rope import RopeScaling, RopeSwitch, restore_float32_rope, scale_rope


class Teacher:
    """The frozen model with its native RoPE.

    With LoRA it is the student's own module, its adapters off and its RoPE native: one copy of the weights. With
    trained weights it is a frozen copy made beforehand.
    """

    def __init__(self, student: nn.Module, switch: RopeSwitch, frozen_copy: nn.Module | None) -> None:
        self._student = student
        self._switch = switch
        self._copy = frozen_copy

    def to(self, device: torch.device) -> None:
        """Move the frozen copy, if there is one; the student's own module is moved by its trainer."""
        if self._copy is not None:
            self._copy.to(device)

    @contextlib.contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The teacher, for the length of a `with` block."""
        if self._copy is not None:
            yield self._copy
            return
        assert isinstance(self._student, PeftModel)
        with self._student.disable_adapter(), self._switch.native():
            yield self._student

    def states(self, input_ids: Tensor, layers: frozenset[int] | None = None, **inputs: Any) -> dict[int, LayerStates]:
        """The teacher's queries, keys and values on `input_ids` [B, N], by layer."""
        with self.active() as model:
            return capture_states(model, input_ids, layers, **inputs)


class ARDTrainer(Trainer):
    """transformers' Trainer with the attention-relation distillation of an `ARDConfig`.

    model: a causal language model with its native RoPE; it is scaled in place (and wrapped by peft for LoRA), and
    `trainer.model` is the student. Batches hold input_ids [B, N] and, if they need them, attention_mask [B, N]
    (padding) or position_ids [1, N] that restart at 0 (packed sequences). Everything else is Trainer's: distributed
    data parallel through torchrun, accumulation, checkpointing, mixed precision, resuming, TensorBoard.
    """

    args: ARDConfig

    def __init__(self, model: PreTrainedModel, args: ARDConfig, **kwargs: Any) -> None:
        layers = enable_capture(model)
        unknown = sorted(set(args.layers or []) - set(layers))
        if unknown:
            raise UserError(f"the model has no attention layer {unknown[0]}; it has {len(layers)}: 0 to {layers[-1]}")
        self.layers = frozenset(args.layers or layers)
        self.relations = ARDLoss(parse_relations(args.relations), causal=args.causal, divergence=args.divergence)
        student, self.teacher = make_student(model, args)
        _train_only_what_gets_gradients(student, self.layers, self.relations)
        config = transformers_model(student).config
        use_cache = config.use_cache
        super().__init__(model=student, args=args, **kwargs)
        config.use_cache = use_cache  # Trainer switches it off for training, and it would be saved that way
        # The loss below is divided by the tokens of all micro-batches already; Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        self._forward_arguments = set(inspect.signature(transformers_model(student).forward).parameters)
        self._parts: dict[str, Tensor] = {}
        self._staging: Path | None = None
        self.teacher.to(self.args.device)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one optimizer step and the number of their real tokens on all processes."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, None
        count = torch.stack([_token_count(batch) for batch in samples]).sum().to(device)
        return samples, self.accelerator.gather(count.reshape(1)).sum()

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Autocast for all of the loss: accelerate covers only the forward pass of the student."""
        stack = super().compute_loss_context_manager()
        stack.enter_context(self.accelerator.autocast())
        return stack

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The ARD loss of a batch; with `num_items_in_batch`, its share of the mean over that many tokens."""
        inputs = {name: value for name, value in inputs.items() if name in self._forward_arguments and name != "labels"}
        teacher = self.teacher.states(layers=self.layers, **inputs)
        with capturing(self.layers) as capture:
            # The whole model, for the hooks of distributed data parallel, but next to none of its costly logits.
            outputs = model(**inputs, **few_logits(self.model, 1), use_cache=False)
        padding_mask, boundaries = _sequence_structure(inputs)
        num_items = None if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss, parts = self.relations(
            capture.states, teacher, key_padding_mask=padding_mask, cu_seqlens=boundaries, num_items=num_items
        )
        if num_items is not None:
            # Distributed data parallel averages the gradients of processes that each hold a share of the sum.
            loss = loss * self.accelerator.num_processes
            if model.training:
                self._remember(parts)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with the mean divergence of each relation since the last one beside the loss."""
        if "loss" in logs and self._parts:
            steps = max(1, self.state.global_step - self._parts_since)
            names = sorted(self._parts)
            values = self.accelerator.reduce(torch.stack([self._parts[name] for name in names]), "sum")
            logs |= {f"{name}_kl": float(value) / steps for name, value in zip(names, values, strict=True)}
            self._parts = {}
        super().log(logs, start_time)

    def _remember(self, parts: Mapping[str, Tensor]) -> None:
        if not self._parts:
            self._parts_since = self.state.global_step
        for name, part in parts.items():
            self._parts[name] = self._parts.get(name, torch.zeros_like(part)) + part

    # Trainer writes a checkpoint file by file. Here it does so in a directory beside the others, which gets its name
    # when it is complete: a process killed at any time leaves whole checkpoints only.
    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_directory = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = run_directory / ".incomplete-checkpoint"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(run_directory / name, ignore_errors=True)
            os.replace(staging / name, run_directory / name)
            shutil.rmtree(staging, ignore_errors=True)
            self._delete_old_checkpoints(run_directory)
        self.accelerator.wait_for_everyone()

    def _delete_old_checkpoints(self, run_directory: Path) -> None:
        limit = self.args.save_total_limit
        if limit is not None and limit > 0:
            for checkpoint in checkpoints(run_directory)[:-limit]:
                shutil.rmtree(checkpoint, ignore_errors=True)


def checkpoints(run_directory: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [
        path for path in Path(run_directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()
    ]
    return sorted(found, key=lambda path: int(path.name.split("-")[-1]))


def make_student(model: PreTrainedModel, args: ARDConfig) -> tuple[nn.Module, Teacher]:
    """Scale the RoPE of `model` in place and choose what is trained; returns the student and its teacher."""
    scaling = RopeScaling.parse(args.scaling)
    model.requires_grad_(False)
    if args.lora_rank > 0:
        switch = scale_rope(model, scaling)
        _check_trainable(model, args.trainable)
        adapters = LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=args.trainable,
            task_type="CAUSAL_LM",
        )
        student: nn.Module = get_peft_model(model, adapters)
        return student, Teacher(student, switch, None)
    frozen = copy.deepcopy(model).eval()
    switch = scale_rope(model, scaling)
    model.to(torch.float32)  # small steps vanish in bfloat16 weights
    restore_float32_rope(model)
    everything = args.trainable == ["all"]
    if not everything:
        _check_trainable(model, args.trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(everything or bool(set(name.split(".")) & set(args.trainable)))
    return model, Teacher(model, switch, frozen)


def merged(student: nn.Module) -> PreTrainedModel:
    """The student as a plain transformers model, its adapters merged into the weights."""
    model = student.merge_and_unload() if isinstance(student, PeftModel) else student
    assert isinstance(model, PreTrainedModel)
    return model


def _check_trainable(model: nn.Module, names: list[str]) -> None:
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path, _ in model.named_modules()):
            raise UserError(
                f"the model has no module {name!r} to train; its linear layers: {', '.join(sorted(linear))}"
            )


def _train_only_what_gets_gradients(model: nn.Module, layers: frozenset[int], loss: ARDLoss) -> None:
    """Freeze parameters that the loss does not reach, such as the last layer's output projection and MLP.

    Distributed data parallel would wait for their gradients, and weight decay would change them for nothing.
    """
    device = transformers_model(model).device
    with torch.enable_grad(), capturing(layers) as capture:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    used = {"query": "query" in loss.weights, "key": "key" in loss.weights, "value": "value" in loss.weights}
    if "attention" in loss.weights:
        used |= {"query": True, "key": True}
    tensors = [getattr(states, name) for states in capture.states.values() for name, wanted in used.items() if wanted]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    reached = [tensor.float().sum() for tensor in tensors if tensor.requires_grad]
    if not parameters or not reached:
        raise UserError("nothing to train: the relations of the chosen layers do not depend on the trainable modules")
    gradients = torch.autograd.grad(torch.stack(reached).sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def _token_count(batch: Mapping[str, Any]) -> Tensor:
    mask = batch.get("attention_mask")
    count = torch.tensor(batch["input_ids"].numel()) if mask is None else (mask != 0).sum()
    return count.cpu()


def _sequence_structure(inputs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """(padding mask or None, boundaries of packed sequences or None) of a batch."""
    mask = inputs.get("attention_mask")
    if mask is not None:
        return mask.bool(), None
    positions = inputs.get("position_ids")
    return None, None if positions is None else sequence_boundaries(positions)
