"""Small asyncio pieces that evals and the engine share. Knows nothing of either."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")

_ENTERED = "_entered_contexts"


@asynccontextmanager
async def generator_with_cleanup(
    gen: AsyncGenerator[T, None],
) -> AsyncIterator[AsyncGenerator[T, None]]:
    """Yield `gen` and close it on exit, however the block is left.

    Leaving an `async for` early does not close an async generator; its `finally` blocks would run
    whenever the garbage collector gets there.
    """
    try:
        yield gen
    finally:
        await gen.aclose()


async def gather_with_concurrency(
    coros: Iterable[Awaitable[T]], concurrency: int
) -> AsyncGenerator[T, None]:
    """Await `coros`, at most `concurrency` at once, and yield results in completion order.

    The first exception is raised to the consumer. Then, and when the consumer stops early, what is
    still running is cancelled and coroutines that were never started are closed. `coros` may be an
    endless generator. `concurrency < 1` raises ValueError.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency={concurrency} must be at least 1")
    waiting = iter(coros)
    unfinished: set[asyncio.Future[T]] = set()  # or finished, but not yielded yet
    finished: asyncio.Queue[asyncio.Future[T]] = asyncio.Queue()
    try:
        while True:
            while len(unfinished) < concurrency and (coro := next(waiting, None)) is not None:
                future: asyncio.Future[T] = asyncio.ensure_future(coro)
                unfinished.add(future)
                future.add_done_callback(finished.put_nowait)
            if not unfinished:
                return
            future = await finished.get()
            unfinished.discard(future)
            yield future.result()
    finally:
        if waiting is not coros:  # what a generator has not made yet needs no closing
            for coro in waiting:
                if asyncio.iscoroutine(coro):
                    coro.close()
        await _cancel_all(unfinished)


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end even when the caller is cancelled; pass the cancellation on then."""
    task: asyncio.Task[T] = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
        except BaseException:
            break
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result


async def cancel_task(fut: asyncio.Future[Any]) -> None:
    """Cancel `fut` and wait until it has ended; its own outcome is discarded.

    A cancellation of the caller while it waits is passed on.
    """
    await _cancel_all({fut})


async def _cancel_all(futures: set[asyncio.Future[Any]]) -> None:
    for future in futures:
        future.cancel()
        future.add_done_callback(_retrieve)
    if futures:
        await asyncio.wait(futures)


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Take the outcome, so that asyncio does not log that nobody did."""
    if not future.cancelled():
        future.exception()


class _Enterable:
    """Keeps the contexts that are open on an object, which goes into no pickle of it."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != _ENTERED}

    async def _enter(self, context: AbstractAsyncContextManager[T]) -> T:
        value = await context.__aenter__()
        # chz objects refuse plain attribute assignment.
        if _ENTERED not in self.__dict__:
            object.__setattr__(self, _ENTERED, [])
        self.__dict__[_ENTERED].append((asyncio.current_task(), context))
        return value

    async def __aexit__(self, *exc_info: Any) -> bool | None:
        entered = self.__dict__.get(_ENTERED)
        if not entered:
            raise RuntimeError(f"{type(self).__name__} is left but was not entered")
        # The one that this task entered last: task groups and time-outs must be left by the task
        # that entered them.
        task = asyncio.current_task()
        own = [index for index, (owner, _) in enumerate(entered) if owner is task]
        context: AbstractAsyncContextManager[Any]
        _, context = entered.pop(own[-1] if own else -1)
        if not entered:
            object.__delattr__(self, _ENTERED)
        return await context.__aexit__(*exc_info)


class HasAsyncContextManagerWithValue(_Enterable, Generic[T]):
    """Makes a class an async context manager through one overridable method, `_context_value`.

    `async with obj as value` enters `obj._context_value()` and gives what it yields. The same
    object may be entered several times at once, by several tasks.
    """

    @asynccontextmanager
    async def _context_value(self) -> AsyncIterator[T]:
        raise NotImplementedError(f"{type(self).__name__} must define _context_value")
        yield

    async def __aenter__(self) -> T:
        return await self._enter(self._context_value())


class HasAsyncContextManager(_Enterable):
    """Makes a class an async context manager through one overridable method, `_context`.

    `async with obj` enters `obj._context()`, which does nothing by default, and gives `obj`. The
    same object may be entered several times at once, by several tasks.
    """

    @asynccontextmanager
    async def _context(self) -> AsyncGenerator[None, None]:
        yield

    async def __aenter__(self) -> Self:
        await self._enter(self._context())
        return self
