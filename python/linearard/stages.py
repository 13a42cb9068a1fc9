"""A training stage by its name: its data, its trainer, the lengths it needs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from linearard.cpt import CPTTrainer
from linearard.data import Blocks, repeat_passages, sequence_start, training_blocks
from linearard.errors import UserError
from linearard.longred import SCHEDULE, LongREDBlocks, LongREDTrainer
from linearard.recipe import Recipe
from linearard.rope import RopeScaling, check_length, configured_context
from linearard.stage_trainer import StageTrainer
from linearard.trainer import ARDTrainer
from linearard.training_config import LongREDConfig, StageConfig

TITLES = {"ard": "ARD", "cpt": "CPT", "longred": "LongReD"}
# Stages that compare with the model as it was: they scale it themselves and hold the teacher.
WITH_TEACHER = ("ard", "longred")


@dataclass(frozen=True)
class Contexts:
    """The range of a model in tokens before and after its scaling."""

    native: int
    scaled: int

    @classmethod
    def of(cls, config: PretrainedConfig, recipe: Recipe) -> "Contexts":
        """From the model's configuration and what the recipe says."""
        native = recipe.run.native_context or configured_context(config)
        return cls(native, round(native * RopeScaling.parse(recipe.run.scaling).factor))

    def check(self, recipe: Recipe) -> None:
        """Raise UserError when a stage's sequences do not fit."""
        for name in recipe.stages:
            config = recipe.stage(name)
            if name == "ard":
                check_length(config.sequence_length, self.native, "ARD: a sequence_length")
            else:
                check_length(config.sequence_length, self.scaled, f"{TITLES[name]}: a sequence_length")
            if isinstance(config, LongREDConfig):
                check_length(config.short_length, self.native, "LongReD: a short_length")
                check_length(config.short_to_long_length, self.native, "LongReD: a short_to_long_length")


def make_trainer(recipe: Recipe, name: str, model: PreTrainedModel, dataset: Dataset, **kwargs: Any) -> StageTrainer:
    """The trainer of a stage. model: with its native RoPE for the stages that hold a teacher, else scaled."""
    config: Any = recipe.stage(name)
    if name == "ard":
        return ARDTrainer(model, config, train_dataset=dataset, **kwargs)
    if name == "longred":
        return LongREDTrainer(model, config, recipe.run.scaling, train_dataset=dataset, **kwargs)
    return CPTTrainer(model, config, train_dataset=dataset, **kwargs)


def batch_size(config: StageConfig) -> int:
    """Sequences of one optimizer step on all processes."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size


def step_tokens(config: StageConfig) -> int:
    """Tokens of one optimizer step on all processes."""
    if isinstance(config, LongREDConfig):
        return sum(SCHEDULE.count(kind) * length for kind, length in _lengths(config).items()) * (
            batch_size(config) // len(SCHEDULE)
        )
    return batch_size(config) * config.sequence_length


def stage_dataset(config: StageConfig, tokenizer: PreTrainedTokenizerBase, contexts: Contexts) -> Dataset:
    """The training sequences of a stage; at least one step of them. Raises UserError when the text is too short."""
    if isinstance(config, LongREDConfig):
        steps = config.max_steps * batch_size(config) // len(SCHEDULE)
        blocks = {
            kind: _shuffled(_sequences(config, tokenizer, length, steps * SCHEDULE.count(kind)), config.seed)
            for kind, length in _lengths(config).items()
        }
        return _longred_blocks(config, blocks, contexts)
    sequences = _sequences(config, tokenizer, config.sequence_length, config.max_steps * batch_size(config))
    if len(sequences) < batch_size(config):
        raise UserError(
            f"the training data are too short: {len(sequences)} sequences of {config.sequence_length} tokens, a step "
            f"needs {batch_size(config)}"
        )
    return Blocks(sequences)


def random_dataset(config: StageConfig, vocabulary: int, contexts: Contexts) -> Dataset:
    """Random token ids in the shapes of a stage's sequences, for runs without text."""
    generator = torch.Generator().manual_seed(config.seed)

    def rows(number: int, length: int) -> Tensor:
        return torch.randint(vocabulary, (number, length), generator=generator)

    if isinstance(config, LongREDConfig):
        blocks = {kind: rows(SCHEDULE.count(kind), length) for kind, length in _lengths(config).items()}
        return _longred_blocks(config, blocks, contexts)
    return Blocks(rows(config.max_steps * batch_size(config), config.sequence_length))


def _sequences(config: StageConfig, tokenizer: PreTrainedTokenizerBase, length: int, needed: int) -> Tensor:
    blocks = training_blocks(config.train_files, tokenizer, length, needed).input_ids
    if config.repeated_share == 0:
        return blocks
    keep = len(sequence_start(tokenizer))
    return repeat_passages(blocks, config.repeated_share, config.seed, keep, config.repeated_distances)


def _lengths(config: LongREDConfig) -> dict[str, int]:
    return {"long": config.sequence_length, "short": config.short_length, "stretched": config.short_to_long_length}


def _longred_blocks(config: LongREDConfig, blocks: dict[str, Tensor], contexts: Contexts) -> LongREDBlocks:
    number = config.max_steps * batch_size(config)
    return LongREDBlocks(blocks, number, contexts.scaled, config.positions, config.seed)


def _shuffled(rows: Tensor, seed: int) -> Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
