"""What a wheel has to do in an environment of its own; run by tests/wheel/run.py outside of the source tree."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn.functional import log_softmax

import linearard


def main() -> None:
    package = Path(linearard.__file__).parent
    assert Path(sys.prefix) in package.parents, f"linearard was imported from {package}"

    metadata = importlib.metadata.metadata("linearard")
    minor = ".".join(torch.__version__.split(".")[:2])
    assert f"torch=={minor}.*" in (metadata.get_all("Requires-Dist") or [])
    assert {"train", "eval", "plot", "dev"} <= set(metadata.get_all("Provides-Extra") or [])
    assert metadata["Version"] == linearard.__version__

    torch.manual_seed(0)
    teacher = torch.randn(1, 2, 60, 16, dtype=torch.float64)
    student = (teacher + 0.1 * torch.randn_like(teacher)).requires_grad_()
    log_q, log_p = (log_softmax(x @ x.transpose(-2, -1) / 4, -1) for x in (student, teacher))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    actual = linearard.relation_kl(student, teacher)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, student) for value in (actual, expected)))
    compiled = torch.ops.linearard.relation_kl(student.float().detach(), teacher.float())
    torch.testing.assert_close(compiled.double(), actual.detach(), rtol=1e-4, atol=1e-6)

    command = [Path(sys.executable).parent / "linearard", "info"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"linearard                {linearard.__version__}" in shown
    assert "kernels                  for the CPU" in shown

    # Without the library that it is linked with, the module says so in a sentence.
    library = package / "lib" / "liblinearard.so"
    hidden = library.rename(library.with_suffix(".hidden"))
    done = subprocess.run([sys.executable, "-c", "import linearard"], check=False, capture_output=True, text=True)
    hidden.rename(library)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: linearard's compiled library cannot be loaded, reinstall linearard: "), last
    print("smoke test: passed")


if __name__ == "__main__":
    main()
