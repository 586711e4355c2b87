"""What came of a rollout, and how errors enter a summary. Knows neither store nor engine."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import isawaitable
from typing import Any

from pydantic import BaseModel

from nanoeval import _codec
from nanoeval._jsonl import encoder
from nanoeval.eval import RolloutSystemError, Task, TResult, TTask

# Bounds of the readable previews that stand beside the pickles in the database.
PREVIEW_CHARS = 4000
PREVIEW_FIELD_CHARS = 500
PREVIEW_ITEMS = 20
# By name, so that numpy need not be loaded.
NUMPY_BOOL = ("bool", "bool_")
_TASK_FIELDS = frozenset(Task.model_fields)  # columns of their own


class UnexpectedRolloutError(RolloutSystemError):
    """Stands for an exception that `evaluate` did not declare as a system error.

    It reaches a summary only with `fail_on_error` other than True. `original_type` is the name of
    the exception's class.
    """

    original_type: str = ""

    @classmethod
    def from_error(cls, error: BaseException) -> UnexpectedRolloutError:
        """Wrap `error`, keeping its message and its type's name."""
        wrapped = cls(message_of(error))
        wrapped.original_type = type(error).__name__
        return wrapped


class LostRolloutError(RolloutSystemError):
    """The executors that ran a rollout died again and again, most likely because of it."""


def score_of(result: Any) -> float | None:
    """The score that a result carries by itself, None when it does not.

    A bool is its own score; otherwise the first of `correct`, `is_correct`, `score` that is a bool
    or a number, as an attribute or as a key.
    """
    if isinstance(result, bool) or type(result).__name__ in NUMPY_BOOL:
        return float(result)
    is_mapping = isinstance(result, Mapping)
    try:
        for name in ("correct", "is_correct", "score"):
            value: Any = result.get(name) if is_mapping else getattr(result, name, None)
            is_bool = type(value).__name__ in NUMPY_BOOL
            if (is_bool or isinstance(value, bool | int | float)) and math.isfinite(value):
                return float(value)
    except Exception:  # a property's own code, or an integer that is no float
        return None
    return None


def preview(value: Any) -> str | None:
    """`value` as JSON that a person can read, long parts cut; None for None and bare tasks."""
    if value is None:
        return None
    if value is True or value is False:
        return "true" if value else "false"
    if isinstance(value, Task):
        own = {k: v for k, v in value.__dict__.items() if k not in _TASK_FIELDS}
        if not own:
            return None
        value = own
    try:
        text = encodable(_encode(_readable(value, depth=0)))
    except Exception as error:  # a value's own code; Python prints no integer of 5,000 digits
        return json.dumps(f"<no preview: {type(error).__name__}>")
    return text if len(text) <= PREVIEW_CHARS else json.dumps(text[:PREVIEW_CHARS] + " …")


