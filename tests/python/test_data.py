"""Text to blocks of tokens, last-word passages, and the corpus in the package."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from tiny_models import make_tokenizer, sample_text, write_text
from tokenizers import processors

from linearard.data import (
    HELD_OUT_CORPUS,
    LAST_WORDS,
    TRAINING_CORPUS,
    evaluation_windows,
    last_word_examples,
    make_blocks,
    read_texts,
    repeat_passages,
    training_blocks,
)
from linearard.errors import UserError

# A gzip file with a byte of its compressed part changed.
DAMAGED = bytes(
    byte ^ 0xFF * (place == 12) for place, byte in enumerate(gzip.compress(sample_text()[:1000].encode(), mtime=0))
)


def test_blocks_are_the_text_with_bos_in_front() -> None:
    tokenizer = make_tokenizer()
    text = sample_text()[:3000]
    blocks = make_blocks([text], tokenizer, 50)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(blocks) == len(ids) // 49
    assert (blocks[:, 0] == tokenizer.bos_token_id).all()
    assert blocks[:, 1:].flatten().tolist() == ids[: 49 * len(blocks)]


def test_no_bos_where_the_tokenizer_has_none() -> None:
    tokenizer = make_tokenizer(bos=None)
    ids = tokenizer("a b c d e f", add_special_tokens=False)["input_ids"]
    assert make_blocks(["a b c d e f"], tokenizer, len(ids)).tolist() == [ids]


def test_no_bos_where_the_tokenizer_does_not_use_it() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    assert tokenizer.bos_token_id == 0
    ids = tokenizer("a b c d e f")["input_ids"]
    assert ids[0] != tokenizer.bos_token_id
    assert make_blocks(["a b c d e f"], tokenizer, len(ids)).tolist() == [ids]


def test_blocks_do_not_run_over_the_end_of_a_text() -> None:
    tokenizer = make_tokenizer()
    texts = [sample_text()[:500], sample_text()[500:900]]
    separate = [make_blocks([text], tokenizer, 20) for text in texts]
    torch.testing.assert_close(make_blocks(texts, tokenizer, 20), torch.cat(separate))


# Shares of the repeated tokens that come from less than a quarter of the sequence before, and from over three quarters.
@pytest.mark.parametrize(
    ("distances", "near", "far"), [("random", (0.4, 0.7), (0, 0.1)), ("far", (0.03, 0.25), (0.35, 0.65))]
)
def test_repeated_passages_are_earlier_ones_of_the_same_sequence(
    distances: str, near: tuple[float, float], far: tuple[float, float]
) -> None:
    rows = torch.arange(24 * 2048).reshape(24, 2048)
    repeated = repeat_passages(rows, 0.05, seed=1, distances=distances)
    before = []
    for row, plain in zip(repeated, rows, strict=True):
        changed = row != plain
        # Passages that overlap leave fewer.
        assert 0.03 < changed.float().mean() <= 0.05
        before.append(plain[changed] - row[changed])
        assert before[-1].min() >= 8, "no passage overlaps its source"
        assert row.min() == plain.min()
        starts = torch.nonzero(changed[1:] & (row[1:] != row[:-1] + 1)).flatten()
        assert 0 < len(starts) < changed.sum() / 4, "passages, not single tokens"
    apart = torch.cat(before) / 2048
    assert near[0] < (apart < 0.25).float().mean() < near[1]
    assert far[0] < (apart > 0.75).float().mean() < far[1]
    if distances == "far":
        assert apart.max() > 0.97, "some from its beginning at its end"


def test_repeated_passages_depend_on_seed_and_row_alone() -> None:
    rows = torch.arange(4 * 300).reshape(4, 300)
    repeated = repeat_passages(rows, 0.5, seed=3)
    assert torch.equal(repeated[:2], repeat_passages(rows[:2], 0.5, seed=3))
    assert not torch.equal(repeated, repeat_passages(rows, 0.5, seed=4))
    assert torch.equal(rows, torch.arange(4 * 300).reshape(4, 300)), "the sequences themselves stay"


def test_repeated_passages_leave_the_start_and_short_sequences() -> None:
    rows = torch.arange(2 * 64).reshape(2, 64)
    repeated = repeat_passages(rows, 0.9, seed=1, keep=1)
    assert torch.equal(repeated[:, 0], rows[:, 0])
    assert not (repeated[:, 1:] == rows[:, :1]).any()
    assert torch.equal(repeat_passages(rows[:, :24], 0.9, seed=1), rows[:, :24]), "no room for a passage"


def test_training_blocks_come_evenly_from_all_texts(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    file = tmp_path / "two.jsonl"
    texts = [sample_text()[:4000], sample_text()[4000:8000]]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    few = training_blocks([file], tokenizer, 32, needed=6)
    expected = torch.cat([make_blocks([text], tokenizer, 32)[:3] for text in texts])
    torch.testing.assert_close(few.input_ids, expected)
    everything = training_blocks([file], tokenizer, 32, needed=10_000)
    torch.testing.assert_close(everything.input_ids, make_blocks(texts, tokenizer, 32))
    assert everything[3]["input_ids"].tolist() == everything.input_ids[3].tolist()


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".txt.gz", ".jsonl.gz"])
def test_file_formats(suffix: str, tmp_path: Path) -> None:
    content = "Größe\nzwei" if suffix.startswith(".txt") else json.dumps({"text": "Größe\nzwei"}) + "\n"
    file = tmp_path / f"text{suffix}"
    file.write_bytes(gzip.compress(content.encode()) if suffix.endswith(".gz") else content.encode())
    assert list(read_texts([file])) == ["Größe\nzwei"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"x", "neither .jsonl nor .txt"),
        ("a.jsonl", b"{", "line 1 .* is not JSON"),
        ("a.jsonl", b"3\n", "not a JSON object"),
        ("a.jsonl", b'{"txt": "x"}\n', "no field 'text'"),
        ("a.txt.gz", b"not gzip", "cannot read"),
        ("a.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:-9], "cannot read"),
        ("a.txt.gz", DAMAGED, "cannot read"),
        ("a.txt", b"\xff\xfe\xff", "cannot read"),
        ("missing.txt", None, "does not exist"),
    ],
)
def test_bad_files(name: str, content: bytes | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        list(read_texts([tmp_path / name]))


def test_too_short_data(tmp_path: Path) -> None:
    file = write_text(tmp_path, 20)
    with pytest.raises(UserError, match="training data are too short"):
        training_blocks([file], make_tokenizer(), 64, needed=2)
    with pytest.raises(UserError, match="held-out data are too short"):
        evaluation_windows([file], make_tokenizer(), 64, 2)
    with pytest.raises(UserError, match="no room"):
        make_blocks(["text"], make_tokenizer(), 1)


def test_evaluation_windows_are_spread_over_the_text(tmp_path: Path) -> None:
    file = write_text(tmp_path)
    everything = evaluation_windows([file], make_tokenizer(), 32, 10_000)
    some = evaluation_windows([file], make_tokenizer(), 32, 4)
    quarter = len(everything) / 4
    torch.testing.assert_close(some, everything[[int(index * quarter) for index in range(4)]])


def test_last_word_file(tmp_path: Path) -> None:
    file = tmp_path / "words.jsonl"
    file.write_text('{"context": "a b a", "word": "b"}\n{"context": "c", "word": "d"}\n')
    assert [example.word for example in last_word_examples(file, 10)] == ["b", "d"]
    assert [example.word for example in last_word_examples(file, 1)] == ["b"]
    file.write_text('{"context": "a"}\n')
    with pytest.raises(UserError, match="'context' and 'word'"):
        last_word_examples(file, 1)


def test_the_package_corpus_keeps_training_and_evaluation_apart() -> None:
    train, held_out = list(read_texts([TRAINING_CORPUS])), list(read_texts([HELD_OUT_CORPUS]))
    examples = last_word_examples(LAST_WORDS, 10_000)
    assert sum(map(len, train)) > 4.4e6, "enough for 1.05M tokens of SmolLM2 (4.2 characters each)"
    assert len(examples) >= 128
    everything = "\n".join(train)
    for text in [*held_out, *(example.context for example in examples)]:
        assert not any(text[start : start + 60] in everything for start in range(0, len(text) - 60, 700))
    assert "gutenberg" not in "".join([*train, *held_out]).lower()


def test_last_words_occur_earlier_in_their_passage() -> None:
    for example in last_word_examples(LAST_WORDS, 10_000):
        assert example.word in example.context
        assert not example.context.endswith(example.word)
