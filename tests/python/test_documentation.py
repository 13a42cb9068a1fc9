"""The Python snippets of the documentation run as they are printed."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["README.md", "docs/operators.md"]
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
