"""Multiple-choice questions: what they are, what solves them, how they are scored.

Knows no model; `mcq_api` has a solver that asks one.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Generic, Self, TypeVar

import chz
from pydantic import BaseModel, model_validator

from nanoeval.asyncio_utils import HasAsyncContextManager
from nanoeval.eval import Eval, Task
from nanoeval.metrics.standard import summarize_correctness
from nanoeval.recorder import get_recorder


class Question(BaseModel):
    """A question and the answers to choose from.

    With `allow_multiple_choices` a solver picks a set of indices, which is right when it equals
    `correct_indices`; otherwise it picks one index, which is right when it is one of them.
    """

    question: str
    answers: list[str]
    correct_indices: set[int]
    # The encoded image (PNG, JPEG, ...) as base64.
    image: str | None = None
    # For solvers that draw at random; with None they must do without, or draw the same every time.
    seed: int | None = 42
    metadata: dict[str, Any] = {}
    allow_multiple_choices: bool = False

    @model_validator(mode="after")
    def _check_answers(self) -> Self:
        if not self.answers:
            raise ValueError(f"the question {self.question[:60]!r} has no answers to choose from")
        outside = sorted(i for i in self.correct_indices if not 0 <= i < len(self.answers))
        if outside:
            raise ValueError(
                f"correct_indices {outside} are outside of the {len(self.answers)} answers;"
                " they count from 0"
            )
        return self


class Answer(BaseModel):
    """What a solver picked: an index, or a set of them where the question allows several."""

    correct: bool
    picked: int | set[int]
    metadata: dict[str, Any] = {}


class MCQTask(Task):
    """One attempt at a question."""

    question: Question


TAnswer = TypeVar("TAnswer", bound=Answer)


@chz.chz
class MCQSolver(HasAsyncContextManager, Generic[TAnswer]):
    """Answers multiple-choice questions. Override `solve`, and `_context` for what it needs."""

    async def solve(self, task: MCQTask) -> TAnswer:
        """Pick an answer to `task.question` and judge it."""
        raise NotImplementedError(f"{type(self).__name__} must define solve(task)")

    def compute_extra_metrics(
        self, results: list[tuple[MCQTask, TAnswer]], n_consensus: int
    ) -> dict[str, Any]:
        """Metrics of this solver's own, which join the summary. Runs in a thread."""
        del results, n_consensus
        return {}


@chz.chz
class MockSolver(MCQSolver[Answer]):
    """Answers without a model: right half of the time, else a guess. The same every time."""

    async def solve(self, task: MCQTask) -> Answer:
        """Pick by a draw that depends on the question's seed and the task's name alone."""
        question = task.question
        draw = task_random(task)
        indices = range(len(question.answers))
        picked: int | set[int]
        if question.allow_multiple_choices:
            guess = set(draw.sample(indices, draw.randint(min(1, len(indices)), len(indices))))
            picked = set(question.correct_indices) if draw.random() < 0.5 else guess
        else:
            knows = question.correct_indices and draw.random() < 0.5
            picked = draw.choice(sorted(question.correct_indices) if knows else indices)
        return Answer(picked=picked, correct=is_right(question, picked))


def task_random(task: MCQTask) -> random.Random:
    """A random generator that gives the same numbers for a task in every run and on every try."""
    return random.Random(f"{task.question.seed}:{task.name}")


def is_right(question: Question, picked: int | set[int]) -> bool:
    """Whether `picked` answers `question`: equal to its set, or an element of it for an index."""
    if isinstance(picked, set):
        return picked == question.correct_indices
    return picked in question.correct_indices


@chz.chz
class MCQEval(Eval[MCQTask, Answer]):
    """An eval of multiple-choice questions. Override `get_name` and `_get_tasks`.

    Each question is asked `n_consensus` times; attempts count from 0.
    """

    solver: MCQSolver[Any]
    n_consensus: int = chz.field(default=1, doc="Attempts per question.")

    @chz.validate
    def _check_n_consensus(self) -> None:
        if self.n_consensus < 1:
            raise ValueError(f"n_consensus={self.n_consensus} must be at least 1")

    @asynccontextmanager
    async def _context(self) -> AsyncGenerator[None, None]:
        async with self.solver:
            yield

    async def _get_tasks(self) -> list[Question]:
        raise NotImplementedError(f"{type(self).__name__} must define _get_tasks()")

    async def get_tasks(self) -> list[MCQTask]:
        """First attempts of all questions, then second ones; question ids `"{name}.{index}"`."""
        questions = await self._get_tasks()
        name = self.get_name()
        return [
            MCQTask(question=question, question_id=f"{name}.{index}", attempt_id=attempt)
            for attempt in range(self.n_consensus)
            for index, question in enumerate(questions)
        ]

    async def evaluate(self, task: MCQTask) -> Answer:
        """Have the solver answer, and record its verdict."""
        answer: Answer = await self.solver.solve(task)
        _check_picked(task, answer)
        picked = sorted(answer.picked) if isinstance(answer.picked, set) else answer.picked
        get_recorder().record_match(
            correct=answer.correct,
            picked=picked,
            expected=sorted(task.question.correct_indices),
            metadata=answer.metadata,
        )
        return answer

    def process_invalid(self, task: MCQTask) -> Answer:
        """A wrong answer that shares its group with other failures only."""
        return Answer(correct=False, picked={-1} if task.question.allow_multiple_choices else -1)

    async def get_summary(self, results: list[tuple[MCQTask, Answer]]) -> dict[str, Any]:
        """The standard metrics, consensus@n over equal picks, and the solver's own metrics."""
        if not results:
            return {}
        for task, answer in results:
            _check_picked(task, answer)
        metrics = await asyncio.to_thread(summarize_correctness, results, _picks)
        extra = await asyncio.to_thread(
            self.solver.compute_extra_metrics, results, n_consensus=self.n_consensus
        )
        return {**metrics, **extra}


def _picks(answer: Answer) -> int | frozenset[int]:
    return frozenset(answer.picked) if isinstance(answer.picked, set) else answer.picked


def _check_picked(task: MCQTask, answer: Answer) -> None:
    several = task.question.allow_multiple_choices
    if isinstance(answer.picked, set) != several:
        wanted = "a set of indices, as it allows several" if several else "one index"
        # The type that evals written against this interface expect.
        raise AssertionError(
            f"{task.name}: the solver picked {answer.picked!r}; this question wants {wanted}"
        )
