"""The results of a restoration as a table, a JSON file and a picture."""

import json
import os
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table

from linearard import __version__
from linearard.evaluation import Evaluation
from linearard.losses import RELATIONS
from linearard.restore import Restoration
from linearard.stages import TITLES
from linearard.suite.config import SuiteConfig
from linearard.training_config import ARDConfig

LABELS = {"query": "Q/Q", "key": "K/K", "value": "V/V", "attention": "Q/K attention map"}
# Okabe and Ito's colours, which everybody can tell apart.
COLOURS = {"query": "#0072B2", "key": "#E69F00", "value": "#009E73", "attention": "#CC79A7"}
GREY, DAMAGED, RESTORED = "#8C8C8C", "#D55E00", "#0072B2"


def results_table(result: Restoration, config: ARDConfig) -> Table:
    """Teacher, scaled and restored model side by side, and what the restoration cost."""
    seconds = result.seconds
    trained = ", ".join(
        f"{stage.tokens:,} tokens {TITLES[name]} of {stage.trained_parameters / 1e6:.1f}M weights"
        for name, stage in result.stages.items()
    )
    table = Table(
        title=f"{config.model}, RoPE {config.scaling}",
        caption=(
            f"{seconds['total']:.0f} s in all, training {seconds.get('train', 0):.0f} s\n"
            f"{trained or 'nothing trained'}\n"
            f"peak memory {result.peak_memory / 2**30:.1f} GiB"
        ),
    )
    table.add_column("", no_wrap=True)
    for name in ("teacher", "scaled", "restored", "undone"):
        table.add_column(name, justify="right")
    models = (result.teacher, result.scaled, result.restored)
    table.add_row("perplexity, held-out text", *(f"{model.perplexity:.1f}" for model in models), _share(result.undone))
    table.add_row(
        "last-word perplexity",
        *(f"{model.last_word_perplexity:.1f}" for model in models),
        _share(result.last_word_undone),
    )
    table.add_row("last-word accuracy", *(f"{100 * model.last_word_accuracy:.1f} %" for model in models), "")
    for relation in RELATIONS:
        values = (model.mean_relation_kl(relation) for model in models[1:])
        table.add_row(f"mean KL {LABELS[relation]}", "0", *(_number(value) for value in values), "")
    return table


