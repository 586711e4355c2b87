"""Small evals that tests of the engine run, in this process and in others."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import chz

from nanoeval import Eval, EvalSpec, RolloutSystemError, RunnerArgs, Task
from nanoeval.metrics.standard import summarize_correctness
from nanoeval.recorders import dummy_recorder


class Sum(Task):
    """a + b, the `evaluate` of which is right where the sum is even."""

    a: int
    b: int = 0


@chz.chz
class Sums(Eval[Sum, bool]):
    """`n` questions with `attempts` attempts each; every odd sum is answered wrong.

    Each execution appends "question.attempt.retry pid" to `log`, if given. Questions whose number
    is a multiple of `flaky` break the system at their first `n_breaks` tries.
    """

    n: int = 20
    attempts: int = 1
    seconds: float = 0.0
    flaky: int = 0
    n_breaks: int = 1
    log: str = ""
    context_log: str = ""
    name: str = "sums"

    def get_name(self) -> str:
        return self.name

    async def get_tasks(self) -> list[Sum]:
        return [
            Sum(question_id=f"q{a}", attempt_id=attempt, a=a)
            for a in range(self.n)
            for attempt in range(1, self.attempts + 1)
        ]

    @asynccontextmanager
    async def _context(self) -> AsyncIterator[None]:
        append(self.context_log, f"enter {os.getpid()}")
        yield
        append(self.context_log, f"leave {os.getpid()}")

    async def evaluate(self, task: Sum) -> bool:
        append(self.log, f"{task.name}.{task.retry_idx} {os.getpid()}")
        if self.seconds:
            await asyncio.sleep(self.seconds)
        if self.flaky and task.a % self.flaky == 0 and task.retry_idx < self.n_breaks:
            raise RolloutSystemError(f"q{task.a} broke at try {task.retry_idx}")
        return (task.a + task.b) % 2 == 0

    async def get_summary(self, results: list[tuple[Sum, bool]]) -> dict[str, Any]:
        return summarize_correctness(results)


@chz.chz
class Burn(Sums):
    """Uses the processor instead of waiting."""

    async def evaluate(self, task: Sum) -> bool:
        until = time.process_time() + self.seconds
        while time.process_time() < until:
            pass
        return True


@chz.chz
class InFlight(Sums):
    """Notes in `log` how many rollouts of all processes are in flight, by files in a folder."""

    folder: str = ""

    async def evaluate(self, task: Sum) -> bool:
        mark = Path(self.folder, task.name)
        mark.touch()
        append(self.log, str(len(os.listdir(self.folder))))
        await asyncio.sleep(self.seconds)
        mark.unlink()
        return True


def append(path: str, line: str) -> None:
    """One line, whole, from whatever process."""
    if path:
        with open(path, "a") as file:
            file.write(line + "\n")


def lines(path: str | Path) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def spec(eval: Eval[Any, Any], **runner: Any) -> EvalSpec:
    """`eval` with a dummy recorder, without backups and with quick retries unless `runner` says."""
    defaults = {
        "recorder": dummy_recorder(log=False),
        "should_backup": False,
        "retry_backoff": 0.01,
    }
    return EvalSpec(eval=eval, runner=RunnerArgs(**(defaults | runner)))
