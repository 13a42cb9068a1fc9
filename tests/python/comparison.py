"""How far a result may be from the float64 oracle, written once, with the reasons.

The allowed error is never a number that happens to pass. It is the sum of
* the project's promise (relative, by dtype; below `VALUE_PROMISE` and `GRADIENT_PROMISE`),
* twice the error of rounding the exact result to the dtype in which it is returned,
* what rounding the logits themselves to the compute dtype does to the exact result, to first and second order: no
  algorithm that holds logits in that dtype can avoid it. test_precision.py grants the values none of this.
"""

from __future__ import annotations

from dataclasses import dataclass

import oracle
import torch
from torch import Tensor

# float32 computation: relative 1e-4 from 1e-3 nats, relative 1e-2 from 1e-6 nats, absolute 1e-7 below.
SMALL_DIVERGENCE, TINY_DIVERGENCE = 1e-3, 1e-6
VALUE_PROMISE, SMALL_VALUE_PROMISE, TINY_VALUE_PROMISE = 1e-4, 1e-2, 1e-7
VALUE_PROMISE_FLOAT64 = 1e-9
# Relative error of a gradient in the Frobenius norm, by the dtype of the gradient.
GRADIENT_PROMISE = {torch.float32: 2e-4, torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float64: 1e-9}
# Rounding P and Q themselves to float32: 5e-7 (1 + size of the logits) |scale (P + P^T) X|, see docs/mathematics.md.
GRADIENT_FLOOR = 5e-7
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def compute_dtype(*inputs: Tensor) -> torch.dtype:
    """Of logits, sums, values and statistics: float64 as soon as one input is."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


@dataclass
class Side:
    """One side (student or teacher) of a problem: float64 queries and keys with padding zeroed, and the scale."""

    query: Tensor
    key: Tensor
    scale: float

    def logits(self) -> Tensor:
        return oracle.logits(self.query, self.key, self.scale)

    def rounding(self, unit: float) -> Tensor:
        """Error of the logits when products of D terms are summed in the compute dtype, [B, H, Nq, Nk].

        Each of the D partial sums is rounded; independent roundings add up to sqrt(D) units of the sum of magnitudes,
        and twice that is exceeded by none of a million logits.
        """
        magnitude = oracle.logits(self.query.abs(), self.key.abs(), abs(self.scale))
        return 2.0 * self.query.shape[-1] ** 0.5 * unit * magnitude


@dataclass
class Expected:
    """Exact results of a problem, and what rounding its logits to the compute dtype does to them."""

    rows: oracle.Rows
    row_rounding: Tensor  # [B, H, Nq]
    lse_student_rounding: Tensor  # [B, H, Nq]
    lse_teacher_rounding: Tensor
    largest_logit: Tensor  # [B, H], of either side, in magnitude
    gradients: tuple[Tensor, ...]  # float64, of sum(grad_kl * kl)
    gradient_floors: tuple[Tensor, ...]  # [B, H] each, Frobenius norm
    dtype: torch.dtype


def _merge_groups(gradient: Tensor, heads: int) -> Tensor:
    """Sum the gradient of repeated key heads into the heads that they were repeated from."""
    batch, repeated, keys, head_dim = gradient.shape
    return gradient.reshape(batch, heads, repeated // max(heads, 1), keys, head_dim).sum(2)


def _size_of_logits(logits: Tensor, visible: Tensor, self_relation: bool) -> Tensor:
    """Mean |s_ii| of the rows of a head, [B, H]; the pair form has no diagonal: mean of the largest |s_ij| of a row."""
    magnitude = logits.abs().masked_fill(~visible, 0.0)
    if not magnitude.numel():
        return magnitude.sum((-1, -2))
    per_row = magnitude.diagonal(dim1=-2, dim2=-1) if self_relation else magnitude.amax(-1)
    return per_row.sum(-1) / visible.any(-1).sum(-1).clamp(min=1)


def _largest(logits: Tensor, visible: Tensor) -> Tensor:
    """Largest magnitude of a visible logit of each head, [B, H]."""
    magnitude = logits.detach().abs().masked_fill(~visible, 0.0).flatten(-2)
    return magnitude.amax(-1) if magnitude.shape[-1] else magnitude.sum(-1)


def _subtracted_terms(divergence: str, p: Tensor, q: Tensor, rows: oracle.Rows) -> Tensor:
    """Magnitude of what is subtracted to form the gradient on a logit; for the forward KL that is P, as promised."""
    if divergence == "forward_kl":
        return p
    if divergence == "jsd":
        return p + q
    tiny = torch.finfo(torch.float64).tiny
    log_ratio = (q.clamp(min=tiny) / p.clamp(min=tiny)).log()
    return q * (1.0 + log_ratio.abs() + rows.kl[..., None])


def _vector_gradients(weights: Tensor, query: Tensor, key: Tensor, scale: float, self_relation: bool):
    """Gradients on the vectors from weights [B, Hq, Nq, Nk] on the logits: (scale (G + G^T) X,), or one each."""
    repeats = query.shape[1] // max(key.shape[1], 1)
    by_query = scale * (weights @ key.repeat_interleave(repeats, dim=1))
    by_key = scale * (weights.transpose(-1, -2) @ query)
    return (by_query + by_key,) if self_relation else (by_query, _merge_groups(by_key, key.shape[1]))


def _expected(
    student: Side,
    teacher: Side,
    visible: Tensor,
    grad_kl: Tensor,
    dtype: torch.dtype,
    self_relation: bool,
    divergence: str,
    beta: float,
    promised_floor: bool = False,
) -> Expected:
    unit = UNIT_ROUNDOFF[dtype]
    with torch.enable_grad():
        s, t = (side.logits().detach().requires_grad_() for side in (student, teacher))
        rows = oracle.divergence_rows(s, t, visible, divergence, beta)
        by_student, by_teacher = torch.autograd.grad(rows.kl.sum(), (s, t))
    rows = oracle.Rows(*(value.detach() for value in rows))
    s, t, hidden = s.detach(), t.detach(), ~visible
    q = (s - rows.lse_student[..., None]).exp().masked_fill(hidden, 0.0)
    p = (t - rows.lse_teacher[..., None]).exp().masked_fill(hidden, 0.0)

    # Of a logit, and of the log-probability that it becomes.
    of_student = student.rounding(unit) + 4.0 * unit * (1.0 + rows.lse_student.abs()[..., None])
    of_teacher = teacher.rounding(unit) + 4.0 * unit * (1.0 + rows.lse_teacher.abs()[..., None])
    second_order = 0.5 * ((p + q) * (of_student + of_teacher) ** 2).sum(-1)
    row_rounding = (by_student.abs() * of_student + by_teacher.abs() * of_teacher).sum(-1) + second_order

    upstream = grad_kl.double()[..., None]
    gradients = _vector_gradients(upstream * by_student, student.query, student.key, student.scale, self_relation)
    # The promised floor multiplies X itself; roundings have signs of their own, so in general magnitudes add up.
    query, key = (x if promised_floor else x.abs() for x in (student.query, student.key))
    size = 1.0 + _size_of_logits(s, visible, self_relation)
    weights = GRADIENT_FLOOR * (unit / UNIT_ROUNDOFF[torch.float32]) * size[..., None, None] * upstream.abs()
    floors = _vector_gradients(
        weights * _subtracted_terms(divergence, p, q, rows), query, key, abs(student.scale), self_relation
    )
    return Expected(
        rows,
        row_rounding,
        (q * of_student).sum(-1),
        (p * of_teacher).sum(-1),
        torch.maximum(_largest(s, visible), _largest(t, visible)),
        gradients,
        tuple(torch.linalg.vector_norm(floor, dim=(-1, -2)) for floor in floors),
        dtype,
    )


def _default_scale(scale: float | None, x: Tensor) -> float:
    return x.shape[-1] ** -0.5 if scale is None else scale


def expected_relation(student: Tensor, teacher: Tensor, grad_kl: Tensor | None = None, **options) -> Expected:
    """Exact results for relation_kl_forward and relation_kl_backward; grad_kl [B, H, N] defaults to ones.

    Beside the options of the operator: promised_floor=True takes the gradient's floor exactly as it is promised.
    """
    mask = options.get("key_padding_mask")
    tokens = student.shape[2]
    visible = oracle.visibility(
        tokens,
        tokens,
        query_padding_mask=mask,
        key_padding_mask=mask,
        cu_seqlens=options.get("cu_seqlens"),
        causal=options.get("causal", False),
        device=student.device,
    ).expand(student.shape[0], student.shape[1], tokens, tokens)
    x, y = oracle.prepared(student.detach(), mask), oracle.prepared(teacher.detach(), mask)
    return _expected(
        Side(x, x, _default_scale(options.get("scale_student"), x)),
        Side(y, y, _default_scale(options.get("scale_teacher"), y)),
        visible,
        torch.ones(student.shape[:3], dtype=torch.float64, device=student.device) if grad_kl is None else grad_kl,
        compute_dtype(student, teacher),
        True,
        options.get("divergence", "forward_kl"),
        options.get("beta", 0.5),
        options.get("promised_floor", False),
    )


def expected_attention(inputs: tuple[Tensor, ...], grad_kl: Tensor | None = None, **options) -> Expected:
    """Exact results for attention_kl_forward and attention_kl_backward of (query, key) x (student, teacher)."""
    query_student, key_student, query_teacher, key_teacher = (x.detach() for x in inputs)
    queries, keys = query_student.shape[2], key_student.shape[2]
    key_mask = options.get("key_padding_mask")
    query_mask = oracle.effective_query_mask(options.get("query_padding_mask"), key_mask, queries, keys)
    visible = oracle.visibility(
        queries,
        keys,
        query_padding_mask=query_mask,
        key_padding_mask=key_mask,
        cu_seqlens=options.get("cu_seqlens"),
        cu_seqlens_key=options.get("cu_seqlens_key"),
        causal=options.get("causal", True),
        device=query_student.device,
    ).expand(*query_student.shape[:3], keys)

    def side(query: Tensor, key: Tensor, scale: float | None) -> Side:
        return Side(oracle.prepared(query, query_mask), oracle.prepared(key, key_mask), _default_scale(scale, query))

    return _expected(
        side(query_student, key_student, options.get("scale_student")),
        side(query_teacher, key_teacher, options.get("scale_teacher")),
        visible,
        torch.ones(query_student.shape[:3], dtype=torch.float64, device=key_student.device)
        if grad_kl is None
        else grad_kl,
        compute_dtype(*inputs),
        False,
        options.get("divergence", "forward_kl"),
        options.get("beta", 0.5),
        options.get("promised_floor", False),
    )


def promised_row_error(kl: Tensor, dtype: torch.dtype) -> Tensor:
    """The project's promise for each row; `kl` is exact."""
    if dtype == torch.float64:
        return VALUE_PROMISE_FLOAT64 * kl
    small = torch.where(kl >= TINY_DIVERGENCE, SMALL_VALUE_PROMISE * kl, TINY_VALUE_PROMISE)
    return torch.where(kl >= SMALL_DIVERGENCE, VALUE_PROMISE * kl, small)


