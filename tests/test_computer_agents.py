"""Agents: a model with tools against a scripted server, a task's own solution, a person."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from typing import Any

import chz
import pytest

import nanoeval
from nanoeval.eval import EvalSpec, RolloutSystemError, RunnerArgs
from nanoeval.models.openai_api import RequestRefused
from nanoeval.solvers.computer_tasks.agents import BashAgentSolver, GoldSolver, UserSolver
from nanoeval.solvers.computer_tasks.code_execution_interface import (
    ComputerInterface,
    ComputerSetupError,
    RuntimeConfig,
)
from nanoeval.solvers.computer_tasks.limits import LimitsHelper
from nanoeval.solvers.computer_tasks.runtimes import LocalRuntime
from nanoeval.solvers.computer_tasks.solver import PythonCodingEval
from nanoeval.solvers.computer_tasks.steps import FinalResult, Step
from nanoeval.solvers.computer_tasks.task import ComputerTask, Grade, NotAGradeError
from nanoeval.testing import Fault, Reply, Request, ScriptedServer
from tests.computer.fakes import AnswerTask, GoldAnswerTask, ScriptedRuntime


def call(name: str, **arguments: Any) -> Reply:
    """A reply that calls one tool."""
    return calls((name, json.dumps(arguments)))


def calls(*pairs: tuple[str, str]) -> Reply:
    made = [
        {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(pairs)
    ]
    return Reply(None, finish_reason="tool_calls", fields={"tool_calls": made})


def play(*replies: Reply | str) -> Callable[[Request], Reply | str]:
    """A script that gives the n-th reply to a conversation in which the model spoke n times."""

    def script(request: Request) -> Reply | str:
        n_spoken = sum(message["role"] == "assistant" for message in request.messages)
        return replies[min(n_spoken, len(replies) - 1)]

    return script


SOLVE = call("bash", command="echo $(($(cat question.txt))) > answer.txt")
SUBMIT = call("submit")


def solver(server: ScriptedServer, **fields: Any) -> BashAgentSolver:
    fields = {"runtime": LocalRuntime(), **fields}
    return BashAgentSolver(model="scripted", base_url=server.base_url, **fields)


async def rollout(solver: Any, task: ComputerTask) -> tuple[list[Step], FinalResult]:
    """Its steps and its result."""
    items = [item async for item in solver.run(task)]
    assert isinstance(items[-1], FinalResult)
    return items[:-1], items[-1]


async def test_an_agent_does_a_task_step_by_step() -> None:
    """The model sees what its commands printed, and every action is a graded step."""
    look = call("bash", command="cat question.txt; exit 3")
    async with ScriptedServer(play(look, SOLVE, SUBMIT)) as server:
        steps, result = await rollout(solver(server), AnswerTask(hints=["it is a sum"]))
        seen = server.requests[1].messages
    assert [step.grade.score for step in steps] == [0, 1]
    assert result.correct
    assert (result.max_steps_reached, result.max_time_reached) == (False, False)
    assert not result.max_tokens_reached
    assert [m["role"] for m in seen] == ["system", "user", "user", "assistant", "tool"]
    assert "it is a sum" in seen[2]["content"]
    assert seen[-1]["content"] == "7+7\n\n[exit code 3]"
    assert len(result.convo.messages) == 8
    assert len(steps[0].convo.messages) == 5, "a step must not grow after it was yielded"


async def test_python_is_offered_where_the_computer_has_it() -> None:
    """One session for all cells; what goes wrong in one is shown to the model."""
    pytest.importorskip("ipykernel", reason='pip install "nanoeval[computer]"')
    cells = [call("python", code=code) for code in ("x = 14\nprint('hi')\nx", "1/0", "x + 1")]
    async with ScriptedServer(play(*cells, SUBMIT)) as server:
        _, result = await rollout(solver(server), AnswerTask(grade_every_step=False))
        tools = [tool["function"]["name"] for tool in server.requests[0].body["tools"]]
        without = solver(server, runtime=ScriptedRuntime())
        await rollout(without, AnswerTask())
        tools_without = [t["function"]["name"] for t in server.requests[-1].body["tools"]]
    shown = [m["content"] for m in result.convo.messages if m["role"] == "tool"]
    assert tools == ["bash", "python", "submit"]
    assert tools_without == ["bash", "submit"]
    assert shown[0] == "hi\n14"
    assert "ZeroDivisionError" in shown[1]
    assert shown[2] == "15"


async def test_a_steps_grade_is_left_out_where_the_task_wants_none() -> None:
    """Graders may be dear, or change the computer."""
    async with ScriptedServer(play(SOLVE, SUBMIT)) as server:
        steps, result = await rollout(solver(server), AnswerTask(grade_every_step=False))
    assert [step.grade for step in steps] == [None]
    assert result.correct


async def test_exactly_max_actions_actions_are_taken() -> None:
    """The rollout ends at its limit, is graded, and says which limit it was."""
    async with ScriptedServer(lambda request: call("bash", command="ls")) as server:
        agent = solver(server, limits=LimitsHelper(max_actions=3))
        steps, result = await rollout(agent, AnswerTask())
    assert len(steps) == 3
    assert result.max_steps_reached
    assert not result.correct


async def test_the_time_limit_ends_the_work_and_the_rollout_is_graded() -> None:
    """A command in flight is killed; what was done before counts."""
    endless = call("bash", command="sleep 100")
    async with ScriptedServer(play(SOLVE, endless)) as server:
        agent = solver(server, limits=LimitsHelper(max_time_seconds=1.5))
        _, result = await rollout(agent, AnswerTask())
    assert result.max_time_reached
    assert result.correct


async def test_the_token_limit_ends_the_work() -> None:
    """Tokens of all calls count together; a context that is full is such a limit too."""
    dear = Reply("", fields=SOLVE.fields, prompt_tokens=900, completion_tokens=200)
    async with ScriptedServer(lambda request: dear) as server:
        agent = solver(server, limits=LimitsHelper(max_tokens=1000))
        steps, result = await rollout(agent, AnswerTask())
        assert (len(steps), server.num_requests) == (1, 1)
    assert result.max_tokens_reached
    assert result.correct


async def test_what_a_command_prints_is_shown_at_both_ends() -> None:
    """A model's context is dear; the end of an output says most."""
    loud = call("bash", command="echo first; seq 100000; echo last")
    async with ScriptedServer(play(loud, SUBMIT)) as server:
        _, result = await rollout(solver(server, max_output_chars=1000), AnswerTask())
    (shown,) = [m["content"] for m in result.convo.messages if m["role"] == "tool"]
    assert len(shown) < 1100
    assert shown.startswith("first")
    assert shown.endswith("last\n")
    assert "characters left out" in shown


