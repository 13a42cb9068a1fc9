"""torch.compile(fullgraph=True, dynamic=True): forward and backward, and one graph for every N."""

from __future__ import annotations

import pytest
import torch
from generators import gaussian, perturbed
from torch._dynamo.testing import CompileCounterWithBackend

import linearard  # noqa: F401  (registers the operators)

ops = torch.ops.linearard


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(shape, device):
    teacher = gaussian(*shape, device=device).float()
    return perturbed(teacher.double(), 0.2).float(), teacher


def relation_loss(student, teacher, mask, row_weight):
    return ops.relation_kl(
        student, teacher, key_padding_mask=mask, row_weight=row_weight, causal=True, deterministic=True
    )


def attention_loss(student, teacher, mask, row_weight):
    return ops.attention_kl(
        student, student[:, :1], teacher, teacher[:, :1], key_padding_mask=mask, row_weight=row_weight,
        deterministic=True,
    )  # fmt: skip


@pytest.mark.parametrize("loss", [relation_loss, attention_loss])
def test_one_graph_for_every_length(device, loss):
    """Compiled loss and gradient agree with eager; ten lengths are served by one graph, the backward included."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (17, 33, 64, 65, 100, 128, 200, 7, 90, 2):
        student, teacher = pair((2, 2, tokens, 16), device)
        mask = torch.rand(2, tokens, device=device) > 0.2
        row_weight = torch.rand(2, tokens, device=device)
        results = []
        for function in (loss, compiled):
            leaf = student.clone().requires_grad_()
            value = function(leaf, teacher, mask, row_weight)
            value.backward()
            results.append((value.detach(), leaf.grad))
        torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-9)
    assert counter.frame_count == 1


@pytest.mark.parametrize("options", [{}, {"divergence": "reverse_kl"}, {"divergence": "jsd", "beta": 0.2}])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_options_are_traced(device, options, reduction):
    student, teacher = pair((1, 2, 50, 16), device)
    cu_seqlens = torch.tensor([0, 20, 50], device=device)

    def function(x):
        rows = ops.relation_kl(
            x.exp(), teacher, cu_seqlens=cu_seqlens, reduction=reduction, deterministic=True, **options
        )
        return rows.sum() * 2.0

    results = []
    for call in (function, torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")):
        leaf = student.clone().requires_grad_()
        value = call(leaf)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-9)


def test_inductor(device):
    """The default backend, with computation around the operator that it fuses."""

    def function(x, teacher):
        return ops.relation_kl(torch.nn.functional.gelu(x) * 2.0, teacher).square()

    student, teacher = pair((1, 2, 50, 16), device)
    results = []
    for call in (function, torch.compile(function, fullgraph=True, dynamic=True)):
        leaf = student.clone().requires_grad_()
        value = call(leaf, teacher)
        value.backward()
        results.append((value.detach(), leaf.grad))
    # gelu in the compiled code is rounded differently: float32 tolerances of the inputs, not of the operator.
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_one_tensor_twice(device):
    """Student and teacher from one tensor: a compiled graph must not drop part of the gradient."""
    x, _ = pair((1, 2, 50, 16), device)

    def function(leaf):
        y = leaf * 1.5
        return ops.attention_kl(y, y, leaf.detach(), leaf.detach(), reduction="sum", deterministic=True)

    results = []
    for call in (function, torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        call(leaf).backward()
        results.append(leaf.grad)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-9)


def test_kernels_are_traced_without_graph_breaks(device):
    student, teacher = pair((1, 2, 50, 16), device)

    def function(x, y):
        kl, lse_student, lse_teacher = ops.relation_kl_forward(x, y, deterministic=True)
        return kl, ops.relation_kl_backward(kl, x, y, lse_student, lse_teacher, deterministic=True), ops.relation_lse(y)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher), function(student, teacher), rtol=0, atol=0)


def test_export(device):
    """torch.export sees one node with the public schema."""

    class Loss(torch.nn.Module):
        def forward(self, student, teacher):
            return ops.relation_kl(student, teacher)

    student, teacher = pair((1, 2, 50, 16), device)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(Loss(), (student, teacher), dynamic_shapes=({2: tokens}, {2: tokens}))
    longer = pair((1, 2, 70, 16), device)
    torch.testing.assert_close(program.module()(*longer), ops.relation_kl(*longer), rtol=1e-6, atol=0)
