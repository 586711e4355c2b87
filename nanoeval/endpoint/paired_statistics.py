"""Are two paired sets of scores the same? Tests and intervals, pure functions of numbers.

Binary scores are described by n pairs, of which in `b` only the second is right and in `c` only the
first; the difference is (b - c) / n, second minus first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

ALPHA = 0.05
POWER = 0.8
# Differences of scores that are no larger come from floating-point arithmetic.
ROUNDING = 1e-9
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Comparison:
    """The outcome for `num_pairs` pairs. `difference` is second minus first.

    `verdict` is "same" (equivalent within the margin), "different" or "cannot tell"; only the last
    has `more_samples`, an estimate. `only_first` and `only_second` count the flips of binary scores
    and are None for others, which are compared by t tests.
    """

    num_pairs: int
    first: float
    second: float
    difference: float
    interval: tuple[float, float]
    p_different: float
    p_equivalent: float
    margin: float
    verdict: str
    more_samples: int | None = None
    only_first: int | None = None
    only_second: int | None = None


def compare_scores(
    first: Sequence[float], second: Sequence[float], margin: float = 0.02
) -> Comparison:
    """Compare scores pair by pair.

    The verdict "same" is wrong in at most 5 % of cases where the true difference is `margin` or
    more, "different" in at most 5 % where there is none. Raises ValueError without pairs or with
    a margin outside (0, 1).
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} scores do not pair; need as many, not 0")
    if not 0 < margin < 1:
        raise ValueError(f"margin={margin} must lie between 0 and 1")
    n = len(first)
    if not set(first) | set(second) <= {0.0, 1.0}:
        return _compare_numbers(first, second, margin)
    b = sum(y > x for x, y in zip(first, second, strict=True))
    c = sum(x > y for x, y in zip(first, second, strict=True))
    p_different, p_equivalent = mcnemar_p(b, c), equivalence_p(b, c, n, margin)
    verdict = _verdict(p_different, p_equivalent)
    return Comparison(
        num_pairs=n,
        first=sum(first) / n,
        second=sum(second) / n,
        difference=(b - c) / n,
        interval=score_interval(b, c, n),
        p_different=p_different,
        p_equivalent=p_equivalent,
        margin=margin,
        verdict=verdict,
        more_samples=more_samples_needed(b, c, n, margin) if verdict == "cannot tell" else None,
        only_first=c,
        only_second=b,
    )


def _verdict(p_different: float, p_equivalent: float) -> str:
    # A difference may be real and yet within the margin: the margin says what matters.
    if p_equivalent <= ALPHA:
        return "same"
    return "different" if p_different <= ALPHA else "cannot tell"


def mcnemar_p(b: int, c: int) -> float:
    """Two-sided p of no difference, given the flips each way: McNemar's exact test.

    Under no difference b is binomial(b + c, 1/2) (McNemar 1947; exact form, Fay 2010).
    """
    flips = b + c
    if flips == 0:
        return 1.0
    log_half = flips * math.log(0.5)
    tail = math.fsum(
        math.exp(
            math.lgamma(flips + 1) - math.lgamma(k + 1) - math.lgamma(flips - k + 1) + log_half
        )
        for k in range(min(b, c) + 1)
    )
    return min(1.0, 2 * tail)


def score_deviation(b: int, c: int, n: int, difference: float) -> float:
    """The standard deviation of b - c if `difference` were true, a number in (-1, 1).

    The share of flips is the likeliest one under that difference: Tango, "Equivalence test and
    confidence interval for the difference in proportions for the paired-sample design" (1998),
    equations 8 to 10.
    """
    linear = (2 * n - b + c) * difference - b - c
    constant = -c * difference * (1 - difference)
    root = math.sqrt(max(0.0, linear * linear - 8 * n * constant))
    share = max(0.0, (root - linear) / (4 * n))
    return math.sqrt(max(0.0, n * (2 * share + difference * (1 - difference))))


def score_interval(b: int, c: int, n: int) -> tuple[float, float]:
    """The 95 % interval of the difference: all values that Tango's score test does not reject."""
    z = _NORMAL.inv_cdf(1 - ALPHA / 2)

    def rejects(difference: float) -> bool:
        gap = abs(b - c - n * difference)
        return gap > z * score_deviation(b, c, n, difference)

    centre = (b - c) / n
    return _border(rejects, centre, -1.0), _border(rejects, centre, 1.0)


def _border(rejects: Callable[[float], bool], inside: float, outside: float) -> float:
    if not rejects(outside * (1 - 1e-12)):
        return outside
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if rejects(middle) else (middle, outside)
    return (inside + outside) / 2


