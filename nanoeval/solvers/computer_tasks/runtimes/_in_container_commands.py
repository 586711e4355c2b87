"""Runs commands inside a container for `_docker_commands`. Sent there as text.

Needs python3.7 and the standard library of a minimal install, nothing else.

Requests on stdin: id, operation, length (three unsigned 32-bit integers), then the payload. RUN
takes `max_bytes NUL cwd NUL command`; KILL kills the process group of the command with that id.
Replies on stdout, one per RUN: id, exit code (signed 32 bits), bytes of output in all (unsigned 64
bits), length, then the output's two ends; and one with id 0 when it is ready. Ends when stdin does.
"""

from __future__ import annotations

import os
import selectors
import signal
import struct
import subprocess
import tempfile
from contextlib import suppress

REQUEST = struct.Struct(">III")
REPLY = struct.Struct(">IiQI")
RUN, KILL = 0, 1
# What an ended command can have left in its pipe.
PIPE_BYTES = 1 << 20
LONG_COMMAND = 120_000


class Command:
    """One command: its process, the reading end of its output, and what is kept of that."""

    def __init__(self, number: int, payload: bytes) -> None:
        max_bytes, cwd, line = payload.split(b"\0", 2)
        self.number = number
        self.half = max(1, int(max_bytes) // 2)
        self.head, self.tail, self.total = bytearray(), bytearray(), 0
        # The kernel takes no argument of more than 128 KiB.
        self.script = write_script(line) if len(line) > LONG_COMMAND else ""
        self.pipe, write_end = os.pipe()
        self.is_open = True
        os.set_blocking(self.pipe, False)
        try:
            self.process = subprocess.Popen(
                [shell(), self.script] if self.script else [shell(), "-c", line],
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                cwd=cwd,
                start_new_session=True,
            )
        except Exception:
            os.close(self.pipe)
            raise
        finally:
            os.close(write_end)

    def read(self) -> int:
        """Take some output; the number of bytes, 0 for none yet, -1 at the end."""
        try:
            data = os.read(self.pipe, 1 << 16)
        except BlockingIOError:
            return 0
        if not data:
            return -1
        self.total += len(data)
        room = self.half - len(self.head)
        if room > 0:
            self.head += data[:room]
        self.tail += data[max(0, room) :]
        if len(self.tail) > 2 * self.half:
            del self.tail[: -self.half]
        return len(data)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Server:
    """Starts, follows and ends commands on one thread, so that it needs no process of its own."""

    def __init__(self) -> None:
        self.requests = bytearray()
        self.commands: dict[int, Command] = {}
        self.selector = selectors.DefaultSelector()
        self.selector.register(0, selectors.EVENT_READ)
        self.wake = wake_on_child_exit()
        self.selector.register(self.wake, selectors.EVENT_READ)

    def serve(self) -> None:
        reply(0, 0, 0, b"")
        while True:
            for key, _ in self.selector.select():
                if key.fd == 0:
                    data = os.read(0, 1 << 16)
                    if not data:
                        return
                    self.requests += data
                elif key.fd == self.wake:
                    os.read(self.wake, 4096)
                elif key.data.is_open and key.data.read() < 0:
                    self.close_pipe(key.data)
            self.handle_requests()
            for command in list(self.commands.values()):
                if command.process.poll() is not None:
                    self.finish(command)

    def handle_requests(self) -> None:
        while len(self.requests) >= REQUEST.size:
            number, operation, length = REQUEST.unpack_from(self.requests)
            end = REQUEST.size + length
            if len(self.requests) < end:
                return
            payload = bytes(self.requests[REQUEST.size : end])
            del self.requests[:end]
            if operation == RUN:
                self.start(number, payload)
            elif number in self.commands:
                self.commands[number].kill()

    def start(self, number: int, payload: bytes) -> None:
        try:
            command = Command(number, payload)
        except Exception as error:
            text = f"could not start the command: {error}\n".encode()
            reply(number, 126, len(text), text)
            return
        self.commands[number] = command
        self.selector.register(command.pipe, selectors.EVENT_READ, command)

    def finish(self, command: Command) -> None:
        taken = 0
        while command.is_open and taken < PIPE_BYTES:
            count = command.read()
            if count < 0:
                self.close_pipe(command)
            elif count == 0:
                break
            taken += count
        code = command.process.returncode
        output = bytes(command.head + command.tail[-command.half :])
        reply(command.number, code if code >= 0 else 128 - code, command.total, output)
        if command.script:
            with suppress(OSError):
                os.unlink(command.script)
        # A process in the background may hold the pipe: it is emptied on, and nothing is kept.
        command.half, command.head, command.tail = 1, bytearray(1), bytearray()
        del self.commands[command.number]

    def close_pipe(self, command: Command) -> None:
        self.selector.unregister(command.pipe)
        os.close(command.pipe)
        command.is_open = False


def shell() -> str:
    for path in ("/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash"):
        if os.path.exists(path):
            return path
    return "/bin/sh"


def write_script(line: bytes) -> str:
    descriptor, path = tempfile.mkstemp(prefix="nanoeval-script-")
    with open(descriptor, "wb") as file:
        file.write(line)
    return path


def reply(number: int, exit_code: int, total: int, output: bytes) -> None:
    message = REPLY.pack(number, exit_code, total, len(output)) + output
    while message:
        message = message[os.write(1, message) :]


def wake_on_child_exit() -> int:
    """A descriptor that becomes readable when a child ends."""
    wake, write_end = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    signal.signal(signal.SIGCHLD, lambda *args: None)
    return wake


if __name__ == "__main__":
    Server().serve()
