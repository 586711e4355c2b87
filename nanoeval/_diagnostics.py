"""Finds out why a process hangs: blocked event loops, slow callbacks, stacks on request.

One thread per process and run set watches the event loop from outside. Knows rollouts by name only.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, Literal

from nanoeval import _stacks
from nanoeval._aiomonitor import AiomonitorServer
from nanoeval._store import diagnose
from nanoeval.fs_paths import private_dir, stacktrace_root_dir
from nanoeval.setup import say

ENV_STALL_SECONDS = "NANOEVAL_STALL_SECONDS"
DEFAULT_STALL = 1.0
# How often the watchdog looks.
TICK = 0.05
# A callback that takes longer is counted as slow; it is seen for certain from this and two ticks.
SLOW_CALLBACK = 0.1
SECONDS_PER_COUNT = 2.0
# The same line of code is reported on the console and in a file this often.
SECONDS_PER_PLACE = 60.0
MAX_ROLLOUTS_LISTED = 200

Request = Literal["stop", "report"]


@dataclass(frozen=True)
class Stall:
    """What blocked an event loop, as `executor.diagnosis` holds it in JSON.

    `place` is "file:line, in function: source" in the user's own code, `rollout` the name of the
    rollout that blocked, `since` the epoch time when it began, `report` the file with the stacks.
    """

    place: str
    rollout: str | None
    since: float
    seconds: float
    is_over: bool
    report: str | None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Stall | None:
        """None for a text that is none of ours."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None


def stall_seconds() -> float:
    """How long a callback may block the loop before it is reported; infinite when turned off."""
    text = os.environ.get(ENV_STALL_SECONDS, str(DEFAULT_STALL))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise ValueError(
            f"{ENV_STALL_SECONDS}={text!r} must be a number of seconds, or 0 for no reports"
        )
    return seconds or math.inf


@contextmanager
def diagnosing(
    path: Path, executor_id: int, rollouts_in_flight: Callable[[], list[tuple[str, float]]]
) -> Iterator[None]:
    """Watch the running event loop, for one executor of the run set at `path`, during the block.

    Reports stalls, counts slow callbacks, answers SIGUSR1 with the stacks, and starts aiomonitor.
    `rollouts_in_flight` gives (name, start time) of the rollouts at work, oldest first, and is
    called from another thread. ValueError for an unusable NANOEVAL_STALL_SECONDS.
    """
    watchdog = Watchdog(path, executor_id, rollouts_in_flight, stall_seconds())
    with watchdog.running(), _reporting_on_signal(watchdog), AiomonitorServer(path, executor_id):
        yield


@contextmanager
def _reporting_on_signal(watchdog: Watchdog) -> Iterator[None]:
    """Have SIGUSR1 ask for a report. Only the main thread may set signal handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    answer = _SignalAnswer(watchdog)
    answer.previous = signal.signal(signal.SIGUSR1, answer)
    try:
        yield
    finally:
        answer.is_active = False
        # Blocks of other runs may have begun inside this one and not ended: then ours stays below
        # theirs, passes the signal on, and goes when the last of them does.
        handler = signal.getsignal(signal.SIGUSR1)
        while isinstance(handler, _SignalAnswer) and not handler.is_active:
            handler = handler.previous
        signal.signal(signal.SIGUSR1, handler)


class _SignalAnswer:
    """A signal handler that asks a watchdog for a report, then lets the one before it answer."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.is_active = True
        self.previous: Any = signal.SIG_DFL
        self._watchdog = watchdog

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.is_active:
            self._watchdog.ask("report")
        if callable(self.previous):
            self.previous(number, frame)


