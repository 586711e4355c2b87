"""What worker processes bring and cost, beside one process in the same minute.

    python benchmarks/processes.py [--json results.json]

CPU-bound rollouts (20 ms of pure Python each) through two processes and through one, and no-op
rollouts through two and through one. Process start-up is not counted: a short run starts the pool.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import chz
from overhead import Noop, machine

from nanoeval import EvalSpec, RunnerArgs, Task, run
from nanoeval.recorders import dummy_recorder
from nanoeval.setup import global_exit_stack


@chz.chz
class Burn(Noop):
    """20 ms of pure Python per rollout."""

    async def evaluate(self, task: Task) -> bool:
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass
        return True


async def seconds_of(eval: Noop, num_processes: int) -> float:
    """The wall time of one run; `num_processes` 0 means in process."""
    processes: dict[str, Any] = (
        {"experimental_use_multiprocessing": True, "num_processes": num_processes}
        if num_processes
        else {}
    )
    runner = RunnerArgs(recorder=dummy_recorder(log=False), should_backup=False, **processes)
    async with global_exit_stack:
        if num_processes:
            await run(EvalSpec(eval=Noop(n=200, sleep=0.01), runner=runner))
        started_at = time.perf_counter()
        await run(EvalSpec(eval=eval, runner=runner))
        return time.perf_counter() - started_at


def compare(name: str, eval: Noop, repeat: int) -> dict[str, Any]:
    """Pairs of runs, two processes after one; the median of the pairs' ratios."""
    pairs = []
    for _ in range(repeat):
        with contextlib.redirect_stderr(io.StringIO()):
            one = asyncio.run(seconds_of(eval, 0))
            two = asyncio.run(seconds_of(eval, 2))
        pairs.append((one, two))
    return {
        "what": name,
        "rollouts": eval.n,
        "in_process_per_second": round(eval.n / statistics.median(one for one, _ in pairs)),
        "two_processes_per_second": round(eval.n / statistics.median(two for _, two in pairs)),
        "ratio": round(statistics.median(one / two for one, two in pairs), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--repeat", type=int, default=3, help="pairs of runs; the median counts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NANOEVAL_ROOT_DIR"] = folder
        rows = [
            compare("20 ms of CPU each", Burn(n=400), arguments.repeat),
            compare("no-op", Noop(n=50_000), arguments.repeat),
        ]
    print(machine())
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
