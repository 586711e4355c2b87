"""What runs inside Ray's actors; see `ray`. One desk per database, and the workers.

The desk sits on the driver's node, where the database is: it gives out claims and takes in what
came of them. A worker may be anywhere and runs the same `Worker` as every executor; what it records
goes to the desk as well, where the driver fetches it for its own recorder.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from nanoeval import _codec, _outcomes
from nanoeval._database_file import StoreError
from nanoeval._diagnostics import Watchdog, stall_seconds
from nanoeval._executors._answers import errors_to_tell
from nanoeval._jsonl import encode_line
from nanoeval._process_identity import ProcessIdentity, this_process
from nanoeval._recorder_base import RecorderBase
from nanoeval._store import Exchange, Finish, Store, StoredEval
from nanoeval._worker import Job, Worker, portable_errors
from nanoeval.library_config import set_library_config
from nanoeval.recorder_protocol import RunSpec
from nanoeval.setup import nanoeval_logging, raise_file_limit, tune_interpreter

T = TypeVar("T")

# How long the driver's question for events waits at the desk for the next ones, seconds.
LONG_POLL = 0.5
# Beyond this many bytes a desk answers with the events it has, and keeps the rest for later.
EVENT_BYTES = 8 * 2**20


class DeskLostError(StoreError):
    """The desk, and with it the way to the database, is gone; the driver starts another."""


@dataclass(frozen=True)
class Order:
    """What a worker is to serve. `recorder` is what its recorder needs; `urls` are by view."""

    number: int
    path: str
    lease: float
    stored: StoredEval
    definitions: bytes | None
    run_spec: RunSpec
    urls: dict[str, str | None]
    num_sharers: int


class Desk:
    """An actor: a run set's database, for workers elsewhere."""

    def __init__(self, path: str, lease: float) -> None:
        self._store = Store(Path(path), lease, may_create=False)
        self._opening: asyncio.Future[Any] | None = None
        self._executor_ids: dict[int, int] = {}
        self._events: dict[int, list[bytes]] = defaultdict(list)
        self._has_events = asyncio.Event()

    async def _open(self) -> Store:
        if self._opening is None:
            self._opening = asyncio.ensure_future(self._store.__aenter__())
        await asyncio.shield(self._opening)
        return self._store

    async def register(self, order_number: int, process: ProcessIdentity) -> int:
        """Make a worker an executor of the database, for as long as it serves an order."""
        executor_id = await (await self._open()).add_executor("worker", process)
        self._executor_ids[order_number] = executor_id
        return executor_id

    async def executor_of(self, order_number: int) -> int | None:
        """Which executor serves an order; None while nobody has begun to."""
        return self._executor_ids.get(order_number)

    async def num_registered(self) -> int:
        """How many orders have been begun."""
        return len(self._executor_ids)

    async def exchange(
        self,
        events: list[bytes],
        executor_id: int,
        eval_id: int,
        finishes: Sequence[Finish],
        wanted: int,
        num_sharers: int,
    ) -> Exchange:
        self.take_in(eval_id, events)
        store = await self._open()
        return await store.exchange(executor_id, eval_id, finishes, wanted, num_sharers)

    async def release(self, events: list[bytes], executor_id: int, eval_id: int) -> None:
        self.take_in(eval_id, events)
        await (await self._open()).release(executor_id, eval_id)

    async def end(self, executor_id: int, reason: str, losses: int = 0) -> int:
        """End an executor; returns how many claims of it went back to the queue."""
        return await (await self._open()).end_executor(executor_id, reason, losses)

    async def beat(self, executor_id: int) -> None:
        await (await self._open()).beat(executor_id)

    async def diagnose(self, executor_id: int, counts: dict[str, Any]) -> None:
        await (await self._open()).diagnose(executor_id, **counts)

    def take_in(self, eval_id: int, events: list[bytes]) -> None:
        if events:
            self._events[eval_id] += events
            self._has_events.set()

    async def wake(self) -> None:
        """Have `events` answer at once."""
        self._has_events.set()

    async def events(self, eval_id: int) -> list[bytes]:
        """The events of an eval since the last call, in their order; waits a moment for some."""
        if not self._events[eval_id]:
            self._has_events.clear()
            try:
                async with asyncio.timeout(LONG_POLL):
                    await self._has_events.wait()
            except TimeoutError:
                return []
        waiting = self._events[eval_id]
        sizes = accumulate(map(len, waiting))
        n = next((n for n, size in enumerate(sizes, 1) if size >= EVENT_BYTES), len(waiting))
        self._events[eval_id] = waiting[n:]
        return waiting[:n]


