"""What ptxas made of the CUDA kernels in the built library: none may spill registers into memory."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from linearard import _C

LIBRARY = Path(_C.__file__).parent / "lib" / "liblinearard.so"
USAGE = re.compile(r"^ Function (\S+):\n.*?REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", re.MULTILINE)


def find_cuobjdump() -> str | None:
    """Of the CUDA toolkit, or the one that triton brings along with torch."""
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(places))


def kernel_resources(text: str) -> dict[str, tuple[int, int, int]]:
    """Registers, bytes of stack and bytes of local memory of each kernel; spilled registers lie in the latter two."""
    return {name: (int(registers), int(stack), int(local)) for name, registers, stack, local in USAGE.findall(text)}


def test_no_kernel_spills():
    if not _C.build_info()["cuda"]["architectures"]:
        pytest.skip("this build has no CUDA kernels")
    if (cuobjdump := find_cuobjdump()) is None:
        pytest.skip("cuobjdump was not found")
    done = subprocess.run([cuobjdump, "-res-usage", str(LIBRARY)], capture_output=True, text=True, check=True)
    kernels = {name: usage for name, usage in kernel_resources(done.stdout).items() if "linearard" in name}
    assert kernels
    spilling = {name: usage for name, usage in kernels.items() if usage[1] or usage[2]}
    assert not spilling, f"(registers, stack bytes, local bytes): {spilling}"


def test_the_output_of_cuobjdump_is_understood():
    text = """
Fatbin elf code:
arch = sm_90a
Resource usage:
 Common:
  GLOBAL:0
 Function _ZN9linearard4good:
  REG:222 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:920 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN9linearard3bad:
  REG:255 STACK:48 SHARED:1024 LOCAL:0 CONSTANT[0]:880 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert kernel_resources(text) == {"_ZN9linearard4good": (222, 0, 0), "_ZN9linearard3bad": (255, 48, 0)}
