"""A run set as one process takes part in it: the open store, an executor id, its heartbeat.

Knows nothing of evals.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from nanoeval._database_file import BackupSource
from nanoeval._diagnostics import diagnosing
from nanoeval._heartbeat import Heartbeat
from nanoeval._process_identity import ProcessIdentity
from nanoeval._store import Store
from nanoeval._worker import Worker
from nanoeval.fs_paths import ENV_DATABASE_DIR, database_dir, database_dirs, default_root_dir
from nanoeval.library_config import get_library_config
from nanoeval.setup import say

ENV_LEASE_SECONDS = "NANOEVAL_LEASE_SECONDS"
DEFAULT_LEASE = 15.0


@dataclass
class RunSet:
    """One process's part in a run set; drivers have a `backup_source`."""

    run_set_id: str
    store: Store
    executor_id: int
    backup_source: BackupSource | None = None
    workers: list[Worker] = field(default_factory=list)
    backing_up: asyncio.Lock = field(default_factory=asyncio.Lock)

    def rollouts_in_flight(self) -> list[tuple[str, float]]:
        """(task name, start time) of the rollouts at work here, oldest first; from any thread."""
        at_work = (r for worker in self.workers.copy() for r in worker.rollouts_in_flight())
        return sorted(at_work, key=lambda rollout: rollout[1])

    @contextmanager
    def shows(self, worker: Worker) -> Iterator[None]:
        """Make a worker's rollouts visible to diagnosis while it serves."""
        self.workers.append(worker)
        try:
            yield
        finally:
            self.workers.remove(worker)


def database_path(run_set_id: str) -> Path:
    """Where the database of a run set lies, or is to lie."""
    name = f"{run_set_id}.db"
    found = (folder / name for folder in database_dirs() if (folder / name).exists())
    return next(found, database_dir() / name)


def backup_path(run_set_id: str) -> Path:
    """Where the copy of a run set's database lies that outlives a cleared /dev/shm."""
    root = get_library_config().writable_root_dir()
    # Some libraries' hooks name an object store, which holds no database.
    folder = default_root_dir() if "://" in root else Path(root)
    return folder / "backups" / f"{run_set_id}.db"


def resume_command(run_set_id: str) -> str:
    """What to type to go on with a run set."""
    return program_command("resume", run_set_id)


def program_command(program: str, run_set_id: str) -> str:
    """What to type, in any terminal, to call a program of nanoeval for a run set."""
    folder = os.environ.get(ENV_DATABASE_DIR)
    setting = f"{ENV_DATABASE_DIR}={shlex.quote(os.path.abspath(folder))} " if folder else ""
    return f"{setting}python -m nanoeval.bin.{program} run_set_id={shlex.quote(run_set_id)}"


def lease_seconds() -> float:
    """How long a claim holds without a sign of life from its executor."""
    text = os.environ.get(ENV_LEASE_SECONDS)
    if text is None:
        return DEFAULT_LEASE
    try:
        lease = float(text)
    except ValueError:
        lease = 0.0
    if lease <= 0:
        raise ValueError(f"{ENV_LEASE_SECONDS}={text!r} must be a number of seconds above 0")
    return lease


@asynccontextmanager
async def join_run_set(path: Path, role: str) -> AsyncIterator[RunSet]:
    """Open a run set's database and take part in it as `role`, "driver" or "worker".

    A driver creates the database where it is missing.
    """
    is_driver = role == "driver"
    async with Store(path, lease_seconds(), may_create=is_driver) as store:
        await store.create_run_set(path.stem, _command())
        executor_id = await store.add_executor(role)
        # What died before this process came is no sign of a rollout that kills its process.
        await store.reap(losses=0)
        # Workers end with their driver: what happens to them is its business.
        on_reaped = _tell_of_death if is_driver else None
        source = await asyncio.to_thread(BackupSource, path) if is_driver else None
        with (
            closing(source) if source else nullcontext(),
            Heartbeat(path, executor_id, store.lease, on_reaped),
        ):
            try:
                run_set = RunSet(path.stem, store, executor_id, source)
                with diagnosing(path, executor_id, run_set.rollouts_in_flight):
                    yield run_set
            finally:
                await store.end_executor(executor_id, "ended")


def _command() -> str:
    """How this process was started, without what nobody else may read."""
    return re.sub(r"((?:api_?key|token|secret|password)\s*=)[^\s,]+", r"\1***", " ".join(sys.argv))


def _tell_of_death(process: ProcessIdentity, num_requeued: int) -> None:
    say(
        f"nanoeval: process {process.pid} on {process.host} is gone;"
        f" {num_requeued} of its rollouts go back to the queue"
    )
