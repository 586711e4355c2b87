"""Reads the stacks of threads and asyncio tasks, for people. Knows nothing of runs.

All functions may be called from any thread while the others run.
"""

from __future__ import annotations

import asyncio
import linecache
import sys
import sysconfig
import threading
import traceback
from asyncio.events import Handle
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from nanoeval.fs_paths import get_package_root
from nanoeval.recorder import get_recorder

_RUN_CALLBACK = Handle._run.__code__
# What the package brings for evals to use is content; the rest of it is machinery.
_CONTENT = ("evals", "solvers", "models", "metrics", "examples")


@dataclass(frozen=True, slots=True)
class Place:
    """A line of code. `source` is its text, empty where the file cannot be read."""

    file: str
    line: int
    function: str
    source: str

    def __str__(self) -> str:
        code = f": {self.source}" if self.source else ""
        return f"{self.file}:{self.line}, in {self.function}{code}"


@dataclass(frozen=True, slots=True)
class RolloutName:
    """Which rollout some code belongs to; `name` is question, attempt and retry."""

    run_set_id: str
    name: str


def callback_frame(thread_id: int) -> FrameType | None:
    """The frame in which a thread's event loop calls the current callback.

    It is the same object for as long as that one callback runs. None between callbacks, and in
    loops that are not asyncio's own.
    """
    frame = sys._current_frames().get(thread_id)
    while frame is not None and frame.f_code is not _RUN_CALLBACK:
        frame = frame.f_back
    return frame


def current_rollout(callback: FrameType | None) -> RolloutName | None:
    """The rollout for which the callback of `callback_frame` works; None where that is unknown."""
    handle = callback.f_locals.get("self") if callback is not None else None
    if not isinstance(handle, Handle):
        return None
    # A copy, because a context can be entered by one thread only.
    rollout: RolloutName | None = handle._context.copy().run(_rollout_here)  # type: ignore[attr-defined]
    return rollout


def _rollout_here() -> RolloutName | None:
    try:
        recorder = get_recorder()
    except LookupError:
        return None
    question = recorder.current_sample_id()
    if not question:
        return None
    return RolloutName(recorder.run_spec.run_set_id, f"{question}.{recorder.current_group_id()}")


def place_of_thread(thread_id: int) -> Place | None:
    """Where in the user's own code a thread is at the moment; None for a thread that is gone.

    That is its innermost frame outside the standard library, installed packages and nanoeval;
    where there is none, the innermost outside the standard library and nanoeval's machinery; where
    there is none either, the innermost.
    """
    innermost = sys._current_frames().get(thread_id)
    frames = list(_frames(innermost))
    for is_theirs in (_is_users, _is_not_machinery):
        for frame in frames:
            if is_theirs(frame.f_code.co_filename):
                return _place(frame)
    # Without any frame, the loop has called a function that is not written in Python.
    return _place(innermost) if innermost is not None else None


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """From the innermost outwards, up to the event loop's call."""
    while frame is not None and frame.f_code is not _RUN_CALLBACK:
        yield frame
        frame = frame.f_back


def _place(frame: FrameType) -> Place:
    code = frame.f_code
    source = linecache.getline(code.co_filename, frame.f_lineno, frame.f_globals).strip()
    return Place(code.co_filename, frame.f_lineno, code.co_qualname, source)


def _is_users(file: str) -> bool:
    return _is_not_machinery(file) and not _is_inside(file, "purelib", "platlib")


def _is_not_machinery(file: str) -> bool:
    if file.startswith("<frozen"):
        return False
    if _is_inside(file, "stdlib", "platstdlib") and not _is_inside(file, "purelib", "platlib"):
        return False
    root = get_package_root()
    inside = Path(file).is_relative_to(root)
    return not inside or Path(file).relative_to(root).parts[0] in _CONTENT


def _is_inside(file: str, *names: str) -> bool:
    return any(Path(file).is_relative_to(sysconfig.get_path(name)) for name in names)


def thread_stacks(first: int) -> str:
    """The stacks of all threads, the one with id `first` first, innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    texts = []
    for thread_id in sorted(frames, key=lambda id: (id != first, id)):
        stack = "".join(traceback.format_stack(frames[thread_id]))
        texts.append(f"Thread {names.get(thread_id, 'unknown')} ({thread_id}):\n{stack}")
    return "\n".join(texts)


def waiting_tasks(loop: asyncio.AbstractEventLoop, limit: int = 50) -> str:
    """Where the tasks of `loop` wait, innermost call last; tasks at the same place are counted.

    The `limit` most frequent places are shown.
    """
    chains = Counter(_await_chain(task.get_coro()) for task in asyncio.all_tasks(loop))
    texts = [
        f"{count} task{'s' if count > 1 else ''} at:\n{chain}"
        for chain, count in chains.most_common(limit)
    ]
    if len(chains) > limit:
        texts.append(f"… and {len(chains) - limit} more places\n")
    return "\n".join(texts)


def _await_chain(awaitable: Any) -> str:
    """The frames of a suspended coroutine and of what it awaits, as a traceback shows them."""
    lines = []
    while awaitable is not None:
        frame = getattr(awaitable, "cr_frame", None) or getattr(awaitable, "gi_frame", None)
        if frame is None:
            lines.append(f"  {type(awaitable).__name__}\n")
            break
        place = _place(frame)
        lines.append(f'  File "{place.file}", line {place.line}, in {place.function}\n')
        if place.source:
            lines.append(f"    {place.source}\n")
        awaitable = getattr(awaitable, "cr_await", None) or getattr(awaitable, "gi_yieldfrom", None)
    return "".join(lines)
