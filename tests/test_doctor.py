"""The doctor names what is wrong with a run, and what to do."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import closing
from pathlib import Path

import chz
import pytest

from nanoeval import _inspect, run
from nanoeval.bin import doctor
from tests.monitored_program import live_run
from tests.sample_evals import Sum, Sums, spec


def run_sums(run_set_id: str = "sums") -> None:
    asyncio.run(run(spec(Sums(n=6), run_set_id=run_set_id)))


def diagnose(run_set_id: str) -> list[doctor.Finding]:
    return doctor.findings(_inspect.look_at(_inspect.find_run_set(run_set_id)))


def only(found: list[doctor.Finding], text: str) -> doctor.Finding:
    (finding,) = [f for f in found if text in f.problem]
    return finding


def change(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        for statement in statements:
            db.execute(statement)


def test_healthy_run_has_no_findings(capsys: pytest.CaptureFixture[str]) -> None:
    """False alarms teach people to ignore the doctor."""
    run_sums()
    assert diagnose("sums") == []
    doctor.main()
    said = capsys.readouterr().out
    assert "Run set sums: finished" in said
    assert "6 of 6 done" in said
    assert "Nothing is wrong" in said


def test_killed_run_has_no_live_executor() -> None:
    """The commonest trouble: the process is gone, and nobody noticed."""
    with live_run("killed"):
        pass
    finding = only(diagnose("killed"), "no live executor")
    assert "died" in finding.problem
    assert "finished results are kept" in finding.problem
    assert finding.remedy.startswith("Go on with: NANOEVAL_DATABASE_DIR=")
    assert finding.remedy.endswith(" python -m nanoeval.bin.resume run_set_id=killed")


def test_stopped_process_is_told_from_a_dead_one(database_folder: Path) -> None:
    """Resuming beside a process that is only stopped would run tasks twice."""
    with live_run("stopped") as pid:
        change(database_folder / "stopped.db", "UPDATE executor SET lease_until = 1")
        row = _inspect.look_at(_inspect.find_run_set("stopped"))
        if row.is_live:  # a heartbeat came in between
            change(database_folder / "stopped.db", "UPDATE executor SET lease_until = 1")
        finding = only(diagnose("stopped"), "last sign of life")
        assert f"driver {pid}" in finding.problem.lower()
        assert f"kill -CONT {pid}" in finding.remedy


def test_rollout_many_times_the_median_is_named_with_its_last_event() -> None:
    """One hanging rollout holds up the whole run."""
    with live_run("hanging", num_done=40):
        time.sleep(10.5)
        finding = only(diagnose("hanging"), "times the median")
        assert "q3.1.0 of endless has run for" in finding.problem
        assert "last recorded event: sampling" in finding.problem
        assert "rollout_timeout" in finding.remedy


def test_blocked_loop_is_named_by_file_and_line() -> None:
    """A blocked loop stops everything, and looks like a slow server."""
    with live_run("blocked", "block", num_done=1):
        time.sleep(3.5)
        finding = only(diagnose("blocked"), "has been blocked")
        place = Path(__file__).with_name("monitored_program.py")
        line = 1 + next(
            n for n, line in enumerate(place.read_text().splitlines()) if "time.sleep(3600)" in line
        )
        assert f"{place}:{line}" in finding.problem
        assert "q2.1.0" in finding.problem
        assert "asyncio.to_thread" in finding.remedy
        report = finding.remedy.partition("The stacks stand in ")[2].rstrip(".")
        assert "time.sleep(3600)" in Path(report).read_text()


def test_back_off_of_all_tasks_is_told_with_its_error() -> None:
    """A run that waits ten minutes for a rate limit looks dead."""
    with live_run("waiting", "retry"):
        time.sleep(1.0)
        found = diagnose("waiting")
        finding = only(found, "back-off")
        assert "All 20 queued tasks of endless" in finding.problem
        assert "RolloutSystemError: HTTP 429: slow down" in finding.problem
        assert "9 min" in finding.problem or "10 min" in finding.problem
        assert "nanoeval.bin.concurrency run_set_id=waiting" in finding.remedy
        assert "80 %" in only(found, "of the tries").problem


def test_clock_that_runs_ahead_is_named(database_folder: Path) -> None:
    """With clocks apart, leases run out early and claims go back and forth."""
    with live_run("ahead"):
        later = time.time() + 3600
        change(
            database_folder / "ahead.db",
            f"UPDATE executor SET heartbeat_at = {later}, lease_until = {later}, pid = 1,"
            " host = 'elsewhere', host_id = 'elsewhere'",
        )
        finding = only(diagnose("ahead"), "The clock of elsewhere")
        assert "59 min" in finding.problem or "1 h 00 min" in finding.problem


def test_nearly_full_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/shm is small in containers, and a full one ends the run."""
    run_sums()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 0, 20 << 20))
    finding = only(diagnose("sums"), "nearly full")
    assert "20 MiB of 1,024 MiB" in finding.problem
    assert "NANOEVAL_DATABASE_DIR" in finding.remedy


@chz.chz
class Broken(Sums):
    """Raises what is no system error."""

    async def evaluate(self, task: Sum) -> bool:
        raise LookupError("no key")


def test_run_that_an_exception_ended_tells_which() -> None:
    """The traceback scrolled away hours ago."""
    with pytest.raises(BaseExceptionGroup):
        asyncio.run(run(spec(Broken(n=2), run_set_id="broken")))
    finding = only(diagnose("broken"), "ended by an error")
    assert "LookupError" in finding.problem
    assert "no key" in finding.problem
    assert "nanoeval.bin.resume run_set_id=broken" in finding.remedy


def test_damaged_file_is_a_sentence(database_folder: Path) -> None:
    """The doctor is called when things are bad; it must not break as well."""
    run_sums()
    path = database_folder / "sums.db"
    content = bytearray(path.read_bytes())
    content[100:4000] = b"\xff" * 3900
    path.write_bytes(bytes(content))
    (finding,) = diagnose("sums")
    assert "damaged" in finding.problem


def test_program_says_which_run_sets_there_are() -> None:
    """An id with a typing error."""
    run_sums()
    done = subprocess.run(
        [sys.executable, "-m", "nanoeval.bin.doctor", "run_set_id=sum"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip().startswith("nanoeval: there is no run set 'sum'; did you mean sums?")


async def test_an_emptied_database_is_sent_back_to_its_backup(database_folder: Path) -> None:
    """The doctor would say that nothing is wrong where every result is gone."""
    await run(spec(Sums(n=6), run_set_id="sums", should_backup=True))
    path = database_folder / "sums.db"
    change(path, "DELETE FROM outcome", "DELETE FROM task", "DELETE FROM eval")
    (finding,) = diagnose("sums")
    assert "It holds no eval" in finding.problem
    assert f"move {path} away, and with it sums.db-wal" in finding.remedy
    path.unlink()
    path.touch(mode=0o600)
    (finding,) = diagnose("sums")
    assert "is empty" in finding.problem
    assert finding.remedy.startswith("Go on from its backup")
