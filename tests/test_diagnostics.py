"""Why a run hangs is found out: stalls, slow callbacks, stacks by signal, aiomonitor."""

from __future__ import annotations

import asyncio
import http.server
import inspect
import json
import os
import signal
import socket
import sqlite3
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import chz
import pytest

from nanoeval import Eval, EvalSpec, RunnerArgs, Task, _aiomonitor, _diagnostics, run
from nanoeval._run_set import join_run_set
from nanoeval.fs_paths import stacktrace_root_dir
from nanoeval.recorders import dummy_recorder


@chz.chz
class Blocking(Eval[Task, bool]):
    """Question `q2` calls `block`; the others wait asynchronously."""

    block: Callable[[], Any]
    seconds: float = 0.3
    n: int = 4

    def get_name(self) -> str:
        return "blocking"

    async def get_tasks(self) -> list[Task]:
        return [Task(question_id=f"q{index}") for index in range(self.n)]

    async def evaluate(self, task: Task) -> bool:
        # In a task of its own, which the engine did not start.
        return await asyncio.create_task(self._ask(task))

    async def _ask(self, task: Task) -> bool:
        await asyncio.sleep(0.05)
        if task.question_id == "q2":
            self.block()
        await asyncio.sleep(self.seconds)
        return True

    async def get_summary(self, results: list[tuple[Task, bool]]) -> dict[str, Any]:
        return {"n": len(results)}


def sleep_long() -> None:
    time.sleep(1.6)


def compute_long() -> None:
    end = time.monotonic() + 1.6
    while time.monotonic() < end:
        sum(range(50))


@pytest.fixture
def slow_url() -> Iterator[str]:
    """A server that answers after 1.6 seconds."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(1.6)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


async def run_blocking(block: Callable[[], Any], **fields: Any) -> dict[str, Any]:
    spec = EvalSpec(
        eval=Blocking(block=block, **fields),
        runner=RunnerArgs(run_set_id="watched", recorder=dummy_recorder(log=False)),
    )
    return await run(spec)


def executor(folder: Path) -> dict[str, Any]:
    with closing(sqlite3.connect(folder / "watched.db")) as db:
        db.row_factory = sqlite3.Row
        return dict(db.execute("SELECT * FROM executor").fetchone())


def reports(kind: str) -> list[Path]:
    return sorted((stacktrace_root_dir() / "watched").glob(f"*_{kind}_*"))


def line_of(function: Callable[..., Any], text: str) -> str:
    """`file:line` of the first line of `function` that holds `text`."""
    lines, start = inspect.getsourcelines(function)
    number = next(index for index, line in enumerate(lines) if text in line)
    return f"{__file__}:{start + number}"


def fetch(url: str) -> None:
    with urllib.request.urlopen(url) as reply:
        reply.read()


@pytest.mark.parametrize("kind", ["sleep", "compute", "http"])
async def test_stall_is_found_with_file_and_line(
    kind: str, slow_url: str, database_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A blocked loop would look like a slow server, and nobody would know which line blocks."""
    block, where = {
        "sleep": (sleep_long, [line_of(sleep_long, "time.sleep(")]),
        "compute": (
            compute_long,
            [line_of(compute_long, "while"), line_of(compute_long, "sum(")],
        ),
        "http": (lambda: fetch(slow_url), [line_of(fetch, "urlopen")]),
    }[kind]
    await run_blocking(block)
    row = executor(database_folder)
    assert row["num_stalls"] == 1
    stall = json.loads(row["diagnosis"])
    assert any(stall["place"].startswith(f"{place},") for place in where), stall["place"]
    assert stall["rollout"] == "q2.1.0"
    assert stall["is_over"]
    assert 1.2 < stall["seconds"] < 2.5
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "blocked" in line]
    assert any(place in warning for place in where)
    assert "q2.1.0" in warning
    (report,) = reports("stall")
    text = report.read_text()
    assert str(report) in warning
    assert "Thread MainThread" in text
    assert "nanoeval-heartbeat" in text, "the stacks of all threads"
    assert "q3.1.0" in text, "the rollouts in flight"
    assert report.stat().st_mode & 0o077 == 0 or report.parent.stat().st_mode & 0o077 == 0


