"""One source for defaults, recipes and command-line options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from linearard.errors import UserError
from linearard.recipe import chosen_settings, make_recipe, recipes
from linearard.training_config import ARDConfig


@pytest.fixture(autouse=True)
def _without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The `cuda` section of a recipe applies only where a test says so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def make_config(arguments: list[str]) -> ARDConfig:
    return make_recipe(arguments).run


def run_settings(arguments: list[str], gpu: bool) -> dict[str, Any]:
    return chosen_settings(arguments, gpu)[""]


def write_recipe(directory: Path, content: dict[str, Any] | str) -> str:
    file = directory / "recipe.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(file)


def test_command_line_overrides_recipe_overrides_defaults(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, {"max_steps": 7, "learning_rate": "1e-3", "relations": ["query", "value:2"], "layers": [0, 2]}
    )
    config = make_config(["--recipe", recipe, "--max-steps", "9", "--causal", "--trainable", "k_proj"])
    assert config.max_steps == 9
    assert config.learning_rate == 1e-3
    assert config.relations == ["query", "value:2"]
    assert config.layers == [0, 2]
    assert config.causal is True
    assert config.trainable == ["k_proj"]
    assert config.max_grad_norm == ARDConfig().max_grad_norm


def test_cuda_section_applies_on_a_gpu_only(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, {"max_steps": 7, "sequence_length": 32, "cuda": {"max_steps": 70}})
    chosen = ["--recipe", recipe]
    assert run_settings(chosen, gpu=False) == {"max_steps": 7, "sequence_length": 32}
    assert run_settings(chosen, gpu=True) == {"max_steps": 70, "sequence_length": 32}
    assert run_settings([*chosen, "--max_steps", "3"], gpu=True)["max_steps"] == 3
    assert run_settings([*chosen, "--use_cpu"], gpu=True)["max_steps"] == 7


def test_all_logits_are_compared_unless_a_recipe_says_how_many(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, {"logits_positions": 8, "cuda": {"logits_positions": None}})
    assert make_config([]).logits_positions is None
    assert make_config(["--recipe", recipe]).logits_positions == 8
    assert "logits_positions" not in run_settings(["--recipe", recipe], gpu=True), "null is the default"


def test_saved_settings_are_a_recipe(tmp_path: Path) -> None:
    given = ["--max_steps", "3", "--relations", "key", "--lr_scheduler_type", "linear", "--bf16", "false"]
    recipe = make_recipe(given)
    first = recipe.run
    recipe.save(tmp_path / "run.yaml")
    second = make_config(["--recipe", str(tmp_path / "run.yaml")])
    assert second.to_dict() == first.to_dict()
    assert yaml.safe_load((tmp_path / "run.yaml").read_text()) == {
        "max_steps": 3, "relations": ["key"], "lr_scheduler_type": "linear",
    }  # fmt: skip


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_of_the_package_is_valid(name: str) -> None:
    on_cpu = make_config(["--recipe", name])
    on_gpu = run_settings(["--recipe", name], gpu=True)
    assert on_cpu.max_steps > 0
    # The same checks; bfloat16 cannot be asked for without a GPU.
    ARDConfig(**{**on_gpu, "bf16": False})


def test_the_demo_aligns_all_self_relations() -> None:
    for gpu in (False, True):
        relations = run_settings(["--recipe", "demo"], gpu)["relations"]
        assert {"query", "key", "value"} <= {relation.split(":")[0] for relation in relations}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"lerning_rate": 1}, "unknown key 'lerning_rate' .* did you mean 'learning_rate'"),
        ({"cuda": {"max_step": 1}}, "unknown key 'max_step' .* did you mean 'max_steps'"),
        ({"cuda": {"cuda": {}}}, "unknown key 'cuda'"),
        ("[1, 2]", "not a mapping"),
        ("a: [", "not YAML"),
        ("model: !!python/object/apply:os.getcwd []", "not YAML"),
        ({"max_steps": "many"}, "invalid int value: 'many'"),
        ({"use_cpu": "perhaps"}, "perhaps"),
    ],
)
def test_bad_recipes(content: dict[str, Any] | str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        make_config(["--recipe", write_recipe(tmp_path, content)])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--recipe", "nothing"], "no recipe 'nothing'"),
        (["--scaling", "linear:1"], "does not extend"),
        (["--relations", "qq"], "unknown relation 'qq'"),
        (["--logits_positions", "0"], "logits_positions must be at least 1"),
        (["--logits_positions", "few"], "invalid int value: 'few'"),
        (["--divergence", "kl"], "unknown divergence"),
        (["--lora_rank", "-1"], "must not be negative"),
        (["--trainable", "all"], "lora_rank to 0"),
        (["--lora_alpha", "0"], "lora_alpha must be larger than 0"),
        (["--lora_dropout", "1.5"], "lora_dropout must be at least 0 and less than 1, got 1.5"),
        (["--learning_rate", "-1"], "learning_rate must be larger than 0, got -1"),
        (["--cpt.learning_rate", "nan"], "learning_rate must be larger than 0, got nan"),
        (["--eval_strategy", "steps"], "eval_strategy and save_strategy best need evaluation data"),
        (["--cpt.eval_strategy", "epoch"], "need evaluation data"),
        (["--save_strategy", "best"], "need evaluation data"),
        (["--scaling", "yarn:4,attention_factor=0"], "'attention_factor' of the RoPE scaling .* must be larger than 0"),
        (["--scaling", "llama3:8,low_freq_factor=-1"], "'low_freq_factor' .* must be larger than 0"),
        (["--architecture", "[1]"], r"architecture is not a JSON object, got \[1\]"),
        (["--architecture", "1"], "architecture is not a JSON object, got 1"),
        (["--model_dtype", "int8"], "unknown model_dtype"),
        (["--max_steps", "0"], "max_steps must be at least 1"),
        (["--heldout_windows", "0"], "heldout_windows must be at least 1"),
        (["--lr_scheduler_type", "zigzag"], "zigzag"),
        (["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"use_reentrant": true}'], "non-reentrant"),
        (["--no_such_option", "1"], "unrecognized arguments: --no_such_option"),
        (["--max_step", "1"], "unrecognized arguments: --max_step"),
    ],
)
def test_bad_options(arguments: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        make_config(arguments)
