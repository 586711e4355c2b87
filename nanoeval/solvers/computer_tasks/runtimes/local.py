"""Computers that are folders of this machine. Isolates nothing: for trusted code only."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path, PurePosixPath

import chz
import structlog

from nanoeval.eval import RolloutSystemError
from nanoeval.solvers.computer_tasks.code_execution_interface import (
    ComputerConfiguration,
    ComputerInterface,
    ComputerRuntime,
    ExecutionResult,
    JupyterComputerInterface,
    JupyterExecutionResult,
    missing_directory,
)
from nanoeval.solvers.computer_tasks.runtimes import _local_leftovers
from nanoeval.solvers.computer_tasks.runtimes._cleanup import uninterrupted
from nanoeval.solvers.computer_tasks.runtimes._local_kernel import LocalKernel
from nanoeval.solvers.computer_tasks.runtimes._output import (
    TIMED_OUT,
    BoundedOutput,
    sendable,
    timeout_notice,
)

logger = structlog.stdlib.get_logger(component=__name__)

# What a task calls its home, whatever the private folder is called.
HOME_ALIAS = PurePosixPath("/root")
_PASSED_VARIABLES = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH")
# A pipe holds at most this much, so it is all that an ended command can have left unread.
_PIPE_BYTES = 1 << 20
# The kernel takes no argument of more than 128 KiB; a character has up to four bytes.
_LONG_COMMAND = 30_000
_NOT_STARTED = 126


class LocalComputer(JupyterComputerInterface):
    """A private home folder and the processes started in it. Made by `LocalRuntime`."""

    def __init__(
        self,
        folder: Path,
        task: ComputerConfiguration,
        passed_variables: list[str],
        command_timeout: float,
        max_output_bytes: int,
    ) -> None:
        self._folder = folder
        self._home = folder / "home"
        self._working_directory = self._on_host(task.cwd)
        self._command_timeout = command_timeout
        self._max_output_bytes = max_output_bytes
        self._environment = self._make_environment(task, passed_variables)
        self._pipes: set[_OutputPipe] = set()
        self._kernel = LocalKernel(
            folder, str(self._working_directory), self._environment, max_output_bytes
        )
        self._is_stopped = False

    @property
    def home(self) -> str:
        """The private home's path on this machine; commands see it as `~`."""
        return str(self._home)

    async def disable_internet(self) -> None:
        """Does nothing but warn: commands here reach whatever this machine reaches."""
        logger.warning("LocalRuntime cannot disable the internet; use DockerRuntime to isolate")

    async def upload(self, file: bytes, destination: str) -> None:
        """Write a file, and the folders above it. Relative paths start in the task's cwd."""
        self._check_running()
        path = self._on_host(destination)

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file)

        await asyncio.to_thread(write)

    async def download(self, file: str) -> bytes:
        """Read a file. FileNotFoundError, IsADirectoryError and the like name its path."""
        self._check_running()
        return await asyncio.to_thread(self._on_host(file).read_bytes)

    async def send_shell_command(
        self,
        cmd: str,
        *,
        idempotent: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> ExecutionResult:
        """Run `cmd` in a new bash, in a process group of its own.

        After `timeout` seconds (None = the runtime's `command_timeout`) the group is killed and the
        exit code is 124. A command killed by signal n has exit code 128 + n. Processes left in the
        background live on until the computer stops.
        """
        del idempotent  # nothing is ever lost on the way, so nothing is repeated
        self._check_running()
        seconds = self._command_timeout if timeout is None else timeout
        output = BoundedOutput(self._max_output_bytes)
        pipe = _OutputPipe(output)
        try:
            process = await self._start_process(sendable(cmd), pipe.write_end)
        except ValueError as error:
            pipe.close()
            text = f"could not start the command: {error}\n".encode()
            return ExecutionResult(output=text, exit_code=_NOT_STARTED)
        except BaseException:
            pipe.close()
            raise
        finally:
            os.close(pipe.write_end)
        self._pipes.add(pipe)
        exit_code = await self._wait(process, seconds)
        pipe.read_what_is_there()
        result = output.getvalue()
        if pipe.is_closed:
            self._pipes.discard(pipe)
        else:
            pipe.discard_from_now_on()
        if exit_code is None:
            return ExecutionResult(output=result + timeout_notice(seconds), exit_code=TIMED_OUT)
        return ExecutionResult(output=result, exit_code=exit_code)

    async def execute(
        self,
        code: str,
        timeout: int = 120,  # noqa: ASYNC109
    ) -> JupyterExecutionResult:
        """Run a cell. The kernel starts with the first one, and anew after it has died."""
        self._check_running()
        return await self._kernel.execute(code, timeout)

    async def fetch_container_names(self) -> list[str]:
        """Empty: there are no containers."""
        return []

    async def stop(self) -> None:
        """Kill every process of this computer and delete its home."""
        if self._is_stopped:
            return
        self._is_stopped = True
        await self._kernel.stop()
        await asyncio.to_thread(_local_leftovers.remove, self._folder)
        for pipe in self._pipes:
            pipe.close()

    async def _start_shells_in(self, cwd: str) -> None:
        # Every command and the kernel start there anyway.
        if not self._working_directory.is_dir():
            reason = ExecutionResult(output=b"on this machine; only ~ is private", exit_code=1)
            raise missing_directory(cwd, reason)

    async def _start_process(self, cmd: str, stdout: int) -> asyncio.subprocess.Process:
        arguments = ["-c", cmd]
        if len(cmd) > _LONG_COMMAND:
            script = self._folder / f"script-{secrets.token_hex(4)}"
            await asyncio.to_thread(script.write_text, cmd)
            arguments = [str(script)]
        try:
            return await asyncio.create_subprocess_exec(
                shutil.which("bash") or "/bin/sh",
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=stdout,
                stderr=asyncio.subprocess.STDOUT,
                cwd=self._working_directory,
                env=self._environment,
                start_new_session=True,
            )
        except OSError as error:
            raise RolloutSystemError(f"could not start a shell: {error}") from error

    async def _wait(self, process: asyncio.subprocess.Process, seconds: float) -> int | None:
        """The exit code, or None when the time ran out. Either way the shell has ended."""
        try:
            async with asyncio.timeout(seconds) as limit:
                code = await process.wait()
        except BaseException as error:
            _kill_group(process.pid)
            await uninterrupted(process.wait())
            if isinstance(error, TimeoutError) and limit.expired():
                return None
            raise
        return code if code >= 0 else 128 - code

    def _on_host(self, path: str) -> Path:
        pure = PurePosixPath(path)
        if pure.parts[:1] == ("~",):
            return self._home / Path(*pure.parts[1:])
        if pure.is_relative_to(HOME_ALIAS):
            return self._home / pure.relative_to(HOME_ALIAS)
        return Path(pure) if pure.is_absolute() else self._working_directory / pure

    def _make_environment(
        self, task: ComputerConfiguration, passed_variables: list[str]
    ) -> dict[str, str]:
        # The rest of our own environment stays out: it may hold keys.
        names = {*_PASSED_VARIABLES, *passed_variables}
        passed = {n: value for n, value in os.environ.items() if n in names}
        own = {n: str(value) for n, value in task.environment.items() if value is not None}
        return {
            **passed,
            "HOME": str(self._home),
            "TMPDIR": str(self._folder / "tmp"),
            **own,
            _local_leftovers.ENV_MARK: self._folder.name,
        }

    def _check_running(self) -> None:
        if self._is_stopped:
            raise RolloutSystemError("the computer is stopped; start another for more work")


@chz.chz
class LocalRuntime(ComputerRuntime):
    """Runs tasks on this machine, each in a private temporary home. It isolates NOTHING.

    Commands run as you, see your files and your network, and may do whatever you may. Use it for
    trusted code, for quick work on tasks and graders, and for examples; use DockerRuntime for
    everything else. `/root` stands for the private home in a task's `cwd`, in upload and in
    download; inside commands write `~` or a relative path. A task's image, resources, limits and
    network mode have no effect here; containers beside the main one are refused.
    """

    command_timeout: float = chz.field(default=3600, doc="Seconds that one command may take.")
    max_output_bytes: int = chz.field(
        default=16 << 20, doc="What is kept of a command's output: its start and its end."
    )
    pass_variables: list[str] = chz.field(
        default_factory=list,
        doc="Names of this process's environment variables that commands see, besides PATH, LANG"
        " and the like.",
    )
    root: str | None = chz.field(
        default=None, doc="Folder that holds the private homes; None = the system's temporary one."
    )

    async def _do_runtime_setup(
        self, task: ComputerConfiguration, computer: ComputerInterface
    ) -> None:
        pass

    @asynccontextmanager
    async def _start_computer(self, task: ComputerConfiguration) -> AsyncIterator[LocalComputer]:
        if task.side_images or task.docker_compose_yaml:
            raise ValueError(
                "LocalRuntime has no containers, and the task asks for side containers; run it on"
                " DockerRuntime"
            )
        root = Path(self.root or tempfile.gettempdir()) / f"nanoeval-computers-{os.getuid()}"
        folder = root / secrets.token_hex(6)
        await asyncio.to_thread(_local_leftovers.remove_abandoned, root)
        await asyncio.to_thread(_local_leftovers.make_folder, folder)
        computer = LocalComputer(
            folder, task, self.pass_variables, self.command_timeout, self.max_output_bytes
        )
        try:
            yield computer
        finally:
            await uninterrupted(computer.stop())


class _OutputPipe:
    """The reading end of a command's output, on the event loop."""

    def __init__(self, output: BoundedOutput) -> None:
        self._output: BoundedOutput | None = output
        self._read_end, self.write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._read_end, self._read_some)
        self.is_closed = False

    def read_what_is_there(self) -> None:
        """Take what an ended command left in the pipe."""
        taken = 0
        while not self.is_closed and taken < _PIPE_BYTES and (n := self._read_some()):
            taken += n

    def discard_from_now_on(self) -> None:
        """Go on emptying the pipe, so that a process in the background never waits for us."""
        self._output = None

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._loop.remove_reader(self._read_end)
            os.close(self._read_end)

    def _read_some(self) -> int:
        try:
            data = os.read(self._read_end, 1 << 16)
        except BlockingIOError:
            return 0
        if not data:
            self.close()
        elif self._output is not None:
            self._output.write(data)
        return len(data)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
