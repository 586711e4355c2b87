"""The formulas, against cases computed by hand and against what they claim to estimate."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from nanoeval import _statistics
from nanoeval._statistics import (
    accuracy,
    accuracy_interval,
    clustered_stderr,
    consensus,
    correctness_metrics,
    pass_at_k,
    t_quantile_95,
    wilson_interval,
)


def metrics_of(attempts_by_question: list[list[int]], unscored: list[int] | None = None) -> dict:
    question = [q for q, attempts in enumerate(attempts_by_question) for _ in attempts]
    correct = [bool(c) for attempts in attempts_by_question for c in attempts]
    return correctness_metrics(
        np.array(question, dtype=int),
        np.array(correct, dtype=bool),
        np.array(unscored or [], dtype=int),
    )


def test_accuracy_weighs_questions_not_attempts() -> None:
    """A question asked three times would count three times as much as one asked once."""
    assert metrics_of([[1, 0, 0], [1]])["accuracy"] == pytest.approx((1 / 3 + 1) / 2)


def test_clustered_stderr_by_hand() -> None:
    """Means 1, 1/2, 0: deviations 1/2, 0, 1/2; sqrt((1/4 + 1/4) / (3 * 2)) = sqrt(1/12)."""
    assert clustered_stderr(np.array([1.0, 0.5, 0.0])) == pytest.approx(math.sqrt(1 / 12))


def test_one_attempt_gives_the_plain_binomial_stderr() -> None:
    """7 of 10: sqrt(p (1 - p) / (n - 1)) = sqrt(0.21 / 9)."""
    result = accuracy(np.ones(10, dtype=int), np.array([1] * 7 + [0] * 3))
    assert result["accuracy_stderr"] == pytest.approx(math.sqrt(0.21 / 9))


def test_repeating_attempts_that_always_agree_adds_no_certainty() -> None:
    """Attempts taken for independent would halve the interval for asking four times."""
    once = accuracy(np.ones(10, dtype=int), np.array([1] * 7 + [0] * 3))
    four_times = accuracy(np.full(10, 4), np.array([4] * 7 + [0] * 3))
    assert four_times == once


def test_wilson_interval_by_hand() -> None:
    """7 of 10, z = 1.96: centre (0.7 + 0.19207) / 1.38415, half-width from the same terms."""
    low, high = wilson_interval(0.7, 10)
    assert (low, high) == pytest.approx((0.39677, 0.89221), abs=1e-4)


def test_wilson_interval_agrees_with_scipy() -> None:
    """A slip in the formula would show at some count."""
    stats = pytest.importorskip("scipy.stats", reason='pip install "nanoeval[endpoint]"')
    for hits, n in [(0, 1), (1, 1), (0, 20), (20, 20), (3, 7), (950, 1319)]:
        wanted = stats.binomtest(hits, n).proportion_ci(method="wilson")
        assert wilson_interval(hits / n, n) == pytest.approx([wanted.low, wanted.high])


def test_t_quantile_agrees_with_scipy() -> None:
    """The expansion is only good if its terms are copied right."""
    stats = pytest.importorskip("scipy.stats", reason='pip install "nanoeval[endpoint]"')
    for df in (1, 2, 3, 4, 5, 10, 30, 100, 10_000):
        assert t_quantile_95(df) == pytest.approx(stats.t.ppf(0.975, df), rel=0.002)


@pytest.mark.parametrize("hits", [0, 1])
def test_a_perfect_score_still_has_an_interval(hits: int) -> None:
    """All of 20 right (or wrong) would claim a score without any doubt: Wilson's is 16.1 % wide."""
    low, high = metrics_of([[hits]] * 20)["accuracy_ci95"]
    assert high - low == pytest.approx(0.16113, abs=1e-4)
    assert hits in (low, high)


def test_one_question_says_nothing_of_the_others() -> None:
    """NaN would break the JSON; a narrow interval from one question's attempts would lie."""
    metrics = metrics_of([[1, 1, 0]])
    assert metrics["accuracy_stderr"] is None
    assert metrics["accuracy_ci95"] == [0.0, 1.0]
    json.dumps(metrics, allow_nan=False)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """One that takes attempts of a question for independent would miss it far more often."""
    rng = np.random.default_rng(7)
    for questions, attempts in [(20, 1), (20, 8), (100, 4)]:
        rates = rng.beta(0.5, 0.5, (1000, questions))
        hits = rng.binomial(attempts, rates)
        intervals = [accuracy(np.full(questions, attempts), h)["accuracy_ci95"] for h in hits]
        covered = np.mean([low <= 0.5 <= high for low, high in intervals])
        assert 0.925 <= covered <= 0.985, (questions, attempts, covered)


def test_the_interval_never_leaves_the_unit_range_or_the_accuracy() -> None:
    """A bound below 0, above 1 or on the wrong side of the accuracy cannot be quoted."""
    for attempts, questions in itertools.product((1, 2, 5), (2, 3, 7)):
        for hits in itertools.combinations_with_replacement(range(attempts + 1), questions):
            result = accuracy(np.full(questions, attempts), np.array(hits))
            low, high = result["accuracy_ci95"]
            assert 0 <= low <= result["accuracy"] <= high <= 1, (attempts, hits)


