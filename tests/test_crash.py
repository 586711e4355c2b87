"""Real processes, real signals: what is committed stays, what was running is run again."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanoeval import run
from nanoeval.bin.resume import resume
from tests.sample_evals import Sums, lines, spec

PROGRAM = Path(__file__).with_name("crash_program.py")
REPOSITORY = Path(__file__).resolve().parent.parent
MODES = ["in_process", "processes"]


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **options,
    )


def start_resume(run_set_id: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "nanoeval.bin.resume", f"run_set_id={run_set_id}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)


def end(process: subprocess.Popen[bytes], how: signal.Signals = signal.SIGKILL) -> str:
    """Signal a process, wait for its end, and give what it wrote to stderr."""
    if process.poll() is None:
        process.send_signal(how)
    _, stderr = process.communicate(timeout=30)
    return stderr.decode()


def committed(path: Path) -> set[int]:
    """The tasks whose results are in the database."""
    if not path.exists():
        return set()
    db = sqlite3.connect(path, timeout=30)
    try:
        return {id for (id,) in db.execute("SELECT task_id FROM outcome WHERE state IN (2, 4)")}
    except sqlite3.OperationalError:  # killed before the tables were made
        return set()
    finally:
        db.close()


def check_complete(path: Path, log: Path, n: int, undisturbed: dict[str, Any]) -> None:
    """Every attempt has one counted result and ran at least once; the summary is the same."""
    db = sqlite3.connect(path)
    counted = db.execute(
        "SELECT t.question_id, t.attempt_id, count(*) FROM outcome AS o"
        " JOIN task AS t ON t.id = o.task_id WHERE o.state IN (2, 4) GROUP BY 1, 2"
    ).fetchall()
    (summary,) = db.execute("SELECT summary FROM eval").fetchone()
    (claims,) = db.execute("SELECT count(*) FROM claim").fetchone()
    db.close()
    assert len(counted) == n
    assert {times for _, _, times in counted} == {1}
    assert {line.rpartition(".")[0] for line in lines(log)} == {f"q{a}.1" for a in range(n)}
    assert claims == 0
    volatile = {"run_id"}
    expected = {k: v for k, v in undisturbed.items() if k not in volatile}
    assert json.loads(summary) == json.loads(json.dumps(expected))


@pytest.fixture
def undisturbed() -> dict[str, Any]:
    """The summary of the same eval, run in peace."""
    eval = Sums(n=2000, flaky=50)
    return asyncio.run(run(spec(eval, concurrency=2000)))


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("mode", MODES)
def test_killed_main_process_loses_no_result(
    mode: str, tmp_path: Path, database_folder: Path, undisturbed: dict[str, Any]
) -> None:
    """Promises 1 to 3: a result lost or counted twice, a rollout never run, another summary."""
    moments = random.Random(1)
    log, path = tmp_path / "log", database_folder / "killed.db"
    process = start("killed", str(log), mode)
    for _ in range(20):
        before = committed(path)
        # From within the queueing to well into the rollouts.
        wait_until(lambda p=process: path.exists() or p.poll() is not None)
        time.sleep(moments.uniform(0.0, 0.5))
        end(process)
        assert before <= committed(path)
        ran = len(lines(log))
        process = start_resume("killed")
        if moments.random() < 0.5:
            wait_until(lambda ran=ran, p=process: len(lines(log)) > ran or p.poll() is not None)
    stderr = process.communicate(timeout=120)[1].decode()
    if process.returncode != 0:
        pytest.fail(stderr)
    check_complete(path, log, 2000, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_no_committed_result_runs_again(tmp_path: Path, database_folder: Path) -> None:
    """Paid work would be done twice."""
    log, path = tmp_path / "log", database_folder / "again.db"
    process = start("again", str(log), "in_process", "600")
    wait_until(lambda: len(committed(path)) > 100)
    end(process)
    db = sqlite3.connect(path)
    done = {
        f"{q}.1.{r}"
        for q, r in db.execute(
            "SELECT t.question_id, t.retry_idx FROM outcome AS o JOIN task AS t ON t.id = o.task_id"
        )
    }
    db.close()
    ran_before = Counter(line.split()[0] for line in lines(log))
    resumed = start_resume("again")
    assert resumed.wait(60) == 0
    resumed.communicate()
    ran = Counter(line.split()[0] for line in lines(log))
    assert len(done) > 100
    assert {name for name in done if ran[name] != ran_before[name]} == set()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_killed_workers_lose_no_result(
    tmp_path: Path, database_folder: Path, undisturbed: dict[str, Any]
) -> None:
    """The run would hang or count wrong when workers die, again and again."""
    choice = random.Random(2)
    log, path = tmp_path / "log", database_folder / "workers.db"
    process = start("workers", str(log), "processes")
    n_killed = 0
    while process.poll() is None:
        time.sleep(0.5)
        workers = children(process.pid)
        if workers and lines(log) and process.poll() is None:
            os.kill(choice.choice(workers), signal.SIGKILL)
            n_killed += 1
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr.decode()
    assert n_killed >= 3
    assert b"was killed by signal 9" in stderr
    check_complete(path, log, 2000, undisturbed)


def children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_late_answers_of_a_stopped_worker_are_dropped(
    tmp_path: Path, database_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that slept past its lease would have its tasks counted twice."""
    monkeypatch.setenv("NANOEVAL_LEASE_SECONDS", "1")
    log, path = tmp_path / "log", database_folder / "stopped.db"
    process = start("stopped", str(log), "processes", "400", "0.1")
    wait_until(lambda: len(children(process.pid)) == 2 and len(lines(log)) > 50)
    stopped = children(process.pid)[0]
    os.kill(stopped, signal.SIGSTOP)
    try:
        time.sleep(3)
    finally:
        os.kill(stopped, signal.SIGCONT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr.decode()
    check_complete(path, log, 400, asyncio.run(run(spec(Sums(n=400, flaky=50)))))
    ran = Counter(line.split()[0] for line in lines(log))
    assert max(ran.values()) == 2, "the lease never ran out, so nothing was shown"


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_a_run_in_order(
    mode: str, how: signal.Signals, tmp_path: Path, database_folder: Path
) -> None:
    """Promise 5: a run that cannot be ended, claims left behind, no way to go on."""
    moments = random.Random(3)
    for index in range(3):
        log, path = tmp_path / f"log{index}", database_folder / f"int{index}.db"
        process = start(f"int{index}", str(log), mode)
        wait_until(lambda log=log: lines(log))
        time.sleep(moments.uniform(0, 0.7))
        below = children(process.pid)
        began = time.monotonic()
        stderr = end(process, how)
        assert time.monotonic() - began < 2 + 1  # a slow machine's allowance
        assert process.returncode == 130
        assert f"python -m nanoeval.bin.resume run_set_id=int{index}" in stderr
        assert "Traceback" not in stderr
        db = sqlite3.connect(path)
        assert db.execute("SELECT count(*) FROM claim").fetchone() == (0,)
        assert db.execute("SELECT state FROM eval").fetchone() == ("interrupted",)
        db.close()
        assert not [pid for pid in below if is_alive(pid)]


@pytest.mark.slow
def test_a_second_ctrl_c_exits_at_once(tmp_path: Path) -> None:
    """A clean-up that hangs would hold a person at the terminal."""
    code = (
        "import asyncio, sys\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from nanoeval.setup import nanoeval_entrypoint\n"
        "async def main():\n"
        "    try:\n        print('ready', flush=True)\n        await asyncio.sleep(60)\n"
        "    finally:\n        await asyncio.sleep(60)\n"
        "nanoeval_entrypoint(main())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    began = time.monotonic()
    end(process, signal.SIGINT)
    assert time.monotonic() - began < 1
    assert process.returncode == 130


@pytest.mark.slow
def test_no_worker_outlives_a_killed_parent(tmp_path: Path) -> None:
    """Orphans would go on paying for model calls whose results nobody reads."""
    log = tmp_path / "log"
    process = start("orphans", str(log), "processes")
    wait_until(lambda: len(children(process.pid)) == 2 and lines(log))
    workers = children(process.pid)
    end(process)
    wait_until(lambda: not any(is_alive(pid) for pid in workers), seconds=3)


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


async def test_a_blocked_event_loop_keeps_its_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database_folder: Path
) -> None:
    """One synchronous call longer than a lease would have every rollout done twice."""
    monkeypatch.setenv("NANOEVAL_LEASE_SECONDS", "0.8")
    import chz

    @chz.chz
    class Blocking(Sums):
        async def evaluate(self, task: Any) -> bool:
            result = await super().evaluate(task)
            if task.a == 5:
                time.sleep(2.5)
            return result

    log = tmp_path / "log"
    bystander = subprocess.Popen(
        [sys.executable, "-c", REAPER, str(database_folder / "blocked.db")]
    )
    try:
        await run(spec(Blocking(n=50, seconds=0.01, log=str(log)), run_set_id="blocked"))
    finally:
        bystander.kill()
        bystander.wait()
    assert max(Counter(line.split()[0] for line in lines(log)).values()) == 1
    db = sqlite3.connect(database_folder / "blocked.db")
    reasons = db.execute("SELECT end_reason FROM executor WHERE role = 'driver'").fetchall()
    db.close()
    assert reasons == [("ended",)]


# Another executor of the same run set, which takes back whatever it finds abandoned.
REAPER = f"""
import asyncio, sys, time
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from nanoeval._store import Store
path = Path(sys.argv[1])
while not path.exists():
    time.sleep(0.01)
time.sleep(0.2)
async def main():
    async with Store(path, 60) as store:
        while True:
            await store.reap(losses=0)
            await asyncio.sleep(0.1)
asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_resume_of_a_large_run_starts_at_once(tmp_path: Path, database_folder: Path) -> None:
    """A person who resumes 100,000 tasks would sit and wait."""
    from tests.half_done import make_half_done

    log = tmp_path / "log"
    make_half_done("large", Sums(n=100_000, seconds=0.001, log=str(log)), n_done=50_000)
    began = time.monotonic()
    process = start_resume("large")
    wait_until(lambda: lines(log))
    seconds = time.monotonic() - began
    end(process)
    assert seconds < 1.5 * 2  # twice the target: other tests share the two cores


async def test_resume_uses_the_backup_when_the_working_file_is_gone(database_folder: Path) -> None:
    """A reboot clears /dev/shm, and with it everything that was paid for."""
    await run(spec(Sums(n=20), run_set_id="gone", should_backup=True))
    for file in database_folder.glob("gone.db*"):
        file.unlink()
    (summary,) = await resume("gone", resume_completed_evals=True)
    assert summary["num_scored"] == 20
