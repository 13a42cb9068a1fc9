"""`linearard evaluate`: measure one model, and compare its attention relations with a teacher's."""

from pathlib import Path
from tempfile import TemporaryFile

import torch
from transformers import PreTrainedModel

from linearard.capture import capture_states, enable_capture
from linearard.display import Display
from linearard.errors import UserError
from linearard.evaluation import (
    Evaluation,
    EvaluationData,
    States,
    check_same_tokens,
    evaluate_model,
    evaluation_batches,
)
from linearard.models import load_tokenizer
from linearard.suite.config import SuiteConfig
from linearard.suite.sources import Source, check_context


def evaluate(config: SuiteConfig, display: Display) -> Evaluation:
    """The measurements of `config.model`; raises UserError for models, files or devices that cannot be used."""
    device = choose_device(config.device)
    if config.output:
        directory = Path(config.output).absolute().parent
        if not directory.is_dir():
            raise UserError(f"the directory of the output file {config.output!r} does not exist")
        if Path(config.output).is_dir():
            raise UserError(f"--output: a file is needed, {config.output!r} is a directory")
        make_writable(directory, "output")
    source = Source.parse(config.model)
    other = Source.parse(config.teacher) if config.teacher else None
    for each in filter(None, (source, other)):
        if each.report:
            raise UserError(f"{each.text!r}: earlier reports are for comparisons, with --tasks or --long_files")
        if not config.beyond_range:
            check_context(each.label, each.load_config(config), config.heldout_length, "heldout_length")
    tokenizer = load_tokenizer(source.model, trust_remote_code=config.trust_remote_code)
    data = EvaluationData.load(config, tokenizer)
    if other:
        check_same_tokens(tokenizer, load_tokenizer(other.model, trust_remote_code=config.trust_remote_code))
    model, _ = source.load(config, device)
    teacher: States | None = None
    if other:
        other_model, _ = other.load(config, device)
        _check_same_heads(model, other_model)
        teacher = lambda input_ids: capture_states(other_model, input_ids)  # noqa: E731
    with display.progress("Evaluating", evaluation_batches(data, teacher is not None)) as bar:
        return evaluate_model(model, tokenizer, data, teacher, bar.advance)


def make_writable(directory: Path, option: str) -> None:
    """Make the directory that `option` names; raises UserError where nothing can be written into it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(f"--{option}: cannot write into {str(directory)!r}: {error.strerror}") from error


def _check_same_heads(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Enable the capture of both; raises UserError where their relations cannot be compared one by one."""
    layers, other_layers = enable_capture(model), enable_capture(teacher)
    if layers != other_layers:
        raise UserError(f"--teacher: model and teacher have different layers: {len(layers)} and {len(other_layers)}")
    heads, other_heads = _heads(model), _heads(teacher)
    for layer, own, other in zip(layers, heads, other_heads, strict=True):
        if own != other:
            raise UserError(
                f"--teacher: layer {layer} of the model has {own[0]} attention heads and {own[1]} key/value heads, "
                f"the teacher's has {other[0]} and {other[1]}"
            )


def _heads(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(attention heads, key/value heads) of each layer. Their dimensions may differ between model and teacher."""
    states = capture_states(model, torch.zeros(1, 2, dtype=torch.long, device=model.device))
    return [(states[layer].query.shape[1], states[layer].key.shape[1]) for layer in sorted(states)]


def choose_device(name: str) -> torch.device:
    """The torch device of a name, or of `auto`; raises UserError where it cannot be used."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device
