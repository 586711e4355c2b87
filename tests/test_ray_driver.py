"""Programs that run evals on Ray, killed and stopped; each with a cluster of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from nanoeval import run
from nanoeval._run_set import database_path
from tests.ray_cluster import RAY_MISSING, alive, outcomes, until
from tests.sample_evals import Sums, lines, spec

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.skipif(RAY_MISSING, reason='needs Ray: pip install "nanoeval[ray]"'),
]
PROGRAM = Path(__file__).with_name("ray_program.py")


Program = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def program() -> Iterator[Program]:
    """Starts `ray_program.py` with arguments and, by keyword, variables; killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **variables},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


async def test_the_run_of_a_killed_driver_goes_on(program: Program, tmp_path: Path) -> None:
    """Whoever loses the machine at the desk would lose the run.

    The eval is defined in the `__main__` of the program.
    """
    log = tmp_path / "log"
    driver = program("killed", str(log), "2000")
    await until(lambda: outcomes("killed") > 100)
    actors = [pid for pid in descendants(driver.pid) if "ray::" in title(pid)]
    assert len([pid for pid in actors if "Desk" in title(pid) or "RayWorker" in title(pid)]) == 3
    driver.kill()
    driver.wait()
    # Ray's own two agents search for their head for a minute, then end as well.
    ours = [pid for pid in actors if "Agent" not in title(pid)]
    await until(lambda: not any(map(alive, ours)), seconds=10)
    assert outcomes("killed") < 2000
    resumed = program("killed", str(log), "2000", "resume")
    out, err = await asyncio.to_thread(resumed.communicate)
    assert resumed.returncode == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert (summary["num_scored"], summary["accuracy"]) == (2000, 0.5)
    executed = Counter(line.split()[0] for line in lines(log))
    assert len(executed) == 2000
    assert sum(executed.values()) - 2000 <= 20


def title(pid: int) -> str:
    """What `ps` shows of a process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    children = [int(child) for child in found.stdout.split()]
    return children + [below for child in children for below in descendants(child)]


async def test_ctrl_c_ends_a_run_on_ray_in_order(program: Program, tmp_path: Path) -> None:
    """Claims would be held for a lease, and finished results thrown away."""
    log = tmp_path / "log"
    driver = program("stopped", str(log), "2000")
    await until(lambda: outcomes("stopped") > 100)
    driver.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = await asyncio.to_thread(driver.communicate)
    # Two seconds for the run, and what Ray needs to end its own cluster.
    assert time.monotonic() - began < 8
    assert driver.returncode == 130
    assert "run_set_id=stopped" in err
    with closing(sqlite3.connect(database_path("stopped"))) as db:
        assert db.execute("SELECT count(*) FROM claim").fetchone() == (0,)
        assert db.execute("SELECT count(*) FROM task WHERE state = 1").fetchone() == (0,)
    executed = len({line.split()[0] for line in lines(log)})
    assert executed - outcomes("stopped") <= 20


async def test_ctrl_c_while_the_cluster_starts_leaves_nothing_behind(
    program: Program, tmp_path: Path
) -> None:
    """Agents of a cluster that never was would search for their head, a minute long."""
    driver = program("early", str(tmp_path / "log"), "2000")
    started: list[int] = []

    def is_up() -> bool:
        started[:] = descendants(driver.pid)
        return any("raylet" in title(pid) for pid in started)

    await until(is_up)
    driver.send_signal(signal.SIGINT)
    while driver.poll() is None:
        started += descendants(driver.pid)
        await asyncio.sleep(0.05)
    assert driver.returncode == 130
    await until(lambda: not any(map(alive, started)), seconds=5)


RAY = Path(sys.executable).with_name("ray")
ADDRESS = "127.0.0.1:26379"


@pytest.fixture
def head() -> Iterator[dict[str, str]]:
    """The variables by which programs find a cluster that was started by `ray start --head`.

    It is on loopback, and guarded by a token.
    """
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # its sockets' paths must be short
        variables = {"RAY_TMPDIR": folder, "RAY_AUTH_TOKEN": "secret" * 8}
        environment = {**os.environ, **variables, "RAY_AUTH_MODE": "token"}
        environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        options = ["--node-ip-address=127.0.0.1", "--port=26379", "--num-cpus=2"]
        options += ["--include-dashboard=false", "--disable-usage-stats", "--block"]
        process = subprocess.Popen([RAY, "start", "--head", *options], env=environment)
        try:
            note = Path(folder, "ray", "ray_current_cluster")
            deadline = time.monotonic() + 30
            while not note.exists():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield variables
        finally:
            process.terminate()
            process.wait()


async def test_the_address_of_a_cluster_that_is_gone_is_not_waited_for(
    program: Program, tmp_path: Path
) -> None:
    """After a crash of `ray start`, whose note stays behind, runs would hang for minutes."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        note = Path(folder, "ray", "ray_current_cluster")
        note.parent.mkdir()
        note.write_text("127.0.0.1:1")
        done = program("alone", str(tmp_path / "log"), "60", RAY_TMPDIR=folder)
        out, err = await asyncio.to_thread(done.communicate, timeout=60)
    assert done.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["num_scored"] == 60


@pytest.mark.parametrize("named", [{}, {"RAY_ADDRESS": ADDRESS, "RAY_AUTH_MODE": "token"}])
async def test_a_running_cluster_is_joined_and_left_running(
    program: Program, head: dict[str, str], named: dict[str, str], tmp_path: Path
) -> None:
    """Whoever has a cluster would get a second one, or lose theirs."""
    for n in ("60", "61"):
        joined = program(f"joined{n}", str(tmp_path / f"log{n}"), n, **head, **named)
        out, err = await asyncio.to_thread(joined.communicate, timeout=40)
        assert joined.returncode == 0, err
        assert json.loads(out.splitlines()[-1])["num_scored"] == int(n)
    pids = {int(line.split()[1]) for line in lines(tmp_path / "log60")}
    await until(lambda: not any(map(alive, pids)))
    logs = Path(head["RAY_TMPDIR"], "ray", "session_latest", "logs")
    assert len(list(logs.glob("python-core-driver-*"))) == 2


async def test_a_cluster_that_is_not_there_is_named() -> None:
    """A wrong address would end in a traceback of another library."""
    from nanoeval._executors.ray import RayClusterError

    with pytest.raises(RayClusterError, match=r"127\.0\.0\.1:1.*ray start"):
        await run(spec(Sums(), executor="ray", ray_address="127.0.0.1:1"))
    with pytest.raises(ValueError, match=r"ray://.* must be a node of the cluster"):
        await run(spec(Sums(), executor="ray", ray_address="ray://127.0.0.1:1"))
