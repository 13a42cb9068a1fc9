"""Chunked losses of a linear head: values, gradients, memory."""

from __future__ import annotations

import pytest
import torch
from operator_count import OperatorCount
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, linear

from linearard.linear_losses import IGNORED, linear_cross_entropy, linear_kl

TOKENS, WIDTH, VOCABULARY = 50, 12, 31


def operands(dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    targets[::7] = IGNORED
    return *(x.to(device, dtype).requires_grad_() for x in (hidden, weight, bias)), targets.to(device)  # type: ignore[return-value]


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_of_the_definition(chunk: int, with_bias: bool, device: torch.device) -> None:
    hidden, weight, bias, targets = operands(torch.float32, device)
    used = [hidden, weight, *([bias] if with_bias else [])]
    loss = linear_cross_entropy(hidden, weight, targets, bias if with_bias else None, chunk=chunk)
    found = torch.autograd.grad(0.7 * loss, used)
    exact = [x.detach().double().requires_grad_() for x in used]
    logits = linear(exact[0], exact[1], exact[2] if with_bias else None)
    reference = cross_entropy(logits, targets, reduction="sum")
    expected = torch.autograd.grad(0.7 * reference, exact)
    torch.testing.assert_close(loss.double(), reference, rtol=1e-6, atol=0)
    for gradient, correct in zip(found, expected, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), correct, rtol=1e-5, atol=1e-5)


def test_autocast_gives_the_loss_of_a_linear_layer(device: torch.device) -> None:
    hidden, weight, _, targets = operands(torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, chunk=16)
        reference = cross_entropy(linear(hidden, weight).float(), targets, reduction="sum")
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=0)
    gradient = torch.autograd.grad(loss, weight)[0]
    assert gradient.dtype == torch.float32, "sums over chunks are not rounded"
    torch.testing.assert_close(gradient, torch.autograd.grad(reference, weight)[0], rtol=2e-2, atol=2e-2)


def test_frozen_operands_cost_nothing() -> None:
    hidden, weight, _, targets = operands(torch.float32)
    loss = linear_cross_entropy(hidden, weight.detach(), targets)
    loss.backward()
    assert hidden.grad is not None
    with OperatorCount() as count:
        assert not linear_cross_entropy(hidden.detach(), weight.detach(), targets).requires_grad
    assert count.calls["aten.mm"] == 1, "no gradient is computed that nobody wants"


class LargestTensor(OperatorCount):
    """How large the largest result of an operator was."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_logits_exist_by_chunks_only() -> None:
    hidden, weight, _, targets = operands(torch.float32)
    with LargestTensor() as sizes:
        linear_cross_entropy(hidden, weight, targets, chunk=5).backward()
        linear_kl(hidden, weight, 2 * hidden.detach(), weight.detach(), chunk=5).backward()
    assert sizes.largest <= max(TOKENS * WIDTH, VOCABULARY * WIDTH, 5 * VOCABULARY) < TOKENS * VOCABULARY


def test_nothing_to_predict_is_zero() -> None:
    hidden, weight, _, targets = operands(torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORED))
    loss.backward()
    assert float(loss.detach()) == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_shapes_that_do_not_fit() -> None:
    hidden, weight, _, targets = operands(torch.float32)
    with pytest.raises(ValueError, match=r"got \[50, 12\], \[31, 12\] and \[49\]"):
        linear_cross_entropy(hidden, weight, targets[1:])


def teacher_operands(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = ((TOKENS, WIDTH + 1), (VOCABULARY, WIDTH + 1), (VOCABULARY,))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).float().to(device) for shape in shapes)  # type: ignore[return-value]


def reference_kl(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    rows = kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return rows.sum() if mask is None else rows[mask].sum()


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_kl_of_the_definition(chunk: int, with_bias: bool, masked: bool, device: torch.device) -> None:
    hidden, weight, bias, targets = operands(torch.float32, device)
    others, teacher_weight, teacher_bias = teacher_operands(device)
    mask = targets != IGNORED if masked else None
    used = [hidden, weight, *([bias] if with_bias else [])]
    biases = (bias, teacher_bias) if with_bias else (None, None)
    loss = linear_kl(hidden, weight, others, teacher_weight, *biases, mask=mask, chunk=chunk)
    found = torch.autograd.grad(0.7 * loss, used)
    exact = [x.detach().double().requires_grad_() for x in used]
    student = linear(exact[0], exact[1], exact[2] if with_bias else None)
    teacher = linear(others.double(), teacher_weight.double(), teacher_bias.double() if with_bias else None)
    reference = reference_kl(student, teacher, mask)
    expected = torch.autograd.grad(0.7 * reference, exact)
    torch.testing.assert_close(loss.double(), reference, rtol=1e-6, atol=0)
    for gradient, correct in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient.double(), correct, rtol=1e-5, atol=1e-5)


def test_kl_of_equal_rows_is_zero(device: torch.device) -> None:
    hidden, weight, bias, _ = operands(torch.float32, device)
    loss = linear_kl(hidden, weight, hidden.detach(), weight.detach(), bias, bias.detach())
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(x.grad is not None and not x.grad.any() for x in (hidden, weight, bias))


def test_kl_under_autocast_is_that_of_linear_layers(device: torch.device) -> None:
    hidden, weight, _, _ = operands(torch.float32, device)
    others, teacher_weight, _ = teacher_operands(device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = linear_kl(hidden, weight, others, teacher_weight, chunk=16)
        reference = reference_kl(linear(hidden, weight).float(), linear(others, teacher_weight).float(), None)
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=0)
    for gradient, correct in zip(
        torch.autograd.grad(loss, [hidden, weight]), torch.autograd.grad(reference, [hidden, weight]), strict=True
    ):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, correct, rtol=2e-2, atol=2e-2)


def test_kl_without_gradients_computes_none() -> None:
    hidden, weight, _, _ = operands(torch.float32)
    others, teacher_weight, _ = teacher_operands()
    with OperatorCount() as count:
        assert not linear_kl(hidden.detach(), weight.detach(), others, teacher_weight).requires_grad
    assert count.calls["aten.mm"] == 2


def test_kl_does_not_read_what_is_masked() -> None:
    hidden, weight, _, _ = operands(torch.float32)
    others, teacher_weight, _ = teacher_operands()
    mask = torch.arange(TOKENS) < TOKENS - 3
    poisoned = others.masked_fill(~mask[:, None], float("nan"))
    clean, same = (linear_kl(hidden, weight, x, teacher_weight, mask=mask) for x in (others, poisoned))
    assert torch.equal(clean, same)
    gradients = [torch.autograd.grad(loss, [hidden, weight]) for loss in (clean, same)]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_shapes_of_kl_that_do_not_fit() -> None:
    hidden, weight, _, _ = operands(torch.float32)
    others, teacher_weight, _ = teacher_operands()
    with pytest.raises(ValueError, match=r"got \[50, 12\], \[31, 12\], \[49, 13\], \[31, 13\] and None"):
        linear_kl(hidden, weight, others[1:], teacher_weight)
    with pytest.raises(ValueError, match=r"mask \[T\], got .* and \[3\]"):
        linear_kl(hidden, weight, others, teacher_weight, mask=torch.ones(3, dtype=torch.bool))
