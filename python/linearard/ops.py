"""The operators as typed Python functions.

Each is the operator of the same name in `torch.ops.linearard`, so everything that holds for those holds here: autograd
(once, in C++), fake tensors, `torch.compile(fullgraph=True)`. Formulas: docs/mathematics.md.

Common to all: tensors are [B, H, N, D] (batch, heads, tokens, head dimension) as in `scaled_dot_product_attention`, of
dtype float32, float64, bfloat16 or float16, 1 <= D <= 512, with any strides whose last dimension is contiguous. All
tensors of a call are on one device. Divergences are in nats. Invalid arguments raise RuntimeError with a text that
names the operator, the argument, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
Reduction = Literal["none", "sum", "mean"]


def relation_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    row_weight: Tensor | None = None,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    causal: bool = False,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    reduction: Reduction = "mean",
    num_items: Tensor | None = None,
    deterministic: bool | None = None,
    lse_teacher: Tensor | None = None,
) -> Tensor:
    """Divergence between the self-relations softmax(scale X X^T) of a student and of a frozen teacher, row by row.

    Time grows with N^2, memory with N: no N x N tensor is made. Source: LinearARD, arXiv 2604.00004.

    Args:
        student: [B, H, N, Ds]. Receives the gradient, in its own dtype.
        teacher: [B, H, N, Dt]; dtype and head dimension may differ from the student's. Must not require grad.
        key_padding_mask: [B, N] bool, True = a real token. Padding takes part neither as row nor as key.
        cu_seqlens: [S + 1] int32 or int64, strictly increasing from 0 to N: boundaries of packed sequences. Needs
            B = 1; relations stay inside a sequence.
        row_weight: [B, N] floating point, multiplies the divergence of each token's rows.
        scale_student: factor on the student's inner products, any finite number; default Ds^-0.5.
        scale_teacher: the same for the teacher; default Dt^-0.5.
        causal: row i sees keys j <= i only, of its sequence.
        divergence: "forward_kl" = KL(teacher || student), "reverse_kl" = KL(student || teacher), or "jsd" =
            beta KL(P || M) + (1 - beta) KL(Q || M) with P the teacher, Q the student, M = beta P + (1 - beta) Q.
        beta: weight of the teacher in that mixture, inside (0, 1).
        reduction: "none" returns the weighted rows; "sum" their sum; "mean" divides that sum by H and by the number of
            real tokens (the sum of row_weight over them where it is given).
        num_items: scalar tensor that replaces that number of tokens (gradient accumulation); "mean" only.
        deterministic: results equal bit by bit from run to run; None follows torch.use_deterministic_algorithms.
        lse_teacher: [B, H, N] statistics of the teacher from `relation_lse`, for the backward.

    Returns:
        [B, H, N] for "none" (0 for padding), else a scalar; float64 if either input is, otherwise float32.
        Differentiable once, with respect to the student.
    """
    result: Tensor = torch.ops.linearard.relation_kl(
        student,
        teacher,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        row_weight=row_weight,
        scale_student=scale_student,
        scale_teacher=scale_teacher,
        causal=causal,
        divergence=divergence,
        beta=beta,
        reduction=reduction,
        num_items=num_items,
        deterministic=deterministic,
        lse_teacher=lse_teacher,
    )
    return result


def relation_kl_forward(
    student: Tensor,
    teacher: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    causal: bool = False,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    deterministic: bool | None = None,
    lse_teacher: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward kernel of `relation_kl`, without autograd.

    Arguments as there.

    Returns:
        (kl, lse_student, lse_teacher), each [B, H, N], float32 (float64 if either input is): the unweighted divergence
        of each row and the log-sum-exp of its scaled inner products on both sides, all in nats; 0 for padding.
    """
    kl, lse_student, lse_teacher_out = torch.ops.linearard.relation_kl_forward(
        student,
        teacher,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        scale_student=scale_student,
        scale_teacher=scale_teacher,
        causal=causal,
        divergence=divergence,
        beta=beta,
        deterministic=deterministic,
        lse_teacher=lse_teacher,
    )
    return kl, lse_student, lse_teacher_out


