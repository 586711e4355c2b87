"""A kernel in a container, over one lasting connection. Knows no task."""

from __future__ import annotations

import asyncio
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanoeval.solvers.computer_tasks.code_execution_interface import (
    ComputerSetupError,
    JupyterExecutionResult,
)
from nanoeval.solvers.computer_tasks.runtimes._cleanup import uninterrupted
from nanoeval.solvers.computer_tasks.runtimes._docker_commands import ContainerCommands
from nanoeval.solvers.computer_tasks.runtimes._docker_engine import engine_errors
from nanoeval.solvers.computer_tasks.runtimes._output import (
    BoundedOutput,
    sendable,
    timeout_exception,
)

# The formats and operations of _in_container_kernel.
_LENGTH = struct.Struct(">I")
_REQUEST = struct.Struct(">BI")
_RUN, _INTERRUPT, _KILL = 0, 1, 2
_N_FIELDS = 6
_STDOUT = 1
_DRIVER = Path(__file__).with_name("_in_container_kernel.py")
_INTERRUPT_SECONDS = 5.0
# A little more than the driver gives to a task's own command, which may install things first.
_START_SECONDS = 630.0


class _KernelDied(Exception):
    """The connection to the kernel ended."""


class ContainerKernel:
    """Runs cells one after another. Starts with the first one, and anew after it has died."""

    def __init__(
        self,
        container: Any,
        commands: ContainerCommands,
        cwd: str,
        max_output_bytes: int,
        jupyter_setup: list[str] | None,
    ) -> None:
        self._container = container
        self._commands = commands
        self._cwd = cwd
        self._max_output_bytes = max_output_bytes
        self._setup = jupyter_setup
        self._one_at_a_time = asyncio.Lock()
        self._stream: Any = None
        self._received = bytearray()
        # What the driver, not a cell, prints to stderr.
        self._complaints = BoundedOutput(4096)
        self._pid = 0

    async def execute(
        self,
        code: str,
        timeout: float,  # noqa: ASYNC109
    ) -> JupyterExecutionResult:
        """Run a cell for at most `timeout` seconds.

        Out of time it is interrupted ("cancelled"), and where it does not heed that, the kernel is
        killed ("failed_with_kernel_death").
        """
        async with self._one_at_a_time:
            if self._stream is None:
                await self._start()
            try:
                await self._send(_RUN, sendable(code).encode())
                async with asyncio.timeout(timeout) as limit:
                    result = _result(await self._receive())
                if result.status == "failed_with_kernel_death":
                    await self.close()
                return result
            except TimeoutError:
                if not limit.expired():
                    raise
                return await self._interrupt(timeout)
            except _KernelDied:
                await self.close()
                await self._commands.check_container()
                return JupyterExecutionResult(status="failed_with_kernel_death", output="")
            except BaseException:
                # The cell would go on, and its output would mix with the next one's.
                await uninterrupted(self._kill())
                raise

    async def close(self) -> None:
        """Close the connection, which ends the kernel."""
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.close()

    async def _start(self) -> None:
        source = await asyncio.to_thread(_DRIVER.read_text)
        arguments = [str(self._max_output_bytes), *(self._setup or ())]
        with engine_errors("starting a kernel"):
            process = await self._container.exec(
                ["python3", "-c", source, *arguments],
                stdin=True,
                workdir=self._cwd,
                environment={"NANOEVAL_KERNEL_SOURCE": source} if self._setup else None,
            )
            self._stream = process.start()
            await self._stream.__aenter__()
        self._received.clear()
        try:
            async with asyncio.timeout(_START_SECONDS):
                fields = await self._receive()
        except TimeoutError as error:
            await self.close()
            raise ComputerSetupError(
                f"no kernel was ready in the container within {_START_SECONDS:g} seconds"
            ) from error
        except _KernelDied as error:
            await self.close()
            await self._commands.check_container()
            said = self._complaints.getvalue().decode("utf-8", errors="replace")
            raise ComputerSetupError(
                f"no kernel starts in the container; its image needs python3: {said}"
            ) from error
        except BaseException:
            await uninterrupted(self.close())
            raise
        if fields[0] != b"ready":
            await self.close()
            reason = fields[1].decode("utf-8", errors="replace")
            raise ComputerSetupError(f"no kernel starts in the container: {reason}")
        self._pid = int(fields[1])

    async def _interrupt(self, seconds: float) -> JupyterExecutionResult:
        try:
            await self._send(_INTERRUPT)
            async with asyncio.timeout(_INTERRUPT_SECONDS):
                result = _result(await self._receive())
            status = "cancelled"
        except (TimeoutError, _KernelDied):
            await self._kill()
            result = JupyterExecutionResult(status="failed_with_kernel_death", output="")
            status = result.status
        update = {"status": status, "system_exception": timeout_exception(seconds)}
        return result.model_copy(update=update)

    async def _kill(self) -> None:
        with suppress(_KernelDied):
            await self._send(_KILL)
        await self.close()
        # For a driver that is stuck in native code and reads nothing.
        await self._commands.run(f"kill -9 {self._pid}", _INTERRUPT_SECONDS, idempotent=True)

    async def _send(self, operation: int, payload: bytes = b"") -> None:
        try:
            await self._stream.write_in(_REQUEST.pack(operation, len(payload)) + payload)
        except (OSError, RuntimeError, AssertionError) as error:
            raise _KernelDied from error

    async def _receive(self) -> list[bytes]:
        """The fields of the next reply."""
        fields = []
        for _ in range(_N_FIELDS):
            (length,) = _LENGTH.unpack(await self._read(_LENGTH.size))
            fields.append(await self._read(length))
        return fields

    async def _read(self, count: int) -> bytes:
        while len(self._received) < count:
            try:
                message = await self._stream.read_out()
            except OSError as error:
                raise _KernelDied from error
            if message is None:
                raise _KernelDied
            if message.stream == _STDOUT:
                self._received += message.data
            else:
                self._complaints.write(message.data)
        data = bytes(self._received[:count])
        del self._received[:count]
        return data


def _result(fields: list[bytes]) -> JupyterExecutionResult:
    status, output, value, name, message, traceback = (
        field.decode("utf-8", errors="replace") for field in fields
    )
    exception = {
        "name": name,
        "args": [message],
        "traceback": traceback.splitlines(keepends=True),
        "notes": [],
    }
    return JupyterExecutionResult.model_validate(
        {
            "status": status,
            "output": output,
            "final_expression_output": value or None,
            "in_kernel_exception": exception if name else None,
        }
    )
