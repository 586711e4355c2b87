"""`python -m nanoeval.bin.demo`: what the library is for, in ten seconds, without a model or a key.

Starts a scripted server, has it answer several hundred self-made questions over real HTTP while it
fails on purpose now and then, and prints what a person would want to know.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import chz

import nanoeval
from nanoeval import Eval, EvalSpec, RunnerArgs
from nanoeval.fs_paths import database_dir
from nanoeval.json_recorder import ENV_LOG_DIR, json_recorder
from nanoeval.models.openai_api import OpenAIModel
from nanoeval.recorder_protocol import uuid
from nanoeval.setup import global_exit_stack, nanoeval_entrypoint
from nanoeval.solvers import mcq, short_answer
from nanoeval.solvers.mcq_api import OpenAIAPIMCQSolver, format_question
from nanoeval.testing import Fault, Reply, Request, ScriptedServerProcess, ServerStats

NUM_CHOICE_QUESTIONS = 300
NUM_SUMS = 150
ATTEMPTS_PER_SUM = 3
CONCURRENCY = 64
MODEL_NAME = "demo-model"
FAULTS = (
    Fault("429", rate=0.03, retry_after=0.3),
    Fault("500", rate=0.02),
    Fault("cut", rate=0.02),
)
FAULT_NAMES = {"429": "too many requests", "500": "server error", "cut": "connection cut"}
FIRST_EVAL = "examples/my_first_eval.py"
SUM_PROMPT = "Work this out and answer with the number alone."


@chz.chz
class Properties(mcq.MCQEval):
    """Which of four numbers has a property; one attempt each."""

    def get_name(self) -> str:
        return "multiple-choice"

    async def _get_tasks(self) -> list[mcq.Question]:
        return choice_questions(NUM_CHOICE_QUESTIONS)


@chz.chz
class Arithmetic(short_answer.ShortAnswerEval):
    """Word problems with a number as answer; several attempts each."""

    def get_name(self) -> str:
        return "short-answer"

    async def _get_tasks(self) -> list[short_answer.Question]:
        return word_problems(NUM_SUMS)


@chz.chz
class NumberSolver(short_answer.ShortAnswerSolver):
    """Asks the model and compares its reply with the expected number, letter by letter."""

    model: OpenAIModel

    async def solve(self, task: short_answer.ShortAnswerTask) -> short_answer.Answer:
        reply = await self.model.complete(f"{SUM_PROMPT}\n\n{task.question.question}")
        answer = reply.text.strip()
        expected = task.question.metadata["answer"]
        return short_answer.Answer(answer=answer, is_correct=answer == expected)


def choice_questions(count: int) -> list[mcq.Question]:
    """`count` different questions with four answers, one of them right; the same every time."""
    draw = random.Random("choice questions")
    asked: dict[str, mcq.Question] = {}
    while len(asked) < count:
        divisor = draw.choice([3, 7, 11, 13])
        right = divisor * draw.randint(12, 70)
        wrong = {right + draw.randint(1, divisor - 1) + divisor * i for i in (-3, 1, 4)}
        numbers = draw.sample([right, *sorted(wrong)], 4)
        text = f"Which of the numbers {', '.join(map(str, numbers))} is divisible by {divisor}?"
        answers = [str(number) for number in numbers]
        asked[text] = mcq.Question(
            question=text, answers=answers, correct_indices={numbers.index(right)}
        )
    return list(asked.values())


def word_problems(count: int) -> list[short_answer.Question]:
    """`count` different problems, each with its answer in `metadata`; the same every time."""
    draw = random.Random("word problems")
    asked: dict[str, short_answer.Question] = {}
    while len(asked) < count:
        boxes, each, broken = draw.randint(3, 19), draw.randint(4, 24), draw.randint(1, 9)
        text = (
            f"A shop gets {boxes} boxes with {each} cups each; {broken} cups are broken."
            " How many are whole?"
        )
        asked[text] = short_answer.Question(
            question=text, metadata={"answer": str(boxes * each - broken)}
        )
    return list(asked.values())


def reply_rules() -> dict[str, tuple[str, str]]:
    """For each question as the server reads it: a right reply and a wrong one."""
    rules = {}
    for choice in choice_questions(NUM_CHOICE_QUESTIONS):
        (right,) = choice.correct_indices
        letters = "ABCD"[right], "ABCD"[(right + 1) % 4]
        rules[format_question(choice)] = letters
    for problem in word_problems(NUM_SUMS):
        answer = problem.metadata["answer"]
        rules[problem.question] = (answer, str(int(answer) + 1))
    return rules


def scripted_reply(rules: Mapping[str, tuple[str, str]], request: Request) -> Reply:
    """Right four times in five, oftener on some questions than on others, after 0.1 to 0.4 s."""
    question = request.prompt.partition("\n\n")[2]
    right, wrong = rules[question]
    skill = random.Random(question).choice([0.5, 0.8, 0.9, 1.0])
    draw = random.Random(f"{question} {request.try_number}")
    answer = right if draw.random() < skill else wrong
    is_choice = "(A)" in question
    text = f"I divide them one by one.\nAnswer: {answer}" if is_choice else answer
    return Reply(text, latency=draw.uniform(0.1, 0.4))


async def run_demo() -> None:
    """Run both evals against the server and print what came of them."""
    rules = reply_rules()
    run_set_id = f"demo-{uuid()}"
    records = Path(os.environ.get(ENV_LOG_DIR) or "records") / f"{run_set_id}.jsonl"
    async with ScriptedServerProcess(
        reply=lambda request: scripted_reply(rules, request), faults=FAULTS, models=[MODEL_NAME]
    ) as server:
        print(opening(server.base_url), flush=True)
        started = time.perf_counter()
        summaries = await run_evals(server.base_url, run_set_id, records)
        seconds = time.perf_counter() - started
        stats = await asyncio.to_thread(server.stats)
    print()
    print(table(summaries))
    print()
    print(accounts(summaries, stats, seconds, records, database_dir() / f"{run_set_id}.db"))
    print()
    print(next_steps(records))


async def run_evals(base_url: str, run_set_id: str, records: Path) -> dict[str, dict[str, Any]]:
    """Run both evals, one after the other, and give their summaries by name."""
    # One try per request leaves the retries to the runner, whose bar counts them.
    model = OpenAIModel(name=MODEL_NAME, base_url=base_url, max_tries=1)
    runner = RunnerArgs(
        concurrency=CONCURRENCY,
        run_set_id=run_set_id,
        recorder=json_recorder(records),
        model_name=MODEL_NAME,
        retry_backoff=0.1,
    )
    evals: list[Eval[Any, Any]] = [
        Properties(solver=OpenAIAPIMCQSolver(model=model)),
        Arithmetic(solver=NumberSolver(model=model), samples_per_question=ATTEMPTS_PER_SUM),
    ]
    async with model, global_exit_stack:
        return {e.get_name(): await nanoeval.run(EvalSpec(eval=e, runner=runner)) for e in evals}


def opening(base_url: str) -> str:
    """What is about to happen."""
    return (
        f"A scripted server at {base_url} plays the model.\n"
        f"It gets {NUM_CHOICE_QUESTIONS} multiple-choice questions, and {NUM_SUMS} word problems"
        f" {ATTEMPTS_PER_SUM} times each,\n"
        "takes 0.1 to 0.4 s for a reply, and fails 7 % of all requests on purpose.\n"
    )


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per eval: how many questions and attempts, and the scores with their errors."""
    best_of = f"pass@{ATTEMPTS_PER_SUM}"
    head = ["", "questions", "attempts", "accuracy", "std. err.", "95 % interval", best_of]
    rows = [head]
    for name, summary in summaries.items():
        low, high = summary["accuracy_ci95"]
        rows.append(
            [
                name,
                str(summary["num_questions"]),
                str(summary["num_attempts"]),
                f"{summary['accuracy']:.3f}",
                f"{summary['accuracy_stderr']:.3f}",
                f"{low:.3f} - {high:.3f}",
                f"{summary[best_of]:.3f}" if best_of in summary else "-",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def accounts(
    summaries: Mapping[str, Mapping[str, Any]],
    stats: ServerStats,
    seconds: float,
    records: Path,
    database: Path,
) -> str:
    """What the server counted, what became of the failures, and where everything lies."""
    num_rollouts = sum(summary["num_rollouts"] for summary in summaries.values())
    num_failed = sum(summary["num_failed"] for summary in summaries.values())
    faults = ", ".join(f"{n} x {FAULT_NAMES[kind]}" for kind, n in sorted(stats.faults.items()))
    return "\n".join(
        [
            f"Requests   {stats.num_requests:,} for {num_rollouts:,} rollouts in {seconds:.1f} s,"
            f" at most {stats.max_in_flight} in flight",
            f"Failures   {faults};",
            f"           all retried: {num_failed} rollouts without a result",
            f"Records    {records}  (prompts, replies, verdicts)",
            f"Database   {database}",
        ]
    )


def next_steps(records: Path) -> str:
    """Commands that work from here."""
    is_checkout = Path(FIRST_EVAL).exists()
    # The environment need not be activated.
    is_on_path = shutil.which("python") == sys.executable
    python = "python" if is_on_path else os.path.relpath(sys.executable)
    steps = {
        f"grep '\"correct\": *false' {records} | head -3": "three of the wrong answers",
        **({f"{python} {FIRST_EVAL}": "a whole eval in one file: copy it"} if is_checkout else {}),
        f"{python} -m nanoeval.bin.ls": "the runs on this machine and their scores",
        f"{python} -m nanoeval.testing.server --help": "this server, for tests of your own evals",
    }
    return "What to try next\n" + "\n".join(f"  {do}\n      {why}" for do, why in steps.items())


if __name__ == "__main__":
    nanoeval_entrypoint(run_demo())
