"""A program whose run goes on until it is killed: tests of the monitor and the doctor look at it.

    python -m tests.monitored_program RUN_SET_ID [retry | block | idle]

Question q3 never ends. With `retry` every rollout but those of q0 to q4 breaks the system, with
`block` q2 blocks the event loop.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chz

from nanoeval import Eval, EvalSpec, RolloutSystemError, RunnerArgs, Task, _inspect, run
from nanoeval.recorder import get_recorder
from nanoeval.recorders import json_recorder

# One red pixel.
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGA"
    "hKmMIQAAAABJRU5ErkJggg=="
)


class Question(Task):
    prompt: str


@chz.chz
class Endless(Eval[Question, dict[str, Any]]):
    """Answers even questions right, slowly."""

    kind: str

    def get_name(self) -> str:
        return "endless"

    async def get_tasks(self) -> list[Question]:
        n = 25 if self.kind == "retry" else 400
        return [Question(question_id=f"q{i}", prompt=f"Is {i} even?") for i in range(n)]

    async def evaluate(self, task: Question) -> dict[str, Any]:
        number = int(task.question_id[1:])
        content = [
            {"type": "text", "text": task.prompt},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
        ]
        get_recorder().record_sampling(
            [{"role": "user", "content": content}], f"I think it is, {number}."
        )
        if number == 3 and self.kind != "retry":
            await asyncio.sleep(3600)
        if number == 2 and self.kind == "block":
            await asyncio.sleep(1.0)
            time.sleep(3600)
        if number > 4 and self.kind == "retry":
            raise RolloutSystemError("HTTP 429: slow down", retry_after=600.0)
        await asyncio.sleep(0.3)
        get_recorder().record_match(number % 2 == 0, expected=number % 2 == 0, picked=True)
        return {"correct": number % 2 == 0, "reply": f"I think it is, {number}."}

    async def get_summary(self, results: list[Any]) -> dict[str, Any]:
        return {"n": len(results)}


@contextmanager
def live_run(run_set_id: str, kind: str = "idle", num_done: int = 5) -> Iterator[int]:
    """The program in a process of its own, once so many of its rollouts are done; gives its pid."""
    program = [sys.executable, "-m", "tests.monitored_program", run_set_id, kind]
    process = subprocess.Popen(program, cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not _has_done(run_set_id, num_done):
            assert process.poll() is None, "the program ended"
            assert time.monotonic() < deadline, "the program does not get on"
            time.sleep(0.05)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def _has_done(run_set_id: str, num_done: int) -> bool:
    rows = [row for row in _inspect.list_run_sets() if row.run_set_id == run_set_id]
    return bool(rows) and sum(e.num_done for e in rows[0].evals) >= num_done


if __name__ == "__main__":
    spec = EvalSpec(
        eval=Endless(kind=sys.argv[2]),
        runner=RunnerArgs(run_set_id=sys.argv[1], recorder=json_recorder(), concurrency=8),
    )
    asyncio.run(run(spec))
