"""The statistics behind "same", "different" and "cannot tell"."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from nanoeval.endpoint.paired_statistics import (
    compare_scores,
    equivalence_p,
    mcnemar_p,
    more_samples_needed,
    score_interval,
)

REPETITIONS = 1000
# Three standard deviations of a share of 5 % seen in so many repetitions.
TOLERATED = 0.05 + 3 * math.sqrt(0.05 * 0.95 / REPETITIONS)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    """A wrong p calls noise a difference."""
    assert mcnemar_p(0, 0) == 1
    assert mcnemar_p(5, 5) == 1
    # Of 6 flips, all one way: 2 / 2^6.
    assert mcnemar_p(6, 0) == pytest.approx(2 / 64)
    # Of 10 flips, 1 the other way: 2 (1 + 10) / 2^10.
    assert mcnemar_p(1, 9) == pytest.approx(2 * 11 / 1024)
    assert mcnemar_p(9, 1) == mcnemar_p(1, 9)
    assert 0 < mcnemar_p(900, 1100) < 1e-4


def test_interval_has_its_closed_form_where_nothing_flipped() -> None:
    """Without a flip a plain interval has no width, as if two servers were proven the same.

    For b = c = 0 Tango's statistic is n d / sqrt(n d (1 - d)); it reaches z at z^2 / (n + z^2).
    """
    z2 = 1.959963984540054**2
    for n in (10, 100, 1319):
        low, high = score_interval(0, 0, n)
        assert high == pytest.approx(z2 / (n + z2), abs=1e-9)
        assert low == pytest.approx(-high)


def test_interval_mirrors_and_reaches_its_ends() -> None:
    """An interval that depends on which server is named first is wrong."""
    low, high = score_interval(12, 30, 200)
    assert score_interval(30, 12, 200) == pytest.approx((-high, -low))
    assert low < (12 - 30) / 200 < high
    assert score_interval(10, 0, 10)[1] == 1.0
    # Near the plain interval of large samples: d +- z sqrt((b + c) / n^2 - d^2 / n).
    wide = score_interval(400, 500, 10_000)
    half = 1.96 * math.sqrt(900 / 10_000**2 - 0.01**2 / 10_000)
    assert wide == pytest.approx((-0.01 - half, -0.01 + half), abs=3e-4)


def test_equivalence_needs_evidence() -> None:
    """Ten equal answers must not prove two servers the same."""
    assert equivalence_p(0, 0, 10, 0.02) > 0.4
    assert equivalence_p(0, 0, 2000, 0.02) < 0.001
    assert equivalence_p(30, 30, 10_000, 0.02) < 0.001
    assert equivalence_p(60, 20, 1000, 0.02) > 0.5
    # Each side alone: b - c = 0, n m = 20, flips 100 -> about z = 19.5 / sqrt(100).
    assert equivalence_p(50, 50, 1000, 0.02) == pytest.approx(1 - 0.9744, abs=0.01)


def draw(
    rng: np.random.Generator, n: int, only_first: float, only_second: float
) -> tuple[list[float], list[float]]:
    u = rng.random(n)
    is_second = (u >= only_first) & (u < only_first + only_second)
    is_both = (u >= only_first + only_second) & (u < 0.85)
    first = ((u < only_first) | is_both).astype(float)
    second = (is_second | is_both).astype(float)
    return first.tolist(), second.tolist()


def verdicts(n: int, only_first: float, only_second: float) -> tuple[Counter[str], float]:
    """Verdicts of seeded repetitions, and how often the interval holds the true difference."""
    rng = np.random.default_rng([n, round(1e4 * only_first), round(1e4 * only_second)])
    found: Counter[str] = Counter()
    covered = 0
    for _ in range(REPETITIONS):
        outcome = compare_scores(*draw(rng, n, only_first, only_second), margin=0.02)
        found[outcome.verdict] += 1
        covered += outcome.interval[0] <= only_second - only_first <= outcome.interval[1]
    return found, covered / REPETITIONS


def test_same_servers_are_seldom_called_different() -> None:
    """More than 5 % of false alarms would make people ignore them."""
    found, coverage = verdicts(1319, 0.03, 0.03)
    assert found["different"] <= TOLERATED * REPETITIONS
    assert found["same"] > 0.7 * REPETITIONS
    assert coverage >= 0.93


def test_shift_of_three_points_is_found_and_seldom_called_same() -> None:
    """A kernel that costs three points must not pass."""
    found, coverage = verdicts(1319, 0.06, 0.03)
    assert found["same"] <= TOLERATED * REPETITIONS
    assert found["different"] > 0.85 * REPETITIONS
    assert coverage >= 0.93


@pytest.mark.parametrize(("n", "rest"), [(135, 0.0), (400, 0.005), (1319, 0.02)])
def test_shift_of_just_the_margin_is_seldom_called_same(n: int, rest: float) -> None:
    """The stated error of "same" is at the margin, where it is hardest to hold."""
    found, _ = verdicts(n, rest + 0.02, rest)
    assert found["same"] <= TOLERATED * REPETITIONS


def test_too_few_samples_cannot_tell() -> None:
    """A hundred samples prove nothing at two points."""
    found, _ = verdicts(100, 0.03, 0.03)
    assert found["cannot tell"] > 0.9 * REPETITIONS


def test_samples_needed_bring_a_verdict() -> None:
    """A number of samples that does not suffice costs a second night."""
    rng = np.random.default_rng(7)
    few = compare_scores(*draw(rng, 300, 0.02, 0.02), margin=0.02)
    assert few.verdict == "cannot tell"
    assert few.more_samples is not None
    needed = 300 + more_samples_needed(6, 6, 300, 0.02)
    same = sum(
        compare_scores(*draw(rng, needed, 0.02, 0.02), margin=0.02).verdict != "cannot tell"
        for _ in range(200)
    )
    assert 0.7 * 200 <= same <= 0.97 * 200


def test_scores_that_are_not_binary_are_compared_by_t_tests() -> None:
    """A task with partial credit must not be squeezed into right and wrong.

    Differences 0.1, 0.2, 0.3: mean 0.2, standard error 0.1 / sqrt(3), t(2) = 3.4641, p = 0.0742.
    """
    pytest.importorskip("scipy", reason='pip install "nanoeval[endpoint]"')
    outcome = compare_scores([0.1, 0.2, 0.3], [0.2, 0.4, 0.6], margin=0.05)
    assert outcome.difference == pytest.approx(0.2)
    assert outcome.p_different == pytest.approx(0.0742, abs=1e-4)
    assert outcome.verdict == "cannot tell"
    assert outcome.more_samples is not None
    # Where pairs differ more than rare flips would: 0.01 +- t(999) 0.3 / sqrt(1000).
    noisy = compare_scores([0.5] * 1000, [0.81, 0.21] * 500)
    half = 1.96234 * 0.3 * math.sqrt(1 / 999)
    assert noisy.interval == pytest.approx((0.01 - half, 0.01 + half), abs=1e-6)


def test_equal_scores_are_the_same_only_where_there_are_enough() -> None:
    """Two pairs that agree would prove two servers the same.

    Without a difference seen p is that of binary scores: t = (n m - 1/2) / sqrt(n m (1 - m)), which
    at m = 0.02 is 1.35 for 135 pairs and 1.77 for 200; the interval reaches t^2 / (n + t^2).
    """
    pytest.importorskip("scipy", reason='pip install "nanoeval[endpoint]"')
    few = compare_scores([0.5] * 2, [0.5] * 2)
    assert (few.verdict, few.p_different) == ("cannot tell", 1.0)
    assert few.p_equivalent > 0.5
    assert few.more_samples is not None
    assert few.more_samples > 130
    some = compare_scores([0.5] * 135, [0.5] * 135)
    assert some.p_equivalent == pytest.approx(equivalence_p(0, 0, 135, 0.02), abs=0.003)
    assert some.interval == pytest.approx(score_interval(0, 0, 135), abs=0.001)
    assert compare_scores([0.5] * 200, [0.5] * 200).verdict == "same"


def test_pairs_that_all_move_alike_are_compared_by_their_signs() -> None:
    """No spread between two pairs is no proof of a difference."""
    pytest.importorskip("scipy", reason='pip install "nanoeval[endpoint]"')
    two = compare_scores([0.2, 0.3], [0.3, 0.4])
    assert (two.verdict, two.p_different) == ("cannot tell", 0.5)
    assert compare_scores([0.2, 0.3] * 5, [0.3, 0.4] * 5).verdict == "different"


@pytest.mark.parametrize(
    ("n", "size", "noise"), [(50, 0.5, 0.0), (200, 1.0, 0.0), (300, 0.5, 0.0), (300, 1.0, 0.05)]
)
def test_rare_flips_of_partial_credit_are_seldom_called_same(
    n: int, size: float, noise: float
) -> None:
    """A sample that happens to miss rare flips has no variance, and would prove anything."""
    pytest.importorskip("scipy", reason='pip install "nanoeval[endpoint]"')
    rng = np.random.default_rng([n, round(10 * size)])
    found = 0
    for _ in range(300):
        first = np.full(n, 0.5) if size < 1 else np.ones(n)
        second = first - size * (rng.random(n) < 0.02 / size) + noise * rng.standard_normal(n)
        # One pair in between, so that scores of 0 and 1 alone do not count as binary.
        first[0] = second[0] = 0.5
        found += compare_scores(first.tolist(), second.tolist(), 0.02).verdict == "same"
    assert found / 300 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


@pytest.mark.parametrize(("first", "second"), [([], []), ([1.0], [])])
def test_scores_that_do_not_pair_are_refused(first: list[float], second: list[float]) -> None:
    """Zipping to the shorter one would hide missing samples."""
    with pytest.raises(ValueError, match="do not pair"):
        compare_scores(first, second)
