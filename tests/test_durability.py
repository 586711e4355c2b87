"""Full, damaged, newer and foreign databases: a specific error, and nothing lost or unpickled."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nanoeval import _codec, _schema, run
from nanoeval._chores import back_up
from nanoeval._database_file import StoreError
from nanoeval._inspect import UnknownRunSetError, find_run_set, look_at
from nanoeval._run_set import backup_path
from nanoeval._schema import NewerSchemaError
from nanoeval.bin import rm
from nanoeval.bin.resume import resume
from nanoeval.evaluation import joined
from tests.sample_evals import Sums, lines, spec

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real tmpfs of 8 MiB."""
    folder = tmp_path / "small"
    folder.mkdir(mode=0o700)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs needs root: run the tests as root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
async def test_a_full_disk_keeps_results_and_the_run_can_go_on(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 6: what was paid for would be lost with the disk's last byte."""
    monkeypatch.setenv("NANOEVAL_DATABASE_DIR", str(small_disk))
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 1024**2)
    with pytest.raises(StoreError, match="is full") as caught:
        await run(spec(Wordy(n=4000), run_set_id="full", concurrency=50))
    text = str(caught.value) + "".join(caught.value.__notes__)
    assert "safe" in text
    assert "run_set_id=full" in text
    with sqlite3.connect(small_disk / "full.db") as db:
        (before,) = db.execute("SELECT count(*) FROM outcome").fetchone()
    db.close()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    (summary,) = await resume("full")
    assert 0 < before < 4000
    assert summary["num_scored"] == 4000


import chz  # noqa: E402


@chz.chz
class Wordy(Sums):
    """Results of 2 KiB."""

    async def evaluate(self, task: Any) -> Any:
        return {"correct": True, "text": "x" * 2048}


@pytest.fixture
def finished(database_folder: Path) -> Path:
    """The database of a finished run set, "done"."""
    asyncio.run(run(spec(Sums(n=300), run_set_id="done")))
    return database_folder / "done.db"


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A file that appears if anything that was planted is unpickled."""
    return tmp_path / "unpickled"


def plant(database: Path, mark: Path) -> None:
    """Put a pickle into the database that runs a command when it is loaded."""
    blob = f"cos\nsystem\n(S'touch {mark}'\ntR.".encode()
    with sqlite3.connect(database) as db:
        db.execute("UPDATE eval SET spec = ?, recorder = ?, state = 'interrupted'", (blob, blob))
        db.execute("UPDATE eval SET definitions = ?", (blob,))
    db.close()


async def test_a_truncated_database_is_refused(finished: Path, planted: Path) -> None:
    """SQLite would read what is left and call it all."""
    plant(finished, planted)
    size = finished.stat().st_size
    with finished.open("r+b") as file:
        file.truncate(size // 2)
    with pytest.raises(StoreError, match="is damaged"):
        await resume("done", resume_completed_evals=True)
    assert not planted.exists()


def test_a_database_with_flipped_bits_is_refused_or_its_results_are_unharmed(
    finished: Path,
) -> None:
    """A result that the disk changed would be counted as it is."""
    original = finished.read_bytes()
    expected = asyncio.run(resume("done", resume_completed_evals=True))[0]
    original = finished.read_bytes()
    chance = random.Random(4)
    n_refused = 0
    for _ in range(25):
        damaged = bytearray(original)
        for _ in range(20):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        finished.write_bytes(damaged)
        for side_file in (f"{finished}-wal", f"{finished}-shm"):
            Path(side_file).unlink(missing_ok=True)
        try:
            (summary,) = asyncio.run(resume("done", resume_completed_evals=True))
        except (StoreError, NewerSchemaError, _codec.DamagedPickleError):
            n_refused += 1
        except (ValueError, RuntimeError) as error:
            pytest.fail(f"not a specific error: {error!r}")
        else:
            scores = {k: v for k, v in summary.items() if k != "run_id"}
            assert scores == {k: v for k, v in expected.items() if k != "run_id"}
    assert n_refused > 5


async def test_a_newer_schema_is_refused_with_the_version_that_wrote_it(
    finished: Path, planted: Path
) -> None:
    """An old version would ruin what a new one wrote."""
    plant(finished, planted)
    with sqlite3.connect(finished) as db:
        db.execute(f"PRAGMA user_version = {len(_schema.MIGRATIONS) + 1}")
        db.execute("UPDATE run_set SET nanoeval_version = '99.1'")
    db.close()
    before = finished.read_bytes()
    with pytest.raises(NewerSchemaError, match=r"written by nanoeval 99\.1"):
        await resume("done")
    assert finished.read_bytes() == before
    assert not planted.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root: run as root")
async def test_files_and_folders_of_others_are_refused(finished: Path, planted: Path) -> None:
    """Someone else's pickle would run as you."""
    plant(finished, planted)
    os.chown(finished, 12345, 12345)
    with pytest.raises(PermissionError, match="belongs to"):
        await resume("done")
    os.chown(finished, 0, 0)
    os.chown(finished.parent, 12345, 12345)
    with pytest.raises(PermissionError, match="belongs to"):
        await run(spec(Sums(n=1)))
    os.chown(finished.parent, 0, 0)
    assert not planted.exists()


