"""`linearard restore`: scale the RoPE of a model, measure the damage, train it stage by stage, measure again, save."""

import gc
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from linearard.capture import capture_states, disable_capture, enable_capture
from linearard.display import Display
from linearard.evaluation import Evaluation, EvaluationData, States, damage_undone, evaluate_model, evaluation_batches
from linearard.models import check_tokenizer, load_config, load_model, load_tokenizer, make_readable, make_saveable
from linearard.recipe import Recipe
from linearard.rope import RopeScaling, check_length, restore_float32_rope, scale_rope
from linearard.run_directory import RunProgress, StageResult, check_output, checkpoint_of, is_empty, prepare_output
from linearard.stage_trainer import StageTrainer
from linearard.stages import TITLES, WITH_TEACHER, Contexts, make_trainer, stage_dataset, step_tokens
from linearard.teacher import merged
from linearard.training_config import DTYPES, ARDConfig


@dataclass
class Restoration:
    """What a run measured: the model before, after its scaling and after each stage; the loss by step, the cost."""

    teacher: Evaluation
    scaled: Evaluation
    stages: dict[str, StageResult]
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0

    @property
    def restored(self) -> Evaluation:
        """The model that was saved."""
        return list(self.stages.values())[-1].evaluation if self.stages else self.scaled

    @property
    def tokens(self) -> int:
        """Training tokens of all stages."""
        return sum(stage.tokens for stage in self.stages.values())

    @property
    def undone(self) -> float | None:
        """The share of the damage to the log perplexity that was undone."""
        return damage_undone(self.teacher.perplexity, self.scaled.perplexity, self.restored.perplexity)

    @property
    def last_word_undone(self) -> float | None:
        """The same for the last words."""
        return damage_undone(
            self.teacher.last_word_perplexity, self.scaled.last_word_perplexity, self.restored.last_word_perplexity
        )


def restore(recipe: Recipe, display: Display) -> Restoration | None:
    """Run the stages of a recipe and write the model into its output directory.

    Returns the measurements, or None on the processes of a distributed run that do not report. Raises UserError for
    settings, files or models that cannot be used, and for a training that diverges.
    """
    check_output(recipe)
    resumes = bool(recipe.run.resume_from_checkpoint)
    begins = not resumes or is_empty(recipe.output)  # a checkpoint of another run may begin one
    progress = RunProgress.load(recipe) if resumes else RunProgress.begin(recipe)
    clock = Clock(progress.seconds)
    with clock.measure("load"):
        session = _Session.load(recipe, progress, display, clock)
    if session.reports and begins:
        prepare_output(recipe)
    session.start()
    for name in session.unfinished:
        session.run_stage(name)
    if not session.reports:
        return None
    if not recipe.stages:
        session.save(recipe.output / "model", final=True)
    assert progress.teacher is not None
    assert progress.scaled is not None
    return Restoration(
        teacher=progress.teacher,
        scaled=progress.scaled,
        stages=progress.stages,
        seconds=clock.finish(),
        peak_memory=peak_memory(recipe.run.device),
    )


