"""The autograd formula: gradcheck, accumulation, upstream gradients, and clear errors where there is none."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_gradient_close, expected_relation
from generators import gaussian, perturbed

import linearard  # noqa: F401  (registers the operators)

ops = torch.ops.linearard
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]


def pair(shape, device, dtype=torch.float32):
    teacher = gaussian(*shape, device=device)
    return perturbed(teacher, 0.3).to(dtype), teacher.to(dtype)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradcheck_of_the_relation(device, divergence, causal, reduction):
    student, teacher = pair((2, 1, 5, 2), device, torch.float64)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]], device=device)
    row_weight = torch.rand(2, 5, dtype=torch.float64, device=device)

    def function(x):
        return ops.relation_kl(
            x,
            teacher,
            key_padding_mask=mask,
            row_weight=row_weight,
            divergence=divergence,
            beta=0.3,
            causal=causal,
            reduction=reduction,
        )

    assert torch.autograd.gradcheck(function, (student.requires_grad_(),))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck_of_the_attention(device, divergence, causal):
    query, query_teacher = pair((1, 2, 4, 2), device, torch.float64)
    key, key_teacher = pair((1, 1, 5, 2), device, torch.float64)

    def function(x, z):
        return ops.attention_kl(
            x, z, query_teacher, key_teacher, divergence=divergence, beta=0.3, causal=causal, reduction="none"
        )

    assert torch.autograd.gradcheck(function, (query.requires_grad_(), key.requires_grad_()))


def test_gradcheck_of_packed_sequences_and_scales(device):
    student, teacher = pair((1, 1, 6, 2), device, torch.float64)
    cu_seqlens = torch.tensor([0, 2, 6], device=device)

    def function(x):
        return ops.relation_kl(x, teacher, cu_seqlens=cu_seqlens, scale_student=-0.7, scale_teacher=1.3)

    assert torch.autograd.gradcheck(function, (student.requires_grad_(),))


def test_upstream_gradient_that_is_not_one(device):
    student, teacher = pair((2, 2, 40, 16), device)
    leaf = student.requires_grad_()
    weights = torch.randn(2, 2, 40, device=device)
    (ops.relation_kl(leaf, teacher, reduction="none") * weights).sum().backward()
    expected = expected_relation(student, teacher, weights)
    assert_gradient_close(leaf.grad, expected.gradients[0], expected.gradient_floors[0])
    leaf.grad = None
    (-3.5 * ops.relation_kl(leaf, teacher, reduction="sum")).backward()
    expected = expected_relation(student, teacher, torch.full_like(weights, -3.5))
    assert_gradient_close(leaf.grad, expected.gradients[0], expected.gradient_floors[0])


def test_gradient_accumulation_with_num_items_equals_one_batch(device):
    """Micro-batches of different numbers of real tokens, each divided by the number of all."""
    student, teacher = pair((6, 2, 30, 16), device)
    mask = torch.rand(6, 30, device=device) > torch.linspace(0.0, 0.9, 6, device=device)[:, None]
    num_items = mask.sum()
    whole = student.clone().requires_grad_()
    value = ops.relation_kl(whole, teacher, key_padding_mask=mask)
    value.backward()
    parts = student.clone().requires_grad_()
    accumulated = 0.0
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        loss = ops.relation_kl(parts[part], teacher[part], key_padding_mask=mask[part], num_items=num_items)
        loss.backward()
        accumulated += loss.item()
    # The same float32 numbers in another order of addition.
    assert accumulated == pytest.approx(value.item(), rel=1e-6)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-5, atol=1e-9)


def test_accumulates_into_an_existing_gradient(device):
    student, teacher = pair((1, 2, 30, 16), device)
    leaf = student.requires_grad_()
    for _ in range(2):
        ops.relation_kl(leaf, teacher, reduction="sum").backward()
    expected = expected_relation(student, teacher)
    assert_gradient_close(leaf.grad, 2 * expected.gradients[0], 2 * expected.gradient_floors[0])


def test_retain_graph(device):
    student, teacher = pair((1, 2, 30, 16), device)
    leaf = student.requires_grad_()
    value = ops.relation_kl(leaf, teacher, deterministic=True)
    value.backward(retain_graph=True)
    first = leaf.grad.clone()
    value.backward()
    torch.testing.assert_close(leaf.grad, 2 * first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_double_backward_is_an_error(device, divergence):
    student, teacher = pair((1, 2, 10, 4), device)
    leaf = student.requires_grad_()
    value = ops.relation_kl(leaf, teacher, divergence=divergence, reduction="sum")
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"relation_kl.*(once|double|second|twice)"):
        gradient.sum().backward()


def test_double_backward_of_the_attention_is_an_error(device):
    query, query_teacher = pair((1, 2, 10, 4), device)
    key, key_teacher = pair((1, 2, 10, 4), device)
    value = ops.attention_kl(query.requires_grad_(), key, query_teacher, key_teacher)
    (gradient,) = torch.autograd.grad(value, query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"attention_kl.*(once|double|second|twice)"):
        gradient.sum().backward()


def test_a_teacher_that_requires_grad_is_told_to_detach(device):
    student, teacher = pair((1, 2, 10, 4), device)
    with pytest.raises(RuntimeError, match=r"relation_kl: teacher.*detach"):
        ops.relation_kl(student, teacher.requires_grad_())
    with torch.no_grad():  # nothing is recorded: a teacher's parameters may require grad
        ops.relation_kl(student, teacher)
    for position, name in ((2, "query_teacher"), (3, "key_teacher")):
        inputs = [student.detach().clone() for _ in range(4)]
        inputs[position].requires_grad_()
        with pytest.raises(RuntimeError, match=rf"attention_kl: {name}.*detach"):
            ops.attention_kl(*inputs)
        with torch.no_grad():
            ops.attention_kl(*inputs)


def test_nothing_is_recorded_without_grad(device):
    student, teacher = pair((1, 2, 10, 4), device)
    assert not ops.relation_kl(student, teacher).requires_grad
    with torch.no_grad():
        assert not ops.relation_kl(student.requires_grad_(), teacher).requires_grad
    with torch.inference_mode():
        assert not ops.relation_kl(student, teacher).requires_grad


def test_the_statistics_are_not_differentiable(device):
    """The rows of the forward kernel carry the gradient of the divergence; the log-sum-exps carry none."""
    student, teacher = pair((1, 2, 10, 4), device)
    leaf = student.requires_grad_()
    kl, lse_student, lse_teacher = ops.relation_kl_forward(leaf, teacher)
    assert not lse_student.requires_grad
    assert not lse_teacher.requires_grad
    kl.sum().backward()
    expected = expected_relation(student, teacher)
    assert_gradient_close(leaf.grad, expected.gradients[0], expected.gradient_floors[0])


def test_saved_tensors_are_checked_for_changes_in_place(device):
    student, teacher = pair((1, 2, 10, 4), device)
    leaf = student.requires_grad_()
    used = leaf * 1.0
    value = ops.relation_kl(used, teacher)
    with torch.no_grad():
        used.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_gradient_has_the_dtype_and_shape_of_the_student(device):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        student, teacher = pair((1, 2, 10, 4), device, dtype)
        leaf = student.requires_grad_()
        ops.relation_kl(leaf, teacher.double()).backward()
        assert leaf.grad.dtype == dtype
        assert leaf.grad.shape == leaf.shape


def test_a_module_used_on_both_sides(device):
    """Online distillation: one linear layer makes student and (detached) teacher."""
    layer = torch.nn.Linear(16, 16).to(device)
    x = torch.randn(1, 2, 20, 16, device=device)
    ops.relation_kl(layer(x), layer(x * 0.9).detach()).backward()
    assert torch.isfinite(layer.weight.grad).all()
    assert layer.weight.grad.abs().max() > 0


class NoGradient(torch.autograd.Function):
    """Its input gets no gradient, which is not the same as zeros."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return None


@pytest.mark.parametrize("call", ["relation", "relation mean", "attention", "layer"])
def test_without_an_upstream_gradient_there_is_none(call, device):
    student, teacher = pair((1, 2, 8, 4), device)
    student.requires_grad_()
    losses = {
        "relation": lambda: ops.relation_kl(student, teacher, reduction="none"),
        "relation mean": lambda: ops.relation_kl(student, teacher),
        "attention": lambda: ops.attention_kl(student, student, teacher, teacher, reduction="none"),
        "layer": lambda: ops.layer_relation_kl([student], [teacher]),
    }
    (NoGradient.apply(losses[call]()).sum() + student.sum()).backward()
    torch.testing.assert_close(student.grad, torch.ones_like(student))
