"""What RoPE scaling damages and a restoration brings back: perplexity, last words, attention relations."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from transformers import PreTrainedTokenizerBase

from linearard.capture import LayerStates, capture_states, few_logits, transformers_model
from linearard.config import EvaluationConfig
from linearard.data import LastWordExample, evaluation_windows, last_word_examples, sequence_start
from linearard.errors import UserError
from linearard.losses import RELATIONS, ARDLoss

States = Callable[[Tensor], dict[int, LayerStates]]


@dataclass(frozen=True)
class EvaluationData:
    """Held-out windows [number, length] of token ids, and last-word passages."""

    windows: Tensor
    examples: list[LastWordExample]
    relation_windows: int
    batch: int

    @classmethod
    def load(cls, config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> "EvaluationData":
        """Read and tokenise what `config` names; raises UserError for missing or too short files."""
        windows = evaluation_windows(config.heldout_files, tokenizer, config.heldout_length, config.heldout_windows)
        examples = last_word_examples(config.last_word_file, config.last_word_number)
        return cls(windows, examples, config.relation_windows, config.evaluation_batch)


@dataclass(frozen=True)
class Evaluation:
    """The measurements of one model.

    perplexity: on held-out text, per token; last_word_perplexity: per word; last_word_accuracy: share of words whose
    every token is the model's first choice; relation_kl: mean divergence from the teacher by relation, one value per
    layer (nats per token and head), empty for the teacher itself.
    """

    perplexity: float
    last_word_perplexity: float
    last_word_accuracy: float
    relation_kl: dict[str, list[float]] = field(default_factory=dict)

    def mean_relation_kl(self, relation: str) -> float | None:
        """The mean over the layers, or None where it was not measured."""
        values = self.relation_kl.get(relation)
        return sum(values) / len(values) if values else None


def evaluate_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: EvaluationData,
    teacher: States | None = None,
    advance: Callable[[int], None] = lambda batches: None,
) -> Evaluation:
    """Measure `model`; with the `teacher`'s states also the divergence of the relations (capture must be enabled).

    advance: called with the number of batches that were finished, `evaluation_batches` in all.
    """
    was_training = model.training
    model.eval()
    try:
        loss = mean_token_loss(model, data.windows, data.batch, advance)
        word_losses, correct = last_word_losses(model, tokenizer, data.examples, data.batch, advance)
        kl = {}
        if teacher is not None:
            kl = relation_kl_by_layer(model, teacher, data.windows[: data.relation_windows], advance)
    finally:
        model.train(was_training)
    return Evaluation(
        perplexity=math.exp(loss),
        last_word_perplexity=math.exp(sum(word_losses) / len(word_losses)),
        last_word_accuracy=sum(correct) / len(correct),
        relation_kl=kl,
    )


def evaluation_batches(data: EvaluationData, with_relations: bool) -> int:
    """How many batches `evaluate_model` reports to `advance`."""
    rows = [len(data.windows), len(data.examples)]
    relations = min(data.relation_windows, len(data.windows)) if with_relations else 0
    return sum(-(-count // data.batch) for count in rows) + relations


@torch.no_grad()
def mean_token_loss(
    model: nn.Module, windows: Tensor, batch: int, advance: Callable[[int], None] = lambda batches: None
) -> float:
    """Mean next-token loss in nats of `windows` [number, length]; exp of it is the perplexity."""
    device = transformers_model(model).device
    total = 0.0
    for rows in windows.split(batch):
        ids = rows.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        total += float(cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        advance(1)
    return total / (windows.shape[0] * (windows.shape[1] - 1))


@torch.no_grad()
def last_word_losses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[LastWordExample],
    batch: int,
    advance: Callable[[int], None] = lambda batches: None,
) -> tuple[list[float], list[bool]]:
    """Negative log-likelihood (nats) of each last word given its passage, and whether it is the model's own choice."""
    encoded = sorted(_encode(example, tokenizer) for example in examples)
    device = transformers_model(model).device
    losses: list[float] = []
    correct: list[bool] = []
    for start in range(0, len(encoded), batch):
        group = encoded[start : start + batch]
        longest = max(len(ids) for _, ids, _ in group)
        kept = max(count for _, _, count in group) + 1
        # Padding on the left, so that all words end at the same place and few logits are needed.
        ids = torch.tensor([[0] * (longest - len(ids)) + ids for _, ids, _ in group], device=device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for _, ids, _ in group], device=device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **few_logits(model, kept)
        ).logits[:, -kept:-1]
        scores = log_softmax(logits.float(), dim=-1)
        for row, (_, _, count) in enumerate(group):
            target = ids[row, -count:]
            word = scores[row, -count:]
            losses.append(-float(word.gather(-1, target[:, None]).sum()))
            correct.append(bool((word.argmax(-1) == target).all()))
        advance(1)
    return losses, correct


def _encode(example: LastWordExample, tokenizer: PreTrainedTokenizerBase) -> tuple[int, list[int], int]:
    """(length, ids of passage and word, number of the word's tokens): sorting by length keeps padding small."""
    start = sequence_start(tokenizer)
    context: list[int] = tokenizer(example.context, add_special_tokens=False)["input_ids"]
    word: list[int] = tokenizer(" " + example.word, add_special_tokens=False)["input_ids"]
    ids = start + context + word
    return len(ids), ids, len(word)


@torch.no_grad()
def relation_kl_by_layer(
    student: nn.Module, teacher: States, windows: Tensor, advance: Callable[[int], None] = lambda batches: None
) -> dict[str, list[float]]:
    """Divergence of the student's relations from the teacher's by relation and layer, nats per token and head.

    Dense KL(teacher || student) for queries, keys and values, causal for the attention map, whatever was trained on.
    windows: [number, length] token ids.
    """
    device = transformers_model(student).device
    measure = ARDLoss(dict.fromkeys(RELATIONS, 1.0))
    sums: dict[str, list[float]] = {}
    for row in windows.split(1):
        ids = row.to(device)
        values = measure.by_layer(capture_states(student, ids), teacher(ids))
        for name, layers in values.items():
            measured = torch.stack(layers).tolist()
            sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * len(measured)), measured, strict=True)]
        advance(1)
    return {name: [value / len(windows) for value in values] for name, values in sums.items()}


def damage_undone(teacher: float, scaled: float, restored: float) -> float | None:
    """The share of the distance in log perplexity, from the scaled model to the teacher, that was made good.

    1 means restored in full; above 1 is adaptation to the text; None when the scaling did no damage.
    """
    damage = math.log(scaled) - math.log(teacher)
    return (math.log(scaled) - math.log(restored)) / damage if damage > 1e-3 else None


def check_same_tokens(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> None:
    """Raise UserError when two models cannot be compared because their tokenizers differ."""
    if first.get_vocab() != second.get_vocab():
        raise UserError("the two models have different tokenizers and cannot be compared")
