"""Questions with a short answer in free text: what they are, what solves them, how they count.

Knows no grader: a solver that can judge its answer sets `is_correct`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import chz
from pydantic import BaseModel

from nanoeval.asyncio_utils import HasAsyncContextManager
from nanoeval.eval import Eval, Task
from nanoeval.metrics.standard import summarize_correctness
from nanoeval.recorder import get_recorder


class Question(BaseModel):
    """A question; what a grader needs (the expected answer, say) goes into `metadata`."""

    question: str
    metadata: dict[str, Any] = {}


class Answer(BaseModel):
    """An answer; `is_correct` is None as long as nobody has graded it."""

    answer: str
    is_correct: bool | None = None
    metadata: dict[str, Any] = {}


class ShortAnswerTask(Task):
    """One attempt at a question."""

    question: Question


@chz.chz
class ShortAnswerSolver(HasAsyncContextManager):
    """Answers questions in free text. Override `solve`, and `_context` for what it needs."""

    async def solve(self, task: ShortAnswerTask) -> Answer:
        """Answer `task.question`, and grade the answer where that is possible."""
        raise NotImplementedError(f"{type(self).__name__} must define solve(task)")


@chz.chz
class MockSolver(ShortAnswerSolver):
    """Answers "dummy" without a model, ungraded."""

    async def solve(self, task: ShortAnswerTask) -> Answer:
        """Answer "dummy"."""
        del task
        return Answer(answer="dummy")


@chz.chz
class ShortAnswerEval(Eval[ShortAnswerTask, Answer]):
    """An eval of short-answer questions. Override `get_name` and `_get_tasks`.

    Each question is asked `samples_per_question` times; attempts count from 0.
    """

    solver: ShortAnswerSolver
    samples_per_question: int = chz.field(default=1, doc="Attempts per question.")

    @chz.validate
    def _check_samples_per_question(self) -> None:
        if self.samples_per_question < 1:
            raise ValueError(f"samples_per_question={self.samples_per_question} must be at least 1")

    @asynccontextmanager
    async def _context(self) -> AsyncGenerator[None, None]:
        async with self.solver:
            yield

    async def _get_tasks(self) -> list[Question]:
        raise NotImplementedError(f"{type(self).__name__} must define _get_tasks()")

    async def get_tasks(self) -> list[ShortAnswerTask]:
        """First attempts of all questions, then second ones; question ids `"{name}.{index}"`."""
        questions = await self._get_tasks()
        name = self.get_name()
        return [
            ShortAnswerTask(question=question, question_id=f"{name}.{index}", attempt_id=attempt)
            for attempt in range(self.samples_per_question)
            for index, question in enumerate(questions)
        ]

    async def evaluate(self, task: ShortAnswerTask) -> Answer:
        """Have the solver answer, and record its verdict; no verdict is recorded as wrong."""
        answer = await self.solver.solve(task)
        ungraded = {"graded": False} if answer.is_correct is None else {}
        get_recorder().record_match(
            correct=bool(answer.is_correct),
            picked=answer.answer,
            metadata=answer.metadata,
            **ungraded,
        )
        return answer

    def process_invalid(self, task: ShortAnswerTask) -> Answer:
        """A wrong, empty answer."""
        del task
        return Answer(answer="", is_correct=False)

    async def get_summary(self, results: list[tuple[ShortAnswerTask, Answer]]) -> dict[str, Any]:
        """The standard metrics of the graded answers; the others count as `num_ungraded`."""
        return summarize_correctness(results)
