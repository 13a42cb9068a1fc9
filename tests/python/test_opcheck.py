"""torch.library.opcheck on every operator: schema, autograd registration, fake tensors, AOT dispatch."""

from __future__ import annotations

import pytest
import torch

import linearard  # noqa: F401  (registers the operators)

ops = torch.ops.linearard


def tensors(*shapes, device, dtype=torch.float32, requires_grad=False):
    return [torch.randn(shape, device=device).to(dtype).requires_grad_(requires_grad) for shape in shapes]


def relation_options(device):
    """One entry per kind of argument; None stands for the defaults."""
    return [
        {},
        {"causal": True, "divergence": "reverse_kl", "scale_student": 0.3, "scale_teacher": -0.1},
        {"key_padding_mask": torch.rand(1, 9, device=device) > 0.3, "divergence": "jsd", "beta": 0.2},
        {"cu_seqlens": torch.tensor([0, 4, 9], device=device), "deterministic": True},
    ]


REDUCTIONS = [
    {"reduction": "none"},
    {"reduction": "sum"},
    {"row_weight": True},
    {"num_items": True},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("index", range(4))
def test_relation_kl(device, index, requires_grad, dtype):
    (student,) = tensors((1, 2, 9, 4), device=device, dtype=dtype, requires_grad=requires_grad)
    (teacher,) = tensors((1, 2, 9, 6), device=device)
    options = {**relation_options(device)[index], **REDUCTIONS[index]}
    if "row_weight" in options:
        options["row_weight"] = torch.rand(1, 9, device=device)
    if "num_items" in options:
        options["num_items"] = torch.tensor(7, device=device)
    torch.library.opcheck(ops.relation_kl.default, (student, teacher), options)


@pytest.mark.parametrize("index", range(4))
def test_relation_kernels(device, index):
    student, teacher = tensors((1, 2, 9, 4), (1, 2, 9, 6), device=device)
    options = relation_options(device)[index]
    torch.library.opcheck(ops.relation_kl_forward.default, (student, teacher), options)
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher, **options)
    torch.library.opcheck(
        ops.relation_kl_backward.default, (torch.rand_like(kl), student, teacher, lse_student, lse_teacher), options
    )
    torch.library.opcheck(ops.relation_kl_forward.default, (student, teacher), {**options, "lse_teacher": lse_teacher})
    lse_options = {k: v for k, v in options.items() if k in ("causal", "key_padding_mask", "cu_seqlens")}
    torch.library.opcheck(ops.relation_lse.default, (teacher,), {"scale": 0.3, **lse_options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_of_rows(device, dtype):
    kl = torch.rand(2, 3, 5, dtype=dtype, device=device, requires_grad=True)
    torch.library.opcheck(ops.mean_of_rows.default, (kl,))
    torch.testing.assert_close(ops.mean_of_rows(kl), kl.mean())
    (gradient,) = torch.autograd.grad(ops.mean_of_rows(kl), kl)
    torch.testing.assert_close(gradient, torch.full_like(kl, 1 / 30))
    grad = torch.tensor(3.0, dtype=dtype, device=device)
    torch.library.opcheck(ops.mean_of_rows_backward.default, (grad, 7))
    torch.testing.assert_close(ops.mean_of_rows_backward(grad, 7), grad / 7)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("index", range(4))
def test_attention_kl(device, index, requires_grad):
    student = tensors((1, 4, 9, 4), (1, 2, 9, 4), device=device, requires_grad=requires_grad)
    teacher = tensors((1, 4, 9, 6), (1, 2, 9, 6), device=device)
    options = {**relation_options(device)[index], **REDUCTIONS[index]}
    if "row_weight" in options:
        options["row_weight"] = torch.rand(1, 9, device=device)
    if "num_items" in options:
        options["num_items"] = torch.tensor(7, device=device)
    torch.library.opcheck(ops.attention_kl.default, (*student, *teacher), options)


@pytest.mark.parametrize("index", range(4))
def test_attention_kernels(device, index):
    inputs = tensors((1, 4, 9, 4), (1, 2, 9, 4), (1, 4, 9, 6), (1, 2, 9, 6), device=device)
    options = relation_options(device)[index]
    torch.library.opcheck(ops.attention_kl_forward.default, inputs, options)
    kl, lse_student, lse_teacher = ops.attention_kl_forward(*inputs, **options)
    torch.library.opcheck(
        ops.attention_kl_backward.default, (torch.rand_like(kl), *inputs, lse_student, lse_teacher), options
    )


@pytest.mark.parametrize("strided", [False, True])
def test_fakes_have_the_strides_of_the_results(device, strided):
    """A fake that disagrees with the kernel breaks compiled graphs silently; opcheck compares only what it runs."""
    student, teacher = tensors((2, 9, 3, 4), (2, 9, 3, 4), device=device)
    if strided:
        student, teacher = student.transpose(1, 2), teacher.transpose(1, 2)
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher)
    gradient = ops.relation_kl_backward(kl, student, teacher, lse_student, lse_teacher)
    real = (kl, lse_student, lse_teacher, gradient)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, y, g, a, b = (mode.from_tensor(t) for t in (student, teacher, kl, lse_student, lse_teacher))
        fake = (*ops.relation_kl_forward(x, y), ops.relation_kl_backward(g, x, y, a, b))
    for left, right in zip(real, fake, strict=True):
        assert (left.shape, left.stride(), left.dtype) == (right.shape, right.stride(), right.dtype)
