"""What the comparison leaves behind: lines on the terminal, CSV, JSON and two pictures."""

from __future__ import annotations

import csv
import datetime
import json
import platform
import re
import subprocess
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

import linearard
from linearard.benchmark.measure import Result
from linearard.benchmark.peers import PEERS

# Okabe and Ito's colours, which everybody can tell apart.
COLOURS = {
    "linearard": "#D55E00",
    "naive": "#000000",
    "chunks": "#56B4E9",
    "compiled_chunks": "#0072B2",
    "cudnn": "#009E73",
    "flash": "#CC79A7",
    "cpu_attention": "#009E73",
}
HEADING = f"{'peer':<26} {'shape':<20} {'best ms':>10} {'median ms':>10} {'MiB':>9} {'TFLOP/s':>8} {'of G':>5} "
HEADING += f"{'grad err':>9} {'kl err':>9}"


def _first_line(command: list[str]) -> str:
    """First line that a program prints; empty where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(done.stdout.splitlines()), "")


def commit_of_package() -> str:
    """The commit that this package belongs to, -dirty with local changes; "unknown" outside of a checkout."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    if not _first_line([*git, "ls-files", here.name]):
        return "unknown"
    head = _first_line([*git, "rev-parse", "--short=12", "HEAD"])
    changed = _first_line([*git, "status", "--porcelain", "--", ":/python", ":/src", ":/cuda", ":/include", ":/cmake"])
    return f"{head}-dirty" if changed else head


def context(device: torch.device, dtype: torch.dtype, error_tokens: int, commit: str, g: tuple[str, float]) -> dict:
    """What a number needs beside it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    driver = _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return {
        "device": name,
        "driver": driver if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "linearard": linearard.__version__,
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "dtype": str(dtype).removeprefix("torch."),
        "error_tokens": error_tokens,
        "g": g[0],
        "g_tflops": g[1] * 1e-12,
    }


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def file_stem(device_name: str, kind: str = "peers") -> str:
    """NVIDIA H200 -> peers-nvidia-h200."""
    return f"{kind}-" + re.sub(r"[^a-z0-9]+", "-", device_name.lower().replace("(r)", "")).strip("-")


def _shape_name(result: Result) -> str:
    return "x".join(map(str, result.shape))


def line(result: Result) -> str:
    """One line of the table on the terminal."""
    start = f"{PEERS[result.peer].label:<26} {_shape_name(result):<20} "
    if result.skipped:
        return start + f"skipped: {result.skipped}"

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return start + (
        f"{number(result.best_ms, '.3f'):>10} {number(result.median_ms, '.3f'):>10} "
        f"{number(result.extra_mib, '.1f'):>9} {number(result.tflops, '.1f'):>8} "
        f"{number(result.fraction_of_g, '.2f'):>5} {number(result.gradient_error, '.1e'):>9} "
        f"{number(result.kl_error, '.1e'):>9}"
    )


def write_numbers(results: list[Result], about: dict[str, Any], output_dir: Path) -> list[Path]:
    """CSV and JSON; returns their names."""
    stem = output_dir / file_stem(about["device"])
    names = ["peer", "B", "H", "N", "D", *(field.name for field in fields(Result)[2:])]
    table, data = stem.with_suffix(".csv"), stem.with_suffix(".json")
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "dtype", "commit"])
        for result in results:
            values = [getattr(result, name) for name in names[5:]]
            values = [format(value, ".5g") if isinstance(value, float) else value for value in values]
            writer.writerow([result.peer, *result.shape, *values, about["dtype"], about["commit"]])
    content = {"context": about, "results": [asdict(result) for result in results]}
    data.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return [table, data]


def write_pictures(results: list[Result], about: dict[str, Any], output_dir: Path) -> list[Path]:
    """Time and memory against N; none without matplotlib, no memory where none was measured."""
    stem = output_dir / file_stem(about["device"])
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    written = []
    for attribute, label, suffix in (
        ("median_ms", "forward + backward, ms", "time"),
        ("extra_mib", "peak memory beyond inputs and gradient, MiB", "memory"),
    ):
        usable = [result for result in results if (getattr(result, attribute) or 0) > 0]
        problems = list(dict.fromkeys((r.shape[0], r.shape[1], r.shape[3]) for r in usable))
        if not problems:
            continue
        figure = Figure(figsize=(1.0 + 4.6 * len(problems), 4.4), layout="constrained")
        panels = figure.subplots(1, len(problems), squeeze=False)[0]
        for axes, problem in zip(panels, problems, strict=True):
            here = [r for r in usable if (r.shape[0], r.shape[1], r.shape[3]) == problem]
            _draw(axes, here, attribute)
            axes.set_title("B = {}, H = {}, D = {}".format(*problem), fontsize=11)
        panels[0].set_ylabel(label)
        panels[0].legend(frameon=False, fontsize=9)
        figure.suptitle(
            f"Relation KL, {about['dtype']}, {about['device']}, torch {about['torch']}, {about['date'][:10]}",
            fontsize=10,
        )
        path = stem.with_name(f"{stem.name}-{suffix}.png")
        figure.savefig(path, dpi=150)
        written.append(path)
    return written


def _draw(axes: Any, results: list[Result], attribute: str) -> None:
    """One line per peer over N, both axes logarithmic; N as it is written, not as a power of ten."""
    for peer in dict.fromkeys(result.peer for result in results):
        points = sorted((r.shape[2], getattr(r, attribute)) for r in results if r.peer == peer)
        ours = peer == "linearard"
        axes.plot(
            *zip(*points, strict=True),
            marker="o",
            markersize=5 if ours else 3.5,
            linewidth=2.4 if ours else 1.4,
            color=COLOURS[peer],
            label=PEERS[peer].label,
            zorder=3 if ours else 2,
        )
    lengths = sorted({result.shape[2] for result in results})
    axes.set(xscale="log", yscale="log", xlabel="tokens N")
    axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
