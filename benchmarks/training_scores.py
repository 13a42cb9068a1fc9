"""The scores of benchmarks/training.py.

They are quicker to get than those of `linearard evaluate`: last words and choices by log-likelihood in bfloat16 without
lm-evaluation-harness; passkeys in one pass without generation, by whether each digit is the model's own choice after
those before it (what it would write behind them does not count).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearard.capture import decoder_of, disable_capture
from linearard.data import evaluation_windows, read_json_lines, sequence_start
from linearard.rope import restore_float32_rope
from linearard.suite.long_text import document_windows, perplexity_figures, position_losses, read_documents
from linearard.suite.synthetic import make_prompt

TASKS = ("arc_easy", "boolq", "openbook_qa", "lambada_openai")
SHORT, PERPLEXITY, LONG, PASSKEY = "short", "perplexity", "long", "passkey"
WINDOWS, WINDOW = 64, 2048
LONG_WINDOWS, LONG_WINDOW = 2, 32768  # of each document
DEPTHS, PROMPTS = (0.0, 25.0, 50.0, 75.0, 100.0), 4
TOKENS_AT_ONCE = 32768


@dataclass(frozen=True)
class Row:
    """Token ids of a context with its continuation, and how many are the context's."""

    ids: list[int]
    context: int


class Scorer:
    """What is measured of a model, on data that are read once."""

    def __init__(self, options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> None:
        self.options, self.tokenizer = options, tokenizer
        self._passkeys: dict[int, list[Row]] = {}

    def __call__(self, model: PreTrainedModel, names: Sequence[str], lengths: Sequence[int]) -> dict[str, float]:
        """The named scores of a copy of `model` in bfloat16."""
        copied = copy.deepcopy(model)
        disable_capture(copied)
        copied.to(torch.bfloat16).eval()
        restore_float32_rope(copied)
        found: dict[str, float] = {}
        with torch.inference_mode():
            if SHORT in names:
                found |= self.short(copied)
            if PERPLEXITY in names:
                windows = self.windows.to(copied.device).split(1)
                losses = [float(position_losses(copied, ids).mean()) for ids in windows]
                found["ppl"] = sum(losses) / len(losses)
            if LONG in names:
                figures = perplexity_figures(copied, self.documents, WINDOW)
                found |= {"p32a": math.exp(figures[1].estimate.value), "p32b": math.exp(figures[-1].estimate.value)}
            if PASSKEY in names:
                found |= {f"k{length}": self.passkey(copied, length) for length in lengths}
        return found

    def short(self, model: PreTrainedModel) -> dict[str, float]:
        """Last words (nats a word over the first 1,000, accuracy over all) and accuracies of the choices."""
        rows = self.last_words
        found, own = continuation_scores(model, rows)
        scores = {"lam": -float(found[:1000].mean()), "lambada": float(own.float().mean())}
        for name, (rows, groups, gold, characters) in self.choices.items():
            logs, _ = continuation_scores(model, rows)
            # Length-normalised where that is usual.
            logs = logs / torch.tensor(characters) if name == "openbook_qa" else logs
            best: dict[int, tuple[float, int]] = {}
            for (group, choice), log in zip(groups, logs.tolist(), strict=True):
                best[group] = max(best.get(group, (-math.inf, -1)), (log, choice))
            scores[name] = sum(best[group][1] == right for group, right in enumerate(gold)) / len(gold)
        scores["dev4"] = sum(scores[name] for name in ("lambada", *self.choices)) / (1 + len(self.choices))
        return scores

    def passkey(self, model: PreTrainedModel, length: int) -> float:
        """The share of keys found at `length` x 1,024 tokens, over all depths."""
        right = 0
        for row in self.passkeys(length):
            ids = torch.tensor([row.ids], device=model.device)
            hidden = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0, row.context - 1 : -1]
            right += int((_logits(model, hidden).argmax(-1) == ids[0, row.context :]).all())
        return right / (len(DEPTHS) * PROMPTS)

    def passkeys(self, length: int) -> list[Row]:
        """Prompts of `length` x 1,024 tokens with their keys, over all depths."""
        if length not in self._passkeys:
            rows = self._passkeys.setdefault(length, [])
            for depth, index in itertools.product(DEPTHS, range(PROMPTS)):
                prompt = make_prompt("passkey", self.tokenizer, length * 1024, depth, 0, index)
                answer = self.encode([" " + prompt.answers[0]])[0]
                # The prompt may end with the space before the number.
                rows.append(Row(prompt.ids + answer[_shared(prompt.ids, answer) :], len(prompt.ids)))
        return self._passkeys[length]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids without special tokens."""
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def rows(self, pairs: list[tuple[str, str]]) -> list[Row]:
        """Contexts with their continuations, which a space separates."""
        start = sequence_start(self.tokenizer)
        contexts = self.encode([context for context, _ in pairs])
        whole = self.encode([f"{context} {continuation}" for context, continuation in pairs])
        return [Row(start + ids, len(start) + len(own)) for own, ids in zip(contexts, whole, strict=True)]

    @cached_property
    def windows(self) -> Tensor:
        """Those of the perplexity."""
        return evaluation_windows(self.options.heldout_files, self.tokenizer, WINDOW, WINDOWS)

    @cached_property
    def documents(self) -> list[Tensor]:
        """Those of the perplexity by position."""
        return document_windows(read_documents(self.options.heldout_files), self.tokenizer, LONG_WINDOW, LONG_WINDOWS)

    @cached_property
    def last_words(self) -> list[Row]:
        """LAMBADA's passages."""
        examples = read_json_lines(self.options.tasks / "lambada_openai.jsonl")
        return self.rows([(example["context"], example["continuation"]) for example in examples])

    @cached_property
    def choices(self) -> dict[str, tuple[list[Row], list[tuple[int, int]], list[int], list[int]]]:
        """By task: a row for each choice, its example and number, the right one of each example, their characters."""
        found = {}
        for name in TASKS[:3]:
            examples = read_json_lines(self.options.tasks / f"{name}.jsonl")
            end = "" if name == "openbook_qa" else "\nAnswer:"
            flat = [
                (example["query"] + end, text, (number, choice))
                for number, example in enumerate(examples)
                for choice, text in enumerate(example["choices"])
            ]
            found[name] = (
                self.rows([(query, text) for query, text, _ in flat]),
                [place for _, _, place in flat],
                [example["gold"] for example in examples],
                [len(text) for _, text, _ in flat],
            )
        return found


