"""Tasks by lm-evaluation-harness against log-likelihoods computed by hand, without any network."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_models import make_llama, make_tokenizer, save_model

from linearard.cli import main
from linearard.suite.task_files import load_task

ROWS = [
    {"query": "the cat saw the", "choices": ["dog", "small house"], "gold": 0},
    {"query": "it was said that", "choices": ["no", "letters came", "x"], "gold": 1},
]
installed = importlib.util.find_spec("lm_eval") is not None


def log_likelihood(model: torch.nn.Module, context: str, continuation: str) -> float:
    tokenizer = make_tokenizer()
    before, ids = (tokenizer(text)["input_ids"] for text in (context, context + continuation))
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(scores[place - 1, ids[place]] for place in range(len(before), len(ids))))


@pytest.mark.skipif(not installed, reason="lm-eval is not installed")
def test_figures_are_those_computed_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from linearard.suite.harness import HarnessModel, local_figures

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used, or a program was run")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)  # as for a report on the machine, which takes seconds
    model = make_llama(max_position_embeddings=256)
    harness = HarnessModel(model, make_tokenizer(), 2)
    for template, end in (("arc_easy", "\nAnswer:"), ("openbook_qa", "")):
        file = tmp_path / f"{template}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        figures = {figure.variant: figure for figure in local_figures(harness, load_task(file, None, None))}
        plain, normalised = [], []
        for row in ROWS:
            scores = [log_likelihood(model, row["query"] + end, f" {choice}") for choice in row["choices"]]
            plain.append(float(max(range(len(scores)), key=scores.__getitem__) == row["gold"]))
            per_character = [value / len(choice) for value, choice in zip(scores, row["choices"], strict=True)]
            normalised.append(float(max(range(len(scores)), key=per_character.__getitem__) == row["gold"]))
        main_values, other = (plain, normalised) if template == "arc_easy" else (normalised, plain)
        assert figures[""].values == tuple(main_values)
        assert figures["acc_norm" if template == "arc_easy" else "acc"].values == tuple(other)

    words = tmp_path / "words.jsonl"
    words.write_text('{"context": "the cat saw the", "continuation": "dog"}\n{"context": "one", "word": "two"}\n')
    losses = {figure.metric: figure for figure in local_figures(harness, load_task(words, None, None))}["nll"]
    expected = [-log_likelihood(model, "the cat saw the", " dog"), -log_likelihood(model, "one", " two")]
    assert losses.values == pytest.approx(expected, rel=1e-4)


@pytest.mark.skipif(not installed, reason="lm-eval is not installed")
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(save_model(tmp_path / "model"))
    evaluate = ["evaluate", "--device", "cpu", "--model", model, "--output_dir", str(tmp_path / "out"), "--tasks"]
    assert main([*evaluate, "no_such_task"]) == 2
    assert "unknown task 'no_such_task'" in capsys.readouterr().err
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"context": "word " * 200, "continuation": "word"}))
    assert main([*evaluate, str(file)]) == 2
    assert "longer than the model's range of 64" in capsys.readouterr().err


def test_missing_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("linearard.suite.run.importlib.util.find_spec", lambda name: None)
    assert main(["evaluate", "--model", "./nowhere", "--tasks", "arc_easy"]) == 2
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1
    assert "pip install 'linearard[eval]'" in shown