async def test_stall_that_goes_on_is_told_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One long stall would bury the console, or be told once and then look over."""
    monkeypatch.setenv("NANOEVAL_STALL_SECONDS", "0.2")
    await run_blocking(lambda: time.sleep(1.3))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "blocked for" in line]
    assert len(warnings) == 3, "at 0.2, 0.4 and 0.8 seconds"
    (report,) = reports("stall")
    assert report.read_text().count("the event loop has been blocked") == 3


async def test_stalls_at_the_same_line_are_counted_but_told_once(
    monkeypatch: pytest.MonkeyPatch,
    database_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An eval that blocks in each rollout would print and write thousands of reports."""
    monkeypatch.setenv("NANOEVAL_STALL_SECONDS", "0.2")

    def block_thrice() -> None:
        loop = asyncio.get_running_loop()
        for wait in (0.1, 0.6, 1.1):
            loop.call_later(wait, time.sleep, 0.35)

    await run_blocking(block_thrice, seconds=1.8)
    assert executor(database_folder)["num_stalls"] == 3
    assert capsys.readouterr().err.count("blocked for") == 1
    assert len(reports("stall")) == 1


async def test_slow_callbacks_are_counted_and_quick_ones_are_not(database_folder: Path) -> None:
    """The executor table would accuse a busy but healthy loop, or miss a sluggish one."""
    await run_blocking(lambda: time.sleep(0.4), seconds=0.3)
    assert executor(database_folder)["num_slow_callbacks"] == 1
    assert executor(database_folder)["num_stalls"] == 0


