"""Capture of post-RoPE queries, keys and values of any transformers model, without touching its code.

transformers lets every model that uses its attention interface run a registered attention function. The one registered
here hands its inputs to the active `Capture` and then runs the stock scaled-dot-product attention.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linearard.errors import UserError

ATTENTION_NAME = "linearard_capture"
# The same attention function without a mask function: transformers then makes no mask, and does not ask the positions
# whether sequences are packed, for which the host would wait for the GPU in every pass.
UNMASKED_NAME = "linearard_capture_unmasked"


@dataclass(frozen=True)
class LayerStates:
    """What one attention layer multiplied: queries and keys after RoPE, values.

    query [B, Hq, N, D]; key and value [B, Hk, N, D] and [B, Hk, N, Dv], heads not repeated, in the model's dtype or
    that of autocast; scale is the factor on query-key products.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float

    def detach(self) -> "LayerStates":
        """The same values without their autograd history."""
        return LayerStates(self.query.detach(), self.key.detach(), self.value.detach(), self.scale)


class Capture:
    """The states of one forward pass by layer index.

    The first pass through a layer counts: a recomputation of the layer by gradient checkpointing changes nothing.

    modules: the attention module of each layer that was stored; states_only: attention itself is not computed, its
    output is zero.
    """

    def __init__(self, layers: frozenset[int] | None = None, states_only: bool = False) -> None:
        self.states: dict[int, LayerStates] = {}
        self.modules: dict[int, nn.Module] = {}
        self.states_only = states_only
        self._layers = layers

    def store(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> None:
        """Keep the states of `module`, unless its layer is not wanted or was stored before."""
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or (self._layers is not None and index not in self._layers):
            return
        owner = self.modules.setdefault(index, module)
        if owner is not module:
            raise UserError(
                f"two attention modules of this model call themselves layer {index}; pass its text decoder alone"
            )
        if index not in self.states:
            self.states[index] = LayerStates(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)


_active: ContextVar[Capture | None] = ContextVar("linearard_capture", default=None)


def _capturing_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    capture = _active.get()
    # Under autocast, the cast that attention and relations would each make (RoPE leaves float32 behind). Captured or
    # not: gradient checkpointing, which computes the layer again later, has to meet the same operations.
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if capture is not None:
        capture.store(module, query, key, value, kwargs.get("scaling"))
        if capture.states_only:
            batch, heads, length, _ = query.shape
            return value.new_zeros(batch, length, heads, value.shape[-1]), None
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


@contextmanager
def capturing(layers: frozenset[int] | None = None, states_only: bool = False) -> Iterator[Capture]:
    """Collect the states of the one forward pass of an enabled model that runs inside the `with` block.

    layers: indices of the layers to keep; None keeps all. states_only: see `Capture`.
    """
    capture = Capture(layers, states_only)
    token = _active.set(capture)
    try:
        yield capture
    finally:
        _active.reset(token)


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside `model`, which may be wrapped by peft."""
    get_base_model: Any = getattr(model, "get_base_model", None)  # peft's
    base = get_base_model() if get_base_model else model
    if not isinstance(base, PreTrainedModel):
        raise UserError(f"{type(base).__name__} is not a transformers model")
    return base


def decoder_of(model: nn.Module) -> nn.Module:
    """The model without its language-model head, for passes that need no logits."""
    base = transformers_model(model)
    get_decoder: Any = getattr(base, "get_decoder", None)
    decoder = get_decoder() if get_decoder else None
    return decoder if isinstance(decoder, nn.Module) else base.base_model


def few_logits(model: nn.Module, number: int) -> dict[str, int]:
    """The keyword that makes `model` compute the logits of the last `number` positions only, where it has one.

    0 stands for all positions, as in transformers.
    """
    parameters = inspect.signature(transformers_model(model).forward).parameters
    return {"logits_to_keep": number} if "logits_to_keep" in parameters else {}


def enable_capture(model: nn.Module) -> list[int]:
    """Route the attention of `model` through the capture and return the indices of the layers that it reaches.

    Raises UserError when the model does not use transformers' attention interface or lacks scaled-dot-product
    attention (the stock function that runs inside).
    """
    base = transformers_model(model)
    for name in (ATTENTION_NAME, UNMASKED_NAME):
        AttentionInterface.register(name, _capturing_attention)
    # Without a mask function of the same name, transformers would drop padding masks silently.
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    refusal = (
        f"{type(base).__name__} does not use transformers' attention interface with scaled-dot-product attention, so "
        "its queries, keys and values cannot be captured"
    )
    if not base._supports_sdpa or not base._can_set_attn_implementation():
        raise UserError(refusal)
    base.set_attn_implementation(ATTENTION_NAME)
    layers = sorted(capture_states(model, torch.zeros(1, 2, dtype=torch.long, device=base.device)))
    if not layers:
        raise UserError(refusal)
    return layers


def masks_can_be_left_out(model: nn.Module) -> bool:
    """Whether `without_masks` has an effect: capture is enabled, and every layer attends to all earlier tokens."""
    config = transformers_model(model).config
    return config._attn_implementation == ATTENTION_NAME and not _has_local_attention(config)


def _has_local_attention(config: PretrainedConfig) -> bool:
    """Whether masks keep any layer of the text decoder from a part of the earlier tokens (Gemma, Llama 4)."""
    text = config.get_text_config(decoder=True)
    limits = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    kinds = set(getattr(text, "layer_types", None) or ())
    return any(limit is not None for limit in limits) or not kinds <= {"full_attention"}


@contextmanager
def without_masks(*models: nn.Module) -> Iterator[None]:
    """Run enabled models without looking for padding or packed sequences, which the batches must not have.

    Models with layers that attend to a part of the earlier tokens only keep their masks.
    """
    changed = [transformers_model(model).config for model in models if masks_can_be_left_out(model)]
    for config in changed:
        config._attn_implementation = UNMASKED_NAME
    try:
        yield
    finally:
        for config in changed:
            config._attn_implementation = ATTENTION_NAME


def disable_capture(model: nn.Module) -> None:
    """Give the model its stock scaled-dot-product attention back."""
    transformers_model(model).set_attn_implementation("sdpa")


@torch.no_grad()
def capture_states(
    model: nn.Module, input_ids: Tensor, layers: frozenset[int] | None = None, **inputs: Any
) -> dict[int, LayerStates]:
    """The states of `model` on `input_ids` [B, N] by layer, in evaluation mode, without gradients or logits.

    inputs: further arguments of the decoder, such as attention_mask or position_ids.
    """
    was_training = model.training
    if was_training:
        model.eval()
    try:
        with capturing(layers) as capture:
            decoder_of(model)(input_ids=input_ids, use_cache=False, **inputs)
    finally:
        if was_training:
            model.train()
    return capture.states
