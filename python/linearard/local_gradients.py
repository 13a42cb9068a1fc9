"""Layer-local gradients: every student layer reads the teacher's hidden states and learns by itself.

The teacher runs as usual; behind each of its attention modules the student's module of the same layer projects the
same hidden states, the relations of the two are compared, and the backward pass goes through these projections alone.
Nothing of a layer outlives it: memory does not grow with the depth of the model.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from linearard.capture import Capture, capturing, decoder_of
from linearard.errors import UserError
from linearard.losses import ARDLoss
from linearard.teacher import Teacher, adapters


class LocalGradients:
    """The ARD loss with gradients that stay inside a layer; `backward` has happened when a call returns.

    student: with scaled RoPE, capture enabled; layers: indices of the layers to align. Raises UserError for models that
    do not hand position embeddings to their attention modules.
    """

    def __init__(self, student: nn.Module, teacher: Teacher, loss: ARDLoss, layers: frozenset[int]) -> None:
        self._student, self._teacher, self._loss = student, teacher, loss
        self._layers = layers
        shares = loss.layer_shares(sorted(layers))
        self._shares = dict(zip(sorted(layers), shares, strict=True))
        ids = torch.zeros(1, 2, dtype=torch.long, device=next(student.parameters()).device)
        self._own = _attention_modules(student, ids, layers)
        with teacher.active() as model:
            self._others = _attention_modules(model, ids, layers)
        self._adapters = {
            layer: [part for part in module.modules() if isinstance(part, BaseTunerLayer)]
            for layer, module in self._own.items()
        }

    def __call__(
        self, inputs: dict[str, Any], structure: dict[str, Tensor | None], num_items: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts as `ARDLoss` defines them; gradients have been added to those of the parameters.

        The returned loss has no history: a backward pass through it does nothing more.
        """
        position_ids = inputs.get("position_ids")
        if position_ids is None:
            ids = inputs["input_ids"]
            position_ids = torch.arange(ids.shape[1], device=ids.device)[None]
        run = _Run(self, position_ids, structure, num_items)
        handles = [
            module.register_forward_hook(run.hook(layer), with_kwargs=True) for layer, module in self._others.items()
        ]
        try:
            with torch.no_grad(), self._teacher.active() as teacher, capturing(self._layers) as run.capture:
                decoder_of(teacher)(**inputs, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        loss = torch.stack([run.losses[layer] * self._shares[layer] for layer in sorted(run.losses)]).sum()
        count = len(run.losses)
        parts = {name: torch.stack(values).sum() / count for name, values in run.parts.items()}
        return loss.requires_grad_(), parts

    def reached(self, input_ids: Tensor) -> set[int]:
        """Identities of the parameters that get a gradient."""
        self({"input_ids": input_ids}, {}, None)
        reached = {id(parameter) for parameter in self._student.parameters() if parameter.grad is not None}
        self._student.zero_grad(set_to_none=True)
        return reached


class _Run:
    """One pass of the teacher with the student's layers beside it."""

    def __init__(
        self,
        setup: LocalGradients,
        position_ids: Tensor,
        structure: dict[str, Tensor | None],
        num_items: Tensor | None,
    ) -> None:
        self.capture = Capture()
        self.losses: dict[int, Tensor] = {}
        self.parts: dict[str, list[Tensor]] = {}
        self._setup, self._positions, self._structure, self._num_items = setup, position_ids, structure, num_items
        self._embeddings: Any = None

    def hook(self, layer: int) -> Any:
        """What runs behind the teacher's attention module of `layer`."""

        def behind(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            self._learn(layer, arguments, keywords)

        return behind

    def _learn(self, layer: int, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        setup = self._setup
        hidden = keywords.get("hidden_states", arguments[0] if arguments else None)
        native = keywords.get("position_embeddings")
        rotary = setup._teacher.switch.scaled_modules()
        if not isinstance(hidden, Tensor) or not isinstance(native, tuple) or len(rotary) != 1:
            raise UserError(
                "local gradients need a model that computes its RoPE once and hands it to its attention modules; set "
                "gradients to full"
            )
        if self._embeddings is None:
            self._embeddings = tuple(part.to(native[0].dtype) for part in rotary[0](hidden.float(), self._positions))
        teacher = self.capture.states.pop(layer)
        changed = {**keywords, "position_embeddings": self._embeddings}
        own = setup._own[layer]
        with (
            torch.enable_grad(),
            adapters(setup._adapters[layer], enabled=True),
            capturing(frozenset({layer}), states_only=True) as student,
        ):
            own.forward(*arguments, **changed)
            loss, parts = setup._loss(student.states, {layer: teacher}, num_items=self._num_items, **self._structure)
            if loss.requires_grad:
                (loss * setup._shares[layer]).backward()
        self.losses[layer] = loss.detach()
        for name, part in parts.items():
            self.parts.setdefault(name, []).append(part)


def _attention_modules(model: nn.Module, ids: Tensor, layers: frozenset[int]) -> dict[int, nn.Module]:
    with torch.no_grad(), capturing(layers) as capture:
        decoder_of(model)(input_ids=ids, use_cache=False)
    return capture.modules