def test_loop_that_nobody_runs_is_not_a_stall(
    monkeypatch: pytest.MonkeyPatch, database_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Programs that step in and out of their loop would be accused while they are outside."""
    monkeypatch.setenv("NANOEVAL_STALL_SECONDS", "0.2")
    database_folder.mkdir(mode=0o700)
    loop = asyncio.new_event_loop()
    joined = join_run_set(database_folder / "watched.db", "driver")
    loop.run_until_complete(joined.__aenter__())
    time.sleep(0.7)
    loop.run_until_complete(asyncio.sleep(0.2))
    loop.run_until_complete(joined.__aexit__(None, None, None))
    loop.close()
    assert executor(database_folder)["num_stalls"] == 0
    assert "blocked" not in capsys.readouterr().err


async def test_watching_costs_under_one_percent_of_cpu() -> None:
    """Diagnosis that is always on must not slow what it watches."""
    used: list[float] = []

    def measure() -> None:
        (watchdog,) = [t for t in threading.enumerate() if t.name == "nanoeval-watchdog"]
        assert watchdog.ident is not None
        used.append(time.clock_gettime(time.pthread_getcpuclockid(watchdog.ident)))

    async def twice() -> None:
        await asyncio.sleep(0.2)
        measure()
        began = time.thread_time()
        await asyncio.sleep(3.0)
        measure()
        used.append(time.thread_time() - began)

    await asyncio.gather(run_blocking(lambda: None, seconds=3.4), twice())
    watchdog, loop = used[1] - used[0], used[2]
    assert watchdog < 0.03
    assert loop < 0.06, "the loop's own polling included"


async def test_signal_writes_stacks_and_rollouts_and_the_run_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without it nobody sees where a hanging run waits, short of killing it."""
    summary = await run_blocking(lambda: os.kill(os.getpid(), signal.SIGUSR1), seconds=0.6)
    assert summary["n"] == 4
    (report,) = reports("signal")
    text = report.read_text()
    assert "Rollouts in flight: 4" in text
    assert "q0.1.0" in text
    assert "Thread MainThread" in text
    assert line_of(Blocking._ask, "asyncio.sleep(self.seconds)").rpartition(":")[2] in text
    assert str(report) in capsys.readouterr().err
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL, "put back after the run"


async def test_signal_reaches_worker_processes(database_folder: Path) -> None:
    """A hanging rollout mostly hangs in a worker, not in the process that was started."""
    spec = EvalSpec(
        eval=_Waiting(),
        runner=RunnerArgs(
            run_set_id="watched",
            recorder=dummy_recorder(log=False),
            experimental_use_multiprocessing=True,
            num_processes=1,
        ),
    )
    running = asyncio.create_task(run(spec))
    pid = await _worker_at_work(database_folder)
    os.kill(pid, signal.SIGUSR1)
    summary = await running
    assert summary["n"] == 2
    (report,) = reports("signal")
    assert f"process {pid}" in report.read_text()
    assert "Rollouts in flight: 2" in report.read_text()


@chz.chz
class _Waiting(Eval[Task, bool]):
    def get_name(self) -> str:
        return "waiting"

    async def get_tasks(self) -> list[Task]:
        return [Task(question_id="a"), Task(question_id="b")]

    async def evaluate(self, task: Task) -> bool:
        await asyncio.sleep(2.0)
        return True

    async def get_summary(self, results: list[tuple[Task, bool]]) -> dict[str, Any]:
        return {"n": len(results)}


async def _worker_at_work(folder: Path) -> int:
    """The pid of the worker process that has both rollouts."""
    while True:
        await asyncio.sleep(0.1)
        if not (folder / "watched.db").exists():
            continue
        with closing(sqlite3.connect(folder / "watched.db")) as db:
            rows = db.execute(
                "SELECT x.pid FROM executor AS x WHERE x.role = 'worker' AND"
                " (SELECT count(*) FROM claim AS c WHERE c.executor_id = x.id) = 2"
            ).fetchall()
        if rows:
            await asyncio.sleep(0.2)
            return int(rows[0][0])


@pytest.mark.parametrize("text", ["soon", "-1", "nan"])
async def test_unusable_stall_seconds_are_refused(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typing error would turn the watchdog off in silence."""
    monkeypatch.setenv("NANOEVAL_STALL_SECONDS", text)
    with pytest.raises(ValueError, match="NANOEVAL_STALL_SECONDS"):
        await run_blocking(lambda: None)


async def test_zero_stall_seconds_turn_reports_off(
    monkeypatch: pytest.MonkeyPatch, database_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Someone who debugs with breakpoints needs silence."""
    monkeypatch.setenv("NANOEVAL_STALL_SECONDS", "0")
    await run_blocking(lambda: time.sleep(0.5))
    assert executor(database_folder)["num_stalls"] == 0
    assert "blocked" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # aiohttp's, about aiomonitor's code
async def test_aiomonitor_listens_on_loopback_with_its_console_off(
    monkeypatch: pytest.MonkeyPatch, database_folder: Path
) -> None:
    """Its console runs Python as this user, for whoever reaches the port."""
    monkeypatch.setenv("NANOEVAL_AIOMONITOR", "1")
    monkeypatch.setattr(_aiomonitor, "START_AFTER", 0.0)
    running = asyncio.create_task(run_blocking(lambda: None, seconds=8.0))
    port = None
    while port is None:
        await asyncio.sleep(0.1)
        if (database_folder / "watched.db").exists():
            with closing(sqlite3.connect(database_folder / "watched.db")) as db:
                row = db.execute("SELECT aiomonitor_port FROM executor").fetchone()
            port = row[0] if row else None
        assert not running.done(), "aiomonitor did not start"
    answers = await asyncio.to_thread(_talk, port, ["ps", "console"])
    assert "_ask" in answers or "Task" in answers
    assert "disabled" in answers
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


def _talk(port: int, commands: list[str]) -> str:
    """What aiomonitor answers to the commands."""
    answers = b""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.settimeout(1.0)
        # Telnet's answers: the terminal is an xterm of 80 by 24 (RFC 1091, RFC 1073).
        connection.sendall(b"\xff\xfb\x18\xff\xfa\x18\x00xterm\xff\xf0")
        connection.sendall(b"\xff\xfb\x1f\xff\xfa\x1f\x00\x50\x00\x18\xff\xf0")
        for command in ["", *commands]:
            if command:
                connection.sendall(command.encode() + b"\r")
            try:
                while chunk := connection.recv(65536):
                    answers += chunk
            except TimeoutError:
                continue
    return answers.decode(errors="replace")


async def test_port_that_cannot_be_had_does_not_disturb_the_run(
    monkeypatch: pytest.MonkeyPatch, database_folder: Path
) -> None:
    """A crowded machine would lose runs to their own diagnosis."""
    monkeypatch.setenv("NANOEVAL_AIOMONITOR", "1")
    monkeypatch.setattr(_aiomonitor, "START_AFTER", 0.0)

    def no_ports(count: int) -> list[int]:
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(_aiomonitor, "_free_ports", no_ports)
    began = time.monotonic()
    summary = await run_blocking(lambda: None, seconds=0.1)
    assert summary["n"] == 4
    assert time.monotonic() - began < 5
    assert executor(database_folder)["aiomonitor_port"] is None


def test_stall_of_another_format_is_ignored() -> None:
    """A database of a later version must not break the monitor."""
    assert _diagnostics.Stall.from_json("{}") is None
    assert _diagnostics.Stall.from_json("not json") is None
    assert _diagnostics.Stall.from_json("[1]") is None
