"""The reference: relation KL and attention KL as plain n x n PyTorch in float64, written once.

Every test compares with these functions on the same, already rounded inputs. They are deliberately naive: logits,
log_softmax, a sum, and autograd for the gradients. One thing is not: the sum of p (log p - log q) cancels near
convergence, and though float64 has digits to spare for judging float32, it has none for judging float64. The sum of
p phi(log q - log p), phi(d) = e^d - 1 - d >= 0, is the same because p and q both sum to 1, and cancels nowhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Per row, float64: divergence and the log-sum-exp of both sides, all [B, H, N] in nats; 0 for padding."""

    kl: Tensor
    lse_student: Tensor
    lse_teacher: Tensor


def _kullback_leibler(log_p: Tensor, log_q: Tensor, allowed: Tensor) -> Tensor:
    """KL(P || Q) over the last dimension, from log-probabilities, over the allowed keys."""
    p = log_p.exp().masked_fill(~allowed, 0.0)
    q = log_q.exp().masked_fill(~allowed, 0.0)
    difference = log_q - log_p
    near = difference.abs() < 1.0 / 32.0
    d = torch.where(near, difference, 0.0)
    # phi(d) = d^2 / 2! + d^3 / 3! + ...: at 1/32, the term after these 8 is below 1e-18 of the first, and beyond 1/32
    # the direct form has lost three digits of sixteen at most.
    series = torch.zeros_like(d)
    for order in range(9, 1, -1):
        series = d * series + 1.0 / math.factorial(order)
    return torch.where(near, p * d * d * series, q - p - p * difference).sum(-1)


def divergence_rows(
    student_logits: Tensor, teacher_logits: Tensor, visible: Tensor, divergence: str = "forward_kl", beta: float = 0.5
) -> Rows:
    """Divergence of the rows of two [B, H, Nq, Nk] logit tensors over the visible keys (bool, broadcastable)."""
    visible = visible.expand_as(student_logits)
    sees_a_key = visible.any(-1)
    # A row without keys would make log_softmax NaN: let it see everything and drop its result.
    allowed = visible | ~sees_a_key[..., None]
    student_logits = student_logits.masked_fill(~allowed, -math.inf)
    teacher_logits = teacher_logits.masked_fill(~allowed, -math.inf)
    log_q = student_logits.log_softmax(-1).masked_fill(~allowed, 0.0)
    log_p = teacher_logits.log_softmax(-1).masked_fill(~allowed, 0.0)
    if divergence == "forward_kl":
        values = _kullback_leibler(log_p, log_q, allowed)
    elif divergence == "reverse_kl":
        values = _kullback_leibler(log_q, log_p, allowed)
    elif divergence == "jsd":
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        values = beta * _kullback_leibler(log_p, log_m, allowed)
        values = values + (1.0 - beta) * _kullback_leibler(log_q, log_m, allowed)
    else:
        raise ValueError(f"unknown divergence {divergence!r}")
    return Rows(
        torch.where(sees_a_key, values, 0.0),
        torch.where(sees_a_key, student_logits.logsumexp(-1), 0.0),
        torch.where(sees_a_key, teacher_logits.logsumexp(-1), 0.0),
    )


def _sequence_of(boundaries: Tensor | None, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Number of the sequence that each token belongs to, and the end of that sequence, both [tokens]."""
    position = torch.arange(tokens, device=device)
    if boundaries is None:
        return torch.zeros_like(position), torch.full_like(position, tokens)
    boundaries = boundaries.to(device=device, dtype=torch.int64)
    sequence = torch.bucketize(position, boundaries, right=True) - 1
    return sequence, boundaries[sequence + 1]


def visibility(
    queries: int,
    keys: int,
    *,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_key: Tensor | None = None,
    causal: bool = False,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Which query sees which key, bool [B or 1, 1, queries, keys]. Causal is aligned to the bottom right."""
    device = torch.device(device)
    query_sequence, query_end = _sequence_of(cu_seqlens, queries, device)
    key_sequence, key_end = _sequence_of(cu_seqlens if cu_seqlens_key is None else cu_seqlens_key, keys, device)
    visible = query_sequence[:, None] == key_sequence[None, :]
    if causal:
        query_from_end = torch.arange(queries, device=device) - query_end
        key_from_end = torch.arange(keys, device=device) - key_end
        visible = visible & (key_from_end[None, :] <= query_from_end[:, None])
    visible = visible[None, None]
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None, :]
    if query_padding_mask is not None:
        visible = visible & query_padding_mask[:, None, :, None]
    return visible


def prepared(x: Tensor, mask: Tensor | None) -> Tensor:
    """Float64, with padding zeroed: whatever stands there, also NaN, is not part of the problem."""
    x = x.double()
    return x if mask is None else x.masked_fill(~mask[:, None, :, None], 0.0)


