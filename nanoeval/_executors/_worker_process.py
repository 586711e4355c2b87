"""The main program of a worker process; see `processes`. Serves orders until it is told to end."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanoeval import _codec
from nanoeval._executors._answers import errors_to_tell
from nanoeval._executors.processes import LENGTH, Order
from nanoeval._run_set import RunSet, join_run_set
from nanoeval._store import StoredEval
from nanoeval._worker import Job, Worker, portable_errors
from nanoeval.library_config import set_library_config
from nanoeval.setup import (
    global_exit_stack,
    nanoeval_logging,
    raise_file_limit,
    shared_resource,
    tune_interpreter,
)

# How often a worker looks whether its parent lives, seconds.
PARENT_POLL = 0.5


class WorkerProcess:
    """Carries out the orders that come over the socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._orders: dict[int, asyncio.Task[None]] = {}
        self._was_stopped: set[int] = set()
        self._workers: dict[int, Worker] = {}
        self._messages: asyncio.Queue[Any] = asyncio.Queue()

    async def run(self) -> None:
        """Serve until the parent says that this is the end, then stop what is running."""
        threading.Thread(target=self._read_messages, daemon=True).start()
        async with asyncio.TaskGroup() as group:
            while (message := await self._messages.get()) != ("end",):
                kind, *rest = message
                if kind == "configure":
                    (library_config,) = rest
                    set_library_config(_codec.loads(library_config))
                    nanoeval_logging()
                elif kind == "serve":
                    number, order = rest
                    self._orders[number] = group.create_task(self._serve(number, order))
                    # A task that is cancelled before it has begun would never answer.
                    await asyncio.sleep(0)
                elif (order_task := self._orders.get(rest[0])) is not None:
                    self._was_stopped.add(rest[0])
                    self._answer("stopping", rest[0])
                    order_task.cancel()
            for order_task in self._orders.values():
                order_task.cancel()

    def _read_messages(self) -> None:
        """On a thread of its own, so that the parent's death is seen while a rollout blocks."""
        # A parent that dies with answers unread resets the connection.
        with suppress(OSError), self._connection.makefile("rb") as stream:
            while header := stream.read(LENGTH.size):
                message = pickle.loads(stream.read(*LENGTH.unpack(header)))
                if message[0] == "stop" and (worker := self._workers.get(message[1])) is not None:
                    worker.start_no_more()
                self._loop.call_soon_threadsafe(self._messages.put_nowait, message)
                if message == ("end",):
                    return
        _end_session()

    async def _serve(self, number: int, order: Order) -> None:
        errors: list[BaseException] = []
        try:
            path = Path(order.path)
            async with shared_resource(
                ("run set", path), join_run_set(path, role="worker")
            ) as run_set:
                self._answer("joined", order.path, run_set.executor_id)
                stored = await self._stored_eval(run_set, order.eval_id)
                job = _job(stored)
                worker = Worker(run_set.store, run_set.executor_id, job, order.num_sharers)
                self._workers[number] = worker
                with job.recorder, run_set.shows(worker):
                    await worker.serve()
        except BaseException as error:
            errors = errors_to_tell(error, number in self._was_stopped)
        finally:
            del self._orders[number]
            self._workers.pop(number, None)
            where = f"worker process {os.getpid()}"
            answer = portable_errors(errors, where) if errors else None
            self._answer("done", number, answer)

    async def _stored_eval(self, run_set: RunSet, eval_id: int) -> StoredEval:
        _codec.install_main_definitions(await run_set.store.definitions(eval_id))
        return next(e for e in await run_set.store.evals() if e.eval_id == eval_id)

    def _answer(self, *message: Any) -> None:
        blob = pickle.dumps(message, _codec.PROTOCOL)
        self._connection.sendall(LENGTH.pack(len(blob)) + blob)


def _job(stored: StoredEval) -> Job:
    spec = _codec.loads(stored.spec)
    assert stored.run_id is not None
    assert stored.recorder is not None
    return Job(stored.eval_id, stored.run_id, spec.eval, spec.runner, _codec.loads(stored.recorder))


async def _main(connection: socket.socket) -> None:
    async with global_exit_stack:
        await WorkerProcess(connection).run()


def _end_with(parent: int) -> None:
    """End when the parent has, even if a process that it forked keeps its end of the socket."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL)
    _end_session()


def _end_session() -> None:
    """The parent is gone and nobody wants an answer; what was committed is safe.

    The whole session goes, so that no process of a rollout outlives the run.
    """
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    """Serve the parent, whose process id is the second argument, over the socket of the first."""
    file, parent = map(int, sys.argv[1:])
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    raise_file_limit()
    tune_interpreter()
    _codec.empty_main()
    with socket.socket(fileno=file) as connection:
        os.set_inheritable(connection.fileno(), False)
        asyncio.run(_main(connection))
