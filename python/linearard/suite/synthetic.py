"""Long-context tasks made offline for any length and tokenizer: the passkey, and tasks after RULER.

`passkey` is that of Mohtashami and Jaggi (arXiv 2305.16300): a number of five digits in repeated filler. The others
follow RULER (Hsieh et al., arXiv 2404.06654) with texts of our own: needles in prose of the package's corpus,
assignments to variables, and a list of words of which some are frequent. A prompt depends on nothing but task, length,
depth, seed and tokenizer.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from transformers import PreTrainedTokenizerBase

from linearard.data import sequence_start
from linearard.errors import UserError
from linearard.suite import haystack
from linearard.suite.figures import tokens_text

# Room for an answer beside the tokens of the answer itself: a space, a line break, a comma.
_SPARE_TOKENS = 6
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_CHAIN = 5  # variables that have the value in question, one assigned from the other
_OTHER_CHAINS = 2  # with other values
_VALUES = 4  # of the key in needle_multivalue
_OTHER_KEYS = 3  # in needle_multikey
_COMMON_WORDS = 10


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, the answers it asks for, and how many tokens may be generated for them."""

    ids: list[int]
    answers: tuple[str, ...]
    new_tokens: int


@dataclass(frozen=True)
class Draft:
    """A prompt of variable length: `text(size)` has about `size` units of filler; larger sizes are never shorter."""

    text: Callable[[int], str]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class SyntheticTask:
    """A task: how a prompt is drafted, and whether its depth can be chosen.

    draft(random numbers, depth in percent or None) gives a draft.
    """

    draft: Callable[[random.Random, float], Draft]
    has_depth: bool


def make_prompt(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    depth: float | None,
    seed: int,
    index: int,
    filler: bool = True,
) -> Prompt:
    """Prompt number `index` of the task `name`, at most `length` tokens long together with its answer.

    depth: where the needle is, in percent of the context; ignored by tasks that have none. filler: without it the
    prompt stays short, which is enough to know whether there is room. Raises UserError where the length leaves no room
    for the task.
    """
    task = SYNTHETIC_TASKS[name]
    place = depth if task.has_depth and depth is not None else None
    # A string, because its hash would differ from process to process.
    numbers = random.Random(f"{name} {length} {place} {seed} {index}")
    draft = task.draft(numbers, place or 0.0)
    answer = tokenizer(" " + ", ".join(draft.answers), add_special_tokens=False)["input_ids"]
    # Where a tokenizer makes the space before a number a token of its own, the prompt ends with it: the task is to find
    # the number, not to guess that one comes next.
    space = list(itertools.takewhile(lambda token: not tokenizer.decode([token]).strip(), answer))
    new_tokens = len(answer) - len(space) + _SPARE_TOKENS
    start = sequence_start(tokenizer)
    room = length - new_tokens - len(start) - len(space)
    ids = start + _fit(draft, tokenizer, room, f"{name} at {tokens_text(length)}", filler) + space
    return Prompt(ids, draft.answers, new_tokens)


def score(answers: tuple[str, ...], generated: str, name: str) -> float:
    """The share of the answers in the generated text; for the passkey, whether the first number in it is the key."""
    words = haystack.words_of(generated)
    if name == "passkey":
        numbers = [word for word in words if word.isdigit()]
        return float(numbers[:1] == list(answers))
    return sum(answer in words for answer in answers) / len(answers)