async def test_something_that_is_no_database_is_refused(database_folder: Path) -> None:
    """A file that got its name by accident would be overwritten."""
    await run(spec(Sums(n=1)))
    (database_folder / "text.db").write_text("hello " * 1000)
    (database_folder / "text.db").chmod(0o600)
    with pytest.raises(StoreError, match="is damaged"):
        await resume("text")
    with pytest.raises(StoreError, match="is damaged"):
        await run(spec(Sums(n=1), run_set_id="text"))
    assert (database_folder / "text.db").read_text().startswith("hello")


async def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    """ "unable to open database file" names neither file nor remedy."""
    code = (
        "import asyncio, os, sys\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "os.environ['NANOEVAL_DATABASE_DIR'] = '/proc/nowhere'\n"
        "from nanoeval import run\n"
        "from tests.sample_evals import Sums, spec\n"
        "asyncio.run(run(spec(Sums(n=1))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "/proc/nowhere" in "".join(done.stderr.splitlines()[-3:])


async def test_a_wrong_run_set_is_named(database_folder: Path) -> None:
    """A slip of the keyboard would end in a traceback."""
    with pytest.raises(UnknownRunSetError, match="no run set 'nobody'"):
        await resume("nobody")


def test_evals_of_main_are_resumed_by_another_program(tmp_path: Path) -> None:
    """An eval in one file could never be resumed."""
    script = tmp_path / "mine.py"
    script.write_text(
        "import asyncio, sys, os\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from typing import Any\n"
        "import chz, nanoeval\n"
        "from nanoeval import Eval, EvalSpec, RunnerArgs, Task\n"
        "class Mine(Task):\n    n: int\n"
        "class Answer:\n"
        "    def __init__(self, correct): self.correct = correct\n"
        "@chz.chz\n"
        "class Sums(Eval[Mine, Any]):\n"
        "    def get_name(self): return 'mine'\n"
        "    async def get_tasks(self): return [Mine(question_id=str(i), n=i) for i in range(40)]\n"
        "    async def evaluate(self, task):\n"
        "        if task.n == 20 and 'FIRST' in os.environ: os.kill(os.getpid(), 9)\n"
        "        await asyncio.sleep(0.01)\n"
        "        return Answer(helper(task))\n"
        "    async def get_summary(self, results):\n"
        "        return {'right': sum(r.correct for _, r in results), 'n': len(results)}\n"
        "def helper(task): return task.n % 2 == 0\n"
        "spec = EvalSpec(eval=Sums(), runner=RunnerArgs(run_set_id='mine', concurrency=2))\n"
        "asyncio.run(nanoeval.run(spec))\n"
    )
    killed = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "FIRST": "1"},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -9, killed.stderr.decode()
    resumed = subprocess.run(
        [sys.executable, "-m", "nanoeval.bin.resume", "run_set_id=mine"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    database = Path(os.environ["NANOEVAL_DATABASE_DIR"], "mine.db")
    db = sqlite3.connect(database)
    (summary,) = db.execute("SELECT summary FROM eval").fetchone()
    db.close()
    assert '"right": 20, "n": 40' in summary


MODES = {"in_process": {}, "processes": {"executor": "processes", "num_processes": 2}}


@pytest.mark.parametrize("mode", MODES)
async def test_a_database_that_is_deleted_during_the_run_lives_on_in_its_backup(
    mode: str,
    tmp_path: Path,
    database_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Logging out clears /dev/shm: the last good copy would be replaced by an empty one."""
    monkeypatch.setattr("nanoeval._chores.SECONDS_TO_FIRST_BACKUP", 0.1)
    log = tmp_path / "log"
    eval = Sums(n=40, seconds=0.05, log=str(log))
    options = {"run_set_id": "gone", "concurrency": 2, "should_backup": True, **MODES[mode]}
    running = asyncio.create_task(run(spec(eval, **options)))
    while len(lines(log)) < 10:
        await asyncio.sleep(0.01)
    for file in database_folder.glob("gone.db*"):
        file.unlink()
    summary = await running
    assert "gone.db was deleted or replaced while the run uses it" in capsys.readouterr().err
    assert list(database_folder.iterdir()) == []
    (again,) = await resume("gone", resume_completed_evals=True)
    assert again == summary
    assert again["num_scored"] == 40


async def test_an_emptied_database_never_replaces_its_backup(
    database_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One slip (`> X.db`) would cost the run and its copy as well."""
    path = database_folder / "cut.db"

    async def empty_it() -> None:
        async with joined("cut") as run_set:
            await back_up(run_set)
            before = backup_path("cut").read_bytes()
            with closing(sqlite3.connect(path)) as db:
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            os.truncate(path, 0)
            await back_up(run_set)
            assert backup_path("cut").read_bytes() == before

    with pytest.raises(StoreError, match=r"cut\.db is damaged"):
        await empty_it()
    assert "a backup of run set cut failed" in capsys.readouterr().err


@pytest.mark.parametrize("root", ["/proc/nowhere", "file"])
async def test_a_run_that_cannot_be_backed_up_goes_on(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong folder for copies would end the run that they are made of."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOEVAL_ROOT_DIR", str(tmp_path / root))
    summary = await run(spec(Sums(n=5), should_backup=True))
    assert summary["num_scored"] == 5
    told = capsys.readouterr().err
    assert "a backup of run set" in told
    assert str(tmp_path / root) in told


def test_half_a_backup_of_a_killed_process_goes_with_the_next(tmp_path: Path) -> None:
    """Every kill during a backup would take the disk space of one more."""
    target = Path(os.environ["NANOEVAL_ROOT_DIR"], "backups", "half.db")
    code = (
        "import os, signal, sqlite3, sys\n"
        "from contextlib import closing\n"
        "from pathlib import Path\n"
        "from nanoeval import _database_file\n"
        "_database_file._refuse_empty = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)\n"
        "_database_file.BackupSource(Path(sys.argv[1])).back_up(Path(sys.argv[2]))\n"
    )
    asyncio.run(run(spec(Sums(n=3), run_set_id="half")))
    database = Path(os.environ["NANOEVAL_DATABASE_DIR"], "half.db")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for next_step in ("backup", "rm"):
        command = [sys.executable, "-c", code, str(database), str(target)]
        assert subprocess.run(command, env=environment, check=False).returncode == -9
        assert len(list(target.parent.glob("*.partial"))) == 1
        if next_step == "backup":
            asyncio.run(run(spec(Sums(n=3), run_set_id="half", should_backup=True)))
        else:
            assert rm.delete(look_at(find_run_set("half")))
        assert list(target.parent.glob("*.partial")) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root: run the tests as root")
def test_a_database_folder_on_a_read_only_disk_is_named(tmp_path: Path) -> None:
    """ "Read-only file system" says neither which nor what to do."""
    folder = tmp_path / "read_only"
    folder.mkdir(mode=0o700)
    options = ["-o", "ro,size=1m,mode=0700"]
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], check=True)
    try:
        code = (
            "import asyncio\n"
            "from nanoeval import run\n"
            "from tests.sample_evals import Sums, spec\n"
            "asyncio.run(run(spec(Sums(n=1), run_set_id='here')))\n"
        )
        for place in (folder, folder / "below"):
            done = subprocess.run(
                [sys.executable, "-c", code],
                env={
                    **os.environ,
                    "PYTHONPATH": str(REPOSITORY),
                    "NANOEVAL_DATABASE_DIR": str(place),
                },
                capture_output=True,
                text=True,
                check=False,
            )
            last = done.stderr.splitlines()[-1]
            assert str(place) in last
            assert "Read-only file system" in last
            assert "NANOEVAL_DATABASE_DIR" in last
    finally:
        subprocess.run(["umount", str(folder)], check=True)
