"""Property tests: any valid call agrees with the oracle, and divergences have the properties of divergences."""

from __future__ import annotations

import math

import oracle
import torch
from comparison import (
    UNIT_ROUNDOFF,
    VALUE_PROMISE,
    Expected,
    assert_gradient_close,
    assert_lse_close,
    assert_rows_close,
    assert_within,
    expected_attention,
    expected_relation,
    promised_row_error,
)
from generators import gaussian, perturbed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import Problem, attention_problems, relation_problems

import linearard  # noqa: F401  (registers the operators)

ops = torch.ops.linearard
# The device is the same for all examples of a test.
FIXTURE = HealthCheck.function_scoped_fixture
bounded = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, FIXTURE])
few = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, FIXTURE])


def check_kernels(operator: str, problem: Problem, expected: Expected, grad_kl: torch.Tensor) -> None:
    forward, backward = getattr(ops, f"{operator}_forward"), getattr(ops, f"{operator}_backward")
    kl, lse_student, lse_teacher = forward(*problem.inputs, **problem.options)
    assert_rows_close(kl, expected)
    assert_lse_close(lse_student, expected, "student")
    assert_lse_close(lse_teacher, expected, "teacher")
    gradients = backward(grad_kl.to(kl.dtype), *problem.inputs, lse_student, lse_teacher, **problem.options)
    gradients = (gradients,) if isinstance(gradients, torch.Tensor) else gradients
    for gradient, exact, floor in zip(gradients, expected.gradients, expected.gradient_floors, strict=True):
        assert_gradient_close(gradient, exact, floor)


def check_reduction(operator: str, problem: Problem, expected: Expected, mask: torch.Tensor | None) -> None:
    value = getattr(ops, operator)(*problem.inputs, **problem.options, **problem.reduction)
    exact = oracle.reduce_rows(expected.rows.kl, mask=mask, **problem.reduction)
    row_error = promised_row_error(expected.rows.kl, expected.dtype) + expected.row_rounding
    allowed = oracle.reduce_rows(row_error, mask=mask, **problem.reduction)
    # The weights have their own rounding, and the sum has one.
    assert_within(value, exact, allowed + 8.0 * UNIT_ROUNDOFF[torch.float32] * exact.abs(), "reduced value")


def upstream(problem: Problem) -> torch.Tensor:
    shape = problem.inputs[0].shape[:3]
    return torch.linspace(-0.2, 1.0, shape.numel(), device=problem.inputs[0].device).reshape(shape)


@bounded
@given(problem=relation_problems())
def test_relation_kl_agrees_with_the_oracle(device, problem):
    problem = problem.to(device)
    grad_kl = upstream(problem)
    expected = expected_relation(*problem.inputs, grad_kl, **problem.options)
    check_kernels("relation_kl", problem, expected, grad_kl)
    check_reduction("relation_kl", problem, expected, problem.options.get("key_padding_mask"))


@bounded
@given(problem=attention_problems())
def test_attention_kl_agrees_with_the_oracle(device, problem):
    problem = problem.to(device)
    grad_kl = upstream(problem)
    expected = expected_attention(problem.inputs, grad_kl, **problem.options)
    check_kernels("attention_kl", problem, expected, grad_kl)
    mask = oracle.effective_query_mask(
        problem.options.get("query_padding_mask"),
        problem.options.get("key_padding_mask"),
        problem.inputs[0].shape[2],
        problem.inputs[1].shape[2],
    )
    check_reduction("attention_kl", problem, expected, mask)


@few
@given(tokens=st.integers(1, 90), seed=st.integers(0, 1000), eps=st.sampled_from([0.0, 1e-4, 0.01, 1.0]))
def test_divergences_are_not_negative(device, tokens, seed, eps):
    teacher = gaussian(1, 2, tokens, 16, seed=seed, device=device).float()
    student = perturbed(teacher.double(), eps, seed=seed + 1).float()
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        assert ops.relation_kl(student, teacher, divergence=divergence, reduction="none").min() >= -1e-7


@few
@given(tokens=st.integers(2, 90), seed=st.integers(0, 1000))
def test_reverse_is_forward_with_the_sides_swapped(device, tokens, seed):
    teacher = gaussian(1, 2, tokens, 16, seed=seed, device=device).float()
    student = perturbed(teacher.double(), 0.3, seed=seed + 1).float()
    expected = expected_relation(student, teacher, divergence="reverse_kl")
    assert_rows_close(ops.relation_kl(teacher, student, reduction="none"), expected)


@few
@given(tokens=st.integers(2, 90), seed=st.integers(0, 1000), beta=st.floats(0.05, 0.95))
def test_jensen_shannon_is_symmetric(device, tokens, seed, beta):
    """JSD with beta of (P, Q) is JSD with 1 - beta of (Q, P), and at most ln 2 for beta 1/2."""
    teacher, student = (gaussian(1, 2, tokens, 16, seed=seed + i, device=device).float() for i in range(2))
    expected = expected_relation(student, teacher, divergence="jsd", beta=beta)
    swapped = ops.relation_kl(teacher, student, divergence="jsd", beta=1.0 - beta, reduction="none")
    assert_rows_close(swapped, expected)
    largest = ops.relation_kl(10 * student, 10 * teacher, divergence="jsd", reduction="none").max()
    assert largest.item() <= math.log(2.0) * (1.0 + VALUE_PROMISE)


@few
@given(tokens=st.integers(1, 90), seed=st.integers(0, 1000))
def test_a_rotation_of_the_vectors_changes_nothing(device, tokens, seed):
    """Self-relations see inner products only: Q R has the relation of Q for every orthogonal R."""
    teacher = gaussian(1, 1, tokens, 16, seed=seed, device=device)
    student = perturbed(teacher, 0.3, seed=seed + 1)
    rotation = torch.linalg.qr(gaussian(1, 1, 16, 16, seed=seed + 2, device=device)[0, 0])[0]
    expected = expected_relation(student, teacher)
    rotated = ops.relation_kl(student @ rotation, teacher, reduction="none")
    # The rotation itself is rounded, in float64.
    assert_within(rotated, expected.rows.kl, 1e-10 + 0.0 * expected.rows.kl, "kl after a rotation")


@few
@given(tokens=st.integers(2, 90), seed=st.integers(0, 1000))
def test_a_permutation_of_the_tokens_permutes_the_rows(device, tokens, seed):
    teacher = gaussian(1, 2, tokens, 16, seed=seed, device=device).float()
    student = perturbed(teacher.double(), 0.3, seed=seed + 1).float()
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed)).to(device)
    expected = expected_relation(student[:, :, order], teacher[:, :, order])
    assert_rows_close(ops.relation_kl(student, teacher, reduction="none")[:, :, order], expected)


@few
@given(tokens=st.integers(2, 60), factor=st.sampled_from([0.5, 2.0, 4.0]), seed=st.integers(0, 1000))
def test_a_scale_is_a_temperature(device, tokens, factor, seed):
    """Scaling by a power of two commutes with rounding: x * 2 and scale * 4 agree bit by bit."""
    teacher = gaussian(1, 2, tokens, 16, seed=seed, device=device).float()
    student = perturbed(teacher.double(), 0.3, seed=seed + 1).float()
    direct = ops.relation_kl(student, teacher, scale_student=0.25 * factor**2, reduction="none", deterministic=True)
    scaled = ops.relation_kl(factor * student, teacher, scale_student=0.25, reduction="none", deterministic=True)
    assert torch.equal(direct, scaled)
