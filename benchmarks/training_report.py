"""The table and the picture of runs of benchmarks/training.py: every setting with its seeds, side by side.

    python benchmarks/training_report.py training.jsonl [--picture FILE.png]

Prints Markdown: means and standard deviations over seeds. "Closed" is the share of the distance from the run named by
--scaled (untrained) to the teacher, in negative log-likelihood; tasks are also in percent of the teacher's accuracy.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

LENGTHS = (1, 4, 8, 16, 32, 64)
STAGES = {"ard": "ARD", "longred": "LongReD", "cpt": "CPT"}
Runs = dict[tuple[str, str], list[dict[str, Any]]]


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


def table(runs: Runs, teacher: dict[str, Any], scaled: dict[str, Any]) -> str:
    """Markdown."""
    heads = ["", "tokens", "seeds", "last words, closed", "perplexity, closed", "last 2K of 32K",
             "tasks, of the teacher's", "passkey", "training"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for (name, stage), group in runs.items():

        def values(field: str, group: list[dict[str, Any]] = group) -> list[float]:
            return [run[field] for run in group if field in run]

        def closed(field: str) -> str:
            if field not in scaled or field not in teacher:
                return ""
            distance = scaled[field] - teacher[field]
            found = [100 * (scaled[field] - value) / distance for value in values(field)]
            return f"{shown(found, '.1f')} %" if found else ""

        share = [100 * value / teacher["dev4"] for value in values("dev4")] if teacher.get("dev4") else []
        keys = [mean(group, f"k{length}") for length in LENGTHS]
        cells = [
            label(runs, name, stage),
            f"{group[0]['tokens'] / 1e6:.2f}M" if "tokens" in group[0] else "",
            str(len(group)),
            closed("lam"),
            closed("ppl"),
            shown(values("p32b"), ".1f"),
            f"{shown(share, '.1f')} %" if share else "",
            " ".join(f"{key:.2f}" for key in keys if key is not None),
            f"{shown(values('seconds'), '.0f')} s" if values("seconds") else "",
        ]
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
    print(table(runs, teacher, scaled))
    if options.picture is not None:
        draw(runs, teacher, options.picture)


if __name__ == "__main__":
    main()
