"""Summaries: the public metrics functions on frames and results."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nanoeval.eval import RolloutSystemError, Task
from nanoeval.library_config import LibraryConfig, get_library_config, set_library_config
from nanoeval.metrics.agents import get_summary_error_aware
from nanoeval.metrics.standard import (
    compute_default_metrics,
    compute_default_metrics_on_correctness_without_answer_groups,
    handle_system_errors_and_compute_metrics,
    summarize_correctness,
)


def frames(rows: list[tuple[str, int, int, bool]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    frame = pd.DataFrame(rows, columns=["instance", "attempt", "answer_group_id", "is_correct"])
    verdicts = frame[["instance", "answer_group_id", "is_correct"]].drop_duplicates()
    return frame.drop(columns="is_correct"), verdicts


def results(*verdicts: Any, attempts: int = 1) -> list[tuple[Task, Any]]:
    return [
        (Task(question_id=f"q{i // attempts}", attempt_id=i % attempts), verdict)
        for i, verdict in enumerate(verdicts)
    ]


ERROR = RolloutSystemError("the server is gone")


def test_groups_are_graded_and_voted_on() -> None:
    """a: groups 5, 5, 7; b: 5, 6, 6; 5 is right in both, but means nothing across questions."""
    samples, verdicts = frames(
        [
            *[("a", 0, 5, True), ("a", 1, 5, True), ("a", 2, 7, False)],
            *[("b", 0, 5, True), ("b", 1, 6, False), ("b", 2, 6, False)],
        ]
    )
    metrics = compute_default_metrics(samples, verdicts)
    assert metrics["accuracy"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert metrics["consensus@3"] == 0.5
    assert metrics["pass@2"] == pytest.approx((1 + 2 / 3) / 2)
    assert (metrics["num_questions"], metrics["num_attempts"], metrics["num_missing"]) == (2, 6, 0)


def test_ragged_attempts_weigh_each_question_alike() -> None:
    """The question with two attempts would count double."""
    metrics = compute_default_metrics(
        *frames([("a", 0, 0, True), ("a", 1, 0, True), ("b", 0, 1, False)])
    )
    assert metrics["accuracy"] == 0.5


def test_a_verdict_of_a_group_nobody_picked_changes_nothing() -> None:
    """Callers may list the verdicts of all answers, not just of those picked."""
    samples, verdicts = frames([("a", 0, 0, True), ("b", 0, 1, False)])
    unpicked = pd.DataFrame([("c", 0, True), ("a", 9, False)], columns=verdicts.columns)
    more = pd.concat([verdicts, unpicked])
    assert compute_default_metrics(samples, more) == compute_default_metrics(samples, verdicts)


@pytest.mark.parametrize("column", ["instance", "attempt", "answer_group_id"])
def test_a_missing_column_of_samples_is_named(column: str) -> None:
    """A KeyError from the depths of pandas would not say which frame is meant."""
    samples, verdicts = frames([("a", 0, 0, True)])
    with pytest.raises(ValueError, match=rf"samples_df lacks the columns \['{column}'\]"):
        compute_default_metrics(samples.drop(columns=column), verdicts)


def test_an_attempt_without_a_verdict_is_named() -> None:
    """An attempt whose group has no verdict must not silently leave the denominator."""
    samples, verdicts = frames([("a", 0, 0, True), ("b", 0, 3, False)])
    with pytest.raises(ValueError, match=r"\('b', 3\)"):
        compute_default_metrics(samples, verdicts[:1])
    unknown = verdicts.astype({"is_correct": object})
    unknown.iloc[1, 2] = None
    with pytest.raises(ValueError, match=r"\('b', 3\)"):
        compute_default_metrics(samples, unknown)


@pytest.mark.parametrize("wrong", ["False", "True", 0.5, 2])
def test_a_verdict_is_true_or_false(wrong: Any) -> None:
    """The text "False" is truthy, and half right would count as right."""
    rows = [("a", 0, 0, True), ("b", 0, 1, wrong)]
    with pytest.raises(ValueError, match="must be True or False in every row"):
        compute_default_metrics(*frames(rows))
    frame = pd.DataFrame(rows, columns=["instance", "attempt", "group", "is_correct"])
    with pytest.raises(ValueError, match="must be True or False in every row"):
        compute_default_metrics_on_correctness_without_answer_groups(frame)
    with pytest.raises(ValueError, match="must be True or False in every row"):
        compute_default_metrics_on_correctness_without_answer_groups(frame[1:])


@pytest.mark.parametrize("dtype", ["bool", "boolean", "object", "int64", "float64"])
def test_verdicts_may_be_of_any_type_that_holds_them(dtype: str) -> None:
    """Frames that went through a file or a join hold 1 and 0, or objects."""
    rows = [("a", 0, 0, True), ("b", 0, 1, False), ("c", 0, 2, True)]
    samples, verdicts = frames(rows)
    verdicts = verdicts.astype({"is_correct": dtype})
    assert compute_default_metrics(samples, verdicts)["accuracy"] == pytest.approx(2 / 3)
    frame = samples.assign(is_correct=verdicts["is_correct"])
    metrics = compute_default_metrics_on_correctness_without_answer_groups(frame)
    assert metrics["accuracy"] == pytest.approx(2 / 3)


def test_two_verdicts_on_one_group_are_an_error() -> None:
    """Taking either would make the score depend on the order of rows."""
    samples, verdicts = frames([("a", 0, 0, True), ("a", 1, 0, False)])
    with pytest.raises(ValueError, match=r"both right and wrong of instance 'a', answer group 0"):
        compute_default_metrics(samples, verdicts)


def test_without_answer_groups_there_is_no_vote() -> None:
    """Wrong answers need not be equal, so a majority of wrong ones proves nothing."""
    frame = pd.DataFrame(
        {"instance": ["a", "a", "a"], "attempt": [0, 1, 2], "is_correct": [True, False, False]}
    )
    metrics = compute_default_metrics_on_correctness_without_answer_groups(frame)
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert not [key for key in metrics if key.startswith("consensus")]


def test_empty_frames_and_results_give_empty_summaries() -> None:
    """Partial summaries are taken before the first result."""
    assert compute_default_metrics_on_correctness_without_answer_groups(pd.DataFrame()) == {}
    assert summarize_correctness([]) == {}
    assert get_summary_error_aware([]) == {}


def test_default_metrics_of_10_000_attempts_take_a_few_milliseconds() -> None:
    """Partial summaries are computed while rollouts run; work per row in Python takes seconds."""
    rng = np.random.default_rng(1)
    samples = pd.DataFrame(
        {
            "instance": [f"q.{i // 4}" for i in range(10_000)],
            "attempt": np.arange(10_000) % 4,
            "answer_group_id": rng.integers(0, 4, 10_000),
        }
    )
    verdicts = samples[["instance", "answer_group_id"]].drop_duplicates()
    verdicts = verdicts.assign(is_correct=verdicts["answer_group_id"] == 0)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        compute_default_metrics(samples, verdicts)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.1


@dataclass(frozen=True)
class Graded:
    is_correct: bool | None
    answer: str = ""


@pytest.mark.parametrize(
    "wrap",
    [bool, Graded, np.bool_, lambda verdict: {"correct": verdict}],
    ids=["bool", "is_correct", "numpy", "mapping"],
)
def test_results_tell_their_verdict(wrap: Any) -> None:
    """Each form that evals return must count."""
    metrics = summarize_correctness(results(wrap(True), wrap(False), wrap(True), wrap(True)))
    assert metrics["accuracy"] == 0.75


@pytest.mark.parametrize("result", ["right", 1, None, {"score": 1}, Graded("yes")])  # type: ignore[arg-type]
def test_a_result_without_a_verdict_is_named(result: Any) -> None:
    """Truthiness would count any object as right."""
    with pytest.raises(TypeError, match=r"the result of q0\.0 is"):
        summarize_correctness(results(result))


def test_system_errors_count_as_failed() -> None:
    """A dropped failure would raise the score without a trace."""
    metrics = summarize_correctness(results(True, ERROR, False, ERROR))
    assert metrics["accuracy"] == 0.5
    assert metrics["num_failed"] == metrics["num_missing"] == 2
    assert (metrics["accuracy_worst_case"], metrics["accuracy_best_case"]) == (0.25, 0.75)


def test_ungraded_results_are_counted_apart() -> None:
    """An answer that nobody graded is neither wrong nor gone."""
    metrics = summarize_correctness(results(Graded(True), Graded(None), ERROR))
    assert metrics["accuracy"] == 1.0
    assert (metrics["num_ungraded"], metrics["num_failed"]) == (1, 1)


def test_equal_answers_are_one_vote() -> None:
    """Three right of four by two spellings against one wrong one: grouping decides the vote."""
    listed = results(
        Graded(True, "4"), Graded(False, "5"), Graded(False, "5"), Graded(False, "6"), attempts=4
    )
    assert summarize_correctness(listed, lambda r: r.answer)["consensus@4"] == 0.0
    assert "consensus@4" not in summarize_correctness(listed)


def test_both_ways_to_the_metrics_agree() -> None:
    """`summarize_correctness` leaves pandas out; its figures must be those of the frames."""
    rng = np.random.default_rng(5)
    picks = rng.integers(0, 4, 60)
    listed = results(*[Graded(bool(p == 0), str(p)) for p in picks], attempts=3)
    samples, verdicts = frames(
        [(t.question_id, t.attempt_id, int(r.answer), r.is_correct) for t, r in listed]
    )
    assert summarize_correctness(listed, lambda r: r.answer) == compute_default_metrics(
        samples, verdicts
    )


def test_the_configured_metrics_are_used_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """An organization that overrides the metrics would find them in some summaries only."""

    class OurConfig(LibraryConfig):
        def compute_default_metrics(self, samples: Any, groups: Any) -> dict[str, Any]:
            return {**super().compute_default_metrics(samples, groups), "ours": len(samples)}

    before = get_library_config()
    set_library_config(OurConfig())
    try:
        assert compute_default_metrics(*frames([("a", 0, 0, True)]))["ours"] == 1
        assert summarize_correctness(results(True, False))["ours"] == 2
        assert summarize_correctness(results(True, False), lambda r: r)["ours"] == 2
        assert get_summary_error_aware(results(True, False, ERROR))["ours"] == 2
    finally:
        set_library_config(before)


async def test_a_configured_accuracy_gets_no_uncertainty_of_another() -> None:
    """An interval of 0.2 to 0.8 beside an accuracy of 42 reads as a bug of the eval."""

    class Percent(LibraryConfig):
        def compute_default_metrics(self, samples: Any, groups: Any) -> dict[str, Any]:
            return {"accuracy": 42.0}

    before = get_library_config()
    set_library_config(Percent())
    try:
        for summary in (
            summarize_correctness(results(True, False, ERROR)),
            await summary_of(results(True, False, ERROR)),
        ):
            assert [key for key in summary if key.startswith("accuracy")] == ["accuracy"]
            assert (summary["accuracy"], summary["num_missing"]) == (42.0, 1)
    finally:
        set_library_config(before)


@pytest.mark.slow
def test_a_million_results_take_seconds() -> None:
    """The last thing a big run does must not take minutes."""
    listed = [
        (Task.model_construct(question_id=str(i // 4), attempt_id=i % 4), i % 3 == 0)
        for i in range(1_000_000)
    ]
    began = time.perf_counter()
    metrics = summarize_correctness(listed)
    assert time.perf_counter() - began < 15
    assert metrics["num_attempts"] == 1_000_000
    assert metrics["accuracy"] == pytest.approx(1 / 3, abs=1e-5)


def test_summaries_load_no_pandas() -> None:
    """pandas takes seconds to load, which every small eval would pay at its end."""
    code = (
        "import sys; from nanoeval.eval import Task;"
        "from nanoeval.metrics.standard import summarize_correctness as s;"
        "s([(Task(question_id='a'), True)], lambda r: r); print('pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_agents_summary_accounts_for_every_attempt() -> None:
    """Errors stay out of the accuracy, count as failures below, and are broken down by message."""
    timeout = RolloutSystemError("timed out")
    summary = get_summary_error_aware(results(True, False, True, timeout, ERROR, ERROR, attempts=2))
    assert summary["accuracy"] == pytest.approx((1 / 2 + 1) / 2)
    assert summary["aggregations"] == {
        "num_tasks": 2,
        "num_attempts": 3,
        "num_correct": 2,
        "num_incorrect": 1,
        "num_system_error": 0,
        "error_breakdown": {},
    }
    including = summary["metrics_including_errors"]
    assert including["accuracy"] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert including["aggregations"] == {
        "num_tasks": 3,
        "num_attempts": 6,
        "num_correct": 2,
        "num_incorrect": 1,
        "num_system_error": 3,
        "error_breakdown": {"timed out": 1, "the server is gone": 2},
    }
    assert summary["missing_tasks"] == ["q2"]
    assert summary["is_valid"] is False
    assert summary["num_missing"] == 3
    assert summary["accuracy_worst_case"] == including["accuracy"]
    assert summary["accuracy_best_case"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    json.dumps(summary, allow_nan=False)


def test_agents_summary_without_errors_is_valid() -> None:
    """A clean run must not look doubtful."""
    summary = get_summary_error_aware(results(True, False))
    assert summary["is_valid"] is True
    assert summary["missing_tasks"] == []
    assert summary["metrics_including_errors"]["accuracy"] == summary["accuracy"] == 0.5
    assert "accuracy_worst_case" not in summary


def test_agents_summary_of_nothing_but_errors() -> None:
    """A run whose every rollout broke still ends with a summary, and with no NaN in it."""
    summary = get_summary_error_aware(results(ERROR, ERROR))
    assert summary["accuracy"] is None
    assert summary["metrics_including_errors"]["accuracy"] == 0.0
    assert (summary["accuracy_worst_case"], summary["accuracy_best_case"]) == (0.0, 1.0)
    json.dumps(summary, allow_nan=False)


async def count(pairs: list[tuple[Task, Any]]) -> dict[str, Any]:
    return {"count": len(pairs)}


def as_wrong(task: Task) -> bool:
    return False


async def test_one_failed_attempt_makes_the_summary_invalid() -> None:
    """Looking at whole questions only would call a question with half its attempts complete."""
    summary = await handle_system_errors_and_compute_metrics(
        count, results(True, ERROR, attempts=2), as_wrong
    )
    assert summary["count"] == 1
    assert summary["is_valid"] is False
    assert summary["metrics_including_errors"]["count"] == 2


async def test_complete_attempts_keep_the_summary_valid() -> None:
    """A clean run must not look doubtful, and reports its metrics in both places."""
    summary = await handle_system_errors_and_compute_metrics(
        count, results(True, False, attempts=2), as_wrong
    )
    assert summary["count"] == summary["metrics_including_errors"]["count"] == 2
    assert summary["is_valid"] is True


async def summary_of(pairs: list[tuple[Task, Any]]) -> dict[str, Any]:
    return await handle_system_errors_and_compute_metrics(standard_metrics, pairs, as_wrong)


async def standard_metrics(pairs: list[tuple[Task, Any]]) -> dict[str, Any]:
    return summarize_correctness(pairs)


@pytest.mark.parametrize("verdicts", [(True, ERROR, False, True), (True, ERROR, ERROR, ERROR)])
async def test_a_failed_attempt_is_missing_once(verdicts: tuple[Any, ...]) -> None:
    """Uneven attempts show the failed ones already; counting both doubles them."""
    pairs = results(*verdicts, attempts=2)
    num_failed = verdicts.count(ERROR)
    for summary in (await summary_of(pairs), summarize_correctness(pairs)):
        assert summary["num_missing"] == num_failed
    assert get_summary_error_aware(pairs)["num_missing"] == num_failed
    ungraded = results(Graded(True), Graded(None), ERROR)
    assert (await summary_of(ungraded))["num_missing"] == 2


async def test_an_evals_own_values_stand() -> None:
    """Evals in the field have keys of these names, which mean something else there."""
    own = {"num_failed": 7, "num_scored": 3, "num_rollouts": "x", "num_missing": 1, "accuracy": 98}

    async def metrics(pairs: list[tuple[Task, Any]]) -> dict[str, Any]:
        return own

    summary = await handle_system_errors_and_compute_metrics(
        metrics, results(True, ERROR), as_wrong
    )
    added = {"is_valid": False, "num_tasks": 2}
    assert summary == {**own, **added, "metrics_including_errors": {**own, "num_tasks": 2}}


async def test_failures_bound_the_accuracy() -> None:
    """A score over what happened to survive must show how far it could be off."""
    summary = await summary_of(results(True, True, False, ERROR))
    assert summary["accuracy"] == pytest.approx(2 / 3)
    assert (summary["accuracy_worst_case"], summary["accuracy_best_case"]) == (0.5, 0.75)
    assert summary["metrics_including_errors"]["accuracy"] == 0.5
