"""One workload through nanoeval; `peers.py` runs this with the Python that has it installed.

`peers.py` says as JSON what to run. Prints its seconds, after a warm-up run. Files go where the
environment says.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Literal

import chz

import nanoeval
from nanoeval import Eval, EvalSpec, RunnerArgs, Task
from nanoeval.metrics.standard import summarize_correctness
from nanoeval.models.openai_api import OpenAIModel
from nanoeval.recorder import get_recorder
from nanoeval.setup import nanoeval_entrypoint


class Question(Task):
    """A question, as the other tools' samples hold one."""

    text: str


@chz.chz
class Questions(Eval[Question, bool]):
    """The three workloads as one eval."""

    n: int
    workload: Literal["noop", "sleep", "http"]
    reply: str
    model: OpenAIModel | None = None

    def get_name(self) -> str:
        return "questions"

    @asynccontextmanager
    async def _context(self) -> AsyncGenerator[None, None]:
        if self.model is None:
            yield
        else:
            async with self.model:
                yield

    async def get_tasks(self) -> list[Question]:
        return [Question(question_id=str(i), text=f"Question {i}?") for i in range(self.n)]

    async def evaluate(self, task: Question) -> bool:
        picked = ""
        if self.workload == "sleep":
            await asyncio.sleep(1)
        if self.model is not None:
            picked = (await self.model.complete(task.text)).text
        correct = picked == self.reply
        get_recorder().record_match(correct, expected=self.reply, picked=picked)
        return correct

    async def get_summary(self, results: list[tuple[Question, bool]]) -> dict[str, Any]:
        return summarize_correctness(results)


async def run(order: dict[str, Any]) -> None:
    """Run the workload and check that all questions were answered."""
    model = None
    if order["workload"] == "http":
        params = {"temperature": 0, "max_tokens": 512}
        model = OpenAIModel(name="scripted", base_url=order["url"], params=params)
    questions = Questions(
        n=order["n"], workload=order["workload"], reply=order["reply"], model=model
    )
    # All else by default: JSON records, results in a database, backups of that.
    spec = EvalSpec(eval=questions, runner=RunnerArgs(concurrency=order["in_flight"]))
    summary = await nanoeval.run(spec)
    assert summary["accuracy"] == 1, summary
    assert summary["num_tasks"] == order["n"], summary


async def main() -> None:
    order = json.loads(sys.argv[1])
    await run({**order, **order["warm_up"]})
    started_at = time.perf_counter()
    await run(order)
    print(json.dumps({"seconds": time.perf_counter() - started_at}))


if __name__ == "__main__":
    nanoeval_entrypoint(main())