def logits(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """Scale Q K^T in float64, [B, Hq, Nq, Nk]; grouped queries share keys. Default scale: D^-0.5."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1) if key.shape[1] else key
    return (query.shape[-1] ** -0.5 if scale is None else scale) * (query.double() @ key.double().transpose(-1, -2))


def reduce_rows(
    kl: Tensor,
    *,
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
) -> Tensor:
    """none: weighted rows; sum; mean: sum / (H x count), where a count of 0 gives 0."""
    batch, heads, tokens = kl.shape
    weighted = kl if row_weight is None else kl * row_weight.double()[:, None, :]
    if mask is not None:
        weighted = weighted.masked_fill(~mask[:, None, :], 0.0)
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    weights = torch.ones(batch, tokens, dtype=torch.float64, device=kl.device)
    if row_weight is not None:
        weights = row_weight.double()
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    count = float(weights.sum() if num_items is None else num_items)
    return weighted.sum() * 0.0 if count == 0.0 or heads == 0 else weighted.sum() / (heads * count)


def relation_rows(
    student: Tensor,
    teacher: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    causal: bool = False,
    divergence: str = "forward_kl",
    beta: float = 0.5,
) -> Rows:
    """Rows of relation KL for [B, H, N, D] inputs; differentiable in both."""
    tokens = student.shape[2]
    visible = visibility(
        tokens,
        tokens,
        query_padding_mask=key_padding_mask,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        causal=causal,
        device=student.device,
    )
    student, teacher = prepared(student, key_padding_mask), prepared(teacher, key_padding_mask)
    return divergence_rows(
        logits(student, student, scale_student), logits(teacher, teacher, scale_teacher), visible, divergence, beta
    )


def relation_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    **options,
) -> Tensor:
    """The whole operator in float64; `options` are those of relation_rows."""
    rows = relation_rows(student, teacher, key_padding_mask=key_padding_mask, **options)
    return reduce_rows(rows.kl, mask=key_padding_mask, row_weight=row_weight, reduction=reduction, num_items=num_items)


def attention_rows(
    query_student: Tensor,
    key_student: Tensor,
    query_teacher: Tensor,
    key_teacher: Tensor,
    *,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_key: Tensor | None = None,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    causal: bool = True,
    divergence: str = "forward_kl",
    beta: float = 0.5,
) -> Rows:
    """Rows of attention KL: queries [B, Hq, Nq, D], keys [B, Hk, Nk, D], Hq a multiple of Hk."""
    queries, keys = query_student.shape[2], key_student.shape[2]
    query_padding_mask = effective_query_mask(query_padding_mask, key_padding_mask, queries, keys)
    visible = visibility(
        queries,
        keys,
        query_padding_mask=query_padding_mask,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        cu_seqlens_key=cu_seqlens_key,
        causal=causal,
        device=query_student.device,
    )
    student_logits = logits(
        prepared(query_student, query_padding_mask), prepared(key_student, key_padding_mask), scale_student
    )
    teacher_logits = logits(
        prepared(query_teacher, query_padding_mask), prepared(key_teacher, key_padding_mask), scale_teacher
    )
    return divergence_rows(student_logits, teacher_logits, visible, divergence, beta)


def effective_query_mask(query_mask: Tensor | None, key_mask: Tensor | None, queries: int, keys: int) -> Tensor | None:
    """Without a mask of its own, a query is padding where the key of the same index is, if there are as many."""
    return key_mask if query_mask is None and queries == keys else query_mask


def attention_kl(
    query_student: Tensor,
    key_student: Tensor,
    query_teacher: Tensor,
    key_teacher: Tensor,
    *,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    **options,
) -> Tensor:
    """The whole pair form in float64; `options` are those of attention_rows."""
    query_mask = effective_query_mask(
        query_padding_mask, key_padding_mask, query_student.shape[2], key_student.shape[2]
    )
    rows = attention_rows(
        query_student,
        key_student,
        query_teacher,
        key_teacher,
        query_padding_mask=query_mask,
        key_padding_mask=key_padding_mask,
        **options,
    )
    return reduce_rows(rows.kl, mask=query_mask, row_weight=row_weight, reduction=reduction, num_items=num_items)


def gradients(
    function, inputs: tuple[Tensor, ...], others: tuple[Tensor, ...], upstream: Tensor | None = None, **options
):
    """Value and float64 gradients of function(*inputs, *others, **options) with respect to `inputs`.

    `upstream` is the gradient that arrives at the value; ones when it is None.
    """
    leaves = tuple(x.detach().double().requires_grad_() for x in inputs)
    value = function(*leaves, *(x.detach() for x in others), **options)
    upstream = torch.ones_like(value) if upstream is None else upstream.double()
    return value.detach(), torch.autograd.grad(value, leaves, upstream)
