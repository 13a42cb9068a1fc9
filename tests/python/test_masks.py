"""Padding masks and packed sequences: nothing of a padded token, not even a NaN, reaches a result."""

from __future__ import annotations

import itertools

import pytest
import torch
from comparison import assert_gradient_close, assert_lse_close, assert_rows_close, expected_relation
from generators import gaussian, perturbed

import linearard  # noqa: F401  (registers the operators)

ops = torch.ops.linearard
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]
POISON = [float("nan"), float("inf"), -float("inf"), 3e38]


def pair(shape, device, dtype=torch.float32):
    teacher = gaussian(*shape, device=device)
    return perturbed(teacher, 0.2).to(dtype), teacher.to(dtype)


def run(student, teacher, **options):
    """(kl, lse_student, lse_teacher, gradient) with an upstream gradient of ones."""
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher, **options)
    gradient = ops.relation_kl_backward(torch.ones_like(kl), student, teacher, lse_student, lse_teacher, **options)
    return kl, lse_student, lse_teacher, gradient


def check(student, teacher, **options) -> None:
    expected = expected_relation(student, teacher, **options)
    kl, lse_student, lse_teacher, gradient = run(student, teacher, **options)
    assert_rows_close(kl, expected)
    assert_lse_close(lse_student, expected, "student")
    assert_lse_close(lse_teacher, expected, "teacher")
    assert_gradient_close(gradient, expected.gradients[0], expected.gradient_floors[0])


