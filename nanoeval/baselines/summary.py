"""What verdicts add up to: accuracies with standard errors, in all and by group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nanoeval._statistics import accuracy_interval, clustered_stderr
from nanoeval.evals.mme import totals

if TYPE_CHECKING:
    from nanoeval.baselines.evaluation import Example, Verdict


def summarize(task: str, results: Sequence[tuple[Example, Verdict]]) -> dict[str, Any]:
    """`accuracy`, its standard error and interval, and what is the benchmark's own; {} for none.

    Accuracy is the mean score. Examples of one id (MME's two questions about an image) are one
    cluster. MMLU also has `macro_accuracy`, the mean over subjects, which takes the subjects as
    given: its standard error comes from the questions within them alone.
    """
    if not results:
        return {}
    summary = _accuracy([(example.example_id, verdict.score) for example, verdict in results])
    if task == "mme":
        verdicts = [(str(e.subject), e.example_id, v.correct) for e, v in results]
        return {**summary, **totals(verdicts)}
    if task in ("mmlu", "mmmu_pro"):
        groups: dict[str, list[tuple[str, float]]] = {}
        for example, verdict in results:
            groups.setdefault(str(example.subject), []).append((example.example_id, verdict.score))
        own = {name: _accuracy(scores) for name, scores in groups.items()}
        summary["macro_accuracy"] = _mean([group["accuracy"] for group in own.values()])
        summary["macro_accuracy_stderr"] = _macro_stderr(own.values())
        summary["micro_accuracy"] = summary["accuracy"]
        summary["per_subject"] = {name: group["accuracy"] for name, group in own.items()}
        summary["per_subject_stderr"] = {n: g["accuracy_stderr"] for n, g in own.items()}
        summary["per_subject_examples"] = {name: len(scores) for name, scores in groups.items()}
    return summary


def group_accuracies(summary: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy by subject or category; empty for a benchmark without groups."""
    if "per_category" in summary:
        return {name: group["accuracy"] for name, group in summary["per_category"].items()}
    return dict(summary.get("per_subject", {}))


def _accuracy(scores: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Of (cluster, score) pairs; the standard error is None for fewer than two clusters."""
    import numpy as np

    clusters: dict[str, list[float]] = {}
    for cluster, score in scores:
        clusters.setdefault(cluster, []).append(score)
    mean = _mean([score for _, score in scores])
    # A cluster counts by its size: shifted so, the clusters' mean is the mean over examples.
    per_cluster = len(scores) / len(clusters)
    shifts = [mean + sum(s - mean for s in own) / per_cluster for own in clusters.values()]
    stderr = clustered_stderr(np.array(shifts))
    interval = accuracy_interval(mean, stderr, len(clusters), len(scores))
    return {"accuracy": mean, "accuracy_stderr": stderr, "accuracy_ci95": interval}


def _macro_stderr(groups: Any) -> float | None:
    errors = [group["accuracy_stderr"] for group in groups]
    if any(error is None for error in errors):
        return None
    return math.sqrt(sum(error**2 for error in errors)) / len(errors)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
