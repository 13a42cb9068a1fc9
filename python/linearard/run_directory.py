"""The directory of a run: what is in it, what of it is finished, where a resumed run goes on."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers.integrations import get_reporting_integration_callbacks, is_tensorboard_available

from linearard.errors import UserError
from linearard.evaluation import Evaluation
from linearard.recipe import Recipe
from linearard.stage_trainer import checkpoints

RUN_FILE = "run.yaml"
PROGRESS_FILE = "progress.json"
# The settings that a run's measurements belong to, and which cannot change when it is resumed.
MEASURED_WITH = (
    "model", "scaling", "stages", "native_context", "relations", "heldout_files", "heldout_length", "heldout_windows",
    "last_word_file", "last_word_number", "relation_windows",
)  # fmt: skip
# All that a run writes into its directory.
RESULTS = (RUN_FILE, PROGRESS_FILE, "model", "metrics.json", "report.png", "ard", "cpt", "longred")


@dataclass
class StageResult:
    """What a finished stage measured; log: the loss and its parts by step; seconds: those before a resumption, too."""

    evaluation: Evaluation
    steps: int
    tokens: int
    trained_parameters: int
    seconds: float
    log: list[dict[str, float]]


@dataclass
class RunProgress:
    """What a run has measured so far, in a file of its directory: a resumed run does not do it again.

    settings: those that the measurements belong to; seconds: spent so far, by phase.
    """

    output: Path
    settings: dict[str, Any]
    teacher: Evaluation | None = None
    scaled: Evaluation | None = None
    stages: dict[str, StageResult] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def begin(cls, recipe: Recipe) -> "RunProgress":
        """Nothing measured yet."""
        return cls(recipe.output, {name: getattr(recipe.run, name) for name in MEASURED_WITH})

    @classmethod
    def load(cls, recipe: Recipe) -> "RunProgress":
        """The progress of the run in the output directory; none if it was stopped before its first measurement.

        Raises UserError where the run was measured with other settings than the recipe's.
        """
        progress, output = cls.begin(recipe), recipe.output
        file = output / PROGRESS_FILE
        if not file.is_file():
            return progress
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            stages = {
                name: StageResult(**{**stage, "evaluation": Evaluation(**stage["evaluation"])})
                for name, stage in content["stages"].items()
            }
            teacher, scaled = (Evaluation(**content[name]) for name in ("teacher", "scaled"))
            # Earlier versions wrote neither settings nor seconds.
            settings, seconds = content.get("settings", {}), content.get("seconds", {})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"cannot read the progress of the run in {str(output)!r}: {error}") from error
        for name, asked in progress.settings.items():
            if name in settings and settings[name] != asked:
                raise UserError(
                    f"the run in {str(output)!r} has {name} {_shown(settings[name])}, {_shown(asked)} was asked for: "
                    "resume it with its own settings, or choose another output_dir"
                )
        return cls(output, progress.settings, teacher, scaled, stages, seconds)

    def save(self) -> None:
        """Write the file; it changes only as a whole."""
        assert self.teacher is not None
        assert self.scaled is not None
        content = {
            "settings": self.settings,
            "seconds": self.seconds,
            "teacher": asdict(self.teacher),
            "scaled": asdict(self.scaled),
            "stages": {name: asdict(stage) for name, stage in self.stages.items()},
        }
        temporary = self.output / f".{PROGRESS_FILE}"
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.output / PROGRESS_FILE)

    def model_of(self, recipe: Recipe, stage: str) -> Path:
        """Where the model that comes out of a stage is saved."""
        return self.output / "model" if stage == recipe.stages[-1] else self.output / stage / "model"

    def finished(self, recipe: Recipe) -> list[str]:
        """The stages that need not be run again, in their order."""
        finished: list[str] = []
        for name in recipe.stages:
            if name not in self.stages or not self.model_of(recipe, name).is_dir():
                break
            finished.append(name)
        return finished


def check_output(recipe: Recipe) -> None:
    """Refuse an output directory, a checkpoint or a way of reporting that cannot be used."""
    run, output = recipe.run, recipe.output
    try:
        get_reporting_integration_callbacks(run.report_to)
    except ValueError as error:
        raise UserError(f"report_to: {error}") from error
    if run.report_to == ["tensorboard"] and not is_tensorboard_available():
        raise UserError("tensorboard is not installed: pip install tensorboard, or set report_to to none")
    if output.exists() and not output.is_dir():
        raise UserError(f"the output directory {str(output)!r} is a file")
    is_run = (output / RUN_FILE).is_file()
    if run.resume_from_checkpoint:
        _check_checkpoint(run.resume_from_checkpoint, recipe)
        if not is_run and not is_empty(output):
            raise UserError(f"the output directory {str(output)!r} is not empty, and no run that could be resumed")
        return
    if not is_empty(output) and not (run.overwrite and is_run):
        raise UserError(
            f"the output directory {str(output)!r} is not empty: choose another, resume with "
            "--resume_from_checkpoint last, or replace an earlier run with --overwrite true"
        )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def is_empty(output: Path) -> bool:
    """Whether the directory has nothing in it, or is missing."""
    return not output.exists() or not any(output.iterdir())


def _check_checkpoint(name: str, recipe: Recipe) -> None:
    if name == "last":
        begun = (recipe.output / PROGRESS_FILE).is_file()
        if not begun and not any(checkpoints(recipe.output / stage) for stage in recipe.stages):
            raise UserError(f"there is no checkpoint to resume from in {str(recipe.output)!r}")
    elif not (Path(name) / "trainer_state.json").is_file():
        raise UserError(f"{name!r} is not a checkpoint directory")


def checkpoint_of(recipe: Recipe, stage: str, first: str) -> str | None:
    """The checkpoint from which a stage goes on, or None; `first` is the first stage that is not finished.

    `last` means the newest one of the stage; a directory that was named is meant for the first unfinished stage.
    """
    name = recipe.run.resume_from_checkpoint
    if not name:
        return None
    if name != "last":
        return name if stage == first else None
    found = checkpoints(recipe.output / stage)
    return str(found[-1]) if found else None


def prepare_output(recipe: Recipe) -> None:
    """Make the output directory, without the results of an earlier run, and write the settings into it.

    Nothing but such results is ever removed.
    """
    output = recipe.output
    try:
        output.mkdir(parents=True, exist_ok=True)
        for path in (output / name for name in RESULTS):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        recipe.save(output / RUN_FILE)
    except OSError as error:
        raise UserError(f"cannot write into the output directory {str(output)!r}: {error.strerror}") from error
