"""Every kind of CUDA kernel once, on small shapes: what compute-sanitizer watches (tests/gpu/run.py).

Values are compared elsewhere; here they only have to be finite. Inputs are made on the CPU: fewer kernels of torch run
under the sanitizer, which is slow.
"""

from __future__ import annotations

import sys

import torch

import linearard  # noqa: F401  (registers the operators)

ops = torch.ops.linearard
TOKENS = 150  # more rows than the largest tile, and a ragged end
HEADS = 2
# Dimensions for which kernels of their own exist, one that is padded inside a kernel, one without 16-byte alignment.
HEAD_DIMS = (64, 80, 96, 128, 192, 256, 72, 7)

generator = torch.Generator().manual_seed(0)
calls = 0


def random(*shape: int, dtype: torch.dtype, size: float = 1.0) -> torch.Tensor:
    return (size * torch.randn(shape, generator=generator)).to(dtype).cuda()


def check(*results: torch.Tensor) -> None:
    global calls
    calls += 1
    for result in results:
        assert torch.isfinite(result.cpu()).all()


def relation(head_dim: int, dtype: torch.dtype, *, batch: int = 1, size: float = 1.0, **options) -> None:
    """Forward, backward and the statistics alone."""
    student, teacher = (random(batch, HEADS, TOKENS, head_dim, dtype=dtype, size=size) for _ in range(2))
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher, **options)
    gradient = ops.relation_kl_backward(kl, student, teacher, lse_student, lse_teacher, **options)
    visible = {name: value for name, value in options.items() if name not in ("divergence",)}
    check(kl, lse_student, lse_teacher, gradient, ops.relation_lse(teacher, **visible))


def attention(head_dim: int, dtype: torch.dtype, **options) -> None:
    """Two queries' heads share a key's, and there are more keys than queries."""
    query, query_teacher = (random(1, 2 * HEADS, TOKENS, head_dim, dtype=dtype) for _ in range(2))
    key, key_teacher = (random(1, HEADS, TOKENS + 20, head_dim, dtype=dtype) for _ in range(2))
    inputs = (query, key, query_teacher, key_teacher)
    kl, lse_student, lse_teacher = ops.attention_kl_forward(*inputs, **options)
    check(kl, *ops.attention_kl_backward(torch.ones_like(kl), *inputs, lse_student, lse_teacher, **options))


def layer(head_dim: int, dtype: torch.dtype, *, batch: int = 1, **options) -> None:
    """Queries, keys and values: three relations of different heads, and of different strides."""
    teachers = [random(batch, heads, TOKENS, head_dim, dtype=dtype) for heads in (2 * HEADS, HEADS, HEADS)]
    students = [random(batch, TOKENS, x.shape[1], head_dim, dtype=dtype).transpose(1, 2) for x in teachers]
    students = [x.requires_grad_() for x in students]
    loss = ops.layer_relation_kl(students, teachers, **options)
    loss.sum().backward()
    check(loss.detach(), *(x.grad for x in students))


def main() -> int:
    mask = (torch.rand(2, TOKENS, generator=generator) > 0.3).cuda()
    packed = torch.tensor([0, 1, 70, TOKENS], dtype=torch.int32).cuda()
    for dtype in (torch.bfloat16, torch.float16):
        for head_dim in HEAD_DIMS:
            relation(head_dim, dtype)
            relation(head_dim, dtype, causal=True)
            layer(head_dim, dtype)
    # Both widths of a warp's rows, and the kernels without tensor cores in float and in double.
    for head_dim, dtype in ((64, torch.bfloat16), (256, torch.float16), (40, torch.float32), (40, torch.float64)):
        relation(head_dim, dtype, batch=2, key_padding_mask=mask)
        layer(head_dim, dtype, batch=2, key_padding_mask=mask, causal=True)
        relation(head_dim, dtype, cu_seqlens=packed, causal=True)
        relation(head_dim, dtype, divergence="jsd")
        relation(head_dim, dtype, divergence="reverse_kl", causal=True)
        attention(head_dim, dtype)
        attention(head_dim, dtype, causal=False)
        attention(head_dim, dtype, deterministic=True)
        attention(head_dim, dtype, causal=False, deterministic=True)
    relation(300, torch.bfloat16)  # above the largest kernel with tensor cores
    # What float cannot hold goes the way in double.
    relation(64, torch.bfloat16, size=1e25)
    relation(256, torch.bfloat16, size=1e25)
    relation(40, torch.float32, size=1e25)
    torch.cuda.synchronize()
    print(f"{calls} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
