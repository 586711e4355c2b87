"""Two servers asked the same in one run, turn by turn, so that drift hits both alike."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import chz

from nanoeval.eval import Eval
from nanoeval.evals._generation import GenerationEval, GenerationTask, Sample

AGAINST = "@against"

Results = Sequence[tuple[GenerationTask, Any]]


@chz.chz
class PairedEval(Eval[GenerationTask, Sample]):
    """Asks `first` and `against`, two evals of one task, each row one right after the other.

    Which of them comes first changes from row to row. The tasks of `against` carry its mark at the
    end of their ids.
    """

    first: GenerationEval
    against: GenerationEval

    def get_name(self) -> str:
        """The task's name, and that it is asked of two."""
        return f"{self.first.get_name()}_paired"

    async def get_tasks(self) -> AsyncIterator[GenerationTask]:
        """Two tasks per row."""
        return self._interleaved()

    async def _interleaved(self) -> AsyncIterator[GenerationTask]:
        is_first_leading = True
        async for task in await self.first.get_tasks():
            other = task.model_copy(update={"question_id": task.question_id + AGAINST})
            for one in (task, other) if is_first_leading else (other, task):
                yield one
            is_first_leading = not is_first_leading

    async def evaluate(self, task: GenerationTask) -> Sample:
        """Ask the one that the task is meant for."""
        side = self.against if task.question_id.endswith(AGAINST) else self.first
        return await side.evaluate(task)

    async def get_summary(self, results: list[tuple[GenerationTask, Sample]]) -> dict[str, Any]:
        """The same as `get_full_summary`."""
        return await self.get_full_summary(list(results))

    async def get_full_summary(self, results: list[tuple[GenerationTask, Any]]) -> dict[str, Any]:
        """The summary of each of the two, under `first` and `against`."""
        (first, own), (against, others) = split(self, results)
        return {
            "first": await first.get_full_summary(list(own)),
            "against": await against.get_full_summary(list(others)),
        }

    @asynccontextmanager
    async def _context(self) -> AsyncGenerator[None, None]:
        async with self.first, self.against:
            yield


def split(
    check: GenerationEval | PairedEval, results: Results
) -> list[tuple[GenerationEval, list[tuple[GenerationTask, Any]]]]:
    """Each eval of a check with its own results, under the ids that the rows have."""
    if isinstance(check, GenerationEval):
        return [(check, list(results))]
    own, others = [], []
    for task, result in results:
        plain = task.question_id.removesuffix(AGAINST)
        if plain == task.question_id:
            own.append((task, result))
        else:
            others.append((task.model_copy(update={"question_id": plain}), result))
    return [(check.first, own), (check.against, others)]
