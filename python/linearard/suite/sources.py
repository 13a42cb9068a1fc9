"""Where the figures of a model come from: a model to load, perhaps with its RoPE scaled, or an earlier report."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from linearard.errors import UserError
from linearard.models import check_tokenizer, load_config, load_model, load_tokenizer
from linearard.rope import RopeScaling, restore_float32_rope, scale_config, scale_rope
from linearard.suite.config import SuiteConfig
from linearard.suite.figures import Figure
from linearard.training_config import DTYPES


@dataclass(frozen=True)
class Source:
    """`[LABEL=]MODEL[@SCALING]` or `[LABEL=]FILE.json`, taken apart."""

    text: str
    label: str
    model: str
    scaling: RopeScaling | None = None
    role: str = ""

    @classmethod
    def parse(cls, text: str, label: str | None = None, role: str = "") -> "Source":
        """Read such a text; label: where it has none; role: teacher, scaled or empty. Raises UserError."""
        # A scaling has equals signs of its own: model@yarn:4,theta=1e6.
        before, at, scaling = text.partition("@")
        given, equals, model = before.partition("=")
        if not equals:
            given, model = label or text, before
        if not model or not given:
            raise UserError(f"a model is written [LABEL=]MODEL[@SCALING], got {text!r}")
        return cls(text, given, model, RopeScaling.parse(scaling) if at else None, role)

    @property
    def report(self) -> Path | None:
        """The earlier report that holds the figures, or None for a model."""
        return Path(self.model) if self.model.endswith(".json") else None

    def load_config(self, config: SuiteConfig) -> PretrainedConfig:
        """The configuration that the loaded model will have, scaling included; raises UserError as loading does."""
        model_config = load_config(self.model, trust_remote_code=config.trust_remote_code)
        if self.scaling is not None:
            scale_config(model_config, self.scaling)
        return model_config

    def load(self, config: SuiteConfig, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model in evaluation mode on `device`, and its tokenizer, checked against each other."""
        tokenizer = load_tokenizer(self.model, trust_remote_code=config.trust_remote_code)
        model = load_model(self.model, dtype=DTYPES[config.dtype], trust_remote_code=config.trust_remote_code)
        check_tokenizer(tokenizer, model)
        if self.scaling is not None:
            scale_rope(model, self.scaling)
        restore_float32_rope(model)
        return model.to(device).eval(), tokenizer


def context_range(config: PretrainedConfig) -> int:
    """The longest context in tokens that a model of this configuration is made for.

    max_position_embeddings, which is the scaled one in linearard's and most checkpoints; where a scaling's own
    parameters say more (dynamic: factor times it; YaRN, llama3 and longrope: factor times the original context), that.
    A configuration that names no context has no end.
    """
    config = config.get_text_config(decoder=True)
    own = int(getattr(config, "max_position_embeddings", None) or sys.maxsize)
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    factor = float(parameters.get("factor") or 1)
    if parameters.get("rope_type") == "dynamic":
        return round(own * factor)
    original = parameters.get("original_max_position_embeddings")
    return max(own, round(original * factor)) if original else own


def check_context(label: str, config: PretrainedConfig, longest: int, option: str) -> None:
    """Raise UserError where `longest` tokens, which `option` asks for, are more than the model's range."""
    most = context_range(config)
    if longest > most:
        raise UserError(
            f"--{option}: a context of {longest:,} tokens is longer than the range of the model {label!r}, {most:,} "
            "tokens; --beyond_range true measures it all the same"
        )


def figures_of_report(source: Source, examples: dict[str, Any]) -> tuple[list[Figure], dict[str, str]]:
    """The figures of `source.label` in an earlier report; raises UserError where they cannot be compared.

    examples: what `Plan.examples` says of this run. That report has to share the settings, and the contents of the
    files that both have. Also returns the digests of the files of both.
    """
    path = source.report
    assert path is not None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        models = {model["label"]: model for model in content["models"]}
        theirs = dict(content["examples"])
        their_files = dict(theirs.get("files", {}))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the report {str(path)!r}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} is not a report of linearard evaluate") from error
    if source.label not in models:
        raise UserError(f"the report {str(path)!r} has no model {source.label!r}; it has {', '.join(models)}")
    pairs = [(name, theirs.get(name, "unknown"), own) for name, own in examples.items() if name != "files"]
    pairs += [(name, their_files[name], own) for name, own in examples["files"].items() if name in their_files]
    different = [f"with {name} {other}, this run has {own}" for name, other, own in pairs if other != own]
    if different:
        raise UserError(f"the report {str(path)!r} was measured {'; '.join(different)}: they cannot be compared")
    figures = [figure_from_json(figure) for figure in models[source.label]["figures"]]
    return figures, {**their_files, **examples["files"]}


def figure_from_json(content: dict[str, Any]) -> Figure:
    """The inverse of what `linearard.suite.report` writes."""
    bounds = content.get("positions")
    return Figure(
        task=content["task"],
        metric=content["metric"],
        values=tuple(content["values"]),
        length=content.get("length"),
        depth=content.get("depth"),
        positions=(bounds[0], bounds[1]) if bounds else None,
        variant=content.get("variant", ""),
    )
