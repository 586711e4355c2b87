"""Lists the run sets on this machine, newest first, with their evals and how far they are.

    python -m nanoeval.bin.ls [run_set_id=ID] [limit=N] [json=True]

  run_set_id  show this one alone, with all its evals and where its files lie
  limit       show the newest N only
  json        print a JSON array, one object per run set, for programs

States: running (a process works on it), finished, failed (an exception ended it), interrupted
(Ctrl-C), crashed (its process died), empty (no eval yet), unreadable (with the reason below the
table). Failed, interrupted and crashed run sets can be resumed. SIZE includes the write-ahead log,
SCORE is the mean score so far.
"""

from __future__ import annotations

import dataclasses
import json as json_format
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from typing import Any

from nanoeval._inspect import EvalRow, RunSetRow, find_run_set, list_run_sets, look_at
from nanoeval.bin._command import CommandError, run_command
from nanoeval.fs_paths import database_dir

HEADINGS = ("RUN SET", "AGE", "SIZE", "STATE", "EVAL", "MODEL", "DONE", "FAILED", "SCORE")
RIGHT_ALIGNED = {"AGE", "SIZE", "DONE", "FAILED", "SCORE"}
# The columns that give way when the table is too wide, and what is left of them.
SHORTEST = {"MODEL": 8, "EVAL": 12}
EVALS_PER_RUN_SET = 6
WIDTH_OF_FILES = 100

Line = Sequence[str]


def main(run_set_id: str | None = None, limit: int | None = None, json: bool = False) -> None:
    """List run sets; see the module's docstring."""
    if limit is not None and limit < 1:
        raise CommandError(f"limit={limit} must be at least 1")
    rows = list_run_sets() if run_set_id is None else [look_at(find_run_set(run_set_id))]
    rows = rows[:limit]
    if json:
        print(json_format.dumps([as_dict(row) for row in rows], indent=2))
    elif not rows:
        print(f"No run sets in {database_dir()}")
    else:
        width = shutil.get_terminal_size((WIDTH_OF_FILES, 24)).columns
        print(table(rows, width, max_evals=EVALS_PER_RUN_SET if run_set_id is None else None))
        if run_set_id is not None:
            print(details(rows[0]))
        print_notes(rows, width)


def table(rows: Sequence[RunSetRow], width: int, max_evals: int | None = None) -> str:
    """An aligned table, a line per eval, at most `width` wide where that can be.

    Ids are never cut, so that they can be copied. Columns that are empty in all lines are left out.
    """
    lines: list[Line] = [HEADINGS]
    for row in rows:
        lines += _lines(row, max_evals)
    columns = [list(column) for column in zip(*lines, strict=True)]
    columns = [column for column in columns if any(column[1:])]
    widths = {column[0]: max(map(len, column)) for column in columns}
    for heading, shortest in SHORTEST.items():
        too_much = sum(widths.values()) + 2 * (len(widths) - 1) - width
        if too_much > 0 and heading in widths:
            widths[heading] = min(widths[heading], max(shortest, widths[heading] - too_much))
    for column in columns:
        column[:] = [_fitted(cell, widths[column[0]], column[0]) for cell in column]
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def details(row: RunSetRow) -> str:
    """Where a run set's files lie and how it was started."""
    facts = {
        "database": f"{row.file.path}{' (a backup)' if row.file.is_backup else ''}",
        "backup": row.file.backup,
        "records": ", ".join(dict.fromkeys(e.records for e in row.evals if e.records)),
        "started as": row.command,
        "on": row.host,
        "with": f"nanoeval {row.nanoeval_version}" if row.nanoeval_version else "",
        "process": ", ".join(f"{x.pid} ({x.role}, {x.standing})" for x in row.executors),
    }
    return "\n" + "\n".join(f"{name:<11} {fact}" for name, fact in facts.items() if fact)


def print_notes(rows: Iterable[RunSetRow], width: int) -> None:
    """Say, below the table, what is wrong with files and how to go on with what has stopped."""
    for row in rows:
        if row.problem is not None:
            rest = f" (backup: {row.file.backup})" if row.file.backup else ""
            note = f"{row.run_set_id}: {row.problem}{rest}"
            print(textwrap.fill(note, width, break_long_words=False), file=sys.stderr)
    resumable = [row for row in rows if row.can_be_resumed]
    if resumable:
        print(f"\nTo go on: {resumable[0].resume_command}")


def as_dict(row: RunSetRow) -> dict[str, Any]:
    """One run set for programs. Times are seconds since the epoch."""
    return {
        "run_set_id": row.run_set_id,
        "state": row.state,
        "is_live": row.is_live,
        "can_be_resumed": row.can_be_resumed,
        "problem": row.problem,
        "database": str(row.file.path),
        "is_backup": row.file.is_backup,
        "backup": None if row.file.backup is None else str(row.file.backup),
        "size_bytes": row.size_bytes,
        "created_at": row.created_at,
        "changed_at": row.changed_at,
        "host": row.host,
        "command": row.command,
        "nanoeval_version": row.nanoeval_version,
        "evals": [
            dataclasses.asdict(e)
            | {"state": row.state_of(e), "num_done": e.num_done, "score_mean": e.score_mean}
            for e in row.evals
        ],
        "processes": [
            {"pid": x.pid, "role": x.role, "host": x.host, "standing": x.standing}
            for x in row.executors
        ],
    }


def age(seconds: float) -> str:
    """A duration in its largest unit: 12s, 5m, 3h, 2d."""
    seconds = max(0.0, seconds)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s"


def size(num_bytes: int) -> str:
    """A size in its largest unit of 1024: 12K, 3.4M, 1.2G."""
    for unit, length in (("G", 1 << 30), ("M", 1 << 20)):
        if num_bytes >= length:
            return f"{num_bytes / length:.1f}{unit}"
    return f"{-(-num_bytes // 1024)}K"


def _lines(row: RunSetRow, max_evals: int | None) -> list[Line]:
    shown = row.evals[:max_evals]
    lines = [_eval_cells(row, e) for e in shown]
    if hidden := row.evals[len(shown) :]:
        lines.append(_rest_cells(hidden))
    if not lines:
        lines = [(row.state, "", "", "", "", "")]
    about = (row.run_set_id, age(time.time() - row.created_at), size(row.size_bytes))
    if row.file.is_backup:
        about = (f"{row.run_set_id} (backup)", *about[1:])
    return [(*(about if index == 0 else ("", "", "")), *cells) for index, cells in enumerate(lines)]


def _eval_cells(row: RunSetRow, e: EvalRow) -> Line:
    return (
        row.state_of(e),
        e.name,
        e.model_name,
        f"{e.num_done}/{e.num_tasks}",
        str(e.num_failed) if e.num_failed else "",
        "" if e.score_mean is None else f"{e.score_mean:.3f}",
    )


def _rest_cells(hidden: Sequence[EvalRow]) -> Line:
    done, total = sum(e.num_done for e in hidden), sum(e.num_tasks for e in hidden)
    failed = sum(e.num_failed for e in hidden)
    more = f"and {len(hidden)} more"
    return ("", more, "", f"{done}/{total}", str(failed) if failed else "", "")


def _fitted(cell: str, width: int, heading: str) -> str:
    if len(cell) > width:
        cell = cell[: width - 1] + "…"
    return cell.rjust(width) if heading in RIGHT_ALIGNED else cell.ljust(width)


if __name__ == "__main__":
    run_command(main, __doc__)