async def test_an_endless_command_is_killed_and_told_to_the_model() -> None:
    """It loses its time, not the rollout."""
    endless = call("bash", command="echo so far; sleep 100")
    async with ScriptedServer(play(endless, SOLVE, SUBMIT)) as server:
        _, result = await rollout(solver(server, command_timeout=0.5), AnswerTask())
    first = next(m["content"] for m in result.convo.messages if m["role"] == "tool")
    assert "so far" in first
    assert "took longer than 0.5 seconds" in first
    assert result.correct


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("bash", "not json"), "JSON object"),
        (("bash", '{"cmd": "ls"}'), 'string "command"'),
        (("browse", "{}"), "no tool 'browse'"),
        (("bash", "[1]"), "JSON object"),
    ],
)
async def test_a_call_that_makes_no_sense_is_answered(asked: tuple[str, str], told: str) -> None:
    """Models do that; they can put it right."""
    async with ScriptedServer(play(calls(asked), SOLVE, SUBMIT)) as server:
        _, result = await rollout(solver(server), AnswerTask())
    assert told in next(m["content"] for m in result.convo.messages if m["role"] == "tool")
    assert result.correct


async def test_several_calls_in_one_reply_are_all_answered() -> None:
    """Servers refuse a conversation in which a call has no answer."""
    two = calls(("bash", '{"command": "echo a"}'), ("bash", '{"command": "echo b"}'))
    async with ScriptedServer(play(two, SUBMIT)) as server:
        steps, _ = await rollout(solver(server), AnswerTask())
        answered = [m for m in server.requests[-1].messages if m["role"] == "tool"]
    assert [(m["tool_call_id"], m["content"]) for m in answered] == [("c0", "a\n"), ("c1", "b\n")]
    assert len(steps) == 2


class PokableTask(AnswerTask):
    """A submission is valid as soon as there is an answer."""

    retry_message: str = "There is no answer.txt."

    async def check_for_valid_submission(
        self, computer: ComputerInterface, runtime_config: RuntimeConfig
    ) -> bool:
        return (await computer.send_shell_command("test -e answer.txt")).exit_code == 0


@pytest.mark.parametrize("ending", [SUBMIT, Reply("I cannot do that.")])
async def test_a_model_that_gives_up_is_poked_as_often_as_allowed(ending: Reply) -> None:
    """With and without the submit tool; the retry message is what it reads."""
    async with ScriptedServer(play(ending, SOLVE, SUBMIT)) as server:
        _, poked = await rollout(solver(server, max_pokes=1), PokableTask())
        _, unpoked = await rollout(solver(server), PokableTask())
    assert poked.correct
    assert {"role": "user", "content": "There is no answer.txt."} in poked.convo.messages
    assert not unpoked.correct
    async with ScriptedServer(lambda request: ending) as server:
        _, stubborn = await rollout(solver(server, max_pokes=2), PokableTask())
        assert server.num_requests == 3
    assert not stubborn.correct


async def test_time_limits_stand_still_while_the_server_makes_it_wait() -> None:
    """A rate limit is nobody's fault, least of all the model's."""
    faults = [Fault("429", requests=[1, 2], retry_after=1.0)]
    async with ScriptedServer(play(SOLVE, SUBMIT), faults=faults) as server:
        agent = solver(server, limits=LimitsHelper(max_time_seconds=1.0))
        _, result = await rollout(agent, AnswerTask())
        assert server.num_requests == 4
    assert result.correct
    assert not result.max_time_reached


