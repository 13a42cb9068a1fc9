"""Loads the compiled part, or says in one sentence why it cannot be loaded."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch


def _minor(version: str) -> str:
    """The minor version: 2.11.0+cu130 -> 2.11. The C++ interface changes with it, as the wheel's metadata says."""
    return ".".join(version.split(".")[:2])


def check_torch_version(built_against: str, running: str) -> None:
    """Raise ImportError when the library was built against another minor version of torch than the running one.

    The C++ interface of torch changes between them: loading a library across them fails with an undefined symbol,
    or worse, does not fail.
    """
    if _minor(built_against) != _minor(running):
        raise ImportError(
            f"linearard was built against torch {built_against}, but torch {running} is running: rebuild linearard for "
            f"it or install torch=={_minor(built_against)}.*"
        )


def load() -> ModuleType:
    """Import `linearard._C`, which registers the operators `torch.ops.linearard.*`."""
    if importlib.util.find_spec("linearard._build_config") is None:
        raise ImportError(
            "linearard is not built: its Python files are here without the compiled library; run `make build` in the "
            "project's root, or `pip install .`"
        )
    built_against = importlib.import_module("linearard._build_config").TORCH_VERSION
    check_torch_version(built_against, torch.__version__)
    if importlib.util.find_spec("linearard._C") is None:
        raise ImportError("linearard._C is missing or was built for another version of Python: reinstall linearard")
    try:
        return importlib.import_module("linearard._C")
    except ImportError as error:  # the library that _C is linked with is missing, or is not the one it was made for
        reason = " ".join(str(error).splitlines()[:1])
        raise ImportError(f"linearard's compiled library cannot be loaded, reinstall linearard: {reason}") from error


def cmake_prefix_path() -> str:
    """Directory for CMAKE_PREFIX_PATH under which find_package(linearard) finds the library inside the package."""
    module_file = importlib.import_module("linearard._C").__file__
    assert module_file is not None
    return str(Path(module_file).parent)
