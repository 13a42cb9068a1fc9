"""Continued pre-training: the next-token loss, its normalisation, what it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import assert_same, gradients
from tiny_models import make_llama, random_ids
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedModel

from linearard.cpt import CPTTrainer, next_tokens
from linearard.data import Blocks
from linearard.errors import UserError
from linearard.linear_losses import IGNORED
from linearard.rope import RopeScaling, scale_rope
from linearard.training_config import CPTConfig


def make_cpt_trainer(
    directory: Path,
    model: PreTrainedModel | None = None,
    *,
    rows: int = 8,
    eval_dataset: Blocks | None = None,
    **settings: Any,
) -> CPTTrainer:
    config = CPTConfig(
        **{
            "output_dir": str(directory), "max_steps": 4, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
            **settings,
        }
    )  # fmt: skip
    if model is None:
        model = make_llama()
        scale_rope(model, RopeScaling.parse("linear:4"))
    return CPTTrainer(model, config, train_dataset=Blocks(random_ids(rows, 48)), eval_dataset=eval_dataset)


def test_the_loss_is_that_of_transformers(tmp_path: Path) -> None:
    trainer = make_cpt_trainer(tmp_path)
    ids = random_ids(2, 48)
    with torch.no_grad():
        expected = trainer.model(ids, labels=ids).loss
        loss = trainer.compute_loss(trainer.model, {"input_ids": ids})
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_gradients_of_all_weights_are_those_of_the_logits(tmp_path: Path) -> None:
    ids = random_ids(2, 48)
    trainer = make_cpt_trainer(tmp_path)
    found = gradients(trainer, [{"input_ids": ids}])
    reference = make_llama().train()
    scale_rope(reference, RopeScaling.parse("linear:4"))
    logits = reference(ids).logits[:, :-1]
    cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert_same({name: p.grad for name, p in reference.named_parameters() if p.grad is not None}, found)
    assert "lm_head.weight" in found
    assert "model.embed_tokens.weight" in found


def test_accumulation_equals_the_big_batch(tmp_path: Path) -> None:
    ids = random_ids(4, 48)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0  # the micro-batches differ in tokens
    mask[3, :30] = 0
    whole = gradients(make_cpt_trainer(tmp_path), [{"input_ids": ids, "attention_mask": mask}])
    pieces = [
        {"input_ids": ids[rows], "attention_mask": mask[rows]} for rows in (slice(0, 1), slice(1, 2), slice(2, 4))
    ]
    assert_same(whole, gradients(make_cpt_trainer(tmp_path, gradient_accumulation_steps=3), pieces))


def test_packed_sequences_equal_separate_ones(tmp_path: Path) -> None:
    ids = random_ids(2, 20)
    separate = gradients(make_cpt_trainer(tmp_path), [{"input_ids": ids}])
    packed = {"input_ids": ids.reshape(1, 40), "position_ids": torch.arange(20).repeat(2)[None]}
    assert_same(separate, gradients(make_cpt_trainer(tmp_path), [packed]))


def test_what_is_predicted() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    assert next_tokens({"input_ids": ids}).tolist() == [[6, 7, 8, 9, IGNORED]]
    right = torch.tensor([[1, 1, 1, 0, 0]])
    assert next_tokens({"input_ids": ids, "attention_mask": right}).tolist() == [[6, 7] + 3 * [IGNORED]]
    left = torch.tensor([[0, 0, 1, 1, 1]])
    assert next_tokens({"input_ids": ids, "attention_mask": left}).tolist() == [[IGNORED, IGNORED, 8, 9, IGNORED]]
    packed = torch.tensor([[0, 1, 0, 1, 2]])
    assert next_tokens({"input_ids": ids, "position_ids": packed}).tolist() == [[6, IGNORED, 8, 9, IGNORED]]
    labels = torch.tensor([[IGNORED, IGNORED, 7, 8, 9]])
    assert next_tokens({"input_ids": ids, "labels": labels}).tolist() == [[IGNORED, 7, 8, 9, IGNORED]]


def test_lora_and_checkpointing_change_no_gradient(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"trainable": ["q_proj", "v_proj", "down_proj"], "lora_rank": 4}
    batch = [{"input_ids": random_ids(2, 48)}]
    plain = gradients(make_cpt_trainer(tmp_path, gradient_checkpointing=False, **settings), batch)
    saving = make_cpt_trainer(tmp_path, **settings)
    saving.model.gradient_checkpointing_enable(saving.args.gradient_checkpointing_kwargs)
    assert_same(plain, gradients(saving, batch))
    assert all("lora" in name for name in plain)


@pytest.mark.parametrize(
    "settings",
    [{}, {"bf16": True}, {"trainable": ["q_proj", "k_proj", "v_proj"]}, {"lora_rank": 4, "trainable": ["q_proj"]}],
    ids=["all", "bfloat16", "projections", "lora"],
)
def test_the_loss_falls(settings: dict[str, Any], tmp_path: Path) -> None:
    model = make_llama(initializer_range=0.1).to(torch.bfloat16 if settings.get("bf16") else torch.float32)
    trainer = make_cpt_trainer(
        tmp_path,
        model,
        rows=2,
        **{"max_steps": 25, "per_device_train_batch_size": 2, "learning_rate": 1e-2, **settings},
    )
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 25
    assert losses[-1] < 0.98 * losses[0]


def test_a_head_that_does_more_is_refused(tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    with pytest.raises(UserError, match="final_logit_softcapping"):
        make_cpt_trainer(tmp_path, AutoModelForCausalLM.from_config(config))
    with pytest.raises(UserError, match="the language-model head of LlamaForCausalLM is no linear layer"):
        make_cpt_trainer(tmp_path, lora_rank=4, trainable=["q_proj", "lm_head"])


def test_logits_that_are_not_those_of_the_head_are_refused(tmp_path: Path) -> None:
    model = make_llama()
    scale_rope(model, RopeScaling.parse("linear:4"))

    class Scaled(type(model)):  # type: ignore[misc]  # nothing in its configuration says so
        def forward(self, *arguments: Any, **keywords: Any) -> Any:
            outputs = super().forward(*arguments, **keywords)
            outputs.logits = outputs.logits / 2
            return outputs

    model.__class__ = Scaled
    with pytest.raises(UserError, match="the logits of Scaled are not its head's"):
        make_cpt_trainer(tmp_path, model)