def _fit(draft: Draft, tokenizer: PreTrainedTokenizerBase, room: int, what: str, filler: bool) -> list[int]:
    """Token ids of the draft with as much filler as fits into `room` tokens, or with none.

    Tokens grow almost linearly with the size: interpolation between a size that fits and one that does not takes few
    tokenisations, where bisection would take many of 128K tokens each.
    """

    def encode(size: int) -> list[int]:
        encoded: list[int] = tokenizer(draft.text(size), add_special_tokens=False, verbose=False)["input_ids"]
        return encoded

    best = encode(0)
    if len(best) > room:
        raise UserError(f"{what} does not fit: the task itself needs {len(best):,} tokens, {room:,} are left for it")
    if not filler:
        return best
    low, fitting = 0, len(best)
    high, above = 0, 0  # a size that does not fit and its tokens; none known yet
    step = 16
    while not high or high - low > 1:
        if not high:
            per_unit = (fitting - len(encode(0))) / low if low else 0.0
            size = low + max(step, int((room - fitting) / per_unit)) if per_unit > 0 else low + step
            step *= 2
        else:
            share = (room - fitting) / (above - fitting)
            size = min(max(low + int((high - low) * share), low + 1), high - 1)
        ids = encode(size)
        if len(ids) <= room:
            low, fitting, best = size, len(ids), ids
            if room - fitting <= max(2, room // 1000):
                break
        else:
            high, above = size, len(ids)
    return best


def _passkey(numbers: random.Random, depth: float) -> Draft:
    key = str(numbers.randint(10_000, 99_999))
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."

    def text(size: int) -> str:
        before = round(size * depth / 100)
        filler = [_FILLER] * size
        # The prompt of the paper, word for word.
        return "\n".join(
            [
                "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will "
                "quiz you about the important information there.",
                " ".join(filler[:before]),
                needle,
                " ".join(filler[before:]),
                "What is the pass key? The pass key is",
            ]
        )

    return Draft(text, (key,))


def _needles(numbers: random.Random, depth: float, keys: int, values: int) -> Draft:
    """One key that is asked for, with `values` numbers, and `keys` - 1 others with one number each, in prose.

    The needle in question is at `depth` where it is one; all others are anywhere.
    """
    names = numbers.sample(haystack.key_words(), keys)
    digits = numbers.sample(range(1_000_000, 10_000_000), values + keys - 1)
    owners = [names[0]] * values + names[1:]
    needles = [
        f"One of the special magic numbers for {owner} is: {digit}."
        for owner, digit in zip(owners, digits, strict=True)
    ]
    places = [numbers.uniform(0, 100) for _ in needles]
    if values == 1:
        places[0] = depth
    prose = haystack.Prose(numbers.random())
    noun, verb = ("number", "is") if values == 1 else ("numbers", "are")
    question = f"the special magic {noun} for {names[0]} mentioned in the provided text"

    def text(size: int) -> str:
        context = prose.with_inserts(size, list(zip(places, needles, strict=True)))
        return (
            "Some special magic numbers are hidden within the following text. Make sure to memorize them. You will be "
            f"asked about them afterwards.\n\n{context}\n\nWhat {verb} {question}? {question.capitalize()} {verb}"
        )

    return Draft(text, tuple(str(digit) for digit in digits[:values]))


def _variable_tracking(numbers: random.Random, depth: float) -> Draft:
    names = _variable_names(numbers, _CHAIN * (1 + _OTHER_CHAINS))
    values = numbers.sample(range(10_000, 100_000), 1 + _OTHER_CHAINS)
    inserts: list[tuple[float, str]] = []
    for number, value in enumerate(values):
        chain = names[number * _CHAIN : (number + 1) * _CHAIN]
        places = sorted(numbers.uniform(0, 100) for _ in chain)
        sources = [str(value), *(f"VAR {name}" for name in chain[:-1])]
        inserts += [
            (place, f"VAR {name} = {source}") for place, name, source in zip(places, chain, sources, strict=True)
        ]

    def text(size: int) -> str:
        context = haystack.spread([_FILLER] * size, inserts, "\n")
        return (
            "Memorize and track the chains of variable assignments hidden in the following text.\n\n"
            "VAR QAB = 41218\nVAR QCD = VAR QAB\nQuestion: which variables have the value 41218? Answer: QAB, QCD\n\n"
            f"{context}\n\nQuestion: which variables have the value {values[0]}? Answer:"
        )

    return Draft(text, tuple(names[:_CHAIN]))


def _variable_names(numbers: random.Random, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(numbers.choices("ABCDEFGHJKLMNPRSTUVWXYZ", k=5))] = None
    return list(names)


def _common_words(numbers: random.Random, depth: float) -> Draft:
    words = list(haystack.vocabulary())
    numbers.shuffle(words)
    common, others = words[:_COMMON_WORDS], words[_COMMON_WORDS:]
    order = numbers.random()
    instruction = (
        "Below is a numbered list of words. Some appear more often than others. Memorize those that appear most "
        "often.\n"
    )

    @cache
    def text(size: int) -> str:
        # The list is two fifths common words, each of them far more frequent than any other.
        repeats = 4 + size // 25
        uncommon = 6 * repeats
        listed = common * repeats + [others[index // 2 % len(others)] for index in range(uncommon)]
        random.Random(order).shuffle(listed)
        context = " ".join(f"{number}. {word}" for number, word in enumerate(listed, start=1))
        return (
            f"{instruction}1. apple 2. river 3. apple 4. cloud 5. apple 6. stone\nQuestion: which word is the most "
            f"common in the list? Answer: apple\n\n{instruction}{context}\nQuestion: which {_COMMON_WORDS} words are "
            "the most common in the list? Answer:"
        )

    return Draft(text, tuple(common))


SYNTHETIC_TASKS: dict[str, SyntheticTask] = {
    "passkey": SyntheticTask(_passkey, True),
    "needle_single": SyntheticTask(lambda numbers, depth: _needles(numbers, depth, 1, 1), True),
    "needle_multikey": SyntheticTask(lambda numbers, depth: _needles(numbers, depth, 1 + _OTHER_KEYS, 1), True),
    "needle_multivalue": SyntheticTask(lambda numbers, depth: _needles(numbers, depth, 1, _VALUES), False),
    "variable_tracking": SyntheticTask(_variable_tracking, False),
    "common_words": SyntheticTask(_common_words, False),
}
RULER = [name for name in SYNTHETIC_TASKS if name != "passkey"]