@dataclass
class _Session:
    """The model on its way through the stages of a run."""

    recipe: Recipe
    progress: RunProgress
    display: Display
    clock: "Clock"
    tokenizer: PreTrainedTokenizerBase
    data: EvaluationData
    datasets: dict[str, Dataset]
    model: PreTrainedModel
    trainer: StageTrainer | None = None

    @classmethod
    def load(cls, recipe: Recipe, progress: RunProgress, display: Display, clock: "Clock") -> "_Session":
        """Load and check everything that the run needs, before any of its work."""
        run = recipe.run
        display.say(f"Loading {run.model}")
        tokenizer = load_tokenizer(run.model, trust_remote_code=run.trust_remote_code)
        contexts = Contexts.of(load_config(run.model, trust_remote_code=run.trust_remote_code), recipe)
        contexts.check(recipe)
        check_length(run.heldout_length, contexts.scaled, "heldout_length")
        finished = progress.finished(recipe)
        saved = progress.model_of(recipe, finished[-1]) if finished else None
        trusted = run.trust_remote_code
        model = load_native(run) if saved is None else load_model(str(saved), trust_remote_code=trusted)
        check_tokenizer(tokenizer, model)
        data = EvaluationData.load(run, tokenizer)
        datasets = {
            name: stage_dataset(recipe.stage(name), tokenizer, contexts)
            for name in recipe.stages
            if name not in finished
        }
        session = cls(recipe, progress, display, clock, tokenizer, data, datasets, model)
        if not finished and recipe.stages and recipe.stages[0] in WITH_TEACHER:
            session.trainer = session.make_trainer(recipe.stages[0])
        return session

    @property
    def unfinished(self) -> list[str]:
        """The stages that are left."""
        return list(self.datasets)

    @property
    def reports(self) -> bool:
        """Whether this process measures and writes."""
        return self.recipe.run.process_index == 0

    def make_trainer(self, name: str) -> StageTrainer:
        """The trainer of a stage, for the model as it is now."""
        trainer = make_trainer(self.recipe, name, self.model, self.datasets[name])
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.watch.warn = self.display.say
        return trainer

    def start(self) -> None:
        """Scale the model, unless its first stage does or has done so, and measure teacher and scaled model."""
        finished = self.progress.finished(self.recipe)
        if self.trainer is None and not finished:
            self.model.to(self.recipe.run.device)
            if self.reports and self.progress.teacher is None:
                self.progress.teacher = self.evaluate("Teacher", self.model, None)
            scale_rope(self.model, RopeScaling.parse(self.recipe.run.scaling))
            enable_capture(self.model)
        if not self.reports or self.progress.scaled is not None:
            return
        if self.trainer is not None:
            with self.trainer.teacher.active() as teacher:
                self.progress.teacher = self.evaluate("Teacher", teacher, None)
            self.progress.scaled = self.evaluate("Scaled model", self.trainer.model, self.trainer.teacher.states)
        else:
            self.progress.scaled = self.evaluate_with_native("Scaled model")
        self.progress.seconds = self.clock.finish()
        self.progress.save()

    def run_stage(self, name: str) -> None:
        """Train one stage, measure and save what comes out of it."""
        trainer = self.trainer or self.make_trainer(name)
        trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
        config = self.recipe.stage(name)
        trainer.accelerator.wait_for_everyone()
        begin = time.perf_counter()
        with self.clock.measure("train"), self.display.progress(TITLES[name], config.max_steps) as progress:
            if self.reports:
                trainer.add_callback(ProgressReport(progress))
            trainer.train(resume_from_checkpoint=checkpoint_of(self.recipe, name, self.unfinished[0]))
        seconds = time.perf_counter() - begin + trainer.seconds_before
        self.clock.add("train", trainer.seconds_before)
        # Mixed precision was for training: the evaluations before it were in float32, too.
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        title = "Restored model" if name == self.recipe.stages[-1] else f"After {TITLES[name]}"
        evaluation = None
        if self.reports and name in WITH_TEACHER:
            evaluation = self.evaluate(title, trainer.model, trainer.teacher.states)
        self.model = merged(trainer.model)
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        del trainer
        self.trainer = None  # with its optimizer and its teacher
        release_memory()
        if self.reports:
            evaluation = evaluation or self.evaluate_with_native(title)
            self.save(self.progress.model_of(self.recipe, name), final=name == self.recipe.stages[-1])
            tokens = config.max_steps * step_tokens(config)
            self.progress.stages[name] = StageResult(evaluation, config.max_steps, tokens, trained, seconds, log)
            self.progress.seconds = self.clock.finish()
            self.progress.save()
        enable_capture(self.model)

    def save(self, target: Path, final: bool) -> None:
        """Save the model: in the dtype it was loaded in if it is the result, else in float32 for the next stage."""
        with self.clock.measure("save"):
            save_model(
                self.model, self.tokenizer, target, DTYPES[self.recipe.run.model_dtype] if final else torch.float32
            )

    def evaluate(self, name: str, model: torch.nn.Module, teacher: States | None) -> Evaluation:
        """Measure a model, and how far its relations are from the teacher's."""
        batches = evaluation_batches(self.data, teacher is not None)
        with self.clock.measure("evaluate"), self.display.progress(name, batches) as bar:
            return evaluate_model(model, self.tokenizer, self.data, teacher, bar.advance)

    def evaluate_with_native(self, name: str) -> Evaluation:
        """Measure the model beside its native version, which is loaded for this alone."""
        native = load_native(self.recipe.run).to(self.recipe.run.device)
        enable_capture(native)
        enable_capture(self.model)
        evaluation = self.evaluate(name, self.model, partial(capture_states, native))
        del native
        release_memory()
        return evaluation


def load_native(run: ARDConfig) -> PreTrainedModel:
    """The model of a run with its native RoPE; its context as the run says."""
    model = load_model(run.model, dtype=DTYPES[run.model_dtype], trust_remote_code=run.trust_remote_code)
    make_saveable(model)
    if run.native_context is not None:
        model.config.get_text_config(decoder=True).max_position_embeddings = run.native_context
    return model


def release_memory() -> None:
    """Give back what a finished stage has held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path, dtype: torch.dtype) -> None:
    """Save model and tokenizer for plain transformers; the directory appears under its name only when complete."""
    disable_capture(model)
    model.to(dtype)
    restore_float32_rope(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target.parent))
    try:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        make_readable(staging)
        if target.exists():  # of the run that was resumed
            shutil.rmtree(target)
        os.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def peak_memory(device: torch.device) -> int:
    """The most memory in use so far, in bytes: of the GPU, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Clock:
    """Seconds by phase; earlier: what `finish` said before the run was resumed."""

    def __init__(self, earlier: Mapping[str, float]) -> None:
        self._start = time.perf_counter()
        self._seconds = {phase: seconds for phase, seconds in earlier.items() if phase != "total"}
        self._before = earlier.get("total", 0.0)

    def add(self, phase: str, seconds: float) -> None:
        """Add time that has passed before this clock was started."""
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
        self._before += seconds

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Add the time of the body to a phase."""
        begin = time.perf_counter()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - begin

    def finish(self) -> dict[str, float]:
        """The phases and their total, which includes what was not measured."""
        return {**self._seconds, "total": self._before + time.perf_counter() - self._start}


class ProgressReport(TrainerCallback):
    """Shows steps and loss of a training run on a progress bar."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show the newest loss."""
        if logs and "loss" in logs:
            self._progress.note(f"loss {logs['loss']:.4f}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move on to the step that was finished."""
        self._progress.reach(state.global_step)
