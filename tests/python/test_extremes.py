"""Finite inputs of any size give finite results; a NaN reaches what it touches and nothing else."""

from __future__ import annotations

import pytest
import torch
from comparison import (
    assert_gradient_close,
    assert_rows_close,
    assert_within,
    expected_relation,
    promised_row_error,
)
from generators import gaussian, perturbed, realistic

import linearard  # noqa: F401  (registers the operators)

ops = torch.ops.linearard
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]
# Smallest and largest magnitudes of each dtype, and what lies between.
MAGNITUDES = [
    *[(torch.float32, size) for size in (1e-45, 1e-38, 1e-20, 1e-3, 1e3, 1e10, 1e19, 1e25, 1e38, 3.4e38)],
    *[(torch.float64, size) for size in (5e-324, 1e-300, 1e-160, 1e100, 1e154, 1e200, 1e300, 1.7e308)],
    *[(torch.float16, size) for size in (6e-8, 1e-4, 300.0, 65504.0)],
    *[(torch.bfloat16, size) for size in (1e-38, 1e4, 1e25, 3.38e38)],
]


def assert_all_finite(**tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        bad = ~torch.isfinite(tensor)
        assert not bad.any(), f"{name}: {int(bad.sum())} of {tensor.numel()} values are not finite"


def check_finite(student, teacher, **options) -> None:
    """Every output of both kernels and of the reduced operator with its gradient."""
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher, **options)
    assert_all_finite(kl=kl, lse_student=lse_student, lse_teacher=lse_teacher)
    gradient = ops.relation_kl_backward(torch.ones_like(kl), student, teacher, lse_student, lse_teacher, **options)
    assert_all_finite(gradient=gradient)
    for reduction in ("sum", "mean"):
        leaf = student.clone().requires_grad_()
        value = ops.relation_kl(leaf, teacher, reduction=reduction, **options)
        value.backward()
        assert_all_finite(value=value, gradient_of_the_reduction=leaf.grad)


def signs(shape, device):
    return torch.where(torch.rand(shape, device=device) > 0.5, 1.0, -1.0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("dtype", "size"), MAGNITUDES, ids=str)
def test_uniform_magnitude(device, dtype, size, divergence):
    shape = (1, 2, 70, 20)
    student, teacher = ((signs(shape, device).double() * size).to(dtype) for _ in range(2))
    check_finite(student, teacher, divergence=divergence)
    check_finite(student, torch.zeros_like(teacher), divergence=divergence)
    check_finite(torch.zeros_like(student), teacher, divergence=divergence, causal=True)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dtype", "lowest", "highest"),
    [
        (torch.float32, -38.0, 38.0),
        (torch.float64, -300.0, 300.0),
        (torch.bfloat16, -38.0, 38.0),
        (torch.float16, -7.0, 4.8),
    ],
    ids=str,
)
def test_mixed_magnitudes(device, dtype, lowest, highest, causal, divergence):
    """Every token of another size: from the smallest to the largest of the dtype within a head."""
    shape = (1, 2, 130, 20)

    def tokens():
        exponent = lowest + (highest - lowest) * torch.rand(1, 2, 130, 1, dtype=torch.float64, device=device)
        return (signs(shape, device).double() * 10.0**exponent).to(dtype)

    check_finite(tokens(), tokens(), causal=causal, divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("size", [1e4, 1e18, 1e30, 3e38])
@pytest.mark.parametrize("position", [0, 69, 129])
def test_one_huge_token(device, size, position, divergence):
    student, teacher = gaussian(1, 2, 130, 16, device=device).float(), gaussian(1, 2, 130, 16, seed=1, device=device)
    teacher = teacher.float()
    huge = student.clone()
    huge[:, :, position] = size
    check_finite(huge, teacher, divergence=divergence)
    check_finite(student, torch.where(huge == size, huge, teacher), divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("scale", [1e-300, 1e-38, 1e30, -1e30, 1e300, -1e300, 1.7e308, -1e-300])
def test_any_finite_scale(device, scale, divergence):
    student, teacher = (gaussian(1, 2, 70, 16, seed=seed, device=device).float() for seed in (0, 1))
    check_finite(student, teacher, scale_student=scale, divergence=divergence)
    check_finite(student, teacher, scale_teacher=scale, divergence=divergence)
    check_finite(student, teacher, scale_student=scale, scale_teacher=scale, divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_two_copies_of_huge_orthogonal_tokens(device, divergence):
    """Saturation from one to the other side: the divergence is huge, the gradient is finite."""
    base = torch.eye(16, device=device).expand(1, 1, 16, 16)
    for size in (10.0, 1e3, 1e10, 1e19, 1e38):
        student, teacher = base * size, base.flip(-2) * size
        check_finite(student, teacher, divergence=divergence)
        check_finite(student, torch.ones_like(teacher) * size, divergence=divergence)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e30), (torch.float64, 1e300), (torch.float32, 1e-30)])
def test_size_of_the_upstream_gradient(device, dtype, size):
    """The gradient is linear in grad_kl as far as its dtype reaches, and never NaN where its weight is 0."""
    teacher = gaussian(1, 2, 70, 16, device=device)
    student, teacher = perturbed(teacher, 0.2).to(dtype), teacher.to(dtype)
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher)
    grad_kl = torch.full_like(kl, size)
    grad_kl[:, :, ::7] = 0.0
    expected = expected_relation(student, teacher, grad_kl)
    gradient = ops.relation_kl_backward(grad_kl, student, teacher, lse_student, lse_teacher)
    assert_gradient_close(gradient, expected.gradients[0], expected.gradient_floors[0])