class RayWorker:
    """An actor: serves one order after the other, or several at once."""

    def __init__(self, sys_path: list[str], library_config: bytes) -> None:
        sys.path += [folder for folder in sys_path if folder not in sys.path]
        set_library_config(_codec.loads(library_config))
        nanoeval_logging()
        raise_file_limit()
        tune_interpreter()
        self._serving: dict[int, asyncio.Task[bytes | None]] = {}
        self._was_stopped: set[int] = set()

    async def serve(self, order: Order, desk: Any) -> bytes | None:
        """Serve an order until its eval is done: None, or what was raised, pickled.

        Raises DeskLostError when the desk is gone: then nothing can be handed in any more.
        """
        task = self._serving[order.number] = asyncio.ensure_future(self._serve(order, desk))
        try:
            if order.number in self._was_stopped:
                task.cancel()
            while not task.done():
                # The eval's own code may cancel this too; what that did is `_serve`'s to tell.
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([task])
            return None if order.number in self._was_stopped and task.cancelled() else task.result()
        finally:
            del self._serving[order.number]

    async def stop(self, number: int) -> None:
        """Have an order end in order: what is finished is handed in, the rest given back."""
        self._was_stopped.add(number)
        if (task := self._serving.get(number)) is not None:
            task.cancel()

    async def _serve(self, order: Order, desk: Any) -> bytes | None:
        errors: list[BaseException] = []
        recorder = ForwardingRecorder(order.run_spec, order.urls)
        counter = _Counter(desk, recorder)
        eval_id = order.stored.eval_id
        executor_id = await _answer(desk.register.remote(order.number, this_process()))
        try:
            with _heartbeat(desk, executor_id, order.lease):
                _codec.install_main_definitions(order.definitions)
                spec = _codec.loads(order.stored.spec)
                job = Job(eval_id, order.run_spec.run_id, spec.eval, spec.runner, recorder)
                worker = Worker(counter, executor_id, job, order.num_sharers)
                with _watched(desk, executor_id, Path(order.path), worker):
                    await worker.serve()
        except DeskLostError:
            raise
        except BaseException as error:
            errors = errors_to_tell(error, order.number in self._was_stopped)
        finally:
            await counter.leave(executor_id, eval_id)
        where = f"an actor on {this_process().host}, process {this_process().pid}"
        return portable_errors(errors, where) if errors else None


class _Counter:
    """A worker's side of the desk; stands in for the `Store`."""

    def __init__(self, desk: Any, recorder: ForwardingRecorder) -> None:
        self._desk, self._recorder = desk, recorder

    async def exchange(
        self,
        executor_id: int,
        eval_id: int,
        finishes: Sequence[Finish],
        wanted: int,
        num_sharers: int = 1,
    ) -> Exchange:
        """Like `Store.exchange`; what an unanswered call did is not known: claims are then void."""
        arguments = (executor_id, eval_id, finishes, wanted, num_sharers)
        events = self._recorder.take()
        try:
            exchange: Exchange = await _answer(self._desk.exchange.remote(events, *arguments))
        except ActorUnavailableError:
            await _until_answered(lambda: self._desk.end.remote(executor_id, "connection lost"))
            exchange = await _until_answered(
                lambda: self._desk.exchange.remote([], executor_id, eval_id, [], 0, num_sharers)
            )
        return exchange

    async def release(self, executor_id: int, eval_id: int) -> None:
        events = self._recorder.take()
        await _until_answered(lambda: self._desk.release.remote(events, executor_id, eval_id))

    async def leave(self, executor_id: int, eval_id: int) -> None:
        """Hand in the last events, and be no executor any more."""
        await self.release(executor_id, eval_id)
        await _until_answered(lambda: self._desk.end.remote(executor_id, "ended"))


