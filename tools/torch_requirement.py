"""Metadata of a wheel: it requires the minor version of torch that it is built against (used by pyproject.toml).

The C++ interface of torch holds within a minor version at best, and which one a library fits is known only when it is
built: with build isolation the one of [build-system], without it the one of the environment.
"""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def dynamic_metadata(settings: Mapping[str, Any], project: Mapping[str, Any]) -> dict[str, list[str]]:
    """The `dependencies` that are added to those of pyproject.toml."""
    try:
        major, minor = version("torch").split(".")[:2]
    except PackageNotFoundError:
        raise SystemExit(
            "linearard is built against torch, which this environment lacks: pip install torch first, or drop "
            "--no-build-isolation"
        ) from None
    return {"dependencies": [f"torch=={major}.{minor}.*"]}


def dynamic_wheel(settings: Mapping[str, Any]) -> dict[str, bool]:
    """A wheel's dependencies may differ from those that its source distribution was made with."""
    return {"dependencies": True}
