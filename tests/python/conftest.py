"""Fixtures and settings that all tests share."""

from __future__ import annotations

import importlib.util
import os

import hypothesis
import pytest
import torch

# A property test that fails in CI must fail for everybody: there the examples are the same in every run.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


# The training method needs the extra "train"; the operators are tested without it, on a GPU machine for instance.
TRAINING = (
    "capture", "cli", "config", "cpt", "data", "evaluation", "example", "harness", "liger", "linear_losses",
    "local_gradients", "longred", "losses", "rope", "stage_trainer", "stages", "step_cost", "step_graphs", "suite",
    "trainer", "trial",
)  # fmt: skip
missing = [name for name in ("transformers", "peft") if importlib.util.find_spec(name) is None]
collect_ignore = [f"test_{name}.py" for name in TRAINING] if missing else []


def pytest_report_header() -> list[str]:
    """What is left out is said."""
    return [f"linearard: {' and '.join(missing)} not installed, not testing {', '.join(TRAINING)}"] if missing else []


# The problems are small, and where other programs run too, threads that wait for each other take ten times as long as
# one thread alone. test_determinism.py holds two threads against one, bit by bit.
torch.set_num_threads(1)


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that this machine has."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Tests do not depend on each other's random numbers."""
    torch.manual_seed(20240604)
