"""`linearard restore`: scale the RoPE of a model, measure the damage, undo it by distillation, measure again, save."""

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks, is_tensorboard_available
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from linearard.capture import disable_capture
from linearard.config import DTYPES, ARDConfig, save_config
from linearard.data import Blocks, training_blocks
from linearard.display import Display
from linearard.errors import UserError
from linearard.evaluation import Evaluation, EvaluationData, damage_undone, evaluate_model, evaluation_batches
from linearard.models import check_tokenizer, load_model, load_tokenizer, make_readable
from linearard.trainer import ARDTrainer, checkpoints, merged

RUN_FILE = "run.yaml"
# All that a run writes into its directory besides checkpoints.
RESULTS = (RUN_FILE, "model", "metrics.json", "report.png", "runs")


@dataclass
class Restoration:
    """What a run measured: the three evaluations, the loss by step, its cost."""

    teacher: Evaluation
    scaled: Evaluation
    restored: Evaluation
    losses: list[dict[str, float]]
    tokens: int
    trained_parameters: int
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0

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


def restore(config: ARDConfig, display: Display) -> Restoration | None:
    """Run a restoration and write model, metrics and picture into `config.output_dir`.

    Returns the measurements, or None on the processes of a distributed run that do not report. Raises UserError for
    settings, files or models that cannot be used.
    """
    clock = Clock()
    output = Path(str(config.output_dir))
    checkpoint = check_output(config, output)
    with clock.measure("load"):
        display.say(f"Loading {config.model}")
        tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
        model = load_model(config.model, dtype=DTYPES[config.model_dtype], trust_remote_code=config.trust_remote_code)
        check_tokenizer(tokenizer, model)
        data = EvaluationData.load(config, tokenizer)
        blocks = load_blocks(config, tokenizer)
        trainer = ARDTrainer(model, config, train_dataset=blocks)
    if trainer.is_world_process_zero() and checkpoint is None:
        prepare_output(config, output)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    reports = trainer.is_world_process_zero()
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)

    before = evaluate_before(trainer, tokenizer, data, display, clock) if reports else None
    trainer.accelerator.wait_for_everyone()
    with clock.measure("train"), display.progress("Restoring", config.max_steps) as progress:
        if reports:
            trainer.add_callback(ProgressReport(progress))
        trainer.train(resume_from_checkpoint=checkpoint)
    # Mixed precision was for training: the evaluations before it were in float32, too.
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    if before is None:
        return None
    with clock.measure("evaluate"):
        restored = evaluate_stage("Restored model", trainer, tokenizer, data, display)
    with clock.measure("save"):
        save_model(merged(trainer.model), tokenizer, output / "model")
    return Restoration(
        teacher=before[0],
        scaled=before[1],
        restored=restored,
        losses=[entry for entry in trainer.state.log_history if "loss" in entry],
        tokens=config.max_steps * batch_size(config) * config.sequence_length,
        trained_parameters=trained,
        seconds=clock.finish(),
        peak_memory=peak_memory(config.device),
    )


def evaluate_before(
    trainer: ARDTrainer, tokenizer: PreTrainedTokenizerBase, data: EvaluationData, display: Display, clock: "Clock"
) -> tuple[Evaluation, Evaluation]:
    """The teacher (native RoPE) and the untrained student (scaled RoPE)."""
    with clock.measure("evaluate"):
        with trainer.teacher.active() as teacher, display.progress("Teacher", evaluation_batches(data, False)) as bar:
            native = evaluate_model(teacher, tokenizer, data, advance=bar.advance)
        return native, evaluate_stage("Scaled model", trainer, tokenizer, data, display)


def evaluate_stage(
    name: str, trainer: ARDTrainer, tokenizer: PreTrainedTokenizerBase, data: EvaluationData, display: Display
) -> Evaluation:
    """The student as it is now, and how far its relations are from the teacher's."""
    with display.progress(name, evaluation_batches(data, True)) as bar:
        return evaluate_model(trainer.model, tokenizer, data, trainer.teacher.states, bar.advance)


def check_output(config: ARDConfig, output: Path) -> str | None:
    """Refuse an output directory that cannot be used; returns the checkpoint to resume from, if any."""
    try:
        get_reporting_integration_callbacks(config.report_to)
    except ValueError as error:
        raise UserError(f"report_to: {error}") from error
    if config.report_to == ["tensorboard"] and not is_tensorboard_available():
        raise UserError("tensorboard is not installed: pip install tensorboard, or set report_to to none")
    if output.exists() and not output.is_dir():
        raise UserError(f"the output directory {str(output)!r} is a file")
    if config.resume_from_checkpoint:
        return find_checkpoint(config.resume_from_checkpoint, output)
    replaceable = config.overwrite and (output / RUN_FILE).is_file()
    if output.is_dir() and any(output.iterdir()) and not replaceable:
        raise UserError(
            f"the output directory {str(output)!r} is not empty: choose another, resume with "
            "--resume_from_checkpoint last, or replace an earlier run with --overwrite true"
        )
    return None


def prepare_output(config: ARDConfig, output: Path) -> None:
    """Make the output directory, without the results of an earlier run, and write the settings into it.

    Nothing but such results is ever removed.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        for path in [*checkpoints(output), *(output / name for name in RESULTS)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        save_config(config, output / RUN_FILE)
    except OSError as error:
        raise UserError(f"cannot write into the output directory {str(output)!r}: {error.strerror}") from error


def find_checkpoint(name: str, output: Path) -> str:
    """The checkpoint to resume from: the newest one of the run for `last`, else a directory."""
    if name == "last":
        found = checkpoints(output)
        if not found:
            raise UserError(f"there is no checkpoint to resume from in {str(output)!r}")
        return str(found[-1])
    if not (Path(name) / "trainer_state.json").is_file():
        raise UserError(f"{name!r} is not a checkpoint directory")
    return name


def batch_size(config: ARDConfig) -> int:
    """Sequences of one optimizer step on all processes."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size


def load_blocks(config: ARDConfig, tokenizer: PreTrainedTokenizerBase) -> Blocks:
    """The training sequences; at least one batch of them."""
    needed = config.max_steps * batch_size(config)
    blocks = training_blocks(config.train_files, tokenizer, config.sequence_length, needed)
    if len(blocks) < batch_size(config):
        raise UserError(
            f"the training data are too short: {len(blocks)} sequences of {config.sequence_length} tokens, a step "
            f"needs {batch_size(config)}"
        )
    return blocks


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Save model and tokenizer for plain transformers; the directory appears under its name only when complete."""
    disable_capture(model)
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
    """Seconds by phase."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Add the time of the body to a phase."""
        begin = time.perf_counter()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - begin

    def finish(self) -> dict[str, float]:
        """The phases and their total, which includes what was not measured."""
        return {**self._seconds, "total": time.perf_counter() - self._start}


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
