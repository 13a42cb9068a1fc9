"""`linearard tokenize`: the file, and what it refuses."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, make_tokenizer, random_ids, save_model, write_text

from linearard.cli import main
from linearard.data import training_blocks
from linearard.errors import UserError
from linearard.tokens import write_tokens


def test_the_file_holds_the_sequences_of_a_restoration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text, output = save_model(tmp_path / "model"), write_text(tmp_path), tmp_path / "tokens.bin"
    arguments = ["--model", model, "--train_files", text, "--sequence_length", 24, "--sequences", 5, "--output", output]
    assert main(["tokenize", *map(str, arguments)]) == 0
    expected = training_blocks([text], make_tokenizer(), 24, 5).input_ids
    assert f"{output}: {len(expected)} sequences of 24 tokens" in capsys.readouterr().out
    content = output.read_bytes()
    assert struct.unpack_from("<8sIIQQQ", content) == (b"LARDTOKS", 1, 2, VOCABULARY, len(expected), 24)
    ids = np.frombuffer(content, "<u2", offset=40).reshape(-1, 24)
    assert torch.equal(torch.from_numpy(ids.astype(np.int64)), expected)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens.bin", torch.tensor([[70000, 3]]), 2**17)
    content = (tmp_path / "tokens.bin").read_bytes()
    assert struct.unpack_from("<8sIIQQQ", content) == (b"LARDTOKS", 1, 4, 2**17, 1, 2)
    assert np.frombuffer(content, "<i4", offset=40).tolist() == [70000, 3]


def test_bad_input_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="makes the id"):
        write_tokens(tmp_path / "tokens.bin", random_ids(1, 8), 2)
    model, text = save_model(tmp_path / "model"), write_text(tmp_path, characters=20)
    for more, sentence in (
        (["--output", tmp_path / "nowhere" / "tokens.bin"], "the directory of the output file"),
        (["--train_files", tmp_path / "missing.txt"], "does not exist"),
        (["--sequence_length", "0"], "sequence_length must be at least 1, got 0"),
        (["--sequence_length", "4096"], "too short"),
        (["--model", tmp_path / "missing"], "does not exist"),
    ):
        arguments = ["--model", model, "--train_files", text, "--output", tmp_path / "tokens.bin", *more]
        assert main(["tokenize", *map(str, arguments)]) == 2
        assert sentence in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.jsonl"]
