"""Run by test_trainer.py in processes of its own: a training that can be killed, and the gradients of one step.

training_worker.py train DIRECTORY [--resume] [--slow]
training_worker.py gradients FILE
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from tiny_models import make_llama, random_ids
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback

from linearard.stage_trainer import checkpoints
from linearard.trainer import ARDTrainer
from linearard.training_config import ARDConfig


class PaddedRows(Dataset[dict[str, Tensor]]):
    """Rows of different lengths, padded on the right."""

    def __init__(self, number: int) -> None:
        self.ids = random_ids(number, 24)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        mask = torch.ones(24, dtype=torch.long)
        mask[24 - 3 * (index % 4) :] = 0
        return {"input_ids": self.ids[index], "attention_mask": mask}


class Slow(TrainerCallback):
    """Leaves time to be killed."""

    def on_step_end(self, *_: Any, **__: Any) -> None:
        time.sleep(0.3)


class RememberGradients(TrainerCallback):
    """Copies the gradients that the optimizer is about to use."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def config(directory: Path, **settings: Any) -> ARDConfig:
    return ARDConfig(
        **{
            "output_dir": str(directory),
            "lora_rank": 4,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            **settings,
        }
    )


def train(directory: Path, resume: bool, slow: bool) -> None:
    settings = config(
        directory, max_steps=10, per_device_train_batch_size=2, save_strategy="steps", save_steps=2, lora_dropout=0.1
    )
    callbacks = [Slow()] if slow else []
    trainer = ARDTrainer(make_llama(), settings, train_dataset=PaddedRows(40), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=str(checkpoints(directory)[-1]) if resume else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (directory / "losses.json").write_text(json.dumps(losses))


def gradients(file: Path) -> None:
    # Four rows a step, whatever the number of processes; clipping is off, so that nothing hides a wrong scale.
    settings = config(file.parent, max_steps=1, per_device_train_batch_size=1, max_grad_norm=0)
    settings.gradient_accumulation_steps = 4 // settings.world_size
    remembered = RememberGradients()
    trainer = ARDTrainer(make_llama(), settings, train_dataset=PaddedRows(4), callbacks=[remembered])
    trainer.train()
    if trainer.is_world_process_zero():
        names = {name.removeprefix("module."): gradient for name, gradient in remembered.gradients.items()}
        torch.save({**names, "loss": torch.tensor(trainer.state.log_history[0]["loss"])}, file)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=["train", "gradients"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--slow", action="store_true")
    arguments = parser.parse_args()
    if arguments.task == "train":
        train(arguments.path, arguments.resume, arguments.slow)
    else:
        gradients(arguments.path)
    # Both ranks leave together: a process that exits while the other's connections are open is aborted.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
