"""Says in plain sentences what is wrong with a run, and what to do about it.

    python -m nanoeval.bin.doctor [run_set_id=ID]

  run_set_id  the run set to look at; without it, the one that changed last

It only reads, and may be called at any time, also from another terminal while the run goes on.
"""

from __future__ import annotations

import shutil
import sqlite3
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanoeval import _inspect, _inspect_run
from nanoeval._diagnostics import Stall
from nanoeval._inspect import EvalRow, ExecutorRow, RunSetRow
from nanoeval._inspect_run import InFlight
from nanoeval._run_set import program_command
from nanoeval.bin._command import CommandError, run_command
from nanoeval.monitor.events import LastEvents, moment_of
from nanoeval.monitor.history import History
from nanoeval.monitor.markup import ago, duration

# A rollout stands out from so many times the median on, and from so many seconds.
LONG_TIMES, LONG_SECONDS = 10, 10.0
# An executor's clock is off from so many seconds on; less is a slow disk or a slow machine.
SKEW = 5.0
NEARLY_FULL_SHARE, NEARLY_FULL_BYTES = 0.05, 256 * 1024**2
ERROR_SHARE = 0.2
SLOW_LISTING = 60.0
SLOW_PER_MINUTE = 6.0
WIDTH = 96


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong, in a sentence, and what to do."""

    problem: str
    remedy: str


def main(run_set_id: str | None = None) -> None:
    """Look at one run set; see the module's docstring."""
    if run_set_id is not None:
        file = _inspect.find_run_set(run_set_id)
    else:
        files = _inspect.run_set_files()
        if not files:
            raise CommandError("there are no run sets on this machine")
        file = max(files, key=lambda file: file.changed_at)
    row = _inspect.look_at(file)
    print(_headline(row))
    found = findings(row)
    for number, finding in enumerate(found, start=1):
        print()
        print(_wrapped(f"{number}. {finding.problem}", "   "))
        print(_wrapped(f"   {finding.remedy}", "   "))
    if not found and row.problem is None:
        print("Nothing is wrong, as far as can be seen from here.")


def findings(row: RunSetRow) -> list[Finding]:
    """All that is wrong with a run set, the worst first."""
    if row.problem is not None:
        return [Finding(f"{row.problem[:1].upper()}{row.problem[1:]}.", _way_back(row))]
    if row.state == "empty":
        return [Finding("It holds no eval: none was queued, or it was emptied.", _way_back(row))]
    found = [*_executors(row), *_folder(row.file.path)]
    with _inspect.reading(row.file.path) as db:
        for eval in row.evals:
            found += _eval(row, eval, db)
    return found


def _way_back(row: RunSetRow) -> str:
    """What to do about a file without results."""
    path, backup = row.file.path, row.file.backup
    if backup is None or row.file.is_backup:
        delete = program_command("rm", row.run_set_id)
        return f"There is no backup of it. Start the run again; `{delete}` deletes what is left."
    if row.size_bytes == 0:
        return f"Go on from its backup, {backup}: {row.resume_command}"
    return (
        f"To go on from its backup, {backup}, move {path} away, and with it {path.name}-wal and"
        f" {path.name}-shm where they are; then {row.resume_command}"
    )


def _headline(row: RunSetRow) -> str:
    lines = [f"Run set {row.run_set_id}: {row.state}"]
    for e in row.evals:
        score = "" if e.score_mean is None else f", mean score {e.score_mean:.3f}"
        lines.append(
            f"  {e.name} ({e.model_name}): {e.num_done:,} of {e.num_tasks:,} done,"
            f" {e.num_running:,} in flight, {e.num_failed:,} failed{score}"
        )
    return "\n".join(lines)


def _executors(row: RunSetRow) -> Iterator[Finding]:
    is_unfinished = any(e.state in ("queueing", "running") for e in row.evals)
    drivers = [x for x in row.executors if x.role == "driver"]
    if is_unfinished and not row.is_live:
        silent = [x for x in drivers if x.standing == "silent"]
        if silent:
            yield _silent(silent[-1])
        else:
            yield _nobody_works(row, drivers)
    for executor in row.executors:
        if executor.standing == "dead":
            continue
        yield from _clock(executor)
        if executor.role == "worker" and executor.standing == "silent":
            yield _silent(executor)
        yield from _blocked(executor)


