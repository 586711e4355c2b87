"""Commands in a container, over one lasting connection. Knows no task.

A `docker exec` per command costs the engine some 70 ms, cannot be killed, and waits two seconds for
whatever a command leaves in the background. So one exec runs a small server, and commands go to
that; where the image has no python3, each command is an exec of its own.
"""

from __future__ import annotations

import asyncio
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanoeval.solvers.computer_tasks.code_execution_interface import ExecutionResult
from nanoeval.solvers.computer_tasks.runtimes._cleanup import uninterrupted
from nanoeval.solvers.computer_tasks.runtimes._docker_engine import DockerError, engine_errors
from nanoeval.solvers.computer_tasks.runtimes._output import (
    TIMED_OUT,
    BoundedOutput,
    cut_notice,
    sendable,
    timeout_notice,
)

# The two formats, and the two operations, of _in_container_commands.
_REQUEST = struct.Struct(">III")
_REPLY = struct.Struct(">IiQI")
_RUN, _KILL = 0, 1
_SERVER = Path(__file__).with_name("_in_container_commands.py")
_SECONDS_TO_DIE = 10.0
_KILLED = 137
_NO_SUCH_PROGRAM = (126, 127)
# Prints its process id, which is its group's too, and becomes the shell.
_BARE_EXEC = (
    'echo $$; exec 2>&1; if command -v bash >/dev/null; then exec bash -c "$1"; fi; exec sh -c "$1"'
)


class _ConnectionLost(Exception):
    """The server in the container, or the way to it, is gone."""


