"""examples/cpp_trainer on a tiny model: the Python trainer's loss curve, its results, checkpoints, bad input."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONTEXT, VOCABULARY, random_ids, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearard.capture import disable_capture
from linearard.data import Blocks
from linearard.models import load_model
from linearard.rope import RopeScaling, scale_rope
from linearard.tokens import write_tokens
from linearard.trainer import ARDTrainer
from linearard.training_config import ARDConfig

PROGRAM = Path(__file__).parents[2] / "build" / "cpp_trainer" / "cpp_trainer"
LENGTH = 32
NUMBER = r"([0-9.e+-]+)"

# Continuous integration builds the program; there, its absence is a failure.
pytestmark = pytest.mark.skipif(
    not PROGRAM.is_file() and "CI" not in os.environ, reason="make cpp-trainer builds the program"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "source", initializer_range=0.1, tie_word_embeddings=True)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    file = tmp_path / "tokens.bin"
    write_tokens(file, random_ids(10, LENGTH, seed=3), VOCABULARY)
    return file


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(argument) for argument in (PROGRAM, *arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def train(model: Path, tokens: Path, output: Path, *more: object) -> str:
    done = run("--model", model, "--tokens", tokens, "--output_dir", output, "--device", "cpu", *more)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def refusal(*arguments: object) -> str:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("cpp_trainer: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def losses(output: str) -> list[float]:
    return [float(value) for value in re.findall(rf"^step .* loss {NUMBER}", output, re.MULTILINE)]


@pytest.mark.parametrize(
    ("scaling", "relations", "causal"),
    [
        ("linear:4", ["query", "key", "value"], False),
        ("yarn:4", ["query", "value:0.5", "attention:2"], True),
        ("ntk:4", ["key"], False),
    ],
)
def test_loss_curve_is_that_of_the_python_trainer(
    model: Path, tokens: Path, tmp_path: Path, scaling: str, relations: list[str], causal: bool
) -> None:
    steps = 20  # over several epochs of 10 sequences, the last batch of each being smaller
    output = train(
        model, tokens, tmp_path / "cpp", "--scaling", scaling, "--relations", ",".join(relations), "--batch_size", 4,
        "--max_steps", steps, "--learning_rate", 3e-3, "--seed", 7, "--max_grad_norm", 0.5, "--weight_decay", 0.1,
        "--warmup_steps", 4, *(["--causal"] if causal else []),
    )  # fmt: skip
    config = ARDConfig(
        output_dir=str(tmp_path / "python"), scaling=scaling, relations=relations, causal=causal, lora_rank=0,
        logits_weight=0.0, per_device_train_batch_size=4, max_steps=steps, learning_rate=3e-3, seed=7,
        max_grad_norm=0.5, weight_decay=0.1, warmup_steps=4, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = ARDTrainer(load_model(str(model)), config, train_dataset=Blocks(random_ids(10, LENGTH, seed=3)))
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(expected) == steps
    assert expected[-1] < 0.9 * expected[0]
    assert losses(output) == pytest.approx(expected, rel=1e-3, abs=1e-4)  # the latter: Trainer rounds to 4 digits

    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "cpp" / "model")
    python = trainer.model
    disable_capture(python)
    assert restored.config.rope_parameters == python.config.rope_parameters
    assert restored.config.max_position_embeddings == python.config.max_position_embeddings == 4 * CONTEXT
    with torch.no_grad():
        ids = random_ids(2, 2 * CONTEXT)
        torch.testing.assert_close(restored(ids).logits, python(ids).logits, rtol=1e-3, atol=1e-3)
    assert AutoTokenizer.from_pretrained(tmp_path / "cpp" / "model").get_vocab()


@pytest.mark.parametrize("tied", [True, False])
def test_next_token_losses_are_those_of_transformers(tokens: Path, tmp_path: Path, tied: bool) -> None:
    model = save_model(tmp_path / "source", initializer_range=0.1, tie_word_embeddings=tied)
    output = train(model, tokens, tmp_path / "run", "--scaling", "yarn:4", "--batch_size", 3, "--max_steps", 2)
    teacher, scaled = load_model(str(model)), load_model(str(model))
    scale_rope(scaled, RopeScaling.parse("yarn:4"))
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    ids = random_ids(10, LENGTH, seed=3)[:3]
    with torch.no_grad():
        expected = [network(ids, labels=ids).loss.item() for network in (teacher, scaled, restored)]
    shown = re.findall(rf"teacher {NUMBER}, scaled {NUMBER}", output)[0]
    last = re.findall(rf"restored model: {NUMBER}", output)[0]
    assert [float(value) for value in (*shown, last)] == pytest.approx(expected, abs=1e-4)


def test_resuming_continues_the_loss_curve(model: Path, tokens: Path, tmp_path: Path) -> None:
    settings = ["--max_steps", 9, "--batch_size", 4, "--save_steps", 2, "--learning_rate", 3e-3, "--warmup_steps", 2]
    whole = train(model, tokens, tmp_path / "whole", *settings)
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [
        "checkpoint-00000006.safetensors", "checkpoint-00000008.safetensors", "model",
    ]  # fmt: skip
    (tmp_path / "run").mkdir()
    checkpoint = tmp_path / "run" / "checkpoint-00000006.safetensors"
    checkpoint.write_bytes((tmp_path / "whole" / checkpoint.name).read_bytes())
    resumed = train(model, tokens, tmp_path / "run", *settings, "--resume", "last")
    assert losses(resumed) == losses(whole)[6:]
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "run")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    again = ["--model", model, "--tokens", tokens, "--output_dir", tmp_path / "run", *settings]
    other = refusal(*again, "--resume", "last", "--batch_size", 3)
    assert "belongs to a run with batch_size 4, not 3" in other
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    damaged = refusal(*again, "--resume", checkpoint)
    assert "checkpoint-00000006.safetensors' is truncated" in damaged


def test_a_model_in_several_files(model: Path, tokens: Path, tmp_path: Path) -> None:
    expected = train(model, tokens, tmp_path / "whole", "--max_steps", 2)
    load_model(str(model)).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    assert losses(train(tmp_path / "sharded", tokens, tmp_path / "run", "--max_steps", 2)) == losses(expected)


def test_bad_settings(model: Path, tokens: Path, tmp_path: Path) -> None:
    given = ["--model", model, "--tokens", tokens, "--output_dir", tmp_path / "run"]
    for more, sentence in (
        (["--learning_rate", "fast"], "--learning_rate must be a number of at least 0, got 'fast'"),
        (["--max_steps", "0"], "--max_steps must be a number of at least 1, got '0'"),
        (["--max_steps"], "--max_steps needs a value"),
        (["--steps", "3"], "unknown option '--steps'"),
        (["--scaling", "cubic:4"], "unknown RoPE scaling 'cubic:4'"),
        (["--scaling", "linear:0.5"], "must be larger than 1"),
        (["--scaling", "yarn:4,gamma=1"], "unknown option 'gamma'"),
        (["--relations", "query,keys"], "unknown relation 'keys'"),
        (["--relations", "query,query"], "given twice"),
        (["--trainable", "w_proj"], "the model has no module 'w_proj'"),
        (["--device", "abacus"], "the device 'abacus' cannot be used"),
        (["--device", "cpu", "--bf16"], "--bf16 is for GPUs"),
        (["--resume", "last"], "there is no checkpoint to resume from"),
    ):
        assert sentence in refusal(*given, *more)
    assert "--model is required" in refusal("--tokens", tokens)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert "is not empty" in refusal(*given)
    assert run("--help").stdout.startswith("usage: cpp_trainer")


def test_bad_token_files(model: Path, tokens: Path, tmp_path: Path) -> None:
    good = tokens.read_bytes()
    other = tmp_path / "other.bin"
    write_tokens(other, random_ids(10, LENGTH, seed=3), VOCABULARY + 1)
    long = tmp_path / "long.bin"
    write_tokens(long, random_ids(2, CONTEXT + 1), VOCABULARY)
    for content, sentence in (
        (good[:-5], "is truncated: its header names 10 sequences of 32 tokens, the file has 675 bytes"),
        (good[:17], "is truncated: it has no complete header"),
        (b"GGUF" + good[4:], "was not written by `linearard tokenize`"),
        (good[:8] + struct.pack("<I", 2) + good[12:], "has version 2, this program reads version 1"),
        (good[:-2] + struct.pack("<H", VOCABULARY), f"is damaged: it has the id {VOCABULARY}"),
        (other.read_bytes(), f"was made for a vocabulary of {VOCABULARY + 1} tokens, the model has {VOCABULARY}"),
        (long.read_bytes(), f"the sequences have {CONTEXT + 1} tokens, the model reads 2 to {CONTEXT}"),
    ):
        tokens.write_bytes(content)
        assert sentence in refusal("--model", model, "--tokens", tokens, "--output_dir", tmp_path / "run")
    assert "cannot be opened" in refusal("--model", model, "--tokens", tmp_path, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_models(model: Path, tokens: Path, tmp_path: Path) -> None:
    arguments = ["--model", model, "--tokens", tokens, "--output_dir", tmp_path / "run"]
    file = model / "model.safetensors"
    good, weights = file.read_bytes(), load_file(file)
    for content, sentence in (
        (good[:-7], "is truncated: its tensors need"),
        (good[:50], "is truncated: its header has"),
        (good[:5], "is truncated: it has 5 bytes"),
        (b"\xff" * 16 + good[16:], "is not a safetensors file"),
        (good.replace(b"F32", b"X32", 1), "of an unknown dtype"),
    ):
        file.write_bytes(content)
        assert sentence in refusal(*arguments)
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file({**weights, name: weights[name][:8].clone()}, file, metadata={"format": "pt"})
    assert f"the tensor '{name}' of" in (message := refusal(*arguments))
    assert "has the shape [8, 32], config.json says [16, 32]" in message
    save_file({key: value for key, value in weights.items() if key != name}, file, metadata={"format": "pt"})
    assert f"has no tensor '{name}'" in refusal(*arguments)

    config = json.loads((model / "config.json").read_text())
    for change, sentence in (
        ({"model_type": "gpt2"}, 'models of the type llama only, config.json has "gpt2"'),
        ({"attention_bias": True}, "with attention_bias false only, config.json has true"),
        ({"hidden_size": "wide"}, 'an unusable value of hidden_size: "wide"'),
        ({"num_hidden_layers": None}, "config.json lacks num_hidden_layers"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "RoPE is scaled already (linear)"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "config.json has 'longrope'"),
    ):
        (model / "config.json").write_text(json.dumps({**config, **change}))
        assert sentence in refusal(*arguments)
    assert not (tmp_path / "run").exists()
