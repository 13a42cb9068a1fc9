"""Odd sizes, every head dim, strides, expanded and transposed inputs, and empty problems."""

from __future__ import annotations

import pytest
import torch
from comparison import (
    assert_gradient_close,
    assert_lse_close,
    assert_rows_close,
    expected_attention,
    expected_relation,
)
from generators import gaussian, perturbed

import linearard  # noqa: F401  (registers the operators)

ops = torch.ops.linearard


def check(student, teacher, **options) -> None:
    grad_kl = torch.ones(student.shape[:3], device=student.device)
    expected = expected_relation(student, teacher, **options)
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher, **options)
    assert_rows_close(kl, expected)
    assert_lse_close(lse_teacher, expected, "teacher")
    gradient = ops.relation_kl_backward(grad_kl, student, teacher, lse_student, lse_teacher, **options)
    assert_gradient_close(gradient, expected.gradients[0], expected.gradient_floors[0])


def pair(shape, device, dtype=torch.float32):
    teacher = gaussian(*shape, device=device)
    return perturbed(teacher, 0.2).to(dtype), teacher.to(dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 255, 257, 383, 511, 513])
def test_tokens(device, tokens, causal):
    check(*pair((1, 2, tokens, 20), device), causal=causal)


@pytest.mark.parametrize(
    "head_dim", [1, 2, 3, 5, 7, 8, 9, 15, 17, 31, 33, 63, 64, 65, 80, 96, 127, 128, 129, 192, 255, 256, 257, 511, 512]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_head_dims(device, head_dim, dtype):
    check(*pair((1, 2, 70, head_dim), device, dtype))


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (5, 1), (1, 7), (3, 5), (40, 3)])
def test_batches_and_heads(device, batch, heads):
    check(*pair((batch, heads, 33, 8), device))


def strided_views(x):
    """The same values as x [B, H, N, D] under other strides; the last dimension stays contiguous."""
    batch, heads, tokens, head_dim = x.shape
    yield "batch first, heads next to the head dim", x.transpose(1, 2).contiguous().transpose(1, 2)
    yield "tokens first", x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    yield "heads first", x.transpose(0, 1).contiguous().transpose(0, 1)
    padded = torch.full((batch, heads, tokens, head_dim + 3), float("nan"), dtype=x.dtype, device=x.device)
    padded[..., :head_dim] = x
    yield "gap after each vector", padded[..., :head_dim]
    sparse = torch.full((batch, 2 * heads, 3 * tokens, head_dim), float("nan"), dtype=x.dtype, device=x.device)
    sparse[:, ::2, 1::3] = x
    yield "every second head, every third token", sparse[:, ::2, 1::3]
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape)
    yield "storage offset of one element", shifted.copy_(x)


OTHER_ALIGNMENT = ("gap after each vector", "storage offset of one element")


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_strides(device, index, dtype, side):
    """Results are bitwise those of contiguous inputs: strides are read, not arithmetic. But vectors of 16 bits that are
    not whole pieces of 16 bytes apart run on other CUDA kernels.
    """
    student, teacher = pair((2, 3, 70, 24), device, dtype)
    name, strided_student = list(strided_views(student))[index]
    _, strided_teacher = list(strided_views(teacher))[index]
    used_student = strided_student if side != "teacher" else student
    used_teacher = strided_teacher if side != "student" else teacher
    assert torch.equal(used_student, student), name
    results = []
    for x, y in ((student, teacher), (used_student, used_teacher)):
        kl, lse_student, lse_teacher = ops.relation_kl_forward(x, y, deterministic=True)
        results.append((kl, ops.relation_kl_backward(kl, x, y, lse_student, lse_teacher, deterministic=True)))
    if device.type == "cuda" and dtype == torch.bfloat16 and name in OTHER_ALIGNMENT:
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=0, msg=name)
        assert_gradient_close(results[0][1], results[1][1].double(), 0.0)
    else:
        assert torch.equal(results[0][0], results[1][0]), name
        assert torch.equal(results[0][1], results[1][1]), name


def test_expanded_inputs(device):
    """Stride 0: one teacher for the whole batch, one student head for all heads."""
    student, teacher = pair((3, 4, 40, 16), device)
    check(student, teacher[:1].expand(3, -1, -1, -1))
    check(student[:, :1].expand(-1, 4, -1, -1), teacher)
    same_token = teacher[:, :, :1].expand(-1, -1, 40, -1)
    check(student, same_token)


