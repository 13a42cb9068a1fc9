"""Text in, fixed-length blocks of token ids out; and the small corpus that the package carries (see README.md)."""

import gzip
import itertools
import json
import math
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from linearard.errors import UserError

BUNDLED = "bundled"  # stands for the package's own file wherever a file is named
TRAINING_CORPUS = Path(__file__).parent / "corpus-train.jsonl.gz"
HELD_OUT_CORPUS = Path(__file__).parent / "corpus-heldout.jsonl.gz"
LAST_WORDS = Path(__file__).parent / "last-words.jsonl.gz"
_TEXTS_AT_ONCE = 32  # tokenised in parallel
_REPEATED_TOKENS = (8, 256)  # of a repeated passage


@dataclass(frozen=True)
class LastWordExample:
    """A passage without its last word, and that word."""

    context: str
    word: str


class Blocks(Dataset[dict[str, Tensor]]):
    """Token ids [number, length] as a data set of `{"input_ids": [length]}`."""

    def __init__(self, input_ids: Tensor) -> None:
        self.input_ids = input_ids

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index]}


def read_texts(files: Sequence[str | Path]) -> Iterator[str]:
    """The documents of `.jsonl` files (field `text`) and `.txt` files (one document each), also gzipped (`.gz`)."""
    for file in map(Path, files):
        kind = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
        if kind not in (".jsonl", ".txt"):
            raise UserError(f"the data file {str(file)!r} is neither .jsonl nor .txt (both also as .gz)")
        with _open(file) as stream:
            if kind == ".txt":
                yield stream.read()
                continue
            for row in _rows(file, stream):
                if not isinstance(row.get("text"), str):
                    raise UserError(f"a line of {str(file)!r} has no field 'text' with a string")
                yield row["text"]


def read_json_lines(file: str | Path) -> list[dict[str, Any]]:
    """The objects of a `.jsonl` file, also gzipped: line n is item n - 1. UserError with the number of a bad line."""
    with _open(Path(file)) as stream:
        return list(_rows(Path(file), stream))


