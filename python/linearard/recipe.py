"""Recipes: the settings of all stages of a restoration from defaults, a YAML file and the command line."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from linearard.config import EvaluationConfig, OptionParser
from linearard.errors import UserError
from linearard.training_config import ARDConfig, CPTConfig, LongREDConfig, StageConfig

RECIPES = Path(__file__).parent / "recipes"
RESTORE_DESCRIPTION = """\
Scale the RoPE of a model, and train it: to keep the attention relations of the same model with its native RoPE (ARD),
then to predict next tokens of long sequences (CPT); --stages chooses.

Settings come from the defaults, a recipe (--recipe) and the options here, each overriding the one before; a recipe is a
YAML file of the same names. The options are those of the run and of ARD; a section of the recipe (cpt, longred) and
options such as --cpt.learning_rate are those of another stage. Results: OUTPUT_DIR/model (for plain transformers),
metrics.json, report.png, run.yaml (the settings) and a directory for each stage."""
# Stages with settings of their own, beside those of the run and of ARD.
SECTIONS: dict[str, type[StageConfig]] = {"cpt": CPTConfig, "longred": LongREDConfig}
# What a section takes over from the settings of the run unless it says otherwise.
INHERITED = (
    "train_files", "seed", "data_seed", "full_determinism", "use_cpu",
    "bf16", "fp16", "tf32", "cuda_graphs", "liger_kernels",
    "report_to", "run_name", "project", "logging_strategy", "logging_steps", "logging_first_step",
    "logging_nan_inf_filter", "log_level", "disable_tqdm",
    "save_strategy", "save_steps", "save_total_limit", "save_only_model",
)  # fmt: skip
# Of transformers' options, those that --help shows.
_USEFUL = {
    "gradient_accumulation_steps", "gradient_checkpointing", "bf16", "save_steps", "save_total_limit",
    "resume_from_checkpoint", "seed", "weight_decay", "use_cpu",
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """The settings of a restoration.

    run: those of the run and of ARD; sections: of the other stages; written: what was set in those otherwise than by
    default or by the run.
    """

    run: ARDConfig
    output: Path
    sections: dict[str, StageConfig]
    written: dict[str, dict[str, Any]]

    @property
    def stages(self) -> list[str]:
        """Names of the training stages in their order; empty for scaling alone."""
        return [name for name in self.run.stages if name != "none"]

    def stage(self, name: str) -> StageConfig:
        """The settings of a stage."""
        return self.run if name == "ard" else self.sections[name]

    def save(self, path: Path) -> None:
        """Write what was set otherwise than by default, as a recipe."""
        settings = {**self.run.changed_settings, **{name: given for name, given in self.written.items() if given}}
        path.write_text(yaml.safe_dump(settings, sort_keys=True), encoding="utf-8")


def recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe: a name of `recipes()` or the path of a YAML file, read by the safe loader.

    Sections `cpt` and `longred` are those of the stages; a section `cuda`, there too, holds what differs on a GPU.
    """
    path = RECIPES / f"{name}.yaml" if name in recipes() else Path(name)
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"no recipe {name!r}: neither one of {', '.join(recipes())} nor a readable file") from error
    except yaml.YAMLError as error:
        raise UserError(f"the recipe {name!r} is not YAML: {' '.join(str(error).split())}") from error
    _check_keys(settings, ARDConfig, {"cuda", *SECTIONS}, name)
    for section, settings_type in SECTIONS.items():
        _check_keys(settings.get(section, {}), settings_type, {"cuda"}, name)
    return settings


def _check_keys(settings: Any, settings_type: type, sections: set[str], recipe: str) -> None:
    if not isinstance(settings, dict):
        raise UserError(f"the recipe {recipe!r} is not a mapping of names to values")
    known = [option.name for option in fields(settings_type) if option.init]
    for key in settings:
        if key not in known and key not in sections:
            closest = difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
            raise UserError(f"unknown key {key!r} in the recipe {recipe!r}; did you mean {closest!r}?")
    if "cuda" in sections:
        _check_keys(settings.get("cuda", {}), settings_type, set(), recipe)


