"""Changes how many rollouts of a run set may be in flight, while it runs. Resume keeps the change.

    python -m nanoeval.bin.concurrency run_set_id=ID set=N [name=EVAL]

  run_set_id  which run set; `python -m nanoeval.bin.ls` lists them
  set         the new limit, for each eval over all its processes; None lifts it
  name        change this eval alone, not all that are unfinished

A higher limit holds at once. A lower one lets the rollouts in flight end and starts no more until
fewer than N are left.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from nanoeval._inspect import EvalRow, RunSetRow, find_run_set, look_at, nearest_ids
from nanoeval._run_set import lease_seconds
from nanoeval._store import Store
from nanoeval.bin._command import CommandError, run_command
from nanoeval.eval import ENV_ALLOW_ZERO_CONCURRENCY


def main(run_set_id: str, set: int | None, name: str | None = None) -> None:
    """Change the limit of a run set's evals; see the module's docstring."""
    _check_limit(set)
    row = look_at(find_run_set(run_set_id))
    if row.problem is not None:
        raise CommandError(row.problem)
    if row.file.is_backup:
        raise CommandError(
            f"of run set {run_set_id} only the backup is left; resume it first:"
            f" {row.resume_command}"
        )
    evals = _chosen(row, name)
    asyncio.run(_set_concurrency(row.file.path, evals, set))
    for e in evals:
        print(f"{e.name}: {_limit(e.concurrency)} → {_limit(set)} rollouts in flight")
    if not row.is_live:
        print(f"Nobody works on it now; the limit holds from the next {row.resume_command}")


def _check_limit(limit: int | None) -> None:
    if limit is None or limit > 0:
        return
    if limit == 0 and os.environ.get(ENV_ALLOW_ZERO_CONCURRENCY):
        return
    raise CommandError(
        f"set={limit} must be at least 1, or None for no limit"
        f" (0, which pauses, is allowed with {ENV_ALLOW_ZERO_CONCURRENCY}=1)"
    )


def _chosen(row: RunSetRow, name: str | None) -> list[EvalRow]:
    unfinished = [e for e in row.evals if e.state != "finished"]
    if not unfinished:
        raise CommandError(f"run set {row.run_set_id} has no unfinished eval to limit")
    if name is None:
        return unfinished
    chosen = [e for e in unfinished if e.name == name]
    if not chosen:
        names = list(dict.fromkeys(e.name for e in unfinished))
        shown = nearest_ids(name, names) or names[:5]
        raise CommandError(
            f"run set {row.run_set_id} has no unfinished eval {name!r}; it has {', '.join(shown)}"
        )
    return chosen


async def _set_concurrency(path: Path, evals: Sequence[EvalRow], limit: int | None) -> None:
    async with Store(path, lease_seconds()) as store:
        for e in evals:
            await store.set_concurrency(e.eval_id, limit)


def _limit(concurrency: int | None) -> str:
    return "unlimited" if concurrency is None else str(concurrency)


if __name__ == "__main__":
    run_command(main, __doc__)
