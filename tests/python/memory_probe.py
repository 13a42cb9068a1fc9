"""Run in a process of its own: peak memory of one forward and backward, as JSON on standard output.

    python memory_probe.py '{"heads": 1, "tokens": 2048, "head_dim": 64}'

Further keys: dtype, holes (padding between the tokens), and the options of relation_kl.

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
    case = json.loads(sys.argv[1])
    shape = (1, case.pop("heads"), case.pop("tokens"), case.pop("head_dim"))
    dtype = getattr(torch, case.pop("dtype", "float32"))
    options = case
    if options.pop("holes", False):
        options["key_padding_mask"] = torch.arange(shape[2]).remainder(8).ne(3).unsqueeze(0)
    teacher = torch.randn(shape)
    student = teacher.add(torch.randn(shape), alpha=0.1).to(dtype)
    teacher = teacher.to(dtype)
    # Once unmeasured: threads, code pages and tables of libraries are there before the measurement.
    leaf = student.detach().requires_grad_()
    ops.relation_kl(leaf, teacher, **options).backward()
    del leaf
    forward, (kl, *lse) = peak_of(lambda: ops.relation_kl_forward(student, teacher, **options))
    grad_kl = torch.ones_like(kl)
    backward, gradient = peak_of(lambda: ops.relation_kl_backward(grad_kl, student, teacher, *lse, **options))
    leaf = student.requires_grad_()
    both, _ = peak_of(lambda: ops.relation_kl(leaf, teacher, **options).backward())
    if "divergence" in options:
        options["divergence"] = getattr(linearard._C.Divergence, options["divergence"].upper())
    plan = linearard._C.plan(student.detach(), teacher, **options)
    print(
        json.dumps(
            {
                "forward": forward - bytes_of(kl, *lse),
                "backward": backward - bytes_of(gradient),
                "both": both - bytes_of(gradient),
                "planned_forward": plan["workspace_bytes_forward"],
                "planned_backward": plan["workspace_bytes_backward"],
            }
        )
    )


if __name__ == "__main__":
    main()
