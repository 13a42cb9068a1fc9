"""What all stages share: divergence stops a run in one line and leaves good checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_cpt import make_cpt_trainer
from test_longred import make_longred_trainer
from test_trainer import make_trainer
from tiny_models import make_llama, random_ids
from transformers import GenerationConfig, TrainerCallback

from linearard.data import Blocks
from linearard.errors import UserError
from linearard.stage_trainer import DivergenceWatch, StageTrainer, checkpoints


class Poison(TrainerCallback):
    """Makes a trained weight NaN after some step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            [p for p in kwargs["model"].parameters() if p.requires_grad][-1].data.view(-1)[0] = torch.nan


def trainer_of(stage: str, directory: Path, **settings: Any) -> StageTrainer:
    make = make_trainer if stage == "ard" else make_cpt_trainer
    return make(directory, **settings)


@pytest.mark.parametrize("stage", ["ard", "cpt"])
@pytest.mark.parametrize("logging_steps", [1, 100])
def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(stage: str, logging_steps: int, tmp_path: Path) -> None:
    trainer = trainer_of(
        stage, tmp_path, max_steps=10, save_strategy="steps", save_steps=2, logging_steps=logging_steps
    )
    trainer.add_callback(Poison(5))
    with pytest.raises(UserError, match=r"diverged at step 6: .*checkpoint-4'"):
        trainer.train()
    found = checkpoints(tmp_path)
    assert [path.name for path in found] == ["checkpoint-2", "checkpoint-4"]
    assert not (tmp_path / ".incomplete-checkpoint").exists()
    again = trainer_of(stage, tmp_path, max_steps=6)
    again.train(resume_from_checkpoint=str(found[-1]))
    assert all(p.isfinite().all() for p in again.model.parameters())
    assert again.state.global_step == 6


def test_nan_without_checkpoints(tmp_path: Path) -> None:
    trainer = make_cpt_trainer(tmp_path, max_steps=10)
    trainer.add_callback(Poison(1))
    with pytest.raises(UserError, match="diverged at step 2: loss is nan; there is no checkpoint"):
        trainer.train()


def test_a_weight_that_no_loss_shows(tmp_path: Path) -> None:
    class PoisonRareToken(TrainerCallback):
        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            model.model.embed_tokens.weight.data[0] = torch.nan  # a token that the data do not have

    trainer = make_cpt_trainer(tmp_path, max_steps=2)
    trainer.add_callback(PoisonRareToken())
    with pytest.raises(UserError, match="a trained weight is not finite"):
        trainer.train()


def test_checkpoints_of_a_model_whose_generation_config_cannot_be_saved(tmp_path: Path) -> None:
    model = make_llama()
    model.generation_config = GenerationConfig(top_p=0.9)
    make_cpt_trainer(tmp_path, model, max_steps=1, save_strategy="steps", save_steps=1).train()
    assert GenerationConfig.from_pretrained(tmp_path / "checkpoint-1").do_sample
    model.generation_config = GenerationConfig(length_penalty=2.0)
    with pytest.raises(UserError, match="generation_config is invalid: `length_penalty`"):
        make_cpt_trainer(tmp_path, model, save_strategy="steps")


@pytest.mark.parametrize("stage", ["ard", "cpt"])
def test_evaluation_gives_the_loss(stage: str, tmp_path: Path) -> None:
    rows = Blocks(random_ids(3, 24, seed=5))
    trainer = trainer_of(stage, tmp_path, per_device_eval_batch_size=2)
    found = trainer.evaluate(rows)["eval_loss"]
    with torch.no_grad():
        expected = [trainer.compute_loss(trainer.model, {"input_ids": row[None]}) for row in rows.input_ids]
    assert found == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("stage", ["ard", "cpt"])
def test_the_best_checkpoint_is_loaded_at_the_end(stage: str, tmp_path: Path) -> None:
    class Worse(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step > 2:
                [p for p in kwargs["model"].parameters() if p.requires_grad][-1].data.mul_(100)

    trainer = trainer_of(
        stage, tmp_path, max_steps=5, learning_rate=1e-4, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, save_total_limit=1, load_best_model_at_end=True, warmup_steps=0,
        eval_dataset=Blocks(random_ids(2, 24)),
    )  # fmt: skip
    trainer.add_callback(Worse())
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = losses.index(min(losses)) + 1
    assert len(losses) == 5
    assert best < 5
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_losses_that_cannot_be_evaluated(tmp_path: Path) -> None:
    local = make_trainer(tmp_path, gradients="local", logits_weight=0.0)
    with pytest.raises(UserError, match="local gradients have no loss without a backward pass"):
        local.evaluate(Blocks(random_ids(2, 24)))
    with pytest.raises(UserError, match="rows are of three kinds"):
        make_longred_trainer(tmp_path).evaluate(Blocks(random_ids(2, 24)))


def test_a_rising_loss_is_told_once() -> None:
    told: list[str] = []
    watch = DivergenceWatch(told.append)
    losses = [4, 3, 2, 1.5, 1.2, 1.1, 1.0, 1.0, 1.1, 3, 1.0, *([5.0] * 10)]
    for step, loss in enumerate(losses):
        watch.on_log(None, SimpleNamespace(global_step=step), None, logs={"loss": float(loss)})
        assert len(told) == 0 or step > 9, "one outlier is no divergence"
    assert len(told) == 1
    assert "learning rate may be too high" in told[0]


def test_a_falling_loss_is_not() -> None:
    told: list[str] = []
    watch = DivergenceWatch(told.append)
    for step in range(100):
        watch.on_log(None, SimpleNamespace(global_step=step), None, logs={"loss": 3 / (1 + step) + 0.2 * (step % 2)})
        watch.on_log(None, SimpleNamespace(global_step=step), None, logs={"eval": 1.0})
    assert told == []
