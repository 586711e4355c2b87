"""The program that serves the monitor: where it listens, when it ends, and for whom."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from nanoeval import EvalSpec, RunnerArgs, run
from nanoeval.recorders import dummy_recorder
from tests.sample_evals import Sums

pytest.importorskip("streamlit", reason='pip install "nanoeval[monitor]"')

REPOSITORY = Path(__file__).parents[1]


def free_port() -> int:
    while True:
        # Below those that the system gives to connections, which would take it meanwhile.
        port = random.randint(20_000, 30_000)
        with socket.socket() as holder, suppress(OSError):
            holder.bind(("127.0.0.1", port))
            return port


@contextmanager
def monitor(
    *arguments: str, port: int | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The program in a process of its own, and what it said up to its address."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "nanoeval.bin.mon", f"port={port or free_port()}", *arguments],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        said = ""
        try:
            assert process.stdout is not None
            for line in process.stdout:
                said += line
                if "monitor is at" in line:
                    break
            else:
                log.seek(0)
                pytest.fail(f"the monitor ended with {process.wait()}: {said}{log.read()}")
            yield process, said
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def address(said: str) -> str:
    found = re.search(r"http://\S+", said)
    assert found is not None, said
    return found[0]


def run_sums(run_set_id: str) -> None:
    runner = RunnerArgs(run_set_id=run_set_id, recorder=dummy_recorder(log=False))
    asyncio.run(run(EvalSpec(eval=Sums(n=3), runner=runner)))


def listens_at(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((host, port)) == 0


def test_monitor_listens_on_the_loopback_alone(database_folder: Path) -> None:
    """Prompts and results would be open to the whole network."""
    run_sums("sums")
    with monitor("run_set_id=sums") as (_, said):
        url = address(said)
        assert url.endswith("/run?run_set=sums")
        with urllib.request.urlopen(url, timeout=10) as page:
            assert page.status == 200
        port = int(url.split(":")[2].split("/")[0])
        others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}
        for other in others - {"127.0.0.1", "127.0.1.1", "::1"}:
            assert not listens_at(str(other), port), other


def test_taken_port_moves_to_the_next_and_says_so(database_folder: Path) -> None:
    """Two people on one machine, or two runs, would be in each other's way."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken = holder.getsockname()[1]
        with monitor(port=taken) as (_, said):
            assert f"port {taken} is taken" in said
            assert int(address(said).split(":")[2].strip("/")) > taken


def test_monitors_that_start_at_once_find_a_port_each(database_folder: Path) -> None:
    """Of two runs that start together, one would have no monitor."""
    port = free_port()
    with ThreadPoolExecutor(3) as pool, ExitStack() as running:
        started = pool.map(lambda _: running.enter_context(monitor(port=port)), range(3))
        addresses = {address(said.splitlines()[-1]) for _, said in started}
    assert len(addresses) == 3


def test_monitor_ends_when_its_stdin_closes(database_folder: Path) -> None:
    """Each killed run would leave a server behind."""
    with monitor("until_stdin_closes=True") as (process, _):
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=5) == 0


def test_ctrl_c_ends_the_monitor(database_folder: Path) -> None:
    """It is how people end it."""
    with monitor() as (process, _):
        process.send_signal(signal.SIGINT)
        process.wait(timeout=10)


def test_unknown_run_set_is_one_line() -> None:
    """A traceback would hide the typing error."""
    done = _mon("run_set_id=nowhere")
    assert done.returncode == 1
    assert done.stderr.startswith("nanoeval: there is no run set 'nowhere'")


def test_missing_streamlit_is_one_line_that_names_the_command(tmp_path: Path) -> None:
    """Streamlit is an extra; who lacks it needs to know its name."""
    # A finder that hides it, as if it were not installed.
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name == 'streamlit' else find(name)\n"
    )
    done = _mon(environment={"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"})
    assert done.returncode == 1
    assert done.stderr.strip() == (
        'nanoeval: the monitor needs streamlit: pip install "nanoeval[monitor]"'
    )


def _mon(
    *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nanoeval.bin.mon", *arguments],
        cwd=REPOSITORY,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


async def test_run_with_use_monitor_serves_and_ends_its_monitor(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """`runner.use_monitor=True` is all that most people will ever type."""
    runner = RunnerArgs(
        run_set_id="watched", recorder=dummy_recorder(log=False), use_monitor=True, concurrency=1
    )
    running = asyncio.create_task(run(EvalSpec(eval=Sums(n=12, seconds=1.0), runner=runner)))
    said = ""
    while "monitor is at" not in said:
        await asyncio.sleep(0.2)
        said += capfd.readouterr().err
        assert not running.done(), said
    port = int(address(said).split(":")[2].split("/")[0])
    assert await asyncio.to_thread(listens_at, "127.0.0.1", port)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not listens_at("127.0.0.1", port)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_second_users_monitor_cannot_open_my_databases(database_folder: Path) -> None:
    """Prompts, answers and keys of one user would be open to all on a shared machine."""
    run_sums("private")
    path = database_folder / "private.db"
    script = (
        # Imported while it still may: the interpreter itself may lie in root's home folder.
        "import os, pwd; from pathlib import Path; from nanoeval import _inspect\n"
        "os.setgid(65534); os.setuid(65534)\n"
        f"path = Path({str(path)!r})\n"
        "try: print(path.read_bytes()[:6])\n"
        "except PermissionError as error: print('file:', error)\n"
        "try: print(_inspect.look_at(_inspect.RunSetFile('private', path)).problem)\n"
        "except PermissionError as error: print('monitor:', error)\n"
        "try: print(_inspect.list_run_sets())\n"
        "except PermissionError as error: print('list:', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "file: [Errno 13]" in done.stdout
    assert "SQLite" not in done.stdout
    assert "sums" not in done.stdout
    for line in done.stdout.splitlines():
        assert "ermission" in line or "belongs to" in line, line


def test_open_monitor_does_not_hold_up_a_writer(database_folder: Path) -> None:
    """A reader that holds a transaction open would stop checkpoints, and the log would grow."""
    import sqlite3

    from nanoeval import _inspect, _inspect_run

    run_sums("sums")
    path = database_folder / "sums.db"
    db = sqlite3.connect(path, timeout=0.2, isolation_level=None)
    with _inspect.reading(path) as reader:
        list(_inspect_run.sampled_outcomes(reader, 1, 0, 10, 1))
        began = time.monotonic()
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE eval SET model_name = 'x'")
        db.execute("COMMIT")
        busy, _, _ = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        assert not busy
        assert time.monotonic() - began < 0.2
    db.close()
