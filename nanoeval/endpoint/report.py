"""What is reported of a check: one dict per task, and a table for people. Runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from nanoeval.evals._generation import GenerationEval, GenerationTask, Sample, as_sample
from nanoeval.models._messages import hide_images


def task_report(
    check: GenerationEval,
    summary: Mapping[str, Any],
    facts: Mapping[str, Any],
    results: Sequence[tuple[GenerationTask, Any]] | None,
) -> dict[str, Any]:
    """A check's summary, how it was got, and under `samples` each of `results`, where given."""
    first = {name: summary[name] for name in ("metrics", "num_samples")}
    report = {**first, "elapsed": facts["elapsed"], **summary, **facts}
    report |= {"model": check.model.get_model_name(), "version": version()}
    if results is not None:
        ordered = sorted(results, key=lambda pair: int(pair[0].question_id))
        report["samples"] = [_sample(check, task, as_sample(task, r)) for task, r in ordered]
    return report


def version() -> str:
    """This package's version; "unknown" where it is not installed."""
    try:
        return metadata.version("nanoeval")
    except metadata.PackageNotFoundError:
        return "unknown"


def _sample(check: GenerationEval, task: GenerationTask, sample: Sample) -> dict[str, Any]:
    return {
        "id": task.question_id,
        "fingerprint": task.fingerprint,
        "messages": hide_images(check.prompt(task.row)),
        "target": check.target(task.row),
        "reply": sample.reply,
        "finish_reason": sample.finish_reason,
        "scores": dict(sample.scores),
        "usage": {
            "prompt_tokens": sample.prompt_tokens,
            "completion_tokens": sample.completion_tokens,
        },
        "time_to_first_token": sample.time_to_first_token,
        "latency": sample.latency,
        "tries": sample.tries,
        "status": sample.status,
        "error": sample.error,
        "error_message": sample.error_message,
    }


def without_samples(reports: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The reports as they go to a terminal."""
    return {
        task: {name: value for name, value in report.items() if name != "samples"}
        for task, report in reports.items()
    }


def table(reports: dict[str, dict[str, Any]]) -> str:
    """A line per task and metric, for people."""
    rows = [("task", "metric", "value", "stderr", "answered", "p50", "p99", "tokens/s")]
    for name, report in reports.items():
        latency, tokens = report["latency"] or {}, report["tokens"]
        answered = f"{report['num_answered']}/{report['num_samples']}"
        rest = (
            answered,
            _figure(latency.get("p50"), "s"),
            _figure(latency.get("p99"), "s"),
            _figure(tokens["per_second"]),
        )
        metrics = report["metrics"]
        names = [metric for metric in metrics if not metric.endswith("_stderr")] or ["no answers"]
        for number, metric in enumerate(names):
            value, stderr = metrics.get(metric), metrics.get(f"{metric}_stderr")
            shown = (metric, _share(value), _share(stderr))
            rows.append((name, *shown, *rest) if number == 0 else ("", *shown, *([""] * len(rest))))
    return aligned(rows)


def warnings(reports: dict[str, dict[str, Any]]) -> list[str]:
    """What a person should know of the results, a line each."""
    lines = []
    for name, report in reports.items():
        lines += [f"{name}: {warning}" for warning in report["warnings"]]
        if report["num_errors"]:
            kinds = ", ".join(f"{kind}: {count}" for kind, count in report["errors"].items())
            lines.append(
                f"{name}: {report['num_errors']} of {report['num_samples']} samples have no answer"
                f" ({kinds}); the first: {report['first_error']}"
            )
    return lines


def failed_thresholds(
    thresholds: Sequence[tuple[str | None, str, float]], reports: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """A line for each (task or None for all that have it, metric, least value) that is missed."""
    lines = []
    for task, metric, least in thresholds:
        for name, report in reports.items():
            value = report["metrics"].get(metric)
            if task not in (None, name):
                continue
            if value is None and (task or not report["metrics"]):
                lines.append(f"{name}: {metric} has no value, wanted at least {least:g}")
            elif value is not None and value < least:
                lines.append(f"{name}: {metric} is {value:.4f}, wanted at least {least:g}")
    return lines


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of columns: the first two to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _figure(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 and not unit else f"{value:.3g} {unit}".rstrip()
