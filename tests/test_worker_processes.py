"""Worker processes and their driver, stopped, killed and forked: neither waits for the other."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import chz
import pytest

from nanoeval import run
from tests.sample_evals import Sums, append, lines, spec
from tests.test_crash import REPOSITORY, children, committed, end, is_alive, start, wait_until

PROCESSES: dict[str, Any] = {"executor": "processes", "num_processes": 2}


@chz.chz
class Once(Sums):
    """The first execution of question 3 does something to its process, then goes on."""

    async def evaluate(self, task: Any) -> bool:
        first = task.a == 3 and not any(line.startswith("q3.") for line in lines(self.log))
        result = await super().evaluate(task)
        if first:
            self.act()
        return result

    def act(self) -> None:
        raise NotImplementedError


@chz.chz
class StopsItself(Once):
    """Its process stands still, as at SIGSTOP."""

    def act(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)


@chz.chz
class ForksAndDies(Once):
    """Its process is killed, and leaves one behind that it forked, in a session of its own."""

    def act(self) -> None:
        child = os.fork()
        if child == 0:
            os.setsid()
            time.sleep(30)
            os._exit(0)
        append(f"{self.log}.child", str(child))
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)


@chz.chz
class Starts(Sums):
    """Each rollout starts a program and waits for it."""

    async def evaluate(self, task: Any) -> bool:
        program = await asyncio.create_subprocess_exec("sleep", "77")
        append(self.log, str(program.pid))
        await program.wait()
        return True


@chz.chz
class Looks(Sums):
    """Gives what its process has for a path, and what it can import."""

    async def evaluate(self, task: Any) -> Any:
        import found_by_path  # type: ignore[import-not-found]

        return {"score": found_by_path.SCORE, "path": os.environ.get("PYTHONPATH")}

    async def get_summary(self, results: Any) -> dict[str, Any]:
        return dict(results[0][1])


async def test_a_stopped_worker_does_not_hold_up_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything would be done, and the run wait for ever for one process to say so."""
    monkeypatch.setenv("NANOEVAL_LEASE_SECONDS", "1")
    log = tmp_path / "log"
    async with asyncio.timeout(20):
        summary = await run(spec(StopsItself(n=20, log=str(log)), concurrency=4, **PROCESSES))
    assert summary["num_scored"] == 20
    assert not any(is_alive(int(line.split()[1])) for line in lines(log))


async def test_a_stopped_worker_does_not_hold_up_ctrl_c(
    tmp_path: Path, database_folder: Path
) -> None:
    """Only a second Ctrl-C would end the run, with claims left behind."""
    log = tmp_path / "log"
    eval = StopsItself(n=2000, seconds=0.02, log=str(log))
    running = asyncio.ensure_future(
        run(spec(eval, run_set_id="stopped", concurrency=4, **PROCESSES))
    )
    while len(lines(log)) < 20:
        await asyncio.sleep(0.01)
    await check_cancelled(running, database_folder / "stopped.db")


async def test_a_run_that_is_cancelled_as_it_starts_ends_at_once(database_folder: Path) -> None:
    """A worker that is told to serve and to stop at once would do neither, and never answer."""
    running = asyncio.ensure_future(run(spec(Sums(n=2000), run_set_id="early", **PROCESSES)))
    while len(children(os.getpid())) < 2:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.15)  # for the order to be sent, and not for Python to be up
    await check_cancelled(running, database_folder / "early.db")


async def check_cancelled(running: asyncio.Task[Any], path: Path) -> None:
    began = time.monotonic()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert time.monotonic() - began < 2 + 1  # a slow machine's allowance
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM claim").fetchone() == (0,)
        assert db.execute("SELECT count(*) FROM task WHERE state = 1").fetchone() == (0,)


async def test_a_killed_worker_that_forked_is_replaced(tmp_path: Path) -> None:
    """The process that it forked would hold its end of the socket, and hide its death."""
    log = tmp_path / "log"
    try:
        async with asyncio.timeout(20):
            summary = await run(spec(ForksAndDies(n=20, log=str(log)), concurrency=4, **PROCESSES))
        assert summary["num_scored"] == 20
    finally:
        for pid in lines(f"{log}.child"):
            os.kill(int(pid), signal.SIGKILL)


async def test_what_rollouts_start_ends_with_their_worker(tmp_path: Path) -> None:
    """Servers and browsers of rollouts would pile up, Ctrl-C by Ctrl-C and crash by crash."""
    log = tmp_path / "log"
    running = asyncio.ensure_future(run(spec(Starts(n=4, log=str(log)), **PROCESSES)))
    while len(lines(log)) < 4:
        await asyncio.sleep(0.01)
    # Other tests may have left this process children of another kind.
    killed = int(Path(f"/proc/{lines(log)[0]}/stat").read_text().split()[3])
    orphans = children(killed)
    os.kill(killed, signal.SIGKILL)
    while len(lines(log)) < 4 + len(orphans):
        await asyncio.sleep(0.01)
    assert not any(is_alive(pid) for pid in orphans)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not any(is_alive(int(pid)) for pid in lines(log))


async def test_the_path_of_imports_reaches_workers_and_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollout's `python3.12 tool.py` would import the standard library of the driver's Python."""
    (tmp_path / "found_by_path.py").write_text("SCORE = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = await run(spec(Looks(n=1), **PROCESSES))
    assert (seen["score"], seen["path"]) == (1, os.environ.get("PYTHONPATH"))


@pytest.mark.slow
def test_workers_end_with_a_driver_that_was_stopped_before_it_was_killed(
    tmp_path: Path, database_folder: Path
) -> None:
    """Its death resets the connection, with answers unread, and workers would stay for ever."""
    log = tmp_path / "log"
    driver = start("reset", str(log), "processes", "60")
    wait_until(lambda: len(children(driver.pid)) == 2 and lines(log))
    workers = children(driver.pid)
    driver.send_signal(signal.SIGSTOP)
    wait_until(lambda: len(committed(database_folder / "reset.db")) == 60)
    time.sleep(0.5)  # for their answers
    end(driver)
    wait_until(lambda: not any(is_alive(pid) for pid in workers), seconds=3)


@pytest.mark.slow
def test_workers_end_with_a_driver_that_forked(tmp_path: Path) -> None:
    """They would go on paying for model calls as long as a process lives that the driver forked."""
    log = tmp_path / "log"
    code = f"""
import asyncio, os, sys, threading, time
sys.path.insert(0, {str(REPOSITORY)!r})
from nanoeval import run
from tests.sample_evals import Sums, lines, spec
def fork():
    while not lines({str(log)!r}):
        time.sleep(0.01)
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    print(child, flush=True)
threading.Thread(target=fork).start()
eval = Sums(n=2000, seconds=0.05, log={str(log)!r})
asyncio.run(run(spec(eval, concurrency=4, executor="processes", num_processes=2)))
"""
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert driver.stdout is not None
    forked = int(driver.stdout.readline())
    try:
        workers = [pid for pid in children(driver.pid) if pid != forked]
        assert len(workers) == 2
        driver.kill()
        driver.wait()
        wait_until(lambda: not any(is_alive(pid) for pid in workers), seconds=3)
        assert is_alive(forked)
    finally:
        driver.stdout.close()
        os.kill(forked, signal.SIGKILL)
