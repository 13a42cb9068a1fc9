"""A recipe with random weights and data: what its steps cost, where model and text are not at hand."""

import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from linearard.capture import disable_capture
from linearard.display import Display
from linearard.errors import UserError
from linearard.models import random_model
from linearard.recipe import Recipe
from linearard.report import environment, write_json
from linearard.restore import ProgressReport, peak_memory, release_memory
from linearard.rope import RopeScaling, scale_rope
from linearard.run_directory import check_output, prepare_output
from linearard.stage_trainer import StageTrainer
from linearard.stages import TITLES, WITH_TEACHER, Contexts, make_trainer, random_dataset, step_tokens
from linearard.teacher import merged
from linearard.training_config import DTYPES

RELATION_OPERATORS = frozenset(
    f"linearard::{relation}_kl_{direction}"
    for relation in ("layer_relation", "relation", "attention")
    for direction in ("forward", "backward")
)


@dataclass
class StageCost:
    """What a stage costs.

    step_seconds: median of the optimizer steps without the first (which allocates) and the last (which is profiled,
    without CUDA graphs), where there are three or more; tokens_per_second: from it; peak_memory_bytes: of the GPU, or
    of the process where there is none; relation_kl_share: of the relation operators, forward and backward, in the time
    in which the GPU ran kernels of the profiled step (that all operators took on the CPU without a GPU).
    """

    steps: int
    step_seconds: float
    tokens_per_second: float
    stage_seconds: float
    peak_memory_bytes: int
    trained_parameters: int
    relation_kl_share: float


class StepTimes(TrainerCallback):
    """Times optimizer steps and profiles the last one."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.seconds: list[float] = []
        self.share = 0.0
        self._trainer = trainer
        self._steps = trainer.args.max_steps
        self._begin = 0.0
        self._profile: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock, and the profiler at the last step."""
        if state.global_step == self._steps - 1 and self._profile is None:
            self._trainer.stop_graphs()
            on_gpu = args.device.type == "cuda"
            self._profile = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
            self._profile.__enter__()
        _synchronize(args.device)
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop both."""
        _synchronize(args.device)
        self.seconds.append(time.perf_counter() - self._begin)
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            self.share = relation_share(self._profile.events(), args.device.type == "cuda")

    @property
    def median(self) -> float:
        """The step time in seconds."""
        return statistics.median(self.seconds[1:-1] or self.seconds)


def relation_share(events: Any, on_gpu: bool) -> float:
    """The share of the relation operators in the events of a profile, each moment counted once.

    On a GPU its own events count, not the operators that launched them: those hold the same time again.
    """
    if on_gpu:
        own = [event for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation]
        everything = _occupied(own)
        relations = _occupied([event for event in own if "linearard::" in event.key])
    else:
        everything = sum(event.self_cpu_time_total for event in events)
        relations = sum(event.cpu_time_total for event in events if _is_outermost_relation(event))
    return relations / everything if everything else 0.0


def _occupied(events: list[Any]) -> float:
    """Microseconds in which at least one of the events went on: kernels begin while the one ahead of them ends."""
    total, end = 0.0, -math.inf
    for begin, stop in sorted((event.time_range.start, event.time_range.end) for event in events):
        total += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return total


def _is_outermost_relation(event: Any) -> bool:
    """Whether the event is a relation operator that no other one has called, as autograd's does."""
    if event.key not in RELATION_OPERATORS:
        return False
    caller = event.cpu_parent
    while caller is not None and caller.key not in RELATION_OPERATORS:
        caller = caller.cpu_parent
    return caller is None


def measure(recipe: Recipe, display: Display) -> dict[str, StageCost]:
    """Run every stage of `recipe` with random weights and data; writes metrics.json into its output directory."""
    run = recipe.run
    if run.resume_from_checkpoint:
        raise UserError("random_weights measures every step anew: there is nothing to resume")
    check_output(recipe)
    display.say(f"Random weights: {run.model}")
    torch.manual_seed(run.seed)
    architecture = dict(run.architecture) if isinstance(run.architecture, dict) else None
    with run.device:  # billions of random numbers take a CPU minutes
        model = random_model(run.model, architecture, dtype=DTYPES[run.model_dtype])
    config = model.config.get_text_config(decoder=True)
    contexts = Contexts.of(config, recipe)
    contexts.check(recipe)
    config.max_position_embeddings = contexts.native
    if run.process_index == 0:
        prepare_output(recipe)
    if not recipe.stages or recipe.stages[0] not in WITH_TEACHER:
        scale_rope(model, RopeScaling.parse(run.scaling))
    costs = {}
    for name in recipe.stages:
        stage = recipe.stage(name)
        trainer = make_trainer(recipe, name, model, random_dataset(stage, config.vocab_size, contexts))
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        times = StepTimes(trainer)
        trainer.add_callback(times)
        trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.device)
        begin = time.perf_counter()
        with display.progress(TITLES[name], stage.max_steps) as progress:
            trainer.add_callback(ProgressReport(progress))
            trainer.train()
        seconds = time.perf_counter() - begin
        costs[name] = StageCost(
            steps=stage.max_steps,
            step_seconds=times.median,
            tokens_per_second=step_tokens(stage) / times.median,
            stage_seconds=seconds,
            peak_memory_bytes=peak_memory(run.device),
            trained_parameters=trained,
            relation_kl_share=times.share,
        )
        model = merged(trainer.model)
        disable_capture(model)
        del trainer
        release_memory()
    if run.process_index == 0:
        _write(costs, recipe, recipe.output / "metrics.json")
    return costs


def trial_table(costs: dict[str, StageCost], recipe: Recipe) -> Table:
    """The costs of the stages side by side."""
    table = Table(title=f"{recipe.run.model}, random weights, RoPE {recipe.run.scaling}")
    for name in ("", "step", "tokens a second", "peak memory", "relation KL"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, cost in costs.items():
        table.add_row(
            TITLES[name],
            f"{cost.step_seconds:.3f} s",
            f"{cost.tokens_per_second:,.0f}",
            f"{cost.peak_memory_bytes / 2**30:.1f} GiB",
            f"{100 * cost.relation_kl_share:.1f} %",
        )
    return table


def _write(costs: dict[str, StageCost], recipe: Recipe, path: Path) -> None:
    write_json(
        {
            "model": recipe.run.model,
            "random_weights": True,
            "scaling": recipe.run.scaling,
            "stages": {name: asdict(cost) for name, cost in costs.items()},
            "environment": environment(recipe.run.device),
        },
        path,
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
