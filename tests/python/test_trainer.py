"""Training: the loss falls, gradients do not depend on how a batch is cut, runs resume exactly."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_llama, random_ids
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedModel

from linearard.capture import capture_states, enable_capture
from linearard.data import Blocks
from linearard.errors import UserError
from linearard.rope import RopeScaling, scale_rope
from linearard.stage_trainer import checkpoints
from linearard.teacher import merged
from linearard.trainer import ARDTrainer
from linearard.training_config import ARDConfig

WORKER = Path(__file__).with_name("training_worker.py")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Several threads make a model of this size slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_trainer(
    directory: Path,
    model: PreTrainedModel | None = None,
    *,
    rows: int = 32,
    eval_dataset: Blocks | None = None,
    **settings: Any,
) -> ARDTrainer:
    config = ARDConfig(
        **{
            "output_dir": str(directory),
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "lora_rank": 4,
            "lora_alpha": 8,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            **settings,
        }
    )
    dataset = Blocks(random_ids(rows, 24))
    return ARDTrainer(model or make_llama(), config, train_dataset=dataset, eval_dataset=eval_dataset)


def gradients(trainer: ARDTrainer, micro_batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What one optimizer step would see."""
    samples, count = trainer.get_batch_samples(iter(micro_batches), len(micro_batches), torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(samples)
    for batch in samples:
        trainer.training_step(trainer.model, batch, count)
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], relative: float = 5e-6) -> None:
    """Each gradient within `relative` of its largest element: small elements are sums of large ones that cancel."""
    assert first.keys() == second.keys()
    assert first
    for name, gradient in first.items():
        allowed = relative * gradient.abs().max().item()
        torch.testing.assert_close(
            second[name], gradient, rtol=0, atol=allowed, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"relations": ["query", "key", "value"]},
        {"relations": ["query", "key", "value", "attention"], "causal": True, "gradient_checkpointing": True},
        {"lora_rank": 0, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"lora_rank": 0, "trainable": ["all"], "learning_rate": 3e-3, "scaling": "yarn:4"},
    ],
    ids=["lora", "four-relations", "projections", "all-weights"],
)
def test_loss_falls(settings: dict[str, Any], tmp_path: Path) -> None:
    # Four rows, seen again and again: what is left of the loss is what the trained weights cannot express.
    trainer = make_trainer(
        tmp_path, **{"max_steps": 30, "per_device_train_batch_size": 4, "learning_rate": 2e-2, **settings}, rows=4
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 30
    assert losses[-1] < 0.5 * losses[0]


def test_the_teacher_of_lora_is_the_model_before(tmp_path: Path) -> None:
    ids = random_ids(2, 24)
    before = make_llama()
    enable_capture(before)
    expected = capture_states(before, ids)
    trainer = make_trainer(tmp_path, learning_rate=2e-2)
    trainer.train()
    states = trainer.teacher.states(ids)
    for layer, state in expected.items():
        torch.testing.assert_close(states[layer].query, state.query, rtol=0, atol=0)
    scale_rope(before, RopeScaling.parse("linear:4"))
    student = capture_states(trainer.model, ids)
    assert not torch.allclose(student[1].value, capture_states(before, ids)[1].value, atol=1e-3), "it has learned"
    # One copy of the weights: besides the adapters there is nothing that the plain model does not have.
    extra = [name for name, _ in trainer.model.named_parameters() if "lora" not in name]
    assert len(extra) == len(list(make_llama().named_parameters()))


def test_the_teacher_of_full_training_is_a_frozen_copy(tmp_path: Path) -> None:
    ids = random_ids(2, 24)
    before = make_llama()
    enable_capture(before)
    expected = capture_states(before, ids)
    trainer = make_trainer(tmp_path, lora_rank=0, trainable=["all"], learning_rate=1e-2)
    trainer.train()
    for layer, state in trainer.teacher.states(ids).items():
        torch.testing.assert_close(state.query, expected[layer].query, rtol=0, atol=0)


def test_only_parameters_with_gradients_are_trained(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lora_rank=0, trainable=["all"])
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert "model.layers.1.mlp.up_proj.weight" in trained
    assert "model.layers.2.self_attn.v_proj.weight" in trained
    assert not trained & {
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.2.self_attn.o_proj.weight",
        "model.norm.weight",
    }
    found = gradients(trainer, [{"input_ids": random_ids(2, 24)}])
    assert found.keys() == trained


def test_accumulation_equals_the_big_batch(tmp_path: Path) -> None:
    ids = random_ids(4, 24)
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0  # the micro-batches differ in tokens
    mask[3, 20:] = 0
    whole = gradients(make_trainer(tmp_path), [{"input_ids": ids, "attention_mask": mask}])
    pieces = [
        {"input_ids": ids[rows], "attention_mask": mask[rows]} for rows in (slice(0, 1), slice(1, 2), slice(2, 4))
    ]
    assert_same(whole, gradients(make_trainer(tmp_path, gradient_accumulation_steps=3), pieces))


def test_packed_sequences_equal_separate_ones(tmp_path: Path) -> None:
    ids = random_ids(2, 12)
    separate = gradients(make_trainer(tmp_path, relations=["query", "key", "value", "attention"]), [{"input_ids": ids}])
    packed = {"input_ids": ids.reshape(1, 24), "position_ids": torch.arange(12).repeat(2)[None]}
    together = gradients(make_trainer(tmp_path, relations=["query", "key", "value", "attention"]), [packed])
    assert_same(separate, together)


def test_packed_rows_of_a_larger_batch_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    ids = random_ids(2, 24)
    packed = torch.stack([torch.arange(24), torch.arange(12).repeat(2)])
    with pytest.raises(UserError, match="packed sequences need a batch of one row"):
        trainer.compute_loss(trainer.model, {"input_ids": ids, "position_ids": packed})
    with torch.no_grad():
        plain, counted = (
            trainer.compute_loss(trainer.model, {"input_ids": ids, **more})
            for more in ({}, {"position_ids": torch.arange(24).expand(2, 24)})
        )
    torch.testing.assert_close(plain, counted)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_checkpointing_changes_no_gradient(bf16: bool, tmp_path: Path) -> None:
    batch = [{"input_ids": random_ids(2, 24)}]
    plain = gradients(make_trainer(tmp_path, bf16=bf16), batch)
    saving = make_trainer(tmp_path, gradient_checkpointing=True, bf16=bf16)
    saving.model.gradient_checkpointing_enable(saving.args.gradient_checkpointing_kwargs)
    assert_same(plain, gradients(saving, batch))


def test_bfloat16_weights_get_float32_masters(tmp_path: Path) -> None:
    lora = make_trainer(tmp_path, make_llama().to(torch.bfloat16), bf16=True)
    full = make_trainer(tmp_path, make_llama().to(torch.bfloat16), bf16=True, lora_rank=0)
    for trainer in (lora, full):
        assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
        trainer.train()
        assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    frozen = lora.model.get_base_model().model.layers[0].mlp.up_proj.weight.clone()
    assert frozen.dtype == torch.bfloat16
    plain = merged(lora.model)
    assert {p.dtype for p in plain.parameters()} == {plain.model.rotary_emb.inv_freq.dtype} == {torch.float32}
    torch.testing.assert_close(plain.model.layers[0].mlp.up_proj.weight, frozen.float(), rtol=0, atol=0)


def test_merged_model_is_the_student(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, learning_rate=2e-2)
    trainer.train()
    ids = random_ids(2, 24)
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(ids).logits
    model = merged(trainer.model)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert loaded.config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}


