"""The asyncio pieces: order, bounds, and that nothing is left running."""

from __future__ import annotations

import asyncio
import itertools
import pickle
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import chz
import pytest

from nanoeval.asyncio_utils import (
    HasAsyncContextManager,
    HasAsyncContextManagerWithValue,
    cancel_task,
    gather_with_concurrency,
    generator_with_cleanup,
)


async def count_up(closed: list[str]) -> AsyncGenerator[int, None]:
    try:
        for number in itertools.count():
            yield number
    finally:
        await asyncio.sleep(0)
        closed.append("closed")


async def test_a_generator_is_closed_when_the_block_is_left_early() -> None:
    """A solver's containers would live until the garbage collector finds its generator."""
    closed: list[str] = []
    async with generator_with_cleanup(count_up(closed)) as numbers:
        async for number in numbers:
            if number == 2:
                break
    assert closed == ["closed"]


async def test_a_generator_is_closed_when_the_block_raises() -> None:
    """A failed rollout would leave its containers running."""
    closed: list[str] = []

    async def fail_at_one() -> None:
        async with generator_with_cleanup(count_up(closed)) as numbers:
            async for number in numbers:
                _ = 1 / (number - 1)

    with pytest.raises(ZeroDivisionError):
        await fail_at_one()
    assert closed == ["closed"]


class Gauge:
    """Counts how many run at once, and what became of them."""

    def __init__(self) -> None:
        self.running = self.most = self.started = self.cancelled = 0

    async def work(self, result: int, seconds: float = 0.001) -> int:
        self.started += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(seconds)
            return result
        except asyncio.CancelledError:
            self.cancelled += 1
            await asyncio.sleep(0.001)  # cleaning up takes its time
            raise
        finally:
            self.running -= 1


async def collect(results: AsyncGenerator[int, None]) -> list[int]:
    return [result async for result in results]


@pytest.mark.parametrize("concurrency", [1, 3, 100])
async def test_gather_yields_all_within_its_bound(concurrency: int) -> None:
    """A server would get more requests at once than it was promised, or some results be lost."""
    gauge = Gauge()
    results = await collect(
        gather_with_concurrency((gauge.work(i) for i in range(20)), concurrency)
    )
    assert sorted(results) == list(range(20))
    assert gauge.most == min(concurrency, 20)


async def test_gather_yields_in_completion_order() -> None:
    """A slow first item would hold back all others."""
    gauge = Gauge()
    delays = [0.06, 0.02, 0.04, 0.0]
    work = [gauge.work(i, seconds) for i, seconds in enumerate(delays)]
    assert await collect(gather_with_concurrency(work, 4)) == [3, 1, 2, 0]


async def test_gather_keeps_the_order_of_things_done_in_one_turn() -> None:
    """Results that are ready at once would come in a random order, differently in each run."""
    loop = asyncio.get_running_loop()
    futures = [loop.create_future() for _ in range(50)]
    for number, future in enumerate(futures):
        loop.call_soon(future.set_result, number)
    assert await collect(gather_with_concurrency(futures, 50)) == list(range(50))


async def test_gather_of_nothing_is_nothing() -> None:
    """An empty list would hang or raise."""
    assert await collect(gather_with_concurrency([], 3)) == []


@pytest.mark.parametrize("concurrency", [0, -1])
async def test_gather_refuses_a_bound_that_runs_nothing(concurrency: int) -> None:
    """It would wait for ever."""
    with pytest.raises(ValueError, match=f"concurrency={concurrency} must be at least 1"):
        await collect(gather_with_concurrency([], concurrency))


async def fail() -> int:
    await asyncio.sleep(0.001)
    raise ConnectionError("cut")


