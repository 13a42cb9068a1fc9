"""The tables and the picture of runs of benchmarks/training.py: every setting with its seeds, side by side.

    python benchmarks/training_report.py training.jsonl [--picture FILE.png]

Prints Markdown: means and standard deviations over seeds. "Closed" is the share of the distance from the run named by
--scaled (untrained) to the teacher, in negative log-likelihood; tasks are also in percent of the teacher's accuracy.
Runs that are named by their steps ("NAME, 64 steps") are a second table: a row for each NAME, a column for the tokens.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

LENGTHS = (1, 4, 8, 16, 32, 64)
STAGES = {"ard": "ARD", "longred": "LongReD", "cpt": "CPT"}
Runs = dict[tuple[str, str], list[dict[str, Any]]]
_STEPS = re.compile(r"(.*), [\d,]+ steps")


def read(files: list[Path]) -> Runs:
    """Lines of runs by name and stage, in the order in which a name was first seen."""
    runs: Runs = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            run = json.loads(line)
            runs.setdefault((run["name"], run["stage"]), []).append(run)
    names = list(dict.fromkeys(name for name, _ in runs))
    return dict(sorted(runs.items(), key=lambda item: names.index(item[0][0])))


def label(runs: Runs, name: str, stage: str) -> str:
    """What a row is called: the stage is part of it where a run has several."""
    return f"{name}: after {STAGES[stage]}" if sum(other == name for other, _ in runs) > 1 else name


def mean(runs: list[dict[str, Any]], field: str) -> float | None:
    """Over the seeds; None where it was not measured."""
    values = [run[field] for run in runs if field in run]
    return statistics.mean(values) if values else None


def shown(values: list[float], form: str) -> str:
    """Mean, and standard deviation of several seeds."""
    if not values:
        return ""
    text = format(statistics.mean(values), form)
    return f"{text} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else text


class Scores:
    """What runs of one name reached, as text, beside the teacher and the scaled model."""

    def __init__(self, teacher: dict[str, Any], scaled: dict[str, Any]) -> None:
        self._teacher, self._scaled = teacher, scaled

    def closed(self, group: list[dict[str, Any]], field: str) -> str:
        """The share of the distance to the teacher, in percent; nothing where it was not measured."""
        if field not in self._scaled or field not in self._teacher:
            return ""
        distance = self._scaled[field] - self._teacher[field]
        return shown([100 * (self._scaled[field] - value) / distance for value in values(group, field)], ".1f")

    def tasks(self, group: list[dict[str, Any]]) -> str:
        """Their mean accuracy, in percent of the teacher's."""
        if not self._teacher.get("dev4"):
            return ""
        return shown([100 * value / self._teacher["dev4"] for value in values(group, "dev4")], ".1f")


def values(group: list[dict[str, Any]], field: str) -> list[float]:
    """Of the runs that have it."""
    return [run[field] for run in group if field in run]


def passkeys(group: list[dict[str, Any]]) -> str:
    """The shares found, by length."""
    keys = [mean(group, f"k{length}") for length in LENGTHS]
    return " ".join(f"{key:.2f}" for key in keys if key is not None)


def percent(text: str) -> str:
    """With its sign, where there is a number."""
    return f"{text} %" if text else ""


def by_name(runs: Runs) -> Runs:
    """The runs of the first table."""
    return {key: group for key, group in runs.items() if not _STEPS.fullmatch(key[0]) and key[1] != "cost"}


