"""The language-model head of a model: what it reads, and whether it is a matrix product and no more."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from linearard.capture import decoder_of, few_logits
from linearard.errors import UserError

# Heads that do more than a matrix product, by the name of the setting in a model's configuration.
_OTHER_HEADS = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": None}


def last_hidden_states(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """(what the head of `model` reads, [B, N, D]; the model's outputs with next to none of its logits).

    The model runs as a whole, for the hooks of distributed data parallel; its decoder is listened to.
    """
    found: list[Tensor] = []

    def listen(module: nn.Module, arguments: tuple[Any, ...], output: BaseModelOutputWithPast) -> None:
        assert output.last_hidden_state is not None
        found.append(output.last_hidden_state)

    inner = getattr(model, "module", model)
    handle = decoder_of(inner).register_forward_hook(listen)
    try:
        outputs = model(**inputs, **few_logits(inner, 1), use_cache=False)
    finally:
        handle.remove()
    return found[0], outputs


def check_head(model: PreTrainedModel) -> None:
    """Raise UserError for a model whose logits are more than a linear layer's, which chunks of them would get wrong."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config(decoder=True)
    if not isinstance(head, nn.Linear):
        raise UserError(f"the language-model head of {type(model).__name__} is no linear layer: {type(head).__name__}")
    for name, neutral in _OTHER_HEADS.items():
        value = getattr(config, name, neutral)
        if value not in (neutral, None, 1.0):
            raise UserError(f"{type(model).__name__} changes its logits by {name} ({value}), which is not supported")