def _shared(prompt: list[int], answer: list[int]) -> int:
    """How many tokens at the end of `prompt` are the first of `answer`."""
    return next((size for size in range(len(answer), 0, -1) if prompt[-size:] == answer[:size]), 0)


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    head: Any = model.get_output_embeddings()
    logits: Tensor = head(hidden).float()
    return logits


def continuation_scores(model: PreTrainedModel, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Log-likelihood of each continuation, and whether every token of it is the model's own choice."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place].ids))
    scores, own = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.bool)
    begin = 0
    while begin < len(order):
        longest = len(rows[order[min(begin + 64, len(order) - 1)]].ids)
        group = order[begin : begin + max(1, TOKENS_AT_ONCE // longest)]
        begin += len(group)
        width = max(len(rows[place].ids) for place in group)
        # Padded at the end, which earlier tokens do not see.
        ids = torch.tensor([rows[place].ids + [0] * (width - len(rows[place].ids)) for place in group])
        ids = ids.to(model.device)
        hidden = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        which = [(line, token) for line, place in enumerate(group)
                 for token in range(rows[place].context - 1, len(rows[place].ids) - 1)]  # fmt: skip
        lines, tokens = (torch.tensor(column, device=model.device) for column in zip(*which, strict=True))
        logits = _logits(model, hidden[lines, tokens])
        target = ids[lines, tokens + 1]
        logs = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
        wrong = (logits.argmax(-1) != target).float()
        places = torch.tensor(group)
        scores[places] = logs.new_zeros(len(group)).index_add_(0, lines, logs).cpu()
        own[places] = wrong.new_zeros(len(group)).index_add_(0, lines, wrong).cpu() == 0
    return scores, own