def test_gradient_of_an_expanded_and_of_a_transposed_leaf(device):
    student, teacher = pair((1, 1, 40, 16), device)
    leaf = student.clone().requires_grad_()
    ops.relation_kl(leaf.expand(2, 3, 40, 16), teacher.expand(2, 3, 40, 16), reduction="sum").backward()
    expected = expected_relation(student, teacher)
    assert_gradient_close(leaf.grad, 6 * expected.gradients[0], 6 * expected.gradient_floors[0])
    leaf = student.transpose(1, 2).contiguous().requires_grad_()
    ops.relation_kl(leaf.transpose(1, 2), teacher, reduction="sum").backward()
    assert_gradient_close(leaf.grad.transpose(1, 2), expected.gradients[0], expected.gradient_floors[0])


def test_grad_kl_with_strides(device):
    """What autograd hands over is often expanded: a sum's gradient has strides of 0."""
    student, teacher = pair((2, 2, 40, 16), device)
    _kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher)
    for grad_kl in (
        torch.ones((), device=device).expand(2, 2, 40),
        torch.rand(40, 2, 2, device=device).permute(1, 2, 0),
    ):
        strided = ops.relation_kl_backward(grad_kl, student, teacher, lse_student, lse_teacher, deterministic=True)
        contiguous = ops.relation_kl_backward(
            grad_kl.contiguous(), student, teacher, lse_student, lse_teacher, deterministic=True
        )
        assert torch.equal(strided, contiguous)


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 0, 8), (0, 0, 0, 8)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_empty_problems(device, shape, reduction, divergence):
    """No batch, no head or no token: empty rows, a loss of 0 and an empty gradient."""
    student = torch.randn(shape, device=device, requires_grad=True)
    teacher = torch.randn(shape, device=device)
    value = ops.relation_kl(student, teacher, reduction=reduction, divergence=divergence)
    assert value.shape == (shape[:3] if reduction == "none" else ())
    assert value.sum().item() == 0.0
    value.sum().backward()
    assert student.grad.shape == shape
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student.detach(), teacher, divergence=divergence)
    assert kl.shape == lse_student.shape == lse_teacher.shape == shape[:3]
    assert ops.relation_lse(teacher).shape == shape[:3]


@pytest.mark.parametrize(
    ("query_shape", "key_shape"),
    [
        ((0, 2, 5, 8), (0, 2, 5, 8)),
        ((2, 0, 5, 8), (2, 0, 5, 8)),
        ((2, 2, 0, 8), (2, 2, 5, 8)),
        ((2, 2, 5, 8), (2, 2, 0, 8)),
        ((2, 2, 0, 8), (2, 2, 0, 8)),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_empty_attention(device, query_shape, key_shape, causal):
    """Queries without any key are rows that see nothing: 0, with gradient 0."""
    query = torch.randn(query_shape, device=device, requires_grad=True)
    key = torch.randn(key_shape, device=device, requires_grad=True)
    for reduction in ("none", "sum", "mean"):
        value = ops.attention_kl(query, key, query.detach(), key.detach(), reduction=reduction, causal=causal)
        assert value.sum().item() == 0.0
        query.grad = key.grad = None
        value.sum().backward()
        assert torch.equal(query.grad, torch.zeros_like(query))
        assert torch.equal(key.grad, torch.zeros_like(key))


@pytest.mark.parametrize("head_dim", [1, 3, 17, 65, 129, 512])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (3, 70), (65, 127)])
def test_attention_sizes(device, queries, keys, head_dim):
    query, query_teacher = pair((1, 2, queries, head_dim), device)
    key, key_teacher = pair((1, 1, keys, head_dim), device)
    inputs = (query, key, query_teacher, key_teacher)
    expected = expected_attention(inputs)
    kl, lse_student, lse_teacher = ops.attention_kl_forward(*inputs)
    assert_rows_close(kl, expected)
    gradients = ops.attention_kl_backward(torch.ones_like(kl), *inputs, lse_student, lse_teacher)
    for gradient, exact, floor in zip(gradients, expected.gradients, expected.gradient_floors, strict=True):
        assert_gradient_close(gradient, exact, floor)