def _nobody_works(row: RunSetRow, drivers: list[ExecutorRow]) -> Finding:
    last = drivers[-1] if drivers else None
    what = (
        f"its process {last.pid} on {last.host} died (last heartbeat {ago(last.heartbeat_at)})"
        if last is not None
        else "its last process has ended"
    )
    kept = sum(e.num_done for e in row.evals)
    return Finding(
        f"There is no live executor: {what}. The {kept:,} finished results are kept.",
        f"Go on with: {row.resume_command}",
    )


def _silent(executor: ExecutorRow) -> Finding:
    name = f"{executor.role} {executor.pid} on {executor.host}"
    look = f"py-spy dump --pid {executor.pid}"
    return Finding(
        f"{name[:1].upper()}{name[1:]} gave its last sign of life {ago(executor.heartbeat_at)}, and"
        " its lease ran out: it is stopped (Ctrl-Z?), starved of CPU, or its machine is cut off.",
        f"Look at it with `{look}` there; if it is stopped, `kill -CONT {executor.pid}`. Its tasks"
        " go to others by themselves.",
    )


def _clock(executor: ExecutorRow) -> Iterator[Finding]:
    ahead = executor.heartbeat_at - time.time()
    if ahead > SKEW:
        yield Finding(
            f"The clock of {executor.host} is {duration(ahead)} ahead of this machine's: process"
            f" {executor.pid} gave a sign of life in the future. Leases, back-off and ages are"
            " off by as much.",
            "Synchronize the clocks (NTP, chrony), then resume what went wrong.",
        )


def _blocked(executor: ExecutorRow) -> Iterator[Finding]:
    stall = Stall.from_json(executor.diagnosis) if executor.diagnosis else None
    name = f"{executor.role} {executor.pid} on {executor.host}"
    remedy = (
        "Await an asynchronous version of that call, or move it to a thread with"
        " asyncio.to_thread(...)."
    )
    if stall is not None and stall.report is not None:
        remedy += f" The stacks stand in {stall.report}."
    if stall is not None:
        rollout = f", for rollout {stall.rollout}" if stall.rollout else ""
        if not stall.is_over:
            blocked = duration(time.time() - stall.since)
            yield Finding(
                f"The event loop of {name} has been blocked for {blocked} at"
                f" {stall.place}{rollout}:"
                " all its other rollouts wait.",
                remedy,
            )
        else:
            times = "once" if executor.num_stalls == 1 else f"{executor.num_stalls} times"
            yield Finding(
                f"The event loop of {name} was blocked {times}, the last time {ago(stall.since)}"
                f" for {duration(stall.seconds)} at {stall.place}{rollout}.",
                remedy,
            )
    minutes = max((time.time() - executor.started_at) / 60, 1.0)
    if stall is None and executor.num_slow_callbacks / minutes > SLOW_PER_MINUTE:
        yield Finding(
            f"{executor.num_slow_callbacks:,} callbacks of {name} held its event loop for more than"
            " 0.1 s each.",
            "Rollouts that use much CPU belong into processes"
            " (runner.experimental_use_multiprocessing=True) or threads (asyncio.to_thread).",
        )


def _folder(path: Path) -> Iterator[Finding]:
    try:
        usage = shutil.disk_usage(path.parent)
    except OSError:
        return
    if usage.free < min(NEARLY_FULL_BYTES, usage.total * NEARLY_FULL_SHARE):
        yield Finding(
            f"The disk of {path.parent}, which holds the database, is nearly full:"
            f" {usage.free >> 20:,} MiB of {usage.total >> 20:,} MiB are free.",
            "Make room there (`python -m nanoeval.bin.rm` removes old run sets), or move the"
            " database to another folder, set NANOEVAL_DATABASE_DIR to it, and resume.",
        )


