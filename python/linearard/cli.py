"""The command `linearard`: restore, evaluate, tokenize, info."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearard.errors import UserError

if TYPE_CHECKING:
    from linearard.suite.config import SuiteConfig

HELP = """usage: linearard COMMAND [options]

Undo the damage that RoPE scaling does to a language model.

commands:
  restore     scale a model's RoPE, measure the damage, undo it by training in stages, save the restored model
  evaluate    measure a model, and how far its attention relations are from a teacher's
  tokenize    write training sequences for programs without a tokenizer, such as examples/cpp_trainer
  info        versions, build and devices

`linearard COMMAND --help` explains a command. Start with: linearard restore --recipe demo

`linearard --cmake-prefix-path` prints where CMake finds the library."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 for input that cannot be used."""
    try:
        try:
            return run(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough (`linearard info | head -1`): end as SIGPIPE ends other tools. What is
        # left in the buffer goes nowhere, or the interpreter would complain about it when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def run(arguments: Sequence[str] | None) -> int:
    """Run a command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], None]] = {
        "restore": restore_command,
        "evaluate": evaluate_command,
        "tokenize": tokenize_command,
        "info": info_command,
    }
    if not given or given[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if given == ["--cmake-prefix-path"]:
        from linearard import cmake_prefix_path

        print(cmake_prefix_path())
        return 0
    try:
        if given[0] not in commands:
            raise UserError(f"unknown command {given[0]!r}; the commands are {', '.join(commands)}")
        commands[given[0]](given[1:])
    except UserError as error:
        print(f"linearard: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("linearard: interrupted", file=sys.stderr)
        return 130
    return 0


# The imports are inside the commands: transformers takes seconds, and help and errors should not wait for it.
def restore_command(arguments: list[str]) -> None:
    """`linearard restore`: see linearard.restore."""
    from linearard.recipe import make_recipe

    recipe = make_recipe(arguments)
    _quiet_libraries()

    from linearard.display import Display
    from linearard.report import results_table, write_metrics, write_picture

    run, output = recipe.run, recipe.output
    display = Display(quiet=run.process_index != 0)
    if run.random_weights:
        from linearard.trial import measure, trial_table

        measured = measure(recipe, display)
        if run.process_index == 0:
            display.console.print(trial_table(measured, recipe))
            display.say(f"Numbers: {output / 'metrics.json'}")
        return

    from linearard.restore import restore

    result = restore(recipe, display)
    if result is None:
        return
    write_metrics(result, run, output / "metrics.json")
    picture = write_picture(result, run, output / "report.png")
    display.console.print(results_table(result, run))
    display.say(f"Restored model: {output / 'model'}")
    display.say(f"Numbers: {output / 'metrics.json'}")
    display.say(f"Picture: {output / 'report.png'}" if picture else "No picture: matplotlib is not installed")


def evaluate_command(arguments: list[str]) -> None:
    """`linearard evaluate`: see linearard.evaluation; with --tasks or --long_files, linearard.suite."""
    from linearard.config import OptionParser
    from linearard.suite.config import SuiteConfig

    parser = OptionParser(
        SuiteConfig,
        prog="linearard evaluate",
        usage="linearard evaluate [options]",
        description=SuiteConfig.__doc__,
    )
    config = SuiteConfig(**parser.given(arguments))
    _quiet_libraries()
    if config.wants_report:
        _evaluate_suite(config)
        return

    from linearard.display import Display
    from linearard.evaluate import evaluate
    from linearard.report import evaluation_table, write_evaluation

    display = Display()
    evaluation = evaluate(config, display)
    if config.output:
        write_evaluation(evaluation, config, Path(config.output))
    display.console.print(evaluation_table(config.model, evaluation))


def _evaluate_suite(config: "SuiteConfig") -> None:
    from rich.markdown import Markdown

    from linearard.display import Display
    from linearard.evaluate import choose_device
    from linearard.suite.picture import write_evaluation_picture
    from linearard.suite.report import markdown, write_report
    from linearard.suite.run import evaluate_suite

    display = Display()
    output = Path(config.output_dir)
    device = choose_device(config.device)
    results = evaluate_suite(config, display, lambda so_far: write_report(so_far, device, output))
    write_report(results, device, output)
    picture = write_evaluation_picture(results, output / "evaluation.png")
    display.console.print(Markdown(markdown(results)))
    display.say(f"Report: {output / 'evaluation.md'}, evaluation.json{', evaluation.png' if picture else ''}")


def tokenize_command(arguments: list[str]) -> None:
    """`linearard tokenize`: see linearard.tokens."""
    from linearard import tokens

    _quiet_libraries()
    tokens.tokenize_command(arguments)


def info_command(arguments: list[str]) -> None:
    """`linearard info`: what a bug report needs."""
    from linearard.errors import UserError

    if arguments in (["-h"], ["--help"]):
        print("usage: linearard info\n\nPrint the versions, how the library was built, and the devices.")
        return
    if arguments:
        raise UserError(f"info takes no options, got {arguments[0]!r}")
    for name, value in information().items():
        print(f"{name:<24} {value}")


def information() -> dict[str, Any]:
    """Versions, build and devices by name."""
    import importlib.metadata
    import platform

    import torch

    import linearard
    from linearard import _C

    packages = ("transformers", "peft", "accelerate", "safetensors")
    versions = {name: _version(importlib.metadata.version, name) for name in packages}
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "linearard": linearard.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
        **{f"build: {name}": value for name, value in _C.build_info().items()},
        "kernels": _kernels(_C.build_info()["cuda"]["architectures"]),
        "processor": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "GPUs": ", ".join(devices) or "none",
    }


def _kernels(architectures: list[str]) -> str:
    """A sentence that says where the library computes by kernels of its own."""
    if architectures:
        return f"for the CPU and for CUDA architectures {', '.join(architectures)}"
    return (
        "for the CPU only, as no CUDA toolkit (or no GPU) was found when the library was built; tensors on a GPU are "
        "served by PyTorch's operators"
    )


def _version(lookup: Callable[[str], str], package: str) -> str:
    try:
        return lookup(package)
    except ModuleNotFoundError:
        return "not installed"


def _quiet_libraries() -> None:
    """Keep the terminal for our own progress: errors of the libraries still show."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|transformers|peft|accelerate")


if __name__ == "__main__":
    sys.exit(main())
