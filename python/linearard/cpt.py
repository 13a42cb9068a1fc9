"""Continued pre-training (CPT): next-token loss on long sequences, without ever making all of their logits."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearard.capture import enable_capture, transformers_model
from linearard.errors import UserError
from linearard.head import check_head, last_hidden_states
from linearard.linear_losses import IGNORED, linear_cross_entropy
from linearard.stage_trainer import LONG_TEXT_ATTENTION, StageTrainer
from linearard.teacher import make_trainable
from linearard.training_config import CPTConfig


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
        # The same attention, without asking the GPU in every pass whether sequences are packed.
        if model.config._attn_implementation == "sdpa":
            with contextlib.suppress(UserError):
                enable_capture(model)
        student = make_trainable(model, args)
        check_head(transformers_model(student))
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


def next_token_loss(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy in nats of the model's head on `hidden` [B, N, D] with `targets` [B, N]."""
    head: Any = model.get_output_embeddings()
    return linear_cross_entropy(hidden.flatten(0, 1), head.weight, targets.flatten(), head.bias)