def recipe_arguments(settings: dict[str, Any]) -> list[str]:
    """A recipe as command-line arguments, so that one parser checks the types of both."""
    arguments: list[str] = []
    for name, value in settings.items():
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif value is not None:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            arguments.append(f"--{name}={text}")
    return arguments


def restore_parser(arguments: Sequence[str]) -> OptionParser:
    """The options of `linearard restore`: every field of ARDConfig, and --recipe.

    --help explains our own and the most useful of transformers', --help-all all of them.
    """
    own = {
        name for part in (EvaluationConfig, StageConfig, ARDConfig) for name in part.__annotations__
    } | _USEFUL  # fmt: skip
    parser = OptionParser(
        ARDConfig,
        shown=None if "--help-all" in arguments else own | {"recipe", "help-all"},
        prog="linearard restore",
        usage="linearard restore [--recipe RECIPE] [options] [--cpt.OPTION ...] [--longred.OPTION ...]",
        description=RESTORE_DESCRIPTION,
    )
    parser.add_argument("--recipe", type=str, help=f"{', '.join(recipes())}, or the path of a YAML file.")
    parser.add_argument("--help-all", action="help", help="Explain the options of transformers' Trainer, too.")
    return parser


def split_arguments(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Arguments by section: `--cpt.max_steps 3` becomes `--max_steps 3` of `cpt`; the run's have the empty name."""
    parts: dict[str, list[str]] = {"": [], **{name: [] for name in SECTIONS}}
    current = ""
    for argument in arguments:
        if argument.startswith("--"):
            head, dot, rest = argument[2:].partition(".")
            current = head if dot and head in SECTIONS else ""
            argument = f"--{rest}" if current else argument
        parts[current].append(argument)
    return parts


def chosen_settings(arguments: Sequence[str], gpu: bool) -> dict[str, dict[str, Any]]:
    """The recipe, its `cuda` sections where a GPU is used, and the other arguments, each overriding the one before.

    By section; the settings of the run are under the empty name.
    """
    given = split_arguments(arguments)
    parser = restore_parser(arguments)
    name = parser.given(given[""]).get("recipe")
    recipe = load_recipe(name) if name else {}
    sections = {section: recipe.pop(section, {}) for section in SECTIONS}
    run = _merged(parser, recipe, given[""], gpu)
    run.pop("recipe", None)
    on_gpu = gpu and not run.get("use_cpu", False)
    chosen = {"": run}
    for section, settings_type in SECTIONS.items():
        section_parser = OptionParser(settings_type, prog=f"linearard restore: {section}")
        chosen[section] = _merged(section_parser, sections[section], given[section], on_gpu)
    return chosen


def _merged(parser: OptionParser, settings: dict[str, Any], arguments: list[str], gpu: bool) -> dict[str, Any]:
    settings = dict(settings)
    on_gpu = settings.pop("cuda", {})
    given = parser.given([*recipe_arguments(settings), *arguments])
    if gpu and not given.get("use_cpu", False):
        given = parser.given([*recipe_arguments({**settings, **on_gpu}), *arguments])
    return given


def make_recipe(arguments: Sequence[str]) -> Recipe:
    """The configuration that command-line arguments ask for; raises UserError for what cannot be used."""
    chosen = chosen_settings(arguments, torch.cuda.is_available())
    try:
        run = ARDConfig(**chosen.pop(""))
        inherited = {name: run.changed_settings[name] for name in INHERITED if name in run.changed_settings}
        sections = {name: SECTIONS[name](**{**inherited, **given}) for name, given in chosen.items()}
    except UserError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # transformers' own checks
        raise UserError(" ".join(str(error).split())) from error
    for stage in (run, *sections.values()):
        if stage.eval_strategy != "no" or stage.save_strategy == "best":
            raise UserError(
                "eval_strategy and save_strategy best need evaluation data: give a trainer an eval_dataset, in Python"
            )
    output = Path(str(run.output_dir))
    written = {
        name: {key: value for key, value in section.changed_settings.items() if key in chosen[name]}
        for name, section in sections.items()
    }
    for name, stage in {"ard": run, **sections}.items():
        stage.output_dir = str(output / name)
        if run.limit_steps is not None:
            stage.max_steps = min(stage.max_steps, run.limit_steps)
    return Recipe(run, output, sections, written)
