"""The ways to compute the relation KL that are compared: loss(student, teacher) for [B, H, N, D] tensors, dense.

Each returns mean over B, H and N of KL(teacher's row || student's row) with the scale D^-0.5, differentiable in the
student. Formulas: docs/mathematics.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import linearard

# Rows of one chunk: its logits stay below 1 GiB up to N = 16,384 with 32 heads, and the matrix products are large
# enough to run at full speed.
CHUNK_ROWS = 512

Loss = Callable[[Tensor, Tensor], Tensor]


def naive(student: Tensor, teacher: Tensor) -> Tensor:
    """N x N logits, log_softmax and kl_div in the inputs' dtype: what one writes first."""
    log_q, log_p = (torch.log_softmax(x.shape[-1] ** -0.5 * (x @ x.mT), -1) for x in (student, teacher.detach()))
    return torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True) / student[..., 0].numel()


def _chunk(student_rows: Tensor, student: Tensor, teacher_rows: Tensor, teacher: Tensor) -> Tensor:
    """Sum of the divergences of some rows, softmax and divergence in float32."""
    scale = student.shape[-1] ** -0.5
    log_q = torch.log_softmax((scale * (student_rows @ student.mT)).float(), -1)
    log_p = torch.log_softmax((scale * (teacher_rows @ teacher.mT)).float(), -1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)


def _checkpointed_chunk(student_rows: Tensor, student: Tensor, teacher_rows: Tensor, teacher: Tensor) -> Tensor:
    result: Tensor = checkpoint(
        _chunk, student_rows, student, teacher_rows, teacher, use_reentrant=False, preserve_rng_state=False
    )
    return result


def row_chunks(student: Tensor, teacher: Tensor, chunk: Callable[..., Tensor] = _checkpointed_chunk) -> Tensor:
    """CHUNK_ROWS rows at a time against all keys; the backward computes each chunk again."""
    teacher = teacher.detach()
    chunks = zip(student.split(CHUNK_ROWS, 2), teacher.split(CHUNK_ROWS, 2), strict=True)
    total = torch.stack([chunk(rows, student, teacher_rows, teacher) for rows, teacher_rows in chunks])
    return total.sum() / student[..., 0].numel()


def compiled_row_chunks() -> Loss:
    """The same with each chunk under torch.compile: one graph, for the present shape.

    The loop stays outside: unrolled into one graph, hundreds of chunks would compile for hours.
    """
    torch._dynamo.reset()  # the graphs of other shapes count towards its limit
    return partial(row_chunks, chunk=torch.compile(_checkpointed_chunk, dynamic=False))


def _attention_cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, scale=scale)
    return out[0], out[1].reshape(query.shape[:3])


def _attention_flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
    return out[0], out[1]


def _attention_cpu(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    return out[0], out[1]


class _Composition(torch.autograd.Function):
    """Five fused attention calls: O_SS, O_TT and O_TS forward, the two column sums of the gradient backward.

    kl_i = scale y_i . O_TT_i - scale x_i . O_TS_i + lse_s_i - lse_t_i. The row term of the gradient is O_SS - O_TS;
    the column term follows from the symmetry of the logits: sum_i Q_ij x_i = e^(lse_j) sum_i Q_ji e^(-lse_i) x_i.
    Attention returns its sums in the inputs' dtype, so every term of these differences is rounded to 16 bits.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, attention: Any) -> Tensor:
        scale = student.shape[-1] ** -0.5
        out_ss, lse_student = attention(student, student, student, scale)
        out_tt, lse_teacher = attention(teacher, teacher, teacher, scale)
        out_ts, _ = attention(teacher, teacher, student, scale)
        kl = scale * ((teacher.float() * out_tt).sum(-1) - (student.float() * out_ts).sum(-1))
        ctx.save_for_backward(student, teacher, out_ss, out_ts, lse_student, lse_teacher)
        ctx.attention = attention
        return (kl + lse_student - lse_teacher).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        student, teacher, out_ss, out_ts, lse_student, lse_teacher = ctx.saved_tensors
        scale = student.shape[-1] ** -0.5
        gradient = out_ss.float() - out_ts
        for x, lse, sign in ((student, lse_student, 1), (teacher, lse_teacher, -1)):
            weight = (lse - lse.mean(-1, keepdim=True)).exp()[..., None]  # about the mean: bounded for usual inputs
            columns, _ = ctx.attention(x, x, (student / weight).to(student.dtype), scale)
            gradient = torch.addcmul(gradient, columns.float(), weight, value=sign)
        gradient *= gradients[0] * scale / student[..., 0].numel()
        return gradient.to(student.dtype), None, None


def composition(student: Tensor, teacher: Tensor, attention: Callable[..., Any]) -> Tensor:
    """The loss from fused attention calls; `attention` returns (output, log-sum-exp)."""
    result: Tensor = _Composition.apply(student, teacher.detach(), attention)
    return result


@dataclass(frozen=True)
class Peer:
    """One way to compute the loss."""

    label: str
    make: Callable[[], Loss]
    devices: tuple[str, ...] = ("cpu", "cuda")
    matrices: float = 0  # N x N tensors of the inputs' dtype alive at once, at least: what cannot fit is not tried
    chunks: float = 0  # likewise CHUNK_ROWS x N tensors of float32

    def least_bytes(self, shape: tuple[int, int, int, int], element_size: int) -> float:
        """Extra memory that it takes at least for inputs [B, H, N, D]."""
        batch, heads, tokens, _ = shape
        per_row = self.matrices * tokens * element_size + self.chunks * min(CHUNK_ROWS, tokens) * 4
        return batch * heads * tokens * per_row


PEERS = {
    "linearard": Peer("linearard", lambda: linearard.relation_kl),
    "naive": Peer("naive N x N", lambda: naive, matrices=4),
    "chunks": Peer("row chunks + checkpoint", lambda: row_chunks, chunks=3),
    "compiled_chunks": Peer("row chunks, torch.compile", compiled_row_chunks, chunks=1),
    "cudnn": Peer("cuDNN attention calls", lambda: partial(composition, attention=_attention_cudnn), ("cuda",)),
    "flash": Peer("flash attention calls", lambda: partial(composition, attention=_attention_flash), ("cuda",)),
    "cpu_attention": Peer("fused attention calls", lambda: partial(composition, attention=_attention_cpu), ("cpu",)),
}
