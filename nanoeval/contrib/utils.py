"""Conveniences for solvers. Knows runtimes by their contract only."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nanoeval.solvers.computer_tasks.code_execution_interface import (
    ComputerConfiguration,
    ComputerInterface,
    ComputerRuntime,
)


@asynccontextmanager
async def run_with_startup_timeout(
    runtime: ComputerRuntime,
    task: ComputerConfiguration,
    timeout: float,  # noqa: ASYNC109
) -> AsyncIterator[ComputerInterface]:
    """`runtime.run(task)`, with TimeoutError where start and set-up take over `timeout` seconds.

    The block itself is not limited. The computer is stopped in either case.
    """
    running = runtime.run(task)
    try:
        async with asyncio.timeout(timeout) as limit:
            computer = await running.__aenter__()
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise TimeoutError(
            f"the computer was not ready within {timeout} seconds; allow more, or look at what its"
            " start and the task's set-up do"
        ) from error
    try:
        yield computer
    except BaseException:
        if not await running.__aexit__(*sys.exc_info()):
            raise
    else:
        await running.__aexit__(None, None, None)
