"""The programs for run sets: ls, concurrency, sqlite, rm. What they say, change, and refuse."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nanoeval import run
from nanoeval._inspect import RunSetRow, find_run_set, list_run_sets, look_at
from nanoeval.bin import ls
from nanoeval.bin._command import run_command
from tests.sample_evals import Sums, lines, spec

if TYPE_CHECKING:
    from tests.docker_engine import DockerEngine

pytest_plugins = ["tests.docker_engine"]

PROGRAM = Path(__file__).with_name("crash_program.py")
REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAMS = ["ls", "concurrency", "sqlite", "rm"]
STRANGER = 65534


@dataclass
class Said:
    status: int
    out: str
    err: str


@dataclass
class Terminal:
    """Runs a program in this process, as the command line would."""

    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch

    def __call__(self, program: str, *arguments: str, answer: str = "") -> Said:
        module = importlib.import_module(f"nanoeval.bin.{program}")
        self.monkeypatch.setattr(sys, "argv", [program, *arguments])
        self.monkeypatch.setattr(sys, "stdin", StringIO(answer))
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run_command(module.main, module.__doc__)
        out, err = self.capsys.readouterr()
        if isinstance(exit_.value.code, str):  # Python prints it and exits with 1
            return Said(1, out, f"{err}{exit_.value.code}\n")
        return Said(int(exit_.value.code or 0), out, err)


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal(capsys, monkeypatch)


def program(
    name: str, *arguments: str, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program as a process of its own, on a terminal-less stdin."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-m", f"nanoeval.bin.{name}", *arguments],
        env=environment if path is None else {**environment, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def make(run_set_id: str, **options: object) -> None:
    """A finished run set."""
    asyncio.run(run(spec(Sums(n=10), run_set_id=run_set_id, **options)))


def change(path: Path, statement: str) -> None:
    db = sqlite3.connect(path, isolation_level=None, timeout=10)
    db.execute(statement)
    db.close()


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.02)


def look(run_set_id: str) -> RunSetRow:
    return look_at(find_run_set(run_set_id))


def names() -> set[str]:
    return {row.run_set_id for row in list_run_sets()}


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the midst of run set `busy`: 3,000 rollouts of 0.1 s, 20 at a time."""
    with subprocess.Popen(
        [sys.executable, str(PROGRAM), "busy", str(tmp_path / "log"), "in_process", "3000", "0.1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            wait_until(lambda: "busy" in names() and look("busy").evals)
            wait_until(lambda: look("busy").evals[0].num_done > 20)
            yield process
        finally:
            process.kill()


@pytest.fixture
def crashed(running: subprocess.Popen[bytes]) -> str:
    """The run set of a process that was killed."""
    running.kill()
    running.wait()
    return "busy"


# --- what all have in common


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_explains_itself(name: str) -> None:
    """--help would fail, or would not show how the program is called."""
    said = program(name, "--help")
    assert said.returncode == 0
    assert said.stderr == ""
    assert f"python -m nanoeval.bin.{name} " in said.stdout
    assert "run_set_id" in said.stdout


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_wrong_id_is_answered_with_the_nearest(name: str, terminal: Terminal) -> None:
    """Somebody who mistypes an id would get a traceback, or an empty new run set."""
    make("my-run-1")
    extra = ["set=3"] if name == "concurrency" else []
    said = terminal(name, "run_set_id=my-run-2", *extra)
    assert said.status == 1
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "no run set 'my-run-2'; did you mean my-run-1?" in said.err
    assert names() == {"my-run-1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lmit=3"], "Extraneous argument 'lmit'. Did you mean 'limit'? See --help."),
        (["limit=x"], "param 'limit'. Could not cast 'x' to int | None. See --help."),
        (["limit"], "'limit' is not of the form key=value; see --help"),
        (["limit=0"], "limit=0 must be at least 1"),
    ],
)
def test_wrong_arguments_are_one_clear_line(
    arguments: list[str], message: str, terminal: Terminal
) -> None:
    """A slip on the command line would end in a traceback of the argument parser."""
    said = terminal("ls", *arguments)
    assert said.status == 1
    assert said.err.endswith(f"{message}\n")
    assert said.err.count("\n") == 1


