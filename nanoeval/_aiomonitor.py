"""Starts aiomonitor beside an event loop: a text console that lists its tasks. Knows no run.

A person attaches with `python -m aiomonitor.cli -p PORT`. Nothing here may delay or stop a run.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sqlite3
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from nanoeval._store import diagnose

ENV_AIOMONITOR = "NANOEVAL_AIOMONITOR"
ENV_CONSOLE = "NANOEVAL_AIOMONITOR_CONSOLE"
HOST = "127.0.0.1"
# Importing it costs a good part of a second of CPU, which short runs are spared.
START_AFTER = 5.0
# A person may still be connected; the run does not wait for them to leave.
CLOSE_WITHIN = 0.5

logger = logging.getLogger(__name__)


class AiomonitorServer:
    """aiomonitor for the running loop, during a block; its port goes into the executor's row."""

    def __init__(self, path: Path, executor_id: int) -> None:
        self._path, self._executor_id = path, executor_id
        self._loop = asyncio.get_running_loop()
        self._stop = threading.Event()
        self._is_serving = False
        self._thread = threading.Thread(target=self._run, name="nanoeval-aiomonitor", daemon=True)

    def __enter__(self) -> Self:
        if os.environ.get(ENV_AIOMONITOR) != "0":
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        if self._is_serving:
            self._thread.join(timeout=CLOSE_WITHIN)

    def _run(self) -> None:
        if self._stop.wait(START_AFTER):
            return
        try:
            monitor, port = self._start()
            self._is_serving = True
            diagnose(self._path, self._executor_id, aiomonitor_port=port)
        except (OSError, ImportError, sqlite3.Error) as error:
            logger.info(f"aiomonitor is not available in this process: {error}")
            return
        self._stop.wait()
        task_factory = self._loop.get_task_factory()
        monitor.close()
        # It puts back the factory that it found at its start, which the eval may have changed.
        self._loop.set_task_factory(task_factory)

    def _start(self) -> tuple[Any, int]:
        import aiomonitor

        port, console_port, web_port = _free_ports(3)
        # With a port that was taken in the meantime it waits for ever, in this thread alone.
        monitor = aiomonitor.start_monitor(
            self._loop,
            host=HOST,
            port=port,
            console_port=console_port,
            webui_port=web_port,
            console_enabled=os.environ.get(ENV_CONSOLE) == "1",
        )
        return monitor, port


def _free_ports(count: int) -> list[int]:
    """Ports of the loopback that the system picks; they differ."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for holder in sockets:
            holder.bind((HOST, 0))
        return [holder.getsockname()[1] for holder in sockets]
