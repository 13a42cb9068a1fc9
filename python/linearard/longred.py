"""LongReD (arXiv 2502.07365), the baseline: long text by next tokens, short text by the teacher's hidden states."""

from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel

from linearard.capture import decoder_of, enable_capture, few_logits, transformers_model
from linearard.cpt import next_token_loss, next_tokens
from linearard.errors import UserError
from linearard.head import check_head, last_hidden_states
from linearard.linear_losses import IGNORED
from linearard.stage_trainer import LONG_TEXT_ATTENTION, StageTrainer
from linearard.teacher import make_student
from linearard.training_config import LongREDConfig

# The kinds of 16 micro-batches, in the proportions of the paper.
SCHEDULE = ("long", "short", "long", "short", "long", "stretched", "long", "short") * 2
_RELATIVE_HEAD = 3  # CREAM's second strategy: head, middle and tail of a third each
_CONTINUOUS_HEAD = 32  # its first: short head and tail


class LongREDBlocks(Dataset[dict[str, Tensor]]):
    """Sequences of the three kinds in the order of `SCHEDULE`: item i is of kind SCHEDULE[i % 16].

    blocks: token ids [number, length] by kind. Stretched ones also get position_ids, chosen from `seed` and the item's
    index, so that a resumed run sees the same.
    """

    def __init__(self, blocks: Mapping[str, Tensor], number: int, context: int, positions: str, seed: int) -> None:
        self.blocks, self._number, self._context = dict(blocks), number, context
        self._positions, self._seed = positions, seed

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rounds, place = divmod(index, len(SCHEDULE))
        kind = SCHEDULE[place]
        of_kind = rounds * SCHEDULE.count(kind) + SCHEDULE[:place].count(kind)
        rows = self.blocks[kind]
        item = {"input_ids": rows[of_kind % len(rows)]}
        if kind == "stretched":
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + index)
            item["position_ids"] = skipped_positions(rows.shape[1], self._context, self._positions, generator)
        return item


def skipped_positions(length: int, context: int, method: str, generator: torch.Generator) -> Tensor:
    """Increasing positions [length] below `context`, beginning at 0, for a short text that pretends to be long.

    uniform: the others are drawn without replacement. cream (in the manner of arXiv 2406.07138): a head at the
    beginning and a tail at the end of the context, both short or both a third of the text, and between them a
    contiguous middle whose place follows a normal distribution around the middle of the context, cut off at head and
    tail.
    """
    if length >= context:
        return torch.arange(length)
    if method == "uniform":
        others = torch.randperm(context - 1, generator=generator)[: length - 1] + 1
        return torch.cat([torch.zeros(1, dtype=torch.long), others.sort().values])
    relative = torch.rand((), generator=generator) < 0.5
    head = length // _RELATIVE_HEAD if relative else min(_CONTINUOUS_HEAD, length // _RELATIVE_HEAD)
    middle = length - 2 * head
    lowest, highest = head, context - head - middle
    centre, spread = (lowest + highest) / 2, (highest - lowest) / 6
    start = round(float(torch.randn((), generator=generator)) * spread + centre)
    start = min(max(start, lowest), highest)
    return torch.cat([torch.arange(head), torch.arange(start, start + middle), torch.arange(context - head, context)])


class LongREDTrainer(StageTrainer):
    """transformers' Trainer with LongReD's three losses.

    model: a causal language model with its native RoPE; it is scaled in place by `scaling`. Batches hold one sequence,
    input_ids [1, N] and position_ids [1, N] for short-to-long ones; `LongREDBlocks` makes them, and their kind is told
    by position_ids and length. As in the paper, every micro-batch has the same weight, whatever its length.
    """

    args: LongREDConfig
    attention = LONG_TEXT_ATTENTION

    def __init__(self, model: PreTrainedModel, args: LongREDConfig, scaling: str, **kwargs: Any) -> None:
        if args.world_size > 1:
            raise UserError("LongReD runs in one process: its losses do not reach the same parameters")
        enable_capture(model)  # for measurements: the losses need hidden states alone
        depth = model.config.get_text_config(decoder=True).num_hidden_layers
        self.layers = args.distilled_layers or sorted({round((place + 1) * depth / 6) - 1 for place in range(6)} - {-1})
        wrong = [layer for layer in self.layers if not 0 <= layer < depth]
        if wrong:
            raise UserError(f"the model has no layer {wrong[0]}; it has {depth}: 0 to {depth - 1}")
        student, self.teacher = make_student(model, scaling, args)
        check_head(transformers_model(student))
        super().__init__(model=student, args=args, **kwargs)
        self.teacher.to(self.args.device)

    def frozen_modules(self) -> list[nn.Module]:
        """The student, and the teacher where it is a model of its own."""
        return [self.model, *([self.teacher.frozen_copy] if self.teacher.frozen_copy is not None else [])]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """The micro-batches of one optimizer step; no number of items: Trainer divides by the micro-batches."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return samples, None

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset: Sized = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch, by its kind."""
        ids = inputs["input_ids"]
        outputs: Any = None
        if "position_ids" in inputs:
            kind, weight = "stretched", self.args.short_to_long_weight
            loss = self._stretched_loss(model, ids, inputs["position_ids"])
        elif ids.shape[1] == self.args.short_length:
            kind, weight = "short", self.args.short_weight
            with self.masks_of(inputs):
                loss = self._short_loss(model, ids)
        else:
            kind, weight = "long", 1.0
            with self.masks_of(inputs):
                hidden, outputs = last_hidden_states(model, {"input_ids": ids})
            targets = next_tokens(inputs)
            plain = transformers_model(self.model)
            loss = next_token_loss(plain, hidden, targets) / (targets != IGNORED).sum()
        if model.training:
            # The mean over the micro-batches of that kind in a step.
            share = len(SCHEDULE) / SCHEDULE.count(kind) / self.args.gradient_accumulation_steps
            self.remember({f"{kind}_loss": loss.detach() * share})
        return (weight * loss, outputs) if return_outputs else weight * loss

    def prediction_step(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, None, None]:
        """Refused: the mean over rows of different kinds would say nothing."""
        raise UserError("LongReD has no loss of an eval_dataset: its rows are of three kinds")

    def _stretched_loss(self, model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
        with torch.no_grad(), self.teacher.active() as teacher:
            expected = decoder_of(teacher)(input_ids=ids, use_cache=False).last_hidden_state
        # With a mask, or transformers would take every jump of the positions for the beginning of another sequence.
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones_like(ids)}
        hidden, _ = last_hidden_states(model, inputs)
        return _distance(hidden, expected)

    def _short_loss(self, model: nn.Module, ids: Tensor) -> Tensor:
        with torch.no_grad(), self.teacher.active() as teacher:
            expected = decoder_of(teacher)(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        states = model(
            input_ids=ids, use_cache=False, output_hidden_states=True, **few_logits(self.model, 1)
        ).hidden_states
        # hidden_states[0] is the embedding, so layer l's output is at l + 1.
        return torch.stack([_distance(states[layer + 1], expected[layer + 1]) for layer in self.layers]).sum()


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of 1 - cosine similarity of hidden states [B, N, D]."""
    return (1 - cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()
