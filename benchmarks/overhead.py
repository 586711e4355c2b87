"""What nanoeval costs per rollout, beside a floor measured in the same minute.

    python benchmarks/overhead.py [--json results.json] [--repeat 3]

The floor is what nobody can go below with the same promises: the same N items through asyncio
tasks, with a pickle each way and two batched SQLite transactions per 256 items.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import pickle
import platform
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import chz

from nanoeval import Eval, EvalSpec, RunnerArgs, Task, run
from nanoeval.recorders import dummy_recorder, json_recorder
from nanoeval.setup import tune_interpreter

FLOOR_BATCH = 256


@chz.chz
class Noop(Eval[Task, bool]):
    """Rollouts that return at once, or after a sleep."""

    n: int = 10_000
    sleep: float = 0.0
    records: bool = False

    def get_name(self) -> str:
        return "noop"

    async def get_tasks(self) -> list[Task]:
        return [Task(question_id=str(index)) for index in range(self.n)]

    async def evaluate(self, task: Task) -> bool:
        if self.records:
            from nanoeval.recorder import get_recorder

            get_recorder().record_sampling("1 + 1 = ?", "2")
            get_recorder().record_match(True, expected="2", picked="2")
        if self.sleep:
            await asyncio.sleep(self.sleep)
        return True

    async def get_summary(self, results: list[tuple[Task, bool]]) -> dict[str, Any]:
        return {"accuracy": sum(result for _, result in results) / max(len(results), 1)}


async def floor(n: int) -> None:
    """The same items through asyncio, pickle and SQLite alone."""
    answers = []

    async def evaluate(blob: bytes) -> bytes:
        pickle.loads(blob)
        return pickle.dumps(True)

    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as d:
        db = sqlite3.connect(f"{d}/floor.db", isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("CREATE TABLE item (id INTEGER PRIMARY KEY, task BLOB, result BLOB)")
        tasks = [Task(question_id=str(index)) for index in range(n)]
        for first in range(0, n, FLOOR_BATCH):
            batch = [
                (first + i, pickle.dumps(task))
                for i, task in enumerate(tasks[first : first + FLOOR_BATCH])
            ]
            db.execute("BEGIN IMMEDIATE")
            db.executemany("INSERT INTO item VALUES (?, ?, NULL)", batch)
            db.execute("COMMIT")
            results = await asyncio.gather(*(evaluate(blob) for _, blob in batch))
            db.execute("BEGIN IMMEDIATE")
            db.executemany(
                "UPDATE item SET result = ? WHERE id = ?",
                [(result, id) for (id, _), result in zip(batch, results, strict=True)],
            )
            db.execute("COMMIT")
            answers += [pickle.loads(result) for result in results]
        db.close()
    assert len(answers) == n


async def ours(eval: Noop, concurrency: int) -> None:
    recorder = json_recorder() if eval.records else dummy_recorder(log=False)
    spec = EvalSpec(eval=eval, runner=RunnerArgs(concurrency=concurrency, recorder=recorder))
    summary = await run(spec)
    assert summary["accuracy"] == 1.0, summary


def seconds_of(work: Any) -> float:
    started_at = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        asyncio.run(work)
    return time.perf_counter() - started_at


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(repeat: int) -> list[dict[str, Any]]:
    seconds_of(floor(1000))
    seconds_of(ours(Noop(n=1000), 4096))
    rows: list[dict[str, Any]] = []

    def note(name: str, n: int, seconds: list[float], **more: Any) -> float:
        rate = n / statistics.median(seconds)
        rows.append({"what": name, "rollouts": n, "per_second": round(rate), **more})
        return rate

    def against_floor(name: str, eval: Noop, floor_n: int) -> float:
        pairs = [
            (seconds_of(floor(floor_n)) / floor_n, seconds_of(ours(eval, 4096)) / eval.n)
            for _ in range(repeat)
        ]
        ratio = statistics.median(f / o for f, o in pairs)
        note("floor", floor_n, [f * floor_n for f, _ in pairs])
        return note(
            name, eval.n, [o * eval.n for _, o in pairs], of_floor=round(ratio, 2),
            peak_mib=round(peak_mib()),
        )  # fmt: skip

    small = against_floor("no-op", Noop(), 10_000)
    recorded = against_floor("no-op, JSON recorder, 3 lines each", Noop(records=True), 10_000)
    rows[-1]["of_dummy_recorder"] = round(recorded / small, 2)
    large = against_floor("no-op", Noop(n=100_000), 10_000)
    rows[-1]["of_10_000"] = round(large / small, 2)
    for n, ideal in ((5_000, 1.0), (20_000, 4.0)):
        seconds = [seconds_of(ours(Noop(n=n, sleep=1.0), 5_000)) for _ in range(repeat)]
        note("sleep(1), 5000 in flight", n, seconds)
        rows[-1] |= {"seconds": round(statistics.median(seconds), 2), "ideal_seconds": ideal}
    return rows


def memory_per_queued_task(n: int = 200_000) -> dict[str, Any]:
    """The most resident memory that queueing adds to the caller's own Task objects, per task."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import overhead; overhead.print_queueing_memory({n})"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return {
        "what": "memory per queued task",
        "rollouts": n,
        "bytes": round(float(out.stdout.split()[-1])),
    }


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def print_queueing_memory(n: int) -> None:
    """Queue `n` tasks; print by how much the process grew at most, per task."""
    seen: dict[str, int] = {}

    @chz.chz
    class Watching(Noop):
        async def get_tasks(self) -> list[Task]:
            tasks = await super().get_tasks()
            seen["listed"] = resident_bytes()
            return tasks

        async def evaluate(self, task: Task) -> bool:
            seen.setdefault("most", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            raise KeyError("enough is seen")

    asyncio.run(ours(Noop(n=100), 1))
    with contextlib.suppress(ExceptionGroup):
        asyncio.run(ours(Watching(n=n), 1))
    print((seen["most"] - seen["listed"]) / n)


def start_up() -> list[dict[str, Any]]:
    """CPU of `import nanoeval`, and the wall time of a process that runs one task."""

    def child(code: str) -> tuple[float, float]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started_at = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return cpu, time.perf_counter() - started_at

    one_task = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import asyncio, overhead; asyncio.run(overhead.ours(overhead.Noop(n=1), 1))"
    )
    codes = {
        "python -c pass": "pass",
        "import chz, pydantic, structlog, tqdm": "import chz, pydantic, structlog, tqdm",
        "import nanoeval": "import nanoeval",
        "a process that runs one task": one_task,
    }
    rows = []
    for name, code in codes.items():
        times = [child(code) for _ in range(5)]
        cpu, wall = (round(statistics.median(column), 2) for column in zip(*times, strict=True))
        rows.append({"what": name, "cpu_seconds": cpu, "seconds": wall})
    return rows


def machine() -> str:
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, " + (
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; the median counts")
    arguments = parser.parse_args()
    tune_interpreter()  # as nanoeval_entrypoint does
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NANOEVAL_LOG_DIR"] = f"{folder}/records"
        os.environ["NANOEVAL_ROOT_DIR"] = f"{folder}/root"
        rows = [*measure(arguments.repeat), memory_per_queued_task(), *start_up()]
    print(machine())
    for row in rows:
        shown = "  ".join(f"{k}={v}" for k, v in row.items() if k != "what")
        print(f"{row['what']:40} {shown}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