def mask_with_holes(batch, tokens, device):
    """Right padding, left padding, holes, everything real, everything padding, and a single real token."""
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    patterns = [
        slice(tokens - tokens // 3, tokens),
        slice(0, tokens // 2),
        slice(1, tokens, 3),
        slice(0, 0),
        slice(0, tokens),
    ]
    for entry in range(batch):
        mask[entry, patterns[entry % len(patterns)]] = False
    if batch > len(patterns):
        mask[len(patterns)] = False
        mask[len(patterns), tokens // 2] = True
    return mask.to(device)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [7, 150])
def test_padding(device, divergence, causal, tokens):
    mask = mask_with_holes(6, tokens, device)
    student, teacher = pair((6, 2, tokens, 16), device)
    check(student, teacher, key_padding_mask=mask, causal=causal, divergence=divergence)


def test_padding_rows_are_zero_in_every_output(device):
    mask = mask_with_holes(6, 70, device)
    student, teacher = pair((6, 2, 70, 16), device)
    kl, lse_student, lse_teacher, gradient = run(student, teacher, key_padding_mask=mask)
    padding = ~mask[:, None, :].expand_as(kl)
    for rows in (kl, lse_student, lse_teacher, ops.relation_lse(teacher, key_padding_mask=mask)):
        assert torch.equal(rows[padding], torch.zeros_like(rows[padding]))
    assert torch.equal(gradient[padding], torch.zeros_like(gradient[padding]))


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("causal", [False, True])
def test_content_of_padding_does_not_leak(device, poison, divergence, causal):
    """Bit by bit the same results, whatever stands in the padded tokens of student and teacher."""
    mask = mask_with_holes(6, 130, device)
    student, teacher = pair((6, 2, 130, 16), device)
    options = {"key_padding_mask": mask, "causal": causal, "divergence": divergence, "deterministic": True}
    clean = run(student, teacher, **options)
    padding = ~mask[:, None, :, None].expand_as(student)
    poisoned = run(student.masked_fill(padding, poison), teacher.masked_fill(padding, poison), **options)
    for name, left, right in zip(("kl", "lse_student", "lse_teacher", "gradient"), clean, poisoned, strict=True):
        assert torch.equal(left, right), name


def test_upstream_gradient_of_padding_does_not_leak(device):
    mask = mask_with_holes(6, 40, device)
    student, teacher = pair((6, 2, 40, 16), device)
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher, key_padding_mask=mask)
    grad_kl = torch.ones_like(kl)
    poisoned = grad_kl.masked_fill(~mask[:, None, :], float("nan"))
    results = [
        ops.relation_kl_backward(
            g, student, teacher, lse_student, lse_teacher, key_padding_mask=mask, deterministic=True
        )
        for g in (grad_kl, poisoned)
    ]
    assert torch.equal(*results)


def test_row_weight_of_padding_does_not_leak(device):
    mask = mask_with_holes(6, 40, device)
    student, teacher = pair((6, 2, 40, 16), device)
    row_weight = torch.rand(6, 40, device=device)
    poisoned = row_weight.masked_fill(~mask, float("nan"))
    for reduction in ("none", "sum", "mean"):
        values = []
        for weight in (row_weight, poisoned):
            leaf = student.clone().requires_grad_()
            value = ops.relation_kl(
                leaf, teacher, key_padding_mask=mask, row_weight=weight, reduction=reduction, deterministic=True
            )
            value.sum().backward()
            values.append((value.detach(), leaf.grad))
        assert torch.equal(values[0][0], values[1][0]), reduction
        assert torch.equal(values[0][1], values[1][1]), reduction


def test_padding_equals_a_shorter_sequence(device):
    student, teacher = pair((2, 2, 100, 16), device)
    mask = torch.zeros(2, 100, dtype=torch.bool, device=device)
    mask[:, :61] = True
    for causal in (False, True):
        padded = ops.relation_kl(student, teacher, key_padding_mask=mask, causal=causal, reduction="none")
        expected = expected_relation(student[:, :, :61], teacher[:, :, :61], causal=causal)
        assert_rows_close(padded[:, :, :61], expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_packed_sequences_equal_separate_calls(device, dtype, causal, divergence):
    boundaries = [0, 1, 3, 67, 131, 200]
    student, teacher = pair((1, 3, 200, 16), device)
    cu_seqlens = torch.tensor(boundaries, dtype=dtype, device=device)
    packed = run(student, teacher, cu_seqlens=cu_seqlens, causal=causal, divergence=divergence)
    check(student, teacher, cu_seqlens=cu_seqlens, causal=causal, divergence=divergence)
    for start, end in itertools.pairwise(boundaries):
        expected = expected_relation(
            student[:, :, start:end], teacher[:, :, start:end], causal=causal, divergence=divergence
        )
        assert_rows_close(packed[0][:, :, start:end], expected)
        assert_gradient_close(packed[3][:, :, start:end], expected.gradients[0], expected.gradient_floors[0])


def test_one_packed_sequence_is_no_packing(device):
    student, teacher = pair((1, 2, 70, 16), device)
    cu_seqlens = torch.tensor([0, 70], dtype=torch.int32, device=device)
    plain = ops.relation_kl_forward(student, teacher, deterministic=True)
    packed = ops.relation_kl_forward(student, teacher, cu_seqlens=cu_seqlens, deterministic=True)
    for left, right in zip(plain, packed, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_with_padding(device, causal):
    """Holes inside sequences, and one sequence that is padding altogether."""
    student, teacher = pair((1, 2, 150, 16), device)
    cu_seqlens = torch.tensor([0, 20, 90, 91, 150], dtype=torch.int32, device=device)
    mask = torch.rand(1, 150, device=device) > 0.3
    mask[:, :20] = False
    check(student, teacher, cu_seqlens=cu_seqlens, key_padding_mask=mask, causal=causal)
    poisoned = student.masked_fill(~mask[:, None, :, None], float("nan"))
    options = {"cu_seqlens": cu_seqlens, "key_padding_mask": mask, "causal": causal, "deterministic": True}
    assert torch.equal(run(poisoned, teacher, **options)[3], run(student, teacher, **options)[3])


def test_many_short_sequences(device):
    student, teacher = pair((1, 2, 128, 16), device)
    cu_seqlens = torch.arange(0, 129, 2, dtype=torch.int64, device=device)
    check(student, teacher, cu_seqlens=cu_seqlens)
    ones = torch.arange(0, 129, dtype=torch.int64, device=device)
    kl, _, _, gradient = run(student, teacher, cu_seqlens=ones)
    assert torch.equal(kl, torch.zeros_like(kl))
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_packed_sequences_of_nothing(device):
    student, teacher = pair((1, 2, 0, 16), device)
    cu_seqlens = torch.tensor([0], dtype=torch.int32, device=device)
    assert ops.relation_kl(student, teacher, cu_seqlens=cu_seqlens, reduction="none").shape == (1, 2, 0)


def test_mask_with_strides(device):
    student, teacher = pair((2, 2, 50, 16), device)
    mask = (torch.rand(50, 4, device=device) > 0.3)[:, ::2].t()
    assert not mask.is_contiguous()
    check(student, teacher, key_padding_mask=mask)
    expanded = (torch.rand(1, 50, device=device) > 0.3).expand(2, 50)
    check(student, teacher, key_padding_mask=expanded)
