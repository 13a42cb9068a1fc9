"""CUDA graphs of training steps: a step whose kernels are short is otherwise bound by the host that launches them."""

import gc
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Steps of a shape that run as usual before the capture: libraries initialise themselves in the first.
WARM_UP = 2

Step = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass
class _Captured:
    """A graph, the tensors that it reads, and those that each replay writes anew."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    names: list[str]
    results: Tensor  # [names]
    gradients: dict[int, Tensor]  # by the place of the parameter


class StepGraphs:
    """Forward and backward passes of micro-batches, captured once for each shape and replayed from then on.

    parameters: those that get gradients; what a replay adds to their `grad` is what the step itself would have added.
    alone: whether each optimizer step has one micro-batch, so that gradients need not be added up.
    """

    def __init__(self, parameters: list[nn.Parameter], *, alone: bool) -> None:
        self._parameters = parameters
        self._alone = alone
        self._seen: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, _Captured | None] = {}
        self._sums: dict[int, Tensor] = {}

    def run(self, kind: Hashable, inputs: Mapping[str, Tensor], step: Step) -> dict[str, Tensor]:
        """The scalars that `step(inputs)` returns, after its gradients have been added to the parameters.

        kind: what distinguishes this step from others, besides its inputs' names, shapes and dtypes. A step that cannot
        be captured is told once and runs as usual.
        """
        key = (kind, tuple((name, x.shape, x.dtype) for name, x in inputs.items()))
        if key not in self._graphs:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] <= WARM_UP:
                return step(inputs)
            self._graphs[key] = self._capture(inputs, step)
        captured = self._graphs[key]
        return step(inputs) if captured is None else self._replay(captured, inputs)

    def _capture(self, inputs: Mapping[str, Tensor], step: Step) -> _Captured | None:
        own = {name: tensor.clone() for name, tensor in inputs.items()}
        before = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        # Nodes of earlier backward passes belong to the stream that they ran on.
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                scalars = step(own)
                results = torch.stack([value.detach().float() for value in scalars.values()])
            gradients = {i: p.grad for i, p in enumerate(self._parameters) if p.grad is not None}
            return _Captured(graph, own, list(scalars), results, gradients)
        except RuntimeError as error:  # the host waits for the GPU somewhere in the model, or memory is short
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            warnings.warn(f"steps run without CUDA graphs, which this model does not allow: {reason}", stacklevel=2)
            return None
        finally:
            for parameter, gradient in zip(self._parameters, before, strict=True):
                parameter.grad = gradient

    def _replay(self, captured: _Captured, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in inputs.items():
            captured.inputs[name].copy_(tensor, non_blocking=True)
        captured.graph.replay()
        self._add(captured.gradients)
        return dict(zip(captured.names, captured.results.clone().unbind(), strict=True))

    def _add(self, gradients: Mapping[int, Tensor]) -> None:
        """Add a graph's gradients to those of the parameters; the next replay writes over the graph's own."""
        if self._alone:
            for place, gradient in gradients.items():
                self._parameters[place].grad = gradient
            return
        sums, terms = [], []
        for place, gradient in gradients.items():
            parameter = self._parameters[place]
            if parameter.grad is None:
                if place not in self._sums:
                    self._sums[place] = torch.empty_like(gradient)
                parameter.grad = self._sums[place].zero_()
            sums.append(parameter.grad)
            terms.append(gradient)
        torch._foreach_add_(sums, terms)
