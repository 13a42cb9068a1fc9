"""Short-text tasks by lm-evaluation-harness (lm-eval), on models that are loaded already.

Importing this module imports lm-eval, which takes seconds: only do so where a task needs it.
"""

import difflib
import io
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearard.errors import UserError
from linearard.suite.figures import ACCURACY, NLL, Figure
from linearard.suite.task_files import LocalTask

# Standard tasks whose usual figure is the length-normalised one.
LENGTH_NORMALISED = ("arc_challenge", "hellaswag", "openbookqa", "piqa")
# lm-eval's per-example values that are shares; the values of `perplexity` are log-likelihoods.
_SHARES = ("acc", "acc_norm", "exact_match")


class HarnessModel(HFLM):
    """lm-eval's transformers model, made from a loaded one; refuses what it would cut off."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int) -> None:
        with _quiet():
            super().__init__(
                pretrained=model, tokenizer=tokenizer, batch_size=batch, backend="causal", softmax_dtype=torch.float32
            )

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: lm-eval would ask the hub for the revision of the model."""
        return {}

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """As in HFLM, without its progress bar."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **keywords: Any) -> Any:
        for _, context, continuation in requests:
            if len(context) + len(continuation) > self.max_length:
                raise UserError(
                    f"an example of {len(context) + len(continuation):,} tokens is longer than the model's range of "
                    f"{self.max_length:,}"
                )
        return super()._loglikelihood_tokens(requests, *arguments, **keywords)


def check_standard_tasks(names: list[str], others: list[str]) -> None:
    """Raise UserError for names that lm-eval does not know. others: what --tasks takes besides, for the message."""
    if not names:
        return
    known = TaskManager().all_tasks
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, [*others, *known], n=3)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise UserError(
                f"unknown task {name!r}: {hint}known are {', '.join(others)}, .jsonl files, and lm-eval's "
                f"{len(known):,} tasks (lm-eval ls tasks)"
            )


def local_figures(model: HarnessModel, task: LocalTask) -> list[Figure]:
    """The metrics of a local task; nothing is read from or written to a hub or a cache."""
    config = {
        **task.template,
        "task": task.name,
        "custom_dataset": lambda **_: {task.template["test_split"]: Dataset.from_list(task.rows)},
    }
    with _quiet():
        return _figures(model, ConfigurableTask(config=config), task.main_metric)


def standard_figures(model: HarnessModel, name: str, limit: int | None) -> list[Figure]:
    """The metrics of a task of lm-eval, or of all tasks of a group, whose data come from the hub."""
    with _quiet():
        try:
            tasks = TaskManager().load([name])["tasks"]
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"cannot load the data of the task {name!r}, which come from the hub: {reason}") from error
        figures = []
        for task_name, task in tasks.items():
            main = "acc_norm" if task_name in LENGTH_NORMALISED else None
            figures += _figures(model, task, main, limit)
        return figures


def _figures(model: HarnessModel, task: Any, main: str | None, limit: int | None = None) -> list[Figure]:
    samples = _samples(model, task, limit)
    filters = sorted({sample["filter"] for sample in samples})
    samples = [sample for sample in samples if sample["filter"] == filters[0]]
    shares = [name for name in _SHARES if samples and name in samples[0]]
    main = main if main in shares else next(iter(shares), None)
    figures = [
        Figure(
            task.task_name,
            ACCURACY,
            tuple(float(sample[name]) for sample in samples),
            variant="" if name == main else name,
        )
        for name in shares
    ]
    if samples and "perplexity" in samples[0]:
        figures.append(Figure(task.task_name, NLL, tuple(-float(sample["perplexity"]) for sample in samples)))
    if not figures:
        raise UserError(f"the task {task.task_name!r} has neither accuracy, exact match nor log-likelihood")
    return figures


def _samples(model: HarnessModel, task: Any, limit: int | None) -> list[dict[str, Any]]:
    """What lm-eval's simple_evaluate logs for each example, without the index of all tasks and the report on the
    machine that it makes in every call.
    """
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    # Tasks may draw from the global generators, in their prompts or for sampled answers.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002 (the tasks draw from it)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    results = evaluate(
        lm=model, task_dict={"tasks": {task.task_name: task}}, limit=limit, bootstrap_iters=0, log_samples=True
    )
    return results["samples"][task.task_name] if results else []


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets say on every call what we asked them to do: only errors pass, as log or exception."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):  # progress bars that cannot be switched off
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
