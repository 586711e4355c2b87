"""An eval of many rollouts whose computers are broken at random, and the run of it."""

from __future__ import annotations

from typing import Any

import chz

import nanoeval
from nanoeval.eval import EvalSpec, RolloutSystemError, RunnerArgs
from nanoeval.solvers.computer_tasks.agents import GoldSolver
from nanoeval.solvers.computer_tasks.code_execution_interface import (
    ComputerInterface,
    ComputerRuntime,
)
from nanoeval.solvers.computer_tasks.solver import PythonCodingEval
from nanoeval.solvers.computer_tasks.task import ComputerTask
from tests.computer.fakes import GoldAnswerTask


class KilledTask(GoldAnswerTask):
    """Breaks its computer on the first tries, by the command that it holds."""

    first_tries: int
    kill: str = ""

    async def gold_solution(self, computer: ComputerInterface) -> None:
        if self.retry_idx < self.first_tries:
            await computer.check_shell_command(self.kill)
            raise RolloutSystemError("the computer was to be broken")
        await super().gold_solution(computer)


@chz.chz
class KilledEval(PythonCodingEval):
    n_instances: int
    kill: str

    async def get_instances(self) -> list[ComputerTask]:
        # A third breaks once, a seventh twice or more.
        return [
            KilledTask(
                question_id=f"task-{i}", kill=self.kill, first_tries=(i % 3 == 0) + (i % 7 == 0)
            )
            for i in range(self.n_instances)
        ]


async def run_killed(
    runtime: ComputerRuntime, n_instances: int, concurrency: int, kill: str
) -> dict[str, Any]:
    """The summary of a run in which computers are killed while they work."""
    solver = GoldSolver(runtime=runtime, timeout=120)
    runner = RunnerArgs(concurrency=concurrency, retry_backoff=0.05, enable_slackbot=False)
    eval = KilledEval(solver=solver, n_instances=n_instances, kill=kill)
    return await nanoeval.run(EvalSpec(eval=eval, runner=runner))
