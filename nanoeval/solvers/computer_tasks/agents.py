"""Agents for computer tasks: a model with a shell, a task's own solution, a person, a dummy."""

from __future__ import annotations

import asyncio
import inspect
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import chz
import structlog

from nanoeval.asyncio_utils import generator_with_cleanup
from nanoeval.eval import RolloutSystemError
from nanoeval.models.openai_api import OpenAIModel, RequestRefused, ServerFailure
from nanoeval.models.protocol import Completion
from nanoeval.solvers.computer_tasks._agent_tools import SUBMIT, ToolCall, Tools, parse_calls
from nanoeval.solvers.computer_tasks.code_execution_interface import (
    ComputerInterface,
    ComputerRuntime,
    ComputerSetupError,
)
from nanoeval.solvers.computer_tasks.limits import ActionLimitExceededError, LimitsHelper
from nanoeval.solvers.computer_tasks.pausable_timer import (
    NamedTimeoutError,
    pause_all_pausable_timers,
)
from nanoeval.solvers.computer_tasks.runtimes import DockerRuntime
from nanoeval.solvers.computer_tasks.simple_solver import (
    ComputerRuntimeSolver,
    DummySolver,
    SimpleSolver,
    UserSolver,
)
from nanoeval.solvers.computer_tasks.steps import Conversation, FinalResult, Step
from nanoeval.solvers.computer_tasks.task import ComputerTask, Grade, NotAGradeError

__all__ = ["BashAgentSolver", "DummySolver", "GoldSolver", "UserSolver"]

logger = structlog.stdlib.get_logger(component=__name__)

DEFAULT_SYSTEM_PROMPT = (
    "You work on a Linux computer through tools; nobody answers questions. Every bash command runs"
    " in a fresh shell in the task's working directory, so a `cd` or a variable does not outlast"
    " its command. Look before you change anything, check your result, and call submit when the"
    " task is done."
)
_LONGEST_WAIT = 60.0
_CONTEXT_TOO_LONG = re.compile(r"context|too long|maximum.{0,40}tokens", re.IGNORECASE)


class _TokenLimitReached(Exception):
    """The model's calls have used up their tokens, or its context."""