def test_parts_of_the_loss_are_logged(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, relations=["query", "value:3"], logits_weight=0.5, gradient_accumulation_steps=2)
    trainer.train()
    for entry in [entry for entry in trainer.state.log_history if "loss" in entry]:
        parts = entry["query_kl"] + 3 * entry["value_kl"] + 0.5 * entry["logits_kl"]
        assert parts == pytest.approx(entry["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"layers": [5]}, "no attention layer 5"),
        ({"trainable": ["query_key_value"]}, "no module 'query_key_value' to train; its linear layers: down_proj"),
        ({"trainable": ["q_proj", "mlp"]}, "LoRA has no adapters for 'mlp', .*name linear layers: down_proj, "),
        ({"trainable": ["input_layernorm"]}, "LoRA has no adapters for 'input_layernorm'"),
        ({"trainable": ["lm_head"], "lora_rank": 0}, "nothing to train"),
    ],
)
def test_settings_that_do_not_fit_the_model(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        make_trainer(tmp_path, **settings)


def start_worker(*arguments: object, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([*launcher, str(WORKER), *map(str, arguments)], env=environment)


def finish(process: subprocess.Popen[bytes], seconds: int = 120) -> None:
    try:
        assert process.wait(timeout=seconds) == 0
    finally:
        process.kill()


def test_resume_after_a_kill_continues_with_the_same_losses(tmp_path: Path) -> None:
    whole = start_worker("train", tmp_path / "whole")
    killed = start_worker("train", tmp_path / "killed", "--slow")
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoint-4").exists():
        assert killed.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    found = checkpoints(tmp_path / "killed")
    assert found[-1].name in ("checkpoint-4", "checkpoint-6")
    finish(whole)
    finish(start_worker("train", tmp_path / "killed", "--resume"))
    expected = json.loads((tmp_path / "whole" / "losses.json").read_text())
    resumed = json.loads((tmp_path / "killed" / "losses.json").read_text())
    assert len(expected) == 10
    assert resumed == expected


def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    finish(start_worker("gradients", tmp_path / "one.pt"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}")
    finish(start_worker("gradients", tmp_path / "two.pt", launcher=launcher))
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert float(two.pop("loss")) == pytest.approx(float(one.pop("loss")), rel=1e-5)
    assert_same(one, two)


def test_logits_are_compared_at_the_last_positions(tmp_path: Path) -> None:
    ids = random_ids(2, 24)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    settings: dict[str, Any] = {"lora_rank": 0, "trainable": ["all"]}
    plain = make_trainer(tmp_path, logits_weight=0.0, **settings)
    both = make_trainer(tmp_path, logits_weight=3.0, logits_positions=8, **settings)
    with torch.no_grad():
        difference = both.compute_loss(both.model, dict(batch)) - plain.compute_loss(plain.model, dict(batch))
        log_q, log_p = (
            model(ids, attention_mask=mask).logits[:, -8:].log_softmax(-1)
            for model in (both.model, both.teacher.frozen_copy)
        )
    rows = (log_p.exp() * (log_p - log_q)).sum(-1)[mask[:, -8:].bool()]
    torch.testing.assert_close(difference, 3 * rows.mean(), rtol=1e-3, atol=1e-5)
    trained = make_trainer(tmp_path / "run", gradient_accumulation_steps=2)
    trained.train()
    assert all(entry["logits_kl"] > 0 for entry in trained.state.log_history if "loss" in entry)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_logits_are_compared_at_all_positions_by_default(padded: bool, tmp_path: Path) -> None:
    ids = random_ids(2, 24)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    batch = [{"input_ids": ids, "attention_mask": mask} if padded else {"input_ids": ids}]
    default, length, last = (
        make_trainer(tmp_path, **settings) for settings in ({}, {"logits_positions": 24}, {"logits_positions": 23})
    )
    assert default.args.logits_positions is None
    with torch.no_grad():
        losses = [trainer.compute_loss(trainer.model, dict(batch[0])) for trainer in (default, length, last)]
    assert losses[0] == losses[1] != losses[2]
    assert_same(gradients(length, batch), gradients(default, batch), relative=0)


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 0, "trainable": ["all"]}], ids=["lora", "all weights"])
@pytest.mark.parametrize("positions", [None, 8])
def test_chunks_of_a_linear_head_give_the_loss_of_its_logits(
    settings: dict[str, Any], positions: int | None, tmp_path: Path
) -> None:
    ids = random_ids(2, 24)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    batch = [{"input_ids": ids, "attention_mask": mask}]
    chunked, whole = (make_trainer(tmp_path, logits_positions=positions, **settings) for _ in range(2))
    assert chunked._linear_head
    whole._linear_head = False
    with torch.no_grad():
        for trainer in (chunked, whole):  # adapters begin as zero, and so would the divergence
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    torch.manual_seed(parameter.numel())
                    parameter += 0.1 * torch.randn_like(parameter)
        losses = [trainer.compute_loss(trainer.model, dict(batch[0])) for trainer in (chunked, whole)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    assert_same(gradients(whole, batch), gradients(chunked, batch))


def test_logits_that_are_more_than_a_linear_layer(tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5, attn_logit_softcapping=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    trainer = make_trainer(tmp_path, model, lora_rank=0, trainable=["all"], logits_weight=5.0)
    ids = random_ids(2, 24) % 50
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)  # the cap matters
        structure: dict[str, torch.Tensor | None] = {"key_padding_mask": None, "cu_seqlens": None}
        parts = trainer._loss(trainer.model, {"input_ids": ids}, structure, None)[2]
        log_q, log_p = (m(ids).logits.log_softmax(-1) for m in (trainer.model, trainer.teacher.frozen_copy))
        head = trainer.model.lm_head(trainer.model.model(ids).last_hidden_state).log_softmax(-1)
    expected, uncapped = ((log_p.exp() * (log_p - other)).sum(-1).mean() for other in (log_q, head))
    assert uncapped > 2 * expected
    torch.testing.assert_close(parts["logits"], expected, rtol=1e-4, atol=0)
