"""Multiple-choice evals: questions, grading, the letter in a reply, whole runs over HTTP."""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import chz
import pytest
from pydantic import ValidationError

import nanoeval
from nanoeval import EvalSpec, RolloutSystemError, RunnerArgs
from nanoeval.json_recorder import JsonRecorderConfig
from nanoeval.models.openai_api import OpenAIModel
from nanoeval.models.scripted import ScriptedModel
from nanoeval.solvers.mcq import Answer, MCQEval, MCQTask, MockSolver, Question
from nanoeval.solvers.mcq_api import (
    MCQAPISolver,
    OpenAIAPIMCQSolver,
    format_question,
    make_messages,
    read_letters,
)
from nanoeval.testing import Request, ScriptedServer

SUMS = [
    Question(question=f"{a} + {a}?", answers=[str(a), str(2 * a), "0", "-1"], correct_indices={1})
    for a in range(1, 11)
]
PRIMES = Question(
    question="Which are prime?",
    answers=["4", "5", "6", "7"],
    correct_indices={1, 3},
    allow_multiple_choices=True,
)


@chz.chz
class Sums(MCQEval):
    def get_name(self) -> str:
        return "sums"

    async def _get_tasks(self) -> list[Question]:
        return SUMS


def attempts_at(question: Question, *answers: Any) -> list[tuple[MCQTask, Any]]:
    return [
        (MCQTask(question=question, question_id="q.0", attempt_id=i), answer)
        for i, answer in enumerate(answers)
    ]


def picked(*picks: int | set[int], of: Question = PRIMES) -> list[tuple[MCQTask, Any]]:
    return attempts_at(
        of,
        *[Answer(picked=p, correct=p in (of.correct_indices, *of.correct_indices)) for p in picks],
    )


async def summarize(results: list[tuple[MCQTask, Any]]) -> dict[str, Any]:
    return await Sums(solver=MockSolver()).get_full_summary(results)


async def test_tasks_are_named_by_eval_index_and_attempt_from_0() -> None:
    """Records and resumed runs are matched by these names."""
    tasks = await Sums(solver=MockSolver(), n_consensus=2).get_tasks()
    assert [(t.question_id, t.attempt_id) for t in tasks] == [
        (f"sums.{index}", attempt) for attempt in (0, 1) for index in range(10)
    ]


@pytest.mark.parametrize("indices", [{4}, {-1}, {0, 9}])
def test_correct_indices_must_be_answers(indices: set[int]) -> None:
    """A question that nobody can get right lowers every score unseen."""
    with pytest.raises(ValidationError, match="outside of the 4 answers"):
        Question(question="?", answers=list("abcd"), correct_indices=indices)


def test_a_question_needs_answers() -> None:
    """There would be nothing to pick."""
    with pytest.raises(ValidationError, match="no answers to choose from"):
        Question(question="?", answers=[], correct_indices=set())


@pytest.mark.parametrize("pair", [({0, 3}, {1, 2}), ({0, 4}, {1, 3}), ({0, 1, 4}, {0, 2, 3})])
async def test_different_sets_never_share_a_group(pair: tuple[set[int], set[int]]) -> None:
    """Sets of equal sums in one group would take over each other's verdict and votes."""
    wrong, right = pair
    question = Question(
        question="?", answers=list("abcde"), correct_indices=right, allow_multiple_choices=True
    )
    summary = await summarize(picked(wrong, right, right, of=question))
    assert summary["accuracy"] == pytest.approx(2 / 3)
    assert summary["consensus@3"] == 1.0


async def test_answers_far_down_a_long_list_are_told_apart() -> None:
    """Group ids made of digits or bits end at 10 or 63 answers."""
    question = Question(
        question="?",
        answers=[str(i) for i in range(100)],
        correct_indices={70, 99},
        allow_multiple_choices=True,
    )
    summary = await summarize(picked({70, 99}, {6, 99}, {70, 98}, of=question))
    assert summary["accuracy"] == pytest.approx(1 / 3)


async def test_a_set_counts_only_when_it_is_whole() -> None:
    """Half of the right answers is not the right answer."""
    summary = await summarize(picked({1, 3}, {1}, {1, 3, 0}, {3, 1}))
    assert summary["accuracy"] == 0.5


@pytest.mark.parametrize(("question", "pick"), [(PRIMES, 1), (SUMS[0], {1})])
async def test_a_pick_of_the_wrong_kind_names_the_task(question: Question, pick: Any) -> None:
    """A solver that knows nothing of several answers would be graded by another rule."""
    with pytest.raises(AssertionError, match=r"q\.0\.0: the solver picked"):
        await summarize(attempts_at(question, Answer(picked=pick, correct=True)))