async def _answer(call: Awaitable[T]) -> T:
    """The answer of the desk; errors come as what they were before Ray dressed them."""
    try:
        return await call
    except RayTaskError as error:
        raise error.cause from None
    except ActorUnavailableError:
        raise
    except RayActorError as error:
        raise DeskLostError(f"the desk of the run is gone: {error}") from error


async def _until_answered(call: Any) -> Any:
    """Repeat a call, one that may be repeated, until the desk answers or is known to be gone."""
    while True:
        try:
            return await _answer(call())
        except ActorUnavailableError:
            await asyncio.sleep(1.0)


@contextmanager
def _heartbeat(desk: Any, executor_id: int, lease: float) -> Iterator[None]:
    """Renew a lease from a thread of its own: a blocked event loop keeps its claims."""
    stop = threading.Event()

    def beat() -> None:
        interval = min(lease / 4, 2.0)
        while not stop.wait(interval):
            try:
                ray.get(desk.beat.remote(executor_id), timeout=lease)
            except RayError:
                continue  # the worker's own calls meet the same trouble and report it

    thread = threading.Thread(target=beat, name="nanoeval-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()


@contextmanager
def _watched(desk: Any, executor_id: int, path: Path, worker: Worker) -> Iterator[None]:
    """Report what blocks the event loop, as in every process that runs rollouts."""

    def note(**counts: Any) -> None:
        desk.diagnose.remote(executor_id, counts)

    in_flight = worker.rollouts_in_flight
    with Watchdog(path, executor_id, in_flight, stall_seconds(), note).running():
        yield


class ForwardingRecorder(RecorderBase):
    """Keeps events for the driver, whose recorder then gets the same calls at the same times."""

    def __init__(self, run_spec: RunSpec, urls: dict[str, str | None]) -> None:
        self.run_spec = run_spec
        self._urls = urls
        self._lock = threading.Lock()
        self._events: list[bytes] = []

    def __enter__(self) -> ForwardingRecorder:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        pass

    def take(self) -> list[bytes]:
        """The events since the last call."""
        with self._lock:
            events, self._events = self._events, []
        return events

    def record_match(self, correct: bool, **fields: Any) -> None:
        """Forward a verdict."""
        self._forward("record_match", correct, **fields)

    def record_sampling(self, prompt: Any, sampled: Any, **fields: Any) -> None:
        """Forward one call of a model."""
        self._forward("record_sampling", prompt, sampled, **fields)

    def record_sample_completed(self, **extra: Any) -> None:
        """Forward the end of a rollout."""
        self._forward("record_sample_completed", **extra)

    def record_error(self, msg: str, error: Exception | None, **fields: Any) -> None:
        """Forward an error, as one that can be unpickled elsewhere."""
        portable = None if error is None else _codec.loads(_outcomes.dump_error(error, "an error"))
        if error is not None:
            fields.setdefault("error_type", type(error).__name__)
            fields.setdefault("traceback", _outcomes.format_traceback(error))
        self._forward("record_error", msg, portable, **fields)

    def record_extra(self, data: Any) -> None:
        """Forward anything else."""
        self._forward("record_extra", data)

    def record_final_report(self, final_report: Any) -> None:
        """Forward a report."""
        self._forward("record_final_report", final_report)

    def evalboard_url(self, view: str) -> str | None:
        """What the driver's recorder says."""
        return self._urls.get(view)

    def _forward(self, method: str, *values: Any, **fields: Any) -> None:
        scope = self.current_rollout()
        place = (scope.sample_id, scope.group_id, scope.extra) if scope else ("", "", {})
        event = (time.time(), *place, method, values, fields)
        try:
            blob = _codec.dumps(event, "an event")
        except _codec.NotPicklableError:
            import json

            plain = json.loads(encode_line({"place": place, "values": values, "fields": fields}))
            event = (event[0], *plain["place"], method, plain["values"], plain["fields"])
            blob = _codec.dumps(event, "an event")
        with self._lock:
            self._events.append(blob)