def evaluation_table(name: str, evaluation: Evaluation) -> Table:
    """The measurements of one model."""
    table = Table(title=name)
    table.add_column("", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_row("perplexity, held-out text", f"{evaluation.perplexity:.2f}")
    table.add_row("last-word perplexity", f"{evaluation.last_word_perplexity:.2f}")
    table.add_row("last-word accuracy", f"{100 * evaluation.last_word_accuracy:.1f} %")
    for relation in evaluation.relation_kl:
        table.add_row(f"mean KL {LABELS[relation]}", _number(evaluation.mean_relation_kl(relation)))
    return table


def write_metrics(result: Restoration, config: ARDConfig, path: Path) -> None:
    """Everything measured, with the versions and the machine, as JSON."""
    write_json(
        {
            "model": config.model,
            "scaling": config.scaling,
            "relations": config.relations,
            "damage_undone": result.undone,
            "last_word_damage_undone": result.last_word_undone,
            **{name: asdict(getattr(result, name)) for name in ("teacher", "scaled", "restored")},
            "tokens": result.tokens,
            "stages": {name: asdict(stage) for name, stage in result.stages.items()},
            "seconds": result.seconds,
            "peak_memory_bytes": result.peak_memory,
            "environment": environment(config.device),
        },
        path,
    )


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware that a number needs beside it."""
    return {
        "linearard": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file; it appears under its name only when complete."""
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_evaluation(evaluation: Evaluation, config: SuiteConfig, path: Path) -> None:
    """The measurements of one model as JSON."""
    write_json({"model": config.model, "teacher": config.teacher, "dtype": config.dtype, **asdict(evaluation)}, path)


def write_picture(result: Restoration, config: ARDConfig, path: Path) -> bool:
    """Loss curve, damage before and after, relation KL by layer, as one PNG; False where matplotlib is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")  # files only: no display is needed
    from matplotlib import pyplot

    with pyplot.rc_context(
        {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"}
    ):
        figure, (loss, damage, layers) = pyplot.subplots(1, 3, figsize=(15, 4.6), width_ratios=(1, 1, 1.5))
        _draw_loss(loss, result)
        _draw_damage(damage, result)
        _draw_layers(layers, result)
        undone = f", {_share(result.undone)} of the damage undone" if result.undone is not None else ""
        figure.suptitle(f"{config.model}, RoPE {config.scaling}{undone}", fontsize=13)
        figure.tight_layout()
        with atomically(path) as temporary:
            figure.savefig(temporary, dpi=130, format="png")
        pyplot.close(figure)
    return True


def _draw_loss(axes: Any, result: Restoration) -> None:
    """The loss by step, of all stages one after the other; relations where the stage has them."""
    begin = 0
    for stage, measured in result.stages.items():
        log = measured.log
        steps = [begin + entry["step"] for entry in log]
        for relation in RELATIONS:
            if log and f"{relation}_kl" in log[0]:
                values = [entry[f"{relation}_kl"] for entry in log]
                axes.plot(steps, values, color=COLOURS[relation], linewidth=1.2, label=LABELS[relation])
        style = "-" if stage == "ard" else "--"
        label = f"{TITLES[stage]} loss"
        axes.plot(steps, [entry["loss"] for entry in log], color="black", linewidth=1.8, linestyle=style, label=label)
        begin += measured.steps
    axes.set(title="Training", xlabel="step", ylabel="loss, nats (ARD: per token and head)", yscale="log")
    axes.grid(alpha=0.25)
    if result.stages:
        axes.legend(frameon=False, fontsize=9, loc="upper right", ncols=2)
    axes.set_ylim(top=axes.get_ylim()[1] * 2)  # room for the legend


def _draw_damage(axes: Any, result: Restoration) -> None:
    models = (result.teacher, result.scaled, result.restored)
    positions = range(len(models))
    values = [model.perplexity for model in models]
    bars = axes.bar(positions, values, color=(GREY, DAMAGED, RESTORED), width=0.6)
    axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=2, fontweight="bold")
    axes.axhline(values[0], color=GREY, linewidth=1, linestyle="--")
    axes.set(title="Held-out perplexity (log scale)", yscale="log")
    axes.yaxis.set_visible(False)  # the bars carry their numbers
    axes.spines["left"].set_visible(False)
    axes.set_xticks(
        positions,
        [
            f"{name}\nlast word {100 * model.last_word_accuracy:.0f} %"
            for name, model in zip(("teacher", "scaled", "restored"), models, strict=True)
        ],
    )
    axes.set_ylim(min(values) / 1.6, max(values) * 1.5)


def _draw_layers(axes: Any, result: Restoration) -> None:
    for relation in RELATIONS:
        before, after = (model.relation_kl.get(relation) for model in (result.scaled, result.restored))
        if before and after:
            axes.plot(before, color=COLOURS[relation], linestyle=":", linewidth=1.5)
            axes.plot(after, color=COLOURS[relation], linewidth=1.8, label=LABELS[relation])
    axes.plot([], [], color="black", linestyle=":", label="scaled")
    axes.plot([], [], color="black", label="restored")
    axes.set(title="Distance from the teacher's relations", xlabel="layer", ylabel="KL, nats", yscale="log")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-4))  # the first layer's values do not depend on positions
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9, ncols=2)


class atomically:
    """The name of a temporary file beside `path` that takes its place when the body has succeeded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Path:
        handle, name = tempfile.mkstemp(prefix=f".{self._path.name}-", dir=self._path.parent)
        os.close(handle)
        self._temporary = Path(name)
        return self._temporary

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self._temporary.chmod(0o644)
            os.replace(self._temporary, self._path)
        else:
            self._temporary.unlink(missing_ok=True)


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
