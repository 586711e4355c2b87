"""Runs the monitor beside a run, as a process of its own that ends with it."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nanoeval.setup import say

# What is left of it after its standard input has closed is killed.
END_WITHIN = 3.0


def require_streamlit() -> None:
    """Raise ImportError, naming the install command, where streamlit is missing."""
    if importlib.util.find_spec("streamlit") is None:
        raise ImportError('the monitor needs streamlit: pip install "nanoeval[monitor]"')


@asynccontextmanager
async def monitor_process(run_set_id: str) -> AsyncIterator[None]:
    """Show a run set in the monitor during the block; where to look is told on the console.

    The block does not wait until the monitor is up. The monitor holds the read end of a pipe and
    ends when this process does, however that ends. ImportError where streamlit is missing.
    """
    require_streamlit()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "nanoeval.bin.mon",
        f"run_set_id={run_set_id}",
        "until_stdin_closes=True",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        # Ctrl-C at the terminal is for the run, which then ends its monitor.
        start_new_session=True,
    )
    telling = asyncio.create_task(_tell(process))
    try:
        yield
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(END_WITHIN):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        await telling


async def _tell(process: asyncio.subprocess.Process) -> None:
    """Pass on what the monitor says, above the progress bar."""
    assert process.stdout is not None
    async for line in process.stdout:
        say(line.decode(errors="replace").rstrip())
