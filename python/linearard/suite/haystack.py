"""Texts to hide things in: prose and words of the package's corpus."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache

from linearard.data import HELD_OUT_CORPUS, TRAINING_CORPUS, read_texts

_WORD = re.compile(r"\w+")
_COMMON_PLACE = 200  # the most frequent words are grammar, which every text and answer is full of


class Prose:
    """Sentences of the corpus from a place on that a number in [0, 1) picks; they go round at the end."""

    def __init__(self, place: float) -> None:
        sentences = _sentences()
        start = int(place * len(sentences))
        self._start, self._sentences = start, sentences

    def with_inserts(self, size: int, inserts: Sequence[tuple[float, str]]) -> str:
        """`size` sentences with the inserts between them; see `spread`."""
        count = len(self._sentences)
        return spread([self._sentences[(self._start + index) % count] for index in range(size)], inserts, " ")


def spread(units: Sequence[str], inserts: Sequence[tuple[float, str]], separator: str) -> str:
    """Units of text with inserts (place in percent, text) between them, in the order of their places."""
    pieces: list[str] = []
    done = 0
    for place, insert in sorted(inserts, key=lambda item: item[0]):
        until = round(len(units) * place / 100)
        pieces += [*units[done:until], insert]
        done = until
    return separator.join([*pieces, *units[done:]])


@cache
def vocabulary() -> tuple[str, ...]:
    """Words of four to nine letters that occur more than once in the corpus, the most frequent first."""
    counts = Counter(re.findall(r"\b[a-z]{4,9}\b", " ".join(read_texts([HELD_OUT_CORPUS, TRAINING_CORPUS]))))
    words = sorted((word for word, count in counts.items() if count > 1), key=lambda word: (-counts[word], word))
    return tuple(words[_COMMON_PLACE:])


def key_words() -> tuple[str, ...]:
    """The more frequent of them, to name needles by."""
    return vocabulary()[:1000]


def words_of(text: str) -> list[str]:
    """Its words and numbers, without punctuation."""
    return _WORD.findall(text)


@cache
def _sentences() -> tuple[str, ...]:
    text = " ".join(" ".join(read_texts([HELD_OUT_CORPUS, TRAINING_CORPUS])).split())
    return tuple(re.split(r"(?<=[.!?]) (?=[A-Z])", text))
