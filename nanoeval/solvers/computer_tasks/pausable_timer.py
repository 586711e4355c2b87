"""Time limits that stand still while a rollout waits for something that is not its fault."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self

# The timers that run around the calling code, outermost first. Tasks started inside inherit it.
_running_timers: ContextVar[tuple[PausableTimer, ...]] = ContextVar("running_timers", default=())


class NamedTimeoutError(TimeoutError):
    """A time limit ran out; `timeout_type` says which."""

    def __init__(self, timeout_type: str, message: str) -> None:
        super().__init__(timeout_type, message)
        self.timeout_type = timeout_type
        self.message = message

    def __str__(self) -> str:
        return self.message


class PausableTimer:
    """`async with PausableTimer("grading", 600):` raises NamedTimeoutError after 600 seconds.

    Seconds spent inside `with timer.pause():` do not count. A timer is used once. An unrelated
    TimeoutError passes through unchanged.
    """

    def __init__(self, name: str, timeout_seconds: float) -> None:
        self.name = name
        self.timeout_seconds = timeout_seconds
        self._timeout: asyncio.Timeout | None = None
        self._counted = 0.0
        self._counting_since: float | None = None
        self._n_pauses = 0

    @property
    def elapsed(self) -> float:
        """Seconds that counted so far."""
        if self._counting_since is None:
            return self._counted
        return self._counted + asyncio.get_running_loop().time() - self._counting_since

    @property
    def remaining(self) -> float:
        """Seconds left, never below 0."""
        return max(0.0, self.timeout_seconds - self.elapsed)

    def pause(self) -> Pause:
        """A context manager, for `with` and `async with`, inside which the timer stands still."""
        return Pause([self])

    async def __aenter__(self) -> Self:
        if self._timeout is not None:
            raise RuntimeError(f"timer {self.name!r} was entered before; make a new one")
        self._timeout = asyncio.timeout(None)
        await self._timeout.__aenter__()
        _running_timers.set((*_running_timers.get(), self))
        self._count()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._timeout is not None
        self._stop_counting()
        # Not a token's reset: an async generator may be closed from another context.
        _running_timers.set(tuple(t for t in _running_timers.get() if t is not self))
        try:
            await self._timeout.__aexit__(exc_type, exc, traceback)
        except TimeoutError as error:
            raise NamedTimeoutError(
                self.name, f"Timeout {self.name} of {self.timeout_seconds} seconds exceeded"
            ) from error

    @contextmanager
    def _paused(self) -> Iterator[None]:
        self._n_pauses += 1
        if self._n_pauses == 1:
            self._stop_counting()
        try:
            yield
        finally:
            self._n_pauses -= 1
            if self._n_pauses == 0 and self in _running_timers.get():
                self._count()

    def _count(self) -> None:
        assert self._timeout is not None
        loop = asyncio.get_running_loop()
        left = self.remaining
        self._counting_since = loop.time()
        if not self._timeout.expired():
            self._timeout.reschedule(loop.time() + left)

    def _stop_counting(self) -> None:
        self._counted = self.elapsed
        self._counting_since = None
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(None)


class Pause:
    """Holds timers still inside a `with` or `async with` block. Blocks may nest."""

    def __init__(self, timers: list[PausableTimer]) -> None:
        self._timers = timers
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for timer in self._timers:
            self._stack.enter_context(timer._paused())
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._stack.close()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, *exc_info: Any) -> None:
        self.__exit__(*exc_info)


def pause_all_pausable_timers() -> Pause:
    """Hold every timer still that runs around the calling code; other rollouts' go on."""
    return Pause(list(_running_timers.get()))
