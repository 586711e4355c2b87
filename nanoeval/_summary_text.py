"""Turns a run's summary into a few aligned lines for people. Knows no eval and no run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

ENV_SUMMARY = "NANOEVAL_SUMMARY"
MAX_WIDTH = 100
MAX_LINES = 60
# Parts of the line of the metric that they belong to.
_STDERR, _INTERVAL = "_stderr", "_ci95"
_BOUNDS = ("_worst_case", "_best_case")
_COUNTS = ("num_rollouts", "num_scored", "num_failed")

Row = tuple[int, str, str]  # depth, label, value; a heading has no value


def summary_text(name: str, summary: Mapping[str, Any], seconds: float | None = None) -> str:
    """A summary as lines: the accuracy with its uncertainty first, then counts, then the rest.

    `seconds` is how long the run took. A metric `x` takes `x_stderr`, `x_ci95`, `x_worst_case` and
    `x_best_case` into its line. With NANOEVAL_SUMMARY=json it is one line of JSON, whole; with
    "none" it is empty.
    """
    if os.environ.get(ENV_SUMMARY) == "none":
        return ""
    if os.environ.get(ENV_SUMMARY) == "json":
        line = {"name": name, "seconds": seconds, "summary": summary}
        return json.dumps(line, default=str, ensure_ascii=False)
    shown = dict(summary)
    if shown.get("num_failed") == 0:
        shown.pop("metrics_including_errors", None)  # the same once more
    rows = list(_rows(shown, depth=0))
    width = max((2 * depth + len(label) for depth, label, value in rows if value), default=0)
    took = f", {_duration(seconds)}" if seconds is not None else ""
    lines = [f"{name}: {'done' if rows else 'done, with an empty summary'}{took}"]
    for depth, label, value in rows[:MAX_LINES]:
        start = "  " * depth + label
        lines.append(f"  {start:<{width}}  {_cut(value)}" if value else f"  {start}")
    if len(rows) > MAX_LINES:
        lines.append(f"  … and {len(rows) - MAX_LINES} more; {ENV_SUMMARY}=json prints all")
    return "\n".join(line.rstrip() for line in lines)


def _rows(summary: Mapping[str, Any], depth: int) -> Iterator[Row]:
    """Plain metrics first and nested ones below, each in the summary's order."""
    left = dict(summary)
    nested: list[tuple[str, Mapping[str, Any]]] = []
    for name in sorted(summary, key=lambda name: name != "accuracy"):
        if name not in left:
            continue
        value = left.pop(name)
        if isinstance(value, Mapping):
            nested.append((name, value))
        elif not _is_part(name, summary):
            yield depth, str(name), _with_uncertainty(name, value, left)
        if name == "accuracy" or "accuracy" not in summary:
            yield from _counts(left, depth)
    for name, inner in nested:
        yield depth, str(name), ""
        yield from _rows(inner, depth + 1)


def _is_part(name: Any, summary: Mapping[str, Any]) -> bool:
    """Whether `name` stands in the line of another metric."""
    return any(
        isinstance(name, str)
        and name.endswith(suffix)
        and isinstance(summary.get(name.removesuffix(suffix)), int | float)
        for suffix in (_STDERR, _INTERVAL, *_BOUNDS)
    )


def _with_uncertainty(name: Any, value: Any, left: Mapping[str, Any]) -> str:
    text = _value(value)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return text
    if (stderr := left.get(f"{name}{_STDERR}")) is not None:
        text += f" ± {_value(stderr)}"
    interval = left.get(f"{name}{_INTERVAL}")
    if isinstance(interval, Sequence) and len(interval) == 2:
        text += f"   95 % interval {_value(interval[0])} … {_value(interval[1])}"
    worst, best = (left.get(f"{name}{bound}") for bound in _BOUNDS)
    if worst is not None and best is not None and worst != best:
        text += f"   failures as wrong {_value(worst)}, as right {_value(best)}"
    return text


def _counts(left: dict[str, Any], depth: int) -> Iterator[Row]:
    """`rollouts  1,319 = 1,310 scored + 9 failed`, where the summary counts them so."""
    if not all(isinstance(left.get(name), int) for name in _COUNTS):
        return
    total, scored, failed = (left.pop(name) for name in _COUNTS)
    is_valid = left.pop("is_valid", True)
    text = f"{total:,} = {scored:,} scored + {failed:,} failed"
    if missing := total - scored - failed:
        text += f" + {missing:,} not run"
    yield depth, "rollouts", text + ("" if is_valid else "   (not valid: not every attempt counts)")


def _value(value: Any) -> str:  # noqa: PLR0911 - one line per kind of value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, str):
        return " ".join(value.split()) or '""'
    if value is None:
        return "none"
    if isinstance(value, Sequence):
        return "[" + ", ".join(_value(item) for item in value[:20]) + _more(value) + "]"
    return " ".join(str(value).split())


def _more(items: Sequence[Any]) -> str:
    return f", … {len(items) - 20} more" if len(items) > 20 else ""


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if value.is_integer() and abs(value) < 1e15:
        return f"{value:,.1f}"
    return f"{value:.4f}" if 0.001 <= abs(value) < 10 else f"{value:,.4g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_WIDTH else text[: MAX_WIDTH - 2] + " …"
