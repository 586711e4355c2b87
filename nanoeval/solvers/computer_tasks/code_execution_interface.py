"""A computer to work on, what a task asks of it, and what starts one. Start reading here.

Knows no particular kind of computer; those are in `runtimes`.
"""

from __future__ import annotations

import ast
import os
import shlex
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from enum import StrEnum
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, Literal, final

import chz
from pydantic import BaseModel, Field, field_validator

ENV_SKIP_JUPYTER_SETUP = "ALCATRAZ_SKIP_JUPYTER_SETUP"
_SHOWN_OUTPUT_CHARS = 4000


class ComputerSetupError(RuntimeError):
    """A computer started, but is not what the task asked for."""


# An AssertionError, because evals in the field catch it as one.
class CommandFailedError(AssertionError):
    """A command that had to work did not; the message holds command, exit code and output."""


class ExecutionResult(BaseModel):
    """What a command left: stdout and stderr together as they came, and its exit code."""

    output: bytes
    exit_code: int

    @property
    def unicode_output_best_effort(self) -> str:
        """The output as UTF-8 text; each byte that is not becomes U+FFFD."""
        return self.output.decode("utf-8", errors="replace")


class JupyterExecutionResult(BaseModel):
    """What a cell left. `final_expression_output` is the repr of the last line's value, if any."""

    status: Literal[
        "running",
        "success",
        "cancelled",
        "failed_with_in_kernel_exception",
        "failed_with_system_exception",
        "failed_with_kernel_death",
        "failed_with_response_too_large",
    ]
    output: str
    final_expression_output: str | None = None
    in_kernel_exception: Any | None = None
    system_exception: Any | None = None

    @cached_property
    def parsed_final_expression_output(self) -> Any:
        """The last line's value, where its repr is a Python literal; None where there is none.

        Raises ValueError for any other repr.
        """
        if not self.final_expression_output:
            return None
        try:
            return ast.literal_eval(self.final_expression_output)
        except (ValueError, SyntaxError) as error:
            raise ValueError(
                f"the cell's value {self.final_expression_output[:200]!r} is not a Python literal;"
                " end the cell with a number, string, list, dict or the like"
            ) from error


class NetworkMode(StrEnum):
    """What a computer's network reaches. Side containers are reachable in every mode."""

    NONE = "none"
    WEBCACHE_GET_ONLY = "webcache_get_only"
    UNPROXIED = "unproxied"
    API_ACCESS = "api_access"


class ComputerInterface(ABC):
    """A connection to one computer. It does not own the computer: its runtime stops it.

    Each command runs in a fresh shell, in the task's `cwd`.
    """

    @abstractmethod
    async def disable_internet(self) -> None:
        """Cut every route out, now and for good. Side containers stay reachable."""

    @abstractmethod
    async def upload(self, file: bytes, destination: str) -> None:
        """Write `file` to the path `destination`, replacing what is there."""

    @abstractmethod
    async def download(self, file: str) -> bytes:
        """The content of the file at path `file`."""

    @abstractmethod
    async def send_shell_command(self, cmd: str, *, idempotent: bool = False) -> ExecutionResult:
        """Run `cmd` in a new shell and wait for it.

        With `idempotent`, a lost connection may be answered by running it again.
        """

    async def check_shell_command(self, cmd: str, *, idempotent: bool = False) -> ExecutionResult:
        """Run `cmd` and raise CommandFailedError unless it exits with 0."""
        result = await self.send_shell_command(cmd, idempotent=idempotent)
        if result.exit_code != 0:
            shown = result.unicode_output_best_effort[-_SHOWN_OUTPUT_CHARS:]
            raise CommandFailedError(
                f"the command exited with {result.exit_code}, wanted 0\n  command: {cmd}\n"
                f"  output: {shown}"
            )
        return result

    @abstractmethod
    async def fetch_container_names(self) -> list[str]:
        """Names of the task's containers, the main one first; empty where there are none."""

    @abstractmethod
    async def stop(self) -> None:
        """Stop the computer; nothing else works on it afterwards."""

    async def _start_shells_in(self, cwd: str) -> None:
        """Make new login shells start in `cwd`. Overridden where every command does anyway.

        Raises ComputerSetupError where `cwd` is no directory.
        """
        quoted = shlex.quote(cwd)
        line = shlex.quote(f"cd {quoted}")
        here = await self.send_shell_command(f"cd {quoted} && pwd -P", idempotent=True)
        if here.exit_code != 0:
            raise missing_directory(cwd, here)
        # bash reads only the first of these three files in a login shell.
        await self.check_shell_command(
            "login=~/.profile; for f in ~/.bash_profile ~/.bash_login; do"
            ' if [ -f "$f" ]; then login=$f; break; fi; done;'
            f' for f in ~/.bashrc "$login"; do grep -qxF {line} "$f" 2>/dev/null'
            f' || printf "%s\\n" {line} >> "$f"; done',
            idempotent=True,
        )
        there = await self.check_shell_command("bash -lc 'pwd -P'", idempotent=True)
        if there.output.strip() != here.output.strip():
            raise ComputerSetupError(
                f"a login shell starts in {there.unicode_output_best_effort.strip()!r}, not in"
                f" cwd={cwd!r}; look for a `cd` in the image's shell profiles"
            )


