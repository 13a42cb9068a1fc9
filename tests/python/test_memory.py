"""Linear memory on the CPU, measured by the operating system in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import linearard

MIB = 2**20
# Freed memory that malloc keeps, and pages of code that run for the first time, belong to no workspace.
UNPLANNED = 2 * MIB

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs"
)


def measure(heads: int, tokens: int, head_dim: int) -> dict[str, int]:
    """Bytes beyond inputs and outputs; keys as in memory_probe.py."""
    probe = Path(__file__).with_name("memory_probe.py")
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, str(probe), str(heads), str(tokens), str(head_dim)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_less_than_32_mib_at_2048_tokens():
    """B=1, H=9, N=2048, D=64, float32, forward and backward; n x n tensors would take over 1 GiB."""
    measured = measure(9, 2048, 64)
    assert measured["both"] < 32 * MIB, measured
    assert measured["forward"] <= measured["planned_forward"] + UNPLANNED, measured
    assert measured["backward"] <= measured["planned_backward"] + UNPLANNED, measured


def test_memory_grows_with_the_number_of_tokens_not_its_square():
    """Four times the tokens: at most four times the memory. One n x n float32 tensor would be 1 GiB at 16,384."""
    small, large = measure(1, 4096, 16), measure(1, 16384, 16)
    for key in ("forward", "backward", "both"):
        assert large[key] <= 4 * max(small[key], 0) + UNPLANNED, (key, small, large)
    for key in ("planned_forward", "planned_backward"):
        assert large[key] <= 4 * small[key], (key, small, large)


def test_plan_is_linear_up_to_32768_tokens():
    """Tile buffers of a few MiB for each thread, and vectors: never more than D + 8 numbers for each token and head."""
    heads, head_dim = 9, 64
    for tokens in (2**k for k in range(6, 16)):
        x = torch.zeros(1, 1, 1, head_dim).expand(1, heads, tokens, head_dim)
        plan = linearard._C.plan(x, x)
        largest = 8 * MIB * plan["threads"] + 4 * heads * tokens * (head_dim + 8)
        assert plan["workspace_bytes_forward"] <= largest
        assert plan["workspace_bytes_backward"] <= largest
