"""The attention-relation distillation (ARD) loss: KL(teacher || student) between the rows of attention relations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearard.capture import LayerStates
from linearard.errors import UserError
from linearard.ops import attention_kl, relation_kl

SELF_RELATIONS = ("query", "key", "value")
RELATIONS = (*SELF_RELATIONS, "attention")


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
    tokens (the attention map is always causal, as the model is); divergence: "forward_kl", "reverse_kl" or "jsd".
    """

    weights: Mapping[str, float]
    causal: bool = False
    divergence: str = "forward_kl"

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
        if student.keys() != teacher.keys() or not student:
            raise ValueError(f"student and teacher have different layers: {sorted(student)} and {sorted(teacher)}")
        by_layer = self.by_layer(
            student, teacher, key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens, num_items=num_items
        )
        parts = {name: torch.stack(values).mean() for name, values in by_layer.items()}
        loss = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return loss, {name: part.detach() for name, part in parts.items()}

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
        options: dict[str, Any] = {
            "key_padding_mask": key_padding_mask,
            "cu_seqlens": cu_seqlens,
            "num_items": num_items,
            "divergence": self.divergence,
        }
        result: dict[str, list[Tensor]] = {name: [] for name in self.weights}
        for index in sorted(student):
            own, other = student[index], teacher[index].detach()
            for name in self.weights:
                if name == "attention":
                    divergence = attention_kl(
                        _operand(own.query),
                        _operand(own.key),
                        _operand(other.query),
                        _operand(other.key),
                        scale_student=own.scale,
                        scale_teacher=other.scale,
                        causal=True,
                        **options,
                    )
                else:
                    divergence = relation_kl(
                        _operand(getattr(own, name)), _operand(getattr(other, name)), causal=self.causal, **options
                    )
                result[name].append(divergence)
        return result


def _operand(states: Tensor) -> Tensor:
    """Under autocast, in its dtype, as autocast does for every matrix product (RoPE leaves float32 behind)."""
    device_type = states.device.type
    if torch.is_autocast_enabled(device_type):
        return states.to(torch.get_autocast_dtype(device_type))
    return states


def sequence_boundaries(position_ids: Tensor) -> Tensor | None:
    """Boundaries [S + 1] (int32) of the sequences packed into one row, from position ids [1, N] that restart at 0.

    None when there is only one sequence.
    """
    if position_ids.shape[0] != 1:
        return None
    length = position_ids.shape[1]
    starts = torch.nonzero(position_ids[0] == 0).flatten()
    if starts.numel() <= 1:
        return None
    end = torch.tensor([length], device=starts.device)
    return torch.cat([starts, end]).to(torch.int32)
