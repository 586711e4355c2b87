"""Runs that are large in one way: a million rollouts, 50,000 in flight, results of a mebibyte.

    python benchmarks/million.py [--only CASE ...] [--json results.json]

Each case runs in a process of its own. Memory is resident memory: the most that the process had
before its summary began, less what it had when the caller's own tasks were made.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import chz
from overhead import Noop, machine, resident_bytes

from nanoeval import EvalSpec, RunnerArgs, Task, run
from nanoeval.recorders import dummy_recorder
from nanoeval.setup import tune_interpreter

MIB = 2**20
MILLION = 1_000_000
RUN_SET = "million"
# The least of the file that is told before and after: when the first rollout after a resume ends.
POLL = 0.01


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@chz.chz
class Watched(Noop):
    """Notes memory and time when its tasks are made and when its summary begins."""

    notes: dict[str, Any] = chz.field(default_factory=dict)

    async def get_tasks(self) -> Any:
        tasks = await super().get_tasks()
        self.notes["listed"] = resident_bytes()
        return tasks

    async def get_streamed_summary(self, batches: AsyncIterator[Any]) -> dict[str, Any]:
        self.notes["peak"] = peak_bytes()
        return await super().get_streamed_summary(batches)


@chz.chz
class Generated(Watched):
    """The same tasks, made one by one."""

    async def get_tasks(self) -> Any:
        return self._made()

    async def _made(self) -> AsyncIterator[Task]:
        self.notes["listed"] = resident_bytes()
        for index in range(self.n):
            yield Task(question_id=str(index))


@chz.chz
class Transcripts(Watched):
    """Results of one mebibyte; the summary sees one batch of them at a time."""

    async def evaluate(self, task: Task) -> Any:
        await super().evaluate(task)
        return os.urandom(1024) * 1024

    async def get_streamed_summary(self, batches: AsyncIterator[Any]) -> dict[str, Any]:
        self.notes["peak"] = peak_bytes()
        return {"bytes": sum([len(r) async for batch in batches for _, r in batch])}


def run_once(eval: Watched, concurrency: int) -> dict[str, Any]:
    """Run `eval` here: seconds of the whole of `run`, rate, memory, size of the database."""
    spec = EvalSpec(
        eval=eval,
        runner=RunnerArgs(
            concurrency=concurrency, recorder=dummy_recorder(log=False), run_set_id=RUN_SET
        ),
    )
    began = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        asyncio.run(run(spec))
    seconds = time.perf_counter() - began
    return {
        "seconds": round(seconds, 2),
        "per_second": round(eval.n / seconds),
        "added_mib": round((eval.notes["peak"] - eval.notes["listed"]) / MIB),
        "peak_mib_with_summary": round(peak_bytes() / MIB),
        "database_bytes_each": round(database().stat().st_size / eval.n),
    }


CASES: dict[str, tuple[Watched, int]] = {
    "10,000": (Watched(n=10_000), 4_096),
    "1,000,000": (Watched(n=MILLION), 4_096),
    "1,000,000 from a generator": (Generated(n=MILLION), 4_096),
    "50,000 in flight, 5 s each": (Watched(n=50_000, sleep=5.0), 50_000),
    "5,000 results of 1 MiB": (Transcripts(n=5_000), 4_096),
    "5,000 results of 1 MiB, 1 s each": (Transcripts(n=5_000, sleep=1.0), 256),
}
RESUME = "resume of 1,000,000, half of them done"


def database() -> Path:
    return Path(os.environ["NANOEVAL_DATABASE_DIR"]) / f"{RUN_SET}.db"


def num_done() -> int:
    try:
        with contextlib.closing(sqlite3.connect(f"file:{database()}?mode=ro", uri=True)) as db:
            row = db.execute("SELECT e.num_scored FROM eval AS e").fetchone()
    except sqlite3.Error:
        return 0
    return 0 if row is None else int(row[0])


def child(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def seconds_to_resume() -> dict[str, Any]:
    """Kill a run of a million half way; seconds from the start of `resume` to its first result."""
    program = [__file__, "--measure", "1,000,000"]
    killed = child(*program)
    while num_done() < MILLION // 2:
        time.sleep(POLL)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = num_done()
    began = time.perf_counter()
    # As a script of this folder, so that the class of the eval is found.
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import runpy; "
    code += f"sys.argv = ['resume', 'run_set_id={RUN_SET}']; "
    code += "runpy.run_module('nanoeval.bin.resume', run_name='__main__')"
    resumed = child("-c", code)
    while num_done() == before and resumed.poll() is None:
        time.sleep(POLL)
    first = time.perf_counter() - began
    resumed.communicate()
    return {
        "done_before": before,
        "first_result_after_seconds": round(first, 2),
        "seconds": round(time.perf_counter() - began, 2),
        "all_done": num_done() == MILLION,
    }


def measure(name: str) -> dict[str, Any]:
    """One case in folders of its own, in a fresh process where it measures memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as d:
        os.environ["NANOEVAL_DATABASE_DIR"] = f"{d}/databases"
        os.environ["NANOEVAL_ROOT_DIR"] = f"{d}/root"
        if name == RESUME:
            return seconds_to_resume()
        out, _ = child(__file__, "--measure", name).communicate()
        found: dict[str, Any] = json.loads(out)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=[*CASES, RESUME])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        tune_interpreter()  # as nanoeval_entrypoint does
        print(json.dumps(run_once(*CASES[arguments.measure])))
        return
    print(machine())
    rows = {}
    for name in arguments.only or [*CASES, RESUME]:
        rows[name] = measure(name)
        print(f"{name:40} " + "  ".join(f"{k}={v}" for k, v in rows[name].items()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
