"""A scripted server in a process of its own, so that it takes no time from the tests' process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pickle
import select
import subprocess
import sys
import urllib.request
from typing import Any, BinaryIO, Self

from nanoeval.setup import raise_file_limit
from nanoeval.testing._server import ScriptedServer, ServerStats

START_TIMEOUT = 30.0
STOP_TIMEOUT = 5.0
REQUEST_TIMEOUT = 10.0


class ScriptedServerProcess:
    """`with ScriptedServerProcess(reply=..., latency=0.2) as server:` until the block's end.

    Takes what `ScriptedServer` takes. Functions travel by name where the new process can import
    them, and by value otherwise (`__main__`, local functions, lambdas). The process ends when this
    one does, however that comes about. Also an async context manager.
    """

    def __init__(self, **options: Any) -> None:
        ScriptedServer(**options)  # a wrong option is reported here, not by the new process
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._base_url = ""

    @property
    def base_url(self) -> str:
        """What clients call the base URL. RuntimeError when it is not running."""
        if self._process is None:
            raise RuntimeError("the server is not running; enter it with `with` or `async with`")
        return self._base_url

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.base_url.rpartition(":")[2].removesuffix("/v1"))

    @property
    def pid(self) -> int:
        """The id of the server's process. RuntimeError when it is not running."""
        if self._process is None:
            raise RuntimeError("the server is not running; enter it with `with` or `async with`")
        return self._process.pid

    def stats(self) -> ServerStats:
        """The server's counters as they stand. Blocks for one request."""
        url = self.base_url.removesuffix("/v1") + "/stats"
        with urllib.request.urlopen(url, timeout=REQUEST_TIMEOUT) as response:
            return ServerStats(**json.load(response))

    def __enter__(self) -> Self:
        import cloudpickle

        if self._process is not None:
            raise RuntimeError(f"the server is already running, at {self._base_url}")
        payload = cloudpickle.dumps((sys.path, cloudpickle.dumps(self._options)))
        process = subprocess.Popen(
            [sys.executable, "-c", "from nanoeval.testing._process import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C at the terminal is this process's to handle.
            start_new_session=True,
        )
        assert process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it died: reading its answer says so
                process.stdin.write(len(payload).to_bytes(8, "big") + payload)
                process.stdin.flush()
            self._base_url = _first_line(process)
        except BaseException:
            _end(process)
            raise
        self._process = process
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._process is not None
        process, self._process = self._process, None
        _end(process)

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.to_thread(self.__exit__)


def _first_line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], START_TIMEOUT)
    line = process.stdout.readline().decode().strip() if ready else ""
    if not line:
        why = f"said nothing for {START_TIMEOUT:g} s" if not ready else "ended at once"
        raise RuntimeError(f"the scripted server's process {why}; its stderr says why")
    return line


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()  # the end of its stdin is what the server waits for
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def serve() -> None:
    """The other end: read the options from stdin, print the base URL, serve until stdin ends."""
    stdin = sys.stdin.buffer
    path, options = pickle.loads(stdin.read(int.from_bytes(stdin.read(8), "big")))
    sys.path[:] = path
    raise_file_limit()
    asyncio.run(_serve_until_end(pickle.loads(options), stdin))


async def _serve_until_end(options: dict[str, Any], stdin: BinaryIO) -> None:
    ended = asyncio.Event()
    async with ScriptedServer(**options) as server:
        print(server.base_url, flush=True)
        asyncio.get_running_loop().add_reader(stdin, ended.set)
        await ended.wait()
