"""Solvers that run on any `ComputerRuntime`: bases for your own, a dummy, and a person."""

from __future__ import annotations

import asyncio
import sys
from abc import abstractmethod
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import chz

from nanoeval.eval import RolloutSystemError
from nanoeval.solvers.computer_tasks.code_execution_interface import (
    ComputerInterface,
    ComputerRuntime,
)
from nanoeval.solvers.computer_tasks.solver import PythonCodingSolver
from nanoeval.solvers.computer_tasks.steps import FinalResult, Step
from nanoeval.solvers.computer_tasks.task import ComputerTask, Grade


@chz.chz
class ComputerRuntimeSolver(PythonCodingSolver):
    """A solver that starts its computers through a runtime of your choice."""

    runtime: ComputerRuntime

    @asynccontextmanager
    async def _context(self) -> AsyncGenerator[None, None]:
        await self.runtime.check()
        yield


@chz.chz
class SimpleSolver(ComputerRuntimeSolver):
    """A solver that is one function: define `solve`. Every failure is a RolloutSystemError."""

    timeout: float = chz.field(
        default=3600, doc="Seconds for a rollout: start, solving, grading, stop."
    )

    @abstractmethod
    async def solve(self, task: ComputerTask, computer: ComputerInterface) -> None:
        """Do `task` on `computer`, which is set up; it is graded afterwards."""

    async def run(self, task: ComputerTask) -> AsyncGenerator[Step | FinalResult, None]:
        """Start a computer, solve, grade, stop, yield the result."""
        yield FinalResult(grade=await self._solve_and_grade(task))

    async def _solve_and_grade(self, task: ComputerTask) -> Grade:
        try:
            async with asyncio.timeout(self.timeout):
                async with self.runtime.run(task) as computer:
                    await self.solve(task, computer)
                    return await task.grade(computer, self.runtime.runtime_config)
        except RolloutSystemError:
            raise
        except Exception as error:
            what = str(error) or f"no more than timeout={self.timeout} seconds were given"
            raise RolloutSystemError(
                f"{self.shortname()} failed on {task.name}: {type(error).__name__}: {what}"
            ) from error


@chz.chz
class DummySolver(SimpleSolver):
    """Runs one harmless command and is graded; checks that computers start and graders run."""

    name: str = "DummySolver"

    def shortname(self) -> str:
        return "dummy-solver"

    async def solve(self, task: ComputerTask, computer: ComputerInterface) -> None:
        await computer.check_shell_command("echo 'hello from the dummy solver' > test.txt")


@chz.chz
class UserSolver(SimpleSolver):
    """Lets a person at the terminal play the agent. Run one rollout at a time."""

    name: str = "UserSolver"
    timeout: float = chz.field(default=24 * 3600, doc="Seconds that a person may take.")

    def shortname(self) -> str:
        return "user-solver"

    async def solve(self, task: ComputerTask, computer: ComputerInterface) -> None:
        for message in task.prompt:
            print(f"[{message['role']}] {message.get('content', '')}")
        print(
            f"Each line runs in a fresh shell in {task.cwd}."
            ' "exit", "quit" or Ctrl-D ends your work, and it is graded.'
        )
        while (command := await _read_line("$ ")) is not None:
            if command.strip() in ("exit", "quit"):
                return
            if not command.strip():
                continue
            result = await computer.send_shell_command(command)
            print(result.unicode_output_best_effort, end="")
            if result.exit_code != 0:
                print(f"[exit code {result.exit_code}]")


async def _read_line(prompt: str) -> str | None:
    """The next line of standard input, or None at its end."""
    sys.stdout.write(prompt)
    sys.stdout.flush()
    line = await asyncio.to_thread(sys.stdin.readline)
    return line.rstrip("\n") if line else None
