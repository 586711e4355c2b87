"""Prepares a process for runs: logging, limits, signals, and what runs share. Knows no engine."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import signal
import sys
import threading
from collections.abc import Coroutine, Hashable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from contextvars import ContextVar, Token
from typing import Any, Self, TypeVar

from nanoeval.library_config import get_library_config
from nanoeval.recorder_protocol import uuid

T = TypeVar("T")

EXIT_INTERRUPTED = 130
STOPPING = b"\nStopping: handing in what is finished. Once more to exit at once.\n"


class SharedResources:
    """What the runs inside one `global_exit_stack` block share: databases and worker processes."""

    def __init__(self) -> None:
        self.stack = AsyncExitStack()
        # Runs that name no run set of their own go into one.
        self.run_set_id = uuid()
        self._entered: dict[Hashable, asyncio.Future[Any]] = {}

    async def get(self, key: Hashable, resource: AbstractAsyncContextManager[T]) -> T:
        """Enter `resource` unless one is entered under `key` already; give what it entered to."""
        if key not in self._entered:
            entering = self._entered[key] = asyncio.ensure_future(
                self.stack.enter_async_context(resource)
            )
            entering.add_done_callback(lambda done: self._forget_failed(key, done))
        return await asyncio.shield(self._entered[key])  # type: ignore[no-any-return]

    def _forget_failed(self, key: Hashable, done: asyncio.Future[Any]) -> None:
        if done.cancelled() or done.exception() is not None:
            del self._entered[key]


_shared: ContextVar[SharedResources | None] = ContextVar("nanoeval_shared", default=None)


class GlobalExitStack:
    """`async with global_exit_stack:` keeps databases and worker processes open between runs.

    May be entered again and again in one process, also inside itself (the inner block then shares
    with the outer one) and by several tasks at once (each then has its own). What was opened
    inside is closed at the exit.
    """

    def __init__(self) -> None:
        self._blocks: ContextVar[tuple[tuple[SharedResources | None, Token[Any]], ...]] = (
            ContextVar("nanoeval_blocks", default=())
        )

    async def __aenter__(self) -> Self:
        opened = SharedResources() if _shared.get() is None else None
        token = _shared.set(opened or _shared.get())
        self._blocks.set((*self._blocks.get(), (opened, token)))
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        *outer, (opened, token) = self._blocks.get()
        self._blocks.set(tuple(outer))
        _shared.reset(token)
        if opened is not None:
            await opened.stack.aclose()

    async def enter_async_context(self, context: AbstractAsyncContextManager[T]) -> T:
        """Enter `context` and leave it when the block does. RuntimeError outside a block."""
        shared = _shared.get()
        if shared is None:
            raise RuntimeError("use global_exit_stack inside `async with global_exit_stack:`")
        return await shared.stack.enter_async_context(context)


global_exit_stack = GlobalExitStack()


@asynccontextmanager
async def shared_resource(key: Hashable, resource: AbstractAsyncContextManager[T]) -> Any:
    """Enter `resource` for this block, or share the block's of `global_exit_stack` around it."""
    shared = _shared.get()
    if shared is not None:
        yield await shared.get(key, resource)
    else:
        async with resource as value:
            yield value


def default_run_set_id() -> str:
    """The run set of runs that name none: one per `global_exit_stack` block, else a fresh one."""
    shared = _shared.get()
    return shared.run_set_id if shared is not None else uuid()


def nanoeval_entrypoint(coro: Coroutine[Any, Any, T]) -> T:
    """Run a program's main coroutine and return its result.

    Sets up logging and limits and keeps databases and worker processes between runs. Ctrl-C or
    SIGTERM cancels the coroutine, so that runs hand in what is finished and print how to resume; a
    second one exits at once, with status 130.
    """
    if not inspect.isawaitable(coro):
        name = getattr(coro, "__name__", "main")
        raise TypeError(f"nanoeval_entrypoint takes a coroutine: nanoeval_entrypoint({name}())")
    nanoeval_logging()
    raise_file_limit()
    tune_interpreter()
    try:
        return asyncio.run(_main(coro))
    except (asyncio.CancelledError, KeyboardInterrupt):
        sys.exit(EXIT_INTERRUPTED)


async def _main(coro: Coroutine[Any, Any, T]) -> T:
    main = asyncio.current_task()
    assert main is not None
    with _first_signal_cancels(main):
        async with global_exit_stack:
            return await coro


@contextmanager
def _first_signal_cancels(task: asyncio.Task[Any]) -> Iterator[None]:
    """Cancel `task` on the first SIGINT or SIGTERM, and exit at once on the second."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    process_id = os.getpid()
    received: list[int] = []

    # Plain signal handlers, not the loop's: they run even while a rollout blocks the loop.
    def on_signal(number: int, frame: object) -> None:
        if os.getpid() != process_id:
            # A forked child has inherited this handler; it is to end as any process does.
            is_ctrl_c = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_ctrl_c else signal.SIG_DFL)
            signal.raise_signal(number)
            return
        received.append(number)
        if len(received) > 1:
            os._exit(EXIT_INTERRUPTED)
        if sys.stderr is not None:  # else 2 may be any file
            with suppress(OSError):
                os.write(2, STOPPING)
        # At once, so that rollouts whose turn is still to come see it; and the loop is to wake up.
        task.cancel()
        loop.call_soon_threadsafe(lambda: None)

    previous = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def nanoeval_logging() -> None:
    """Set up logging the way the library_config says."""
    get_library_config().setup_logging()


def raise_file_limit() -> None:
    """Raise the limit of open files as far as the system lets this process."""
    try:
        import resource
    except ImportError:  # not a POSIX system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    # Some systems report an unlimited hard limit and refuse anything above a lower one.
    for limit in (hard, 1_048_576, 65_536, 10_240):
        if resource.RLIM_INFINITY not in {limit, soft} and limit <= soft:
            return
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return
        except (ValueError, OSError):
            continue


def tune_interpreter() -> None:
    """Set what thousands of rollouts at once profit from, for the whole process.

    The database's thread gets its turn within half a millisecond of asking for it: Python's default
    of five makes it wait that long after each statement while rollouts compute. And garbage is
    looked for after 10,000 new objects, not 700: what rollouts in flight hold lives long, and
    would be looked through again and again.
    """
    sys.setswitchinterval(min(sys.getswitchinterval(), 0.0005))
    newest, *older = gc.get_threshold()
    if newest:  # 0 turns the collection off
        gc.set_threshold(max(newest, 10_000), *older)


def say(message: str) -> None:
    """Show a person one message on the terminal (stderr), above a progress bar if there is one."""
    from tqdm import tqdm

    if sys.stderr is not None:  # where it was closed, tqdm would write to stdout
        with suppress(OSError):
            tqdm.write(message, file=sys.stderr)
