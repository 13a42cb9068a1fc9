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
# Pages of code that run for the first time, and what malloc keeps in spite of the next line, belong to no workspace.
UNPLANNED = MIB
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # to glibc: what is freed

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs"
)


def measure(
    heads: int, tokens: int, head_dim: int, environment: dict[str, str] = GIVE_BACK, **options: object
) -> dict[str, int]:
    """Bytes beyond inputs and outputs; keys and options as in memory_probe.py."""
    probe = Path(__file__).with_name("memory_probe.py")
    paths = os.pathsep.join(path for path in sys.path if path)
    case = {"heads": heads, "tokens": tokens, "head_dim": head_dim, **options}
    done = subprocess.run(
        [sys.executable, str(probe), json.dumps(case)],
        env={**os.environ, **environment, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_as_planned(measured: dict[str, int]) -> None:
    assert measured["forward"] <= measured["planned_forward"] + UNPLANNED, measured
    assert measured["backward"] <= measured["planned_backward"] + UNPLANNED, measured


def test_less_than_32_mib_at_2048_tokens():
    """B=1, H=9, N=2048, D=64, float32, forward and backward; n x n tensors would take over 1 GiB."""
    measured = measure(9, 2048, 64, environment={})
    assert measured["both"] < 32 * MIB, measured
    assert_as_planned(measure(9, 2048, 64))


def test_memory_grows_with_the_number_of_tokens_not_its_square():
    """Eight times the tokens: at most eight times the memory. One n x n float32 tensor would be 4 GiB at 32,768."""
    # Each thread that takes part has buffers, and how many do so in the small call is chance.
    one_thread = {**GIVE_BACK, "OMP_NUM_THREADS": "1"}
    small, large = (measure(1, tokens, 16, environment=one_thread) for tokens in (4096, 32768))
    for key in ("forward", "backward", "both"):
        assert large[key] <= 8 * max(small[key], 0) + UNPLANNED, (key, small, large)
    for key in ("planned_forward", "planned_backward"):
        assert large[key] <= 8 * small[key], (key, small, large)
    assert_as_planned(small)
    assert_as_planned(large)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float64"},
        {"dtype": "bfloat16", "divergence": "reverse_kl"},
        {"holes": True, "divergence": "jsd"},
        {"scale_student": 0.2, "causal": True},
        {"scale_student": 1e32},  # computed in float64: logits beyond float32's range
    ],
    ids=lambda options: ", ".join(f"{name} {value}" for name, value in options.items()),
)
def test_the_plan_is_an_upper_bound(options: dict[str, object]):
    assert_as_planned(measure(8, 2048, 64, **options))


def test_plan_is_linear_up_to_32768_tokens():
    """Tile buffers of a few MiB for each thread, and vectors: never more than D + 8 numbers for each token and head."""
    heads, head_dim = 9, 64
    for tokens in (2**k for k in range(6, 16)):
        x = torch.zeros(1, heads, tokens, head_dim)
        plan = linearard._C.plan(x, x)
        largest = 8 * MIB * plan["threads"] + 4 * heads * tokens * (head_dim + 8)
        assert plan["workspace_bytes_forward"] <= largest
        assert plan["workspace_bytes_backward"] <= largest