class ContainerCommands:
    """Runs commands in one container, any number at once. `close` it before the container goes."""

    def __init__(self, container: Any, cwd: str, max_output_bytes: int) -> None:
        self._container = container
        self._cwd = cwd
        self._max_output_bytes = max_output_bytes
        self._opening = asyncio.Lock()
        self._stream: Any = None
        self._reader: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[tuple[int, int, bytes]]] = {}
        self._n_commands = 0
        self._has_python = True

    async def run(
        self, cmd: str, seconds: float, *, idempotent: bool = False, cwd: str | None = None
    ) -> ExecutionResult:
        """Run `cmd` in `cwd`; killed with its group after `seconds`, with exit code 124.

        Raises DockerError where the container or the engine is gone. A command that took the
        connection with it, and left the container running, has exit code 137.
        """
        cwd = self._cwd if cwd is None else cwd
        try:
            return await self._run(cmd, seconds, cwd)
        except _ConnectionLost:
            await self.check_container()
            # A container that is just going down still counts as running; a new connection tells.
            async with self._opening:
                if self._stream is None:
                    await self._open()
            if idempotent:
                return await self._run(cmd, seconds, cwd)
            text = b"[the command was killed, and with it the connection to the container]\n"
            return ExecutionResult(output=text, exit_code=_KILLED)

    async def check_container(self) -> None:
        """Raise DockerError, with the reason, unless the container runs."""
        with engine_errors("looking for a container that was lost"):
            state = (await self._container.show())["State"]
        if not state["Running"]:
            why = "it ran out of memory" if state.get("OOMKilled") else "it was killed or stopped"
            raise DockerError(f"the container is gone: {why} (exit code {state.get('ExitCode')})")

    async def close(self) -> None:
        """Close the connection. Commands that still run lose their output."""
        reader, stream, self._reader, self._stream = self._reader, self._stream, None, None
        if reader is not None:
            reader.cancel()
            await asyncio.wait([reader])
        if stream is not None:
            await stream.close()

    async def _run(self, cmd: str, seconds: float, cwd: str) -> ExecutionResult:
        async with self._opening:
            if self._has_python and self._stream is None:
                await self._open()
        if not self._has_python:
            return await self._run_by_exec(cmd, seconds, cwd)
        self._n_commands += 1
        number = self._n_commands
        payload = b"%d\0%s\0%s" % (self._max_output_bytes, cwd.encode(), sendable(cmd).encode())
        reply = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            await self._send(number, _RUN, payload)
            async with asyncio.timeout(seconds) as limit:
                code, total, output = await asyncio.shield(reply)
        except TimeoutError:
            if not limit.expired():
                raise
            return await self._kill(number, reply, seconds)
        except asyncio.CancelledError:
            with suppress(_ConnectionLost):
                await uninterrupted(self._send(number, _KILL))
            raise
        finally:
            self._waiting.pop(number, None)
        return ExecutionResult(output=self._joined(total, output), exit_code=code)

    async def _kill(
        self, number: int, reply: asyncio.Future[Any], seconds: float
    ) -> ExecutionResult:
        output = b""
        try:
            await self._send(number, _KILL)
            async with asyncio.timeout(_SECONDS_TO_DIE):
                _, total, output = await reply
            output = self._joined(total, output)
        except (TimeoutError, _ConnectionLost):
            # Processes that cannot be killed one by one; its files survive a restart.
            await self.close()
            with engine_errors("restarting a container whose command would not die"):
                await self._container.restart(t=0)
            output = b"[the container was restarted: the command would not die]"
        return ExecutionResult(output=output + timeout_notice(seconds), exit_code=TIMED_OUT)

    def _joined(self, total: int, output: bytes) -> bytes:
        if total <= len(output):
            return output
        half = len(output) // 2
        return output[:half] + cut_notice(total - len(output)) + output[half:]

    async def _open(self) -> None:
        source = await asyncio.to_thread(_SERVER.read_text)
        with engine_errors("connecting to a container"):
            process = await self._container.exec(
                ["python3", "-c", source], stdin=True, stderr=False, workdir="/"
            )
            stream = process.start()
            await stream.__aenter__()
        self._stream = stream
        hello = self._waiting[0] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read(stream))
        try:
            await asyncio.shield(hello)
        except _ConnectionLost as error:
            await self.close()
            await self.check_container()
            with engine_errors("connecting to a container"):
                exit_code = (await process.inspect())["ExitCode"]
            if exit_code not in _NO_SUCH_PROGRAM:
                raise DockerError(
                    f"the connection to a container ended at once (exit code {exit_code})"
                ) from error
            self._has_python = False
        except BaseException:
            await uninterrupted(self.close())
            raise

    async def _send(self, number: int, operation: int, payload: bytes = b"") -> None:
        stream = self._stream
        if stream is None:
            raise _ConnectionLost
        try:
            await stream.write_in(_REQUEST.pack(number, operation, len(payload)) + payload)
        except (OSError, RuntimeError, AssertionError) as error:
            raise _ConnectionLost from error

    async def _read(self, stream: Any) -> None:
        """Hand replies to those who wait, until the stream ends; then all of them have lost."""
        data = bytearray()
        try:
            while (message := await stream.read_out()) is not None:
                data += message.data
                while len(data) >= _REPLY.size:
                    number, code, total, length = _REPLY.unpack_from(data)
                    if len(data) < _REPLY.size + length:
                        break
                    output = bytes(data[_REPLY.size : _REPLY.size + length])
                    del data[: _REPLY.size + length]
                    reply = self._waiting.get(number)
                    if reply is not None and not reply.done():
                        reply.set_result((code, total, output))
        except OSError:
            pass  # the engine is gone; whoever waits is told below
        finally:
            if self._stream is stream:
                self._stream = None
            for reply in self._waiting.values():
                if not reply.done():
                    reply.set_exception(_ConnectionLost())
                    reply.exception()  # nobody may be waiting any more
            await stream.close()

    async def _run_by_exec(self, cmd: str, seconds: float, cwd: str) -> ExecutionResult:
        with engine_errors("running a command"):
            process = await self._container.exec(["sh", "-c", _BARE_EXEC, "sh", cmd], workdir=cwd)
            output = BoundedOutput(self._max_output_bytes)
            first_line = bytearray()
            async with process.start() as stream:
                try:
                    async with asyncio.timeout(seconds) as limit:
                        while (message := await stream.read_out()) is not None:
                            data = _after_first_line(first_line, message.data)
                            output.write(data)
                except BaseException as error:
                    await uninterrupted(self._kill_by_exec(bytes(first_line)))
                    if isinstance(error, TimeoutError) and limit.expired():
                        shown = output.getvalue() + timeout_notice(seconds)
                        return ExecutionResult(output=shown, exit_code=TIMED_OUT)
                    raise
            code = (await process.inspect())["ExitCode"]
        return ExecutionResult(
            output=output.getvalue(), exit_code=_KILLED if code is None else code
        )

    async def _kill_by_exec(self, first_line: bytes) -> None:
        kill = ["sh", "-c", f"kill -9 -{int(first_line or b'0')}"]
        process = await self._container.exec(kill)
        async with process.start() as stream:
            while await stream.read_out() is not None:
                pass
        if (await process.inspect())["ExitCode"] != 0:
            await self._container.restart(t=0)


def _after_first_line(first_line: bytearray, data: bytes) -> bytes:
    """`data` without the part that still belongs to the first line, which is kept in the other."""
    if first_line.endswith(b"\n"):
        return data
    head, newline, rest = data.partition(b"\n")
    first_line += head + newline
    return rest