def sequence_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text by itself: BOS, or nothing.

    A tokenizer may know a BOS token and not use it (SmolLM2's begins a turn of a chat): training begins sequences as
    users of the model do.
    """
    text: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    places = range(len(whole) - len(text) + 1)
    return whole[: next((place for place in places if whole[place : place + len(text)] == text), 0)]


def make_blocks(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, *, blocks_per_text: int | None = None
) -> Tensor:
    """Consecutive blocks [number, length] of token ids (int64), in the order of the texts.

    Every block begins as the tokenizer begins a sequence (as in the paper: each book cut into blocks, Llama's BOS
    in front); the incomplete block at the end of a text is dropped. blocks_per_text: at most so many of each text.
    """
    start = sequence_start(tokenizer)
    payload = length - len(start)
    if payload < 1:
        raise UserError(f"sequences of {length} tokens leave no room for text")
    # Text has far fewer than 8 characters a token: enough of each, without tokenising whole books.
    characters = None if blocks_per_text is None else 8 * payload * blocks_per_text
    blocks: list[list[int]] = []
    remaining = iter(texts)
    while group := [text[:characters] for text in itertools.islice(remaining, _TEXTS_AT_ONCE)]:
        for ids in tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]:
            count = len(ids) // payload
            if blocks_per_text is not None:
                count = min(count, blocks_per_text)
            blocks += [start + ids[index * payload : (index + 1) * payload] for index in range(count)]
    return torch.tensor(blocks, dtype=torch.long).reshape(len(blocks), length)


def training_blocks(
    files: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, length: int, needed: int
) -> Blocks:
    """Blocks for training on `files`; `needed`: how many a whole run uses, so that no more text is tokenised.

    They come evenly from all texts, as far as those are long enough. Raises UserError when there is not one block.
    """
    texts = list(read_texts([TRAINING_CORPUS if file == BUNDLED else file for file in files]))
    per_text = max(1, -(-needed // max(1, len(texts))))
    blocks = make_blocks(texts, tokenizer, length, blocks_per_text=per_text)
    if len(blocks) < needed:  # some texts are short: take what the others have
        blocks = make_blocks(texts, tokenizer, length)
    if len(blocks) == 0:
        raise UserError(f"the training data are too short: not one block of {length} tokens")
    return Blocks(blocks)


def repeat_passages(input_ids: Tensor, share: float, seed: int, keep: int = 0, distances: str = "random") -> Tensor:
    """Copies of the sequences [number, length] in which earlier passages come again in the place of later tokens.

    Passages of 8 to 256 tokens, their lengths log-uniform; together they have `share` of the sequence's tokens (where
    two overlap, fewer tokens change). A model that reads them has to find a passage again and copy it, which plain text
    asks for rarely. Row i depends on `seed` and i alone. keep: that many first tokens (BOS) are neither repeated nor
    replaced.
    distances: "random" puts each passage at a random place, from a random place before it: 60 % come from less than a
    quarter of the sequence before, 3 % from more than three quarters. "far": it comes again a share of 1 - u^2 of the
    sequence later, u uniform: half of them over more than three quarters of it, and some from its very beginning at its
    very end.
    """
    repeated = input_ids.clone()
    shortest, longest = _REPEATED_TOKENS
    length = input_ids.shape[1] - keep
    longest = min(longest, length // 4)
    if longest < shortest:
        return repeated
    for index, row in enumerate(repeated[:, keep:]):
        numbers = random.Random(f"repeat {seed} {index}")
        left = round(share * length)
        while left >= shortest:
            size = min(round(math.exp(numbers.uniform(math.log(shortest), math.log(longest)))), left)
            if distances == "far":
                distance = size + round((length - 2 * size) * (1 - numbers.random() ** 2))
                place = numbers.randint(distance, length - size)
                source = place - distance
            else:
                place = numbers.randint(size, length - size)
                source = numbers.randint(0, place - size)
            row[place : place + size] = row[source : source + size].clone()
            left -= size
    return repeated


def evaluation_windows(
    files: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, length: int, number: int
) -> Tensor:
    """At most `number` windows [number, length] for perplexity, at equal distances through all texts."""
    texts = read_texts([HELD_OUT_CORPUS if file == BUNDLED else file for file in files])
    blocks = make_blocks(texts, tokenizer, length)
    if len(blocks) == 0:
        raise UserError(f"the held-out data are too short: not one window of {length} tokens")
    return _evenly(blocks, number)


def last_word_examples(file: str | Path, number: int) -> list[LastWordExample]:
    """At most `number` examples, at equal distances, of a `.jsonl` file with the fields `context` and `word`."""
    path = LAST_WORDS if file == BUNDLED else Path(file)
    with _open(path) as stream:
        rows = list(_rows(path, stream))
    if not rows or not all(isinstance(row.get(name), str) for row in rows for name in ("context", "word")):
        raise UserError(f"{str(file)!r} needs lines with the fields 'context' and 'word'")
    count = min(number, len(rows))
    chosen = [rows[index * len(rows) // count] for index in range(count)]
    return [LastWordExample(row["context"], row["word"]) for row in chosen]


def _evenly(rows: Tensor, number: int) -> Tensor:
    count = min(number, len(rows))
    return rows[[index * len(rows) // count for index in range(count)]]


@contextmanager
def _open(file: Path) -> Iterator[IO[str]]:
    """The text of a file, unpacked if need be; what goes wrong while it is read is a UserError."""
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as stream:
            yield stream
    except FileNotFoundError as error:
        raise UserError(f"the data file {str(file)!r} does not exist") from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"cannot read the data file {str(file)!r}: {error}") from error


def _rows(file: Path, stream: IO[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(stream, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"line {number} of {str(file)!r} is not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise UserError(f"line {number} of {str(file)!r} is not a JSON object")
        yield row
