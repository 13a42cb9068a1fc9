"""benchmarks/training.py and benchmarks/training_report.py: a run of two seeds on a tiny model, and its table."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import yaml
from tiny_models import save_model, write_text

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ROWS = {
    "lambada_openai": [{"context": "the old man went down to the", "continuation": "river"}] * 3,
    "arc_easy": [{"query": "a question", "choices": ["one", "two", "three"], "gold": 1}] * 2,
    "boolq": [{"query": "is it so", "choices": ["yes", "no"], "gold": gold} for gold in (0, 1)],
    "openbook_qa": [{"query": "rivers", "choices": ["run", "are made of stone"], "gold": 0}] * 2,
}


def run(script: str, *arguments: str) -> None:
    """The script in this process: importing torch again would take most of the test's time."""
    with patch.object(sys, "argv", [script, *arguments]), patch.object(sys, "path", [str(BENCHMARKS), *sys.path]):
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")


def test_runs_of_two_seeds_and_their_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "model", initializer_range=0.1)
    write_text(tmp_path, 40_000)
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ard: dict[str, float] = {"max_steps": 2, "per_device_train_batch_size": 1, "sequence_length": 32, "lora_rank": 4}
    ard["repeated_share"] = 0.25
    settings = [
        {"name": "teacher", "teacher": True},
        {"name": "PI x4 untrained"},
        {"name": "short", "needs": [0, 1e9], "ard": {**ard, "max_steps": [1, 2]}},
        {"name": "both", "seeds": [1, 2], "ard": ard, "cpt": {"max_steps": 2, "sequence_length": 96}},
        {"name": "fails", "cpt": {"max_steps": 1, "sequence_length": 100_000}},
        {"name": "has no time", "needs": 1e9},
    ]
    (tmp_path / "settings.yaml").write_text(
        yaml.safe_dump([{**run, "scores": ["short", "perplexity"]} for run in settings])
    )
    (tmp_path / "claims").mkdir()  # as a worker: the command would start processes
    output = tmp_path / "out.jsonl"
    text = str(tmp_path / "text.jsonl")
    arguments = [
        "training.py", str(tmp_path / "settings.yaml"), "--output", str(output), "--model", str(tmp_path / "model"),
        "--train_files", text, "--heldout_files", text, "--tasks", str(tmp_path), "--commit", "abc",
        "--seconds", "1e6", "--claims", str(tmp_path / "claims"),
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="1"):  # one fails, and the others go on
        run(*arguments)
    with pytest.raises(SystemExit, match="0"):  # nothing is left to do
        run(*arguments)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    stages = [(line["name"], line["seed"], line["stage"]) for line in lines]
    seeds = [("both", seed, stage) for seed in (1, 2) for stage in ("ard", "cpt")]
    assert stages == [
        ("teacher", 1, "teacher"),
        ("PI x4 untrained", 1, "untrained"),
        ("short, 1 steps", 1, "ard"),
        *seeds,
    ]
    assert all(
        line["commit"] == "abc" and 0 <= line["dev4"] <= 1 and line["lam"] > 0 and line["ppl"] > 0 for line in lines
    )
    assert lines[2]["tokens"] == 32
    trained = lines[4]
    assert trained["tokens"] == 2 * 32 + 2 * 96
    assert trained["dev4"] == pytest.approx(
        (trained["lambada"] + trained["arc_easy"] + trained["boolq"] + trained["openbook_qa"]) / 4
    )
    assert trained["boolq"] == 0.5
    (tmp_path / "costs").mkdir()
    with pytest.raises(SystemExit, match="0"):
        run(*arguments[:-1], str(tmp_path / "costs"), "--cost")
    costs = [json.loads(line) for line in output.read_text().splitlines()][len(lines) :]
    assert [(line["name"], line["stage"]) for line in costs] == [("short", "cost")]
    assert costs[0]["step_seconds"] > 0
    assert 0 < costs[0]["relation_kl_share"] < 1
    capsys.readouterr()
    run("training_report.py", str(output), "--picture", str(tmp_path / "picture.png"))
    rows = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line}
    assert "| 100.0 % |" in rows["teacher"]
    assert "| 0.0 % |" in rows["PI x4 untrained"]
    assert "±" in rows["both: after CPT"]
    assert rows[""].split(" | ")[1:] == ["ms a step", "GiB", "0.00M", "passkey |"], "the second table is the last"
    assert "/" in rows["short"]
    assert (tmp_path / "picture.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("chosen", "count", "expected"),
    [(None, 2, ["0", "1"]), ("3,5", 2, ["3", "5"]), ("GPU-abc", 1, ["GPU-abc"]), ("", 0, [""]), (None, 0, [""])],
)
def test_workers_keep_the_choice_of_gpus_and_tell_of_failures(
    chosen: str | None, count: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    started: list[str] = []

    def start(command: list[str], env: dict[str, str]) -> SimpleNamespace:
        started.append(env["CUDA_VISIBLE_DEVICES"])
        return SimpleNamespace(wait=lambda: int(env["CUDA_VISIBLE_DEVICES"] == expected[0]))

    monkeypatch.setattr("subprocess.Popen", start)
    with pytest.raises(SystemExit, match="not all runs succeeded"):
        run("training.py", "none.yaml", "--output", "none", "--train_files", "none", "--heldout_files", "none",
            "--tasks", "none")  # fmt: skip
    assert started == expected
