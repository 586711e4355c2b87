"""GSM8K: its three plain functions, and whole runs against a real server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import nanoeval
from nanoeval import EvalSpec, RunnerArgs
from nanoeval.evals.gsm8k import GSM8K, load, prompt, score
from nanoeval.models.openai_api import OpenAIModel
from nanoeval.recorder import dummy_recorder
from nanoeval.testing import Request, ScriptedServer

HERE = Path(__file__).parent
SHARED = HERE.parents[1] / "shared" / "data"
needs_real_data = pytest.mark.skipif(
    not (SHARED / "openai/gsm8k/main/test.jsonl").is_file(),
    reason=f"put the GSM8K test split at {SHARED}/openai/gsm8k/main/test.jsonl",
)


@pytest.fixture
def fixtures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOEVAL_DATASETS_DIR", str(HERE / "fixtures" / "datasets"))


def test_problems_carry_their_final_number(fixtures: None) -> None:
    """The reference solutions hold many numbers, with commas and signs; the last one counts."""
    tasks = load()
    assert [task.answer for task in tasks] == ["41", "5000", "-12", "15", "30"]
    assert [task.question_id for task in tasks] == [f"gsm8k.{i}" for i in range(5)]
    assert "hare" in tasks[0].question


def test_the_prompt_asks_the_question_and_says_how_to_answer() -> None:
    """A model that is not told the form of the answer is graded on a guess of ours."""
    assert prompt("How many?").endswith("\n\nHow many?")
    assert '"Answer: N"' in prompt("How many?")


@pytest.mark.parametrize(
    ("reply", "picked"),
    [
        ("Answer: 18", "18"),
        ("First 3, then 15. So **Answer:** $18.00", "18"),
        ("Answer: 5\nNo, I forgot some.\nAnswer: 18 eggs, at $2 each", "18"),
        ("3 + 15 = 18.", "18"),
        ("Answer: eighteen, 18", "18"),
        ("It is 18.\nAnswer: see above", "18"),
        ("Answer: 1,800", "1800"),
        ("Answer: $1,234,567.50", "1234567.5"),
        ("Answer: -18", "-18"),
        ("The balance is -$18", "-18"),
        ("23-18", "18"),
        ("Answer: 0.50", "0.5"),
        ("Answer: .5", "0.5"),
        ("Answer: 18%", "18"),
        ("Answer: -0", "0"),
        ("Answer: eighteen", None),
        ("", None),
    ],
)
def test_the_number_of_a_reply(reply: str, picked: str | None) -> None:
    """Models write numbers in many ways; a spelling must not decide the score."""
    graded = score(reply, "18")
    assert graded.picked == picked
    assert graded.correct is (picked == "18")


async def run_against(server: ScriptedServer, attempts: int = 1) -> dict[str, Any]:
    model = OpenAIModel(name="m", base_url=server.base_url, retry_backoff=0.01)
    runner = RunnerArgs(recorder=dummy_recorder(log=False), concurrency=64, retry_backoff=0.01)
    return await nanoeval.run(EvalSpec(eval=GSM8K(model=model, attempts=attempts), runner=runner))


async def test_a_small_run_votes_on_numbers(fixtures: None) -> None:
    """18 and 18.0 are one vote; a summary names the data that it stands on."""

    def reply(request: Request) -> str:
        # The same body comes once per attempt.
        if "juice" in request.prompt:
            return ["Answer: 15", "Answer: 15.00", "Answer: 14"][request.try_number % 3]
        return "Answer: 41"

    async with ScriptedServer(reply, models=["m"]) as server:
        summary = await run_against(server, attempts=3)
    assert summary["accuracy"] == pytest.approx((1 + 2 / 3) / 5)
    assert summary["consensus@3"] == pytest.approx(2 / 5)
    assert summary["pass@3"] == pytest.approx(2 / 5)
    assert summary["dataset"].endswith("openai/gsm8k/main/test.jsonl")


@needs_real_data
def test_the_real_split_loads_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every real solution must give a number, and grade itself as right."""
    monkeypatch.setenv("NANOEVAL_DATASETS_DIR", str(SHARED))
    tasks = load()
    assert len(tasks) == 1319
    assert all(re.fullmatch(r"-?\d+", task.answer) for task in tasks)
    assert all(score(f"So it is {int(t.answer):,}.", t.answer).correct for t in tasks)


@needs_real_data
async def test_the_real_split_scores_exactly_under_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 % of broken replies must change nothing: the rule is wrong on every fifth problem."""
    monkeypatch.setenv("NANOEVAL_DATASETS_DIR", str(SHARED))
    tasks = load()
    answers = {prompt(t.question): (i, int(t.answer)) for i, t in enumerate(tasks)}
    num_right = sum(i % 5 != 0 for i, _ in answers.values())
    assert len(answers) == 1319

    def reply(request: Request) -> str:
        index, answer = answers[request.prompt]
        return f"Step by step ...\nAnswer: ${answer if index % 5 else answer + 1:,}"

    faults = ["429:0.02", "500:0.02", "cut:0.01"]
    async with ScriptedServer(reply, models=["m"], faults=faults) as server:
        summary = await run_against(server)
        assert sum(server.faults.values()) > 20
    assert summary["accuracy"] == num_right / 1319
    assert (summary["num_questions"], summary["num_missing"]) == (1319, 0)
    assert summary["is_valid"] is True
