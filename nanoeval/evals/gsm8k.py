"""GSM8K: word problems, zero-shot, graded on the final number (Cobbe et al., 2021)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import chz

from nanoeval.eval import Eval, Task
from nanoeval.evals._datasets import load_rows
from nanoeval.metrics.standard import summarize_correctness
from nanoeval.models.protocol import Model
from nanoeval.recorder import get_recorder

NUMBER = re.compile(r"(?:(?<![\w.])-)?\$?((?:\d[\d,]*)?\.?\d+)")


class GSM8KTask(Task):
    """One attempt at a problem. `dataset` says where it comes from."""

    question: str
    answer: str
    dataset: str


@dataclass(frozen=True)
class Graded:
    """The verdict on a reply, and the number read from it; None where it has none."""

    correct: bool
    picked: str | None


def load() -> list[GSM8KTask]:
    """The problems of the test split, in its order."""
    rows = load_rows("openai/gsm8k", "main", "test")
    answers = [read_numbers(row["answer"].partition("####")[2])[0] for row in rows]
    return [
        GSM8KTask(question_id=f"gsm8k.{i}", question=row["question"], answer=a, dataset=rows.source)
        for i, (row, a) in enumerate(zip(rows, answers, strict=True))
    ]


def prompt(question: str) -> str:
    """The one user message that asks `question`."""
    task = 'Solve this problem step by step. End with a line "Answer: N", N the number alone.'
    return f"{task}\n\n{question}"


def score(reply: str, answer: str) -> Graded:
    """Compare numbers: the first after the reply's last "Answer:", else the last of the reply."""
    *before, after = re.split(r"answer[*_]*\s*:", reply, flags=re.IGNORECASE)
    numbers = (read_numbers(after)[:1] if before else []) or read_numbers(reply)[-1:]
    return Graded(numbers == [answer], numbers[0] if numbers else None)


def read_numbers(text: str) -> list[str]:
    """The numbers in `text`, in one spelling: no "$", no thousands' commas, no idle zeros."""
    found = [re.sub(r"[$,]", "", match[0]) for match in NUMBER.finditer(text)]
    return [f"{Decimal(number).normalize() + 0:f}" for number in found]


@chz.chz
class GSM8K(Eval[GSM8KTask, Graded]):
    """GSM8K by one model, each problem asked `attempts` times; attempts count from 0."""

    model: Model
    attempts: int = 1

    def get_name(self) -> str:
        return "gsm8k"

    @asynccontextmanager
    async def _context(self) -> AsyncGenerator[None, None]:
        async with self.model:
            yield

    async def get_tasks(self) -> list[GSM8KTask]:
        problems, attempts = await asyncio.to_thread(load), range(self.attempts)
        return [p.model_copy(update={"attempt_id": i}) for i in attempts for p in problems]

    async def evaluate(self, task: GSM8KTask) -> Graded:
        graded = score((await self.model.complete(prompt(task.question))).text, task.answer)
        get_recorder().record_match(graded.correct, expected=task.answer, picked=graded.picked)
        return graded

    def process_invalid(self, task: GSM8KTask) -> Graded:
        return Graded(correct=False, picked=None)

    async def get_summary(self, results: list[tuple[GSM8KTask, Graded]]) -> dict[str, Any]:
        metrics = await asyncio.to_thread(summarize_correctness, results, lambda r: r.picked)
        return {**metrics, "dataset": results[0][0].dataset} if results else metrics