class JupyterComputerInterface(ComputerInterface):
    """A computer that also runs Python cells in one lasting kernel."""

    @abstractmethod
    async def execute(
        self,
        code: str,
        timeout: int = 120,  # noqa: ASYNC109
    ) -> JupyterExecutionResult:
        """Run `code` in the kernel for at most `timeout` seconds."""

    async def check_execute(self, code: str) -> JupyterExecutionResult:
        """Run `code` and raise CommandFailedError unless its status is "success"."""
        result = await self.execute(code)
        if result.status != "success":
            raise CommandFailedError(
                f'the cell ended with status {result.status!r}, wanted "success"\n  cell: {code}\n'
                f"  exception: {result.in_kernel_exception or result.system_exception}\n"
                f"  output: {result.output[-_SHOWN_OUTPUT_CHARS:]}"
            )
        return result

    async def _start_shells_in(self, cwd: str) -> None:
        await super()._start_shells_in(cwd)
        if os.environ.get(ENV_SKIP_JUPYTER_SETUP, "").lower() == "true":
            return
        await self.check_execute(f"import os; os.chdir({cwd!r})")


def missing_directory(cwd: str, result: ExecutionResult) -> ComputerSetupError:
    """The error for a task whose `cwd` is no directory on its computer."""
    return ComputerSetupError(
        f"cwd={cwd!r} is not a directory on the computer"
        f" ({result.unicode_output_best_effort.strip()[-200:]}); create it in the image, or set"
        " the task's cwd to one that exists"
    )


class ContainerResources(BaseModel):
    """CPU cores and memory in MB."""

    cpu: float = 0.2
    memory: int = 1024


class VolumeMount(BaseModel):
    """A file or folder of the host, seen read-only at `container_path`."""

    host_path: str
    container_path: str


@chz.chz
class RuntimeConfig:
    """What a runtime tells the tasks it runs. Subclass it, and override a task's
    `validate_runtime_config`, to tell more."""