def test_more_attempts_never_widen_the_interval() -> None:
    """The correction for few clusters alone would punish asking twice when answers agree."""
    for questions in (2, 3, 5, 20):
        once = accuracy_interval(0.5, math.sqrt(0.25 / (questions - 1)), questions, questions)
        twice = accuracy_interval(0.5, math.sqrt(0.25 / (questions - 1)), questions, 2 * questions)
        assert twice == pytest.approx(once)


def test_pass_at_k_by_hand() -> None:
    """n=4, c=1: pass@2 = 1 - C(3,2)/C(4,2) = 1/2. n=5, c=3: 1 - C(2,2)/C(5,2) = 9/10."""
    result = pass_at_k(np.array([4, 5]), np.array([1, 3]))
    assert list(result) == ["pass@1", "pass@2", "pass@3", "pass@4"]
    assert result["pass@1"] == pytest.approx((1 / 4 + 3 / 5) / 2)
    assert result["pass@2"] == pytest.approx((1 / 2 + 9 / 10) / 2)
    assert result["pass@4"] == pytest.approx(1.0)


def test_pass_at_k_equals_the_count_over_all_draws() -> None:
    """The estimator is the share of k-subsets of attempts that hold a hit."""
    for n in (1, 3, 6):
        for hits, k in itertools.product(range(n + 1), range(1, n + 1)):
            outcomes = [1] * hits + [0] * (n - hits)
            draws = list(itertools.combinations(outcomes, k))
            wanted = sum(any(draw) for draw in draws) / len(draws)
            result = pass_at_k(np.array([n]), np.array([hits]))
            assert result[f"pass@{k}"] == pytest.approx(wanted)


def consensus_of(votes: list[list[tuple[int, bool]]], order: list[int] | None = None) -> dict:
    rows = [(q, a, g, c) for q, vs in enumerate(votes) for a, (g, c) in enumerate(vs)]
    rows = [rows[i] for i in order] if order else rows
    question, attempt, group, correct = (np.array(column) for column in zip(*rows, strict=True))
    return consensus(question, attempt, group, correct)


def test_consensus_takes_the_most_frequent_answer() -> None:
    """Right twice of five, but the wrong answers differ: the vote is right."""
    votes = [[(0, True), (0, True), (1, False), (2, False), (3, False)]]
    assert consensus_of(votes) == {"consensus@5": 1.0}


def test_consensus_shares_a_tie() -> None:
    """Two answers with two votes each, one right: half a point, whichever comes first."""
    right_first = [[(0, True), (1, False), (0, True), (1, False)]]
    wrong_first = [[(0, False), (1, True), (0, False), (1, True)]]
    assert consensus_of(right_first) == consensus_of(wrong_first) == {"consensus@4": 0.5}
    three_ways = [[(0, True), (1, False), (2, False)]]
    assert consensus_of(three_ways) == {"consensus@3": pytest.approx(1 / 3)}


def test_consensus_of_uneven_attempts_takes_the_first_of_each() -> None:
    """n is the smallest number of attempts; a later attempt must not outvote it."""
    votes = [[(0, True), (0, True)], [(1, False), (1, False), (2, True), (2, True), (2, True)]]
    assert consensus_of(votes) == {"consensus@2": 0.5}


def test_consensus_does_not_depend_on_the_order_of_results() -> None:
    """Results come in the order in which rollouts end; a summary must not."""
    rng = np.random.default_rng(3)
    votes = [[(int(g), bool(g == 0)) for g in rng.integers(0, 3, 5)] for _ in range(30)]
    shuffled = [int(i) for i in rng.permutation(150)]
    assert consensus_of(votes, shuffled) == consensus_of(votes)


def test_counts_and_bounds_of_missing_attempts() -> None:
    """Question 0 lacks one of three attempts, question 2 has none scored: 4 of 9 are missing."""
    metrics = metrics_of([[1, 0], [1, 1, 0]], unscored=[0, 2, 2, 2])
    assert metrics["num_questions"] == 2
    assert metrics["num_attempts"] == 5
    assert metrics["num_missing"] == 4
    assert metrics["accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert metrics["accuracy_worst_case"] == pytest.approx((1 / 3 + 2 / 3 + 0) / 3)
    assert metrics["accuracy_best_case"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_a_question_with_fewer_attempts_counts_as_missing_them() -> None:
    """A partial summary must say that it is one."""
    metrics = metrics_of([[1, 1], [0]])
    assert metrics["num_missing"] == 1
    assert metrics["accuracy_worst_case"] == pytest.approx(0.5)
    assert metrics["accuracy_best_case"] == pytest.approx(0.75)


def test_complete_results_have_no_bounds() -> None:
    """Bounds beside a complete score would suggest that something is missing."""
    assert "accuracy_worst_case" not in metrics_of([[1], [0]])


def test_nothing_scored_leaves_the_counts_and_no_accuracy() -> None:
    """0/0 must become neither a score nor a NaN."""
    metrics = metrics_of([], unscored=[0, 1])
    assert "accuracy" not in metrics
    assert metrics["num_missing"] == 2
    assert (metrics["accuracy_worst_case"], metrics["accuracy_best_case"]) == (0.0, 1.0)


def test_importing_loads_no_numpy() -> None:
    """`import nanoeval` must stay light; numpy is imported where it is used."""
    assert "np" not in vars(_statistics)
