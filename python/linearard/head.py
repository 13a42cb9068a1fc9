"""The language-model head of a model: what it reads, and whether it is a matrix product and no more."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from linearard.capture import decoder_of, few_logits
from linearard.errors import UserError

# Heads that do more than a matrix product, by the name of the setting in a model's configuration.
_OTHER_HEADS = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": None}


def last_hidden_states(model: nn.Module, inputs: Mapping[str, Any], kept: int = 1) -> tuple[Tensor, Any]:
    """(what the head of `model` reads, [B, N, D]; the model's outputs with the logits of `kept` positions, 0: of all).

    The model runs as a whole, for the hooks of distributed data parallel; its decoder is listened to.
    """
    found: list[Tensor] = []

    def listen(module: nn.Module, arguments: tuple[Any, ...], output: BaseModelOutputWithPast) -> None:
        assert output.last_hidden_state is not None
        found.append(output.last_hidden_state)

    inner = getattr(model, "module", model)
    handle = decoder_of(inner).register_forward_hook(listen)
    try:
        outputs = model(**inputs, **few_logits(inner, kept), use_cache=False)
    finally:
        handle.remove()
    return found[0], outputs


def check_head(model: PreTrainedModel) -> None:
    """Raise UserError for a model whose logits are more than a linear layer's, which chunks of them would get wrong.

    What its configuration does not tell shows on two tokens.
    """
    head = model.get_output_embeddings()
    config = model.config.get_text_config(decoder=True)
    if not isinstance(head, nn.Linear):
        raise UserError(f"the language-model head of {type(model).__name__} is no linear layer: {type(head).__name__}")
    for name, neutral in _OTHER_HEADS.items():
        value = getattr(config, name, neutral)
        if value not in (neutral, None, 1.0):
            raise UserError(f"{type(model).__name__} changes its logits by {name} ({value}), which is not supported")
    with torch.no_grad():
        ids = torch.arange(2, device=model.device)[None]
        hidden, outputs = last_hidden_states(model, {"input_ids": ids}, kept=0)
        expected, found = outputs.logits.float(), head(hidden.to(head.weight.dtype)).float()
    tolerance = 1e-4 if head.weight.dtype == torch.float32 else 5e-2
    if not torch.allclose(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()), equal_nan=True):
        raise UserError(f"the logits of {type(model).__name__} are not its head's of its decoder's last hidden states")
