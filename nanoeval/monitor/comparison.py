"""Compares two runs question by question. Pure numbers: knows neither SQL nor Streamlit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from nanoeval._statistics import t_quantile_95

# (question id, sum of scores, number of scores, a task id), sorted by question.
QuestionScore = tuple[str, float, int, int]
MAX_FLIPS = 200


@dataclass(frozen=True, slots=True)
class Flip:
    """A question that one run got right more often than not, and the other did not."""

    question_id: str
    first_mean: float
    second_mean: float
    first_task: int
    second_task: int


@dataclass(slots=True)
class Comparison:
    """The second run minus the first, over the questions that both have scores for."""

    num_paired: int = 0
    num_only_first: int = 0
    num_only_second: int = 0
    first_mean: float = 0.0
    second_mean: float = 0.0
    num_gained: int = 0
    num_lost: int = 0
    gained: list[Flip] = field(default_factory=list)
    lost: list[Flip] = field(default_factory=list)
    variance: float = 0.0

    @property
    def difference(self) -> float:
        return self.second_mean - self.first_mean

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's 95 % interval of the mean difference per question; None for fewer than two."""
        if self.num_paired < 2:
            return None
        reach = t_quantile_95(self.num_paired - 1) * math.sqrt(self.variance / self.num_paired)
        return self.difference - reach, self.difference + reach


def compare(first: Iterable[QuestionScore], second: Iterable[QuestionScore]) -> Comparison:
    """Pair two runs by question; a question's score is the mean of its attempts' scores."""
    found = Comparison()
    mean = squares = 0.0  # of the differences, by Welford's method
    for a, b in _paired(first, second, found):
        found.num_paired += 1
        n = found.num_paired
        first_mean, second_mean = a[1] / a[2], b[1] / b[2]
        found.first_mean += (first_mean - found.first_mean) / n
        found.second_mean += (second_mean - found.second_mean) / n
        difference = second_mean - first_mean
        step = difference - mean
        mean += step / n
        squares += step * (difference - mean)
        if (first_mean > 0.5) != (second_mean > 0.5):
            _note_flip(found, Flip(a[0], first_mean, second_mean, a[3], b[3]))
    if found.num_paired > 1:
        found.variance = squares / (found.num_paired - 1)
    return found


def _note_flip(found: Comparison, flip: Flip) -> None:
    if flip.second_mean > 0.5:
        found.num_gained += 1
        flips = found.gained
    else:
        found.num_lost += 1
        flips = found.lost
    if len(flips) < MAX_FLIPS:
        flips.append(flip)


def _paired(
    first: Iterable[QuestionScore], second: Iterable[QuestionScore], found: Comparison
) -> Iterator[tuple[QuestionScore, QuestionScore]]:
    """Merge two sorted streams; questions that one lacks are counted."""
    left, right = (iter(q for q in stream if q[2]) for stream in (first, second))
    a, b = next(left, None), next(right, None)
    while a is not None and b is not None:
        if a[0] == b[0]:
            yield a, b
            a, b = next(left, None), next(right, None)
        elif a[0] < b[0]:
            found.num_only_first += 1
            a = next(left, None)
        else:
            found.num_only_second += 1
            b = next(right, None)
    found.num_only_first += (a is not None) + sum(1 for _ in left)
    found.num_only_second += (b is not None) + sum(1 for _ in right)
