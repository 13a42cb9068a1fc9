"""Figures, task files, perplexity by position, synthetic prompts, decoding, and the report of `linearard evaluate`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_llama, make_tokenizer, random_ids, save_model
from tokenizers import pre_tokenizers
from transformers import BloomConfig, LlamaConfig

from linearard.cli import main
from linearard.data import read_texts
from linearard.errors import UserError
from linearard.suite.config import SuiteConfig
from linearard.suite.figures import ACCURACY, NLL, Figure, gap_closed, mean_of_tasks, share_of_teacher
from linearard.suite.long_text import document_windows, perplexity_figures, position_losses, read_documents
from linearard.suite.report import write_report
from linearard.suite.retrieval import answers
from linearard.suite.run import Plan, Results
from linearard.suite.sources import Source, check_context, context_range
from linearard.suite.synthetic import SYNTHETIC_TASKS, Prompt, make_prompt, score
from linearard.suite.task_files import find_files, load_task


def accuracy(*values: float) -> Figure:
    return Figure("task", ACCURACY, values)


def test_standard_errors() -> None:
    estimate = accuracy(1, 1, 1, 0).estimate
    assert (estimate.value, estimate.error) == (0.75, pytest.approx(math.sqrt(0.75 * 0.25 / 4)))
    estimate = Figure("x", NLL, (1.0, 3.0)).estimate
    assert (estimate.value, estimate.error) == (2.0, pytest.approx(1.0))  # sqrt(2) / sqrt(2)
    assert math.isnan(Figure("x", NLL, (1.0,)).estimate.error)
    mean = mean_of_tasks([accuracy(1, 0), accuracy(1, 1, 1, 0)])
    assert (mean.value, mean.error) == (0.625, pytest.approx(math.sqrt(0.125 + 0.046875) / 2))


def test_recovery() -> None:
    share = share_of_teacher([accuracy(1, 0, 0, 0)], [accuracy(1, 1, 0, 0)])
    # Residuals a - b / 2: 1/2, -1/2, 0, 0; variance 1/8, over 4 examples, over the teacher's 1/2.
    assert share is not None
    assert (share.value, share.error) == (0.5, pytest.approx(math.sqrt(0.125 / 4) / 0.5))
    assert share_of_teacher([accuracy(1)], [accuracy(0)]) is None
    nll = [Figure("x", NLL, values) for values in ((2.0, 2.0), (5.0, 7.0), (1.0, 1.0))]
    gap = gap_closed(*nll)
    assert gap is not None
    assert gap.value == pytest.approx(0.8)
    # Residuals (s - m) - 0.8 (s - t): -0.2 and 0.2; their variance 0.08, over 2, over the damage of 5.
    assert gap.error == pytest.approx(math.sqrt(0.08 / 2) / 5)
    assert gap_closed(nll[0], nll[2], nll[2]) is None
    with pytest.raises(UserError, match="measured on 1 and on 2 examples"):
        share_of_teacher([accuracy(1)], [accuracy(1, 1)])


def test_position_losses_are_those_of_all_logits() -> None:
    model, ids = make_llama(), random_ids(1, 60)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    torch.testing.assert_close(position_losses(model, ids), expected)
    whole, first, last = perplexity_figures(model, [ids], 40)
    assert whole.values[0] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert first.positions == (0, 40)
    assert first.values[0] == pytest.approx(float(expected[:39].mean()), rel=1e-5)
    assert last.positions == (40, 60)
    assert last.values[0] == pytest.approx(float(expected[39:].mean()), rel=1e-5)


def test_the_head_never_sees_all_positions() -> None:
    model, seen = make_llama(max_position_embeddings=2048), []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-2]))
    position_losses(model, random_ids(1, 1300))
    assert sum(seen) >= 1299
    assert max(seen) <= 512


def test_documents_that_are_too_short() -> None:
    with pytest.raises(UserError, match=r"none of 8 has 1 windows of 1,000,000 tokens"):
        document_windows(read_documents(["bundled"]), make_tokenizer(), 1_000_000, 1)


@pytest.mark.parametrize("name", SYNTHETIC_TASKS)
@pytest.mark.parametrize("length", [2048, 8192])
def test_prompts_fit_and_are_deterministic(name: str, length: int) -> None:
    tokenizer = make_tokenizer()
    prompt = make_prompt(name, tokenizer, length, 50, seed=3, index=0)
    used = len(prompt.ids) + prompt.new_tokens
    assert 0.9 * length < used <= length
    assert prompt.ids[0] == tokenizer.bos_token_id
    assert prompt == make_prompt(name, tokenizer, length, 50, seed=3, index=0)
    assert prompt.answers != make_prompt(name, tokenizer, length, 50, seed=4, index=0).answers
    text = tokenizer.decode(prompt.ids)
    assert all(answer in text for answer in prompt.answers)
    assert score(prompt.answers, ", ".join(prompt.answers), name) == 1
    assert score(prompt.answers, "nothing", name) == 0


def test_the_space_before_a_number_belongs_to_the_prompt() -> None:
    tokenizer = make_tokenizer()

    def end(name: str) -> str:
        return str(tokenizer.decode(make_prompt(name, tokenizer, 2048, 50, seed=3, index=0).ids))[-8:]

    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(digits)
    assert end("passkey") == " key is "
    tokenizer.add_tokens([" " + make_prompt("passkey", tokenizer, 2048, 50, seed=3, index=0).answers[0]])
    assert end("passkey").endswith(" key is")


@pytest.mark.parametrize("name", [name for name, task in SYNTHETIC_TASKS.items() if task.has_depth])
def test_depth_is_where_the_needle_is(name: str) -> None:
    tokenizer = make_tokenizer()
    for depth in (0, 50, 100):
        prompt = make_prompt(name, tokenizer, 8192, depth, 0, 0)
        text = tokenizer.decode(prompt.ids)
        assert text.index(prompt.answers[0]) / len(text) == pytest.approx(depth / 100, abs=0.12)


def test_scores() -> None:
    assert score(("12345",), " 12345. Remember it.", "passkey") == 1
    assert score(("12345",), " 123456", "passkey") == 0
    assert score(("12345",), " 54321 or 12345", "passkey") == 0
    assert score(("12", "34", "56", "78"), "12, 56", "needle_multivalue") == 0.5


@pytest.mark.parametrize(("name", "length"), [("passkey", 64), ("common_words", 512)])
def test_a_task_without_room(name: str, length: int) -> None:
    with pytest.raises(UserError, match=f"{name} at {length} does not fit"):
        make_prompt(name, make_tokenizer(), length, 0, 0, 0)


def test_decoding_is_greedy_whatever_the_batch() -> None:
    model, tokenizer = make_llama(), make_tokenizer()
    prompts = [Prompt(random_ids(1, length, length)[0].tolist(), ("x",), 5) for length in (9, 20, 13)]
    expected = []
    for prompt in prompts:
        ids = list(prompt.ids)
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        expected.append(tokenizer.decode(ids[len(prompt.ids) :], skip_special_tokens=True))
    seen: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-2]))
    assert answers(model, tokenizer, prompts, batch=3) == expected
    assert max(seen) == 1, "logits of the whole prompt were computed"
    assert answers(model, tokenizer, prompts, batch=1) == expected


def test_context_ranges() -> None:
    assert context_range(LlamaConfig(max_position_embeddings=100)) == 100
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 100}
    assert context_range(LlamaConfig(max_position_embeddings=100, rope_parameters=yarn)) == 400
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    assert context_range(LlamaConfig(max_position_embeddings=400, rope_parameters=linear)) == 400
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    assert context_range(LlamaConfig(max_position_embeddings=100, rope_parameters=dynamic)) == 400
    assert context_range(BloomConfig()) > 2**40
    with pytest.raises(UserError, match=r"--lengths: .* 101 tokens is longer than the range of the model 'm', 100 tok"):
        check_context("m", LlamaConfig(max_position_embeddings=100), 101, "lengths")


@pytest.mark.parametrize("scaling", ["", "@linear:4", "@ntk:4", "@dynamic:4", "@yarn:4"])
def test_the_configuration_says_what_the_loaded_model_will_have(scaling: str, tmp_path: Path) -> None:
    source, config = Source.parse(f"{save_model(tmp_path / 'model')}{scaling}"), SuiteConfig()
    loaded = source.load(config, torch.device("cpu"))[0].config
    assert source.load_config(config).rope_parameters == loaded.rope_parameters
    assert context_range(source.load_config(config)) == context_range(loaded) == 64 * (4 if scaling else 1)


def test_sources() -> None:
    source = Source.parse("YaRN=some/model@yarn:4,theta=1e6")
    assert (source.label, source.model) == ("YaRN", "some/model")
    assert source.scaling is not None
    assert source.scaling.theta == 1e6
    assert Source.parse("some/model", "teacher").label == "teacher"
    with pytest.raises(UserError, match="is written"):
        Source.parse("=x")


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ('{"query": "q", "choices": ["a", "b"], "gold": 0}\n{"query"', "line 2 of .* is not JSON"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', "line 1 of .* 'gold' from 0 to 1, got 2"),
        ('{"query": "q", "choices": ["a"], "gold": 0}', "line 1 of .* at least two texts"),
        ('{"query": "q"}', "line 1 of .* needs a field 'context'"),
        ('{"context": "a b"}', "needs a field 'continuation'"),
        ("", "has no examples"),
    ],
)
def test_bad_task_files(lines: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text(lines)
    with pytest.raises(UserError, match=reason):
        load_task(file, None, None)


def test_task_files_are_found(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    assert find_files("passkey") is None
    assert find_files(str(file)) == [(file, None)]
    assert find_files(f"boolq={file}") == [(file, "boolq")]
    with pytest.raises(UserError, match=r"has no \.jsonl files"):
        find_files(str(tmp_path))
    with pytest.raises(UserError, match=r"unknown task template 'x' .* known: arc_easy, boolq"):
        find_files(f"x={file}")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"depths": [101.0]}, "depths must be percentages"),
        ({"lengths": [0]}, "lengths must be at least 1"),
        ({"tasks": ["passkey"], "output": "x.json"}, "--output belongs"),
        ({"tasks": ["passkey"], "heldout_length": 32}, "--heldout_length belongs to the short evaluation"),
        ({"scaled": "x@linear:4"}, "--scaled belongs to the report: give --tasks or --long_files"),
        ({"output_dir": "x"}, "--output_dir belongs to the report"),
        ({"depths": [0.0]}, "--depths belongs to the report"),
        ({"dtype": "int4"}, "unknown dtype"),
    ],
)
def test_bad_settings(settings: dict, reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)):
        SuiteConfig(**settings)


def test_every_option_is_explained() -> None:
    assert [field.name for field in fields(SuiteConfig) if not field.metadata.get("help")] == []


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

    results = Results({"m": [accuracy(1, 0)]}, {"m": "m"}, {})
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
