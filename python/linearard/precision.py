"""What mixed precision would do over and over in every step, done once: fewer launches, the same computation."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def frozen_weights_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hold the frozen weights of the linear layers of `model` in `dtype` while the body runs.

    Autocast casts a frozen weight again in every call (it caches casts of trained ones only). The body computes exactly
    what autocast would: only linear layers are touched, and embeddings, norms and everything tied to them stay as they
    are. Afterwards the original weights are back; meanwhile they are kept on the CPU.
    """
    kept: list[tuple[nn.Parameter, Tensor]] = []
    elsewhere = {id(p) for m in model.modules() if not isinstance(m, nn.Linear) for p in m.parameters(recurse=False)}
    for module in model.modules():
        if not isinstance(module, nn.Linear):
            continue
        for parameter in module.parameters(recurse=False):
            frozen = not parameter.requires_grad and id(parameter) not in elsewhere
            if frozen and parameter.is_floating_point() and parameter.dtype != dtype:
                original = parameter.data
                parameter.data = original.to(dtype)
                kept.append((parameter, original.cpu()))
    try:
        yield
    finally:
        for parameter, original in kept:
            parameter.data = original.to(parameter.device)


@contextmanager
def inputs_cast_once(modules: list[nn.Module]) -> Iterator[None]:
    """Cast the hidden states that enter the attention `modules` to autocast's dtype, once for all their projections.

    Without it each projection casts them again, and each LoRA adapter casts them up and down once more.
    """

    def cast(module: nn.Module, arguments: tuple, keywords: dict) -> tuple[tuple, dict] | None:
        hidden = keywords.get("hidden_states", arguments[0] if arguments else None)
        if not isinstance(hidden, Tensor) or not torch.is_autocast_enabled(hidden.device.type):
            return None
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        if "hidden_states" in keywords:
            return arguments, {**keywords, "hidden_states": hidden}
        return (hidden, *arguments[1:]), keywords

    handles = [module.register_forward_pre_hook(cast, with_kwargs=True) for module in modules]
    adapted = [m for module in modules for m in module.modules() if hasattr(m, "cast_input_dtype_enabled")]
    before = [module.cast_input_dtype_enabled for module in adapted]
    for module in adapted:
        vars(module)["cast_input_dtype_enabled"] = False
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, enabled in zip(adapted, before, strict=True):
            vars(module)["cast_input_dtype_enabled"] = enabled
