"""attention_kl, the pair form: queries and keys of different number, grouped queries, bottom-right causality."""

from __future__ import annotations

import oracle
import pytest
import torch
from comparison import (
    UNIT_ROUNDOFF,
    assert_gradient_close,
    assert_lse_close,
    assert_rows_close,
    assert_within,
    expected_attention,
    promised_row_error,
)
from generators import gaussian, perturbed

import linearard  # noqa: F401  (registers the operators)

ops = torch.ops.linearard
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DIVERGENCES = [{"divergence": "forward_kl"}, {"divergence": "reverse_kl"}, {"divergence": "jsd", "beta": 0.3}]


def problem(batch, query_heads, key_heads, queries, keys, head_dim, device, dtype=torch.float32, eps=0.2):
    """(query_student, key_student, query_teacher, key_teacher)."""
    query = gaussian(batch, query_heads, queries, head_dim, seed=1, device=device)
    key = gaussian(batch, key_heads, keys, head_dim, seed=2, device=device)
    return (
        perturbed(query, eps, seed=3).to(dtype),
        perturbed(key, eps, seed=4).to(dtype),
        query.to(dtype),
        key.to(dtype),
    )


def check_kernels(inputs, **options) -> None:
    """Forward and backward kernels against the exact results, with a non-uniform upstream gradient."""
    grad_kl = torch.rand(inputs[0].shape[:3], dtype=torch.float64).to(inputs[0].device) - 0.3
    if all(x.dtype != torch.float64 for x in inputs):
        grad_kl = grad_kl.float()
    expected = expected_attention(inputs, grad_kl, **options)
    kl, lse_student, lse_teacher = ops.attention_kl_forward(*inputs, **options)
    assert_rows_close(kl, expected)
    assert_lse_close(lse_student, expected, "student")
    assert_lse_close(lse_teacher, expected, "teacher")
    gradients = ops.attention_kl_backward(grad_kl, *inputs, lse_student, lse_teacher, **options)
    for name, x, gradient, exact, floor in zip(
        ("query", "key"), inputs, gradients, expected.gradients, expected.gradient_floors, strict=False
    ):
        assert gradient.dtype == x.dtype
        assert_gradient_close(gradient, exact, floor, f"gradient of the {name}")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", DIVERGENCES, ids=lambda options: options["divergence"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_agree_with_the_oracle(device, dtype, options, causal):
    check_kernels(problem(2, 2, 2, 130, 130, 40, device, dtype), causal=causal, **options)


@pytest.mark.parametrize(("queries", "keys"), [(1, 100), (60, 100), (100, 60), (100, 1), (65, 64), (64, 129)])
@pytest.mark.parametrize("causal", [True, False])
def test_queries_and_keys_differ_in_number(device, queries, keys, causal):
    """Causal with more queries than keys: the first queries see nothing and are 0."""
    check_kernels(problem(1, 2, 2, queries, keys, 24, device), causal=causal)


def test_first_queries_without_keys_are_zero(device):
    inputs = problem(1, 2, 2, 10, 4, 8, device)
    leaves = [x.clone().requires_grad_() for x in inputs[:2]]
    kl = ops.attention_kl(*leaves, *inputs[2:], reduction="none")
    kl.sum().backward()
    assert torch.equal(kl[:, :, :7], torch.zeros_like(kl[:, :, :7]))  # the seventh sees one key: exactly 0 as well
    assert torch.equal(leaves[0].grad[:, :, :7], torch.zeros_like(leaves[0].grad[:, :, :7]))
    assert (kl[:, :, 7:] > 0).all()


