"""Training a model with scaled RoPE to keep the attention relations of the same model with its native RoPE."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from linearard.capture import (
    LayerStates,
    capturing,
    enable_capture,
    few_logits,
    transformers_model,
)
from linearard.errors import UserError
from linearard.head import check_head, last_hidden_states
from linearard.linear_losses import linear_kl
from linearard.local_gradients import LocalGradients
from linearard.losses import ARDLoss, parse_relations, sequence_boundaries
from linearard.rope import attention_factors
from linearard.stage_trainer import StageTrainer
from linearard.teacher import make_student
from linearard.training_config import ARDConfig


class ARDTrainer(StageTrainer):
    """transformers' Trainer with the attention-relation distillation of an `ARDConfig`.

    model: a causal language model with its native RoPE; it is scaled in place (and wrapped by peft for LoRA), and
    `trainer.model` is the student. Batches hold input_ids [B, N] and, if they need them, attention_mask [B, N]
    (padding) or position_ids [1, N] that restart at 0 (packed sequences). Everything else is Trainer's: distributed
    data parallel through torchrun, accumulation, checkpointing, mixed precision, resuming, evaluation (not with local
    gradients), TensorBoard.
    """

    args: ARDConfig

    def __init__(self, model: PreTrainedModel, args: ARDConfig, **kwargs: Any) -> None:
        layers = enable_capture(model)
        unknown = sorted(set(args.layers or []) - set(layers))
        if unknown:
            raise UserError(f"the model has no attention layer {unknown[0]}; it has {len(layers)}: 0 to {layers[-1]}")
        chosen = args.layers or layers
        weights = args.layer_weights or []
        if weights and len(weights) != len(chosen):
            raise UserError(f"{len(weights)} layer_weights for {len(chosen)} layers")
        self.layers = frozenset(chosen)
        student, self.teacher = make_student(model, args.scaling, args)
        self.relations = ARDLoss(
            parse_relations(args.relations),
            causal=args.causal,
            divergence=args.divergence,
            temperature=args.temperature,
            layer_weights=dict(zip(chosen, weights, strict=False)),
            attention_factors=attention_factors(model, chosen) if args.divide_attention_factor else {},
        )
        self._local: LocalGradients | None = None
        if args.gradients == "local":
            if args.world_size > 1:
                raise UserError("local gradients run in one process; for several, set gradients to full")
            self._local = LocalGradients(student, self.teacher, self.relations, self.layers)
        self._linear_head = _has_linear_head(student)
        self._attention = _train_only_what_gets_gradients(student, self.layers, self.relations, self._local)
        super().__init__(model=student, args=args, **kwargs)
        self.teacher.to(self.args.device)

    def frozen_modules(self) -> list[nn.Module]:
        """The student, and the teacher where it is a model of its own."""
        return [self.model, *([self.teacher.frozen_copy] if self.teacher.frozen_copy is not None else [])]

    def attention_modules(self) -> list[nn.Module]:
        """Those of the student; with LoRA they are the teacher's, too."""
        return self._attention

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The ARD loss of a batch; with `num_items_in_batch`, its share of the mean over that many tokens."""
        inputs = self.model_inputs(inputs)
        padding_mask, boundaries = _sequence_structure(inputs)
        structure = {"key_padding_mask": padding_mask, "cu_seqlens": boundaries}
        num_items = None if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        with self.masks_of(inputs):
            loss, outputs, parts = self._loss(model, inputs, structure, num_items)
        if num_items is not None:
            # Distributed data parallel averages the gradients of processes that each hold a share of the sum.
            loss = loss * self.accelerator.num_processes
            if model.training:
                self.remember({f"{name}_kl": part for name, part in parts.items()})
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, None, None]:
        """As in StageTrainer."""
        if self._local is not None:
            raise UserError("local gradients have no loss without a backward pass: to evaluate, set gradients to full")
        return super().prediction_step(*arguments, **keywords)

    def _loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        structure: dict[str, Tensor | None],
        num_items: Tensor | None,
    ) -> tuple[Tensor, Any, dict[str, Tensor]]:
        """The loss, the student's outputs (None with local gradients) and the parts of the loss."""
        if self._local is not None:
            loss, parts = self._local(inputs, structure, num_items)
            return loss, None, parts
        teacher, expected = self._teacher_pass(inputs)
        with capturing(self.layers) as capture:
            # The whole model, for the hooks of distributed data parallel.
            found, outputs = self._predictions(model, inputs)
        loss, parts = self.relations(capture.states, teacher, num_items=num_items, **structure)
        # From here on autograd alone keeps states alive, and the backward pass frees them layer by layer.
        capture.states.clear()
        teacher.clear()
        if expected is not None:
            mask = structure["key_padding_mask"]
            distance = self._logits_distance(found, expected, mask)
            tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
            share = distance if num_items is None else distance * (tokens / num_items)
            loss = loss + self.args.logits_weight * share
            parts["logits"] = share.detach()
        return loss, outputs, parts

    def _predictions(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """What the logits are compared by, and the outputs of `model`.

        That is what a linear head reads, [B, N, D], whose logits come chunk by chunk then; of other heads the logits
        [B, M, V], and no more of them than needed.
        """
        if self._linear_head:
            return last_hidden_states(model, inputs)
        kept = (self.args.logits_positions or 0) if self.args.logits_weight > 0 else 1  # 0 is all, as in transformers
        outputs = model(**inputs, **few_logits(self.model, kept), use_cache=False)
        return outputs.logits, outputs

    def _teacher_pass(self, inputs: dict[str, Any]) -> tuple[dict[int, LayerStates], Tensor | None]:
        if self.args.logits_weight == 0:
            return self.teacher.states(layers=self.layers, **inputs), None
        with torch.no_grad(), self.teacher.active() as teacher, capturing(self.layers) as capture:
            expected, _ = self._predictions(teacher, inputs)
        return capture.states, expected

    def _logits_distance(self, found: Tensor, expected: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Mean KL(teacher || student) in nats at the last `logits_positions` of each sequence, of `_predictions`."""
        if self.args.logits_positions is not None:
            last = slice(-self.args.logits_positions, None)
            found, expected = found[:, last], expected[:, last]
        mask = None if padding_mask is None else padding_mask[:, -found.shape[1] :]
        if not self._linear_head:
            return logits_divergence(found, expected, mask)
        own, others = (_head(model) for model in (self.model, self.teacher.frozen_copy or self.model))
        total = linear_kl(
            found.flatten(0, 1),
            own.weight,
            expected.flatten(0, 1),
            others.weight,
            own.bias,
            others.bias,
            mask=None if mask is None else mask.flatten(),
        )
        return total / (found[..., 0].numel() if mask is None else mask.sum().clamp(min=1))


def logits_divergence(student: Tensor, teacher: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """Mean KL(teacher || student) in nats of next-token distributions.

    student, teacher: logits [B, N, V]; padding_mask: [B, N] bool, True at real tokens: padding does not count.
    """
    student, teacher = student.float(), teacher.float()
    rows = kl_div(log_softmax(student, -1), log_softmax(teacher, -1), reduction="none", log_target=True).sum(-1)
    if padding_mask is None:
        return rows.mean()
    return (rows * padding_mask).sum() / padding_mask.sum().clamp(min=1)


def _has_linear_head(model: nn.Module) -> bool:
    try:
        check_head(transformers_model(model))
    except UserError:
        return False
    return True


def _head(model: nn.Module) -> nn.Linear:
    head: Any = transformers_model(model).get_output_embeddings()
    return head


def _train_only_what_gets_gradients(
    model: nn.Module, layers: frozenset[int], loss: ARDLoss, local: LocalGradients | None
) -> list[nn.Module]:
    """Freeze parameters that no relation reaches, such as the last layer's output projection and MLP.

    Distributed data parallel would wait for their gradients, and weight decay would change them for nothing. Returns
    the attention modules that were captured.
    """
    device = transformers_model(model).device
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    with torch.enable_grad(), capturing(layers) as capture:
        model(input_ids=ids, use_cache=False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if local is not None:
        reached = local.reached(ids)
        used = [id(parameter) in reached for parameter in parameters]
    else:
        used = [gradient is not None for gradient in _gradients(capture.states, loss, parameters)]
    if not any(used):
        raise UserError("nothing to train: the relations of the chosen layers do not depend on the trainable modules")
    for parameter, reaches in zip(parameters, used, strict=True):
        parameter.requires_grad_(reaches)
    return list(capture.modules.values())


def _gradients(states: Mapping[int, LayerStates], loss: ARDLoss, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    used = {"query": "query" in loss.weights, "key": "key" in loss.weights, "value": "value" in loss.weights}
    if "attention" in loss.weights:
        used |= {"query": True, "key": True}
    tensors = [getattr(layer, name) for layer in states.values() for name, wanted in used.items() if wanted]
    reached = [tensor.float().sum() for tensor in tensors if tensor.requires_grad]
    if not reached or not parameters:
        return [None] * len(parameters)
    return list(torch.autograd.grad(torch.stack(reached).sum(), parameters, allow_unused=True))


def _sequence_structure(inputs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """(padding mask or None, boundaries of packed sequences or None) of a batch."""
    mask = inputs.get("attention_mask")
    if mask is not None:
        return mask.bool(), None
    positions = inputs.get("position_ids")
    return None, None if positions is None else sequence_boundaries(positions)