def table(runs: Runs, scores: Scores) -> str:
    """Markdown: a row for each name."""
    heads = ["", "tokens", "seeds", "last words, closed", "perplexity, closed", "last 2K of 32K",
             "tasks, of the teacher's", "passkey", "training"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for (name, stage), group in runs.items():
        seconds = shown(values(group, "seconds"), ".0f")
        cells = [
            label(runs, name, stage),
            f"{group[0]['tokens'] / 1e6:.2f}M" if "tokens" in group[0] else "",
            str(len(group)),
            percent(scores.closed(group, "lam")),
            percent(scores.closed(group, "ppl")),
            shown(values(group, "p32b"), ".1f"),
            percent(scores.tasks(group)),
            passkeys(group),
            f"{seconds} s" if seconds else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_by_tokens(runs: Runs, scores: Scores) -> str:
    """Markdown: a row for each name without its steps, and a column for each number of tokens; "" without such runs.

    A cell has last words and perplexity, closed, in percent; the perplexity of the last 2K of 32K; and the tasks, in
    percent of the teacher's. The passkey is that of the most tokens with which it was scored.
    """
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for (name, stage), group in runs.items():
        found = _STEPS.fullmatch(name)
        if found and stage != "cost":
            rows.setdefault(found[1], {})[f"{group[0]['tokens'] / 1e6:.2f}M"] = group
    columns = sorted({tokens for row in rows.values() for tokens in row})
    if not rows:
        return ""
    heads = ["", "ms a step", "GiB", *columns, "passkey"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, row in rows.items():
        cost = runs.get((name, "cost"), [])
        cells = [name, shown([1000 * value for value in values(cost, "step_seconds")], ".0f"),
                 shown(values(cost, "peak"), ".1f")]  # fmt: skip
        for tokens in columns:
            group = row.get(tokens, [])
            parts = (scores.closed(group, "lam"), scores.closed(group, "ppl"), shown(values(group, "p32b"), ".1f"),
                     scores.tasks(group))  # fmt: skip
            cells.append(" / ".join(part for part in parts if part))
        cells.append(next(filter(None, (passkeys(row[tokens]) for tokens in sorted(row, reverse=True))), ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(runs: Runs, teacher: dict[str, Any], path: Path) -> None:
    """Short texts (tasks in percent of the teacher's) beside retrieval (passkey by length)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    wanted = {key: group for key, group in runs.items() if mean(group, "dev4") is not None}
    labels = [label(runs, name, stage) for name, stage in wanted]
    figure, (short, retrieval) = pyplot.subplots(
        1, 2, figsize=(12, 1.2 + 0.32 * len(labels)), sharey=True, layout="constrained"
    )
    for place, group in enumerate(wanted.values()):
        shares = [100 * run["dev4"] / teacher["dev4"] for run in group if "dev4" in run]
        spread = statistics.stdev(shares) if len(shares) > 1 else 0.0
        short.barh(place, statistics.mean(shares), xerr=spread, color="#D55E00", height=0.7)
    short.axvline(100, color="black", linewidth=1)
    short.set_xlim(left=60)
    short.set_yticks(range(len(labels)), labels)
    short.invert_yaxis()
    short.set_xlabel("accuracy on short tasks, % of the teacher's")
    keys = [[mean(group, f"k{length}") for length in LENGTHS] for group in wanted.values()]
    grid = [[float("nan") if key is None else key for key in row] for row in keys]
    retrieval.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for row, values in enumerate(keys):
        for column, key in enumerate(values):
            if key is not None:
                colour = "black" if key > 0.6 else "white"
                retrieval.text(column, row, f"{key:.2f}", ha="center", va="center", color=colour, fontsize=8)
    retrieval.set_xticks(range(len(LENGTHS)), [f"{length}K" for length in LENGTHS])
    retrieval.set_xlabel("passkey found, by tokens of context")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="outputs of benchmarks/training.py")
    parser.add_argument("--scaled", default="PI x4 untrained", help="name of the run from which distances are measured")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    runs = read(options.files)
    for needed in (("teacher", "teacher"), (options.scaled, "untrained")):
        if needed not in runs:
            parser.error(f"no run {needed[0]!r} ({needed[1]}) to compare with")
    teacher, scaled = runs["teacher", "teacher"][0], runs[options.scaled, "untrained"][0]
    named, scores = by_name(runs), Scores(teacher, scaled)
    print(table(named, scores), table_by_tokens(runs, scores), sep="\n\n")
    if options.picture is not None:
        draw(named, teacher, options.picture)


if __name__ == "__main__":
    main()
