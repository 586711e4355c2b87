"""What a set of replies adds up to: metrics, errors, tokens, times. Knows no model, no engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nanoeval._statistics import clustered_stderr

if TYPE_CHECKING:
    from nanoeval.evals._generation import Sample


def summarize_samples(samples: Sequence[Sample], metric_names: Sequence[str]) -> dict[str, Any]:
    """Metrics of the samples that were answered, and an account of all.

    `metrics` holds each metric's mean over answered samples and its standard error under
    `<name>_stderr` (None for fewer than two); empty when none was answered.
    `accuracy_including_errors` is the first metric with errors counted as 0. Times are seconds.
    """
    answered = [sample for sample in samples if sample.error is None]
    metrics: dict[str, float | None] = {}
    for name in metric_names if answered else ():
        values = np.array([sample.scores[name] for sample in answered], dtype=float)
        metrics[name] = float(values.mean())
        metrics[f"{name}_stderr"] = clustered_stderr(values)
    total = sum(sample.scores[metric_names[0]] for sample in answered)
    errors = Counter(sample.error for sample in samples if sample.error is not None)
    busy = busy_seconds(
        (sample.started, sample.started + sample.latency)
        for sample in answered
        if sample.latency is not None
    )
    return {
        "metrics": metrics,
        "num_samples": len(samples),
        "num_answered": len(answered),
        "num_errors": len(samples) - len(answered),
        "errors": dict(errors.most_common()),
        "first_error": next((s.error_message for s in samples if s.error is not None), None),
        "accuracy_including_errors": total / len(samples) if samples else None,
        "finish_reasons": dict(Counter(str(s.finish_reason) for s in answered).most_common()),
        "tokens": _tokens(answered, busy),
        "latency": _percentiles(s.latency for s in answered),
        "time_to_first_token": _percentiles(s.time_to_first_token for s in answered),
        "num_retried": sum(sample.tries > 1 for sample in samples),
        "http_statuses": dict(Counter(str(s.status) for s in samples).most_common()),
        # As the servers sent them, which may be anything.
        "reported_models": sorted({str(s.model) for s in answered if s.model}),
        "system_fingerprints": sorted({str(s.fingerprint) for s in answered if s.fingerprint}),
        "warnings": _warnings(answered),
    }


def busy_seconds(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of time intervals: a pause between two parts of a run is left out."""
    busy, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy


def _tokens(answered: Sequence[Sample], busy: float) -> dict[str, Any]:
    """Tokens in and out, None where no reply counts them; rates are tokens out per second."""
    prompt = [s.prompt_tokens for s in answered if s.prompt_tokens is not None]
    completion = [s.completion_tokens for s in answered if s.completion_tokens is not None]
    rates = [
        s.completion_tokens / s.latency
        for s in answered
        if s.completion_tokens is not None and s.latency
    ]
    return {
        "prompt": sum(prompt) if prompt else None,
        "completion": sum(completion) if completion else None,
        "num_without_usage": len(answered) - len(completion),
        # The median; np.median would import masked arrays for it.
        "per_second_per_request": float(np.percentile(rates, 50)) if rates else None,
        "per_second": sum(completion) / busy if completion and busy else None,
    }


def _percentiles(values: Iterable[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    points = np.percentile(known, [50, 90, 99])
    return dict(zip(("p50", "p90", "p99"), (float(point) for point in points), strict=True))


def _warnings(answered: Sequence[Sample]) -> list[str]:
    warnings = []
    num_cut = sum(sample.finish_reason == "length" for sample in answered)
    if num_cut:
        warnings.append(
            f"{num_cut} of {len(answered)} replies stopped for length; raise max_tokens, or the"
            " score is about the limit"
        )
    num_silent = sum(not sample.reply for sample in answered)
    if num_silent:
        warnings.append(f"{num_silent} of {len(answered)} replies have no text (empty or null)")
    num_uncounted = sum(sample.completion_tokens is None for sample in answered)
    if num_uncounted:
        warnings.append(f"{num_uncounted} of {len(answered)} replies come without token counts")
    return warnings
