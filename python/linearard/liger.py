"""What lies between the linear layers of a model, by Liger-Kernel's fused kernels while it is trained."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available

from linearard.capture import transformers_model

# No losses: the stages have their own.
_CHOSEN = {"cross_entropy": False, "fused_linear_cross_entropy": False}


@contextmanager
def liger_kernels(models: Sequence[nn.Module]) -> Iterator[None]:
    """Run norms, RoPE and gated MLPs of `models` by Liger-Kernel (arXiv 2410.10989) while the body runs.

    On CUDA devices only. Nothing changes where Liger-Kernel is not installed or does not know a model. It changes
    modules for good, and RoPE for all models of the same code; after the body everything is as it was. Weights are not
    touched.
    """
    if not is_liger_kernel_available():
        yield
        return
    # It warns of every other kernel language that it could use if that were installed.
    logging.getLogger("liger_kernel.backends.registry").setLevel(logging.ERROR)
    bases = [transformers_model(model) for model in models]
    parts = [module for base in bases for module in base.modules()]
    code = {type(module).__module__ for module in parts}
    places: list[dict[str, Any]] = [vars(place) for place in (*parts, *(sys.modules[name] for name in code))]
    before = [dict(place) for place in places]
    changes: list[tuple[dict[str, Any], dict[str, Any], set[str]]] = []
    try:
        try:
            for base in bases:
                apply_liger_kernel(base, _CHOSEN)
        finally:
            # Found before the body, which may change other things, such as the mode of training.
            changes = [(now, old, _different(now, old)) for now, old in zip(places, before, strict=True)]
        yield
    finally:
        for now, old, names in changes:
            for name in names:
                if name in old:
                    now[name] = old[name]
                else:
                    del now[name]


def _different(now: dict[str, Any], old: dict[str, Any]) -> set[str]:
    """Names whose values were replaced, or are new."""
    return {name for name, value in now.items() if name not in old or old[name] is not value}
