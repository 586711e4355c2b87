"""Evals of scripts and notebooks: their code reaches workers and resume in its own version."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from sqlite3 import connect

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

HEAD = """
import asyncio, os, signal, sys
import chz, nanoeval
from nanoeval import Eval, EvalSpec, RunnerArgs, Task
"""
# The names are those of things that nanoeval's own programs use.
EVAL = """
class Order(Task):
    pass

@chz.chz
class Job(Eval[Order, str]):
    def get_name(self): return "code"
    async def get_tasks(self):
        for i in range(4):
            if i == 2 and "KILL_QUEUEING" in os.environ: os.kill(os.getpid(), signal.SIGKILL)
            yield Order(question_id=str(i))
    async def evaluate(self, task):
        if "KILL" in os.environ: os.kill(os.getpid(), signal.SIGKILL)
        return "version {version}"
    async def get_summary(self, results): return {"got": sorted({r for _, r in results})}

async def main(**options):
    runner = RunnerArgs(enable_slackbot=False, **options)
    return (await nanoeval.run(EvalSpec(eval=Job(), runner=runner)))["got"]
"""
RUN = "if __name__ == '__main__': print(asyncio.run(main(run_set_id='code', {options})))\n"
PROCESSES = "executor='processes', num_processes=2"
NOTEBOOK = """
from nanoeval.setup import global_exit_stack
async def cells():
    async with global_exit_stack:
        for version in ("1", "2"):
            exec(source.replace("{version}", version), globals())
            print(await main(executor="processes", num_processes=2, **options(version)))
asyncio.run(cells())
"""


def script(version: int, options: str) -> str:
    return HEAD + EVAL.replace("{version}", str(version)) + RUN.replace("{options}", options)


def call(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **more},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def resume() -> subprocess.CompletedProcess[str]:
    return call("-m", "nanoeval.bin.resume", "run_set_id=code")


def last_summary(database_folder: Path) -> list[str]:
    with closing(connect(database_folder / "code.db")) as db:
        (summary,) = db.execute("SELECT summary FROM eval ORDER BY id DESC").fetchone()
    return json.loads(summary)["got"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", ["", PROCESSES])
def test_an_edited_script_runs_its_new_code_in_the_same_run_set(
    options: str, tmp_path: Path
) -> None:
    """The results of the old code would be reported as those of the new."""
    path = tmp_path / "mine.py"
    for version in (1, 2):
        path.write_text(script(version, options))
        done = call(str(path))
        assert done.stdout == f"['version {version}']\n", done.stderr


@pytest.mark.parametrize("options", ["{}", "{'run_set_id': 'set' + version}"])
def test_a_cell_that_is_run_again_reaches_workers_that_live_on(
    options: str, tmp_path: Path
) -> None:
    """A notebook that redefines its eval would go on with the first one."""
    path = tmp_path / "cells.py"
    path.write_text(
        f"{HEAD}source = {EVAL!r}\noptions = lambda version: {options}\n{NOTEBOOK}",
    )
    done = call(str(path))
    assert done.stdout == "['version 1']\n['version 2']\n", done.stderr


def test_each_eval_is_resumed_with_the_code_that_queued_it(
    tmp_path: Path, database_folder: Path
) -> None:
    """Of a run set with two versions of a script, one would go on with the other's code."""
    path = tmp_path / "mine.py"
    for version in (1, 2):
        path.write_text(script(version, ""))
        assert call(str(path), KILL="1").returncode == -9
    done = resume()
    assert done.returncode == 0, done.stderr
    with closing(connect(database_folder / "code.db")) as db:
        summaries = [json.loads(s)["got"] for (s,) in db.execute("SELECT summary FROM eval")]
    assert summaries == [["version 1"], ["version 2"]]


def test_a_script_that_was_killed_while_it_queued_can_be_resumed(
    tmp_path: Path, database_folder: Path
) -> None:
    """`ls` and `doctor` would advise a command that fails."""
    path = tmp_path / "mine.py"
    path.write_text(script(1, ""))
    assert call(str(path), KILL_QUEUEING="1").returncode == -9
    done = resume()
    assert done.returncode == 0, done.stderr
    assert last_summary(database_folder) == ["version 1"]


def test_a_module_beside_the_script_is_found_from_another_folder(
    tmp_path: Path, database_folder: Path
) -> None:
    """A run could be resumed in one folder only, and nothing would say in which."""
    folder = tmp_path / "project"
    folder.mkdir()
    module = folder / "my_eval.py"
    module.write_text(HEAD + EVAL.replace("{version}", "1"))
    path = folder / "start.py"
    path.write_text("import asyncio\nfrom my_eval import main\n" + RUN.replace("{options}", ""))
    assert call(str(path), KILL="1").returncode == -9
    away = module.rename(tmp_path / "elsewhere.py")
    done = resume()
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("nanoeval: the code of code cannot be imported")
    assert str(folder) in done.stderr
    away.rename(module)
    done = resume()
    assert done.returncode == 0, done.stderr
    assert last_summary(database_folder) == ["version 1"]
