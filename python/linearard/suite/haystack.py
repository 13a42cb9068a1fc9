"""Texts to hide things in: prose and words of the package's corpus."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache

from linearard.data import HELD_OUT_CORPUS, TRAINING_CORPUS, read_texts

_WORD = re.compile(r"\w+")
_COMMON_PLACE = 200  # the most frequent words are grammar, which every text and answer is full of


class Prose:
    """Words of the corpus from a sentence on that a number in [0, 1) picks; they go round at the end."""

    def __init__(self, place: float) -> None:
        words = _words()
        start = int(place * len(words))
        while not _ends_sentence(words[start - 1]):
            start -= 1
        self._start, self._words = start, words

    def with_inserts(self, size: int, inserts: Sequence[tuple[float, str]]) -> str:
        """`size` words with the inserts (place in percent, text) between them, each at the end of a sentence."""
        count = len(self._words)
        words = [self._words[(self._start + index) % count] for index in range(size)]
        moved = []
        for place, insert in inserts:
            index = round(size * place / 100)
            while 0 < index < size and not _ends_sentence(words[index - 1]):
                index += 1
            moved.append((100 * index / max(size, 1), insert))
        return spread(words, moved, " ")


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


def _ends_sentence(word: str) -> bool:
    return word.endswith((".", "!", "?"))


@cache
def _words() -> tuple[str, ...]:
    return tuple(" ".join(read_texts([HELD_OUT_CORPUS, TRAINING_CORPUS])).split())
