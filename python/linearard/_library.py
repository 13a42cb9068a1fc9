"""Loads the compiled part, or says in one sentence why it cannot be loaded."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch


def _release(version: str) -> str:
    """ "2.11.0+cu130" -> "2.11.0": the C++ interface depends on the release, not on the CUDA variant."""
    return version.split("+", 1)[0]


def check_torch_version(built_against: str, running: str) -> None:
    """Raise ImportError when the library was built against another release of torch than the running one.

    The C++ interface of torch changes between releases, and loading a library across them fails with an undefined
    symbol or worse.
    """
    if _release(built_against) != _release(running):
        raise ImportError(
            f"linearard was built against torch {built_against}, but torch {running} is running: rebuild linearard "
            f"for it (pip install --no-build-isolation --force-reinstall --no-deps linearard) or install "
            f"torch=={_release(built_against)}"
        )


def load() -> ModuleType:
    """Import `linearard._C`, which registers the operators torch.ops.linearard.*."""
    try:
        build_config = importlib.import_module("linearard._build_config")
    except ModuleNotFoundError:
        raise ImportError(
            "the compiled part of linearard is missing: the sources are here but were not built (run `make build` in the "
            "project's root, or `pip install .`)"
        ) from None
    check_torch_version(build_config.TORCH_VERSION, torch.__version__)
    try:
        return importlib.import_module("linearard._C")
    except ModuleNotFoundError:
        raise ImportError(
            "the compiled module linearard._C is missing or was built for another version of Python: reinstall linearard"
        ) from None