def test_gradient_in_half_precision_that_would_overflow_saturates_or_is_exact(device):
    """float16 cannot hold more than 65504: a loss scale of 2^16 on top is the usual case and must work."""
    teacher = gaussian(1, 2, 70, 16, device=device)
    student, teacher = perturbed(teacher, 0.05).half(), teacher.half()
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher)
    grad_kl = torch.full_like(kl, 2.0**16)
    expected = expected_relation(student, teacher, grad_kl)
    assert expected.gradients[0].abs().max() < 65504.0
    gradient = ops.relation_kl_backward(grad_kl, student, teacher, lse_student, lse_teacher)
    assert_gradient_close(gradient, expected.gradients[0], expected.gradient_floors[0])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_not_a_number_stays_in_its_head(device, value, side, divergence):
    """Dense: every row of the head sees the token. Other heads and batch entries are bitwise unchanged."""
    inputs = [gaussian(2, 3, 70, 16, seed=seed, device=device).float() for seed in (0, 1)]
    clean = run(*inputs, divergence=divergence)
    inputs[side] = inputs[side].clone()
    inputs[side][1, 2, 33, 5] = value
    touched = run(*inputs, divergence=divergence)
    others = torch.ones(2, 3, dtype=torch.bool, device=device)
    others[1, 2] = False
    for left, right in zip(clean, touched, strict=True):
        assert torch.equal(left[others], right[others])
    if value != value:
        assert torch.isnan(touched[0][1, 2]).all()
    # An infinite logit of the one sign or the other is a probability of 0 or a NaN: only its own row is certain.
    assert not torch.isfinite(touched[0][1, 2, 33])
    assert not torch.isfinite(touched[3][1, 2, 33]).all()


def run(student, teacher, **options):
    """(kl, lse_student, lse_teacher, gradient) with an upstream gradient of ones."""
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher, deterministic=True, **options)
    gradient = ops.relation_kl_backward(
        torch.ones_like(kl), student, teacher, lse_student, lse_teacher, deterministic=True, **options
    )
    return kl, lse_student, lse_teacher, gradient


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_not_a_number_in_causal_rows_reaches_only_later_rows(device, divergence):
    student, teacher = (gaussian(1, 2, 130, 16, seed=seed, device=device).float() for seed in (0, 1))
    clean = run(student, teacher, causal=True, divergence=divergence)[0]
    student[:, :, 70] = float("nan")
    touched = run(student, teacher, causal=True, divergence=divergence)[0]
    expected = expected_relation(student[:, :, :70], teacher[:, :, :70], causal=True, divergence=divergence)
    assert torch.isfinite(clean).all()
    assert_rows_close(touched[:, :, :70], expected)
    assert torch.isnan(touched[:, :, 70:]).all()


def test_not_a_number_stays_in_its_sequence(device):
    student, teacher = (gaussian(1, 2, 150, 16, seed=seed, device=device).float() for seed in (0, 1))
    cu_seqlens = torch.tensor([0, 40, 110, 150], dtype=torch.int32, device=device)
    student[:, :, 50] = float("nan")
    kl, _, _, gradient = run(student, teacher, cu_seqlens=cu_seqlens)
    for start, end in ((0, 40), (110, 150)):
        expected = expected_relation(student[:, :, start:end], teacher[:, :, start:end])
        assert_rows_close(kl[:, :, start:end], expected)
        assert_gradient_close(gradient[:, :, start:end], expected.gradients[0], expected.gradient_floors[0])
    assert torch.isnan(kl[:, :, 40:110]).all()


def test_constant_inputs(device):
    """All tokens equal, all zero: uniform relations, divergence exactly representable as 0."""
    ones = torch.ones(1, 2, 70, 16, device=device)
    for student, teacher in ((ones, ones), (0 * ones, 0 * ones), (3 * ones, ones), (0 * ones, ones)):
        kl, _, _, gradient = run(student, teacher)
        assert kl.abs().max().item() <= 1e-7
        assert gradient.abs().max().item() <= 1e-5


def test_spread_of_lse_beyond_the_range_of_one_exponential(device):
    """A hundred times the logits of a real model: spreads of thousands of nats take the exact path.

    At a thousand nats a float32 logit is known to 1e-4 only: a row may be off by what its own lse is off.
    """
    teacher = 10.0 * realistic(1, 4, 200, 64, device=device)
    student = perturbed(teacher, 0.01, multiplicative=True)
    for options in ({}, {"causal": True}, {"divergence": "reverse_kl"}, {"divergence": "jsd"}):
        expected = expected_relation(student.float(), teacher.float(), **options)
        kl, _, _, gradient = run(student.float(), teacher.float(), **options)
        of_logits = expected.row_rounding + expected.lse_student_rounding + expected.lse_teacher_rounding
        allowed = promised_row_error(expected.rows.kl, expected.dtype) + of_logits
        assert_within(kl, expected.rows.kl, allowed, f"kl with {options}")
        assert_gradient_close(gradient, expected.gradients[0], expected.gradient_floors[0])


@pytest.mark.parametrize("size", [1e-38, 1e10, 1e19, 1e38])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_attention_of_any_size(device, size, divergence):
    shape = (1, 2, 70, 16)
    query, key, query_teacher, key_teacher = (signs(shape, device) * size for _ in range(4))
    query.requires_grad_()
    key.requires_grad_()
    for reduction in ("sum", "mean"):
        query.grad = key.grad = None
        value = ops.attention_kl(query, key, query_teacher, key_teacher, divergence=divergence, reduction=reduction)
        value.backward()
        assert_all_finite(value=value, gradient_of_the_query=query.grad, gradient_of_the_key=key.grad)