async def test_failures_are_votes_for_nothing() -> None:
    """Two broken attempts must not outvote the answers that were given, but count as wrong."""
    error = RolloutSystemError("gone")
    right, wrong = (Answer(picked=i, correct=i == 1) for i in (1, 0))
    summary = await summarize(attempts_at(SUMS[0], right, right, error, wrong))
    assert summary["accuracy"] == pytest.approx(2 / 3)
    including = summary["metrics_including_errors"]
    assert (including["accuracy"], including["consensus@4"]) == (0.5, 1.0)
    assert (summary["accuracy_worst_case"], summary["accuracy_best_case"]) == (0.5, 0.75)
    assert summary["is_valid"] is False


async def test_the_solver_adds_its_own_metrics() -> None:
    """Solvers report what only they know (guesses, tool calls)."""

    @chz.chz
    class Counting(MockSolver):
        def compute_extra_metrics(self, results: Any, n_consensus: int) -> dict[str, Any]:
            return {"asked": len(results), "n_consensus": n_consensus}

    summary = await Sums(solver=Counting(), n_consensus=3).get_summary(picked({1}, {3}))
    assert (summary["asked"], summary["n_consensus"]) == (2, 3)


async def test_the_mock_solver_answers_alike_in_every_run() -> None:
    """A resumed run must report what the undisturbed one would have."""
    tasks = await Sums(solver=MockSolver(), n_consensus=20).get_tasks()
    once = [await MockSolver().solve(task) for task in tasks]
    assert once == [await MockSolver().solve(task) for task in tasks]
    # Half known, half guessed from four: 62.5 % right.
    assert 0.5 < sum(answer.correct for answer in once) / len(once) < 0.75
    several = MCQTask(question=PRIMES, question_id="q")
    assert isinstance((await MockSolver().solve(several)).picked, set)


@pytest.mark.parametrize(
    ("reply", "letters"),
    [
        ("Answer: B", "B"),
        ("answer: B", "B"),
        ("Answer: A\nNo, wait.\nAnswer: C", "C"),
        ("**Answer:** (C)", "C"),
        ("**Answer**: **C**", "C"),
        ("**Final answer: D**", "D"),
        ("Answer: $\\boxed{D}$.", "D"),
        ("Answer: \\text{B}", "B"),
        ("Answer:\n\nB", "B"),
        ("Answer: b", "B"),
        ("Answer: B) Paris", "B"),
        ("Answer: C. Because A is wrong", "C"),
        ("Answer: Option D", "D"),
        ("Answer: A\nAnswer: B!", "B"),
        ("Answer: B?", "B"),
        ("Answer: B</answer>", "B"),
        ("Answer: <B>", "B"),
        ("Answer: <b>B</b>", "B"),
        ("Answer: “B”", "B"),
        ("Answer: B– as shown", "B"),
        ("Answer： Ｂ。", "B"),
        ("Answer: c) Rome", "C"),
        ("Answer: [D] Bonn", "D"),
        ("Answer: A\nAnswer: unclear", "A"),
        ("Answer: A-level maths", ""),
        ("Answer: Both", ""),
        ("Answer: a dog", ""),
        ("Answer: E", ""),
        ("I would say B", ""),
        ("Answer:", ""),
        ("", ""),
    ],
)
def test_the_last_answer_line_is_read(reply: str, letters: str) -> None:
    """Models think aloud and change their mind; the first letter that shows is often not theirs."""
    assert read_letters(reply, 4, several=False) == {"ABCD".index(x) for x in letters}


@pytest.mark.parametrize(
    ("reply", "letters"),
    [
        ("Answer: A, C", "AC"),
        ("Answer: AC", "AC"),
        ("Answer: A, C and D", "ACD"),
        ("Answer: [B] & [D]", "BD"),
        ("Answer: B", "B"),
        ("Answer: A, B\nAnswer: C", "C"),
        ("Answer: A, C, since B is not", "AC"),
        ("Answer: a, c", "AC"),
        ("Answer: A, C!</answer>", "AC"),
        ("Answer: A. Apple, B. Banana", "AB"),
        ("Answer: (A) Apples, pears; and (D) Dates", "AD"),
        ("Answer: B. Because A, C and D are not", "B"),
        ("Answer: option A and option C.", "AC"),
        ("Answer: none", ""),
    ],
)
def test_several_letters_are_read_where_several_are_asked_for(reply: str, letters: str) -> None:
    """Reading one letter of several grades every such answer as wrong."""
    assert read_letters(reply, 4, several=True) == {"ABCD".index(x) for x in letters}


