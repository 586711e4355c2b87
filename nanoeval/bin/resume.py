"""Goes on with a run set that was interrupted.

    python -m nanoeval.bin.resume run_set_id=ID [resume_completed_evals=True]

Lists what it found, then runs what is left. Tasks that were done stay as they are; what was at work
when the run ended is run again. Where the working file is gone (a reboot clears /dev/shm), the last
backup is used. With resume_completed_evals=True the summaries of finished evals are computed anew
from the stored results.
"""

from __future__ import annotations

import asyncio
from itertools import groupby
from typing import Any

from nanoeval import _codec
from nanoeval._database_file import check_database
from nanoeval._run_set import RunSet, database_path
from nanoeval._store import StoredEval
from nanoeval.bin._command import StillRunningError, run_command
from nanoeval.bin._restore import restore_if_gone
from nanoeval.evaluation import joined, resume_eval
from nanoeval.setup import global_exit_stack, nanoeval_entrypoint, say


async def resume(run_set_id: str, resume_completed_evals: bool = False) -> list[dict[str, Any]]:
    """Go on with all unfinished evals of a run set; returns their summaries.

    `resume_completed_evals` also computes the summaries of finished evals anew. Uses the backup
    where the working file is gone. Raises UnknownRunSetError if there is no such run set,
    StillRunningError if it is running, StoreError if its database is damaged, NewerSchemaError if a
    later version wrote it, PermissionError if it belongs to someone else, MissingCodeError if the
    code of an eval cannot be imported.
    """
    path = database_path(run_set_id)
    await asyncio.to_thread(restore_if_gone, run_set_id, path)
    await asyncio.to_thread(check_database, path)
    async with global_exit_stack, joined(run_set_id) as run_set:
        await _refuse_running(run_set)
        evals = await run_set.store.evals()
        for stored in evals:
            say(_describe(stored))
        chosen = [e for e in evals if e.state != "finished" or resume_completed_evals]
        if not chosen:
            say("Nothing is left to do. resume_completed_evals=True computes the summaries anew.")
        return await _resume_all(run_set, chosen)


async def _resume_all(run_set: RunSet, evals: list[StoredEval]) -> list[dict[str, Any]]:
    """Go on with evals side by side, but one after the other where an edited script queued them:
    this process can have one definition of a name at a time."""
    definitions = {e.eval_id: await run_set.store.definitions(e.eval_id) for e in evals}
    summaries: list[dict[str, Any]] = []
    for _, alike in groupby(evals, key=lambda e: definitions[e.eval_id]):
        summaries += await asyncio.gather(*(resume_eval(run_set, stored) for stored in alike))
    return summaries


async def _refuse_running(run_set: RunSet) -> None:
    """Raise StillRunningError if another driver is at work."""
    for executor_id, role, process in await run_set.store.live_executors():
        if role == "driver" and executor_id != run_set.executor_id:
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
    _codec.empty_main()
    run_command(main, __doc__)
