"""A run of `linearard evaluate`: what it checks before, its report, what is left of one that ends early."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tokenizer, save_model

from linearard.cli import main
from linearard.data import read_texts
from linearard.errors import UserError
from linearard.suite.config import SuiteConfig
from linearard.suite.figures import ACCURACY, Figure
from linearard.suite.report import write_report
from linearard.suite.run import Plan, Results
from linearard.suite.sources import Source
from linearard.suite.synthetic import make_prompt
from linearard.suite.task_files import load_task


def test_report_compares_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(save_model(tmp_path / "model", max_position_embeddings=1024))
    shared = ["--device", "cpu", "--lengths", "1024", "--depths", "0", "100", "--samples", "1"]
    shared += ["--tasks", "passkey", "--long_files", "bundled", "--long_lengths", "512", "--bucket", "256"]
    first, second = tmp_path / "first", tmp_path / "second"
    # Large weights make this one certain of wrong tokens: a gap that does not hang on rounding.
    damaged = str(save_model(tmp_path / "damaged", max_position_embeddings=1024, initializer_range=1.0))
    scaled = ["--teacher", model, "--scaled", f"{damaged}@linear:4"]
    assert main(["evaluate", "--model", f"restored={model}", *scaled, *shared, "--output_dir", str(first)]) == 0
    content = json.loads((first / "evaluation.json").read_text())
    assert [entry["label"] for entry in content["models"]] == ["teacher", "scaled", "restored"]
    rows = {row["name"]: row for row in content["rows"]}
    assert {*rows} >= {"perplexity, at 512", "perplexity, at 512, tokens 256 to 511", "passkey, at 1K, all depths"}
    recovery = {label: share["mean"] for label, share in rows["perplexity, at 512"]["recovery"].items()}
    assert recovery == pytest.approx({"teacher": 1, "scaled": 0, "restored": 1})
    assert all(len(figure["values"]) in (1, 8) for entry in content["models"] for figure in entry["figures"])
    assert "| perplexity, at 512 |" in (first / "evaluation.md").read_text()
    assert (first / "evaluation.png").read_bytes().startswith(b"\x89PNG")

    # Figures of an earlier report instead of a second measurement.
    again = ["evaluate", "--model", f"more={model}", "--teacher", f"teacher={first / 'evaluation.json'}", *shared]
    assert main([*again, "--output_dir", str(second)]) == 0
    assert (
        json.loads((second / "evaluation.json").read_text())["models"][0]["figures"] == content["models"][0]["figures"]
    )
    capsys.readouterr()
    assert main([*again, "--seed", "1", "--output_dir", str(second)]) == 2
    assert "was measured with seed 0, this run has 1" in capsys.readouterr().err


def test_earlier_reports_are_of_the_same_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, report = str(save_model(tmp_path / "model", max_position_embeddings=1024)), tmp_path / "evaluation.json"
    documents = tmp_path / "books.jsonl"
    documents.write_text('{"text": "' + "one two " * 40 + '"}\n')

    def evaluate(*more: str) -> int:
        shared = ["--device", "cpu", "--tasks", "passkey", "--lengths", "512", "--samples", "1", "--long_lengths", "32"]
        return main(["evaluate", "--model", f"new={model}", "--output_dir", str(tmp_path), *shared, *more])

    first = ["--long_files", str(documents), "--depths", "0", "100"]
    assert evaluate("--teacher", model, *first) == 0
    again = ["--teacher", f"teacher={report}", "--scaled", f"scaled={model}"]
    assert evaluate(*again, *first) == 0
    # From another place, or without: the digest stays with the teacher's figures.
    copy = tmp_path / "copy.jsonl"
    copy.write_text(documents.read_text())
    assert evaluate(*again, "--depths", "0", "100", "--long_files", str(copy)) == 0
    assert evaluate(*again, "--depths", "0", "100") == 0

    monkeypatch.setattr(Source, "load", None)  # refused before
    copy.write_text('{"text": "' + "one three " * 40 + '"}\n')
    for more, reason in (
        (
            ["--long_files", str(copy), "--depths", "0", "100"],
            r"long_files sha256:\w+, this run has sha256:\w+: they",
        ),
        (
            ["--long_files", str(documents), "--depths", "25", "50"],
            r"depths \[0.0, 100.0\], this run has \[25.0, 50.0\]",
        ),
        ([*first, "100"], r"depths \[0.0, 100.0\], this run has \[0.0, 100.0, 100.0\]"),
        (
            [*first, "--dtype", "bfloat16", "--seed", "1"],
            "seed 0, this run has 1; with dtype float32, this run has bfl",
        ),
    ):
        capsys.readouterr()
        assert evaluate(*again, *more) == 2
        shown = capsys.readouterr().err
        assert re.search(reason, shown), shown
        assert len(shown.splitlines()) == 1


def test_a_task_file_is_known_by_template_and_examples(tmp_path: Path) -> None:
    def digests(text: str, template: str) -> dict[str, str]:
        (tmp_path / "mine.jsonl").write_text(text)
        return Plan([load_task(tmp_path / "mine.jsonl", template, None)], [], [], []).examples(SuiteConfig())["files"]

    row = '{"query": "q", "choices": ["a", "b"], "gold": %d}'
    found = digests(row % 0, "arc_easy")
    assert list(found) == ["task mine"]
    assert found == digests(row % 0 + "\n", "arc_easy")
    assert found != digests(row % 1, "arc_easy")
    assert found != digests(row % 0, "openbook_qa")


def test_the_report_changes_only_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str, **_: Any) -> None:
        path.write_bytes(text.encode()[:10])
        raise OSError("no space left")

    results = Results({"m": [Figure("task", ACCURACY, (1, 0))]}, {"m": "m"}, {})
    write_report(results, torch.device("cpu"), tmp_path)
    before = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert set(before) == {"evaluation.json", "evaluation.md"}
    monkeypatch.setattr("linearard.suite.report.write_json", lambda *_: None)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        write_report(results, torch.device("cpu"), tmp_path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == before


def fits(length: int, depth: float, index: int) -> bool:
    """Whether a prompt of needle_multikey has room."""
    try:
        make_prompt("needle_multikey", make_tokenizer(), length, depth, 0, index, filler=False)
    except UserError:
        return False
    return True


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Source, "load", refuse)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_every_model_is_checked_before_the_first_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(save_model(tmp_path / "model", max_position_embeddings=1024))
    small = str(save_model(tmp_path / "small"))
    evaluate = ["evaluate", "--model", model, "--device", "cpu", "--compare"]
    for task in (["--tasks", "passkey", "--lengths", "512"], ["--long_files", "bundled", "--long_lengths", "512"]):
        assert main([*evaluate, f"ok={model}", f"scaled={small}@linear:4", *task]) == 2
        assert "512 tokens is longer than the range of the model 'scaled', 256 tokens" in capsys.readouterr().err
    assert main([*evaluate, str(tmp_path / "missing"), "--tasks", "passkey", "--lengths", "512"]) == 2
    assert "does not exist" in capsys.readouterr().err
    output = ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(AssertionError, match="a model was loaded"):
        main([*evaluate, small, "--tasks", "passkey", "--lengths", "512", "--beyond_range", "true", *output])


@pytest.mark.usefixtures("nothing_is_loaded")
def test_lengths_documents_and_output_are_checked_before_the_first_model_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(save_model(tmp_path / "model", max_position_embeddings=4096))
    (tmp_path / "file").write_text("precious")

    def refused(reason: str, *arguments: str) -> None:
        output = ["--output_dir", str(tmp_path / "out")]
        capsys.readouterr()
        assert main(["evaluate", "--device", "cpu", "--model", f"mine={model}", *output, *arguments]) == 2
        shown = capsys.readouterr().err
        assert re.search(reason, shown), shown
        assert len(shown.splitlines()) == 1

    reason = (
        r"--lengths, model 'mine': common_words at 900 does not fit: the task itself needs [\d,]+ tokens, \d+ are left"
    )
    refused(reason, "--tasks", "passkey", "common_words", "--lengths", "4000", "900")
    # A length for some of the prompts: not only the first is tried.
    prompts = [(depth, index) for depth in (0, 50) for index in range(4)]
    some = (n for n in range(150, 1000) if fits(n, *prompts[0]) and not all(fits(n, *prompt) for prompt in prompts))
    needles = ["--tasks", "needle_multikey", "--depths", "0", "50", "--samples", "4", "--lengths"]
    refused("needle_multikey at .* does not fit", *needles, str(next(some)))
    reason = "--long_lengths, model 'mine': the long documents are too short: none of 1 has 1 windows of 4,000 tokens"
    (tmp_path / "short.txt").write_text("one two three")
    refused(reason, "--long_files", str(tmp_path / "short.txt"), "--long_lengths", "4000")
    refused(
        "--output_dir: cannot write into '.*file': File exists",
        "--tasks",
        "passkey",
        "--output_dir",
        f"{tmp_path}/file",
    )
    assert (tmp_path / "file").read_text() == "precious"

    # Recovery pairs the documents: the teacher's tokenizer has to find as many.
    words = save_model(tmp_path / "words", max_position_embeddings=4096)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["one two"])
    tokenizer.save_pretrained(words)
    documents = tmp_path / "two.jsonl"
    documents.write_text("".join(json.dumps({"text": word * 40}) + "\n" for word in ("one two ", "dog and cat ")))
    long = ["--long_files", str(documents), "--long_lengths", "120"]
    refused("120 tokens in the same number of documents: 1 for teacher, 2 for mine", "--teacher", str(words), *long)


def test_a_run_that_ends_early_keeps_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Source.load

    def interrupted(source: Source, *arguments: Any) -> Any:
        if source.label == "last":
            raise KeyboardInterrupt
        return load(source, *arguments)

    monkeypatch.setattr(Source, "load", interrupted)
    model, output = str(save_model(tmp_path / "model")), tmp_path / "out"
    evaluate = ["evaluate", "--device", "cpu", "--long_files", "bundled", "--long_lengths", "32", "--model"]
    models = ["--teacher", model, "--compare", f"last={model}", "--output_dir", str(output)]
    assert main([*evaluate, f"mine={model}", *models]) == 130
    content = json.loads((output / "evaluation.json").read_text())
    assert [entry["label"] for entry in content["models"]] == ["teacher", "mine"]
    assert "| perplexity, at 32 |" in (output / "evaluation.md").read_text()
    # And can be compared with, in the same directory.
    monkeypatch.setattr(Source, "load", load)
    reports = ["--teacher", f"teacher={output}/evaluation.json", "--compare", f"mine={output}/evaluation.json"]
    assert main([*evaluate, f"last={model}", *reports, "--output_dir", str(output)]) == 0
    again = json.loads((output / "evaluation.json").read_text())
    assert [entry["label"] for entry in again["models"]] == ["teacher", "last", "mine"]


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("books.jsonl", '{"text": "one"}\n{"text": ', "line 2 of"),
        ("books.jsonl", '{"title": "one"}', "has no field 'text'"),
        ("books.jsonl", "", "the long files have no documents"),
        ("books.csv", "one", "neither .jsonl nor .txt"),
    ],
)
def test_bad_long_files(
    name: str, content: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    assert main(["evaluate", "--device", "cpu", "--long_files", str(tmp_path / name)]) == 2
    shown = capsys.readouterr().err
    assert reason in shown
    assert len(shown.splitlines()) == 1


def test_documents_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Sequence[str | Path]] = []

    def counted(files: Sequence[str | Path]) -> Iterator[str]:
        reads.append(files)
        return read_texts(files)

    monkeypatch.setattr("linearard.suite.long_text.read_texts", counted)
    model = str(save_model(tmp_path / "model"))
    lengths = ["--long_files", "bundled", "--long_lengths", "32", "64", "--output_dir", str(tmp_path / "out")]
    assert main(["evaluate", "--device", "cpu", "--model", model, "--compare", f"again={model}", *lengths]) == 0
    assert len(reads) == 1
