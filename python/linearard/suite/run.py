"""`linearard evaluate` with tasks: every model in turn, every measurement, one report."""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearard.display import Display
from linearard.errors import UserError
from linearard.evaluate import choose_device, make_writable
from linearard.models import load_tokenizer
from linearard.suite.config import SuiteConfig
from linearard.suite.figures import Figure
from linearard.suite.long_text import TASK, document_windows, perplexity_figures, read_documents
from linearard.suite.retrieval import grid, prompts_of, retrieval_figure
from linearard.suite.sources import Source, check_context, figures_of_report
from linearard.suite.synthetic import RULER, SYNTHETIC_TASKS
from linearard.suite.task_files import LocalTask, find_files, load_tasks

Windows = dict[int, list[Tensor]]  # of the long documents by length, as a tokenizer makes them


@dataclass(frozen=True)
class Plan:
    """What --tasks asks for, by kind, and the texts of --long_files."""

    local: list[LocalTask]
    synthetic: list[str]
    standard: list[str]
    documents: list[str]

    def examples(self, config: SuiteConfig) -> dict[str, Any]:
        """What decides what the models are measured on: reports can be compared where the settings agree, and the
        contents of the files that both have.
        """
        files = {f"task {task.name}": _digest([task.template, *task.rows]) for task in self.local}
        if self.documents:
            files["long_files"] = _digest(self.documents)
        return {**config.examples(), "files": files}


@dataclass(frozen=True)
class Results:
    """The figures of every model by label, and which labels the teacher and the scaled model have.

    examples: as in `Plan`.
    """

    figures: dict[str, list[Figure]]
    models: dict[str, str]
    examples: dict[str, Any]
    teacher: str | None = None
    scaled: str | None = None


def evaluate_suite(
    config: SuiteConfig, display: Display, save: Callable[[Results], None] = lambda results: None
) -> Results:
    """Measure every model of `config`; raises UserError, where it can before any work, for what cannot be used.

    save: called after each model that was measured, with what there is of all.
    """
    sources = _sources(config)
    plan = make_plan(config)
    device = choose_device(config.device)
    examples = plan.examples(config)
    figures: dict[str, list[Figure]] = {}
    for label, source in sources.items():
        if source.report:
            # Its files become this run's: the new report holds figures on them.
            figures[label], examples["files"] = figures_of_report(source, examples)
    models = [source for source in sources.values() if not source.report]
    _check_models(models, plan, config)
    tokenizers = {source.model: source for source in reversed(models)}  # each model once, under its first label
    windows = {model: _check_lengths(source, plan, config) for model, source in tokenizers.items()}
    if config.teacher:
        _check_documents(figures, {source.label: windows[source.model] for source in models})
    make_writable(Path(config.output_dir), "output_dir")

    def results() -> Results:
        known = {label: source for label, source in sources.items() if label in figures}
        return Results(
            {label: figures[label] for label in known},
            {label: source.text for label, source in known.items()},
            examples,
            teacher=next((label for label, source in known.items() if source.role == "teacher"), None),
            scaled=next((label for label, source in known.items() if source.role == "scaled"), None),
        )

    for source in models:
        figures[source.label] = _measure(source, plan, windows[source.model], config, display, device)
        save(results())
    return results()


def make_plan(config: SuiteConfig) -> Plan:
    """Sort --tasks by kind, read the files among them and --long_files, and look the names up."""
    files: list[tuple[Path, str | None]] = []
    names: dict[str, None] = {}
    for item in config.tasks:
        found = find_files(item)
        if found is not None:
            files += found
        else:
            names.update(dict.fromkeys(RULER if item == "ruler" else [item]))
    local = load_tasks(files, config.task_limit)
    documents = read_documents(config.long_files)
    standard = [name for name in names if name not in SYNTHETIC_TASKS]
    if local or standard:
        _require_harness(standard)
    if standard:
        from linearard.suite.harness import check_standard_tasks

        check_standard_tasks(standard, [*SYNTHETIC_TASKS, "ruler"])
    return Plan(local, [name for name in names if name in SYNTHETIC_TASKS], standard, documents)


