"""`linearard evaluate`: measure one model, and compare its attention relations with a teacher's."""

from pathlib import Path

import torch

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
    if config.output and not Path(config.output).absolute().parent.is_dir():
        raise UserError(f"the directory of the output file {config.output!r} does not exist")
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
        layers, other_layers = enable_capture(model), enable_capture(other_model)
        if layers != other_layers:
            raise UserError(f"model and teacher have different layers: {len(layers)} and {len(other_layers)}")
        teacher = lambda input_ids: capture_states(other_model, input_ids)  # noqa: E731
    with display.progress("Evaluating", evaluation_batches(data, teacher is not None)) as bar:
        return evaluate_model(model, tokenizer, data, teacher, bar.advance)


def choose_device(name: str) -> torch.device:
    """The torch device of a name, or of `auto`; raises UserError where it cannot be used."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device
