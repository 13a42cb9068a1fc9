"""Continued pre-training (CPT): next-token loss on long sequences, without ever making all of their logits."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from linearard.capture import decoder_of, enable_capture, few_logits, transformers_model
from linearard.errors import UserError
from linearard.linear_cross_entropy import IGNORED, linear_cross_entropy
from linearard.stage_trainer import LONG_TEXT_ATTENTION, StageTrainer
from linearard.teacher import make_trainable
from linearard.training_config import CPTConfig

# Heads that do more than a matrix product, by the name of the setting in a model's configuration.
_OTHER_HEADS = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": None}


class CPTTrainer(StageTrainer):
    """transformers' Trainer with the next-token loss of a `CPTConfig`.

    model: a causal language model whose RoPE is scaled already. Batches hold input_ids [B, N] and, if they need them,
    attention_mask [B, N] (padding), position_ids [1, N] that restart at 0 (packed sequences), or labels [B, N] (aligned
    with input_ids as in transformers, -100 counts for nothing). The loss is the mean over all predicted tokens of an
    optimizer step; everything else is Trainer's.
    """

    args: CPTConfig
    attention = LONG_TEXT_ATTENTION

    def __init__(self, model: PreTrainedModel, args: CPTConfig, **kwargs: Any) -> None:
        check_head(model)
        # The same attention, without asking the GPU in every pass whether sequences are packed.
        if model.config._attn_implementation == "sdpa":
            with contextlib.suppress(UserError):
                enable_capture(model)
        student = make_trainable(model, args)
        super().__init__(model=student, args=args, **kwargs)

    def item_count(self, batch: Mapping[str, Any]) -> Tensor:
        """The number of predicted tokens."""
        return (next_tokens(batch) != IGNORED).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The next-token loss; with `num_items_in_batch`, its share of the mean over that many predicted tokens."""
        targets = next_tokens(inputs)
        inputs = self.model_inputs(inputs)
        with self.masks_of(inputs):
            hidden, outputs = last_hidden_states(model, inputs)
        loss = next_token_loss(transformers_model(self.model), hidden, targets)
        items = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = loss / items
        if num_items_in_batch is not None:
            # Distributed data parallel averages the gradients of processes that each hold a share of the sum.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


def next_tokens(batch: Mapping[str, Any]) -> Tensor:
    """The token to be predicted at each position, [B, N]; -100 at the end of sequences and where padding follows."""
    labels: Tensor = batch.get("labels", batch["input_ids"])
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None:
        targets[:, :-1].masked_fill_((mask[:, 1:] == 0) | (mask[:, :-1] == 0), IGNORED)
    if positions is not None:
        targets[:, :-1].masked_fill_(positions[:, 1:] == 0, IGNORED)
    return targets


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


def next_token_loss(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy in nats of the model's head on `hidden` [B, N, D] with `targets` [B, N]."""
    head: Any = model.get_output_embeddings()
    return linear_cross_entropy(hidden.flatten(0, 1), head.weight, targets.flatten(), head.bias)


def check_head(model: PreTrainedModel) -> None:
    """Raise UserError for a model whose head is more than a linear layer, which this loss would get wrong."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config(decoder=True)
    if not isinstance(head, nn.Linear):
        raise UserError(f"{type(model).__name__} has no linear language-model head")
    for name, neutral in _OTHER_HEADS.items():
        value = getattr(config, name, neutral)
        if value not in (neutral, None, 1.0):
            raise UserError(
                f"{type(model).__name__} changes its logits by {name} ({value}), which CPT does not support"
            )
