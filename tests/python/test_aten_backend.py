"""The implementation in ATen operators, which serves devices without kernels of their own: here on those that have."""

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
from generators import gaussian, perturbed, realistic

import linearard  # noqa: F401  (registers the operators)

ops = torch.ops.linearard
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]


def call(name: str, *tensors: torch.Tensor, **options):
    """The operator's kernel for devices that have no own one, whatever the device of the tensors."""
    operator = getattr(ops, name).default
    return operator._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *tensors, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_relation_agrees_with_the_oracle(device, dtype, divergence, causal, masked):
    teacher = gaussian(2, 3, 90, 40, device=device)
    student, teacher = perturbed(teacher, 0.2).to(dtype), teacher.to(dtype)
    options = {"causal": causal, "divergence": divergence, "beta": 0.3}
    if masked:
        options["key_padding_mask"] = torch.rand(2, 90, device=device) > 0.25
    grad_kl = torch.rand(2, 3, 90, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    expected = expected_relation(student, teacher, grad_kl.double(), **options)
    kl, lse_student, lse_teacher = call("relation_kl_forward", student, teacher, **options)
    assert_rows_close(kl, expected)
    assert_lse_close(lse_student, expected, "student")
    assert_lse_close(lse_teacher, expected, "teacher")
    gradient = call("relation_kl_backward", grad_kl, student, teacher, lse_student, lse_teacher, **options)
    assert_gradient_close(gradient, expected.gradients[0], expected.gradient_floors[0])


def test_realistic_data(device):
    teacher = realistic(1, 4, 200, 64, device=device)
    student, teacher = perturbed(teacher, 0.01).float(), teacher.float()
    expected = expected_relation(student, teacher, torch.ones(1, 4, 200, dtype=torch.float64, device=device))
    kl, lse_student, lse_teacher = call("relation_kl_forward", student, teacher)
    assert_rows_close(kl, expected)
    gradient = call(
        "relation_kl_backward", torch.ones(1, 4, 200, device=device), student, teacher, lse_student, lse_teacher
    )
    assert_gradient_close(gradient, expected.gradients[0], expected.gradient_floors[0])


@pytest.mark.parametrize("scales", [(-0.044, 0.125), (-0.0032, 0.5)])
def test_gradient_of_the_reverse_kl_far_from_convergence(device, scales):
    """As in test_precision.py: the means of rows with hundreds of nats."""
    teacher = realistic(2, 4, 60, 64, seed=23, device=device).float()
    student = perturbed(teacher.double(), 1e-3).float()
    options = {"divergence": "reverse_kl", "scale_student": scales[0], "scale_teacher": scales[1]}
    expected = expected_relation(student, teacher, **options)
    kl, lse_student, lse_teacher = call("relation_kl_forward", student, teacher, **options)
    gradient = call("relation_kl_backward", torch.ones_like(kl), student, teacher, lse_student, lse_teacher, **options)
    assert_gradient_close(gradient, expected.gradients[0], expected.gradient_floors[0])


@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (30, 50), (50, 30)])
@pytest.mark.parametrize(("student_heads", "teacher_heads"), [(4, 4), (2, 1)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_attention_agrees_with_the_oracle(device, queries, keys, student_heads, teacher_heads, divergence):
    query_teacher = gaussian(2, 4, queries, 24, device=device)
    key_teacher = gaussian(2, teacher_heads, keys, 24, seed=5, device=device)
    inputs = (
        perturbed(query_teacher, 0.2).float(),
        gaussian(2, student_heads, keys, 24, seed=6, device=device).float(),
        query_teacher.float(),
        key_teacher.float(),
    )
    grad_kl = torch.rand(2, 4, queries, device=device)
    options = {"divergence": divergence, "causal": True}
    expected = expected_attention(inputs, grad_kl.double(), **options)
    kl, lse_student, lse_teacher = call("attention_kl_forward", *inputs, **options)
    assert_rows_close(kl, expected)
    gradients = call("attention_kl_backward", grad_kl, *inputs, lse_student, lse_teacher, **options)
    for gradient, exact, floor in zip(gradients, expected.gradients, expected.gradient_floors, strict=True):
        assert_gradient_close(gradient, exact, floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_of_saturated_attention_maps(device, dtype):
    """As in test_precision.py: a gradient that is smaller than the rounding of the log-sum-exps."""
    teacher = [realistic(1, 1, 60, 64, seed=39, device=device)] * 2
    student = [(x * (1.0 + 1e-6)).to(dtype) for x in teacher]
    teacher = [x.to(dtype) for x in teacher]
    expected = expected_attention((*student, *teacher))
    kl, lse_student, lse_teacher = call("attention_kl_forward", *student, *teacher)
    gradients = call("attention_kl_backward", torch.ones_like(kl), *student, *teacher, lse_student, lse_teacher)
    for gradient, exact, floor in zip(gradients, expected.gradients, expected.gradient_floors, strict=True):
        assert_gradient_close(gradient, exact, floor / 20.0)


def test_lse_agrees_with_the_kernel(device):
    x = gaussian(2, 3, 70, 16, device=device).float()
    torch.testing.assert_close(call("relation_lse", x, causal=True), ops.relation_lse(x, causal=True))
