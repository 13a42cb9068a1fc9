"""Chunked cross-entropy of a linear head: values, gradients, memory."""

from __future__ import annotations

import pytest
import torch
from operator_count import OperatorCount
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from linearard.linear_cross_entropy import IGNORED, linear_cross_entropy

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


def test_logits_exist_by_chunks_only() -> None:
    class LargestTensor(OperatorCount):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = super().__torch_dispatch__(func, types, args, kwargs)
            if isinstance(result, Tensor):
                self.largest = max(self.largest, result.numel())
            return result

    hidden, weight, _, targets = operands(torch.float32)
    with LargestTensor() as sizes:
        linear_cross_entropy(hidden, weight, targets, chunk=5).backward()
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