@chz.chz
class BashAgentSolver(ComputerRuntimeSolver):
    """A model in a loop with tools: `bash`, `python` where the computer has Jupyter, and `submit`.

    The model is behind an OpenAI-compatible chat endpoint. A rollout ends when the model submits or
    answers without a tool call, or at a limit; it is graded in each case. While the model's server
    makes it wait, no time limit runs.
    """

    model: str = chz.field(doc="The model's name, as its server lists it.")
    base_url: str | None = chz.field(
        default=None, doc="Up to and with /v1; None = $OPENAI_BASE_URL, else OpenAI's own."
    )
    runtime: ComputerRuntime = chz.field(
        default_factory=DockerRuntime, doc="Where the computers come from."
    )
    limits: LimitsHelper = chz.field(
        default_factory=LimitsHelper, doc="Actions, tokens and seconds of a rollout."
    )
    system_prompt: str = chz.field(default=DEFAULT_SYSTEM_PROMPT, doc="The first message.")
    params: dict[str, Any] = chz.field(
        default_factory=dict, doc="Sent with every request (temperature, max_tokens, ...)."
    )
    max_pokes: int = chz.field(
        default=0, doc="How often a model that ends without a valid submission is sent back."
    )
    command_timeout: float = chz.field(default=300, doc="Seconds for one command or cell.")
    max_output_chars: int = chz.field(
        default=20_000, doc="What a model sees of an output: its start and its end."
    )
    max_model_tries: int = chz.field(
        default=20, doc="Tries of one model call before it is a system error."
    )

    @chz.init_property
    def _client(self) -> OpenAIModel:
        # One try per request: the waiting between tries is done here, with all timers held.
        return OpenAIModel(name=self.model, base_url=self.base_url, params=self.params, max_tries=1)

    @chz.validate
    def _check_values(self) -> None:
        for name, least in (("max_pokes", 0), ("max_output_chars", 2), ("max_model_tries", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")

    def shortname(self) -> str:
        return f"bash-agent-{self.model.replace('/', '_')}"

    @asynccontextmanager
    async def _context(self) -> AsyncGenerator[None, None]:
        await self.runtime.check()
        async with self._client:
            yield

    async def run(self, task: ComputerTask) -> AsyncGenerator[Step | FinalResult, None]:
        """Yield a Step per action, then the FinalResult.

        RolloutSystemError for what the system broke: the computer, the model's server, the grader.
        ComputerSetupError for a computer that is not what the task needs.
        """
        rollout = _Rollout(self, task)
        limits = self.limits
        try:
            async with limits.enforce_timeout("total_sample", limits.total_sample_timeout):
                async with self._started(task) as computer:
                    async with generator_with_cleanup(rollout.work(computer)) as steps:
                        async for step in steps:
                            # A time-out must not strike while our caller has the step.
                            with pause_all_pausable_timers():
                                yield step
                    grade = await rollout.grade(computer)
        except NamedTimeoutError as error:
            raise RolloutSystemError(f"{task.name}: {error}") from error
        yield rollout.final_result(grade)

    @asynccontextmanager
    async def _started(self, task: ComputerTask) -> AsyncIterator[ComputerInterface]:
        async with self.runtime.run(task) as computer:
            seconds = self.limits.validate_connection_limit
            async with self.limits.enforce_timeout("validate_connection", seconds):
                await computer.send_shell_command("true", idempotent=True)
            yield computer


class _Rollout:
    """One agent at work: its conversation, and which limits it ran into."""

    def __init__(self, solver: BashAgentSolver, task: ComputerTask) -> None:
        self._solver = solver
        self._task = task
        self._runtime_config = task.validate_runtime_config(solver.runtime.runtime_config)
        self._started = time.monotonic()
        self._messages: list[dict[str, Any]] = [
            {"role": "system", "content": solver.system_prompt},
            *task.prompt,
        ]
        if task.hints:
            hints = "\n".join(f"- {hint}" for hint in task.hints)
            self._messages.append({"role": "user", "content": f"Hints:\n{hints}"})
        self._n_tokens = 0
        self._n_pokes = 0
        self._reached: dict[str, Any] = {}

    async def work(self, computer: ComputerInterface) -> AsyncGenerator[Step, None]:
        """Let the model act until it is done or a limit is reached."""
        tools = Tools(computer, self._solver.command_timeout, self._solver.max_output_chars)
        try:
            async with self._solver.limits.enforce_rollout_limits() as count_action:
                while not await self._is_done(computer, calls := await self._ask(tools)):
                    for call in calls:
                        count_action()
                        self._messages.append(call.answer(await tools.use(call)))
                        yield await self._step(computer)
        except ActionLimitExceededError:
            self._reached["max_steps_reached"] = True
        except _TokenLimitReached:
            self._reached["max_tokens_reached"] = True
        except NamedTimeoutError as error:
            if error.timeout_type != "max_time":
                raise
            self._reached["max_time_reached"] = True

    async def grade(self, computer: ComputerInterface) -> Grade:
        """The task's verdict; RolloutSystemError where its grader raises or takes too long."""
        limits = self._solver.limits
        try:
            async with limits.enforce_timeout("grading", limits.grading_timeout):
                return await self._task.grade(computer, self._runtime_config)
        except (NotAGradeError, RolloutSystemError):
            raise
        except Exception as error:
            raise RolloutSystemError(
                f"the grader of {self._task.name} failed: {type(error).__name__}: {error}"
            ) from error

    def final_result(self, grade: Grade) -> FinalResult:
        """The result with the whole conversation."""
        return FinalResult(grade=grade, convo=self._conversation(), **self._reached)

    async def _ask(self, tools: Tools) -> list[ToolCall]:
        """Ask the model, put its reply into the conversation, return the calls in it."""
        limit = self._solver.limits.max_tokens
        if limit is not None and self._n_tokens >= limit:
            raise _TokenLimitReached
        completion = await self._complete(tools)
        usage = completion.usage
        self._n_tokens += (usage.prompt_tokens or 0) + (usage.completion_tokens or 0)
        message = completion.raw["choices"][0].get("message") or {}
        reply = {"role": "assistant", "content": completion.text}
        if message.get("tool_calls"):
            reply["tool_calls"] = message["tool_calls"]
        self._messages.append(reply)
        return parse_calls(message)

    async def _complete(self, tools: Tools) -> Completion:
        for n_failed in range(self._solver.max_model_tries):
            try:
                return await self._solver._client.complete(
                    self._messages, tools=tools.definitions()
                )
            except RequestRefused as error:
                if error.status in (400, 413) and _CONTEXT_TOO_LONG.search(error.body):
                    raise _TokenLimitReached from error
                raise
            except ServerFailure as error:
                if n_failed + 1 == self._solver.max_model_tries:
                    raise
                wait = error.retry_after or min(_LONGEST_WAIT, 0.5 * 2**n_failed)
                logger.info(f"{self._task.name}: waiting {wait:.1f} s for the model: {error}")
                with pause_all_pausable_timers():
                    await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    async def _is_done(self, computer: ComputerInterface, calls: list[ToolCall]) -> bool:
        """Whether the model has ended its work and need not be sent back to it."""
        submits = [call for call in calls if call.name == SUBMIT]
        if calls and not submits:
            return False
        if not await self._is_to_be_poked(computer):
            return True
        self._n_pokes += 1
        for call in calls:
            self._messages.append(call.answer("not accepted"))
        self._messages.append({"role": "user", "content": self._task.retry_message})
        calls.clear()
        return False

    async def _is_to_be_poked(self, computer: ComputerInterface) -> bool:
        if not self._task.supports_pokes or self._n_pokes >= self._solver.max_pokes:
            return False
        valid = await self._task.check_for_valid_submission(computer, self._runtime_config)
        return not valid

    async def _step(self, computer: ComputerInterface) -> Step:
        grade = None
        if self._task.grade_every_step:
            with pause_all_pausable_timers():
                grade = await self.grade(computer)
        elapsed = timedelta(seconds=time.monotonic() - self._started)
        return Step(convo=self._conversation(), grade=grade, elapsed=elapsed)

    def _conversation(self) -> Conversation:
        return Conversation(messages=list(self._messages))


@chz.chz
class GoldSolver(SimpleSolver):
    """Runs a task's own solution, which its grader must find right.

    A task has it as `gold_solution`: an async method of (computer), or a shell script as a string.
    """

    def shortname(self) -> str:
        return "gold"

    async def solve(self, task: ComputerTask, computer: ComputerInterface) -> None:
        solution = getattr(task, "gold_solution", None)
        if isinstance(solution, str):
            await computer.check_shell_command(solution)
        elif callable(solution):
            done = solution(computer)
            if inspect.isawaitable(done):
                await done
        else:
            raise ComputerSetupError(
                f"{type(task).__name__} has no gold_solution; define an async method"
                " gold_solution(computer), or a string with a shell script"
            )
