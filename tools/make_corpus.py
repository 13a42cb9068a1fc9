"""Cut the corpus that the package ships out of JSON-lines files of public-domain books.

    python tools/make_corpus.py TRAIN.jsonl.gz HELD_OUT.jsonl.gz python/linearard/data

Each line of the inputs is an object with the fields "author", "title" and "text". Written are

* corpus-train.jsonl.gz: one excerpt of each of `TRAIN_BOOKS` books;
* corpus-heldout.jsonl.gz: one excerpt of each held-out book, for perplexity;
* last-words.jsonl.gz: passages of the held-out books, from outside those excerpts, whose last word occurs earlier in
  the passage (fields "context" and "word"), in the manner of LAMBADA (Paperno et al., 2016);
* README.md: what the files are, and the author and title of every book.

The output depends on nothing but the inputs: no random numbers, no time stamps.
"""

import argparse
import gzip
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

TRAIN_BOOKS = 16
TRAIN_CHARACTERS = 290_000
HELD_OUT_CHARACTERS = 16_000
LAST_WORD_EXAMPLES = 400
PASSAGE_CHARACTERS = (180, 360)
# Lines of the transcription, not of the book.
TRANSCRIPTION = re.compile(
    r"gutenberg|transcriber|proofread|e-?text|\[illustration|\[sidenote|^\s*\[?footnote|pgdp", re.I
)
WORD = re.compile(r"[A-Za-z]+")
# Words that end many sentences whatever came before: guessing them shows no use of the context.
COMMON = frozenset(
    """
    about above after again against almost along also always another anything around back because been before being
    below better between both came cannot come could days does done down during each else enough even ever every
    everything face find first from gave give going good great half hand hands have having head heart here herself
    himself home however house indeed into itself just knew know known last least left less life like little long
    look made make many matter mean might mind more most much must myself near never next night nothing once only
    other others ours over part people place quite rather right round said same seem seemed shall should side since
    some something soon still such sure take than that their theirs them themselves then there these they thing
    things think this those though thought through thus time together told took turn under until upon very want way
    well went were what when where which while whole will with without word words work world would year years your
    yours yourself
    """.split()  # noqa: SIM905
)


def clean(text: str) -> list[str]:
    """The paragraphs of a book, joined to single lines, without the notes of its transcribers."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text.replace("\r", "")):
        if TRANSCRIPTION.search(block):
            continue
        line = re.sub(r"\s+", " ", block).strip().replace("_", "")
        if len(line) > 1 and not re.fullmatch(r"[\W\d]*|[*\s]+", line):
            paragraphs.append(line)
    return paragraphs


def excerpt(paragraphs: list[str], start_share: float, characters: int) -> str:
    """Consecutive paragraphs of about `characters` characters, from `start_share` of the book on."""
    total = sum(map(len, paragraphs))
    taken: list[str] = []
    size = position = 0
    for paragraph in paragraphs:
        if position >= start_share * total and size < characters:
            taken.append(paragraph)
            size += len(paragraph) + 1
        position += len(paragraph)
    return "\n".join(taken)


def last_word_examples(paragraphs: list[str]) -> Iterator[dict[str, str]]:
    """Passages of several sentences that end in a word (of at least four letters) which occurred before in them."""
    text = "\n".join(paragraphs)
    taken_until = 0
    for end in re.finditer(r"\b([A-Za-z]{4,})[.!?][\"”']?[\s]", text):
        word = end.group(1)
        begin = max(taken_until, end.start() - PASSAGE_CHARACTERS[1])
        start = re.compile(r"(?<=[.!?\n\"”])\s*(?=[A-Z\"“])").search(text, begin, end.start())
        if start is None or end.start() - start.end() < PASSAGE_CHARACTERS[0] or word.lower() in COMMON:
            continue
        context = text[start.end() : end.start()].strip()
        words = WORD.findall(context)
        in_last_sentence = WORD.findall(re.split(r"[.!?]", context)[-1])
        if words.count(word) < 2 or word in in_last_sentence or len(in_last_sentence) < 5:
            continue
        taken_until = end.end()
        yield {"context": context, "word": word}


def write_gzip(path: Path, rows: list[dict[str, str]]) -> None:
    """One JSON object a line, compressed with a fixed time stamp, so that equal content gives equal bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=9, mtime=0) as stream:
        for row in rows:
            stream.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    path.write_bytes(buffer.getvalue())


def read_books(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def evenly(rows: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    """`count` rows at equal distances."""
    return [rows[index * len(rows) // count] for index in range(min(count, len(rows)))]


README = """# The corpus of the demo

Excerpts of books that are in the public domain in the United States (published before 1929), taken from plain-text
transcriptions, without the notes of their transcribers. Nothing here carries a licence of its own. Made by
`tools/make_corpus.py`; no book occurs both in training and in evaluation.

* `corpus-train.jsonl.gz`: {train_characters} characters for training (fields `author`, `title`, `text`).
* `corpus-heldout.jsonl.gz`: {held_out_characters} characters for perplexity (the same fields).
* `last-words.jsonl.gz`: {examples} passages of several sentences (`context`) whose last word (`word`) occurs earlier in
  the passage: a model that uses its context guesses more of them. Chosen by rule, not by a model or by people.

## Training
{train}

## Evaluation (held out)
{held_out}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()

    train = [
        {"author": book["author"], "title": book["title"], "text": excerpt(clean(book["text"]), 0.1, TRAIN_CHARACTERS)}
        for book in evenly(read_books(arguments.train), TRAIN_BOOKS)
    ]
    held_out, examples = [], []
    for book in read_books(arguments.held_out):
        paragraphs = clean(book["text"])
        text = excerpt(paragraphs, 0.4, HELD_OUT_CHARACTERS)
        held_out.append({"author": book["author"], "title": book["title"], "text": text})
        first = paragraphs.index(text.split("\n", 1)[0], len(paragraphs) // 5)
        outside = paragraphs[len(paragraphs) // 20 : first], paragraphs[first + text.count("\n") + 1 :]
        examples.append([example for part in outside for example in last_word_examples(part)])
    last_words = [row for rows in examples for row in evenly(rows, LAST_WORD_EXAMPLES // len(examples))]

    write_gzip(arguments.output / "corpus-train.jsonl.gz", train)
    write_gzip(arguments.output / "corpus-heldout.jsonl.gz", held_out)
    write_gzip(arguments.output / "last-words.jsonl.gz", last_words)
    titles = [
        "\n".join(f"* {book['author']}: {' '.join(book['title'].split())}" for book in books)
        for books in (train, held_out)
    ]
    readme = README.format(
        train_characters=sum(len(book["text"]) for book in train),
        held_out_characters=sum(len(book["text"]) for book in held_out),
        examples=len(last_words),
        train=titles[0],
        held_out=titles[1],
    )
    (arguments.output / "README.md").write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