def encodable(text: str) -> str:
    """`text` with what UTF-8 cannot carry (lone surrogates) written as escapes."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


_encode = encoder(str, allow_nan=True)


def _readable(value: Any, depth: int) -> Any:  # noqa: PLR0911 - one line per kind of value
    if isinstance(value, str):
        return value if len(value) <= PREVIEW_FIELD_CHARS else value[:PREVIEW_FIELD_CHARS] + " …"
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if depth > 4:
        return f"<{type(value).__name__}>"
    if isinstance(value, list | tuple | set | frozenset):
        items = [_readable(item, depth + 1) for item in list(value)[:PREVIEW_ITEMS]]
        more = len(value) - PREVIEW_ITEMS
        return [*items, f"… {more} more"] if more > 0 else items
    if isinstance(value, Mapping):
        return {str(k): _readable(v, depth + 1) for k, v in list(value.items())[:PREVIEW_ITEMS]}
    if isinstance(value, BaseModel):
        return {k: _readable(v, depth + 1) for k, v in value.__dict__.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = _field_names(type(value))
        return {name: _readable(getattr(value, name, None), depth + 1) for name in names}
    text = repr(value)
    return text if len(text) <= PREVIEW_FIELD_CHARS else text[:PREVIEW_FIELD_CHARS] + " …"


@functools.lru_cache(maxsize=64)
def _field_names(cls: type) -> tuple[str, ...]:
    # Kept, since looking them up costs as much as all the rest of a small result's preview.
    return tuple([field.name for field in dataclasses.fields(cls)])


def dump_error(error: BaseException, what: str) -> bytes:
    """Pickle an exception so that it can also be unpickled; one that cannot is stood in for.

    The stand-in is of the nearest base class that takes a message alone, so that `except` clauses
    and isinstance checks go on working.
    """
    try:
        blob = _codec.dumps(error, what)
        _codec.loads(blob)
        return blob
    except Exception:  # an exception's own constructor may raise anything when it is unpickled
        message = f"{type(error).__name__}: {message_of(error)}"
        if isinstance(error, UnexpectedRolloutError):
            stand_in: Exception = UnexpectedRolloutError(message_of(error))
            stand_in.original_type = error.original_type  # type: ignore[attr-defined]
            return _codec.dumps(stand_in, what)
        base = RolloutSystemError if isinstance(error, RolloutSystemError) else RuntimeError
        return _codec.dumps(base(message), what)


@contextmanager
def noting(note: str) -> Iterator[None]:
    """Add `note` to exceptions that leave the block."""
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise


def message_of(error: BaseException) -> str:
    """What an exception says, even where its own `__str__` raises."""
    try:
        return encodable(str(error))
    except Exception as reason:  # anybody's code
        return f"<{type(error).__name__} whose __str__ raised {type(reason).__name__}>"


def format_traceback(error: BaseException) -> str:
    """The traceback as Python prints it, causes included."""
    return "".join(traceback.format_exception(error))


async def handle_system_errors_and_compute_metrics(
    metrics_fn: Callable[[list[tuple[TTask, TResult]]], Awaitable[dict[str, Any]]],
    results: Sequence[tuple[TTask, TResult | RolloutSystemError]],
    process_invalid: Callable[[TTask], TResult],
) -> dict[str, Any]:
    """Compute `metrics_fn` on the results that are no system errors, and account for the rest.

    Adds `is_valid` (no attempt failed), `num_tasks` (different questions), and, unless the metrics
    have keys of these names, `num_rollouts`, `num_scored` and `num_failed`, where rollouts = scored
    + failed. Where attempts failed, the accuracy's `accuracy_worst_case` and `accuracy_best_case`
    count every failure as wrong, and as right. `metrics_including_errors` holds the metrics with
    `process_invalid(task)` in the place of each failure; it is absent where attempts failed and
    `process_invalid` is not defined.
    """
    scored = [(task, r) for task, r in results if not isinstance(r, RolloutSystemError)]
    failed = [task for task, r in results if isinstance(r, RolloutSystemError)]
    metrics = await _metrics(metrics_fn, scored)
    attempts = Counter(task.question_id for task, _ in results)
    num_tasks = len(attempts)
    bounds: dict[str, Any] = {}
    if failed and (not scored or "accuracy" in metrics):
        bounds = _accuracy_bounds(metrics.get("accuracy"), scored, failed)
    counts = {"num_rollouts": len(results), "num_scored": len(scored), "num_failed": len(failed)}
    # An eval's own values of these names stand, in the eval's order.
    summary = metrics | counts | bounds | metrics
    summary |= {"is_valid": not failed, "num_tasks": num_tasks}
    if failed and "num_missing" in metrics and "num_attempts" in metrics:
        # The standard metrics, which were told of the attempts in `scored` alone.
        wanted = max(attempts.values()) * num_tasks
        summary |= bounds | {"num_missing": wanted - metrics["num_attempts"]}
    if not failed:
        including = metrics
    else:
        try:
            stand_ins = [(task, process_invalid(task)) for task in failed]
        except NotImplementedError:
            return summary
        including = await _metrics(metrics_fn, [*scored, *stand_ins])
    summary["metrics_including_errors"] = {**including, "num_tasks": num_tasks}
    return summary


async def _metrics(
    metrics_fn: Callable[[list[tuple[TTask, TResult]]], Awaitable[dict[str, Any]]],
    results: list[tuple[TTask, TResult]],
) -> dict[str, Any]:
    """What `metrics_fn` gives; TypeError where it is no coroutine function that returns a dict."""
    name = getattr(metrics_fn, "__qualname__", "the summary")
    metrics: Any = metrics_fn(results)
    if not isawaitable(metrics):
        raise TypeError(f"{name} gave a {type(metrics).__name__}; write it as `async def`")
    metrics = await metrics
    if not isinstance(metrics, Mapping):
        raise TypeError(f"{name} returned {metrics!r:.100}; it must return a dict")
    return dict(metrics)


def _accuracy_bounds(
    accuracy: Any, scored: Sequence[tuple[TTask, Any]], failed: Sequence[TTask]
) -> dict[str, float]:
    """Mean over questions of the mean over attempts, with failures counted as 0 and as 1.

    {} where results have no score, and for an `accuracy` of another kind, outside of the bounds.
    """
    per_question: dict[str, list[float]] = {}  # question -> [sum of scores, scored, failed]
    for task, result in scored:
        score = score_of(result)
        if score is None:
            return {}
        counts = per_question.setdefault(task.question_id, [0.0, 0.0, 0.0])
        counts[0] += score
        counts[1] += 1
    for task in failed:
        per_question.setdefault(task.question_id, [0.0, 0.0, 0.0])[2] += 1
    worst = [s / (n + f) for s, n, f in per_question.values()]
    best = [(s + f) / (n + f) for s, n, f in per_question.values()]
    low, high = sum(worst) / len(worst), sum(best) / len(best)
    if isinstance(accuracy, int | float) and not low - 1e-9 <= accuracy <= high + 1e-9:
        return {}
    return {"accuracy_worst_case": low, "accuracy_best_case": high}
