"""The example of a training loop of one's own works and stays short."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import random_ids, save_model, write_text
from transformers import AutoModelForCausalLM

EXAMPLE = Path(__file__).parents[2] / "examples" / "python_training.py"


def test_python_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model", initializer_range=0.1)
    text = write_text(tmp_path, 500)  # a few blocks, seen again and again
    command = [EXAMPLE, "--model", model, "--text", text, "--steps", 60, "--length", 32, "--learning_rate", 6e-3,
               "--save", tmp_path / "restored"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in command])
    losses = runpy.run_path(str(EXAMPLE))["main"]()
    assert len(losses) == 60
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "restored")
    assert restored.config.rope_parameters["factor"] == 4
    with torch.no_grad():
        assert restored(random_ids(1, 8)).logits.isfinite().all()


def test_it_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 80
