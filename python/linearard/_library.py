"""Loads the compiled part, or says in one sentence why it cannot be loaded."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch


def _release(version: str) -> str:
    """Strip the build: 2.11.0+cu130 -> 2.11.0. The C++ interface depends on the release, not on the CUDA variant."""
    return version.split("+", 1)[0]


def check_torch_version(built_against: str, running: str) -> None:
    """Raise ImportError when the library was built against another release of torch than the running one.

    The C++ interface of torch changes between releases: loading a library across them fails with an undefined symbol,
    or worse, does not fail.
    """
    if _release(built_against) != _release(running):
        raise ImportError(
            f"linearard was built against torch {built_against}, but torch {running} is running: rebuild linearard for "
            f"it or install torch=={_release(built_against)}"
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
    return importlib.import_module("linearard._C")


def cmake_prefix_path() -> str:
    """Directory for CMAKE_PREFIX_PATH under which find_package(linearard) finds the library inside the package."""
    module_file = importlib.import_module("linearard._C").__file__
    assert module_file is not None
    return str(Path(module_file).parent)
