"""What was measured: one value for each example or document, and means, standard errors and recoveries made of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from linearard.errors import UserError

ACCURACY = "accuracy"  # shares between 0 and 1
NLL = "nll"  # nats
SMALLEST_GAP = 1e-3  # nats; below it scaling did no damage whose recovery could be told from noise


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Figure:
    """One measurement of one model.

    values: one per example (tasks) or document (perplexity), in an order that is the same for every model.
    metric: `accuracy` (shares) or `nll` (negative log-likelihood in nats, of a word or per token).
    length: tokens of the context; depth: place of the needle in percent; positions: first token position of a bucket of
    perplexity, from 0, and the one after its last. variant: which of several metrics of a task this is; only the main
    one ("") enters means.
    """

    task: str
    metric: str
    values: tuple[float, ...]
    length: int | None = None
    depth: float | None = None
    positions: tuple[int, int] | None = None
    variant: str = ""

    def __post_init__(self) -> None:
        if not self.values:
            raise UserError(f"{self.task} has no example")

    @property
    def key(self) -> tuple[object, ...]:
        """What the same measurement of another model has in common with this one."""
        return self.task, self.metric, self.length, self.depth, self.positions, self.variant

    @property
    def name(self) -> str:
        """For people."""
        parts = [self.task + (f" ({self.variant})" if self.variant else "")]
        if self.length is not None:
            parts.append(f"at {tokens_text(self.length)}")
        if self.depth is not None:
            parts.append(f"depth {self.depth:g} %")
        if self.positions is not None:
            parts.append(f"tokens {self.positions[0]:,} to {self.positions[1] - 1:,}")
        return ", ".join(parts)

    @property
    def estimate(self) -> Estimate:
        """Mean and standard error: binomial for accuracies, from the spread over the examples for log-likelihoods."""
        count = len(self.values)
        mean = math.fsum(self.values) / count
        return Estimate(mean, math.sqrt(_variance(self.values, self.metric) / count))


def pooled(figures: Sequence[Figure]) -> Figure:
    """The examples of several figures of one task and length as one figure, whatever their depth."""
    first = figures[0]
    return Figure(first.task, first.metric, tuple(v for figure in figures for v in figure.values), first.length)


def mean_of_tasks(figures: Sequence[Figure]) -> Estimate:
    """The mean over tasks of their means; every task counts the same, however many examples it has."""
    estimates = [figure.estimate for figure in figures]
    count = len(estimates)
    return Estimate(
        math.fsum(estimate.value for estimate in estimates) / count,
        math.sqrt(math.fsum(estimate.error**2 for estimate in estimates)) / count,
    )


def share_of_teacher(model: Sequence[Figure], teacher: Sequence[Figure]) -> Estimate | None:
    """The mean accuracy of the model over that of the teacher, on the same tasks; None where the teacher has 0.

    The standard error is that of a ratio of means of paired examples (delta method): examples that both models get
    right or wrong do not contribute.
    """
    own, native = mean_of_tasks(model).value, mean_of_tasks(teacher).value
    if native == 0:
        return None
    ratio = own / native
    variances = []
    for ours, theirs in zip(model, teacher, strict=True):
        residuals = [a - ratio * b for a, b in _pairs(ours, theirs)]
        variances.append(_variance(residuals, ACCURACY) / len(residuals))
    return Estimate(ratio, math.sqrt(math.fsum(variances)) / len(variances) / native)


def gap_closed(model: Figure, scaled: Figure, teacher: Figure) -> Estimate | None:
    """The share of the distance in nats, from the untrained scaled model to the teacher, that `model` has covered.

    1 is restored in full, above 1 is adaptation to the text; None where the scaling did no damage. Standard error as
    in `share_of_teacher`.
    """
    damage = scaled.estimate.value - teacher.estimate.value
    if damage < SMALLEST_GAP:
        return None
    share = (scaled.estimate.value - model.estimate.value) / damage
    mended = [a - b for a, b in _pairs(scaled, model)]
    damaged = [a - b for a, b in _pairs(scaled, teacher)]
    residuals = [a - share * b for a, b in zip(mended, damaged, strict=True)]
    return Estimate(share, math.sqrt(_variance(residuals, NLL) / len(residuals)) / damage)


def tokens_text(count: int) -> str:
    """8192 as 8K, 1500 as 1,500."""
    return f"{count // 1024}K" if count % 1024 == 0 else f"{count:,}"


def _pairs(first: Figure, second: Figure) -> list[tuple[float, float]]:
    if len(first.values) != len(second.values):
        raise UserError(
            f"{first.name} was measured on {len(first.values)} and on {len(second.values)} examples, which cannot be "
            "compared"
        )
    return list(zip(first.values, second.values, strict=True))


def _variance(values: Sequence[float], metric: str) -> float:
    """Of one value. For accuracies p (1 - p), for log-likelihoods the unbiased estimate, NaN for a single one."""
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    if metric == ACCURACY:
        return squares / len(values)
    return squares / (len(values) - 1) if len(values) > 1 else math.nan
