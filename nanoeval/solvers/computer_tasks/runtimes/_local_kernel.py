"""A Jupyter kernel of this machine, in its own process. Knows no task."""

from __future__ import annotations

import asyncio
import queue
from pathlib import Path
from typing import Any

from nanoeval.solvers.computer_tasks.code_execution_interface import JupyterExecutionResult
from nanoeval.solvers.computer_tasks.runtimes._cleanup import uninterrupted
from nanoeval.solvers.computer_tasks.runtimes._output import (
    BoundedOutput,
    sendable,
    timeout_exception,
)

_START_SECONDS = 60.0
_INTERRUPT_SECONDS = 5.0
_LOOK_FOR_DEATH_SECONDS = 0.5


class LocalKernel:
    """Runs cells one after another. Starts with the first one, and anew after it has died."""

    def __init__(
        self, folder: Path, cwd: str, environment: dict[str, str], max_output_bytes: int
    ) -> None:
        self._folder = folder
        self._cwd = cwd
        self._environment = environment
        self._max_output_bytes = max_output_bytes
        self._one_at_a_time = asyncio.Lock()
        self._kernel: Any = None
        self._client: Any = None

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
            if self._client is None:
                await self._start()
            cell = _Cell(
                self._client.execute(sendable(code), allow_stdin=False), self._max_output_bytes
            )
            try:
                async with asyncio.timeout(timeout) as limit:
                    await self._follow(cell)
            except TimeoutError:
                if not limit.expired():
                    raise
                await self._interrupt(cell, timeout)
            except BaseException:
                # The cell would go on, and its output would mix with the next one's.
                await uninterrupted(self.stop())
                raise
            return cell.result()

    async def stop(self) -> None:
        """Kill the kernel, if there is one."""
        kernel, client, self._kernel, self._client = self._kernel, self._client, None, None
        if client is not None:
            client.stop_channels()
        if kernel is not None:
            await kernel.shutdown_kernel(now=True)
            kernel.context.destroy(linger=0)

    async def _start(self) -> None:
        # In a thread, because these imports take half a second.
        manager, context = await asyncio.to_thread(_import_jupyter)
        # Sockets in the private folder need no free ports and let nobody else in.
        self._kernel = manager(
            context=context(),
            transport="ipc",
            ip=str(self._folder / "kernel"),
            connection_file=str(self._folder / "kernel.json"),
        )
        try:
            await self._kernel.start_kernel(cwd=self._cwd, env=self._environment)
            self._client = self._kernel.client()
            # Its heartbeat channel would block the event loop; _follow looks for death itself.
            self._client.start_channels(hb=False)
            await self._client.wait_for_ready(timeout=_START_SECONDS)
        except BaseException:
            await uninterrupted(self.stop())
            raise

    async def _follow(self, cell: _Cell) -> None:
        while cell.status == "running":
            try:
                message = await self._client.get_iopub_msg(timeout=_LOOK_FOR_DEATH_SECONDS)
            except queue.Empty:
                if not await self._kernel.is_alive():
                    cell.status = "failed_with_kernel_death"
                    await self.stop()
                continue
            cell.take(message)

    async def _interrupt(self, cell: _Cell, seconds: float) -> None:
        try:
            await self._kernel.interrupt_kernel()
            async with asyncio.timeout(_INTERRUPT_SECONDS):
                await self._follow(cell)
            if cell.status != "failed_with_kernel_death":
                cell.status = "cancelled"
        except TimeoutError:
            cell.status = "failed_with_kernel_death"
            await self.stop()
        cell.system_exception = timeout_exception(seconds)


def _import_jupyter() -> tuple[Any, Any]:
    """The kernel manager's and the socket context's class."""
    try:
        import ipykernel  # noqa: F401
        from jupyter_client.manager import AsyncKernelManager
        from zmq.asyncio import Context
    except ImportError as error:
        raise ModuleNotFoundError('cells need Jupyter: pip install "nanoeval[computer]"') from error
    return AsyncKernelManager, Context


class _Cell:
    """Gathers what the kernel says of one cell."""

    def __init__(self, message_id: str, max_output_bytes: int) -> None:
        self._message_id = message_id
        self._output = BoundedOutput(max_output_bytes)
        self._max_output_bytes = max_output_bytes
        self._value: str | None = None
        self._exception: dict[str, Any] | None = None
        self.status: Any = "running"
        self.system_exception: dict[str, Any] | None = None

    def take(self, message: dict[str, Any]) -> None:
        if message["parent_header"].get("msg_id") != self._message_id:
            return
        kind, content = message["msg_type"], message["content"]
        if kind == "stream":
            self._output.write(content["text"].encode("utf-8", errors="replace"))
        elif kind == "execute_result":
            self._value = content["data"].get("text/plain", "")
        elif kind == "error":
            self._exception = {
                "name": content["ename"],
                "args": [content["evalue"]],
                "traceback": content["traceback"],
                "notes": [],
            }
        elif kind == "status" and content["execution_state"] == "idle":
            self.status = "success"

    def result(self) -> JupyterExecutionResult:
        too_large = self._output.is_cut or len(self._value or "") > self._max_output_bytes
        if self.status == "success" and self._exception is not None:
            self.status = "failed_with_in_kernel_exception"
        elif self.status == "success" and too_large:
            self.status = "failed_with_response_too_large"
        return JupyterExecutionResult(
            status=self.status,
            output=self._output.getvalue().decode("utf-8", errors="replace"),
            final_expression_output=None if too_large else self._value,
            in_kernel_exception=self._exception,
            system_exception=self.system_exception,
        )
