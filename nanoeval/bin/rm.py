"""Deletes run sets with their backups and containers. Asks first, and never deletes one that runs.

    python -m nanoeval.bin.rm run_set_id=ID
    python -m nanoeval.bin.rm older_than=7d [unfinished=True]

  run_set_id  delete this run set, whatever its state; `python -m nanoeval.bin.ls` lists them
  older_than  delete all run sets that finished longer ago: a number with s, m, h, d or w
  unfinished  with older_than: also those that did not finish or cannot be read, by the time of
              their last change; they can then no longer be resumed
  yes         do not ask

The records, JSON lines, are kept. The exit status is 1 if nothing was deleted for want of a yes.
"""

from __future__ import annotations

import asyncio
import importlib.util
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nanoeval._database_file import SIDE_FILES, partial_copies
from nanoeval._inspect import RunSetRow, find_run_set, list_run_sets, look_at
from nanoeval._run_set import backup_path
from nanoeval.bin._command import CommandError, run_command
from nanoeval.bin.ls import size, table
from nanoeval.fs_paths import check_private

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
WIDTH = 100


def main(
    run_set_id: str | None = None,
    older_than: str | None = None,
    unfinished: bool = False,
    yes: bool = False,
) -> None:
    """Delete run sets; see the module's docstring."""
    if (run_set_id is None) == (older_than is None):
        raise CommandError("say which: run_set_id=ID, or older_than=7d; see --help")
    if older_than is not None:
        rows = _older_than(seconds(older_than), unfinished)
        if not rows:
            kind = "run set" if unfinished else "finished run set"
            print(f"No {kind} is older than {older_than}.")
            return
    else:
        assert run_set_id is not None
        rows = [look_at(find_run_set(run_set_id))]
        if reason := why_in_use(rows[0]):
            raise CommandError(f"run set {run_set_id} is not deleted: {reason}")
    print(table(rows, WIDTH, max_evals=3))
    if not yes and not _confirmed(rows):
        raise CommandError("nothing was deleted; yes=True deletes without asking")
    deleted = [row.run_set_id for row in rows if delete(row)]
    asyncio.run(remove_containers(deleted))


def seconds(duration: str) -> float:
    """The length of a duration such as 90s, 12h, 7d. Raises CommandError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", duration.strip())
    if match is None:
        raise CommandError(
            f"older_than={duration} is no duration; give a number with s, m, h, d or w, such as 7d"
        )
    number, unit = match.groups()
    return float(number) * SECONDS[unit]


def why_in_use(row: RunSetRow) -> str | None:
    """Why a run set must not be deleted, as a clause; None if it may be."""
    for x in row.executors:
        process = f"process {x.pid} on {x.host}"
        if x.standing == "live":
            return f"{process} works on it; end that first"
        if x.standing == "silent" and x.is_on_this_host:
            return f"{process} still exists, though it gives no sign of life; end that first"
    return None


def delete(row: RunSetRow) -> bool:
    """Delete a run set's files, unless somebody has taken it up since it was looked at."""
    if reason := why_in_use(look_at(row.file)):
        print(f"{row.run_set_id} is kept: {reason}")
        return False
    places = dict.fromkeys([row.file.path, row.file.backup])
    for path in filter(None, places):
        check_private(path)
        # The write-ahead log goes first: left alone, it would be taken for that of a new database.
        for victim in (*(Path(f"{path}{suffix}") for suffix in SIDE_FILES), path):
            victim.unlink(missing_ok=True)
    for left_behind in partial_copies(backup_path(row.run_set_id)):
        left_behind.unlink(missing_ok=True)
    print(f"Deleted {row.run_set_id} ({size(row.size_bytes)})")
    return True


async def remove_containers(run_set_ids: Sequence[str]) -> None:
    """Remove the Docker containers that killed processes of these run sets left, if there are any.

    Where nothing can run containers there are none, and nothing is said.
    """
    if importlib.util.find_spec("aiodocker") is None:
        return
    from nanoeval.solvers.computer_tasks.runtimes.docker import (
        DockerError,
        EngineUnavailableError,
        remove_leftovers,
    )

    for run_set_id in run_set_ids:
        try:
            num_removed = await remove_leftovers(run_set_id)
        except EngineUnavailableError:
            return
        except DockerError as error:
            print(f"Containers of {run_set_id} may still be there: {error}", file=sys.stderr)
        else:
            if num_removed:
                plural = "s" if num_removed > 1 else ""
                print(f"Removed {num_removed} container{plural} of {run_set_id}")


def _older_than(age: float, unfinished: bool) -> list[RunSetRow]:
    limit = time.time() - age
    chosen = []
    for row in list_run_sets():
        is_finished = row.state == "finished"
        ended_at = (row.finished_at if is_finished else None) or row.changed_at
        is_wanted = (is_finished or unfinished) and ended_at < limit
        if is_wanted and why_in_use(row) is None and _is_own(row.file.path):
            chosen.append(row)
    return chosen


def _is_own(path: Path) -> bool:
    try:
        check_private(path)
    except OSError:
        return False
    return True


def _confirmed(rows: Sequence[RunSetRow]) -> bool:
    total = size(sum(row.size_bytes for row in rows))
    what = f"these {len(rows)} run sets" if len(rows) > 1 else "this run set"
    lost = sum(row.can_be_resumed for row in rows)
    warning = f" {lost} of them could still be resumed." if lost else ""
    try:
        answer = input(f"\nDelete {what}, {total}, for good?{warning} [y/N] ")
    except EOFError:
        print()
        return False
    return answer.strip().lower() in ("y", "yes")


if __name__ == "__main__":
    run_command(main, __doc__)