async def test_gather_raises_the_first_error_and_leaves_nothing_running() -> None:
    """Requests of a failed run would go on in the background, unowned."""
    gauge = Gauge()
    work: list[Coroutine[Any, Any, int]] = [gauge.work(i, 60) for i in range(3)]
    work += [fail(), fail(), gauge.work(4)]  # the last is never started: it must be closed
    with pytest.raises(ConnectionError, match="cut"):
        await collect(gather_with_concurrency(work, 5))
    assert (gauge.started, gauge.running, gauge.cancelled) == (3, 0, 3)


async def test_gather_left_early_leaves_nothing_running() -> None:
    """A consumer that has seen enough would pay for all the rest."""
    gauge = Gauge()
    work = [gauge.work(i, 0.001 if i == 0 else 60) for i in range(10)]
    async with generator_with_cleanup(gather_with_concurrency(work, 4)) as results:
        async for result in results:
            assert result == 0
            break
    assert gauge.started == 4
    assert gauge.running == 0


async def test_gather_left_early_reports_no_unseen_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Errors that nobody waits for any more would be logged as never retrieved."""
    work = [fail() for _ in range(5)]
    with pytest.raises(ConnectionError):
        await collect(gather_with_concurrency(work, 5))
    del work
    await asyncio.sleep(0)
    assert caplog.records == []


async def test_gather_takes_an_endless_generator() -> None:
    """Leaving it early would drain the generator for ever."""
    gauge = Gauge()
    endless = (gauge.work(i) for i in itertools.count())
    async with generator_with_cleanup(gather_with_concurrency(endless, 2)) as results:
        async for _ in results:
            break
    assert gauge.started <= 3


async def test_gather_that_is_cancelled_cancels_all_at_once() -> None:
    """Ctrl-C would wait for each item's clean-up in turn, or leave some of them running."""
    gauge = Gauge()
    work = [gauge.work(i, 60) for i in range(50)]
    consumer = asyncio.create_task(collect(gather_with_concurrency(work, 50)))
    await asyncio.sleep(0.01)
    started = asyncio.get_running_loop().time()
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    assert (gauge.running, gauge.cancelled) == (0, 50)
    assert asyncio.get_running_loop().time() - started < 0.05


async def test_gather_asks_for_items_only_as_they_are_needed() -> None:
    """A million tasks would all be in memory before the first one is done."""
    made = 0
    gauge = Gauge()

    def work() -> Iterator[Coroutine[Any, Any, int]]:
        nonlocal made
        for i in range(100):
            made += 1
            yield gauge.work(i)

    n_done = 0
    async for _ in gather_with_concurrency(work(), 5):
        n_done += 1
        assert made <= n_done + 5


async def test_cancel_task_waits_for_the_clean_up() -> None:
    """What the task still does would run beside what comes next."""
    gauge = Gauge()
    task = asyncio.create_task(gauge.work(1, 60))
    await asyncio.sleep(0)
    await cancel_task(task)
    assert task.cancelled()
    assert gauge.running == 0


@pytest.mark.parametrize("outcome", ["result", "error", "cancelled"])
async def test_cancel_task_takes_a_finished_one(outcome: str) -> None:
    """Cleaning up twice would raise what the task had raised long ago."""
    task = asyncio.create_task(fail() if outcome == "error" else Gauge().work(1))
    if outcome == "cancelled":
        task.cancel()
    await asyncio.wait([task])
    await cancel_task(task)
    assert task.done()