def equivalence_p(b: int, c: int, n: int, margin: float) -> float:
    """The p of a difference of `margin` or more either way: two one-sided tests, the larger p.

    Schuirmann (1987), with the score test of Tango (1998) for each side and a continuity correction
    of half a flip, which keeps the error at or below its level also where flips are rare.
    """
    low = b - c + n * margin - 0.5
    high = b - c - n * margin + 0.5
    p_low = 1 - _cdf(low, score_deviation(b, c, n, -margin))
    p_high = _cdf(high, score_deviation(b, c, n, margin))
    return max(p_low, p_high)


def _cdf(value: float, deviation: float) -> float:
    if deviation == 0:
        return float(value > 0) if value else 0.5
    return _NORMAL.cdf(value / deviation)


def more_samples_needed(b: int, c: int, n: int, margin: float) -> int:
    """Further pairs at which a verdict would come with 80 % power, were the observed rates true.

    Half a flip is added each way, so that none seen does not mean none possible.
    """
    return _more_samples((b + c + 1) / (n + 1), abs(b - c) / n, n, margin)


def _more_samples(square: float, d: float, n: int, margin: float) -> int:
    """The same for pairs that differ by `d` in the mean and by `square` in the mean square.

    The smaller of the sizes for equivalence (Liu et al. 2002: (z_95 + z_80)^2 (square - d^2) /
    (margin - d)^2, the power shared by both sides where d is 0) and for McNemar's test (Connor
    1987).
    """
    spread = math.sqrt(max(square - d * d, 0.0))
    sizes = []
    if d < margin:
        z_power = _NORMAL.inv_cdf((1 + POWER) / 2 if d == 0 else POWER)
        z = _NORMAL.inv_cdf(1 - ALPHA) + z_power
        sizes.append((z * spread / (margin - d)) ** 2 + 1 / (margin - d))
    if d > 0:
        z_sum = _NORMAL.inv_cdf(1 - ALPHA / 2) * math.sqrt(square) + _NORMAL.inv_cdf(POWER) * spread
        sizes.append((z_sum / d) ** 2 + 1 / d)
    return max(1, math.ceil(min(sizes)) - n)


def _compare_numbers(first: Sequence[float], second: Sequence[float], margin: float) -> Comparison:
    """Paired t tests (Student 1908; for equivalence Schuirmann 1987), for scores from 0 to 1.

    A difference d may come from rare flips over the whole range, whose variance is d (1 - d), and
    of which a sample may show none. So d is tested with that variance where the sample's own is
    smaller, and equivalence with a correction of half a flip: where no pair differs, interval and
    p are those of binary scores, but for Student's t.
    """
    n = len(first)
    differences = [y - x for x, y in zip(first, second, strict=True)]
    mean = math.fsum(differences) / n
    variance = math.fsum((d - mean) ** 2 for d in differences) / max(1, n - 1)

    def error(difference: float) -> float:
        rare = abs(difference) * (1 - abs(difference))
        return math.sqrt(max(variance, rare) / n)

    if n < 2:
        p_different, p_equivalent, interval = 1.0, 1.0, (-1.0, 1.0)
    else:
        t = _student(n - 1)
        if max(differences) - min(differences) > ROUNDING:
            p_different = 2 * float(t.sf(abs(mean) / error(0)))
        else:  # All moved alike, which leaves the sign test.
            p_different = mcnemar_p(n, 0) if abs(mean) > ROUNDING else 1.0
        p_equivalent = float(t.sf((margin - abs(mean) - 0.5 / n) / error(margin)))
        z = float(t.ppf(1 - ALPHA / 2))

        def rejects(difference: float) -> bool:
            return abs(mean - difference) > z * error(difference)

        interval = _border(rejects, mean, -1.0), _border(rejects, mean, 1.0)
    verdict = _verdict(p_different, p_equivalent)
    needed = None
    if verdict == "cannot tell":
        square = max(variance, margin * (1 - margin)) + mean * mean
        needed = _more_samples(square, abs(mean), n, margin)
    return Comparison(
        num_pairs=n,
        first=math.fsum(first) / n,
        second=math.fsum(second) / n,
        difference=mean,
        interval=interval,
        p_different=p_different,
        p_equivalent=p_equivalent,
        margin=margin,
        verdict=verdict,
        more_samples=needed,
    )


def _student(degrees: int) -> Any:
    from nanoeval.endpoint.config import EndpointError

    try:
        from scipy import stats
    except ImportError as error:
        raise EndpointError(
            'comparing scores other than 0 and 1 needs a package: pip install "nanoeval[endpoint]"'
        ) from error
    return stats.t(degrees)
