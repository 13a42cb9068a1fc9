"""The snippets of the documentation, Python and C++, run as they are printed; every option is documented."""

import inspect
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

import linearard

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["README.md", "docs/operators.md"]
OPERATORS = [name for name in linearard.__all__ if "_kl" in name or "_lse" in name]
CPP_BLOCK = re.compile(r"^```cpp\n(.*?)^```", re.MULTILINE | re.DOTALL)
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def snippets(document: str) -> list:
    """Every ```python block as a test parameter named by file and line."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return [
        pytest.param(match.group(1), id=f"{document}:{text.count(chr(10), 0, match.start()) + 2}")
        for match in PYTHON_BLOCK.finditer(text)
    ]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_document_has_snippets(document: str):
    assert snippets(document)


@pytest.mark.parametrize("snippet", [snippet for document in DOCUMENTS for snippet in snippets(document)])
def test_snippet(snippet: str):
    torch.manual_seed(0)
    exec(compile(snippet, "<snippet>", "exec"), {"__name__": "snippet"})


def section(operator: str) -> str:
    """The part of docs/operators.md on one operator."""
    text = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
    return text.split(f"\n## {operator}\n", 1)[1].split("\n## ", 1)[0]


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_option_is_documented(operator: str):
    text = section(operator)
    for name in inspect.signature(getattr(linearard, operator)).parameters:
        assert re.search(rf"\b{name}\b", text), f"{operator} does not explain {name}"
    assert PYTHON_BLOCK.search(text)
    assert re.search(rf"linearard::{operator}\(", "".join(CPP_BLOCK.findall(text)))


def test_cpp_snippets(tmp_path: Path):
    """All of them in one program, each in a scope of its own: torch's headers are read once."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    assert compiler is not None
    lines, scopes = ["#include <ATen/ATen.h>"], []
    for document in DOCUMENTS:
        for block in CPP_BLOCK.findall((ROOT / document).read_text(encoding="utf-8")):
            lines += [line for line in block.splitlines() if line.startswith("#include")]
            scopes += ["{", *(line for line in block.splitlines() if not line.startswith("#include")), "}"]
    assert len(scopes) > 50
    source, program = tmp_path / "snippets.cpp", tmp_path / "snippets"
    source.write_text("\n".join([*lines, "int main() {", *scopes, "}"]) + "\n", encoding="utf-8")
    package = Path(linearard.cmake_prefix_path())
    libraries = [package / "lib", *map(Path, library_paths())]
    command = [
        compiler, "-std=c++17", source, "-o", program, f"-I{package / 'include'}",
        *(argument for path in include_paths() for argument in ("-isystem", path)),
        *(argument for path in libraries for argument in (f"-L{path}", f"-Wl,-rpath,{path}")),
        "-llinearard", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True, timeout=600)
    subprocess.run([str(program)], check=True, timeout=120)
