"""Run in a process of its own: peak memory of one forward and backward, as JSON on standard output.

    python memory_probe.py HEADS TOKENS HEAD_DIM

The peak is the kernel's VmHWM, which /proc/self/clear_refs resets: unlike an allocator's counter it sees everything,
also what the matrix library and the threads take.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from pathlib import Path

import torch

import linearard

ops = torch.ops.linearard


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024


def peak_of(function) -> tuple[int, object]:
    """Bytes by which the resident size rose at its highest above where it stood, and the result."""
    c_library = ctypes.CDLL(None)
    if hasattr(c_library, "malloc_trim"):  # give back what malloc keeps: reusing it counts
        c_library.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    result = function()
    return status("VmHWM") - before, result


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def main() -> None:
    heads, tokens, head_dim = (int(argument) for argument in sys.argv[1:4])
    teacher = torch.randn(1, heads, tokens, head_dim)
    student = teacher + 0.1 * torch.randn_like(teacher)
    # Once unmeasured: threads, code pages and tables of libraries are there before the measurement.
    kl, lse_student, lse_teacher = ops.relation_kl_forward(student, teacher)
    ops.relation_kl_backward(torch.ones_like(kl), student, teacher, lse_student, lse_teacher)
    forward, (kl, lse_student, lse_teacher) = peak_of(lambda: ops.relation_kl_forward(student, teacher))
    grad_kl = torch.ones_like(kl)
    backward, gradient = peak_of(lambda: ops.relation_kl_backward(grad_kl, student, teacher, lse_student, lse_teacher))
    leaf = student.requires_grad_()
    both, _ = peak_of(lambda: ops.relation_kl(leaf, teacher).backward())
    plan = linearard._C.plan(student.detach(), teacher)
    print(
        json.dumps(
            {
                "forward": forward - bytes_of(kl, lse_student, lse_teacher),
                "backward": backward - bytes_of(gradient),
                "both": both - bytes_of(gradient),
                "planned_forward": plan["workspace_bytes_forward"],
                "planned_backward": plan["workspace_bytes_backward"],
            }
        )
    )


if __name__ == "__main__":
    main()
