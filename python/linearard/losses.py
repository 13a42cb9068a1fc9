"""The attention-relation distillation (ARD) loss: KL(teacher || student) between the rows of attention relations."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from linearard.capture import LayerStates
from linearard.errors import UserError
from linearard.ops import attention_kl, layer_relation_kl_forward

SELF_RELATIONS = ("query", "key", "value")
RELATIONS = (*SELF_RELATIONS, "attention")
# Layers are stacked up to this size of the student's states: where one layer is as large, its kernels take far longer
# than their launch, and the copies would cost memory for nothing.
STACKED_BYTES = 64 * 2**20


def parse_relations(items: list[str]) -> dict[str, float]:
    """Weights by relation from items such as `query` or `attention:0.5`; a missing weight is 1."""
    weights: dict[str, float] = {}
    for item in items:
        name, _, weight_text = item.partition(":")
        try:
            weight = float(weight_text or 1)
        except ValueError:
            weight = -1.0
        if name not in RELATIONS or not 0 < weight < float("inf"):
            raise UserError(f"unknown relation {item!r}: write {', '.join(RELATIONS)}, or name:weight with weight > 0")
        if name in weights:
            raise UserError(f"the relation {name!r} is given twice")
        weights[name] = weight
    if not weights:
        raise UserError(f"no relation is given; choose among {', '.join(RELATIONS)}")
    return weights


@dataclass(frozen=True)
class ARDLoss:
    """The loss of LinearARD (arXiv 2604.00004), in nats per token and head.

    Per layer, the weighted sum of the divergences of the self-relations softmax(X X^T / sqrt(d)) of post-RoPE queries,
    keys and of values, and of the attention map softmax(Q K^T), each summed over heads and tokens and divided by
    tokens x heads; then the mean over the layers. Key and value heads of grouped-query models count once each.

    weights: by relation ("query", "key", "value", "attention"); causal: whether the self-relations see only earlier
    tokens (the attention map is always causal, as the model is); divergence: "forward_kl", "reverse_kl" or "jsd";
    temperature: divides the logits of both sides (the factor temperature^2 that some put before the loss is left to the
    weights); layer_weights: by layer index, relative to each other (their weighted mean replaces the mean over layers),
    1 where a layer is not named; attention_factors: by layer index, of the student's RoPE (YaRN multiplies its queries
    and keys by it), divided out of them before they are compared; 1 where a layer is not named. Under autocast that is
    before they are rounded; queries and keys that are in 16 bits themselves are rounded once more.
    """

    weights: Mapping[str, float]
    causal: bool = False
    divergence: str = "forward_kl"
    temperature: float = 1.0
    layer_weights: Mapping[int, float] = field(default_factory=dict)
    attention_factors: Mapping[int, float] = field(default_factory=dict)

    def __call__(
        self,
        student: Mapping[int, LayerStates],
        teacher: Mapping[int, LayerStates],
        *,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_items: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its unweighted parts by relation (detached), each a mean over the layers.

        key_padding_mask: [B, N] bool, True at real tokens; cu_seqlens: boundaries of packed sequences, B = 1;
        num_items: scalar, the tokens of all micro-batches and processes over which the mean runs, instead of those of
        this batch.
        """
        by_layer = self._layers(student, teacher, key_padding_mask, cu_seqlens, num_items)
        shares = self.layer_shares(sorted(student))
        parts, terms = {}, []
        for name, values in by_layer.items():
            parts[name] = values.detach().mean()
            # Python numbers: a tensor of weights would have to be copied to the GPU in every step.
            mean = values.mean() if not self.layer_weights else _weighted_sum(values, shares)
            terms.append(self.weights[name] * mean)
        return torch.stack(terms).sum(), parts

    def by_layer(
        self,
        student: Mapping[int, LayerStates],
        teacher: Mapping[int, LayerStates],
        *,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_items: Tensor | None = None,
    ) -> dict[str, list[Tensor]]:
        """The unweighted divergence of each relation, one scalar per layer in the order of their indices."""
        values = self._layers(student, teacher, key_padding_mask, cu_seqlens, num_items)
        return {name: list(layers.unbind()) for name, layers in values.items()}

    def layer_shares(self, layers: list[int]) -> list[float]:
        """The share of each of these layers in the loss; together 1."""
        weights = [self.layer_weights.get(layer, 1.0) for layer in layers]
        return [weight / sum(weights) for weight in weights]

    def _layers(
        self,
        student: Mapping[int, LayerStates],
        teacher: Mapping[int, LayerStates],
        key_padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        num_items: Tensor | None,
    ) -> dict[str, Tensor]:
        """The unweighted divergence of each relation, [layers]."""
        if student.keys() != teacher.keys() or not student:
            raise ValueError(f"student and teacher have different layers: {sorted(student)} and {sorted(teacher)}")
        structure = {"key_padding_mask": key_padding_mask, "cu_seqlens": cu_seqlens}
        rows: dict[str, list[Tensor]] = {name: [] for name in self.weights}
        layers = sorted(student)
        factors = [self.attention_factors.get(layer, 1.0) for layer in layers]
        for group in _groups([student[layer] for layer in layers], [teacher[layer] for layer in layers], factors):
            own = _Stack([student[layers[place]] for place in group], factors[group[0]])
            other = _Stack([teacher[layers[place]].detach() for place in group])
            divergences = self._rows(own, other, structure)
            for name, divergence in divergences.items():  # [B, layers x heads, N]
                summed = divergence.unflatten(1, (len(group), -1)).sum((0, 2, 3), dtype=torch.float64)
                rows[name].append(summed / (divergence.shape[1] // len(group)))
        query = student[layers[0]].query
        if num_items is None:
            num_items = key_padding_mask.sum() if key_padding_mask is not None else None
        tokens: Tensor | int = query.shape[0] * query.shape[2] if num_items is None else num_items.to(query.device)
        divisor = max(1, tokens) if isinstance(tokens, int) else tokens.clamp(min=1)
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        return {name: (torch.cat(values) / divisor).to(dtype) for name, values in rows.items()}

    def _rows(self, own: "_Stack", other: "_Stack", structure: dict[str, Any]) -> dict[str, Tensor]:
        """The divergence of every row of each relation, [B, layers x heads, N]."""
        rows: dict[str, Tensor] = {}
        options: dict[str, Any] = {**structure, "divergence": self.divergence}
        if "attention" in self.weights:
            rows["attention"] = attention_kl(
                own["query"],
                own["key"],
                other["query"],
                other["key"],
                scale_student=own.scale / self.temperature,
                scale_teacher=other.scale / self.temperature,
                causal=True,
                reduction="none",
                **options,
            )
        # Self-relations of the same scales are one call, which their kernels share.
        by_scales: dict[tuple[float, float], list[str]] = {}
        for name in self.weights:
            if name == "attention":
                continue
            scales = (own[name].shape[-1] ** -0.5 / self.temperature, other[name].shape[-1] ** -0.5 / self.temperature)
            by_scales.setdefault(scales, []).append(name)
        for (scale_student, scale_teacher), names in by_scales.items():
            kl, _, _ = layer_relation_kl_forward(
                [own[name] for name in names],
                [other[name] for name in names],
                scale_student=scale_student,
                scale_teacher=scale_teacher,
                causal=self.causal,
                **options,
            )
            rows.update(zip(names, kl, strict=True))
        return {name: rows[name] for name in self.weights}


class _Stack:
    """The states of several layers as if they were the heads of one, [B, layers x heads, N, D] by name.

    One call of an operator then serves them all: a step of a small model on a GPU is bound by the number of calls. Each
    name is copied once, when it is first asked for; a single layer is not copied. attention_factor: divided out of
    queries and keys, not by the scales of the operators: the fastest kernels need one scale for both sides.
    """

    def __init__(self, layers: list[LayerStates], attention_factor: float = 1.0) -> None:
        self._layers = layers
        self._divisors = {"query": attention_factor, "key": attention_factor, "value": 1.0}
        self._stacked: dict[str, Tensor] = {}
        self.scale = layers[0].scale

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._stacked:
            tensors = [getattr(layer, name) for layer in self._layers]
            states = tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)
            divisor = self._divisors[name]
            self._stacked[name] = _operand(states if divisor == 1 else states / divisor)
        return self._stacked[name]


def _weighted_sum(values: Tensor, weights: list[float]) -> Tensor:
    return torch.stack([weight * value for weight, value in zip(weights, values.unbind(), strict=True)]).sum()


def _groups(student: list[LayerStates], teacher: list[LayerStates], factors: list[float]) -> list[list[int]]:
    """Runs of layers that can be stacked: of one shape and factor, and small enough for the copy not to matter."""

    def kind(states: LayerStates) -> tuple[Any, ...]:
        return (states.scale, *((x.shape, x.dtype) for x in (states.query, states.key, states.value)))

    groups: list[list[int]] = []
    previous: tuple[Any, ...] | None = None
    for place, (own, other, factor) in enumerate(zip(student, teacher, factors, strict=True)):
        current = (kind(own), kind(other), factor)
        size = own.query.nbytes + own.key.nbytes + own.value.nbytes
        if current == previous and (len(groups[-1]) + 1) * size <= STACKED_BYTES:
            groups[-1].append(place)
        else:
            groups.append([place])
        previous = current
    return groups


def _operand(states: Tensor) -> Tensor:
    """Under autocast, in its dtype, as autocast does for every matrix product (RoPE leaves float32 behind)."""
    device_type = states.device.type
    if torch.is_autocast_enabled(device_type):
        return states.to(torch.get_autocast_dtype(device_type))
    return states


def sequence_boundaries(position_ids: Tensor) -> Tensor | None:
    """Boundaries [S + 1] (int32) of the sequences packed into one row, from position ids [1, N] that restart at 0.

    None when there is only one sequence, or one in each of several rows. Raises UserError for several packed rows.
    """
    if position_ids.shape[0] != 1:
        if bool((position_ids[:, 1:] == 0).any()):
            raise UserError("packed sequences need a batch of one row: set the batch size to 1, or pad instead")
        return None
    length = position_ids.shape[1]
    starts = torch.nonzero(position_ids[0] == 0).flatten()
    if starts.numel() <= 1:
        return None
    end = torch.tensor([length], device=starts.device)
    return torch.cat([starts, end]).to(torch.int32)