def _worst(excess: Tensor, actual: Tensor, exact: Tensor, allowed: Tensor) -> str:
    position = int(excess.reshape(-1).argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(position), excess.shape))
    flat = [x.broadcast_to(excess.shape).reshape(-1)[position].item() for x in (actual, exact, allowed)]
    return f"worst at {where}: got {flat[0]:.9g}, expected {flat[1]:.9g}, allowed error {flat[2]:.3g}"


def assert_within(actual: Tensor, exact: Tensor, allowed: Tensor, name: str) -> None:
    """Finite first, then the allowed error, with the worst position in the message."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    actual = actual.detach().double()
    not_finite = ~torch.isfinite(actual)
    assert not not_finite.any(), f"{name}: {int(not_finite.sum())} values of {actual.numel()} are not finite"
    excess = (actual - exact).abs() - allowed
    assert not (excess > 0).any(), f"{name}: {_worst(excess, actual, exact, allowed)}"


def assert_rows_close(kl: Tensor, expected: Expected, name: str = "kl", logit_rounding: bool = True) -> None:
    """Kl [B, H, N] against the promise; with what the rounding of the logits costs unless it is switched off."""
    allowed = promised_row_error(expected.rows.kl, expected.dtype)
    if logit_rounding:
        allowed = allowed + expected.row_rounding + 4.0 * UNIT_ROUNDOFF[expected.dtype] * expected.rows.kl
    assert kl.dtype == expected.dtype, f"{name}: dtype {kl.dtype}, expected {expected.dtype}"
    assert_within(kl, expected.rows.kl, allowed, name)


def assert_lse_close(actual: Tensor, expected: Expected, side: str) -> None:
    """Log-sum-exp of `side`: rounding of the logits, of the result, and of the reference of the exponentials.

    One exponential serves row i and column j, or teacher and student, because its exponent is a sum of logits and
    references: (s - t) - shift + t - reference is four additions of numbers up to twice the largest logit of the head,
    which is 8 roundings of that size.
    """
    exact = getattr(expected.rows, f"lse_{side}")
    rounding = getattr(expected, f"lse_{side}_rounding")
    allowed = rounding + 8.0 * UNIT_ROUNDOFF[expected.dtype] * (1.0 + expected.largest_logit[..., None])
    assert_within(actual, exact, allowed, f"lse_{side}")


def assert_gradient_close(gradient: Tensor, exact: Tensor, floor: Tensor, name: str = "gradient") -> None:
    """Frobenius norm of the error of every head against the promise for the dtype of the gradient.

    Each head is a problem of its own: a norm over all heads would hide the small ones behind the saturated.
    """
    assert gradient.shape == exact.shape, f"{name}: shape {tuple(gradient.shape)}, expected {tuple(exact.shape)}"
    actual = gradient.detach().double()
    not_finite = ~torch.isfinite(actual)
    assert not not_finite.any(), f"{name}: {int(not_finite.sum())} values of {actual.numel()} are not finite"
    rounded = exact.to(gradient.dtype).double()
    rounding = 2.0 * torch.linalg.vector_norm(rounded - exact, dim=(-1, -2))
    size = torch.linalg.vector_norm(exact, dim=(-1, -2))
    error = torch.linalg.vector_norm(actual - exact, dim=(-1, -2))
    allowed = torch.maximum(GRADIENT_PROMISE[gradient.dtype] * size, rounding) + floor
    excess = error - allowed
    assert not (excess > 0).any(), (
        f"{name}: {_worst(excess, error, torch.zeros_like(error), allowed)} (norm of the error of a head), "
        f"norm of the exact gradient up to {size.max().item():.3g}"
    )
