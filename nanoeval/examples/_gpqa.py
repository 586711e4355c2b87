"""GPQA: graduate-level multiple-choice questions that a search engine does not answer.

Source: Rein et al., "GPQA: a graduate-level Google-proof Q&A benchmark" (2023),
`Idavidrein/gpqa`. Its authors ask not to publish its questions in plain text.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import chz

from nanoeval.evals._datasets import DatasetError, load_rows
from nanoeval.solvers.mcq import Answer, MCQEval, MCQTask, Question

COLUMNS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def load(subset: str) -> list[Question]:
    """The questions of a subset, in its order, their answers shuffled the same way every time.

    The hub gives the data set only to those who accepted its terms there and set HF_TOKEN.
    """
    rows = load_rows("Idavidrein/gpqa", subset, "train")
    return [make_question(row, index, rows.source) for index, row in enumerate(rows)]


def make_question(row: dict[str, Any], index: int, source: str) -> Question:
    """The question of one row of the hub's columns."""
    lacking = [name for name in ("Question", *COLUMNS) if not row.get(name)]
    if lacking:
        raise DatasetError(f"{source}: row {index} has nothing in {lacking}")
    answers = [row[name].strip() for name in COLUMNS]
    # Seeded by the question itself, so that it looks the same in every subset and order.
    random.Random(row["Question"]).shuffle(answers)
    return Question(
        question=row["Question"].strip(),
        answers=answers,
        correct_indices={answers.index(row[COLUMNS[0]].strip())},
        metadata={"record_id": row.get("Record ID"), "dataset": source},
    )


@chz.chz
class GPQAEval(MCQEval):
    """GPQA, each question asked `n_consensus` times."""

    subset: str = chz.field(
        default="gpqa_diamond", doc="gpqa_diamond (198 questions), gpqa_main or gpqa_extended."
    )

    def get_name(self) -> str:
        """The name of the subset."""
        return self.subset

    async def _get_tasks(self) -> list[Question]:
        return await asyncio.to_thread(load, self.subset)

    async def get_summary(self, results: list[tuple[MCQTask, Answer]]) -> dict[str, Any]:
        """The standard metrics, and the data set's version."""
        summary = await super().get_summary(results)
        # The hub's newest commit is loaded, so the tasks say which one that was.
        dataset = {"dataset": results[0][0].question.metadata["dataset"]} if results else {}
        return {**summary, **dataset}
