"""What lies between the linear layers of a model, by Liger-Kernel's fused kernels while it is trained."""

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available

from linearard.capture import decoder_of, transformers_model

# No losses: the stages have their own.
_CHOSEN = {"cross_entropy": False, "fused_linear_cross_entropy": False}
_ABSENT = object()
_TOKENS = 64
# Largest distance of the hidden states from those without the kernels, relative to their norm. A model of 30 layers in
# bfloat16 is 0.03 from itself in float32; another activation function in its MLPs moves it by 0.4.
_LARGEST_DISTANCE = {torch.float32: 5e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


@contextmanager
def liger_kernels(models: Sequence[nn.Module]) -> Iterator[None]:
    """Run norms, RoPE and gated MLPs of `models` by Liger-Kernel (arXiv 2410.10989) while the body runs.

    On CUDA devices only. Nothing changes where Liger-Kernel is not installed or does not know a model; where a model
    does not compute the same with it (its code was changed), it is left out with a warning. It changes modules for
    good, and RoPE for all models of the same code; after the body everything is as it was. Weights are not touched.
    """
    if not is_liger_kernel_available():
        yield
        return
    # It warns of every other kernel language that it could use if that were installed.
    logging.getLogger("liger_kernel.backends.registry").setLevel(logging.ERROR)
    bases = [transformers_model(model) for model in models]
    code = _Code(bases)
    try:
        reason = _apply(bases, code)
        if reason is not None:
            code.restore()
            warnings.warn(f"Liger-Kernel is left out, training goes on without: {reason}", stacklevel=3)
        yield
    finally:
        code.restore()


def _apply(bases: list[PreTrainedModel], code: "_Code") -> str | None:
    """Change the models; the reason why that must be undone, if there is one."""
    try:
        expected = [_hidden_states(base) for base in bases]
        with code.changing():
            for base in bases:
                apply_liger_kernel(base, _CHOSEN)
        for base, before in zip(bases, expected, strict=True):
            distance = ((_hidden_states(base) - before).norm() / before.norm()).item()
            if not distance <= _LARGEST_DISTANCE.get(base.dtype, 0.0):
                return f"the hidden states of {type(base).__name__} would change by {100 * distance:.2g} %"
    except Exception as error:  # from code of a model that Liger-Kernel was not made for
        return f"{type(error).__name__}: {error}"
    return None


@torch.no_grad()
def _hidden_states(base: PreTrainedModel) -> Tensor:
    """The last ones on a few tokens, in float32, without dropout."""
    ids = torch.arange(_TOKENS, device=base.device)[None] % base.get_input_embeddings().weight.shape[0]
    training = [module for module in base.modules() if module.training]
    base.eval()
    try:
        states: Tensor = decoder_of(base)(input_ids=ids, use_cache=False)[0]
    finally:
        for module in training:
            module.training = True
    return states.float()


class _Code:
    """What the modules of models, and the files that they come from, consist of, to be put back."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        modules = [module for model in models for module in model.modules()]
        files = {type(module).__module__ for module in modules}
        self._places: list[dict[str, Any]] = [vars(it) for it in (*modules, *(sys.modules[name] for name in files))]
        self._replaced: list[dict[str, Any]] = [{} for _ in self._places]

    @contextmanager
    def changing(self) -> Iterator[None]:
        """What the body replaces or adds will be put back; what changes before or after it stays."""
        before = [dict(place) for place in self._places]
        try:
            yield
        finally:
            for place, old, replaced in zip(self._places, before, self._replaced, strict=True):
                for name, value in place.items():
                    if old.get(name, _ABSENT) is not value:
                        replaced[name] = old.get(name, _ABSENT)

    def restore(self) -> None:
        """Put it back, once."""
        for place, replaced in zip(self._places, self._replaced, strict=True):
            for name, value in replaced.items():
                if value is _ABSENT:
                    del place[name]
                else:
                    place[name] = value
            replaced.clear()
