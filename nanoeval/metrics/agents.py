"""Metrics of agent rollouts, where the system breaks some. Knows no agent and no computer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from nanoeval.eval import RolloutSystemError, Task
from nanoeval.metrics.standard import compute_default_metrics_on_correctness_without_answer_groups

Outcome = tuple[Task, bool | RolloutSystemError]


def get_summary_error_aware(results: Sequence[Outcome]) -> dict[str, Any]:
    """The standard metrics without system errors, and with them as failures; {} for no results.

    Top level: the metrics of the attempts that the system did not break, and `aggregations`
    (num_tasks = questions, num_attempts, num_correct, num_incorrect, num_system_error,
    error_breakdown = message -> count) of the same. `accuracy` is None when all broke.
    `metrics_including_errors` has both with every system error counted as wrong. `missing_tasks`
    lists the questions none of whose attempts counts, `is_valid` is whether no attempt broke. Where
    one did, `accuracy_worst_case` and `accuracy_best_case` count the broken as wrong and as right.
    """
    if not results:
        return {}
    unbroken = [(task, r) for task, r in results if not isinstance(r, RolloutSystemError)]
    covered = {task.question_id for task, _ in unbroken}
    including_errors = _metrics(results, if_broken=False)
    summary: dict[str, Any] = {"accuracy": None, **_metrics(unbroken)}
    if num_broken := len(results) - len(unbroken):
        summary["num_missing"] = including_errors.get("num_missing", 0) + num_broken
        summary["accuracy_worst_case"] = including_errors.get("accuracy")
        summary["accuracy_best_case"] = _metrics(results, if_broken=True).get("accuracy")
    summary["metrics_including_errors"] = including_errors
    questions = dict.fromkeys(task.question_id for task, _ in results)
    summary["missing_tasks"] = [question for question in questions if question not in covered]
    summary["is_valid"] = num_broken == 0
    return summary


def _metrics(results: Sequence[Outcome], if_broken: bool = False) -> dict[str, Any]:
    """Metrics and `aggregations` of `results`, with `if_broken` as verdict of the broken ones."""
    import pandas as pd

    verdicts = [if_broken if isinstance(r, RolloutSystemError) else bool(r) for _, r in results]
    frame = pd.DataFrame(
        {
            "instance": [task.question_id for task, _ in results],
            "attempt": [task.attempt_id for task, _ in results],
            "is_correct": verdicts,
        }
    )
    errors = [r for _, r in results if isinstance(r, RolloutSystemError)]
    num_correct = sum(bool(r) for _, r in results if not isinstance(r, RolloutSystemError))
    return {
        **compute_default_metrics_on_correctness_without_answer_groups(frame),
        "aggregations": {
            "num_tasks": frame["instance"].nunique(),
            "num_attempts": len(results),
            "num_correct": num_correct,
            "num_incorrect": len(results) - num_correct - len(errors),
            "num_system_error": len(errors),
            "error_breakdown": dict(Counter(str(e) or type(e).__name__ for e in errors)),
        },
    }
