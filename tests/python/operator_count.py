"""Counts the operators that PyTorch dispatches: what a GPU would have to launch, measured without one."""

from __future__ import annotations

import collections
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback


class OperatorCount(TorchDispatchMode):
    """Operators by name while the mode is active; views, which launch nothing, are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.calls[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


class CountStep(TrainerCallback):
    """Counts the operators of one optimizer step, from its first micro-batch to its update."""

    def __init__(self, step: int) -> None:
        self.count = OperatorCount()
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            self.count.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step + 1:
            self.count.__exit__(None, None, None)
