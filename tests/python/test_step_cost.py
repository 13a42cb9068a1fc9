"""A step of distillation is cheap for the host: few operators, no waiting, and the same numbers as plain autocast."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from operator_count import CountStep
from tiny_models import make_llama, random_ids

import linearard.losses
from linearard.capture import capturing, enable_capture
from linearard.data import Blocks
from linearard.losses import RELATIONS, ARDLoss
from linearard.precision import frozen_weights_in, inputs_cast_once
from linearard.trainer import ARDTrainer
from linearard.training_config import ARDConfig

LAYERS = 8
FOUR = list(RELATIONS)


def count_step(directory: Path, **settings: Any) -> CountStep:
    """The operators of the third of four steps, in bfloat16, with nothing logged."""
    config = ARDConfig(
        **{
            "output_dir": str(directory), "max_steps": 4, "per_device_train_batch_size": 2, "lora_rank": 4,
            "use_cpu": True, "bf16": True, "relations": FOUR, "report_to": "none", "disable_tqdm": True,
            "logging_steps": 100, **settings,
        }
    )  # fmt: skip
    counter = CountStep(2)
    model = make_llama(num_hidden_layers=LAYERS, initializer_range=0.1)
    ARDTrainer(model, config, train_dataset=Blocks(random_ids(16, 24)), callbacks=[counter]).train()
    return counter


def test_a_step_dispatches_few_operators(tmp_path: Path) -> None:
    # 350 per layer before casts were made once and layers were stacked; local gradients need no backward pass through
    # the layers. Without logits, which are no layer's.
    full = count_step(tmp_path / "full", logits_weight=0.0).count.calls
    local = count_step(tmp_path / "local", gradients="local", logits_weight=0.0).count.calls
    assert sum(full.values()) / LAYERS < 235
    assert sum(local.values()) / LAYERS < 235
    assert full["aten._to_copy"] / LAYERS < 36
    # One call for the self-relations of all layers, and one for the attention maps.
    assert full["linearard.layer_relation_kl_forward"] == full["linearard.layer_relation_kl_backward"] == 1
    assert full["linearard.attention_kl_forward"] == full["linearard.attention_kl_backward"] == 1


@pytest.mark.parametrize(
    "settings",
    [{}, {"logits_positions": 8}, {"logits_weight": 0.0}, {"gradients": "local", "logits_weight": 0.0}],
    ids=["full", "last logits", "without logits", "local"],
)
def test_a_step_that_is_not_logged_never_waits_for_the_device(settings: dict[str, Any], tmp_path: Path) -> None:
    calls = count_step(tmp_path, **settings).count.calls
    assert calls["linearard.layer_relation_kl_forward"] > 0
    waiting = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.item", "aten.equal")
    assert {name: calls[name] for name in waiting if calls[name]} == {}


def test_held_weights_give_the_numbers_of_autocast() -> None:
    model = make_llama(tie_word_embeddings=True)
    model.requires_grad_(False)
    trained = model.model.layers[1].self_attn.q_proj.weight.requires_grad_()
    original = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = random_ids(2, 24)
    results = []
    for hold in (False, True):
        with frozen_weights_in(model, torch.bfloat16) if hold else contextlib.nullcontext():
            if hold:
                assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
                assert model.lm_head.weight.dtype == torch.float32, "tied to the embedding"
                assert trained.dtype == torch.float32
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(ids).logits
            logits.float().square().mean().backward()
        results.append((logits.detach(), trained.grad))
        trained.grad = None
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), original[name], rtol=0, atol=0)


def test_the_original_weights_come_back_after_an_error() -> None:
    model = make_llama().requires_grad_(False)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(RuntimeError, match="inside"), frozen_weights_in(model, torch.bfloat16):
        raise RuntimeError("inside")
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.detach(), before, rtol=0, atol=0)


def test_inputs_that_are_cast_once_give_the_states_of_autocast() -> None:
    model = make_llama()
    enable_capture(model)
    ids = random_ids(2, 24)
    states = []
    for once in (False, True):
        modules = [layer.self_attn for layer in model.model.layers] if once else []
        with torch.no_grad(), inputs_cast_once(modules), torch.autocast("cpu", torch.bfloat16), capturing() as capture:
            model(ids)
        states.append(capture.states)
    for layer in states[0]:
        for name in ("query", "key", "value"):
            assert getattr(states[0][layer], name).dtype == torch.bfloat16
            torch.testing.assert_close(getattr(states[1][layer], name), getattr(states[0][layer], name), rtol=0, atol=0)


@pytest.mark.parametrize("limit", [0, 10_000, 2**30], ids=["one by one", "pairs", "all at once"])
def test_stacking_layers_changes_nothing(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = make_llama(num_hidden_layers=5), make_llama(num_hidden_layers=5, rope_theta=500.0)
    ids = random_ids(2, 16)
    captured = []
    for model in (student, teacher):
        enable_capture(model)
        with capturing() as capture:
            model(ids)
        captured.append(capture.states)
    loss = ARDLoss(dict.fromkeys(RELATIONS, 1.0))
    results = []
    for bytes_allowed in (0, limit):
        monkeypatch.setattr(linearard.losses, "STACKED_BYTES", bytes_allowed)
        value, parts = loss(captured[0], captured[1])
        gradients = torch.autograd.grad(value, [captured[0][2].query, captured[0][4].key], retain_graph=True)
        results.append((value, *gradients, *parts.values()))
    assert results[0][0] > 0.01
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)
