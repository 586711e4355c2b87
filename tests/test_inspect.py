"""Looking at run sets: what a person is told of them is true, and looking changes nothing."""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nanoeval import _inspect, run
from nanoeval._inspect import (
    RunSetFile,
    RunSetRow,
    UnknownRunSetError,
    UnreadableRunSetError,
    find_run_set,
    list_run_sets,
    look_at,
    nearest_ids,
    reading,
)
from nanoeval.bin.ls import table
from tests.sample_evals import Sums, spec

PROGRAM = Path(__file__).with_name("crash_program.py")
STRANGER = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's file")


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.02)


def look(run_set_id: str) -> RunSetRow:
    return look_at(find_run_set(run_set_id))


def num_done(run_set_id: str) -> int:
    return sum(
        e.num_done for row in list_run_sets() if row.run_set_id == run_set_id for e in row.evals
    )


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the midst of run set `busy`."""
    with subprocess.Popen(
        [sys.executable, str(PROGRAM), "busy", str(tmp_path / "log"), "in_process", "3000", "0.1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            wait_until(lambda: num_done("busy") > 20)
            yield process
        finally:
            process.kill()


@pytest.fixture
def finished(database_folder: Path) -> Path:
    """The database of run set `done`: 30 sums, of which the even half is right."""
    asyncio.run(run(spec(Sums(n=30, flaky=10), run_set_id="done")))
    return database_folder / "done.db"


def test_an_empty_folder_holds_no_run_sets() -> None:
    """Somebody who never ran anything would see an error."""
    assert list_run_sets() == []
    with pytest.raises(UnknownRunSetError, match=r"no run set 'x'; there are no run sets in /"):
        find_run_set("x")


def test_a_finished_run_set_is_told_in_full(finished: Path) -> None:
    """The listing would show wrong counts, scores or times."""
    (row,) = list_run_sets()
    (e,) = row.evals
    assert (row.run_set_id, row.state, row.problem) == ("done", "finished", None)
    assert not row.is_live
    assert not row.can_be_resumed
    assert row.size_bytes == finished.stat().st_size
    assert time.time() - 60 < row.created_at <= (row.finished_at or 0) <= time.time()
    assert (e.name, e.num_done, e.num_tasks) == ("sums", 30, 30)
    assert (e.num_failed, e.num_retried, e.num_running, e.score_mean) == (0, 3, 0, 0.5)


def test_looking_leaves_no_trace(finished: Path) -> None:
    """A viewer would litter the folder, or change a database that somebody keeps."""
    before = {path: path.read_bytes() for path in finished.parent.iterdir()}
    list_run_sets()
    assert {path: path.read_bytes() for path in finished.parent.iterdir()} == before


def test_a_viewer_cannot_write(finished: Path) -> None:
    """A query gone wrong in a viewer would change results."""
    with pytest.raises(UnreadableRunSetError, match="readonly"), reading(finished) as db:
        db.execute("UPDATE eval SET num_scored = 0")


def test_a_running_process_makes_its_run_set_live(running: subprocess.Popen[bytes]) -> None:
    """A live run would be offered for deletion, or its progress would stand still."""
    row = look("busy")
    assert (row.state, row.is_live, row.can_be_resumed) == ("running", True, False)
    assert row.executors[0].process.pid == running.pid
    assert 0 < row.evals[0].num_running <= 20
    before = num_done("busy")
    wait_until(lambda: num_done("busy") > before)


def test_a_viewer_does_not_hold_up_a_run(running: subprocess.Popen[bytes]) -> None:
    """An open page of the monitor would stop the run."""
    with reading(find_run_set("busy").path) as db:
        db.execute("BEGIN")
        seen = _inspect.read_evals(db)[0].num_done
        wait_until(lambda: num_done("busy") > seen + 20)
        assert _inspect.read_evals(db)[0].num_done == seen


def test_a_killed_process_leaves_a_crashed_run_set(running: subprocess.Popen[bytes]) -> None:
    """A dead run would be shown as running until its lease ran out, and could not be resumed."""
    running.kill()
    running.wait()
    row = look("busy")
    assert (row.state, row.is_live, row.can_be_resumed) == ("crashed", False, True)
    assert row.state_of(row.evals[0]) == "crashed"
    assert row.executors[0].standing == "dead"
    assert row.evals[0].num_done >= 20


def test_a_crash_without_its_shared_memory_file_is_still_read(
    running: subprocess.Popen[bytes],
) -> None:
    """Results that are in the write-ahead log alone would not be seen after a copy."""
    running.kill()
    running.wait()
    done = num_done("busy")
    path = find_run_set("busy").path
    Path(f"{path}-shm").unlink()
    assert num_done("busy") == done >= 20


def test_a_stopped_process_is_silent_after_its_lease(
    running: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hung run would count as live for ever."""
    running.send_signal(signal.SIGSTOP)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    row = look("busy")
    assert row.executors[0].standing == "silent"
    assert not row.is_live