def _eval(row: RunSetRow, eval: EvalRow, db: sqlite3.Connection) -> Iterator[Finding]:
    if eval.error and eval.state == "failed":
        yield Finding(
            f"{eval.name} was ended by an error: {_inspect_run.error_line(eval.error)}",
            f"Mend the cause, then go on with: {row.resume_command}",
        )
    yield from _errors(row, eval, db)
    if not row.is_live or eval.state not in ("queueing", "running"):
        return
    seconds = time.time() - eval.created_at
    if eval.state == "queueing" and seconds > SLOW_LISTING:
        yield Finding(
            f"{eval.name} has been listing its tasks for {duration(seconds)}.",
            "get_tasks() is slow, or waits for something (a data set that is downloaded?).",
        )
    yield from _queue(row, eval, db)
    yield from _long_rollouts(eval, db)


def _queue(row: RunSetRow, eval: EvalRow, db: sqlite3.Connection) -> Iterator[Finding]:
    queue = _inspect_run.queue(db, eval.eval_id)
    concurrency = f"{program_command('concurrency', row.run_set_id)} set=N"
    if eval.concurrency == 0 and queue.num_queued:
        yield Finding(
            f"The concurrency of {eval.name} is 0: none of {queue.num_queued:,} queued tasks is"
            " started.",
            f"Raise it with: {concurrency}",
        )
    if queue.num_queued and queue.num_backed_off == queue.num_queued and not eval.num_running:
        assert queue.first_due is not None
        assert queue.last_due is not None
        now = time.time()
        errors = _inspect_run.error_groups(db, eval.eval_id)
        error = (
            f" The most frequent error is {errors[0].error_type}: {errors[0].line}."
            if errors
            else ""
        )
        yield Finding(
            f"All {queue.num_queued:,} queued tasks of {eval.name} are in back-off after system"
            f" errors; the first is due in {duration(queue.first_due - now)}, the last in"
            f" {duration(queue.last_due - now)}.{error}",
            "They are tried again by themselves. If the server refuses so many at once, lower the"
            f" concurrency: {concurrency}",
        )


def _errors(row: RunSetRow, eval: EvalRow, db: sqlite3.Connection) -> Iterator[Finding]:
    num_tries = eval.num_done + eval.num_retried
    for error in _inspect_run.error_groups(db, eval.eval_id)[:3]:
        if error.num_tries >= max(5, ERROR_SHARE * num_tries):
            share = 100 * error.num_tries / max(num_tries, error.num_tries)
            yield Finding(
                f"{share:.0f} % of the tries of {eval.name} ended with {error.error_type}:"
                f" {error.line} ({error.num_tries:,} tries, {error.num_failed:,} of which were the"
                " last).",
                f"Their tracebacks stand in the monitor: {program_command('mon', row.run_set_id)}",
            )


def _long_rollouts(eval: EvalRow, db: sqlite3.Connection) -> Iterator[Finding]:
    history = History(eval.eval_id)
    history.update(db)
    latency = history.latency()
    if latency is None:
        return
    now = time.time()
    rollouts = _inspect_run.rollouts_in_flight(db, eval.eval_id, limit=1000)
    limit = max(LONG_TIMES * latency.p50, LONG_SECONDS)
    long = [rollout for rollout in rollouts if now - rollout.started_at > limit]
    if not long:
        return
    worst = long[0]
    age = now - worst.started_at
    others = f"; {len(long) - 1} more are older than {duration(limit)}" if len(long) > 1 else ""
    yield Finding(
        f"Rollout {worst.question_id}.{worst.group_id} of {eval.name} has run for {duration(age)},"
        f" {age / max(latency.p50, 1e-3):,.0f} times the median of {duration(latency.p50)}"
        f"{_last_event(eval, worst)}{others}.",
        "Set runner.rollout_timeout to have such rollouts tried again. `kill -USR1` on their"
        " executor writes where they wait.",
    )


def _last_event(eval: EvalRow, rollout: InFlight) -> str:
    if eval.records is None:
        return ""
    key = (rollout.question_id, rollout.group_id)
    try:
        event = LastEvents(Path(eval.records)).look({key}).get(key)
    except OSError:
        return ""
    if event is None:
        return ""
    return f" (its last recorded event: {event.get('record_type')}, {ago(moment_of(event))})"


def _wrapped(text: str, indent: str) -> str:
    # Commands and paths are copied, so they are never broken.
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


if __name__ == "__main__":
    run_command(main, __doc__)
