"""Resume from a backup: only when nobody works on it, never in halves, never mixed with the old."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nanoeval import run
from nanoeval._run_set import backup_path
from nanoeval.bin.resume import resume
from tests.sample_evals import Sums, lines, spec

REPOSITORY = Path(__file__).resolve().parent.parent

# Runs 60 rollouts of 0.1 s, two at a time, with a backup after 0.2 s.
PROGRAM = """
import asyncio, sys
from nanoeval import _chores, run
from tests.sample_evals import Sums, spec
_chores.SECONDS_TO_FIRST_BACKUP = 0.2
eval = Sums(n=60, seconds=0.1, log=sys.argv[1])
asyncio.run(run(spec(eval, run_set_id="kept", concurrency=2, should_backup=True)))
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **more}


def resumed(run_set_id: str = "kept", **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "nanoeval.bin.resume", f"run_set_id={run_set_id}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **{"env": environment(), **options},
    )


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the midst of run set `kept`, of which there is a backup."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "log")]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(backup_path("kept").exists)
            wait_until(lambda: len(lines(tmp_path / "log")) > 5)
            yield process
        finally:
            process.kill()


@pytest.fixture
def backed_up(database_folder: Path) -> Path:
    """Where the database of the finished run set `kept` lay, which has a backup."""
    asyncio.run(run(spec(Sums(n=20), run_set_id="kept", should_backup=True)))
    path = database_folder / "kept.db"
    path.unlink()
    return path


async def num_scored() -> int:
    (summary,) = await resume("kept", resume_completed_evals=True)
    return int(summary["num_scored"])


@pytest.mark.parametrize("how", ["deleted", "another folder"])
def test_a_backup_is_not_resumed_beside_its_living_driver(
    how: str, running: subprocess.Popen[bytes], database_folder: Path, tmp_path: Path
) -> None:
    """Every rollout would run twice, and be paid twice."""
    folder = database_folder
    if how == "deleted":
        for file in database_folder.glob("kept.db*"):
            file.unlink()
    else:
        folder = tmp_path / "elsewhere"
        folder.mkdir(mode=0o700)
    process = resumed(env=environment(NANOEVAL_DATABASE_DIR=str(folder)))
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert f"run set kept may still be running: process {running.pid}" in stderr
    assert list(folder.iterdir()) == []
    running.send_signal(signal.SIGKILL)
    running.wait()
    process = resumed(env=environment(NANOEVAL_DATABASE_DIR=str(folder)))
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    assert "60 = 60 scored" in stderr


def test_two_who_restore_at_once_do_not_work_side_by_side(
    running: subprocess.Popen[bytes], database_folder: Path, tmp_path: Path
) -> None:
    """Each would overwrite the other's database, and run all that is left."""
    running.kill()
    running.wait()
    for file in database_folder.glob("kept.db*"):
        file.unlink()
    before = Counter(lines(tmp_path / "log"))
    both = [resumed(), resumed()]
    said = [process.communicate(timeout=50)[1] for process in both]
    status = [process.returncode for process in both]
    if status == [1, 1]:  # each saw the other
        process = resumed()
        process.communicate(timeout=30)
        status.append(process.returncode)
    assert status.count(0) >= 1, said
    ran = Counter(
        line.split()[0] for line in (Counter(lines(tmp_path / "log")) - before).elements()
    )
    assert max(ran.values()) == 1


async def test_the_log_of_a_database_that_was_moved_away_is_not_played_back(
    backed_up: Path,
) -> None:
    """Following the advice for a damaged file would damage its backup."""
    log = Path(f"{backed_up}-wal")
    shutil.copy2(backup_path("kept"), backed_up)
    with closing(sqlite3.connect(backed_up)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with db:
            db.execute("DELETE FROM outcome WHERE seq > 5")
        left = log.read_bytes()
    backed_up.rename(f"{backed_up}.damaged")
    log.write_bytes(left)
    assert await num_scored() == 20


async def test_an_empty_working_file_gives_way_to_the_backup(backed_up: Path) -> None:
    """An emptied file would be called damaged, and the person sent to move it away."""
    backed_up.touch(mode=0o600)
    assert await num_scored() == 20


async def test_a_restored_database_is_private_from_its_first_byte(
    backed_up: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others could read the prompts and replies of a run."""
    modes = set()
    copy = shutil.copyfileobj

    def look_and_copy(source: Any, target: Any) -> None:
        modes.add(stat.S_IMODE(os.fstat(target.fileno()).st_mode))
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfileobj", look_and_copy)
    backup_path("kept").chmod(0o644)
    assert await num_scored() == 20
    assert modes == {0o600}
    assert stat.S_IMODE(backed_up.stat().st_mode) == 0o600


@pytest.mark.slow
def test_a_restore_without_room_can_be_tried_again(backed_up: Path, tmp_path: Path) -> None:
    """Half a file would be left, and taken for the run set ever after."""
    with closing(sqlite3.connect(backup_path("kept"))) as db, db:
        db.execute("UPDATE executor SET ended_at = 1")  # this process, which lives on
        db.execute("CREATE TABLE ballast AS SELECT zeroblob(4000000) AS bytes")
    small = tmp_path / "small"
    small.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs needs root: run the tests as root")
    try:
        process = resumed(env=environment(NANOEVAL_DATABASE_DIR=str(small)))
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 1
        assert stderr.count("\n") == 1
        assert "cannot be copied" in stderr
        assert "Make room there" in stderr
        assert list(small.iterdir()) == []
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        process = resumed(env=environment(NANOEVAL_DATABASE_DIR=str(small)))
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 0, stderr
        assert "20/20 done" in stderr
    finally:
        subprocess.run(["umount", str(small)], check=True)
