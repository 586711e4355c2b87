"""Short-answer evals: their tasks, records and summaries, through whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chz
import pytest

import nanoeval
from nanoeval import EvalSpec, RolloutSystemError, RunnerArgs
from nanoeval.json_recorder import JsonRecorderConfig
from nanoeval.solvers.short_answer import (
    Answer,
    MockSolver,
    Question,
    ShortAnswerEval,
    ShortAnswerSolver,
    ShortAnswerTask,
)


@chz.chz
class Capitals(ShortAnswerEval):
    def get_name(self) -> str:
        return "capitals"

    async def _get_tasks(self) -> list[Question]:
        return [
            Question(question=f"Capital of {country}?", metadata={"capital": capital})
            for country, capital in [("Peru", "Lima"), ("Kenya", "Nairobi"), ("Fiji", "Suva")]
        ]


@chz.chz
class SaysLima(ShortAnswerSolver):
    async def solve(self, task: ShortAnswerTask) -> Answer:
        right = task.question.metadata["capital"] == "Lima"
        return Answer(answer="Lima", is_correct=right, metadata={"how": "guessed"})


@chz.chz
class BreaksOnFiji(ShortAnswerSolver):
    async def solve(self, task: ShortAnswerTask) -> Answer:
        if "Fiji" in task.question.question:
            raise RolloutSystemError("no line to Fiji")
        return Answer(answer="?", is_correct=None if "Kenya" in task.question.question else True)


async def summary_of(solver: ShortAnswerSolver, file: Path, **runner: Any) -> dict[str, Any]:
    args = RunnerArgs(recorder=JsonRecorderConfig(filename=file), **runner)
    spec = EvalSpec(eval=Capitals(solver=solver, samples_per_question=2), runner=args)
    return await nanoeval.run(spec)


def matches(file: Path) -> list[dict[str, Any]]:
    events = map(json.loads, file.read_text().splitlines())
    return [event for event in events if event["record_type"] == "match"]


async def test_tasks_are_named_by_eval_index_and_attempt_from_0() -> None:
    """Records and resumed runs are matched by these names."""
    tasks = await Capitals(solver=MockSolver(), samples_per_question=2).get_tasks()
    names = [(task.question_id, task.attempt_id) for task in tasks]
    assert names == [(f"capitals.{i}", attempt) for attempt in (0, 1) for i in range(3)]


async def test_answers_are_graded_counted_and_recorded(tmp_path: Path) -> None:
    """The summary and the records must tell the same story."""
    summary = await summary_of(SaysLima(), tmp_path / "records.jsonl")
    assert summary["accuracy"] == pytest.approx(1 / 3)
    assert (summary["num_questions"], summary["num_attempts"]) == (3, 6)
    assert summary["pass@2"] == pytest.approx(1 / 3)
    recorded = matches(tmp_path / "records.jsonl")
    assert sum(event["correct"] for event in recorded) == 2
    assert {event["picked"] for event in recorded} == {"Lima"}
    assert {event["sample_id"] for event in recorded} == {f"capitals.{i}" for i in range(3)}


async def test_ungraded_answers_have_no_accuracy(tmp_path: Path) -> None:
    """Answers that nobody graded must not read as 0 %."""
    summary = await summary_of(MockSolver(), tmp_path / "records.jsonl")
    assert "accuracy" not in summary
    assert summary["num_ungraded"] == 6
    assert all(event["graded"] is False for event in matches(tmp_path / "records.jsonl"))


async def test_failed_rollouts_count_as_failed_and_wrong_below(tmp_path: Path) -> None:
    """A question that broke must lower `metrics_including_errors`, not vanish."""
    file = tmp_path / "records.jsonl"
    summary = await summary_of(BreaksOnFiji(), file, max_retries=0)
    assert summary["accuracy"] == 1.0
    assert (summary["is_valid"], summary["num_failed"]) == (False, 2)
    assert summary["metrics_including_errors"]["accuracy"] == 0.5


def test_samples_per_question_must_be_positive() -> None:
    """0 would list no tasks, and the error would blame the data."""
    with pytest.raises(ValueError, match="samples_per_question=0 must be at least 1"):
        Capitals(solver=MockSolver(), samples_per_question=0)