class Watchdog:
    """Watches the event loop of the thread that makes it."""

    def __init__(
        self,
        path: Path,
        executor_id: int,
        rollouts_in_flight: Callable[[], list[tuple[str, float]]],
        stall_after: float,
        note: Callable[..., None] | None = None,
    ) -> None:
        """`note` takes what `_store.diagnose` takes, where the database is out of reach."""
        self._path = path
        self._diagnose = note or partial(diagnose, path, executor_id)
        self._rollouts_in_flight = rollouts_in_flight
        self._stall_after = stall_after
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        # A SimpleQueue may be filled by a signal handler.
        self._requests: SimpleQueue[Request] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="nanoeval-watchdog", daemon=True)
        self._is_answered = True
        self._blocking: _Blocking | None = None
        self._num_slow = 0
        self._counted_at = time.monotonic()
        self._reported_places: dict[str, float] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self.ask("stop")
            self._thread.join()

    def ask(self, request: Request) -> None:
        """Have the watchdog's thread do something; safe in signal handlers."""
        self._requests.put(request)

    def _run(self) -> None:
        while True:
            try:
                request = self._requests.get(timeout=TICK)
            except Empty:
                self._look(time.monotonic())
                continue
            if request == "stop":
                self._end_blocking(time.monotonic())
                self._count_slow(math.inf)
                return
            self._report_on_request()

    def _look(self, now: float) -> None:
        """See whether the loop has turned since the last look, and if not, what holds it."""
        # A loop that its owner does not run at the moment is not blocked.
        if self._is_answered or not self._loop.is_running():
            self._end_blocking(now)
            self._is_answered = False
            try:
                self._loop.call_soon_threadsafe(self._answer)
            except RuntimeError:  # the loop is closed: nothing is left to be watched
                return
        else:
            callback = _stacks.callback_frame(self._loop_thread)
            if self._blocking is None or self._blocking.callback is not callback:
                self._end_blocking(now)
                self._blocking = _Blocking(callback, now, time.time(), self._stall_after)
            elif now >= self._blocking.began + self._blocking.report_after:
                self._report_stall(self._blocking, now)
        self._count_slow(now)

    def _answer(self) -> None:
        self._is_answered = True

    def _end_blocking(self, now: float) -> None:
        blocking, self._blocking = self._blocking, None
        if blocking is None:
            return
        seconds = now - blocking.began
        self._num_slow += seconds >= SLOW_CALLBACK
        if blocking.stall is not None:
            self._note(diagnosis=blocking.as_stall(seconds, is_over=True).to_json())

    def _count_slow(self, now: float) -> None:
        if self._num_slow and now - self._counted_at >= SECONDS_PER_COUNT:
            self._note(slow_callbacks=self._num_slow)
            self._num_slow, self._counted_at = 0, now

    def _report_stall(self, blocking: _Blocking, now: float) -> None:
        """Tell of a stall: at once, then each time it has become twice as long."""
        place = _stacks.place_of_thread(self._loop_thread)
        if place is None or _stacks.callback_frame(self._loop_thread) is not blocking.callback:
            return  # over since the last look
        seconds = now - blocking.began
        rollout = _stacks.current_rollout(blocking.callback)
        is_first = blocking.stall is None
        key = f"{place.file}:{place.line}"
        is_new = now >= self._reported_places.get(key, -math.inf)
        if is_first:
            blocking.is_told = is_new
        blocking.report_after *= 2
        headline = f"the event loop has been blocked for {seconds:.1f} s by {place}"
        if rollout is not None:
            headline += f" (rollout {rollout.name})"
        if blocking.is_told:
            self._reported_places[key] = now + SECONDS_PER_PLACE
            blocking.report = self._write_report("stall", headline, blocking.report)
        blocking.stall = (str(place), rollout.name if rollout else None)
        stall = blocking.as_stall(seconds, is_over=False)
        self._note(stalls=int(is_first), diagnosis=stall.to_json())
        is_ours = rollout is None or rollout.run_set_id == self._path.stem
        if blocking.is_told and is_ours:
            say(
                f"nanoeval: {headline}. Nothing else runs meanwhile: await it, or move it to a"
                f" thread with asyncio.to_thread. Stacks: {blocking.report}"
            )

    def _report_on_request(self) -> None:
        report = self._write_report("signal", "stacks asked for by signal", None)
        say(f"nanoeval: process {os.getpid()} wrote its stacks to {report}")

    def _write_report(self, kind: str, headline: str, report: str | None) -> str:
        """Append a report to the file `report`, or to a new one; returns the file's name."""
        now = time.time()
        text = self._report_text(headline, now)
        try:
            if report is None:
                folder = private_dir(stacktrace_root_dir() / self._path.stem)
                stamp = time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime(now))
                milliseconds = int(now * 1000) % 1000
                name = f"{stamp}-{milliseconds:03}_{kind}_pid{os.getpid()}.txt"
                report = str(folder / name)
            with open(report, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError as error:
            return f"(could not be written: {error})"
        return report

    def _report_text(self, headline: str, now: float) -> str:
        rollouts = self._rollouts_in_flight()
        listed = [f"{now - began:10.1f} s  {name}" for name, began in rollouts]
        if len(listed) > MAX_ROLLOUTS_LISTED:
            listed[MAX_ROLLOUTS_LISTED:] = [f"… and {len(listed) - MAX_ROLLOUTS_LISTED} more"]
        stamp = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
        return (
            f"== {stamp}, process {os.getpid()}, run set {self._path.stem}: {headline}\n\n"
            f"Rollouts in flight: {len(rollouts)}, oldest first\n" + "\n".join(listed) + "\n\n"
            f"{_stacks.thread_stacks(self._loop_thread)}\n"
            f"Where asyncio's tasks wait:\n{_stacks.waiting_tasks(self._loop)}\n"
        )

    def _note(self, **counts: Any) -> None:
        try:
            self._diagnose(**counts)
        except (sqlite3.Error, OSError):
            return  # diagnosis is never what ends a run; the writing connection reports the trouble


class _Blocking:
    """A callback that was seen to hold the loop at two looks or more."""

    def __init__(
        self, callback: FrameType | None, began: float, since: float, stall_after: float
    ) -> None:
        self.callback = callback
        self.began = began
        self.since = since
        self.report_after = stall_after
        self.is_told = False
        self.report: str | None = None
        self.stall: tuple[str, str | None] | None = None

    def as_stall(self, seconds: float, is_over: bool) -> Stall:
        assert self.stall is not None
        place, rollout = self.stall
        return Stall(place, rollout, self.since, seconds, is_over, self.report)