def test_missing_arguments_are_named(terminal: Terminal) -> None:
    """The person would not learn which argument is missing."""
    said = terminal("concurrency", "run_set_id=a")
    assert said.status == 1
    assert "parameter(s): set" in said.err


def test_a_folder_of_another_user_is_one_clear_line(database_folder: Path) -> None:
    """A planted folder would be listed, or would end in a traceback."""
    if os.geteuid() != 0:
        pytest.skip("only root can make another user's folder")
    database_folder.mkdir()
    os.chown(database_folder, STRANGER, STRANGER)
    said = program("ls")
    assert said.returncode == 1
    assert said.stderr.count("\n") == 1
    assert "belongs to" in said.stderr


# --- ls


def test_ls_says_where_there_is_nothing(terminal: Terminal, database_folder: Path) -> None:
    """An empty answer would look like a failure."""
    said = terminal("ls")
    assert (said.status, said.out) == (0, f"No run sets in {database_folder}\n")


def test_ls_shows_each_run_set_with_its_progress(crashed: str, terminal: Terminal) -> None:
    """A person could not tell which run is theirs, how far it is, or what to do next."""
    make("done")
    said = program("ls")
    heading, first, second, *_ = said.stdout.splitlines()
    assert " ".join(heading.split()) == "RUN SET AGE SIZE STATE EVAL MODEL DONE SCORE"
    assert re.match(r"done +\d+s +\d+K +finished +sums +\S+ +10/10 +0\.500$", first)
    assert re.match(r"busy +\d+s +[\d.]+[KM] +crashed +sums +\S+ +\d+/3000 +0\.\d{3}$", second)
    assert f"python -m nanoeval.bin.resume run_set_id={crashed}" in said.stdout
    assert said.returncode == 0


