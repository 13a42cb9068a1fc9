"""LongReD, the baseline: its schedule, positions and three losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONTEXT, make_llama, random_ids
from torch import Tensor
from torch.nn.functional import cosine_similarity

from linearard.errors import UserError
from linearard.longred import SCHEDULE, LongREDBlocks, LongREDTrainer, skipped_positions
from linearard.rope import RopeScaling, scale_rope
from linearard.training_config import LongREDConfig

LENGTHS = {"long": 100, "short": 12, "stretched": 40}


def dataset(rounds: int = 2, seed: int = 0) -> LongREDBlocks:
    blocks = {kind: random_ids(SCHEDULE.count(kind), length) for kind, length in LENGTHS.items()}
    return LongREDBlocks(blocks, 16 * rounds, 4 * CONTEXT, "cream", seed)


def make_longred_trainer(directory: Path, **settings: Any) -> LongREDTrainer:
    config = LongREDConfig(
        **{
            "output_dir": str(directory), "max_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
            "sequence_length": LENGTHS["long"], "short_length": LENGTHS["short"],
            "short_to_long_length": LENGTHS["stretched"], "gradient_checkpointing": False, **settings,
        }
    )  # fmt: skip
    return LongREDTrainer(make_llama(), config, "linear:4", train_dataset=dataset())


def test_a_step_has_the_papers_proportions() -> None:
    assert {kind: SCHEDULE.count(kind) for kind in LENGTHS} == {"long": 8, "stretched": 2, "short": 6}
    items = [dataset()[index] for index in range(32)]
    lengths = [len(item["input_ids"]) for item in items]
    assert [lengths[:16].count(length) for length in (100, 12, 40)] == [8, 6, 2]
    assert all(("position_ids" in item) == (len(item["input_ids"]) == 40) for item in items)
    of_step = [tuple(item["input_ids"].tolist()) for item in items[:16]]
    assert len(set(of_step)) == 16, "no sequence twice before all were seen"


def test_items_do_not_depend_on_when_they_are_asked_for() -> None:
    stretched = SCHEDULE.index("stretched")
    first, again = dataset()[stretched], dataset()[stretched]
    assert torch.equal(first["position_ids"], again["position_ids"])
    assert not torch.equal(first["position_ids"], dataset()[stretched + 8]["position_ids"])
    assert not torch.equal(first["position_ids"], dataset(seed=1)[stretched]["position_ids"])


@pytest.mark.parametrize("method", ["cream", "uniform"])
def test_skipped_positions(method: str) -> None:
    seen = torch.zeros(256, dtype=torch.bool)
    for seed in range(200):
        positions = skipped_positions(40, 256, method, torch.Generator().manual_seed(seed))
        assert positions.shape == (40,)
        assert positions[0] == 0
        assert (positions.diff() > 0).all()
        assert positions[-1] < 256
        if method == "cream":
            assert positions[-1] == 255
            assert (positions.diff() > 1).sum() <= 2, "three contiguous parts"
        seen[positions] = True
    assert seen.float().mean() > 0.9, "all of the context is met"
    assert skipped_positions(40, 40, method, torch.Generator()).tolist() == list(range(40))


def test_the_three_losses_from_their_definitions(tmp_path: Path) -> None:
    trainer = make_longred_trainer(tmp_path, distilled_layers=[0, 2])
    teacher, student = make_llama(), make_llama()
    scale_rope(student, RopeScaling.parse("linear:4"))

    def distance(first: Tensor, second: Tensor) -> Tensor:
        return (1 - cosine_similarity(first, second, dim=-1)).mean()

    long, short, stretched = (random_ids(1, LENGTHS[kind]) for kind in ("long", "short", "stretched"))
    positions = skipped_positions(LENGTHS["stretched"], 256, "cream", torch.Generator().manual_seed(0))[None]
    with torch.no_grad():
        expected = {"long": student(long, labels=long).loss}
        ours, theirs = (model(short, output_hidden_states=True).hidden_states for model in (student, teacher))
        expected["short"] = 5 * (distance(ours[1], theirs[1]) + distance(ours[3], theirs[3]))
        # The jumps of the positions by hand: one causal attention over everything.
        mask = torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
        hidden = student.model(stretched, position_ids=positions, attention_mask=mask).last_hidden_state
        expected["stretched"] = 10 * distance(hidden, teacher.model(stretched).last_hidden_state)
        found = {
            "long": trainer.compute_loss(trainer.model, {"input_ids": long}),
            "short": trainer.compute_loss(trainer.model, {"input_ids": short}),
            "stretched": trainer.compute_loss(trainer.model, {"input_ids": stretched, "position_ids": positions}),
        }
    for kind, value in expected.items():
        assert value > 1e-3
        torch.testing.assert_close(found[kind], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_checkpointing": True, "lora_rank": 4, "trainable": ["q_proj", "down_proj"]}],
    ids=["all", "lora with checkpointing"],
)  # fmt: skip
def test_a_step_weighs_every_micro_batch_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    trainer = make_longred_trainer(tmp_path, learning_rate=1e-3, **settings)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        mean = (8 * entry["long_loss"] + 6 * 5 * entry["short_loss"] + 2 * 10 * entry["stretched_loss"]) / 16
        assert entry["loss"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"gradient_accumulation_steps": 8}, "a multiple of 16"),
        ({"per_device_train_batch_size": 2}, "one sequence a micro-batch"),
        ({"positions": "random"}, "unknown positions 'random'"),
        ({"short_length": 100}, "has to differ"),
        ({"distilled_layers": [3]}, "no layer 3; it has 3: 0 to 2"),
    ],
)
def test_bad_settings(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        make_longred_trainer(tmp_path, **settings)
