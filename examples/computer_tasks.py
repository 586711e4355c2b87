"""Small computer tasks, each with set-up, grader and its own solution. They are in a TOML file:

python examples/computer_tasks.py                 on this machine, played by a scripted model
python examples/computer_tasks.py docker=True     in containers, with a real side container
python examples/computer_tasks.py gold=True       each task's own solution: tests the graders
python examples/computer_tasks.py docker=True model=gpt-4o     a real model (OPENAI_API_KEY)
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import chz

import nanoeval
from nanoeval import EvalSpec, RunnerArgs
from nanoeval.setup import nanoeval_entrypoint
from nanoeval.solvers.computer_tasks.agents import BashAgentSolver, GoldSolver
from nanoeval.solvers.computer_tasks.code_execution_interface import (
    ComputerInterface,
    RuntimeConfig,
)
from nanoeval.solvers.computer_tasks.runtimes import DockerRuntime, LocalRuntime
from nanoeval.solvers.computer_tasks.solver import PythonCodingEval
from nanoeval.solvers.computer_tasks.task import ComputerTask, Grade
from nanoeval.testing import Reply, Request, ScriptedServer

TASKS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())["task"]


class ScriptTask(ComputerTask):
    """A task of three bash scripts."""

    setup_script: str
    grader: str
    gold_solution: str

    async def _setup(self, computer: ComputerInterface, runtime_config: RuntimeConfig) -> None:
        await computer.check_shell_command(self.setup_script)

    async def grade(self, computer: ComputerInterface, runtime_config: RuntimeConfig) -> Grade:
        done = await computer.send_shell_command(self.grader)
        return Grade(score=float(done.exit_code == 0), grader_log=done.unicode_output_best_effort)


def make_task(
    image: str | None, question_id: str, prompt: str, setup: str, **rest: str
) -> ScriptTask:
    """The task for a computer of this machine (no `image`) or for a container."""
    more: dict[str, Any] = {"docker_image": image}
    service = rest.pop("side_service", None)
    if service and image:
        facts = {"image": image, "command": ["python3", "-c", service, "8801"]}
        more["docker_compose_yaml"] = json.dumps({"services": {"facts": facts}})
        setup = "echo facts:8801 > address.txt"
    elif service:
        more["environment"] = {"SIDE_SERVICE": service}
    messages = [{"role": "user", "content": prompt}]
    return ScriptTask(question_id=question_id, prompt=messages, setup_script=setup, **rest, **more)


@chz.chz
class ComputerTasks(PythonCodingEval):
    image: str | None

    async def get_instances(self) -> list[ComputerTask]:
        return [make_task(self.image, **task) for task in TASKS]


def play(request: Request) -> Reply:
    """Stands in for a model: it knows the solutions."""
    gold = next(task["gold_solution"] for task in TASKS if task["prompt"] in request.text)
    has_acted = request.messages[-1]["role"] == "tool"
    name, arguments = ("submit", {}) if has_acted else ("bash", {"command": gold})
    call = {"name": name, "arguments": json.dumps(arguments)}
    return Reply(fields={"tool_calls": [{"id": "1", "type": "function", "function": call}]})


async def main(
    docker: bool = False, gold: bool = False, model: str = "", image: str = "python:3.12-slim"
) -> None:
    """Run all tasks and print the summary as JSON."""
    runtime = DockerRuntime() if docker else LocalRuntime()
    async with ScriptedServer(play) as server:
        url = None if model else server.base_url
        agent = BashAgentSolver(model=model or "scripted", base_url=url, runtime=runtime)
        solver = GoldSolver(runtime=runtime) if gold else agent
        tasks = ComputerTasks(solver=solver, image=image if docker else None)
        summary = await nanoeval.run(EvalSpec(eval=tasks, runner=RunnerArgs(concurrency=6)))
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    nanoeval_entrypoint(chz.entrypoint(main))
