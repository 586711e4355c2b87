"""A computer that is a container. Made by `DockerRuntime`; knows no configuration."""

from __future__ import annotations

import asyncio
import errno
import io
import posixpath
import shlex
import tarfile
import time
from typing import Any

import structlog

from nanoeval.solvers.computer_tasks.code_execution_interface import (
    ExecutionResult,
    JupyterComputerInterface,
    JupyterExecutionResult,
    missing_directory,
)
from nanoeval.solvers.computer_tasks.runtimes._docker_commands import ContainerCommands
from nanoeval.solvers.computer_tasks.runtimes._docker_engine import (
    DockerError,
    EngineUnavailableError,
    engine_errors,
    remove_computer,
)
from nanoeval.solvers.computer_tasks.runtimes._docker_kernel import ContainerKernel

logger = structlog.stdlib.get_logger(component=__name__)

# An engine that restarts is back within seconds.
_SECONDS_TO_REMOVE = 30.0
_MAX_LINKS = 40
_BRIDGE = "bridge"


class DockerComputer(JupyterComputerInterface):
    """A main container, and whatever side containers it has."""

    def __init__(
        self,
        docker: Any,
        *,
        computer_id: str,
        container_names: list[str],
        cwd: str,
        command_timeout: float,
        max_output_bytes: int,
        jupyter_setup: list[str] | None,
    ) -> None:
        self._docker = docker
        self._id = computer_id
        self._names = container_names
        self._cwd = cwd
        self._command_timeout = command_timeout
        self._container = docker.containers.container(container_names[0])
        self._commands = ContainerCommands(self._container, cwd, max_output_bytes)
        self._kernel = ContainerKernel(
            self._container, self._commands, cwd, max_output_bytes, jupyter_setup
        )
        self._user: tuple[int, int] | None = None
        self._is_stopped = False

    async def disable_internet(self) -> None:
        """Take the container, and those beside it, off every network that leads out."""
        self._check_running()
        with engine_errors("disabling the internet"):
            for name in self._names:
                container = await self._docker.containers.get(name)
                if _BRIDGE in container._container["NetworkSettings"]["Networks"]:
                    bridge = await self._docker.networks.get(_BRIDGE)
                    await bridge.disconnect({"Container": name, "Force": True})

    async def upload(self, file: bytes, destination: str) -> None:
        """Write a file, and the folders above it. Relative paths start in the task's cwd.

        Raises OSError (ENOSPC) where the container's disk is full. What is mounted inside the
        container only (a tmpfs, /dev/shm) is out of reach; use a command there.
        """
        self._check_running()
        path = self._absolute(destination)
        # The engine would replace a folder, with all that is in it, by the file.
        if (await self._check(f"test -d {shlex.quote(path)}")).exit_code == 0:
            raise IsADirectoryError(errno.EISDIR, "a folder is in the file's place", path)
        owner = await self._owner()
        archive = await asyncio.to_thread(_pack, file, path, owner)
        try:
            with engine_errors(f"uploading {path}"):
                await self._container.put_archive("/", archive)
        except DockerError as error:
            if "no space left" in str(error):
                raise OSError(errno.ENOSPC, "the container's disk is full", path) from error
            raise

    async def download(self, file: str) -> bytes:
        """Read a file. FileNotFoundError and IsADirectoryError name its path."""
        self._check_running()
        path = self._absolute(file)
        for _ in range(_MAX_LINKS):
            archive = await self._get_archive(path)
            member = archive.next()
            if member is not None and member.issym():
                path = posixpath.join(posixpath.dirname(path), member.linkname)
                continue
            content = archive.extractfile(member) if member is not None else None
            if content is None:
                raise IsADirectoryError(
                    errno.EISDIR, "not a file; pack folders with tar first", path
                )
            return await asyncio.to_thread(content.read)
        raise OSError(errno.ELOOP, "too many symbolic links", file)

    async def send_shell_command(
        self,
        cmd: str,
        *,
        idempotent: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> ExecutionResult:
        """Run `cmd` in a new bash (sh where there is none), in a process group of its own.

        After `timeout` seconds (None = the runtime's `command_timeout`) the group is killed and the
        exit code is 124. A command killed by signal n has exit code 128 + n. Processes left in the
        background live on until the computer stops.
        """
        self._check_running()
        seconds = self._command_timeout if timeout is None else timeout
        return await self._commands.run(cmd, seconds, idempotent=idempotent)

    async def execute(
        self,
        code: str,
        timeout: int = 120,  # noqa: ASYNC109
    ) -> JupyterExecutionResult:
        """Run a cell. The kernel starts with the first one, and anew after it has died.

        It is the image's own Jupyter kernel where ipykernel is installed for python3, and a plain
        Python session otherwise. RuntimeError where there is no python3.
        """
        self._check_running()
        return await self._kernel.execute(code, timeout)

    async def fetch_container_names(self) -> list[str]:
        """The main container's name, then those of the side containers."""
        return list(self._names)

    async def stop(self) -> None:
        """Remove the containers and their network."""
        if self._is_stopped:
            return
        self._is_stopped = True
        await self._kernel.close()
        await self._commands.close()
        await remove_for_sure(self._docker, self._id)

    async def _start_shells_in(self, cwd: str) -> None:
        # Every command and the kernel start there anyway. None can start in a folder that is
        # none, so this one starts from the root.
        result = await self._check(f"test -d {shlex.quote(cwd)}")
        if result.exit_code != 0:
            where = ExecutionResult(output=b"in the container", exit_code=result.exit_code)
            raise missing_directory(cwd, where)

    async def _get_archive(self, path: str) -> tarfile.TarFile:
        try:
            with engine_errors(f"downloading {path}"):
                archive: tarfile.TarFile = await self._container.get_archive(path)
                return archive
        except DockerError as error:
            if error.status == 404 and "No such container" not in str(error):
                raise FileNotFoundError(errno.ENOENT, "no such file", path) from error
            raise

    async def _owner(self) -> tuple[int, int]:
        if self._user is None:
            result = await self._check("id -u; id -g")
            user, group = result.output.split()
            self._user = (int(user), int(group))
        return self._user

    async def _check(self, cmd: str) -> ExecutionResult:
        return await self._commands.run(cmd, self._command_timeout, idempotent=True, cwd="/")

    def _absolute(self, path: str) -> str:
        return posixpath.normpath(posixpath.join(self._cwd, path))

    def _check_running(self) -> None:
        if self._is_stopped:
            raise DockerError("the computer is stopped; start another for more work")


async def remove_for_sure(docker: Any, computer_id: str) -> None:
    """Remove a computer, again and again while the engine is away; after that, say so."""
    give_up_at = time.monotonic() + _SECONDS_TO_REMOVE
    wait = 0.1
    while True:
        try:
            return await remove_computer(docker, computer_id)
        except DockerError as error:
            if time.monotonic() > give_up_at:
                logger.warning(
                    f"computer {computer_id} could not be removed; once its owner has ended, the"
                    f" next start or nanoeval.bin.rm removes it: {error}"
                )
                return
            is_away = isinstance(error, EngineUnavailableError)
        await asyncio.sleep(wait)
        wait = min(2.0, wait * 2) if is_away else wait


def _pack(file: bytes, path: str, owner: tuple[int, int]) -> io.BytesIO:
    info = tarfile.TarInfo(path.lstrip("/"))
    info.size = len(file)
    info.mtime = int(time.time())
    info.mode = 0o644
    info.uid, info.gid = owner
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(info, io.BytesIO(file))
    packed.seek(0)
    return packed
