"""Carries out a run's rollouts in worker processes that claim from the same database.

The processes are started afresh, not forked, and run `_worker_process`. Each holds one end of a
socket pair: orders go one way, answers the other. Either side sees the other's death, by
end-of-file and, where a process that it forked still holds its end, by the process itself.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

from nanoeval import _codec
from nanoeval._executors._answers import STOP_WITHIN
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

# A worker that serves nothing any more and takes longer to exit, in seconds, is killed.
EXIT_WITHIN = 2.0

LENGTH = struct.Struct("!Q")

# The path for imports is no variable of the environment, which programs that rollouts start would
# inherit; and `__main__` stays free for the definitions of the driver's.
PROGRAM = """
import sys
sys.path[:] = sys.argv.pop().split("\\n")
import nanoeval._executors._worker_process
nanoeval._executors._worker_process.main()
"""

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
        is_over = asyncio.Event()
        serving = asyncio.ensure_future(pool.serve(order, run_set, is_over))
        try:
            poll = FIRST_POLL
            shown: Progress | None = None
            while not serving.done():
                await asyncio.wait([serving], timeout=poll)
                progress = await run_set.store.progress(job.eval_id)
                poll = FIRST_POLL if progress != shown else min(2 * poll, LONGEST_POLL)
                shown = progress
                on_progress(progress)
                if progress.is_done or progress.state != "running":
                    is_over.set()
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
    connection: socket.socket
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    # The run sets it has joined: path -> executor id.
    executor_ids: dict[str, int] = field(default_factory=dict)
    answers: dict[int, asyncio.Future[Any]] = field(default_factory=dict)
    # The orders that its event loop has seen the stop of.
    stopping: set[int] = field(default_factory=set)

    def send(self, message: Any) -> None:
        blob = pickle.dumps(message, _codec.PROTOCOL)
        self.writer.write(LENGTH.pack(len(blob)) + blob)

    async def listen(self) -> None:
        """Take in answers until the process has exited or is killed, then end its session."""
        exiting = asyncio.create_task(self._hang_up_at_exit())
        try:
            while True:
                (length,) = LENGTH.unpack(await self.reader.readexactly(LENGTH.size))
                kind, *rest = pickle.loads(await self.reader.readexactly(length))
                if kind == "joined":
                    path, executor_id = rest
                    self.executor_ids[path] = executor_id
                elif kind == "stopping":
                    self.stopping.add(*rest)
                else:
                    number, errors = rest
                    if (answer := self.answers.get(number)) and not answer.done():
                        answer.set_result(errors)
        except (asyncio.IncompleteReadError, ConnectionError):
            await self.exit()
        await exiting
        self.writer.close()
        for answer in self.answers.values():
            if not answer.done():
                answer.set_result(_DIED)

    async def _hang_up_at_exit(self) -> None:
        await self.process.wait()
        self.kill()
        # What the process itself has sent is still read. A process that left its session may hold
        # its end open, though.
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def kill(self) -> None:
        """Kill the process and what its rollouts have started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    async def exit(self) -> None:
        """Wait until the process, which has nothing more to do, is gone."""
        try:
            async with asyncio.timeout(EXIT_WITHIN):
                await self.process.wait()
        except TimeoutError:
            self.kill()
            await self.process.wait()


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
            worker.send(("end",))
        await asyncio.gather(*[worker.exit() for worker in workers])
        await asyncio.gather(*self._listeners)

    async def serve(self, order: Order, run_set: RunSet, is_over: asyncio.Event) -> None:
        """Have every process serve `order`; returns when the eval is done.

        A process that dies is replaced and its claims go back; one that hangs when `is_over` is set
        is killed. Raises what `Worker.serve` raised in any of them, after all have stopped.
        """
        serving = {
            asyncio.create_task(self._serve_in(slot, order, run_set, is_over))
            for slot in range(self._num_processes)
        }
        await first_errors(serving)

    async def _serve_in(
        self, slot: int, order: Order, run_set: RunSet, is_over: asyncio.Event
    ) -> list[BaseException]:
        """Serve `order` in one slot, whatever dies there; returns what `Worker.serve` raised."""
        n_failed = n_killed = 0
        while True:
            worker = await asyncio.shield(self._slots[slot])
            errors = await self._answer(worker, order, run_set, is_over)
            if errors is not _DIED:
                return _codec.loads(errors) if errors else []
            if is_over.is_set():
                return []
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

    async def _answer(
        self, worker: _WorkerProcess, order: Order, run_set: RunSet, is_over: asyncio.Event
    ) -> Any:
        """Have one process serve `order`: its pickled errors, None, or _DIED.

        When the caller is cancelled, the process is told to stop and its last word awaited.
        """
        number = self._next_number = self._next_number + 1
        answer = worker.answers[number] = asyncio.get_running_loop().create_future()
        over = asyncio.create_task(is_over.wait())
        try:
            if worker.process.returncode is not None:
                return _DIED
            worker.send(("serve", number, order))
            await asyncio.wait([answer, over], return_when=asyncio.FIRST_COMPLETED)
            await self._last_word(worker, number, order, run_set)
            return answer.result()
        except asyncio.CancelledError:
            if not answer.done():
                worker.send(("stop", number))
                await self._last_word(worker, number, order, run_set, stop_within=STOP_WITHIN)
            raise
        finally:
            over.cancel()
            del worker.answers[number]

    async def _last_word(
        self,
        worker: _WorkerProcess,
        number: int,
        order: Order,
        run_set: RunSet,
        stop_within: float = float("inf"),
    ) -> None:
        """Wait for the answer that is due, and kill a process that hangs.

        One that cleans up may take its time: its event loop has seen the stop, its lease lives.
        """
        store, answer = run_set.store, worker.answers[number]
        began = time.monotonic()
        while not answer.done():
            await asyncio.wait([answer], timeout=LONGEST_POLL)
            waited = time.monotonic() - began
            executor_id = worker.executor_ids.get(order.path)
            if executor_id is None:
                is_live = waited < store.lease
            else:
                is_live = executor_id in [id for id, _, _ in await store.live_executors()]
            does_react = waited < stop_within or number in worker.stopping
            if answer.done() or (is_live and does_react):
                continue
            worker.kill()
            await asyncio.wait([answer])
            num_requeued = 0
            if executor_id is not None:
                num_requeued = await store.end_executor(executor_id, "process hung")
            say(
                f"nanoeval: worker process {worker.process.pid} did not react and was killed;"
                f" {num_requeued} of its rollouts go back to the queue"
            )

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
                "-c",
                PROGRAM,
                str(theirs.fileno()),
                str(os.getpid()),
                "\n".join(map(str, sys.path)),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # Ctrl-C at the terminal is for the parent, which stops its workers in order.
                start_new_session=True,
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        worker = _WorkerProcess(process, ours, reader, writer)
        worker.send(("configure", _codec.dumps(get_library_config(), "library_config")))
        listener = asyncio.create_task(worker.listen())
        self._listeners.add(listener)
        listener.add_done_callback(self._listeners.discard)
        return worker
