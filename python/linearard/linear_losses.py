"""Losses of a linear head, chunk by chunk: logits of all tokens and the whole vocabulary never exist at once.

The gradients are computed together with the value, as in Liger-Kernel (arXiv 2410.10989): the logits of a chunk are
needed once. Under autocast the products are made in its dtype, as those of a linear layer would be; softmax and sums
are float32, and so is the accumulated gradient of the weight.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax

IGNORED = -100
# Logits that exist at a time: 2^26 float32 numbers are 256 MiB.
_CHUNK_ELEMENTS = 2**26


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *, chunk: int | None = None
) -> Tensor:
    """The summed cross-entropy, in nats, of softmax(hidden weight^T + bias) with `targets`.

    Args:
        hidden: [T, D] floating point; gets a gradient in its dtype.
        weight: [V, D]; gets a gradient where it requires one.
        targets: [T] int64 in [0, V), or -100: counts for nothing.
        bias: [V] or None.
        chunk: tokens whose logits exist at a time; default: 256 MiB of float32 logits.

    Returns:
        A float32 scalar. Differentiable once.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: expected hidden [T, D], weight [V, D] and targets [T], got {list(hidden.shape)}, "
            f"{list(weight.shape)} and {list(targets.shape)}"
        )
    result: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, _chunk(weight, chunk), _dtype(hidden))
    return result


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The summed KL(teacher || student), in nats, of the rows of softmax(hidden weight^T + bias).

    Args:
        hidden: [T, D] floating point; gets a gradient in its dtype.
        weight: [V, D]; gets a gradient where it requires one.
        teacher_hidden, teacher_weight: [T, E] and [V, E]; no gradients.
        bias, teacher_bias: [V] or None.
        mask: [T] bool: rows that count; None: all.
        chunk: tokens whose logits, of both, exist at a time; default: 256 MiB of float32 logits each.

    Returns:
        A float32 scalar. Differentiable once.
    """
    matrices = (hidden, weight, teacher_hidden, teacher_weight)
    fitting = all(matrix.ndim == 2 for matrix in matrices) and (
        hidden.shape[1] == weight.shape[1]
        and teacher_hidden.shape[1] == teacher_weight.shape[1]
        and (hidden.shape[0], weight.shape[0]) == (teacher_hidden.shape[0], teacher_weight.shape[0])
        and (mask is None or mask.shape == hidden.shape[:1])
    )
    if not fitting:
        found = ", ".join(str(list(matrix.shape)) for matrix in matrices)
        raise ValueError(
            "linear_kl: expected hidden [T, D], weight [V, D], teacher_hidden [T, E], teacher_weight [V, E] and mask "
            f"[T], got {found} and {None if mask is None else list(mask.shape)}"
        )
    result: Tensor = _LinearKL.apply(
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask, _chunk(weight, chunk), _dtype(hidden)
    )
    return result


def _chunk(weight: Tensor, chunk: int | None) -> int:
    return chunk or max(1, _CHUNK_ELEMENTS // weight.shape[0])


def _dtype(hidden: Tensor) -> torch.dtype:
    """That of the matrix products."""
    device_type = hidden.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype


class _Gradients:
    """The gradients of a linear head's loss, filled chunk by chunk; those that nobody wants stay None."""

    def __init__(
        self, needed: tuple[bool, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        need_hidden, need_weight, need_bias = needed
        self.hidden = torch.empty_like(hidden) if need_hidden else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and need_bias else None
        self.wanted = need_hidden or need_weight or self.bias is not None
        self._dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        self._product_dtype = dtype

    def add(self, rows: slice, slope: Tensor, states: Tensor, head: Tensor) -> None:
        """The chunk `rows`, whose logits have the gradient `slope` [rows, V] and came from `states` and `head`."""
        if self.bias is not None:
            self.bias += slope.sum(0)
        rounded = slope.to(self._product_dtype)
        if self.hidden is not None:
            self.hidden[rows] = rounded @ head
        if self.weight is not None:
            self.weight += rounded.mT @ states

    def save(self, ctx: Any) -> None:
        """Keep them for `restore`."""
        ctx.save_for_backward(self.hidden, self.weight, self.bias)
        ctx.dtypes = self._dtypes

    @staticmethod
    def restore(ctx: Any, grad_output: Tensor) -> list[Tensor | None]:
        """Those of hidden, weight and bias, times `grad_output`, in the dtypes of what they belong to."""
        return [
            None if gradient is None else (gradient * grad_output).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        dtype: torch.dtype,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradients = _Gradients(ctx.needs_input_grad[:3], hidden, weight, bias, dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            head, offset = weight.to(dtype), _cast(bias, dtype)
            for rows in _slices(len(hidden), chunk):
                states, target = hidden[rows].to(dtype), targets[rows]
                real = target != IGNORED
                index = target.masked_fill(~real, 0)[:, None]
                scores = log_softmax(linear(states, head, offset), dim=-1, dtype=torch.float32)
                total -= scores.gather(1, index)[:, 0].masked_fill(~real, 0).sum()
                if gradients.wanted:
                    # softmax - one-hot, in the place of the scores
                    slope = scores.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=torch.float32))
                    gradients.add(rows, slope.mul_(real[:, None]), states, head)
        gradients.save(ctx)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return (*_Gradients.restore(ctx, grad_output), None, None, None)


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        mask: Tensor | None,
        chunk: int,
        dtype: torch.dtype,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradients = _Gradients(ctx.needs_input_grad[:3], hidden, weight, bias, dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            head, offset = weight.to(dtype), _cast(bias, dtype)
            teacher_head, teacher_offset = teacher_weight.to(dtype), _cast(teacher_bias, dtype)
            for rows in _slices(len(hidden), chunk):
                states, others = hidden[rows].to(dtype), teacher_hidden[rows].to(dtype)
                student = log_softmax(linear(states, head, offset), dim=-1, dtype=torch.float32)
                teacher = log_softmax(linear(others, teacher_head, teacher_offset), dim=-1, dtype=torch.float32)
                probability = teacher.exp()
                divergence = teacher.sub_(student).mul_(probability).sum(-1)
                total += (divergence if mask is None else divergence.masked_fill(~mask[rows], 0)).sum()
                if gradients.wanted:
                    slope = student.exp_().sub_(probability)
                    gradients.add(
                        rows, slope if mask is None else slope.masked_fill_(~mask[rows, None], 0), states, head
                    )
        gradients.save(ctx)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return (*_Gradients.restore(ctx, grad_output), *(None,) * 6)


def _slices(total: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, total, chunk)]


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
