"""Restorations of several stages: one command, one recipe, resumable anywhere, plain checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_cli import SMALL, assert_refused
from tiny_models import CONTEXT, random_ids, save_model, write_text
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from linearard.cli import main
from linearard.errors import UserError
from linearard.evaluation import Evaluation
from linearard.models import load_model
from linearard.recipe import make_recipe, split_arguments
from linearard.restore import ProgressReport
from linearard.run_directory import RunProgress

CPT = ["--cpt.sequence_length", "96", "--cpt.max_steps", "4", "--cpt.learning_rate=3e-3"]
LONGRED = ["--longred.sequence_length", "96", "--longred.short_length", "16", "--longred.short_to_long_length", "48",
           "--longred.max_steps", "2", "--longred.learning_rate", "1e-3"]  # fmt: skip


def arguments(tmp_path: Path, output: Path, *more: str) -> list[str]:
    model = tmp_path / "model"
    if not model.exists():
        save_model(model, initializer_range=0.1)
        write_text(tmp_path, 40_000)
    text = str(tmp_path / "text.jsonl")
    return ["restore", "--model", str(model), "--train_files", text, "--output_dir", str(output), *SMALL,
            "--report_to", "none", *more]  # fmt: skip


def metrics(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "metrics.json").read_text())
    return content


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


def test_both_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert main(arguments(tmp_path, output, "--rope", "yarn:4", "--stages", "ard", "cpt", *CPT)) == 0
    assert "CPT" in capsys.readouterr().out
    found = metrics(output)
    assert list(found["stages"]) == ["ard", "cpt"]
    assert found["stages"]["ard"]["tokens"] == 8 * 4 * 32
    assert found["stages"]["cpt"]["tokens"] == 4 * 96
    assert found["tokens"] == 8 * 4 * 32 + 4 * 96
    assert found["restored"] == found["stages"]["cpt"]["evaluation"] != found["stages"]["ard"]["evaluation"]
    assert set(found["restored"]["relation_kl"]) == {"query", "key", "value", "attention"}
    parts = {name for name in found["stages"]["ard"]["log"][0] if name.endswith("_kl")}
    assert parts == {"value_kl", "attention_kl", "logits_kl"}, "the default"
    restored = AutoModelForCausalLM.from_pretrained(output / "model")
    assert restored.config.rope_parameters["rope_type"] == "yarn"
    assert restored.config.max_position_embeddings == 4 * CONTEXT
    between = weights(output / "ard" / "model")
    assert not torch.equal(between["lm_head.weight"], restored.state_dict()["lm_head.weight"]), "CPT trains all"
    with torch.no_grad():
        assert restored(random_ids(1, 200)).logits.isfinite().all()
    saved = yaml.safe_load((output / "run.yaml").read_text())
    assert saved["cpt"] == {"sequence_length": 96, "max_steps": 4, "learning_rate": 3e-3}


class Interrupt(TrainerCallback):
    """Ends a run as Ctrl-C does, at a step of one stage."""

    def __init__(self, stage: str, step: int) -> None:
        self._stage, self._step = stage, step

    def __call__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def on_step_end(report: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if Path(args.output_dir).name == self._stage and state.global_step == self._step:
                raise KeyboardInterrupt

        monkeypatch.setattr(ProgressReport, "on_step_end", on_step_end)


@pytest.mark.parametrize(
    ("stage", "step"), [("ard", 6), ("cpt", 1), ("cpt", 3)], ids=["in ARD", "between the stages", "in CPT"]
)
def test_a_stopped_run_ends_with_the_same_weights(
    stage: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = ["--stages", "ard", "cpt", *CPT, "--save_strategy", "steps", "--save_steps", "2"]
    assert main(arguments(tmp_path, tmp_path / "whole", *saving)) == 0
    stopped = arguments(tmp_path, tmp_path / "stopped", *saving)
    with pytest.MonkeyPatch.context() as patch:
        Interrupt(stage, step)(patch)
        assert main(stopped) == 130
    trusted = []

    def load(name: str, *, trust_remote_code: bool = False, **settings: Any) -> PreTrainedModel:
        trusted.append(trust_remote_code)
        return load_model(name, **settings)

    monkeypatch.setattr("linearard.restore.load_model", load)
    if stage == "cpt":  # what is finished is not needed any more
        shutil.rmtree(tmp_path / "stopped" / "ard" / "checkpoint-8")
    assert main([*stopped, "--resume_from_checkpoint", "last", "--trust_remote_code", "true"]) == 0
    assert trusted
    assert all(trusted), "the model between the stages brings the same code"
    first, second = metrics(tmp_path / "whole"), metrics(tmp_path / "stopped")
    for name in ("ard", "cpt"):
        losses = [[entry["loss"] for entry in found["stages"][name]["log"]] for found in (first, second)]
        assert losses[0] == losses[1]
    assert first["restored"] == second["restored"]
    expected, found = (weights(tmp_path / name / "model") for name in ("whole", "stopped"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_finished_run_has_nothing_to_resume(tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert main(arguments(tmp_path, output)) == 0
    before = metrics(output)
    assert main(arguments(tmp_path, output, "--resume_from_checkpoint", "last")) == 0
    assert metrics(output)["stages"] == before["stages"]


def test_resuming_from_a_checkpoint_of_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saving = ["--stages", "cpt", *CPT, "--save_strategy", "steps", "--save_steps", "2"]
    assert main(arguments(tmp_path, tmp_path / "other", *saving)) == 0
    resume = [*saving, "--resume_from_checkpoint", str(tmp_path / "other" / "cpt" / "checkpoint-2")]

    mine = tmp_path / "mine"
    (mine / "model").mkdir(parents=True)
    files = [mine / "model" / "precious.bin", mine / "metrics.json"]
    for file in files:
        file.write_text("precious")
    assert_refused(arguments(tmp_path, mine, *resume), "is not empty, and no run that could be resumed", capsys)
    assert all(file.read_text() == "precious" for file in files)
    assert sorted(path for path in mine.rglob("*") if path.is_file()) == sorted(files)

    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "new", tmp_path / "empty", tmp_path / "new"):
        assert main(arguments(tmp_path, output, *resume)) == 0
        assert (output / "run.yaml").is_file()
        assert metrics(output)["restored"] == metrics(tmp_path / "other")["restored"]


@pytest.mark.parametrize(
    ("setting", "value", "shown"),
    [
        ("scaling", ["yarn:8"], "scaling linear:4, yarn:8 was asked for"),
        ("relations", ["key", "query:2"], "relations value attention, key query:2 was asked for"),
        ("stages", ["ard", "cpt"], "stages ard, ard cpt was asked for"),
        ("native_context", ["32"], "native_context None, 32 was asked for"),
        ("heldout_windows", ["3"], "heldout_windows 4, 3 was asked for"),
    ],
)
def test_a_run_is_resumed_with_its_settings(
    setting: str, value: list[str], shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    made = make_recipe(arguments(tmp_path, output, "--max_steps", "1")[1:])
    output.mkdir()
    made.save(output / "run.yaml")
    measured = Evaluation(1.0, 1.0, 1.0)
    progress = RunProgress.begin(made)
    progress.teacher = progress.scaled = measured
    progress.save()
    resume = [f"--{setting}", *value, "--resume_from_checkpoint", "last"]
    if setting == "heldout_windows":
        resume += ["--max_steps", "7"]  # which may change
    assert_refused(arguments(tmp_path, output, *resume), f"has {shown}", capsys)
    RunProgress.load(made)
    # An earlier version wrote no settings.
    content = json.loads((output / "progress.json").read_text())
    del content["settings"], content["seconds"]
    (output / "progress.json").write_text(json.dumps(content))
    RunProgress.load(make_recipe(arguments(tmp_path, output, *resume)[1:]))


def test_seconds_of_a_resumed_run_are_those_of_all_of_it(tmp_path: Path) -> None:
    output = tmp_path / "run"
    given = arguments(tmp_path, output, "--save_strategy", "steps", "--save_steps", "2")
    with pytest.MonkeyPatch.context() as patch:
        Interrupt("ard", 5)(patch)
        assert main(given) == 130
    seconds = output / "ard" / "checkpoint-4" / "seconds.json"
    assert 0 < float(seconds.read_text()) < 600
    seconds.write_text("1000.0")
    progress = json.loads((output / "progress.json").read_text())
    assert progress["seconds"]["total"] > progress["seconds"]["evaluate"] > 0
    progress["seconds"] |= {"evaluate": 500.0, "total": 510.0}
    (output / "progress.json").write_text(json.dumps(progress))
    for _ in range(2):  # the second time there is nothing left to do
        assert main([*given, "--resume_from_checkpoint", "last"]) == 0
        found = metrics(output)
        assert 1000 < found["stages"]["ard"]["seconds"] < 1500
        assert 1000 < found["seconds"]["train"] < 1500 < 1510 < found["seconds"]["total"] < 2000
        assert 500 < found["seconds"]["evaluate"] < 1000


@pytest.mark.parametrize(
    ("stages", "more"),
    [(["cpt"], CPT), (["longred"], LONGRED), (["none"], [])],
    ids=["CPT alone", "LongReD", "scaling alone"],
)
def test_baselines_by_the_same_command(stages: list[str], more: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert main(arguments(tmp_path, output, "--stages", *stages, *more)) == 0
    found = metrics(output)
    assert list(found["stages"]) == [name for name in stages if name != "none"]
    assert found["teacher"]["perplexity"] != found["scaled"]["perplexity"]
    assert (found["restored"] == found["scaled"]) == (stages == ["none"])
    restored = AutoModelForCausalLM.from_pretrained(output / "model")
    assert restored.config.rope_parameters["factor"] == 4
    if stages == ["longred"]:
        assert found["tokens"] == 2 * (8 * 96 + 2 * 48 + 6 * 16)


def test_settings_of_sections(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {"stages": ["ard", "cpt"], "max_steps": 5, "seed": 3, "cpt": {"max_steps": 7, "learning_rate": 1e-5}}
        )
    )
    made = make_recipe(["--recipe", str(recipe), "--cpt.learning_rate", "2e-5", "--limit_steps", "6", "--use_cpu"])
    cpt = made.stage("cpt")
    assert (made.run.max_steps, cpt.max_steps, cpt.learning_rate) == (5, 6, 2e-5)
    assert cpt.seed == 3, "taken over from the run"
    assert cpt.use_cpu
    assert (cpt.sequence_length, cpt.trainable) == (16384, ["all"]), "its own defaults"
    assert Path(str(cpt.output_dir)).name == "cpt"
    assert split_arguments(["--a", "1", "--cpt.b", "2", "3", "--c.d", "--longred.e=4"]) == {
        "": ["--a", "1", "--c.d"], "cpt": ["--b", "2", "3"], "longred": ["--e=4"],
    }  # fmt: skip


def test_what_sections_take_over() -> None:
    given = {
        "tf32": "false", "cuda_graphs": "false", "liger_kernels": "false", "logging_strategy": "epoch",
        "logging_first_step": "true", "data_seed": "4", "full_determinism": "true", "save_only_model": "true",
        "run_name": "mine",
    }  # fmt: skip
    options = [f"--{name}={value}" for name, value in given.items()]
    made = make_recipe([*options, "--use_cpu", "--longred.run_name", "its"])
    plain = make_recipe(["--use_cpu"]).stage("cpt")
    for name in given:
        assert getattr(made.run, name) == getattr(made.stage("cpt"), name) != getattr(plain, name)
    assert made.stage("longred").run_name == "its"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["--stages", "cpt", "ard"], "stages 'cpt ard' are none of"),
        (["--cpt.no_such_option", "1"], "unrecognized arguments: --no_such_option"),
        (["--cpt.max_steps", "0"], "max_steps must be at least 1"),
        (["--temperature", "0"], "temperature must be larger than 0"),
        (["--gradients", "none"], "unknown gradients 'none'"),
        (["--gradients", "local"], "set logits_weight to 0 or gradients to full"),
        (["--gradients", "local", "--logits_weight", "0.5"], "logits need a pass through the whole student"),
        (["--layers", "0", "1", "--layer_weights", "1"], "1 layer_weights for 2 layers"),
        (["--layer_weights", "1", "0"], "layer_weights must be larger than 0"),
        (["--architecture", "{"], "architecture is not JSON"),
    ],
)
def test_bad_options(given: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        make_recipe(given)


def test_unknown_key_of_a_section(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"cpt": {"learnin_rate": 1}}))
    with pytest.raises(UserError, match=r"unknown key 'learnin_rate' .* did you mean 'learning_rate'"):
        make_recipe(["--recipe", str(recipe)])


def test_texts_that_are_too_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(tmp_path, tmp_path / "run", "--stages", "cpt", "--cpt.sequence_length", "200")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "too short"}) + "\n")
    assert_refused(given, "the training data are too short: not one block of 200 tokens", capsys)
    assert not (tmp_path / "run").exists()


def test_divergence_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(
        tmp_path, tmp_path / "run", "--stages", "cpt", *CPT, "--cpt.learning_rate", "1e30", "--cpt.warmup_steps", "0",
        "--cpt.max_grad_norm", "0", "--save_strategy", "steps", "--save_steps", "1",
    )  # fmt: skip
    assert_refused(given, "training diverged at step", capsys)
    assert not (tmp_path / "run" / "model").exists()