def _sources(config: SuiteConfig) -> dict[str, Source]:
    sources = []
    if config.teacher:
        sources.append(Source.parse(config.teacher, "teacher", role="teacher"))
    if config.scaled:
        sources.append(Source.parse(config.scaled, "scaled", role="scaled"))
    sources.append(Source.parse(config.model, "model"))
    sources += [Source.parse(text) for text in config.compare]
    by_label: dict[str, Source] = {}
    for source in sources:
        if source.label in by_label:
            raise UserError(f"two models are called {source.label!r}: write LABEL=MODEL")
        by_label[source.label] = source
    return by_label


def _check_models(sources: list[Source], plan: Plan, config: SuiteConfig) -> None:
    """Raise UserError for a model without a usable configuration, or whose range the longest context exceeds."""
    contexts = {
        "lengths": config.lengths if plan.synthetic else [],
        "long_lengths": config.long_lengths if plan.documents else [],
    }
    for source in sources:
        model_config = source.load_config(config)
        for option, lengths in contexts.items():
            if lengths and not config.beyond_range:
                check_context(source.label, model_config, max(lengths), option)


def _check_lengths(source: Source, plan: Plan, config: SuiteConfig) -> Windows:
    """The windows of the long documents; raises UserError where tasks or documents do not fit the lengths."""
    tokenizer = load_tokenizer(source.model, trust_remote_code=config.trust_remote_code)
    with _naming("lengths", source):
        for cell in grid(config, plan.synthetic):
            for _ in prompts_of(tokenizer, config, cell, filler=False):
                pass
    with _naming("long_lengths", source):
        lengths = config.long_lengths if plan.documents else []
        return {length: document_windows(plan.documents, tokenizer, length, config.long_windows) for length in lengths}


@contextmanager
def _naming(option: str, source: Source) -> Iterator[None]:
    """Let errors say which option and which model they are about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--{option}, model {source.label!r}: {error}") from error


def _check_documents(loaded: dict[str, list[Figure]], windows: dict[str, Windows]) -> None:
    """Raise UserError where not all models have the same number of documents: recovery pairs them."""
    counts: dict[int, dict[str, int]] = {}
    for label, figures in loaded.items():
        for figure in figures:
            if figure.task == TASK and figure.length and not figure.positions:
                counts.setdefault(figure.length, {})[label] = len(figure.values)
    for label, by_length in windows.items():
        for length, documents in by_length.items():
            counts.setdefault(length, {})[label] = len(documents)
    for length, found in counts.items():
        if len({*found.values()}) > 1:
            raise UserError(
                f"--long_lengths: the tokenizers do not find {length:,} tokens in the same number of documents: "
                + ", ".join(f"{number} for {label}" for label, number in found.items())
            )


def _measure(
    source: Source, plan: Plan, windows: Windows, config: SuiteConfig, display: Display, device: torch.device
) -> list[Figure]:
    """All figures of one model."""
    display.say(f"Loading {source.text}")
    model, tokenizer = source.load(config, device)
    parts = len(plan.local) + len(plan.standard) + len(grid(config, plan.synthetic))
    parts += len(windows)
    figures: list[Figure] = []
    with display.progress(source.label, parts) as bar:
        for found in _parts(model, tokenizer, plan, windows, config):
            figures += found
            bar.note(found[0].name)
            bar.advance(1)
    return figures


def _parts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, windows: Windows, config: SuiteConfig
) -> Iterator[list[Figure]]:
    """The figures of one part of the work after the other."""
    for documents in windows.values():
        yield perplexity_figures(model, documents, config.bucket)
    if plan.local or plan.standard:
        from linearard.suite.harness import HarnessModel, local_figures, standard_figures

        harness = HarnessModel(model, tokenizer, config.evaluation_batch)
        for task in plan.local:
            yield local_figures(harness, task)
        for name in plan.standard:
            yield standard_figures(harness, name, config.task_limit)
    for cell in grid(config, plan.synthetic):
        yield [retrieval_figure(model, tokenizer, config, cell)]


def _digest(content: list[Any]) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _require_harness(unknown: list[str]) -> None:
    """Raise UserError where lm-eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        asked = f"{', '.join(unknown)} is none of {', '.join(SYNTHETIC_TASKS)}, ruler; " if unknown else ""
        raise UserError(
            f"{asked}short-text tasks need lm-evaluation-harness, which is not installed: pip install 'linearard[eval]'"
        )