@pytest.mark.parametrize(("query_heads", "key_heads"), [(9, 3), (8, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("options", DIVERGENCES, ids=lambda options: options["divergence"])
def test_grouped_queries(device, query_heads, key_heads, options):
    check_kernels(problem(2, query_heads, key_heads, 50, 50, 16, device), **options)


def test_groups_of_student_and_teacher_may_differ(device):
    query_student, key_student, _, _ = problem(1, 6, 2, 40, 40, 16, device)
    _, _, query_teacher, key_teacher = problem(1, 6, 3, 40, 40, 24, device)
    check_kernels((query_student, key_student, query_teacher, key_teacher))


def test_dtypes_of_the_four_inputs_may_differ_by_side(device):
    query, key, query_teacher, key_teacher = problem(1, 2, 2, 40, 40, 16, device)
    check_kernels((query.bfloat16(), key.bfloat16(), query_teacher.double(), key_teacher.double()))
    check_kernels((query, key, query_teacher.half(), key_teacher.half()))


@pytest.mark.parametrize(("scale_student", "scale_teacher"), [(0.5, 0.1), (0.0, None), (-0.2, 0.3), (None, -0.2)])
def test_scales(device, scale_student, scale_teacher):
    inputs = problem(1, 2, 2, 67, 67, 16, device)
    check_kernels(inputs, scale_student=scale_student, scale_teacher=scale_teacher)


def test_query_and_key_masks(device):
    inputs = problem(3, 2, 2, 37, 53, 16, device)
    query_mask = torch.rand(3, 37, device=device) > 0.3
    key_mask = torch.rand(3, 53, device=device) > 0.3
    query_mask[1], key_mask[2] = False, False
    for causal in (False, True):
        check_kernels(inputs, query_padding_mask=query_mask, key_padding_mask=key_mask, causal=causal)
        check_kernels(inputs, query_padding_mask=query_mask, causal=causal)
        check_kernels(inputs, key_padding_mask=key_mask, causal=causal)


def test_key_mask_stands_for_the_queries_when_there_are_as_many(device):
    inputs = problem(2, 2, 2, 37, 37, 16, device)
    mask = torch.rand(2, 37, device=device) > 0.4
    both = ops.attention_kl(*inputs, key_padding_mask=mask, query_padding_mask=mask)
    assert torch.equal(ops.attention_kl(*inputs, key_padding_mask=mask), both)
    check_kernels(inputs, key_padding_mask=mask)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences(device, dtype, causal):
    cu_seqlens = torch.tensor([0, 1, 30, 64, 90], dtype=dtype, device=device)
    cu_seqlens_key = torch.tensor([0, 7, 20, 90, 100], dtype=dtype, device=device)
    check_kernels(problem(1, 4, 2, 90, 90, 16, device), cu_seqlens=cu_seqlens, causal=causal)
    check_kernels(
        problem(1, 4, 2, 90, 100, 16, device),
        cu_seqlens=cu_seqlens,
        cu_seqlens_key=cu_seqlens_key,
        causal=causal,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_diagonals_of_packed_sequences(device, dtype):
    """The first sequence has more keys than queries, the second far fewer: its diagonal says nothing of the first."""
    check_kernels(
        problem(1, 2, 2, 150, 12, 32, device, dtype),
        cu_seqlens=torch.tensor([0, 3, 150], device=device),
        cu_seqlens_key=torch.tensor([0, 8, 12], device=device),
    )


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize(
    "given", [(), ("row_weight",), ("query_padding_mask",), ("row_weight", "query_padding_mask"), ("num_items",)]
)
def test_reductions(device, reduction, given):
    if "num_items" in given and reduction != "mean":
        pytest.skip("num_items belongs to the mean")
    inputs = problem(2, 4, 2, 30, 41, 16, device)
    available = {
        "row_weight": torch.rand(2, 30, device=device),
        "query_padding_mask": torch.rand(2, 30, device=device) > 0.4,
        "num_items": torch.tensor(17, device=device),
    }
    options = {name: available[name] for name in given}
    leaves = [x.clone().requires_grad_() for x in inputs[:2]]
    value = ops.attention_kl(*leaves, *inputs[2:], reduction=reduction, **options)
    exact, exact_gradients = oracle.gradients(
        oracle.attention_kl, inputs[:2], inputs[2:], reduction=reduction, **options
    )
    mask = options.get("query_padding_mask")
    expected = expected_attention(inputs, **({} if mask is None else {"query_padding_mask": mask}))
    allowed = oracle.reduce_rows(
        promised_row_error(expected.rows.kl, expected.dtype) + expected.row_rounding,
        mask=mask,
        reduction=reduction,
        row_weight=options.get("row_weight"),
        num_items=options.get("num_items"),
    )
    assert_within(value, exact, allowed + 4.0 * UNIT_ROUNDOFF[torch.float32] * exact.abs(), "value")
    value.sum().backward()
    for leaf, gradient in zip(leaves, exact_gradients, strict=True):
        assert_gradient_close(leaf.grad, gradient, torch.zeros_like(gradient[..., 0, 0]))


def test_equals_relation_kl_for_keys_that_are_the_queries(device):
    """With Q = K the pair form is the self-relation, and its two gradients add up to the one of the relation."""
    student, _, teacher, _ = problem(2, 2, 2, 70, 70, 16, device)
    grad_kl = torch.rand(2, 2, 70, device=device)
    for causal in (False, True):
        expected = expected_attention((student, student, teacher, teacher), grad_kl, causal=causal)
        kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher, causal=causal)
        assert_rows_close(kl, expected)
        gradient = ops.relation_kl_backward(grad_kl, student, teacher, lse_student, lse_teacher, causal=causal)
        assert_gradient_close(gradient, sum(expected.gradients), sum(expected.gradient_floors))


@pytest.mark.parametrize("requires_grad", [(True, False), (False, True)])
def test_gradient_for_one_of_query_and_key(device, requires_grad):
    inputs = problem(1, 2, 2, 40, 40, 16, device)
    leaves = [x.clone().requires_grad_(wanted) for x, wanted in zip(inputs[:2], requires_grad, strict=True)]
    ops.attention_kl(*leaves, *inputs[2:], reduction="sum").backward()
    expected = expected_attention(inputs)
    for leaf, exact, floor in zip(leaves, expected.gradients, expected.gradient_floors, strict=True):
        if leaf.requires_grad:
            assert_gradient_close(leaf.grad, exact, floor)
        else:
            assert leaf.grad is None
