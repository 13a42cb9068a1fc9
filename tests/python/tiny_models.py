"""A small random Llama with its tokenizer and text, made on the spot, for the tests of the training method."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from linearard.data import HELD_OUT_CORPUS, read_texts

VOCABULARY = 320
CONTEXT = 64


@cache
def sample_text() -> str:
    """Some thousand words of real prose."""
    return next(iter(read_texts([HELD_OUT_CORPUS])))


@cache
def _trained_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sample_text()], trainer)
    return tokenizer


def make_tokenizer(bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens."""
    model = Tokenizer.from_str(_trained_tokenizer().to_str())
    if bos is not None:
        model.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token=bos, eos_token="</s>")


def make_llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """A Llama of three layers with grouped queries, weights large enough for its attention to depend on positions."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
            "initializer_range": 0.3,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **settings,
        }
    )
    return LlamaForCausalLM(config).eval()


def save_model(directory: Path, **settings: Any) -> Path:
    """A directory with such a model and its tokenizer."""
    make_llama(**settings).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def write_text(directory: Path, characters: int = 8000) -> Path:
    """A JSON-lines file with one document."""
    file = directory / "text.jsonl"
    file.write_text(json.dumps({"text": sample_text()[:characters]}) + "\n", encoding="utf-8")
    return file


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids [batch, length]."""
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