class ComputerConfiguration(BaseModel):
    """What a task asks of its computer. A runtime serves what it can and says what it cannot."""

    cwd: str = Field(default="/root", description="Working directory; absolute; must exist.")
    docker_image: str | None = Field(
        default=None, description="Image of the main container; None = the runtime's own."
    )
    side_images: list[str] = Field(
        default=[], description="Images of containers to run beside the main one."
    )
    docker_compose_yaml: str | None = Field(
        default=None, description="Compose file, as text, whose services run beside the main one."
    )
    azure_vm_sku: str | None = None
    disk_mount_path: str | None = None
    azure_files_config: dict[str, str] | None = None
    azure_container_config: dict[str, str] | None = None
    volumes_config: dict[str, Any] = Field(default={}, deprecated="use volume_mounts")
    shm_size: str | None = Field(default=None, description='Size of /dev/shm, such as "1g".')
    mem_limit: str | None = Field(default=None, description='Memory limit, such as "4g".')
    timeout: int | None = Field(default=None, description="Seconds for starting the computer.")
    alcatraz_limits: dict[str, Any] | None = None
    jupyter_setup: Sequence[str] | None = Field(
        default=None, description="Command that starts a Jupyter kernel; None = the image's own."
    )
    environment: dict[str, Any] = Field(
        default={}, description="Environment variables; a value of None leaves its variable out."
    )
    resources: ContainerResources = Field(
        default=ContainerResources(), description="What the main container is given at least."
    )
    limits: ContainerResources = Field(
        default=ContainerResources(), description="What the main container is given at most."
    )
    volume_mounts: list[VolumeMount] = Field(default=[], description="Read-only mounts.")
    network_mode: NetworkMode = NetworkMode.NONE
    num_gpus: int = 0

    @property
    def allow_internet(self) -> bool:
        """Whether any route leads out."""
        return self.network_mode != NetworkMode.NONE

    def validate_runtime_config(self, runtime_config: RuntimeConfig) -> RuntimeConfig:
        """Return the config that `setup` and `grade` get. A plain RuntimeConfig is expected here.

        Override it in a task that needs a RuntimeConfig of its own.
        """
        if type(runtime_config) is not RuntimeConfig:
            raise TypeError(
                f"{type(self).__name__} knows no {type(runtime_config).__name__}; override"
                " validate_runtime_config in the task to use it, or give the runtime a plain"
                " RuntimeConfig()"
            )
        return runtime_config

    async def setup(
        self, computer: ComputerInterface, runtime_config: RuntimeConfig | None = None
    ) -> None:
        """Check that `computer` has the GPUs, working directory and mounts asked for.

        Raises ComputerSetupError naming the first that is missing.
        """
        del runtime_config
        if self.num_gpus > 0:
            await self._check_gpus(computer)
        await computer._start_shells_in(self.cwd)
        for mount in self.volume_mounts:
            path = shlex.quote(mount.container_path)
            found = await computer.send_shell_command(f"test -e {path}", idempotent=True)
            if found.exit_code != 0:
                raise ComputerSetupError(
                    f"volume mount {mount.container_path!r} is not there (host path"
                    f" {mount.host_path!r}); check that this runtime mounts volumes"
                )

    async def _check_gpus(self, computer: ComputerInterface) -> None:
        listed = await computer.send_shell_command("nvidia-smi -L", idempotent=True)
        found = sum(line.startswith(b"GPU ") for line in listed.output.splitlines())
        if listed.exit_code != 0 or found != self.num_gpus:
            raise ComputerSetupError(
                f"num_gpus={self.num_gpus}, but the computer shows {found}"
                f" (nvidia-smi -L: {listed.unicode_output_best_effort.strip()[-200:]!r}); use a"
                " runtime and a host with that many free GPUs"
            )

    @field_validator("cwd")
    @classmethod
    def _check_absolute(cls, value: str) -> str:
        if not PurePosixPath(value).is_absolute():
            raise ValueError(f"cwd={value!r} must be an absolute path")
        return value


@chz.chz
class ComputerRuntime(ABC):
    """Starts computers. `async with runtime.run(task) as computer` is what solvers write.

    A runtime of your own defines `_start_computer` and `_do_runtime_setup`.
    """

    runtime_config: RuntimeConfig = chz.field(default_factory=RuntimeConfig)

    @final
    @asynccontextmanager
    async def run(self, task: ComputerConfiguration) -> AsyncIterator[ComputerInterface]:
        """Start a computer for `task`, set it up, yield it, and stop it however the block ends."""
        async with self._start_computer(task) as computer:
            await self.setup_computer(task, computer)
            yield computer

    @final
    async def setup_computer(
        self, task: ComputerConfiguration, computer: ComputerInterface
    ) -> None:
        """Do the runtime's own set-up, then the task's."""
        runtime_config = task.validate_runtime_config(self.runtime_config)
        await self._do_runtime_setup(task, computer)
        await task.setup(computer, runtime_config=runtime_config)

    async def check(self) -> None:  # noqa: B027  a runtime may have nothing to check
        """Raise where no computer can be started at all; solvers ask once, before any rollout."""

    @abstractmethod
    async def _do_runtime_setup(
        self, task: ComputerConfiguration, computer: ComputerInterface
    ) -> None:
        """Do what every computer of this runtime needs, before the task's set-up."""

    @abstractmethod
    def _start_computer(
        self, task: ComputerConfiguration
    ) -> AbstractAsyncContextManager[ComputerInterface]:
        """A context manager that starts a computer, yields it and stops it."""


def valid_ipython_code(code: str) -> bool:
    """Whether `code` parses as a notebook cell (lines that begin with % or ! count as valid)."""
    try:
        ast.parse(_plain_python(code))
    except (SyntaxError, ValueError):
        return False
    return True


def _plain_python(code: str) -> str:
    if code.lstrip().startswith("%%"):
        return ""
    lines = []
    for line in code.splitlines():
        bare = line.lstrip()
        if bare[:1] in ("%", "!"):
            line = line[: len(line) - len(bare)] + "pass"  # noqa: PLW2901
        lines.append(line)
    return "\n".join(lines)