async def test_a_server_that_stays_away_is_a_system_error() -> None:
    """The rollout is retried by the runner; a refusal is not."""
    async with ScriptedServer("", faults=[Fault("500")]) as server:
        with pytest.raises(RolloutSystemError, match="500"):
            await rollout(solver(server, max_model_tries=2), AnswerTask())
    async with ScriptedServer("", faults=[Fault("401")]) as server:
        with pytest.raises(RequestRefused, match="401"):
            await rollout(solver(server), AnswerTask())


class RaisingTask(AnswerTask):
    async def grade(self, computer: ComputerInterface, runtime_config: RuntimeConfig) -> Grade:
        raise KeyError("expected.json")


class SlowTask(AnswerTask):
    async def grade(self, computer: ComputerInterface, runtime_config: RuntimeConfig) -> Grade:
        await computer.check_shell_command("sleep 100")
        return Grade(score=1, grader_log="")


class NumberTask(AnswerTask):
    async def grade(self, computer: ComputerInterface, runtime_config: RuntimeConfig) -> Grade:
        return 1.0  # type: ignore[return-value]


async def test_a_grader_that_fails_is_a_system_error_that_names_the_task() -> None:
    """It says nothing about the model; one that returns no Grade is a mistake to be mended."""
    async with ScriptedServer(play(SUBMIT)) as server:
        agent = solver(server, limits=LimitsHelper(grading_timeout=0.5))
        with pytest.raises(RolloutSystemError, match=r"grader of answer\.1 failed: KeyError"):
            await rollout(agent, RaisingTask())
        with pytest.raises(RolloutSystemError, match=r"Timeout grading of 0\.5 seconds"):
            await rollout(agent, SlowTask())
        with pytest.raises(NotAGradeError, match=r"NumberTask\.grade returned float"):
            await rollout(agent, NumberTask())


async def test_a_rollout_that_is_cancelled_leaves_no_computer(tmp_path: Any) -> None:
    """Ctrl-C in the middle of a command."""
    runtime = LocalRuntime(root=str(tmp_path))
    async with ScriptedServer(lambda request: call("bash", command="sleep 100")) as server:
        working = asyncio.create_task(rollout(solver(server, runtime=runtime), AnswerTask()))
        await asyncio.sleep(1)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
    assert list(tmp_path.iterdir()) == []


class ScriptGoldTask(AnswerTask):
    gold_solution: str = "echo 14 > answer.txt"


async def test_a_gold_solution_is_found_right() -> None:
    """How a task's author tests a grader; a method or a shell script."""
    gold = GoldSolver(runtime=LocalRuntime())
    for task in (GoldAnswerTask(), ScriptGoldTask()):
        _, result = await rollout(gold, task)
        assert result.correct
    with pytest.raises(RolloutSystemError, match="AnswerTask has no gold_solution"):
        await rollout(gold, AnswerTask())


async def test_a_person_can_play(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They see the prompt and what their commands print."""
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("cat question.txt\n\necho 14 > answer.txt\nexit\n")
    )
    _, result = await rollout(UserSolver(runtime=LocalRuntime()), AnswerTask())
    assert result.correct
    shown = capsys.readouterr().out
    assert "write 14 into answer.txt" in shown
    assert "7+7" in shown
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    _, at_once = await rollout(UserSolver(runtime=LocalRuntime()), AnswerTask())
    assert not at_once.correct


@chz.chz
class AnswerEval(PythonCodingEval):
    n_instances: int = 3

    async def get_instances(self) -> list[ComputerTask]:
        return [AnswerTask(question_id=f"answer-{i}") for i in range(self.n_instances)]


async def test_an_eval_of_an_agent_runs_through_the_engine() -> None:
    """Solver, recorder, retries and summary together."""
    faults = [Fault("500", rate=0.2, first_tries=1)]
    async with ScriptedServer(play(SOLVE, SUBMIT), faults=faults) as server:
        spec = EvalSpec(
            eval=AnswerEval(solver=solver(server), n_tries=2),
            runner=RunnerArgs(concurrency=3, enable_slackbot=False),
        )
        summary = await nanoeval.run(spec)
    assert summary["accuracy"] == 1.0
    assert summary["aggregations"]["num_attempts"] == 6
    assert summary["length_stats"]["convo_len_percentiles"] == [5.0, 5.0, 5.0]


async def test_a_solver_checks_its_runtime_before_the_first_rollout() -> None:
    """Without an engine, one line at once is better than many retries."""

    @chz.chz
    class NoRuntime(LocalRuntime):
        async def check(self) -> None:
            raise ComputerSetupError("nothing runs here")

    agent = BashAgentSolver(model="m", runtime=NoRuntime())
    with pytest.raises(ComputerSetupError, match="nothing runs here"):
        async with AnswerEval(solver=agent):
            pass


def test_an_agent_is_configured_with_checked_values() -> None:
    """The message names field and value."""
    with pytest.raises(ValueError, match="max_pokes=-1"):
        BashAgentSolver(model="m", max_pokes=-1)
    assert BashAgentSolver(model="org/m").shortname() == "bash-agent-org_m"
