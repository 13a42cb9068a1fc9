"""Gradients that stay inside a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import assert_same, gradients, make_trainer
from tiny_models import make_llama, random_ids

from linearard.capture import capture_states, capturing
from linearard.errors import UserError

FOUR = ["query", "key:2", "value", "attention"]
# Local gradients know no logits.
LOCAL: dict[str, Any] = {"gradients": "local", "logits_weight": 0.0}


@pytest.mark.parametrize("lora_rank", [4, 0], ids=["lora", "projections"])
def test_the_first_layer_learns_as_in_the_whole_model(lora_rank: int, tmp_path: Path) -> None:
    # Below its attention there are only the embeddings, which teacher and student share.
    batch = [{"input_ids": random_ids(2, 24)}]
    settings: dict[str, Any] = {"layers": [0], "relations": FOUR, "lora_rank": lora_rank, "logits_weight": 0.0}
    full = gradients(make_trainer(tmp_path, **settings), batch)
    assert_same(full, gradients(make_trainer(tmp_path, gradients="local", **settings), batch))


def test_each_layer_is_compared_on_the_teachers_hidden_states(tmp_path: Path) -> None:
    ids = random_ids(2, 24)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    trainer = make_trainer(tmp_path, relations=FOUR, lora_rank=0, layer_weights=[1.0, 2.0, 5.0], **LOCAL)
    found = gradients(trainer, [{"input_ids": ids, "attention_mask": mask}])

    # The same by hand: the inputs of the teacher's layers through the student's attention modules.
    inputs: dict[int, torch.Tensor] = {}
    teacher = trainer.teacher.frozen_copy
    assert teacher is not None
    for index, layer in enumerate(teacher.model.layers):
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, output, index=index: inputs.update({index: kwargs["hidden_states"]}),
            with_kwargs=True,
        )
    expected_states = capture_states(teacher, ids, attention_mask=mask)
    model = trainer.model
    embeddings = model.model.rotary_emb(inputs[0], torch.arange(24)[None])
    student = {}
    for index, layer in enumerate(model.model.layers):
        with capturing() as capture:
            layer.self_attn(hidden_states=inputs[index], position_embeddings=embeddings, attention_mask=None)
        student.update(capture.states)
    loss, _ = trainer.relations(student, expected_states, key_padding_mask=mask.bool(), num_items=mask.sum())
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    by_hand = torch.autograd.grad(loss, parameters)
    assert_same(dict(zip(names, by_hand, strict=True)), found)


def test_loss_and_parts_fall(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, relations=FOUR, max_steps=30, per_device_train_batch_size=4, learning_rate=2e-2, rows=4, **LOCAL
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 30
    # What is left is what adapters of rank 4 cannot express.
    assert losses[-1] < 0.65 * losses[0]
    first = trainer.state.log_history[0]
    assert abs(first["value_kl"]) < 1e-6, "the same hidden states, the same projection"
    parts = first["query_kl"] + 2 * first["key_kl"] + first["value_kl"] + first["attention_kl"]
    assert parts == pytest.approx(first["loss"], rel=1e-4)


def test_only_projections_are_reached(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lora_rank=0, trainable=["all"], layers=[1], **LOCAL)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == {f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"}


def test_a_model_that_rotates_inside_its_layers_is_refused(tmp_path: Path) -> None:
    model = make_llama()
    for layer in model.model.layers:
        rotary = model.model.rotary_emb
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda hidden_states, _forward=forward, _rotary=rotary, **keywords: _forward(
            hidden_states, **{**keywords, "position_embeddings": _rotary(hidden_states, torch.arange(2)[None])}
        )
        layer.register_forward_pre_hook(
            lambda module, args, keywords: (args, {**keywords, "position_embeddings": None}), with_kwargs=True
        )
    with pytest.raises(UserError, match="set gradients to full"):
        make_trainer(tmp_path, model, **LOCAL)


def test_make_llama_is_the_same_every_time() -> None:
    """What the comparisons above rest on."""
    first, second = make_llama().state_dict(), make_llama().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