def relation_kl_backward(
    grad_kl: Tensor,
    student: Tensor,
    teacher: Tensor,
    lse_student: Tensor,
    lse_teacher: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    causal: bool = False,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    deterministic: bool | None = None,
) -> Tensor:
    """The backward kernel of `relation_kl`, without autograd.

    Args:
        grad_kl: [B, H, N], the upstream gradient of each row's divergence.
        student: as in the forward.
        teacher: as in the forward.
        lse_student: [B, H, N] as `relation_kl_forward` returned it.
        lse_teacher: [B, H, N] as `relation_kl_forward` returned it.

    The other arguments must be those of the forward.

    Returns:
        The gradient of sum(grad_kl * kl) with respect to the student, in its shape and dtype.
    """
    result: Tensor = torch.ops.linearard.relation_kl_backward(
        grad_kl,
        student,
        teacher,
        lse_student,
        lse_teacher,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        scale_student=scale_student,
        scale_teacher=scale_teacher,
        causal=causal,
        divergence=divergence,
        beta=beta,
        deterministic=deterministic,
    )
    return result


def layer_relation_kl(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    row_weight: Tensor | None = None,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    causal: bool = False,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    reduction: Literal["sum", "mean"] = "mean",
    num_items: Tensor | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    """`relation_kl` of several relations in one call: queries, keys and values of one layer or of several.

    On a GPU, relations of the same dtype and head dimension share their kernels: launches, and multiprocessors that one
    relation would leave idle, count where N is a few thousand or less.

    Args:
        students: R tensors [B, H_r, N, Ds_r]. B, N and the device are the same for all; heads, head dimensions and
            dtypes may differ. Those that require grad receive one.
        teachers: R tensors [B, H_r, N, Dt_r], each as its student's teacher. Must not require grad.
        reduction: "sum" or "mean"; for the rows there is `layer_relation_kl_forward`.

    The other arguments, and errors, are those of `relation_kl`; they apply to every relation, so a scale that is not
    given is each tensor's own D^-0.5.

    Returns:
        [R], what `relation_kl` returns for each pair; float64 if any input is, otherwise float32. Differentiable once,
        with respect to the students.
    """
    result: Tensor = torch.ops.linearard.layer_relation_kl(
        students,
        teachers,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        row_weight=row_weight,
        scale_student=scale_student,
        scale_teacher=scale_teacher,
        causal=causal,
        divergence=divergence,
        beta=beta,
        reduction=reduction,
        num_items=num_items,
        deterministic=deterministic,
    )
    return result


def layer_relation_kl_forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    causal: bool = False,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    deterministic: bool | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The rows of `layer_relation_kl`; arguments as there.

    Returns:
        (kl, lse_student, lse_teacher), of each R tensors [B, H_r, N] as `relation_kl_forward` returns them, float64
        where either tensor of the pair is. kl is differentiable once, with respect to the students.
    """
    kl, lse_student, lse_teacher = torch.ops.linearard.layer_relation_kl_forward(
        students,
        teachers,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        scale_student=scale_student,
        scale_teacher=scale_teacher,
        causal=causal,
        divergence=divergence,
        beta=beta,
        deterministic=deterministic,
    )
    return kl, lse_student, lse_teacher


def layer_relation_kl_backward(
    grad_kl: Sequence[Tensor],
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    lse_student: Sequence[Tensor],
    lse_teacher: Sequence[Tensor],
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    causal: bool = False,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    deterministic: bool | None = None,
) -> list[Tensor]:
    """The backward kernels of `layer_relation_kl`, without autograd.

    Args:
        grad_kl: R tensors [B, H_r, N], the upstream gradient of each row's divergence.
        students: as in the forward.
        teachers: as in the forward.
        lse_student: R tensors [B, H_r, N] as `layer_relation_kl_forward` returned them.
        lse_teacher: R tensors [B, H_r, N] as `layer_relation_kl_forward` returned them.

    The other arguments must be those of the forward.

    Returns:
        The gradients of sum(grad_kl[r] * kl[r]) with respect to students[r], R tensors in their shapes and dtypes.
    """
    result: list[Tensor] = torch.ops.linearard.layer_relation_kl_backward(
        grad_kl,
        students,
        teachers,
        lse_student,
        lse_teacher,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        scale_student=scale_student,
        scale_teacher=scale_teacher,
        causal=causal,
        divergence=divergence,
        beta=beta,
        deterministic=deterministic,
    )
    return result


def relation_lse(
    x: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    deterministic: bool | None = None,
) -> Tensor:
    """lse_i = log sum_j exp(scale x_i . x_j): the statistics of one side, for teachers that are cached.

    Args:
        x: [B, H, N, D].
        scale: factor on the inner products; default D^-0.5.

    The other arguments are those of `relation_kl`, without autograd.

    Returns:
        [B, H, N] in nats, float32 (float64 for float64); 0 for padding.
    """
    result: Tensor = torch.ops.linearard.relation_lse(
        x,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        scale=scale,
        causal=causal,
        deterministic=deterministic,
    )
    return result


def attention_kl(
    query_student: Tensor,
    key_student: Tensor,
    query_teacher: Tensor,
    key_teacher: Tensor,
    *,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_key: Tensor | None = None,
    row_weight: Tensor | None = None,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    causal: bool = True,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    reduction: Reduction = "mean",
    num_items: Tensor | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    """Divergence between the attention maps softmax(scale Q K^T) of a student and of a frozen teacher, row by row.

    The pair form of `relation_kl`: attention-map distillation without an Nq x Nk tensor.

    Args:
        query_student: [B, Hq, Nq, Ds]. Receives a gradient.
        key_student: [B, Hk, Nk, Ds], Hq a multiple of Hk (grouped queries). Receives a gradient.
        query_teacher: [B, Hq, Nq, Dt]. Must not require grad.
        key_teacher: [B, Hkt, Nk, Dt], Hq a multiple of Hkt. Must not require grad.
        query_padding_mask: [B, Nq] bool, True = a real query. Unset and Nq = Nk: the same as key_padding_mask.
        key_padding_mask: [B, Nk] bool, True = a real key.
        cu_seqlens: [S + 1] boundaries of packed queries; needs B = 1.
        cu_seqlens_key: [S + 1] boundaries of packed keys; unset: the same as cu_seqlens.
        row_weight: [B, Nq] floating point, multiplies the divergence of each query's rows.
        causal: query i sees keys j <= i + (Nk - Nq): aligned to the bottom right, of its sequence.

    The other arguments, and errors, as in `relation_kl`.

    Returns:
        [B, Hq, Nq] for "none", else a scalar; float64 if any input is, otherwise float32. A row that sees no key is 0.
        Differentiable once, with respect to both student tensors.
    """
    result: Tensor = torch.ops.linearard.attention_kl(
        query_student,
        key_student,
        query_teacher,
        key_teacher,
        query_padding_mask=query_padding_mask,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        cu_seqlens_key=cu_seqlens_key,
        row_weight=row_weight,
        scale_student=scale_student,
        scale_teacher=scale_teacher,
        causal=causal,
        divergence=divergence,
        beta=beta,
        reduction=reduction,
        num_items=num_items,
        deterministic=deterministic,
    )
    return result


def attention_kl_forward(
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
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward kernel of `attention_kl`, without autograd; arguments as there.

    Returns:
        (kl, lse_student, lse_teacher), each [B, Hq, Nq], unweighted, in nats; 0 for padding and for rows without a key.
    """
    kl, lse_student, lse_teacher = torch.ops.linearard.attention_kl_forward(
        query_student,
        key_student,
        query_teacher,
        key_teacher,
        query_padding_mask=query_padding_mask,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        cu_seqlens_key=cu_seqlens_key,
        scale_student=scale_student,
        scale_teacher=scale_teacher,
        causal=causal,
        divergence=divergence,
        beta=beta,
        deterministic=deterministic,
    )
    return kl, lse_student, lse_teacher


def attention_kl_backward(
    grad_kl: Tensor,
    query_student: Tensor,
    key_student: Tensor,
    query_teacher: Tensor,
    key_teacher: Tensor,
    lse_student: Tensor,
    lse_teacher: Tensor,
    *,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_key: Tensor | None = None,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    causal: bool = True,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The backward kernel of `attention_kl`, without autograd.

    Args:
        grad_kl: [B, Hq, Nq], the upstream gradient of each row's divergence.
        lse_student: [B, Hq, Nq] as `attention_kl_forward` returned it.
        lse_teacher: [B, Hq, Nq] as `attention_kl_forward` returned it.

    The other arguments must be those of the forward.

    Returns:
        (grad_query_student, grad_key_student), in the shapes and dtypes of the two student tensors.
    """
    grad_query, grad_key = torch.ops.linearard.attention_kl_backward(
        grad_kl,
        query_student,
        key_student,
        query_teacher,
        key_teacher,
        lse_student,
        lse_teacher,
        query_padding_mask=query_padding_mask,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        cu_seqlens_key=cu_seqlens_key,
        scale_student=scale_student,
        scale_teacher=scale_teacher,
        causal=causal,
        divergence=divergence,
        beta=beta,
        deterministic=deterministic,
    )
    return grad_query, grad_key