def test_ls_fits_the_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines would wrap, and the columns with them."""
    for name in ("short", "a rather long name of an eval that somebody chose " * 2):
        asyncio.run(run(spec(Sums(n=10, name=name), run_set_id="c0ffee123456")))
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        widths = [len(line) for line in terminal("ls").out.splitlines()]
        assert max(widths) <= columns
    assert "c0ffee123456" in terminal("ls").out


def test_ls_of_many_evals_stays_short(terminal: Terminal) -> None:
    """A run set of 57 evals would push all others off the screen."""
    evals = [spec(Sums(n=2, name=f"eval {k}"), run_set_id="many") for k in range(9)]

    async def run_all() -> None:
        await asyncio.gather(*map(run, evals))

    asyncio.run(run_all())
    text = terminal("ls").out
    assert len(re.findall(r"\beval \d", text)) == ls.EVALS_PER_RUN_SET
    assert re.search(r"and 3 more +6/6", text)
    assert len(re.findall(r"\beval \d", terminal("ls", "run_set_id=many").out)) == 9


def test_ls_of_one_run_set_says_where_its_files_lie(terminal: Terminal) -> None:
    """A person could not find the database, the backup or the records."""
    make("one", should_backup=True)
    text = terminal("ls", "run_set_id=one").out
    row = look("one")
    assert f"database    {row.file.path}" in text
    assert f"backup      {row.file.backup}" in text
    assert "started as" in text


def test_ls_for_programs_is_json(crashed: str, terminal: Terminal) -> None:
    """A script would have to take the table apart."""
    (found,) = json.loads(terminal("ls", "json=True").out)
    assert (found["run_set_id"], found["state"], found["can_be_resumed"]) == (
        crashed,
        "crashed",
        True,
    )
    (e,) = found["evals"]
    assert (e["state"], e["num_tasks"], e["num_done"]) == ("crashed", 3000, e["num_scored"])
    assert found["processes"][0]["standing"] == "dead"
    assert json.loads(terminal("ls", "json=True", "limit=1").out)[0]["run_set_id"] == crashed


def test_ls_tells_of_a_damaged_file_and_shows_the_rest(
    terminal: Terminal, database_folder: Path
) -> None:
    """One bad file would hide all run sets."""
    make("good")
    make("bad")
    os.truncate(database_folder / "bad.db", 5000)
    said = terminal("ls")
    assert said.status == 0
    assert re.search(r"bad +\d+s +5K +unreadable", said.out)
    assert re.search(r"good .* finished", said.out)
    assert "bad.db is damaged" in said.err.replace("\n", " ")


def test_ls_into_a_closed_pipe_is_quiet() -> None:
    """`ls | head -1` would end in a traceback."""
    make("one")
    said = subprocess.run(
        f"{sys.executable} -m nanoeval.bin.ls | true",
        shell=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert said.stderr == ""


def test_durations_and_sizes_read_well() -> None:
    """Ages and sizes would need a calculator."""
    assert [ls.age(s) for s in (-1, 0, 59, 60, 7000, 200_000)] == [
        "0s",
        "0s",
        "59s",
        "1m",
        "2h",
        "2d",
    ]
    assert [ls.size(b) for b in (0, 1, 4096, 3 << 20, 5 << 30)] == [
        "0K",
        "1K",
        "4K",
        "3.0M",
        "5.0G",
    ]


def test_the_command_to_go_on_can_be_pasted(
    terminal: Terminal, database_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A space in a name, or a folder set for one run alone, would resume another run or none."""
    make("my run")
    change(database_folder / "my run.db", "UPDATE eval SET state = 'interrupted'")
    command = terminal("ls").out.partition("To go on: ")[2].strip()
    assert f"NANOEVAL_DATABASE_DIR={database_folder} python" in command
    monkeypatch.delenv("NANOEVAL_DATABASE_DIR")
    done = subprocess.run(
        command.replace("python", sys.executable, 1),
        shell=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "sums: 10/10 done" in done.stderr


# --- concurrency


def test_a_live_run_takes_on_its_new_limit(running: subprocess.Popen[bytes]) -> None:
    """The run would have to be stopped to change how hard it presses the server."""
    said = program("concurrency", "run_set_id=busy", "set=3")
    assert (said.returncode, said.stdout) == (0, "sums: 20 → 3 rollouts in flight\n")
    wait_until(lambda: 0 < look("busy").evals[0].num_running <= 3)
    # More than the run began with.
    said = program("concurrency", "run_set_id=busy", "set=60", "name=sums")
    assert said.stdout == "sums: 3 → 60 rollouts in flight\n"
    wait_until(lambda: look("busy").evals[0].num_running == 60)
    said = program("concurrency", "run_set_id=busy", "set=None")
    assert said.stdout == "sums: 60 → unlimited rollouts in flight\n"
    wait_until(lambda: look("busy").evals[0].num_running > 200)


def test_resume_keeps_the_changed_limit(crashed: str, terminal: Terminal, tmp_path: Path) -> None:
    """A run that overran a server would do so again after each resume."""
    said = terminal("concurrency", f"run_set_id={crashed}", "set=2")
    assert "Nobody works on it now" in said.out
    before = len(lines(tmp_path / "log"))
    command = [sys.executable, "-m", "nanoeval.bin.resume", f"run_set_id={crashed}"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: len(lines(tmp_path / "log")) > before + 4)
            seen = {look(crashed).evals[0].num_running for _ in range(100)}
            assert max(seen) == 2
            assert look(crashed).evals[0].concurrency == 2
        finally:
            process.kill()


def test_impossible_limits_are_refused(
    terminal: Terminal, database_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run would stand still for ever, or a typing error would go unnoticed."""
    make("done")
    change(database_folder / "done.db", "UPDATE eval SET state = 'running'")
    assert "set=0 must be at least 1" in terminal("concurrency", "run_set_id=done", "set=0").err
    assert "set=-3 must be" in terminal("concurrency", "run_set_id=done", "set=-3").err
    said = terminal("concurrency", "run_set_id=done", "set=3", "name=sum")
    assert said.status == 1
    assert "no unfinished eval 'sum'; it has sums" in said.err
    monkeypatch.setenv("NANOEVAL_ALLOW_ZERO_CONCURRENCY", "1")
    assert terminal("concurrency", "run_set_id=done", "set=0").status == 0
    assert look("done").evals[0].concurrency == 0


def test_a_finished_run_set_has_no_limit_to_change(
    terminal: Terminal, database_folder: Path
) -> None:
    """The person would believe that something was changed."""
    make("done", should_backup=True)
    said = terminal("concurrency", "run_set_id=done", "set=3")
    assert (said.status, said.out) == (1, "")
    assert "has no unfinished eval" in said.err
    (database_folder / "done.db").unlink()
    said = terminal("concurrency", "run_set_id=done", "set=3")
    assert "only the backup is left; resume it first" in said.err
    assert not (database_folder / "done.db").exists()


# --- sqlite


@pytest.fixture
def shells(tmp_path: Path) -> Callable[..., str]:
    """Makes a folder for PATH that holds shells which only print how they were called."""

    def make_shells(*names: str) -> str:
        for name in names:
            shell = tmp_path / "shells" / name
            shell.parent.mkdir(exist_ok=True)
            shell.write_text(f'#!/bin/sh\necho "{name} $@"\n')
            shell.chmod(0o755)
        return str(tmp_path / "shells")

    return make_shells


def test_sqlite_prefers_litecli(shells: Callable[..., str]) -> None:
    """The better of two shells would not be used, or the wrong file be opened."""
    make("one")
    said = program("sqlite", "run_set_id=one", path=shells("sqlite3"))
    assert said.stdout == f"sqlite3 {find_run_set('one').path}\n"
    said = program("sqlite", "run_set_id=one", path=shells("sqlite3", "litecli"))
    assert said.stdout == f"litecli {find_run_set('one').path}\n"
    assert said.returncode == 0


def test_sqlite_without_a_shell_says_what_to_install(shells: Callable[..., str]) -> None:
    """The person would not learn what is missing, or where the file lies."""
    make("one")
    said = program("sqlite", "run_set_id=one", path=shells())
    assert said.returncode == 1
    assert "pip install litecli" in said.stderr
    assert str(find_run_set("one").path) in said.stderr


# --- rm


def test_rm_never_deletes_a_live_run_set(
    running: subprocess.Popen[bytes], terminal: Terminal
) -> None:
    """A run would lose its results under its feet."""
    said = program("rm", "run_set_id=busy", "yes=True")
    assert said.returncode == 1
    assert f"not deleted: process {running.pid} on" in said.stderr
    said = terminal("rm", "older_than=0s", "unfinished=True", "yes=True")
    assert said.out.startswith("No run set is older")
    assert look("busy").is_live


def test_rm_spares_a_stopped_process(
    running: subprocess.Popen[bytes], terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that sleeps past its lease would wake up without its database."""
    running.send_signal(signal.SIGSTOP)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    assert not look("busy").is_live
    said = terminal("rm", "run_set_id=busy", "yes=True")
    assert f"process {running.pid}" in said.err
    assert "still exists" in said.err
    said = terminal("rm", "older_than=1m", "unfinished=True", "yes=True")
    assert said.out.startswith("No run set is older")
    assert names() == {"busy"}


@pytest.mark.parametrize("answer", ["", "\n", "n\n", "nonsense\n"])
def test_rm_without_a_yes_deletes_nothing(answer: str, terminal: Terminal) -> None:
    """Results would be gone by a slip of the finger, or in a script that gives no answer."""
    make("one")
    said = terminal("rm", "run_set_id=one", answer=answer)
    assert said.status == 1
    assert "Delete this run set" in said.out
    assert "nothing was deleted" in said.err
    assert names() == {"one"}


def test_rm_with_a_yes_deletes_all_files_of_it(
    crashed: str, terminal: Terminal, database_folder: Path
) -> None:
    """A backup or a write-ahead log would be left, to come back in a new run set of that name."""
    make("other")
    path = database_folder / f"{crashed}.db"
    backup = Path(os.environ["NANOEVAL_ROOT_DIR"]) / "backups" / path.name
    backup.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    shutil.copy2(path, backup)
    assert Path(f"{path}-wal").exists()
    said = terminal("rm", f"run_set_id={crashed}", answer="y\n")
    assert said.status == 0
    assert "1 of them could still be resumed" in said.out
    assert f"Deleted {crashed}" in said.out
    assert [path.name for path in database_folder.iterdir()] == ["other.db"]
    assert list(backup.parent.iterdir()) == []


def test_rm_by_age_deletes_only_what_finished_before(
    terminal: Terminal, database_folder: Path
) -> None:
    """A recent or unfinished run set would be deleted with the old ones."""
    for name, days, state in (
        ("old", 10, "finished"),
        ("older", 30, "finished"),
        ("recent", 1, "finished"),
        ("stopped", 30, "interrupted"),
    ):
        make(name)
        ended_at = time.time() - days * 86400
        change(
            database_folder / f"{name}.db",
            f"UPDATE eval SET finished_at = {ended_at}, state = '{state}'",
        )
    said = terminal("rm", "older_than=1w", "yes=True")
    assert said.status == 0
    assert names() == {"recent", "stopped"}
    said = terminal("rm", "older_than=1w", "yes=True")
    assert said.out == "No finished run set is older than 1w.\n"
    assert said.status == 0
    os.utime(database_folder / "stopped.db", times=(0, 0))
    terminal("rm", "older_than=1w", "unfinished=True", "yes=True")
    assert names() == {"recent"}


def test_rm_keeps_what_was_taken_up_while_it_asked(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run set that is resumed between the question and the answer would be deleted live."""
    make("busy")
    process: list[subprocess.Popen[bytes]] = []

    def start_and_say_yes(prompt: str) -> str:
        arguments = ["busy", str(tmp_path / "log"), "in_process", "3000", "0.1"]
        process.append(subprocess.Popen([sys.executable, str(PROGRAM), *arguments]))
        wait_until(lambda: look("busy").is_live)
        return "y"

    monkeypatch.setattr("builtins.input", start_and_say_yes)
    try:
        said = terminal("rm", "run_set_id=busy")
        assert "busy is kept: process" in said.out
        assert names() == {"busy"}
    finally:
        for started in process:
            started.kill()
            started.wait()


def test_rm_deletes_a_damaged_run_set_by_its_id(terminal: Terminal, database_folder: Path) -> None:
    """A broken file could be got rid of by hand only."""
    make("bad")
    os.truncate(database_folder / "bad.db", 5000)
    assert terminal("rm", "older_than=0s", "yes=True").out.startswith("No finished run set")
    assert terminal("rm", "run_set_id=bad", "yes=True").status == 0
    assert names() == set()


def test_rm_leaves_files_of_others_alone(terminal: Terminal, database_folder: Path) -> None:
    """With a shared folder, one user would delete what another has made."""
    if os.geteuid() != 0:
        pytest.skip("only root can make another user's file")
    make("theirs")
    os.chown(database_folder / "theirs.db", STRANGER, STRANGER)
    said = terminal("rm", "run_set_id=theirs", "yes=True")
    assert said.status == 1
    assert "belongs to" in said.err
    terminal("rm", "older_than=0s", "unfinished=True", "yes=True")
    assert names() == {"theirs"}


@pytest.mark.docker
def test_rm_removes_containers_of_the_run_set(
    docker_engine: DockerEngine, terminal: Terminal
) -> None:
    """Containers of a killed run would go on using the machine after its results are gone."""
    for name in ("mine", "other"):
        labels = ["--name", name, "--label", f"nanoeval.run_set={name}"]
        docker_engine.docker("run", "--detach", *labels, docker_engine.minimal, "sleep", "600")
    make("mine")
    said = terminal("rm", "run_set_id=mine", "yes=True")
    assert "Removed 1 container of mine" in said.out
    assert docker_engine.containers() == ["other"]
    docker_engine.docker("rm", "--force", "other")


def test_rm_needs_to_know_which(terminal: Terminal) -> None:
    """A bare `rm` would delete everything or do nothing in silence."""
    assert "say which: run_set_id=ID, or older_than=7d" in terminal("rm").err
    assert "say which" in terminal("rm", "run_set_id=a", "older_than=7d").err
    for nonsense in ("7", "d7", "-7d", "7y", "7 days"):
        said = terminal("rm", f"older_than={nonsense}", "yes=True")
        assert said.status == 1
        assert f"older_than={nonsense} is no duration" in said.err
