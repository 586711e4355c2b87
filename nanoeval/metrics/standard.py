"""Metrics of graded answers. Knows no particular eval; the formulas live in `_statistics`.

Every summary has the same keys: `accuracy` (mean over questions of the mean over attempts),
`accuracy_stderr`, `accuracy_ci95`, `num_questions`, `num_attempts`, `num_missing`, where any is
missing `accuracy_worst_case` and `accuracy_best_case`, `pass@1` ... `pass@k`, and where answers can
be grouped `consensus@n`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nanoeval import _statistics
from nanoeval._outcomes import NUMPY_BOOL, handle_system_errors_and_compute_metrics
from nanoeval.eval import RolloutSystemError, Task
from nanoeval.library_config import LibraryConfig, get_library_config

if TYPE_CHECKING:
    import pandas as pd

# A task, its result, and whether that is right.
Scored = tuple[Task, Any, bool]

__all__ = [
    "compute_default_metrics",
    "compute_default_metrics_on_correctness_without_answer_groups",
    "handle_system_errors_and_compute_metrics",
    "summarize_correctness",
]


def compute_default_metrics(
    samples_df: pd.DataFrame, answer_group_correctness_df: pd.DataFrame
) -> dict[str, Any]:
    """The metrics of attempts whose answers fall into groups of equal answers.

    samples_df: one row per attempt: instance str (the question), attempt int, answer_group_id int.
    answer_group_correctness_df: one row per answer group: instance, answer_group_id, is_correct.
    {} for no attempts. Raises ValueError for missing columns, and for a group that an attempt names
    but that has no verdict, or both. `LibraryConfig.compute_default_metrics` does the work.
    """
    _statistics.join_answer_groups(samples_df, answer_group_correctness_df)
    return get_library_config().compute_default_metrics(samples_df, answer_group_correctness_df)


def compute_default_metrics_on_correctness_without_answer_groups(
    correctness_df: pd.DataFrame,
) -> dict[str, Any]:
    """The metrics of attempts that are right or wrong, with no answers to compare.

    correctness_df: one row per attempt: instance str, attempt int, is_correct bool. {} if empty.
    """
    if correctness_df.empty:
        return {}
    _statistics.require_columns(
        correctness_df, "correctness_df", ("instance", "attempt", "is_correct")
    )
    is_right, is_graded = _statistics.read_verdicts(correctness_df["is_correct"])
    if not is_graded.all():
        raise ValueError("is_correct must be True or False in every row; drop ungraded attempts")
    groups = is_right.astype(int)
    samples = correctness_df[["instance", "attempt"]].assign(answer_group_id=groups)
    verdicts = samples[["instance", "answer_group_id"]].drop_duplicates()
    verdicts = verdicts.assign(is_correct=verdicts["answer_group_id"] == 1)
    metrics = compute_default_metrics(samples, verdicts)
    # Two wrong answers need not be equal, so a vote between right and wrong means nothing.
    return {key: value for key, value in metrics.items() if not key.startswith("consensus@")}


def summarize_correctness(
    results: Sequence[tuple[Task, Any]], answer_of: Callable[[Any], Hashable] | None = None
) -> dict[str, Any]:
    """The metrics of results that are bools, or that carry `correct` or `is_correct`.

    Meant for `return summarize_correctness(results)` in `get_summary`. With `answer_of`, which
    gives the answer that a result holds, equal answers to a question are one vote for
    `consensus@n`. Results that are a RolloutSystemError, and those whose verdict is None, have no
    score: they count as `num_failed` and `num_ungraded` and as missing. {} for no results;
    TypeError for a result that carries no verdict.
    """
    if not results:
        return {}
    scored: list[Scored] = []
    unscored: list[Task] = []
    num_failed = 0
    for task, result in results:
        failed = isinstance(result, RolloutSystemError)
        num_failed += failed
        verdict = None if failed else verdict_of(task, result)
        if verdict is None:
            unscored.append(task)
        else:
            scored.append((task, result, verdict))
    metrics = _metrics_of(scored, unscored, answer_of)
    if scored and _is_hook_overridden():
        by_hook = _metrics_by_hook(scored, answer_of)
        if by_hook.get("accuracy", metrics["accuracy"]) != metrics["accuracy"]:
            # The uncertainty of another accuracy than the hook's.
            metrics = {k: v for k, v in metrics.items() if not k.startswith("accuracy_")}
        metrics.update(by_hook)
    if num_failed:
        metrics["num_failed"] = num_failed
    if len(unscored) > num_failed:
        metrics["num_ungraded"] = len(unscored) - num_failed
    return metrics


def _metrics_of(
    scored: Sequence[Scored], unscored: Sequence[Task], answer_of: Callable[[Any], Hashable] | None
) -> dict[str, Any]:
    """What `compute_default_metrics` gives by default, without the seconds that pandas loads."""
    import numpy as np

    codes = _Codes()
    question = np.array([codes[task.question_id] for task, _, _ in scored], dtype=np.int64)
    correct = np.array([verdict for _, _, verdict in scored], dtype=bool)
    rest = np.array([codes[task.question_id] for task in unscored], dtype=np.int64)
    metrics = _statistics.correctness_metrics(question, correct, rest)
    if answer_of is not None:
        attempt = np.array([task.attempt_id for task, _, _ in scored], dtype=np.int64)
        group = np.array(_number_groups(scored, answer_of), dtype=np.int64)
        metrics.update(_statistics.consensus(question, attempt, group, correct))
    return metrics


def _is_hook_overridden() -> bool:
    hook = type(get_library_config()).compute_default_metrics
    return hook is not LibraryConfig.compute_default_metrics


def _metrics_by_hook(
    scored: Sequence[Scored], answer_of: Callable[[Any], Hashable] | None
) -> dict[str, Any]:
    import pandas as pd

    frame = pd.DataFrame(
        {
            "instance": [task.question_id for task, _, _ in scored],
            "attempt": [task.attempt_id for task, _, _ in scored],
            "is_correct": [verdict for _, _, verdict in scored],
        }
    )
    if answer_of is None:
        return compute_default_metrics_on_correctness_without_answer_groups(frame)
    frame["answer_group_id"] = _number_groups(scored, answer_of)
    verdicts = frame[["instance", "answer_group_id", "is_correct"]].drop_duplicates()
    return compute_default_metrics(frame.drop(columns="is_correct"), verdicts)


def _number_groups(scored: Sequence[Scored], answer_of: Callable[[Any], Hashable]) -> list[int]:
    # A verdict is part of its group, so that a judge who changes his mind loses no attempt.
    groups = _Codes()
    return [groups[answer_of(result), verdict] for _, result, verdict in scored]


class _Codes(dict[Any, int]):
    """Numbers keys 0, 1, 2, ... as they are first asked for."""

    def __missing__(self, key: Any) -> int:
        return self.setdefault(key, len(self))


def verdict_of(task: Task, result: Any) -> bool | None:
    """Whether `result` is right: itself, or its `correct` or `is_correct`; None is "not graded".

    Raises TypeError for a result that says neither.
    """
    value = result
    for name in ("correct", "is_correct"):
        if isinstance(result, Mapping) and name in result:
            value = result[name]
            break
        if hasattr(result, name):
            value = getattr(result, name)
            break
    if isinstance(value, bool) or type(value).__name__ in NUMPY_BOOL:
        return bool(value)
    if value is None and result is not None:
        return None
    raise TypeError(
        f"the result of {task.name} is {result!r:.100}, which is neither a bool nor has a bool or"
        " None as `correct` or `is_correct`; return one that has, or compute the summary yourself"
    )