async def test_evals_that_failed_or_were_interrupted_can_be_resumed(database_folder: Path) -> None:
    """A person would not be told how to go on."""
    await run(spec(Sums(n=3), run_set_id="one"))
    for state in ("failed", "interrupted"):
        change(database_folder / "one.db", f"UPDATE eval SET state = '{state}'")
        assert look("one").state == state
        assert look("one").can_be_resumed


async def test_newest_first(database_folder: Path) -> None:
    """The run that was just started would be at the end of a long list."""
    for number, run_set_id in enumerate(["b", "a", "c"]):
        await run(spec(Sums(n=1), run_set_id=run_set_id))
        change(database_folder / f"{run_set_id}.db", f"UPDATE run_set SET created_at = {number}")
    assert [row.run_set_id for row in list_run_sets()] == ["c", "a", "b"]


async def test_backups_are_shown_where_the_working_file_is_gone(database_folder: Path) -> None:
    """After a reboot nobody would learn that the results still exist."""
    await run(spec(Sums(n=4), run_set_id="kept", should_backup=True))
    row = look("kept")
    assert row.file.backup is not None
    assert not row.file.is_backup
    (database_folder / "kept.db").unlink()
    row = look("kept")
    assert row.file.is_backup
    assert row.evals[0].num_done == 4
    assert sorted(path.name for path in row.file.path.parent.iterdir()) == ["kept.db"]


def test_a_wrong_id_is_answered_with_the_nearest(finished: Path) -> None:
    """A slip of the finger would cost a search."""
    for wrong in ("doen", "don", "done2"):
        with pytest.raises(UnknownRunSetError, match="did you mean done"):
            find_run_set(wrong)
    with pytest.raises(UnknownRunSetError, match=r"the newest is done\."):
        find_run_set("3f0a77b2")
    assert find_run_set("done").path == finished


def test_nearest_ids_are_few_and_best_first() -> None:
    """The nearest id would drown among others."""
    known = ["a1b2c3", "a1b2c4", "a1b2c5", "a1b2c6", "zzzzzz"]
    assert nearest_ids("a1b2c", known) == ["a1b2c3", "a1b2c4", "a1b2c5"]
    assert nearest_ids("a1c2c6", known)[0] == "a1b2c6"
    assert nearest_ids("zzzzzz-old", known) == ["zzzzzz"]
    assert nearest_ids("", known) == []


def test_no_path_can_be_smuggled_in_as_an_id(database_folder: Path) -> None:
    """An id with slashes would reach files outside the folder."""
    database_folder.mkdir(mode=0o700)
    outside = database_folder.parent / "outside.db"
    sqlite3.connect(outside).close()
    with pytest.raises(UnknownRunSetError):
        find_run_set("../outside")


