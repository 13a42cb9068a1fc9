"""The report of `linearard evaluate`: JSON with every value, Markdown, and the rows that both and the picture show."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from linearard.report import atomically, environment, write_json
from linearard.suite.figures import (
    ACCURACY,
    NLL,
    Estimate,
    Figure,
    gap_closed,
    mean_of_tasks,
    pooled,
    share_of_teacher,
)
from linearard.suite.run import Results


@dataclass(frozen=True)
class Row:
    """One measurement of all models: figures by label, one, or several tasks whose mean counts."""

    name: str
    metric: str
    figures: dict[str, list[Figure]]

    def estimate(self, label: str) -> Estimate | None:
        """The figure of a model, or None where it was not measured."""
        found = self.figures.get(label)
        return mean_of_tasks(found) if found else None

    def recovery(self, label: str, teacher: str | None, scaled: str | None) -> Estimate | None:
        """Accuracy as a share of the teacher's; log-likelihood as the share of the gap closed. None if undefined."""
        own, native, damaged = (self.figures.get(name or "") for name in (label, teacher, scaled))
        if not own or not native:
            return None
        if self.metric == ACCURACY:
            return share_of_teacher(own, native)
        return gap_closed(own[0], damaged[0], native[0]) if damaged else None


def rows_of(results: Results) -> list[Row]:
    """The rows of the report: short tasks, their mean, log-likelihoods, long-context tasks by length."""
    by_key: dict[tuple[object, ...], dict[str, Figure]] = {}
    for label, figures in results.figures.items():
        for figure in figures:
            by_key.setdefault(figure.key, {})[label] = figure
    rows: list[Row] = []
    groups: dict[str, dict[str, list[Figure]]] = {}  # the depths of a task and length
    for found in by_key.values():
        first = next(iter(found.values()))
        if first.depth is None:
            name = first.name + (", negative log-likelihood" if first.metric == NLL and first.length is None else "")
            rows.append(Row(name, first.metric, {label: [figure] for label, figure in found.items()}))
            continue
        name = pooled([first]).name + ", all depths"
        for label, figure in found.items():
            groups.setdefault(name, {}).setdefault(label, []).append(figure)
    for name, models in groups.items():
        rows.append(Row(name, ACCURACY, {label: [pooled(figures)] for label, figures in models.items()}))
    mean = short_task_mean(results)
    return [mean, *rows] if mean else rows


def short_task_mean(results: Results) -> Row | None:
    """The mean accuracy of the short tasks, by their main metrics; None where fewer than two tasks have one.

    A model that lacks one of the tasks has no mean.
    """
    main: dict[str, dict[str, Figure]] = {
        label: {f.task: f for f in figures if f.length is None and f.metric == ACCURACY and not f.variant}
        for label, figures in results.figures.items()
    }
    tasks = list(dict.fromkeys(task for found in main.values() for task in found))
    if len(tasks) < 2:
        return None
    complete = {label: [found[task] for task in tasks] for label, found in main.items() if len(found) == len(tasks)}
    return Row(f"mean of {len(tasks)} short tasks", ACCURACY, complete)


def write_report(results: Results, device: torch.device, directory: Path) -> None:
    """Write evaluation.json and evaluation.md into a directory that exists."""
    write_json(
        {
            "models": [
                {"label": label, "model": results.models[label], "figures": [_figure_json(f) for f in figures]}
                for label, figures in results.figures.items()
            ],
            "teacher": results.teacher,
            "scaled": results.scaled,
            "examples": results.examples,
            "rows": [_row_json(row, results) for row in rows_of(results)],
            "environment": environment(device),
        },
        directory / "evaluation.json",
    )
    with atomically(directory / "evaluation.md") as temporary:
        temporary.write_text(markdown(results), encoding="utf-8")


def markdown(results: Results) -> str:
    """Two tables: the figures with their standard errors, and what was recovered."""
    rows, labels = rows_of(results), list(results.figures)
    lines = [
        "# Evaluation",
        "",
        *(f"* {label}: `{model}`" for label, model in results.models.items()),
        "",
        "Value ± standard error. Accuracies in percent; negative log-likelihoods in nats, with the perplexity behind.",
        "",
        *_table(labels, rows, lambda row, label: _value_text(row, row.estimate(label))),
    ]
    if results.teacher:
        others = [label for label in labels if label != results.teacher]
        shown = [row for row in rows if any(row.recovery(label, results.teacher, results.scaled) for label in others)]
        gap = f" and the share of the gap from {results.scaled} to it that is closed" if results.scaled else ""
        lines += [
            "",
            "## Recovered",
            "",
            f"In percent of the accuracy of {results.teacher}{gap}; above 100 is more.",
            "",
        ]
        lines += _table(
            others, shown, lambda row, label: _share_text(row.recovery(label, results.teacher, results.scaled))
        )
    return "\n".join(lines) + "\n"


def _table(labels: Sequence[str], rows: Sequence[Row], cell: Callable[[Row, str], str]) -> list[str]:
    head = ["| |" + "".join(f" {label.replace('|', '/')} |" for label in labels), "|---|" + "---|" * len(labels)]
    return head + [f"| {row.name} |" + "".join(f" {cell(row, label)} |" for label in labels) for row in rows]


def _value_text(row: Row, estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    if row.metric == ACCURACY:
        return _share_text(estimate)
    error = "n/a" if math.isnan(estimate.error) else f"{estimate.error:.3f}"
    return f"{estimate.value:.3f} ± {error} ({_perplexity(estimate.value)})"


def _perplexity(nll: float) -> str:
    return f"{math.exp(nll):.1f}" if nll < 20 else "large"


def _share_text(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    error = "n/a" if math.isnan(estimate.error) else f"{100 * estimate.error:.1f}"
    return f"{100 * estimate.value:.1f} ± {error}"


def _figure_json(figure: Figure) -> dict[str, Any]:
    content = {name: value for name, value in asdict(figure).items() if value not in (None, "")}
    return {**content, "values": list(figure.values), **_estimate_json(figure.estimate)}


def _row_json(row: Row, results: Results) -> dict[str, Any]:
    def estimates(of: Callable[[str], Estimate | None]) -> dict[str, Any]:
        found = {label: of(label) for label in results.figures}
        return {label: _estimate_json(estimate) for label, estimate in found.items() if estimate}

    return {
        "name": row.name,
        "metric": row.metric,
        "estimates": estimates(row.estimate),
        "recovery": estimates(lambda label: row.recovery(label, results.teacher, results.scaled)),
    }


def _estimate_json(estimate: Estimate) -> dict[str, float | None]:
    # JSON has no NaN: the standard error of a single document is not known.
    return {"mean": estimate.value, "standard_error": None if math.isnan(estimate.error) else estimate.error}
