"""A whole eval in one file: copy it, and put your own questions in the place of the sums.

    python examples/my_first_eval.py

asks a scripted model, so that it runs at once and costs nothing. With a real one:

    python examples/my_first_eval.py sums.model=nanoeval.models.openai_api:OpenAIModel \
        sums.model.name=gpt-4o runner.concurrency=64

(OPENAI_BASE_URL and OPENAI_API_KEY say where and who; `--help` lists everything that can be set.)
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import chz

import nanoeval
from nanoeval import Eval, EvalSpec, RunnerArgs, Task
from nanoeval.metrics.standard import summarize_correctness
from nanoeval.models import Model
from nanoeval.models.scripted import ScriptedModel
from nanoeval.recorder import get_recorder
from nanoeval.setup import nanoeval_entrypoint


class Sum(Task):
    """One attempt at one question: the fields that a rollout needs, beside the ids of Task."""

    a: int
    b: int


def scripted_reply(prompt: Any) -> str:
    """Stands in for a model that gets about one sum in ten wrong."""
    a, b = map(int, re.findall(r"\d+", prompt)[:2])
    is_wrong = random.Random(prompt).random() < 0.1
    return str(a + b + 1 if is_wrong else a + b)


@chz.chz
class Sums(Eval[Sum, bool]):
    """Adds numbers. A rollout's result is whether the model did."""

    model: Model = ScriptedModel(reply=scripted_reply)

    def get_name(self) -> str:
        return "sums"

    @asynccontextmanager
    async def _context(self) -> AsyncGenerator[None, None]:
        async with self.model:  # opened once, for all rollouts
            yield

    async def get_tasks(self) -> list[Sum]:
        return [Sum(question_id=f"{a}+{b}", a=a, b=b) for a in range(20) for b in range(20)]

    async def evaluate(self, task: Sum) -> bool:
        reply = await self.model.complete(f"{task.a} + {task.b} = ? Answer with the number alone.")
        correct = reply.text.strip() == str(task.a + task.b)
        get_recorder().record_match(correct, expected=task.a + task.b, picked=reply.text)
        return correct

    async def get_summary(self, results: list[tuple[Sum, bool]]) -> dict[str, Any]:
        return summarize_correctness(results)


async def main(sums: Sums, runner: RunnerArgs) -> None:
    """Run the eval and print its summary as JSON."""
    summary = await nanoeval.run(EvalSpec(eval=sums, runner=runner))
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    nanoeval_entrypoint(chz.entrypoint(main))