async def test_unusual_names_of_folders_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with a question mark or a percent sign in its name could not be listed."""
    folder = tmp_path / "runs 100%25 #1?mode=memory"
    monkeypatch.setenv("NANOEVAL_DATABASE_DIR", str(folder))
    await run(spec(Sums(n=2), run_set_id="odd"))
    assert look("odd").state == "finished"


PROBLEMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: os.truncate(path, 20_000), "is damaged"),
    "no database": (lambda path: path.write_text("text " * 1000), "is damaged"),
    "empty": (lambda path: os.truncate(path, 0), "is empty"),
    "newer": (lambda path: change(path, "PRAGMA user_version = 99"), "has schema 99, written by"),
    "older": (lambda path: change(path, "PRAGMA user_version = 0"), "of an older nanoeval"),
    "of another program": (
        lambda path: change(path, "DROP TABLE task"),
        "not the database of a run",
    ),
    "without a row": (lambda path: change(path, "DELETE FROM run_set"), "is empty"),
    "odd value": (
        lambda path: change(path, "UPDATE eval SET num_tasks = x'00'"),
        "is damaged.*num_tasks",
    ),
    "writable by others": (lambda path: path.chmod(0o666), "may be written by other users"),
    "a dead link": (lambda path: (path.unlink(), path.symlink_to("nowhere")), "is gone"),
}


def change(path: Path, statement: str) -> None:
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = DELETE")
    db.execute(statement)
    db.execute("PRAGMA journal_mode = WAL")
    db.close()


@pytest.mark.parametrize("kind", PROBLEMS)
def test_what_cannot_be_read_is_a_sentence(kind: str, finished: Path) -> None:
    """One bad file would hide all other run sets behind a traceback."""
    spoil, sentence = PROBLEMS[kind]
    shutil.copy2(finished, finished.with_name("good.db"))
    spoil(finished)
    rows = {row.run_set_id: row for row in list_run_sets()}
    assert rows["good"].state == "finished"
    assert rows["done"].state == "unreadable"
    assert re.search(sentence, rows["done"].problem or "")
    assert str(finished) in (rows["done"].problem or "")


@needs_root
def test_files_of_another_user_are_not_read(finished: Path) -> None:
    """Somebody could plant a run set and have it shown, and later resumed, as mine."""
    os.chown(finished, STRANGER, STRANGER)
    row = look("done")
    assert row.state == "unreadable"
    assert "belongs to" in (row.problem or "")
    assert row.evals == ()


def test_a_locked_file_is_a_sentence(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing would hang behind somebody's exclusive lock."""
    monkeypatch.setattr(_inspect, "BUSY_TIMEOUT", 0.05)
    db = sqlite3.connect(finished, isolation_level=None)
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    db.execute("UPDATE run_set SET host = 'elsewhere'")
    try:
        assert "is locked by another process" in (look("done").problem or "")
    finally:
        db.close()


def test_no_damage_becomes_an_exception(finished: Path, tmp_path: Path) -> None:
    """A flipped bit in one file would take the whole listing or the monitor down."""
    whole, path = finished.read_bytes(), tmp_path / "flipped.db"
    num_problems = 0
    for seed in range(400):
        dice = random.Random(seed)
        data = bytearray(whole[: dice.choice([len(whole)] * 4 + [dice.randrange(1, len(whole))])])
        reach = min(len(data), dice.choice([100, 4096, 20_000, len(data)]))
        for _ in range(dice.choice([1, 3, 20])):
            data[dice.randrange(reach)] ^= 1 << dice.randrange(8)
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        path.chmod(0o600)
        row = look_at(RunSetFile("flipped", path))
        assert table([row], 100)
        num_problems += row.problem is not None
    assert 100 < num_problems < 400


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_something_to_tell(
    tmp_path: Path, database_folder: Path
) -> None:
    """A process killed while it made its tables or queued its tasks would break the listing."""
    moments = random.Random(4)
    seen = set()
    for index in range(8):
        arguments = [f"early{index}", str(tmp_path / "log"), "in_process", "20000", "0.1"]
        path = database_folder / f"early{index}.db"
        with subprocess.Popen(
            [sys.executable, str(PROGRAM), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            while not path.exists():
                time.sleep(0.001)
            time.sleep(moments.choice([0, 0.002, 0.02, 0.3]))
            process.kill()
        row = look_at(RunSetFile(path.stem, path))
        assert (row.problem is None) == (row.state != "unreadable")
        if row.problem is not None:
            assert "is empty" in row.problem
        assert not row.is_live
        seen.add(row.state)
    assert "crashed" in seen