def test_the_prompt_shows_all_answers_and_the_image() -> None:
    """A model that is not shown an answer cannot pick it."""
    assert format_question(SUMS[0]) == "1 + 1?\n\n(A) 1\n(B) 2\n(C) 0\n(D) -1"
    image = base64.b64encode(b"\xff\xd8\xff\xe0 a JPEG").decode()
    shown = PRIMES.model_copy(update={"image": image})
    [message] = make_messages(shown)
    url, text = message["content"]
    assert url["image_url"]["url"] == f"data:image/jpeg;base64,{image}"
    assert "all right answers" in text["text"]
    too_many = Question(question="?", answers=["x"] * 27, correct_indices={0})
    with pytest.raises(ValueError, match="27 answers"):
        make_messages(too_many)


async def solve(reply: str, question: Question) -> Answer:
    solver = OpenAIAPIMCQSolver(model=ScriptedModel(reply=reply))
    return await solver.solve(MCQTask(question=question, question_id="q.0", attempt_id=0))


async def test_several_right_letters_are_right() -> None:
    """A whole set must be graded as a set."""
    answer = await solve("Thinking ...\nAnswer: B, D", PRIMES)
    assert (answer.picked, answer.correct) == ({1, 3}, True)
    assert answer.metadata == {"correct_format": True}


async def test_a_reply_without_a_letter_is_a_guess_that_shows() -> None:
    """A guess must be the same in every run, and counted, or a bad prompt reads as a bad model."""
    answer = await solve("I have no idea.", SUMS[0])
    assert answer == await solve("Still none.", SUMS[0])
    assert answer.metadata == {"random_guess": True}
    assert isinstance((await solve("None.", PRIMES)).picked, set)
    solver = OpenAIAPIMCQSolver(model="any")
    summary = await Sums(solver=solver).get_summary(attempts_at(SUMS[0], answer))
    assert summary["num_random_guesses"] == 1


def test_the_solver_takes_a_name_or_a_model_on_the_command_line() -> None:
    """Existing command lines give a name; new ones configure the model."""
    base = ["solver=nanoeval.solvers.mcq_api:OpenAIAPIMCQSolver"]
    by_name = chz.entrypoint(Sums, argv=[*base, "solver.model=gpt-4o"])
    assert by_name.solver.model == "gpt-4o"
    model = ["solver.model=nanoeval.models.openai_api:OpenAIModel", "solver.model.name=tiny"]
    configured = chz.entrypoint(Sums, argv=[*base, *model])
    assert configured.solver.model == OpenAIModel(name="tiny")
    assert MCQAPISolver is OpenAIAPIMCQSolver
    assert pickle.loads(pickle.dumps(by_name)) == by_name


def answer_from_the_last_digit(request: Request) -> str:
    """Right ("B") for all sums but those of 3 and 7."""
    return "Answer: A" if request.prompt.splitlines()[2].startswith(("3", "7")) else "Answer: B"


async def test_a_run_over_http_scores_exactly(tmp_path: Path, monkeypatch: Any) -> None:
    """Faults must cost tries, not points; the records must hold every call and verdict."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    faults = ["429:0.1", "cut:0.1"]
    async with ScriptedServer(answer_from_the_last_digit, models=["m"], faults=faults) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        records = tmp_path / "records.jsonl"
        summary = await nanoeval.run(
            EvalSpec(
                eval=Sums(solver=OpenAIAPIMCQSolver(model="m"), n_consensus=3),
                runner=RunnerArgs(recorder=JsonRecorderConfig(filename=records)),
            )
        )
    assert summary["accuracy"] == pytest.approx(0.8)
    assert summary["consensus@3"] == summary["pass@3"] == pytest.approx(0.8)
    assert (summary["num_questions"], summary["num_attempts"]) == (10, 30)
    assert (summary["is_valid"], summary["num_random_guesses"]) == (True, 0)
    events = [json.loads(line) for line in records.read_text().splitlines()]
    matches = [event for event in events if event["record_type"] == "match"]
    assert sum(event["correct"] for event in matches) == 24
    assert {(event["picked"], *event["expected"]) for event in matches} == {(0, 1), (1, 1)}
    assert sum(event["record_type"] == "sampling" for event in events) >= 30
    assert "sk-test" not in records.read_text()


async def test_the_solver_is_entered_around_the_run() -> None:
    """Solvers open clients and containers in `_context`."""
    log: list[str] = []

    @chz.chz
    class Entered(MockSolver):
        @asynccontextmanager
        async def _context(self) -> AsyncGenerator[None, None]:
            log.append("in")
            yield
            log.append("out")

    async with Sums(solver=Entered()):
        assert log == ["in"]
    assert log == ["in", "out"]
