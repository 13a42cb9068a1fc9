"""The report as a picture: recovery per short task as bars, and accuracy by length and depth as heat maps."""

from pathlib import Path
from typing import Any

from linearard.report import atomically
from linearard.suite.figures import ACCURACY, Figure, tokens_text
from linearard.suite.report import Row, rows_of
from linearard.suite.run import Results

# Okabe and Ito's colours, which everybody can tell apart.
_COLOURS = ("#8C8C8C", "#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#F0E442")


def write_evaluation_picture(results: Results, path: Path) -> bool:
    """Bars above, one heat map for each model below, as far as there is something to show; False if there is nothing
    or matplotlib is missing.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")  # files only: no display is needed
    from matplotlib import pyplot

    bars = [row for row in rows_of(results) if _is_bar(row)]
    maps = {label: found for label, figures in results.figures.items() if (found := _heat_map_figures(figures))}
    if not bars and not maps:
        return False
    cells = max((len({_line(f) for f in found}) for found in maps.values()), default=0)
    heights = [4.0] * bool(bars) + [1.2 + 0.3 * cells] * bool(maps)
    width = max(1.4 * len(bars) + 3, 1.5 + 3.6 * len(maps), 7)
    figure = pyplot.figure(figsize=(width, sum(heights)), layout="constrained")
    panels = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if bars:
        _draw_bars(panels.pop(0).subplots(), bars, results)
    if maps:
        _draw_maps(panels.pop(0), maps)
    with atomically(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    pyplot.close(figure)
    return True


def _is_bar(row: Row) -> bool:
    first = next((figures[0] for figures in row.figures.values()), None)
    return first is not None and (first.length is None or first.metric != ACCURACY) and not first.variant


def _draw_bars(axes: Any, rows: list[Row], results: Results) -> None:
    """Recovery in percent where there is a teacher, else the accuracies themselves."""
    labels = (
        [label for label in results.figures if label != results.teacher] if results.teacher else list(results.figures)
    )
    if not results.teacher:
        rows = [row for row in rows if row.metric == ACCURACY]
    thickness = 0.8 / max(len(labels), 1)
    for number, label in enumerate(labels):
        shown = [
            row.recovery(label, results.teacher, results.scaled) if results.teacher else row.estimate(label)
            for row in rows
        ]
        places = [place for place, estimate in enumerate(shown) if estimate]
        found = [estimate for estimate in shown if estimate]
        axes.bar(
            [place + (number - (len(labels) - 1) / 2) * thickness for place in places],
            [100 * estimate.value for estimate in found],
            yerr=[100 * estimate.error for estimate in found],
            width=thickness,
            color=_COLOURS[(number + bool(results.teacher)) % len(_COLOURS)],
            label=label,
            capsize=2,
        )
    if results.teacher:
        axes.axhline(100, color=_COLOURS[0], linewidth=1, linestyle="--", label=results.teacher)
    axes.set_xticks(range(len(rows)), [_bar_name(row.name) for row in rows], fontsize=8)
    axes.set(
        title="Recovery" if results.teacher else "Accuracy",
        ylabel="% of the teacher, or of the gap" if results.teacher else "%",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _draw_maps(panel: Any, maps: dict[str, list[Figure]]) -> None:
    lines = list(dict.fromkeys(_line(figure) for figures in maps.values() for figure in figures))
    lengths = sorted({figure.length or 0 for figures in maps.values() for figure in figures})
    image = None
    for axes, (label, figures) in zip(panel.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        values = [[float("nan")] * len(lengths) for _ in lines]
        for figure in figures:
            values[lines.index(_line(figure))][lengths.index(figure.length or 0)] = figure.estimate.value
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                if value == value:  # measured
                    colour = "white" if value < 0.6 else "black"
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(len(lengths)), [tokens_text(length) for length in lengths])
        axes.set_yticks(range(len(lines)), lines if axes is panel.axes[0] else [""] * len(lines), fontsize=8)
        axes.set(title=label, xlabel="tokens")
    panel.colorbar(image, ax=panel.axes, label="accuracy")


def _heat_map_figures(figures: list[Figure]) -> list[Figure]:
    return [figure for figure in figures if figure.metric == ACCURACY and figure.length is not None]


def _line(figure: Figure) -> str:
    return figure.task if figure.depth is None else f"{figure.task}, depth {figure.depth:g} %"


def _bar_name(name: str) -> str:
    return name.replace(", ", "\n").replace("negative log-likelihood", "nll").replace(" at ", "\nat ")