async def test_cancel_task_discards_an_error_of_the_clean_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An error while stopping would replace the reason for stopping, or be logged as unseen."""

    async def fails_when_cancelled() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise ConnectionError("cut")

    task = asyncio.create_task(fails_when_cancelled())
    await asyncio.sleep(0)
    await cancel_task(task)
    del task
    assert caplog.records == []


async def test_cancel_task_passes_on_a_cancellation_of_its_caller() -> None:
    """Somebody who stops a slow clean-up would have to wait for it all the same."""

    async def stubborn() -> None:
        while not done.is_set():
            try:
                await done.wait()
            except asyncio.CancelledError:
                continue

    done = asyncio.Event()
    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    caller = asyncio.create_task(cancel_task(task))
    await asyncio.sleep(0.01)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    done.set()
    await task


@chz.chz
class Pool(HasAsyncContextManager):
    """A chz object, as all evals and models are; `log` is shared by its copies."""

    log: list[str] = chz.field(default_factory=list)

    @asynccontextmanager
    async def _context(self) -> AsyncGenerator[None, None]:
        self.log.append("enter")
        try:
            yield
        finally:
            self.log.append("leave")


async def test_context_is_entered_and_left_around_the_block() -> None:
    """What an eval opens would not be there, or stay open."""
    pool = Pool()

    async def fail_inside() -> None:
        async with pool as entered:
            assert entered is pool
            assert pool.log == ["enter"]
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        await fail_inside()
    assert pool.log == ["enter", "leave"]


async def test_context_can_be_entered_again_and_within_itself() -> None:
    """One model that two evals share could be used by only one of them."""
    pool = Pool()
    for _ in range(2):
        async with pool, pool:
            pass
    assert pool.log == ["enter", "enter", "leave", "leave"] * 2


async def test_context_without_override_does_nothing() -> None:
    """Every eval would have to define one."""
    plain = HasAsyncContextManager()
    async with plain as entered:
        assert entered is plain


async def test_context_error_comes_through() -> None:
    """An AttributeError in a user's _context would be swallowed, and the run go on without it."""

    class Broken(HasAsyncContextManager):
        @asynccontextmanager
        async def _context(self) -> AsyncGenerator[None, None]:
            raise AttributeError("no such thing")
            yield

    broken = Broken()
    with pytest.raises(AttributeError, match="no such thing"):
        async with broken:
            pytest.fail("the block was entered")
    with pytest.raises(RuntimeError, match="Broken is left but was not entered"):
        await broken.__aexit__(None, None, None)


class TaskBound(HasAsyncContextManager):
    """A context that only the task that entered it may leave, as with time-outs and task groups."""

    @asynccontextmanager
    async def _context(self) -> AsyncGenerator[None, None]:
        async with asyncio.timeout(60), asyncio.TaskGroup():
            entered_by = asyncio.current_task()
            yield
            assert asyncio.current_task() is entered_by


async def test_tasks_that_share_an_object_leave_what_they_entered() -> None:
    """Two runs that share a model would leave each other's time-outs and task groups."""
    shared = TaskBound()

    async def use(seconds: float) -> None:
        async with shared:
            await asyncio.sleep(seconds)

    async with asyncio.TaskGroup() as group:
        for seconds in (0.01, 0.03, 0.02):
            group.create_task(use(seconds))


async def test_another_task_may_leave_a_context() -> None:
    """Fixtures and exit stacks that are closed elsewhere would fail."""
    pool = Pool()
    await asyncio.create_task(pool.__aenter__())
    await pool.__aexit__(None, None, None)
    assert pool.log == ["enter", "leave"]


async def test_an_entered_object_can_be_pickled_and_compared() -> None:
    """A rollout that sends its eval or model to a process pool would fail with a pickling error."""
    pool = Pool()
    async with pool:
        copy = pickle.loads(pickle.dumps(pool))
        assert copy == Pool(log=["enter"])
        async with copy:
            pass
    assert copy.log == ["enter", "enter", "leave"]
    assert pool.log == ["enter", "leave"]


async def test_context_value_is_what_the_block_gets() -> None:
    """`async with obj as connection` would give the object itself."""

    class Connection(HasAsyncContextManagerWithValue[str]):
        @asynccontextmanager
        async def _context_value(self) -> AsyncIterator[str]:
            yield "connected"

    async with Connection() as value:
        assert value == "connected"


async def test_context_value_must_be_defined() -> None:
    """A class without it would give None."""

    class Forgotten(HasAsyncContextManagerWithValue[str]):
        pass

    with pytest.raises(NotImplementedError, match="Forgotten must define _context_value"):
        async with Forgotten():
            pytest.fail("the block was entered")
