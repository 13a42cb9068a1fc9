"""relation_kl and its kernels: values, statistics, gradients, reductions and options against the oracle."""

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
    expected_relation,
    promised_row_error,
)
from generators import gaussian, perturbed, realistic

import linearard  # noqa: F401  (registers the operators)

ops = torch.ops.linearard
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DIVERGENCES = [{"divergence": "forward_kl"}, {"divergence": "reverse_kl"}, {"divergence": "jsd", "beta": 0.3}]


def pair(batch, heads, tokens, head_dim, device, dtype=torch.float32, eps=0.2, teacher_dtype=None):
    teacher = gaussian(batch, heads, tokens, head_dim, device=device)
    return perturbed(teacher, eps).to(dtype), teacher.to(teacher_dtype or dtype)


def check_kernels(student, teacher, **options) -> None:
    """Forward and backward kernels against the exact results, with a non-uniform upstream gradient."""
    grad_kl = torch.rand(student.shape[:3], dtype=torch.float64).to(student.device) - 0.3
    if student.dtype != torch.float64 and teacher.dtype != torch.float64:
        grad_kl = grad_kl.float()
    expected = expected_relation(student, teacher, grad_kl, **options)
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher, **options)
    assert_rows_close(kl, expected)
    assert_lse_close(lse_student, expected, "student")
    assert_lse_close(lse_teacher, expected, "teacher")
    gradient = ops.relation_kl_backward(grad_kl, student, teacher, lse_student, lse_teacher, **options)
    assert gradient.dtype == student.dtype
    assert_gradient_close(gradient, expected.gradients[0], expected.gradient_floors[0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", DIVERGENCES, ids=lambda options: options["divergence"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_agree_with_the_oracle(device, dtype, options, causal):
    student, teacher = pair(2, 3, 150, 48, device, dtype)
    check_kernels(student, teacher, causal=causal, **options)


@pytest.mark.parametrize("options", DIVERGENCES, ids=lambda options: options["divergence"])
def test_realistic_data(device, options):
    teacher = realistic(1, 4, 200, 64, device=device)
    check_kernels(perturbed(teacher, 0.1).float(), teacher.float(), **options)


@pytest.mark.parametrize("student_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
def test_student_and_teacher_may_differ_in_dtype(device, student_dtype, teacher_dtype):
    check_kernels(*pair(1, 2, 70, 24, device, student_dtype, teacher_dtype=teacher_dtype))


@pytest.mark.parametrize(("student_dim", "teacher_dim"), [(16, 64), (80, 8), (1, 512)])
def test_student_and_teacher_may_differ_in_head_dim(device, student_dim, teacher_dim):
    student = gaussian(2, 2, 90, student_dim, seed=3, device=device).float()
    teacher = gaussian(2, 2, 90, teacher_dim, seed=4, device=device).float()
    check_kernels(student, teacher)


@pytest.mark.parametrize("scale_student", [None, 0.02, 0.7, 0.0, -0.1])
@pytest.mark.parametrize("scale_teacher", [None, 0.5, 0.0, -0.05])
def test_scales(device, scale_student, scale_teacher):
    student, teacher = pair(1, 2, 67, 32, device)
    check_kernels(student, teacher, scale_student=scale_student, scale_teacher=scale_teacher)


@pytest.mark.parametrize("beta", [1e-3, 0.25, 0.5, 0.9, 0.999])
def test_jensen_shannon_weight_of_the_teacher(device, beta):
    student, teacher = pair(1, 2, 67, 32, device, eps=0.5)
    check_kernels(student, teacher, divergence="jsd", beta=beta)


@pytest.mark.parametrize("scale_student", [None, 0.01, 0.0])
def test_unrelated_student_and_teacher(device, scale_student):
    """Far from convergence, where values are large and the formulas for small differences must not be used."""
    near, far = gaussian(1, 4, 300, 64, seed=1, device=device), realistic(1, 4, 300, 64, device=device)
    check_kernels(near.float(), (2.0 * gaussian(1, 4, 300, 64, device=device)).float(), scale_student=scale_student)
    check_kernels(near.float(), far.float(), scale_student=scale_student)
    check_kernels(far.float(), near.float(), scale_student=scale_student)
    check_kernels(near, far, scale_student=scale_student)


def test_student_equal_to_teacher_is_zero(device):
    teacher = realistic(1, 4, 129, 64, device=device).float()
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        student = teacher.clone().requires_grad_()
        kl = ops.relation_kl(student, teacher, divergence=divergence, reduction="none")
        assert kl.abs().max().item() <= 1e-7
        kl.sum().backward()
        expected = expected_relation(student, teacher, divergence=divergence)
        assert_gradient_close(student.grad, expected.gradients[0], expected.gradient_floors[0])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_reductions(device, reduction, weighted, masked):
    student, teacher = pair(3, 2, 40, 16, device)
    mask = torch.rand(3, 40, device=device) > 0.3 if masked else None
    row_weight = torch.rand(3, 40, device=device) if weighted else None
    check_reduction(student, teacher, reduction=reduction, row_weight=row_weight, key_padding_mask=mask)


@pytest.mark.parametrize("items", [1, 37, 0.5, 1000])
def test_num_items_replaces_the_token_count(device, items):
    student, teacher = pair(2, 2, 33, 16, device)
    row_weight = torch.rand(2, 33, device=device)
    for num_items in (torch.tensor(items, device=device), torch.tensor(float(items))):
        check_reduction(student, teacher, num_items=num_items)
        check_reduction(student, teacher, num_items=num_items, row_weight=row_weight)


def check_reduction(student, teacher, **options) -> None:
    """The public operator: value, dtype and gradient under an upstream gradient of 1."""
    student = student.detach().requires_grad_()
    value = ops.relation_kl(student, teacher, **options)
    exact, (exact_gradient,) = oracle.gradients(oracle.relation_kl, (student,), (teacher,), **options)
    row_options = {key: options[key] for key in ("key_padding_mask",) if options.get(key) is not None}
    expected = expected_relation(student, teacher, **row_options)
    row_error = promised_row_error(expected.rows.kl, expected.dtype) + expected.row_rounding
    reduction = {key: options[key] for key in ("row_weight", "reduction", "num_items") if key in options}
    # The reduction of the errors of the rows, and the rounding of the sum.
    allowed = oracle.reduce_rows(row_error, mask=options.get("key_padding_mask"), **reduction)
    assert_within(value, exact, allowed + 4.0 * UNIT_ROUNDOFF[torch.float32] * exact.abs(), "value")
    assert value.dtype == torch.float32
    value.sum().backward()
    assert_gradient_close(student.grad, exact_gradient, torch.zeros_like(exact_gradient[..., 0, 0]))


def test_count_of_zero_gives_zero(device):
    """No real token, weights that sum to zero, zero items: loss 0 and gradient 0, not NaN."""
    student, teacher = pair(2, 2, 9, 8, device)
    for options in (
        {"key_padding_mask": torch.zeros(2, 9, dtype=torch.bool, device=device)},
        {"row_weight": torch.zeros(2, 9, device=device)},
        {"num_items": torch.tensor(0, device=device)},
    ):
        leaf = student.clone().requires_grad_()
        value = ops.relation_kl(leaf, teacher, **options)
        value.backward()
        assert value.item() == 0.0
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_negative_and_zero_row_weights(device):
    student, teacher = pair(1, 2, 31, 16, device)
    row_weight = torch.linspace(-1.0, 1.0, 31, device=device)[None]
    row_weight[:, ::3] = 0.0
    value = ops.relation_kl(student, teacher, row_weight=row_weight, reduction="none")
    rows, _, _ = ops.relation_kl_forward(student, teacher)
    exact = rows.double() * row_weight[:, None, :].double()
    assert_within(value, exact, 2.0 * UNIT_ROUNDOFF[torch.float32] * exact.abs(), "weighted rows")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_row_weight_of_another_dtype(device, dtype):
    student, teacher = pair(1, 2, 31, 16, device)
    row_weight = torch.rand(1, 31, device=device).to(dtype)
    value = ops.relation_kl(student, teacher, row_weight=row_weight, reduction="sum")
    assert value.dtype == torch.float32
    exact = oracle.relation_kl(student, teacher, row_weight=row_weight, reduction="sum")
    assert_within(value, exact, 1e-4 * exact, "sum")


def test_relation_lse_is_what_the_forward_returns(device):
    student, teacher = pair(2, 2, 75, 24, device)
    mask = torch.rand(2, 75, device=device) > 0.2
    for causal in (False, True):
        options = {"key_padding_mask": mask, "causal": causal}
        expected = expected_relation(student, teacher, scale_teacher=0.3, **options)
        assert_lse_close(ops.relation_lse(teacher, scale=0.3, **options), expected, "teacher")


@pytest.mark.parametrize("options", DIVERGENCES, ids=lambda options: options["divergence"])
@pytest.mark.parametrize("causal", [False, True])
def test_cached_statistics_of_the_teacher(device, options, causal):
    student, teacher = pair(2, 2, 130, 32, device)
    lse_teacher = ops.relation_lse(teacher, causal=causal)
    grad_kl = torch.ones(student.shape[:3], device=device)
    expected = expected_relation(student, teacher, causal=causal, **options)
    kl, lse_student, returned = ops.relation_kl_forward(
        student, teacher, lse_teacher=lse_teacher, causal=causal, **options
    )
    assert torch.equal(returned, lse_teacher)
    assert_rows_close(kl, expected)
    if device.type == "cpu":  # the divergence has all digits that it has without them
        assert torch.equal(kl, ops.relation_kl_forward(student, teacher, causal=causal, **options)[0])
    gradient = ops.relation_kl_backward(grad_kl, student, teacher, lse_student, returned, causal=causal, **options)
    assert_gradient_close(gradient, expected.gradients[0], expected.gradient_floors[0])
    leaf = student.clone().requires_grad_()
    ops.relation_kl(leaf, teacher, lse_teacher=lse_teacher, causal=causal, reduction="sum", **options).backward()
    assert_gradient_close(leaf.grad, expected.gradients[0], expected.gradient_floors[0])


def test_a_row_that_sees_one_key_is_exactly_zero(device):
    student, teacher = pair(1, 2, 20, 16, device)
    first = ops.relation_kl(student, teacher, causal=True, reduction="none")[..., 0]
    assert torch.equal(first, torch.zeros_like(first))
    one = student[:, :, :1].clone().requires_grad_()
    value = ops.relation_kl(one, teacher[:, :, :1])
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(one.grad, torch.zeros_like(one))


def test_the_result_does_not_alias_and_inputs_are_untouched(device):
    student, teacher = pair(1, 2, 20, 16, device)
    before = student.clone(), teacher.clone()
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher)
    ops.relation_kl_backward(torch.ones_like(kl), student, teacher, lse_student, lse_teacher)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])
    assert len({x.data_ptr() for x in (kl, lse_student, lse_teacher)}) == 3


def test_one_tensor_as_student_and_teacher(device):
    """Student and its detached self share memory: the gradient is zero but for rounding, and nothing is halved."""
    x = gaussian(1, 2, 50, 16, device=device).float().requires_grad_()
    value = ops.relation_kl(x, x.detach(), reduction="sum")
    value.backward()
    assert abs(value.item()) <= 1e-7 * 100
    expected = expected_relation(x, x)
    assert_gradient_close(x.grad, expected.gradients[0], expected.gradient_floors[0])
