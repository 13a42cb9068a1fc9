"""Answers of a model to synthetic prompts: greedy decoding with a cache, and how many of them are right."""

from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from linearard.suite.config import SuiteConfig
from linearard.suite.figures import ACCURACY, Figure
from linearard.suite.synthetic import SYNTHETIC_TASKS, Prompt, make_prompt, score

# Prompts of different lengths in one batch need a mask of [batch, 1, N, N]; longer prompts run alone, without one.
_LONGEST_IN_BATCH = 4096


def grid(config: SuiteConfig, names: Sequence[str]) -> list[tuple[str, int, float | None]]:
    """(task, length, depth) of every figure; depth is None for tasks without."""
    return [
        (name, length, depth)
        for name in names
        for length in config.lengths
        for depth in (config.depths if SYNTHETIC_TASKS[name].has_depth else [None])
    ]


def retrieval_figure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: SuiteConfig,
    cell: tuple[str, int, float | None],
) -> Figure:
    """The accuracy of `model` in one cell of the grid: one value for each prompt.

    Tasks without depth get as many prompts as those with depth get at all depths together.
    """
    name, length, depth = cell
    prompts = list(prompts_of(tokenizer, config, cell))
    texts = answers(model, tokenizer, prompts, config.evaluation_batch)
    values = tuple(score(prompt.answers, text, name) for prompt, text in zip(prompts, texts, strict=True))
    return Figure(name, ACCURACY, values, length, depth)


def prompts_of(
    tokenizer: PreTrainedTokenizerBase,
    config: SuiteConfig,
    cell: tuple[str, int, float | None],
    filler: bool = True,
) -> Iterator[Prompt]:
    """The prompts of one cell of the grid; filler and errors as in `make_prompt`."""
    name, length, depth = cell
    for index in range(config.samples * (1 if SYNTHETIC_TASKS[name].has_depth else len(config.depths))):
        yield make_prompt(name, tokenizer, length, depth, config.seed, index, filler)


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    batch: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The greedy continuation of each prompt, of as many tokens as the prompt allows or up to the end of the text.

    The prompt is read in one pass whose logits are computed for the last position only.
    """
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    texts = [""] * len(prompts)
    for group in _batches(prompts, batch):
        longest = max(len(prompts[index].ids) for index in group)
        gaps = [longest - len(prompts[index].ids) for index in group]
        ids = torch.tensor([[padding] * gap + prompts[index].ids for gap, index in zip(gaps, group, strict=True)])
        mask = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps])
        settings = GenerationConfig(
            # Spelled out, because a model's own settings take the place of what is not.
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=max(prompts[index].new_tokens for index in group),
            pad_token_id=padding,
            eos_token_id=tokenizer.eos_token_id,
        )
        output = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
        )
        for index, row in zip(group, output[:, longest:].tolist(), strict=True):
            texts[index] = tokenizer.decode(row[: prompts[index].new_tokens], skip_special_tokens=True)
        advance(len(group))
    return texts


def _batches(prompts: Sequence[Prompt], batch: int) -> Iterator[list[int]]:
    """Indices of the prompts in groups of similar length; a long prompt is a group of its own."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    group: list[int] = []
    for index in order:
        alone = len(prompts[index].ids) > _LONGEST_IN_BATCH
        if group and (alone or len(group) == batch):
            yield group
            group = []
        group.append(index)
    if group:
        yield group
