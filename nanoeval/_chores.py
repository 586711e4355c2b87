"""What goes on beside the rollouts of a run: progress, partial summaries, backups."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from nanoeval import _codec
from nanoeval._database_file import StoreError
from nanoeval._jsonl import encode_line
from nanoeval._outcomes import noting
from nanoeval._progress import ProgressBar
from nanoeval._run_set import RunSet, backup_path, resume_command
from nanoeval._worker import Job
from nanoeval.asyncio_utils import uninterrupted
from nanoeval.eval import Eval, RolloutSystemError
from nanoeval.setup import say

# Decoding results for update_progress takes at most this share of the loop's time.
SHARE_FOR_PROGRESS = 0.05
SECONDS_PER_UPDATE = 1.0
SECONDS_TO_FIRST_BACKUP = 1.0
SECONDS_PER_BACKUP = 180.0


def chores_of(run_set: RunSet, job: Job, bar: ProgressBar) -> list[Any]:
    """What goes on beside the rollouts, where it is asked for."""
    chores: list[Any] = []
    if job.runner.should_backup:
        chores.append(_back_up_now_and_then(run_set))
    partial = _PartialResults(run_set, job.eval_id)
    if type(job.eval).update_progress is not Eval.update_progress:
        chores.append(_update_progress(job, partial, bar))
    if job.runner.summary_interval is not None:
        chores.append(_summarize_now_and_then(run_set, job, partial))
    return chores


@asynccontextmanager
async def background(*chores: Any) -> AsyncIterator[None]:
    """Run `chores` during the block; one that raises ends the block with an ExceptionGroup."""
    raised: Exception | None = None
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(chore) for chore in chores]
        try:
            yield
        except Exception as error:
            raised = error
        finally:
            for task in tasks:
                task.cancel()
    if raised is not None:
        raise raised


async def _back_up_now_and_then(run_set: RunSet) -> None:
    # Not at once: most runs that end before it would only make two copies instead of one.
    await asyncio.sleep(SECONDS_TO_FIRST_BACKUP)
    while True:
        await back_up(run_set)
        await asyncio.sleep(SECONDS_PER_BACKUP)


async def back_up(run_set: RunSet) -> None:
    """Copy the run set's database to where it outlives a reboot; trouble is told, not raised."""
    source = run_set.backup_source
    assert source is not None, "drivers make backups"
    try:
        target = backup_path(run_set.run_set_id)
        # One after the other, each to its end, so that an older copy never replaces a newer one.
        async with run_set.backing_up:
            await uninterrupted(asyncio.to_thread(source.back_up, target))
    except (OSError, sqlite3.Error, StoreError) as error:
        say(
            f"nanoeval: a backup of run set {run_set.run_set_id} failed ({error}); the run goes on,"
            " and the backup before, if there is one, stays as it is. Make room in its folder, or"
            " set NANOEVAL_ROOT_DIR to another one, or should_backup=False"
        )
        return
    if not await asyncio.to_thread(source.is_in_place):
        say(
            f"nanoeval: {source.path} was deleted or replaced while the run uses it. The run goes"
            f" on, and keeps its results in the backup {target} alone. When it has ended,"
            f" {resume_command(run_set.run_set_id)} goes on from that"
        )


class _PartialResults:
    """The results so far, read as they are committed, never twice."""

    def __init__(self, run_set: RunSet, eval_id: int) -> None:
        self._run_set, self._eval_id = run_set, eval_id
        self._seq = 0
        self._results: list[tuple[Any, Any]] = []
        self._reading = asyncio.Lock()

    async def read(self) -> list[tuple[Any, Any]]:
        """(task, result or error) of all that is done, in the order of commits."""
        async with self._reading:
            store = self._run_set.store
            seqs = await store.counted_since(self._eval_id, self._seq)
            async for batch in decoded(store.results(seqs)):
                self._results += batch
                self._seq = seqs[len(batch) - 1]
                seqs = seqs[len(batch) :]
        return self._results.copy()


async def _update_progress(job: Job, partial: _PartialResults, bar: ProgressBar) -> None:
    pause = SECONDS_PER_UPDATE
    while True:
        await asyncio.sleep(pause)
        began = time.monotonic()
        results = [(t, r) for t, r in await partial.read() if not isinstance(r, RolloutSystemError)]
        with noting(f"raised by {job.eval.get_name()}.update_progress()"):
            await job.eval.update_progress(results, bar.bar)
        pause = max(SECONDS_PER_UPDATE, (time.monotonic() - began) / SHARE_FOR_PROGRESS)


async def _summarize_now_and_then(run_set: RunSet, job: Job, partial: _PartialResults) -> None:
    interval = job.runner.summary_interval
    assert interval is not None
    while True:
        await asyncio.sleep(interval)
        results = await partial.read()
        if not results:
            continue
        with noting(f"raised by {job.eval.get_name()}.get_full_summary() on partial results"):
            summary = await job.eval.get_full_summary(results)
        await run_set.store.set_partial_summary(job.eval_id, to_json(summary))
        say(f"{job.eval.get_name()}, {len(results)} results so far: {to_json(summary)}")


async def decoded(
    batches: AsyncIterator[list[tuple[bytes, bytes]]],
) -> AsyncIterator[list[tuple[Any, Any]]]:
    """(task, result or error) of what `Store.results` reads."""
    async for batch in batches:
        yield [_decoded(task, result) for task, result in batch]


def _decoded(task_blob: bytes, result_blob: bytes) -> tuple[Any, Any]:
    task = _codec.loads(task_blob)
    try:
        return task, _codec.loads(result_blob)
    except _codec.DamagedPickleError:
        raise
    except Exception as error:  # a constructor's, for instance, that wants more arguments
        raise TypeError(
            f"the result of task {task.name!r} was pickled, but cannot be unpickled"
            f" ({type(error).__name__}: {error}). Mend its class so that it can, and resume the run"
            " set; plain data always can"
        ) from error


def to_json(summary: dict[str, Any]) -> str:
    """A summary as it is kept in the database, whatever it holds."""
    return encode_line(summary).decode().rstrip()
