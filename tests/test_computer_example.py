"""The example of computer tasks, run as a person runs it; its graders tell right from wrong."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nanoeval.solvers.computer_tasks.runtimes import LocalRuntime
from nanoeval.solvers.computer_tasks.simple_solver import DummySolver

if TYPE_CHECKING:
    from tests.docker_engine import DockerEngine

pytest_plugins = ["tests.docker_engine"]
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "computer_tasks.py"


def run_example(*arguments: str) -> dict[str, Any]:
    """The summary that it prints."""
    done = subprocess.run(
        [sys.executable, EXAMPLE, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("arguments", [(), ("gold=True",)])
def test_the_example_runs_on_this_machine(arguments: tuple[str, ...]) -> None:
    """The agent and the gold solutions do all six."""
    summary = run_example(*arguments)
    assert summary["accuracy"] == 1.0
    assert summary["aggregations"]["num_tasks"] == 6


@pytest.mark.docker
@pytest.mark.timeout(300)
def test_the_example_runs_in_containers(request: pytest.FixtureRequest) -> None:
    """With a real side container."""
    engine: DockerEngine = request.getfixturevalue("docker_engine")
    summary = run_example("docker=True", f"image={engine.minimal}")
    assert summary["accuracy"] == 1.0
    assert summary["aggregations"]["num_system_error"] == 0
    assert engine.containers() == []


async def test_its_graders_refuse_undone_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grader that always says yes would pass every other test here."""
    spec = importlib.util.spec_from_file_location("computer_tasks_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, example)
    spec.loader.exec_module(example)
    solver = DummySolver(runtime=LocalRuntime())
    for task in await example.ComputerTasks(solver=solver, image=None).get_instances():
        (result,) = [item async for item in solver.run(task)]
        assert result.grade.score == 0, task.question_id
