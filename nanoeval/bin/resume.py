"""Goes on with a run set that was interrupted.

    python -m nanoeval.bin.resume run_set_id=ID [resume_completed_evals=True]

Lists what it found, then runs what is left. Tasks that were done stay as they are; what was at work
when the run ended is run again. Where the working file is gone (a reboot clears /dev/shm), the last
backup is used. With resume_completed_evals=True the summaries of finished evals are computed anew
from the stored results.
"""

from __future__ import annotations

import asyncio
import shutil
from typing import Any

from nanoeval._database_file import check_database
from nanoeval._inspect import find_run_set
from nanoeval._run_set import RunSet, backup_path, database_path
from nanoeval._store import StoredEval
from nanoeval.bin._command import CommandError, run_command
from nanoeval.evaluation import joined, resume_eval
from nanoeval.setup import global_exit_stack, nanoeval_entrypoint, say


class StillRunningError(CommandError):
    """A run set is at work in another process."""


async def resume(run_set_id: str, resume_completed_evals: bool = False) -> list[dict[str, Any]]:
    """Go on with all unfinished evals of a run set; returns their summaries.

    `resume_completed_evals` also computes the summaries of finished evals anew. Uses the backup
    where the working file is gone. Raises UnknownRunSetError if there is no such run set,
    StillRunningError if it is running, StoreError if its database is damaged, NewerSchemaError if a
    later version wrote it, PermissionError if it belongs to someone else.
    """
    path, copy = database_path(run_set_id), backup_path(run_set_id)
    if not path.exists() and not copy.exists():
        find_run_set(run_set_id)  # raises, and names the nearest ids
    is_restored = not path.exists()
    if is_restored:
        await asyncio.to_thread(check_database, copy)
        await asyncio.to_thread(shutil.copy2, copy, path)
        say(f"The working file is gone; going on from its backup {copy}.")
    await asyncio.to_thread(check_database, path)
    async with global_exit_stack, joined(run_set_id) as run_set:
        await _refuse_running(run_set, is_restored)
        evals = await run_set.store.evals()
        for stored in evals:
            say(_describe(stored))
        chosen = [e for e in evals if e.state != "finished" or resume_completed_evals]
        if not chosen:
            say("Nothing is left to do. resume_completed_evals=True computes the summaries anew.")
        return list(await asyncio.gather(*(resume_eval(run_set, stored) for stored in chosen)))


async def _refuse_running(run_set: RunSet, is_restored: bool) -> None:
    """Raise RunSetError if another driver is at work; in a backup, those that were are history."""
    for executor_id, role, process in await run_set.store.live_executors():
        if executor_id == run_set.executor_id:
            continue
        if is_restored:
            await run_set.store.end_executor(executor_id, "was at work when the backup was made")
        elif role == "driver":
            raise StillRunningError(
                f"run set {run_set.run_set_id} is still running, as process {process.pid} on"
                f" {process.host}; end that process first"
            )


def _describe(stored: StoredEval) -> str:
    done = stored.num_scored + stored.num_failed
    errors = f", {stored.num_failed} failed" if stored.num_failed else ""
    if stored.run_id is None:
        return f"{stored.name}: was still being queued; starts from the beginning"
    return f"{stored.name}: {done}/{stored.num_tasks} done{errors}, {stored.state}"


def main(run_set_id: str, resume_completed_evals: bool = False) -> None:
    """Go on with a run set."""
    nanoeval_entrypoint(resume(run_set_id, resume_completed_evals))


if __name__ == "__main__":
    run_command(main, __doc__)
