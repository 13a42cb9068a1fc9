"""Steps that are replayed from CUDA graphs: the same losses, gradients and weights, or steps as usual and a warning."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cpt import make_cpt_trainer
from test_longred import make_longred_trainer
from test_trainer import make_trainer
from tiny_models import make_llama
from torch import Tensor, nn

from linearard.stage_trainer import StageTrainer
from linearard.step_graphs import WARM_UP, StepGraphs

STEPS = WARM_UP + 4
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
MAKERS = {"ard": make_trainer, "cpt": make_cpt_trainer, "longred": make_longred_trainer}


def train(stage: str, directory: Path, **settings: Any) -> tuple[list[dict[str, float]], dict[str, Tensor], int]:
    """The log of a run, its weights, and how many replays it had."""
    chosen = {"use_cpu": False, "max_steps": STEPS, "gradient_checkpointing": False, **settings}
    trainer: StageTrainer = MAKERS[stage](directory, **chosen)
    replays = 0
    replay = StepGraphs._replay

    def count(*arguments: Any) -> dict[str, Tensor]:
        nonlocal replays
        replays += 1
        return replay(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepGraphs, "_replay", count)
        trainer.train()
    log = [
        {name: value for name, value in entry.items() if name.endswith(("loss", "kl")) and name != "train_loss"}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return log, {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}, replays


@on_gpu
@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("ard", {"relations": ["query", "key", "value", "attention"], "logits_weight": 0.0}),
        ("ard", {"lora_dropout": 0.2, "bf16": True, "logits_weight": 0.5, "logits_positions": 8}),
        ("ard", {"lora_rank": 0, "scaling": "yarn:4", "gradient_accumulation_steps": 2}),
        ("ard", {"gradients": "local", "logits_weight": 0.0}),
        ("cpt", {"bf16": True}),
        ("cpt", {"lora_rank": 4, "trainable": ["q_proj"], "gradient_accumulation_steps": 2}),
        ("longred", {}),
    ],
)  # fmt: skip
def test_replayed_steps_are_the_same(stage: str, settings: dict[str, Any], tmp_path: Path) -> None:
    # Everything deterministic: what differs then is an error, and no sum in another order.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        plain, weights, none = train(stage, tmp_path / "plain", cuda_graphs=False, **settings)
        graphed, same, replays = train(stage, tmp_path / "graphed", **settings)
    finally:
        torch.use_deterministic_algorithms(False)
    assert none == 0
    assert replays >= STEPS - WARM_UP
    assert len(plain) == STEPS
    tolerance = 1e-3 if settings.get("bf16") else 1e-5
    for before, after in zip(plain, graphed, strict=True):
        assert before.keys() == after.keys()
        assert before == pytest.approx(after, rel=tolerance, abs=1e-7)
    for name, weight in weights.items():
        torch.testing.assert_close(same[name], weight, rtol=0, atol=tolerance * weight.abs().max().item(), msg=name)


@on_gpu
@pytest.mark.parametrize(
    "settings", [{"cuda_graphs": False}, {"gradient_checkpointing": True}, {"scaling": "dynamic:4"}]
)
def test_what_forbids_replays(settings: dict[str, Any], tmp_path: Path) -> None:
    assert train("ard", tmp_path, **settings)[2] == 0


class Waits(nn.Module):
    """Asks the GPU for a number in every pass, which a capture does not allow."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        assert hidden.abs().max().item() >= 0
        return self.inner(hidden)


@on_gpu
def test_a_model_that_cannot_be_captured_is_trained_as_usual(tmp_path: Path) -> None:
    model = make_llama()
    model.model.layers[0].mlp = Waits(model.model.layers[0].mlp)
    with pytest.warns(UserWarning, match="steps run without CUDA graphs"):
        log, _, replays = train("ard", tmp_path / "waits", model=model)
    assert replays == 0
    for before, after in zip(train("ard", tmp_path / "plain", cuda_graphs=False)[0], log, strict=True):
        assert before == pytest.approx(after, rel=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train("ard", tmp_path / "after")[2] == STEPS - WARM_UP


@on_gpu
def test_gradients_of_several_shapes_add_up() -> None:
    weight = nn.Parameter(torch.randn(5, 3, device="cuda"))
    other = nn.Parameter(torch.randn(3, device="cuda"))

    def step(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = (inputs["x"] @ weight).square().sum()
        loss.backward()
        return {"loss": loss.detach()}

    graphs = StepGraphs([weight, other], alone=False)
    for _ in range(WARM_UP + 2):
        weight.grad = None
        batches = [torch.randn(rows, 5, device="cuda") for rows in (2, 4, 2)]
        losses = [graphs.run("", {"x": batch}, step)["loss"] for batch in batches]
        expected = sum(2 * batch.mT @ (batch @ weight.detach()) for batch in batches)
        torch.testing.assert_close(weight.grad, expected)
        assert other.grad is None
        for loss, batch in zip(losses, batches, strict=True):
            torch.testing.assert_close(loss, (batch @ weight.detach()).square().sum())
