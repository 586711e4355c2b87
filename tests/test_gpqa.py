"""GPQA on self-made questions in the hub's columns; `test_examples` runs its examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import nanoeval
from nanoeval import EvalSpec, RunnerArgs
from nanoeval.evals._datasets import DatasetError
from nanoeval.examples._gpqa import GPQAEval, load, make_question
from nanoeval.models.openai_api import OpenAIModel
from nanoeval.solvers.mcq import MockSolver
from nanoeval.solvers.mcq_api import OpenAIAPIMCQSolver
from nanoeval.testing import Request, ScriptedServer

FIXTURES = Path(__file__).resolve().parent / "fixtures" / "datasets"
ROWS = FIXTURES / "Idavidrein" / "gpqa" / "gpqa_diamond" / "train.jsonl"


@pytest.fixture(autouse=True)
def fixtures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOEVAL_DATASETS_DIR", str(FIXTURES))


def correct_answers() -> dict[str, str]:
    rows = map(json.loads, ROWS.read_text().splitlines())
    return {row["Question"]: row["Correct Answer"] for row in rows}


def test_questions_keep_their_right_answer_and_look_alike_every_time() -> None:
    """Answers shuffled anew would ask another question on every run and every resume."""
    questions = load("gpqa_diamond")
    assert questions == load("gpqa_diamond")
    for question in questions:
        [index] = question.correct_indices
        assert question.answers[index] == correct_answers()[question.question]
    assert len({tuple(q.correct_indices) for q in questions}) > 1


def test_a_row_without_an_answer_is_named() -> None:
    """A None among the answers would be shown to the model as "None"."""
    row = {"Question": "?", "Correct Answer": "a", "Incorrect Answer 1": "b"}
    with pytest.raises(DatasetError, match=r"row 7 has nothing in \['Incorrect Answer 2'"):
        make_question(row, 7, "rows")


async def test_the_eval_passes_its_self_test() -> None:
    """Evals that name GPQAEval rely on listing and summarizing it."""
    await GPQAEval(solver=MockSolver()).self_test()


def reply_right_but_for_uracil(request: Request) -> str:
    answer = next(a for question, a in correct_answers().items() if question in request.prompt)
    letter = request.prompt.split(f") {answer}")[0][-1]
    wrong = "B" if letter == "A" else "A"
    return f"Let me think.\nAnswer: {wrong if answer == 'Uracil' else letter}"


async def test_a_model_is_scored_over_http() -> None:
    """Prompt, reply and grading must fit together: five of six are right by construction."""
    async with ScriptedServer(reply_right_but_for_uracil, models=["tiny"]) as server:
        model = OpenAIModel(name="tiny", base_url=server.base_url)
        eval = GPQAEval(solver=OpenAIAPIMCQSolver(model=model), n_consensus=2)
        summary = await nanoeval.run(EvalSpec(eval=eval, runner=RunnerArgs()))
    assert summary["accuracy"] == summary["consensus@2"] == pytest.approx(5 / 6)
    assert summary["num_random_guesses"] == 0
    assert summary["dataset"] == str(ROWS)
