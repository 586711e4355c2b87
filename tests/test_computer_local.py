"""What holds for computers of this machine: nothing is left behind, whatever becomes of us."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanoeval.eval import RolloutSystemError
from nanoeval.solvers.computer_tasks.code_execution_interface import ComputerSetupError
from nanoeval.solvers.computer_tasks.runtimes import LocalRuntime
from nanoeval.solvers.computer_tasks.runtimes._cleanup import uninterrupted
from nanoeval.solvers.computer_tasks.runtimes._output import BoundedOutput
from tests.computer.fakes import AnswerTask
from tests.computer.load import run_killed

REPOSITORY = Path(__file__).resolve().parents[1]


def folders(root: Path) -> list[Path]:
    return [folder for owner in root.iterdir() for folder in owner.iterdir()]


def processes(command: str) -> list[int]:
    """Processes of this machine that run exactly `command`."""
    wanted = command.replace(" ", "\0").encode() + b"\0"
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if entry.read_bytes() == wanted:
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


async def test_a_home_is_private_and_gone_afterwards(tmp_path: Path) -> None:
    """Two tasks at once never see each other; no folder or process outlives its rollout."""
    runtime = LocalRuntime(root=str(tmp_path))
    async with runtime.run(AnswerTask()) as one, runtime.run(AnswerTask()) as two:
        await one.upload(b"one", "/root/file")
        await two.upload(b"two", "~/file")
        assert (await one.check_shell_command("cat ~/file")).output == b"one"
        assert await two.download("/root/file") == b"two"
        await one.check_shell_command("setsid nohup sleep 1238.5 >/dev/null 2>&1 &")
        await one.check_shell_command("mkdir locked; touch locked/x; chmod 0 locked")
        assert len(processes("sleep 1238.5")) == 1
        assert oct(folders(tmp_path)[0].stat().st_mode)[-3:] == "700"
    assert processes("sleep 1238.5") == []
    assert folders(tmp_path) == []


async def test_keys_of_this_process_stay_out_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An agent could print them into its records."""
    monkeypatch.setenv("SECRET_API_KEY", "k")
    async with LocalRuntime().run(AnswerTask()) as computer:
        assert b"SECRET" not in (await computer.check_shell_command("env")).output
    async with LocalRuntime(pass_variables=["SECRET_API_KEY"]).run(AnswerTask()) as computer:
        assert b"SECRET_API_KEY=k" in (await computer.check_shell_command("env")).output


async def test_what_needs_containers_is_refused() -> None:
    """The task would fail later, and less clearly."""
    with pytest.raises(ValueError, match="run it on DockerRuntime"):
        async with LocalRuntime().run(AnswerTask(side_images=["redis"])):
            pass
    with pytest.raises(ComputerSetupError, match="num_gpus=1"):
        async with LocalRuntime(pass_variables=[]).run(
            AnswerTask(num_gpus=1, environment={"PATH": "/nowhere"})
        ):
            pass


async def test_what_a_killed_process_left_is_removed_by_the_next_start(tmp_path: Path) -> None:
    """SIGKILL gives nobody a chance to clean up; a living owner's computer is left alone."""
    program = [sys.executable, "-m", "tests.computer.start_and_wait", "local", str(tmp_path)]
    with subprocess.Popen(program, cwd=REPOSITORY, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        runtime = LocalRuntime(root=str(tmp_path))
        async with runtime.run(AnswerTask()):
            assert len(folders(tmp_path)) == 2
        assert len(processes("sleep 1236.5")) == len(processes("sleep 1237.5")) == 1
        owner.kill()
    async with runtime.run(AnswerTask()):
        assert len(folders(tmp_path)) == 1
        assert processes("sleep 1236.5") == processes("sleep 1237.5") == []
    assert folders(tmp_path) == []


async def test_a_full_process_table_is_a_system_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rollout is retried when there is room again."""
    async with LocalRuntime().run(AnswerTask()) as computer:

        async def no_room(*arguments: Any, **settings: Any) -> Any:
            raise BlockingIOError(11, "Resource temporarily unavailable")

        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "create_subprocess_exec", no_room)
            with pytest.raises(RolloutSystemError, match="could not start a shell"):
                await computer.send_shell_command("true")
        assert (await computer.send_shell_command("true")).exit_code == 0


async def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """Another user could watch or change what a task does."""
    if os.getuid() != 0:
        pytest.skip("needs root to give a folder away")
    root = tmp_path / f"nanoeval-computers-{os.getuid()}"
    root.mkdir()
    os.chown(root, 12345, 12345)
    with pytest.raises(PermissionError, match="belongs to user 12345"):
        async with LocalRuntime(root=str(tmp_path)).run(AnswerTask()):
            pass


@pytest.mark.slow
async def test_200_rollouts_with_random_kills_are_each_graded_once(tmp_path: Path) -> None:
    """Fifty at once; what is killed is tried again, and nothing is left over."""
    runtime = LocalRuntime(root=str(tmp_path))
    kill = "setsid sleep 1239.5 >/dev/null 2>&1 & kill -9 $$"
    summary = await run_killed(runtime, n_instances=200, concurrency=50, kill=kill)
    assert summary["accuracy"] == 1.0
    assert summary["aggregations"]["num_attempts"] == 200
    assert summary["aggregations"]["num_system_error"] == 0
    assert folders(tmp_path) == []
    assert processes("sleep 1239.5") == []


def test_an_output_keeps_its_two_ends_however_it_comes() -> None:
    """Byte by byte or at once, the same is kept."""
    data = bytes(range(256)) * 4
    at_once, by_byte, short = BoundedOutput(100), BoundedOutput(100), BoundedOutput(2000)
    at_once.write(data)
    short.write(data)
    for byte in data:
        by_byte.write(bytes([byte]))
    assert at_once.getvalue() == by_byte.getvalue()
    assert (
        at_once.getvalue() == data[:50] + b"\n[... 924 bytes of output left out ...]\n" + data[-50:]
    )
    assert (short.getvalue(), short.is_cut) == (data, False)


async def test_cleanup_is_finished_before_a_cancellation_passes_on() -> None:
    """A container that is half removed is left behind."""
    done = []

    async def clean_up() -> None:
        await asyncio.sleep(0.1)
        done.append(True)

    working = asyncio.create_task(uninterrupted(clean_up()))
    for _ in range(3):
        await asyncio.sleep(0.01)
        working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert done == [True]
