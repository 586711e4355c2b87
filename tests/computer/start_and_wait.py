"""Starts a computer, prints "ready", waits to be killed: `local FOLDER` or `docker IMAGE`."""

from __future__ import annotations

import asyncio
import sys

from nanoeval.solvers.computer_tasks.runtimes import DockerRuntime, LocalRuntime
from tests.computer.fakes import AnswerTask


async def main(kind: str, where: str) -> None:
    runtime = LocalRuntime(root=where) if kind == "local" else DockerRuntime(image=where)
    async with runtime.run(AnswerTask()) as computer:
        await computer.check_shell_command("setsid sleep 1236.5 >/dev/null 2>&1 &")
        print("ready", flush=True)
        await computer.send_shell_command("sleep 1237.5")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
