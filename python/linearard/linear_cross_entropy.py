"""Cross-entropy of a linear head, chunk by chunk: logits of all tokens and the whole vocabulary never exist at once."""

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

    The gradients are computed together with the value, as in Liger-Kernel (arXiv 2410.10989): the logits of a chunk
    are needed once. Under autocast the products are made in its dtype, as those of a linear layer would be; softmax and
    sums are float32, and so is the accumulated gradient of the weight.

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
    if chunk is None:
        chunk = max(1, _CHUNK_ELEMENTS // weight.shape[0])
    device_type = hidden.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
    result: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, chunk, dtype)
    return result


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
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and need_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.to(dtype)
            offset = None if bias is None else bias.to(dtype)
            for start in range(0, hidden.shape[0], chunk):
                rows = slice(start, start + chunk)
                states, target = hidden[rows].to(dtype), targets[rows]
                real = target != IGNORED
                index = target.masked_fill(~real, 0)[:, None]
                scores = log_softmax(linear(states, head, offset), dim=-1, dtype=torch.float32)
                total -= scores.gather(1, index)[:, 0].masked_fill(~real, 0).sum()
                if grad_hidden is None and grad_weight is None and grad_bias is None:
                    continue
                # softmax - one-hot, in the place of the scores
                slope = scores.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=torch.float32))
                slope *= real[:, None]
                if grad_bias is not None:
                    grad_bias += slope.sum(0)
                rounded = slope.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = rounded @ head
                if grad_weight is not None:
                    grad_weight += rounded.mT @ states
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_output).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_output).to(weight_dtype)
        if grad_bias is not None:
            grad_bias = (grad_bias * grad_output).to(bias_dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None
