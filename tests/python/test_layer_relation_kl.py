"""layer_relation_kl against relation_kl of each pair: losses, gradients, options, errors, tracing."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_gradient_close, assert_rows_close, expected_relation
from generators import gaussian, perturbed
from torch._dynamo.testing import CompileCounterWithBackend

import linearard

ops = torch.ops.linearard
TOKENS = 150

# Queries, keys and values of a layer with grouped queries; of two layers; nothing in common but batch and tokens.
LAYERS = {
    "one layer": [(4, 64, torch.bfloat16), (2, 64, torch.bfloat16), (2, 64, torch.bfloat16)],
    "two layers": [(h, 32, torch.float32) for h in (3, 1, 1, 3, 1, 1)],
    "mixed": [(2, 64, torch.bfloat16), (1, 80, torch.bfloat16), (3, 64, torch.float16), (1, 24, torch.float32)],
    "many": [(1 + i % 2, 64, torch.bfloat16) for i in range(11)],
}
OPTIONS = {
    "defaults": {},
    "causal": {"causal": True, "scale_student": 0.2, "scale_teacher": 0.15},
    "mask": {"mask": True},
    "weighted": {"mask": True, "row_weight": True, "causal": True},
    "sum": {"reduction": "sum", "row_weight": True},
    "accumulated": {"num_items": True},
    "packed": {"cu_seqlens": True},
    "jsd": {"divergence": "jsd", "beta": 0.3, "mask": True},
    "reverse": {"divergence": "reverse_kl"},
    "deterministic": {"deterministic": True},
}


def layer(kinds, device, batch=2, tokens=TOKENS):
    teachers, students = [], []
    for place, (heads, dim, dtype) in enumerate(kinds):
        teacher = gaussian(batch, heads, tokens, dim, seed=place, device=device)
        teachers.append(teacher.to(dtype))
        students.append(perturbed(teacher, 0.2).to(dtype).requires_grad_())
    return students, teachers


def options_of(name, device, batch, tokens=TOKENS):
    options = dict(OPTIONS[name])
    if options.pop("mask", False):
        options["key_padding_mask"] = torch.arange(tokens, device=device) < torch.tensor(
            [[tokens], [tokens - 50]], device=device
        )
    if "row_weight" in options:
        options["row_weight"] = torch.rand(batch, tokens, device=device)
    if "num_items" in options:
        options["num_items"] = torch.tensor(777, device=device)
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor([0, 60, tokens], device=device)
    return options


def assert_same(value, expected):
    """Of one computation in another order of additions: float32 sums, rounded to the dtype of the result."""
    rounding = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(expected.dtype, 2e-4)
    torch.testing.assert_close(value, expected, rtol=rounding, atol=rounding * expected.abs().max().item())


def loss_and_gradients(function, students, upstream):
    value = function()
    gradients = torch.autograd.grad((value * upstream).sum(), students)
    return value.detach(), gradients


@pytest.mark.parametrize("kinds", LAYERS)
@pytest.mark.parametrize("name", OPTIONS)
def test_agrees_with_single_calls(device, kinds, name):
    batch = 1 if name == "packed" else 2
    students, teachers = layer(LAYERS[kinds], device, batch)
    options = options_of(name, device, batch)
    upstream = torch.linspace(0.5, 2, len(students), device=device)
    single = loss_and_gradients(
        lambda: torch.stack(
            [linearard.relation_kl(s, t, **options) for s, t in zip(students, teachers, strict=True)]
        ),
        students, upstream,
    )  # fmt: skip
    together = loss_and_gradients(
        lambda: linearard.layer_relation_kl(students, teachers, **options), students, upstream
    )
    assert together[0].shape == (len(students),)
    assert together[0].dtype == single[0].dtype
    torch.testing.assert_close(together[0], single[0], rtol=1e-4, atol=1e-6)
    for one, other in zip(together[1], single[1], strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert_same(one, other)


@pytest.mark.parametrize("causal", [False, True])
def test_kernels_agree_with_the_oracle(device, causal):
    """Heads that are stored in turn, as projections leave them, beside contiguous ones."""
    students, teachers = layer(LAYERS["one layer"], device)
    students = [s.detach() for s in students]
    students[1:] = [s.transpose(1, 2).contiguous().transpose(1, 2) for s in students[1:]]
    grad_kl = [torch.rand(s.shape[:3], device=device) - 0.3 for s in students]
    kl, lse_student, lse_teacher = linearard.layer_relation_kl_forward(students, teachers, causal=causal)
    gradients = linearard.layer_relation_kl_backward(
        grad_kl, students, teachers, lse_student, lse_teacher, causal=causal
    )
    for i, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        expected = expected_relation(student, teacher, grad_kl[i], causal=causal)
        assert_rows_close(kl[i], expected)
        assert gradients[i].dtype == student.dtype
        assert_gradient_close(gradients[i], expected.gradients[0], expected.gradient_floors[0])


def test_rows_that_float_cannot_hold(device):
    """In one relation of three: the others keep what they have."""
    students, teachers = layer(LAYERS["one layer"], device)
    students = [s.detach() for s in students]
    for x in (students[1], teachers[1]):
        x[:, 1, 3] *= 40  # a head whose logits spread too far for one frame of reference
    students = [s.requires_grad_() for s in students]
    upstream = torch.ones(3, device=device)
    single = loss_and_gradients(
        lambda: torch.stack([linearard.relation_kl(s, t) for s, t in zip(students, teachers, strict=True)]),
        students, upstream,
    )  # fmt: skip
    together = loss_and_gradients(lambda: linearard.layer_relation_kl(students, teachers), students, upstream)
    torch.testing.assert_close(together[0], single[0], rtol=1e-4, atol=1e-6)
    for one, other in zip(together[1], single[1], strict=True):
        assert_same(one, other)


def test_only_students_that_require_grad_get_one(device):
    students, teachers = layer(LAYERS["one layer"], device)
    students[1] = students[1].detach()
    linearard.layer_relation_kl(students, teachers).sum().backward()
    assert students[0].grad is not None
    assert students[2].grad is not None
    assert students[1].grad is None


def test_a_loss_that_is_not_used_has_no_gradient(device):
    students, teachers = layer(LAYERS["one layer"], device)
    kl, _, _ = ops.layer_relation_kl_forward(students, teachers)
    gradients = torch.autograd.grad(kl[2].sum(), students, allow_unused=True)
    assert gradients[0] is None
    assert gradients[1] is None
    expected = torch.autograd.grad(ops.relation_kl(students[2], teachers[2], reduction="sum"), students[2])
    assert_same(gradients[2], expected[0])


def test_nothing_is_recorded_without_grad(device):
    students, teachers = layer(LAYERS["one layer"], device)
    with torch.no_grad():
        loss = linearard.layer_relation_kl(students, [t.requires_grad_() for t in teachers])
    assert not loss.requires_grad


@pytest.mark.parametrize("shapes", [[(2, 3, 0, 64)] * 2, [(0, 3, 5, 64)] * 2, [(2, 3, 5, 64), (2, 0, 5, 64)]])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_empty(device, shapes, reduction):
    students = [torch.randn(s, device=device, dtype=torch.bfloat16).requires_grad_() for s in shapes]
    teachers = [s.detach() * 1.1 for s in students]
    loss = linearard.layer_relation_kl(students, teachers, reduction=reduction)
    loss.sum().backward()
    for i, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        torch.testing.assert_close(loss[i], linearard.relation_kl(student, teacher, reduction=reduction))
        assert student.grad.shape == student.shape


def test_one_relation(device):
    students, teachers = layer(LAYERS["one layer"][:1], device)
    torch.testing.assert_close(
        linearard.layer_relation_kl(students, teachers)[0], linearard.relation_kl(students[0], teachers[0]),
        rtol=1e-5, atol=1e-7,
    )  # fmt: skip


def test_deterministic(device):
    students, teachers = layer(LAYERS["one layer"], device)
    upstream = torch.ones(3, device=device)
    runs = [
        loss_and_gradients(
            lambda: linearard.layer_relation_kl(students, teachers, deterministic=True), students, upstream
        )
        for _ in range(2)
    ]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_means_of_rows(device):
    kl = [torch.rand(2, heads, 40, device=device, requires_grad=True) for heads in (3, 1)]
    torch.library.opcheck(ops.means_of_rows.default, (kl,))
    mean, inverse = ops.means_of_rows(kl)
    torch.testing.assert_close(mean, torch.stack([x.mean() for x in kl]))
    torch.testing.assert_close(inverse, torch.tensor([1 / 240, 1 / 80], device=device))
    gradients = torch.autograd.grad((mean * torch.tensor([2.0, 3.0], device=device)).sum(), kl)
    torch.testing.assert_close(gradients[0], torch.full_like(kl[0], 2 / 240))
    torch.testing.assert_close(gradients[1], torch.full_like(kl[1], 3 / 80))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["defaults", "causal", "weighted", "sum", "accumulated", "packed", "jsd"])
def test_opcheck(device, name, requires_grad):
    kinds = [(2, 4, torch.float32), (1, 6, torch.float64), (3, 8, torch.bfloat16)]
    batch = 1 if name == "packed" else 2
    students, teachers = layer(kinds, device, batch, 70)
    students = [s.detach().requires_grad_(requires_grad) for s in students]
    options = options_of(name, device, batch, 70)
    torch.library.opcheck(ops.layer_relation_kl.default, (students, teachers), options)
    if requires_grad:
        return
    for reduction in ("row_weight", "reduction", "num_items"):
        options.pop(reduction, None)
    torch.library.opcheck(ops.layer_relation_kl_forward.default, (students, teachers), options)
    kl, lse_student, lse_teacher = ops.layer_relation_kl_forward(students, teachers, **options)
    torch.library.opcheck(
        ops.layer_relation_kl_backward.default, (kl, students, teachers, lse_student, lse_teacher), options
    )


@pytest.mark.parametrize("name", ["defaults", "weighted", "sum"])
def test_one_graph_for_every_length(device, name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(students, teachers, options):
        return ops.layer_relation_kl(students, teachers, deterministic=True, **options).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (70, 100, 64, 90, 200):
        students, teachers = layer([(3, 16, torch.float32), (2, 16, torch.float32)], device, 2, tokens)
        options = options_of(name, device, 2, tokens)
        results = []
        for function in (loss, compiled):
            value = function(students, teachers, options)
            results.append((value.detach(), *torch.autograd.grad(value, students)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-9)
    assert counter.frame_count == 1


def test_differentiable_once(device):
    students, teachers = layer(LAYERS["one layer"], device)
    loss = linearard.layer_relation_kl(students, teachers).sum()
    (gradient,) = torch.autograd.grad(loss, students[0], create_graph=True)
    with pytest.raises(RuntimeError, match="layer_relation_kl_backward: differentiable once only"):
        gradient.sum().backward()


def test_errors():
    students, teachers = layer([(2, 8, torch.float32), (3, 8, torch.float32)], torch.device("cpu"), 2, 10)
    x = torch.zeros

    def check(message, students=students, teachers=teachers, **options):
        with pytest.raises(RuntimeError, match=message):
            ops.layer_relation_kl(students, teachers, **options)

    check(r"^layer_relation_kl: students must hold at least one tensor, got none", [], [])
    check(r"^layer_relation_kl: teachers must hold as many tensors as students \(2\), got 1", teachers=teachers[:1])
    check(
        r"^layer_relation_kl: students\[1\] must have the sequence length of students\[0\] \(10\), got 11",
        [students[0], x(2, 3, 11, 8)],
    )
    check(
        r"^layer_relation_kl: students\[1\] must have the batch size of students\[0\] \(2\), got 1",
        [students[0], x(1, 3, 10, 8)],
    )
    check(
        r"^layer_relation_kl: teachers\[1\] must have the number of heads of students\[1\] \(3\), got 2",
        teachers=[teachers[0], x(2, 2, 10, 8)],
    )
    check(r"^layer_relation_kl: students\[1\] must have 4 dimensions .* got 3", [students[0], x(3, 10, 8)])
    check(r"^layer_relation_kl: teachers\[0\] must be float32.* got Int", teachers=[teachers[0].int(), teachers[1]])
    check(
        r"^layer_relation_kl: teachers\[1\] must not require grad .* detach it: teachers\[1\]\.detach\(\)",
        teachers=[teachers[0], teachers[1].clone().requires_grad_()],
    )
    check(r"^layer_relation_kl: reduction must be 'sum' or 'mean', got 'none'", reduction="none")
    check(r"^layer_relation_kl: .*divergence.*", divergence="kl")
    check(r"^layer_relation_kl: key_padding_mask must have shape .*", key_padding_mask=x(2, 9, dtype=torch.bool))
    check(r"^layer_relation_kl: num_items is the divisor", reduction="sum", num_items=torch.tensor(3))
    kl, lse_student, lse_teacher = ops.layer_relation_kl_forward(students, teachers)
    with pytest.raises(
        RuntimeError, match=r"^layer_relation_kl_backward: grad_kl must hold as many tensors as students"
    ):
        ops.layer_relation_kl_backward(kl[:1], students, teachers, lse_student, lse_teacher)
    with pytest.raises(
        RuntimeError, match=r"^layer_relation_kl_backward: lse_teacher\[1\] must have shape \[B, H, N\]"
    ):
        ops.layer_relation_kl_backward(kl, students, teachers, lse_student, [lse_teacher[0]] * 2)
