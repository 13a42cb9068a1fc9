"""Recipes on random weights: every recipe of the package runs, on a shrunken copy of its architecture."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tiny_models import save_model

from linearard.cli import main
from linearard.recipe import RECIPES, load_recipe, recipes
from linearard.trial import relation_share

BIG = [name for name in recipes() if "architecture" in load_recipe(name)]
SHRUNKEN = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96,
}  # fmt: skip
SHORT = {"sequence_length": 48, "gradient_accumulation_steps": 2, "lora_rank": 4}


def shrunken(name: str, directory: Path, **changes: Any) -> Path:
    """A copy of a recipe with small matrices and short sequences."""
    recipe = load_recipe(name)
    recipe |= {**SHORT, "architecture": {**recipe["architecture"], **SHRUNKEN}, "report_to": "none", "use_cpu": True}
    recipe["cpt"] |= {"sequence_length": 64}
    recipe["longred"] |= {"sequence_length": 64, "short_length": 16, "short_to_long_length": 32}
    file = directory / "recipe.yaml"
    file.write_text(yaml.safe_dump({**recipe, **changes}))
    return file


@pytest.mark.parametrize("name", BIG)
@pytest.mark.parametrize("stages", [["ard", "cpt"], ["longred"]], ids=["ard cpt", "longred"])
def test_recipes_run_with_random_weights(
    name: str, stages: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    recipe = shrunken(name, tmp_path)
    given = ["--recipe", str(recipe), "--random_weights", "true", "--limit_steps", "4", "--output_dir", str(output)]
    assert main(["restore", *given, "--stages", *stages]) == 0
    found = json.loads((output / "metrics.json").read_text())
    assert list(found["stages"]) == stages
    tokens = {"ard": 2 * 48, "cpt": 64, "longred": 8 * 64 + 2 * 32 + 6 * 16}
    for stage, cost in found["stages"].items():
        assert cost["steps"] == 4
        assert cost["tokens_per_second"] == pytest.approx(tokens[stage] / cost["step_seconds"])
        assert cost["stage_seconds"] > 3 * cost["step_seconds"] > 0
        assert cost["peak_memory_bytes"] > 0
        assert (0 < cost["relation_kl_share"] < 1) == (stage == "ard")
    assert "relation KL" in capsys.readouterr().out
    assert not (output / "model").exists()


def test_an_architecture_of_the_model_itself(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    output = tmp_path / "run"
    given = ["--model", str(model), "--random_weights", "true", "--limit_steps", "1", "--sequence_length", "32"]
    assert main(["restore", *given, "--output_dir", str(output), "--use_cpu", "--report_to", "none"]) == 0
    cost = json.loads((output / "metrics.json").read_text())["stages"]["ard"]
    assert cost["step_seconds"] > 0


def test_an_architecture_of_no_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--architecture", '{"model_type": "clip"}', "--random_weights", "true", "--use_cpu"]
    assert main(["restore", *given, "--output_dir", str(tmp_path / "run"), "--report_to", "none"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("linearard: architecture is no configuration of a language model")


def test_there_is_nothing_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, output = save_model(tmp_path / "model"), tmp_path / "run"
    (output / "model").mkdir(parents=True)  # of a finished run
    kept = [output / name for name in ("run.yaml", "progress.json", "metrics.json", "model/weights")]
    for file in kept:
        file.write_text("{}")
    given = ["restore", "--model", str(model), "--random_weights", "true", "--output_dir", str(output), "--use_cpu"]
    assert main([*given, "--report_to", "none", "--resume_from_checkpoint", "last"]) == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert all(file.read_text() == "{}" for file in kept)


def test_a_share_counts_each_moment_once() -> None:
    def event(key: str, own: float, total: float, caller: SimpleNamespace | None = None) -> SimpleNamespace:
        return SimpleNamespace(key=key, self_cpu_time_total=own, cpu_time_total=total, cpu_parent=caller)

    outer = event("linearard::relation_kl_forward", 1, 4)
    inner = event("linearard::relation_kl_forward", 1, 3, outer)
    events = [outer, inner, event("aten::mul", 2, 2, inner), event("aten::mm", 6, 6)]
    assert relation_share(events, on_gpu=False) == pytest.approx(0.4)


def test_a_share_on_a_gpu_is_that_of_its_kernels() -> None:
    def event(key: str, device: str, begin: float, end: float, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            key=key,
            device_type=SimpleNamespace(name=device),
            time_range=SimpleNamespace(start=begin, end=end),
            is_user_annotation=annotation,
        )

    events = [
        event("linearard::relation_kl_forward", "CPU", 0, 20),
        event("nvjet_gemm", "CUDA", 10, 16),
        event("void linearard::cuda::triangular::finish_forward_kernel()", "CUDA", 4, 7),  # waits until 6
        event("void linearard::cuda::sm90::forward_kernel<128>()", "CUDA", 3, 6),
        event("Optimizer.step#AdamW.step", "CUDA", 0, 20, annotation=True),
    ]
    assert relation_share(events, on_gpu=True) == pytest.approx(0.4)


@pytest.mark.parametrize("name", recipes())
def test_every_value_of_a_recipe_says_where_it_is_from(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    assert "paper" in text
    for setting in ("scaling", "relations", "logits_weight", "logits_positions", "learning_rate", "max_steps"):
        line = next(line for line in text.splitlines() if line.startswith(f"{setting}:"))
        before = text.splitlines()[text.splitlines().index(line) - 1]
        assert "#" in line or before.startswith("#"), line
