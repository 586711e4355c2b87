"""Carries out a run's rollouts in worker processes that claim from the same database.

The processes are started afresh, not forked, and run `_worker_process`. Each holds one end of a
socket pair: orders go one way, answers the other, and its end-of-file tells either side that the
other is gone.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from nanoeval import _codec
from nanoeval._run_set import RunSet
from nanoeval._store import Progress
from nanoeval._worker import Job, first_errors
from nanoeval.library_config import get_library_config
from nanoeval.setup import say, shared_resource

FIRST_POLL = 0.01
LONGEST_POLL = 0.2
# A process that cannot even start serving is not replaced for ever; one that is killed from outside
# (memory runs short) gets more chances than one that ends by itself.
MAX_FAILED_STARTS = 3
MAX_KILLED_STARTS = 30

LENGTH = struct.Struct("!Q")


# The answer of a process that gave none.
_DIED = object()


class WorkerProcessError(RuntimeError):
    """Worker processes end before they have begun to serve."""


async def execute(run_set: RunSet, job: Job, on_progress: Callable[[Progress], None]) -> None:
    """Run all rollouts of `job` in worker processes; `on_progress` is called as they finish."""
    num_processes = job.runner.num_processes or len(os.sched_getaffinity(0))
    try:
        _codec.dumps(job.recorder, "the recorder")
    except _codec.NotPicklableError as error:
        raise _codec.NotPicklableError(
            f"{type(job.recorder).__name__} cannot be sent to worker processes: {error}"
        ) from error
    pool = WorkerPool(num_processes)
    async with shared_resource(("worker pool", num_processes), pool) as pool:
        order = Order(str(run_set.store.path), job.eval_id, num_processes)
        serving = asyncio.ensure_future(pool.serve(order, run_set))
        try:
            poll = FIRST_POLL
            shown: Progress | None = None
            while not serving.done():
                await asyncio.wait([serving], timeout=poll)
                progress = await run_set.store.progress(job.eval_id)
                poll = FIRST_POLL if progress != shown else min(2 * poll, LONGEST_POLL)
                shown = progress
                on_progress(progress)
            await serving
        finally:
            serving.cancel()
            await asyncio.wait([serving])


@dataclass(frozen=True)
class Order:
    """What a worker process is to serve."""

    path: str
    eval_id: int
    num_sharers: int


@dataclass
class _WorkerProcess:
    """The parent's end of one worker process."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    # The run sets it has joined: path -> executor id.
    executor_ids: dict[str, int] = field(default_factory=dict)
    answers: dict[int, asyncio.Future[Any]] = field(default_factory=dict)

    def send(self, message: Any) -> None:
        blob = pickle.dumps(message, _codec.PROTOCOL)
        self.writer.write(LENGTH.pack(len(blob)) + blob)

    async def listen(self) -> None:
        """Take in answers until the process closes its end, by exiting or by dying."""
        try:
            while True:
                (length,) = LENGTH.unpack(await self.reader.readexactly(LENGTH.size))
                kind, *rest = pickle.loads(await self.reader.readexactly(length))
                if kind == "joined":
                    path, executor_id = rest
                    self.executor_ids[path] = executor_id
                else:
                    number, errors = rest
                    if (answer := self.answers.get(number)) and not answer.done():
                        answer.set_result(errors)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.writer.close()
            await self.process.wait()
        for answer in self.answers.values():
            if not answer.done():
                answer.set_result(_DIED)


class WorkerPool:
    """A fixed number of worker processes; an async context manager that ends them."""

    def __init__(self, num_processes: int) -> None:
        self._num_processes = num_processes
        self._slots: list[asyncio.Task[_WorkerProcess]] = []
        self._listeners: set[asyncio.Task[None]] = set()
        self._next_number = 0

    async def __aenter__(self) -> Self:
        # Started side by side; an order waits for its own process only.
        self._slots = [asyncio.create_task(self._start()) for _ in range(self._num_processes)]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        started = await asyncio.gather(*self._slots, return_exceptions=True)
        workers = [worker for worker in started if isinstance(worker, _WorkerProcess)]
        for worker in workers:
            worker.writer.close()
        for worker in workers:
            try:
                async with asyncio.timeout(5):
                    await worker.process.wait()
            except TimeoutError:
                worker.process.kill()
                await worker.process.wait()
        await asyncio.gather(*self._listeners)

    async def serve(self, order: Order, run_set: RunSet) -> None:
        """Have every process serve `order`; returns when the eval is done.

        A process that dies is replaced and its claims go back. Raises what `Worker.serve` raised
        in any of them, after all have stopped.
        """
        serving = {
            asyncio.create_task(self._serve_in(slot, order, run_set))
            for slot in range(self._num_processes)
        }
        await first_errors(serving)

    async def _serve_in(self, slot: int, order: Order, run_set: RunSet) -> list[BaseException]:
        """Serve `order` in one slot, whatever dies there; returns what `Worker.serve` raised."""
        n_failed = n_killed = 0
        while True:
            worker = await asyncio.shield(self._slots[slot])
            errors = await self._answer(worker, order)
            if errors is not _DIED:
                return _codec.loads(errors) if errors else []
            status = worker.process.returncode or 0
            if order.path in worker.executor_ids:
                n_failed = n_killed = 0
            elif status < 0:
                n_killed += 1
            else:
                n_failed += 1
            await self._replace(slot, worker, order, run_set)
            if n_failed == MAX_FAILED_STARTS or n_killed == MAX_KILLED_STARTS:
                raise WorkerProcessError(
                    f"{n_failed + n_killed} worker processes in a row ended (last exit status"
                    f" {status}) before they began to serve; see their messages above"
                )

    async def _answer(self, worker: _WorkerProcess, order: Order) -> Any:
        """Have one process serve `order`: its pickled errors, None, or _DIED.

        When the caller is cancelled, the process is told to stop and its last word awaited.
        """
        number = self._next_number = self._next_number + 1
        answer = worker.answers[number] = asyncio.get_running_loop().create_future()
        try:
            if worker.process.returncode is not None:
                return _DIED
            worker.send(("serve", number, order))
            try:
                return await asyncio.shield(answer)
            except asyncio.CancelledError:
                if worker.process.returncode is None:
                    worker.send(("stop", number))
                    await asyncio.wait([answer])
                raise
        finally:
            del worker.answers[number]

    async def _replace(
        self, slot: int, dead: _WorkerProcess, order: Order, run_set: RunSet
    ) -> None:
        status = dead.process.returncode
        executor_id = dead.executor_ids.get(order.path)
        num_requeued = 0
        if executor_id is not None:
            num_requeued = await run_set.store.end_executor(executor_id, "process died", losses=1)
        if self._slots[slot].result() is not dead:
            return  # replaced already, by another run that it served
        cause = f"was killed by signal {-status}" if status and status < 0 else f"ended ({status})"
        say(
            f"nanoeval: worker process {dead.process.pid} {cause}; {num_requeued} of its rollouts"
            " go back to the queue, another process takes over"
        )
        self._slots[slot] = asyncio.create_task(self._start())

    async def _start(self) -> _WorkerProcess:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "nanoeval._executors._worker_process",
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # Ctrl-C at the terminal is for the parent, which stops its workers in order.
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        worker = _WorkerProcess(process, reader, writer)
        worker.send(("configure", sys.path, _codec.dumps(get_library_config(), "library_config")))
        listener = asyncio.create_task(worker.listen())
        self._listeners.add(listener)
        listener.add_done_callback(self._listeners.discard)
        return worker
