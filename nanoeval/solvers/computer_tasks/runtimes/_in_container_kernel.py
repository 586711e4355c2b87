"""Runs cells inside a container for `_docker_kernel`. Sent there as text.

Needs python3.7 and the standard library of a minimal install. Where ipykernel is installed, cells
run in a real Jupyter kernel; else in this process, as plain Python with `%cd`, `%pip` and `!`.

Arguments: bytes of output to keep, then the command that starts a kernel, if the task brings one.
Requests on stdin: operation (one byte), length (unsigned 32 bits), code. Replies on stdout: for
each RUN six fields (status, output, value, name, message and traceback of the exception), each with
its length (unsigned 32 bits) in front; and one of status "ready" or "failed" at first.
"""

from __future__ import annotations

import ast
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections import deque
from typing import Any

LENGTH = struct.Struct(">I")
REQUEST = struct.Struct(">BI")
RUN, INTERRUPT, KILL = 0, 1, 2
START_SECONDS = 600
EXISTING = "--existing="


class Output:
    """Keeps the first `max_bytes` bytes and counts the rest."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.kept = bytearray()
        self.total = 0

    def write(self, data: bytes) -> None:
        self.total += len(data)
        self.kept += data[: self.max_bytes - len(self.kept)]

    @property
    def is_cut(self) -> bool:
        return self.total > self.max_bytes


class Result:
    """What the reply to one cell says."""

    def __init__(self, max_bytes: int) -> None:
        self.status = "success"
        self.output = Output(max_bytes)
        self.value = b""
        self.exception = ("", "", "")

    def fields(self) -> list[bytes]:
        if self.status == "success" and self.exception[0]:
            self.status = "failed_with_in_kernel_exception"
        too_large = self.output.is_cut or len(self.value) > self.output.max_bytes
        if self.status == "success" and too_large:
            self.status, self.value = "failed_with_response_too_large", b""
        exception = [text.encode("utf-8", "replace") for text in self.exception]
        return [self.status.encode(), bytes(self.output.kept), self.value, *exception]


class PlainSession:
    """Cells as plain Python, in this process."""

    def __init__(self) -> None:
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        self.names: dict[str, Any] = module.__dict__
        self.names.update(__builtins__=__builtins__, _shell=run_shell, _cd=os.chdir)

    def run(self, code: str, result: Result) -> None:
        with CapturedOutput(result.output):
            try:
                result.value = self.evaluate(code)
            except BaseException as error:
                text = "".join(traceback.format_exception(type(error), error, cell_frames(error)))
                result.exception = (type(error).__name__, str(error), text)

    def evaluate(self, code: str) -> bytes:
        try:
            tree = ast.parse(code)
        except SyntaxError:
            tree = ast.parse(without_magics(code))
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<cell>", "exec"), self.names)
        if not isinstance(last, ast.Expr):
            return b""
        value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), self.names)
        return b"" if value is None else repr(value).encode("utf-8", "replace")

    def interrupt(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def kill(self) -> None:
        pass  # it ends with this process


class JupyterSession:
    """Cells in a Jupyter kernel: one that this process starts, or one that runs already."""

    def __init__(self, connection_file: str) -> None:
        from jupyter_client.blocking.client import BlockingKernelClient
        from jupyter_client.manager import KernelManager

        self.manager: Any = None
        if connection_file:
            self.pid, _ = process_of_kernel(connection_file)
            self.client = BlockingKernelClient(connection_file=connection_file)
            self.client.load_connection_file()
        else:
            folder = tempfile.mkdtemp(prefix="nanoeval-kernel-")
            self.manager = KernelManager(transport="ipc", ip=os.path.join(folder, "kernel"))
            self.manager.start_kernel(stdin=subprocess.DEVNULL)
            # The first is where newer versions keep the process, the second where older ones do.
            process = getattr(self.manager, "provisioner", None) or self.manager.kernel
            self.pid = process.pid
            self.client = self.manager.client()
        self.client.start_channels(hb=False)
        self.client.wait_for_ready(timeout=START_SECONDS)

    def run(self, code: str, result: Result) -> None:
        # A minimal install lacks this module, and this class is not for one.
        import queue

        sent = self.client.execute(code, allow_stdin=False)
        while True:
            try:
                message = self.client.get_iopub_msg(timeout=0.5)
            except queue.Empty:
                if has_ended(self.pid):
                    result.status = "failed_with_kernel_death"
                    return
                continue
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != sent:
                continue
            if kind == "stream":
                result.output.write(content["text"].encode("utf-8", "replace"))
            elif kind == "execute_result":
                result.value = content["data"].get("text/plain", "").encode("utf-8", "replace")
            elif kind == "error":
                lines = "\n".join(content["traceback"])
                result.exception = (content["ename"], content["evalue"], lines)
            elif kind == "status" and content["execution_state"] == "idle":
                return

    def interrupt(self) -> None:
        if self.manager is not None:
            self.manager.interrupt_kernel()
        else:
            self.client.control_channel.send(self.client.session.msg("interrupt_request"))

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class CapturedOutput:
    """Sends what anybody writes to the descriptors 1 and 2 into an Output."""

    def __init__(self, output: Output) -> None:
        self.output = output

    def __enter__(self) -> None:
        self.pipe, write_end = os.pipe()
        self.saved = [os.dup(1), os.dup(2)]
        os.dup2(write_end, 1)
        os.dup2(write_end, 2)
        os.close(write_end)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def __exit__(self, *exc_info: object) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, saved in enumerate(self.saved, start=1):
            os.dup2(saved, number)
            os.close(saved)
        # A process in the background may hold the pipe open.
        self.reader.join(0.2)

    def read(self) -> None:
        while True:
            data = os.read(self.pipe, 1 << 16)
            if not data:
                os.close(self.pipe)
                return
            self.output.write(data)


def cell_frames(error: BaseException) -> types.TracebackType | None:
    """The traceback from the cell's own frame on; all of it for an error in no cell's frame."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != "<cell>":
        frames = frames.tb_next
    return frames or error.__traceback__


def without_magics(code: str) -> str:
    """`code` with `!command`, `%cd folder` and `%pip ...` lines as Python."""
    code = re.sub(r"^(\s*)!(.*)$", lambda m: f"{m[1]}_shell({m[2]!r})", code, flags=re.M)
    code = re.sub(r"^(\s*)%cd\s+(.*?)\s*$", lambda m: f"{m[1]}_cd({m[2]!r})", code, flags=re.M)
    pip = f"{sys.executable} -m pip "
    return re.sub(
        r"^(\s*)%pip\s+(.*)$", lambda m: f"{m[1]}_shell({pip + m[2]!r})", code, flags=re.M
    )


def run_shell(command: str) -> None:
    subprocess.run(command, shell=True, check=False, stdin=subprocess.DEVNULL)


def start_kernel_by(command: list[str]) -> str:
    """Run the task's command; the connection file of the kernel that it starts."""
    # A file, because a pipe would break when this process becomes another program.
    log, path = tempfile.mkstemp(prefix="nanoeval-kernel-", suffix=".log")
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    give_up_at = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up_at:
        is_over = process.poll() is not None
        with open(path, "rb") as file:
            said = file.read().decode("utf-8", "replace")
        found = re.search(r"(\S*kernel-[\w.-]+\.json)\s", said)
        if found:
            return found[1]
        if is_over:
            break
        time.sleep(0.1)
    raise RuntimeError(
        f"jupyter_setup, exit code {process.poll()}, named no connection file: {said[-2000:]}"
    )


def process_of_kernel(connection_file: str) -> tuple[int, str]:
    """The kernel's process id and its interpreter, which may be another than ours (conda, say)."""
    name = os.path.basename(connection_file).encode()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        if int(entry) == os.getpid():
            continue
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                arguments = file.read().split(b"\0")
        except OSError:
            continue
        if "python" in os.path.basename(arguments[0].decode()) and any(
            argument.endswith(name) for argument in arguments[1:]
        ):
            return int(entry), arguments[0].decode()
    raise RuntimeError(f"no process uses {connection_file}, which jupyter_setup named")


def has_ended(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def take_connection() -> tuple[int, int]:
    """Where requests come from and replies go; cells and kernels get other descriptors 0 and 1."""
    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    return requests, replies


def make_session(command: list[str], requests: int, replies: int) -> PlainSession | JupyterSession:
    if command and command[0].startswith(EXISTING):
        from jupyter_client import find_connection_file

        return JupyterSession(find_connection_file(command[0][len(EXISTING) :]))
    if command:
        connection_file = start_kernel_by(command)
        _, python = process_of_kernel(connection_file)
        source = os.environ["NANOEVAL_KERNEL_SOURCE"]
        os.dup2(requests, 0)
        os.dup2(replies, 1)
        os.execv(python, [python, "-c", source, sys.argv[1], EXISTING + connection_file])
    try:
        import ipykernel  # noqa: F401
    except ImportError:
        return PlainSession()
    return JupyterSession("")


def read_exactly(descriptor: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = os.read(descriptor, count - len(data))
        if not part:
            os._exit(0)
        data += part
    return data


def send(descriptor: int, fields: list[bytes]) -> None:
    message = b"".join(LENGTH.pack(len(field)) + field for field in fields)
    while message:
        message = message[os.write(descriptor, message) :]


def main() -> None:
    max_bytes, command = int(sys.argv[1]), sys.argv[2:]
    requests, replies = take_connection()
    try:
        session = make_session(command, requests, replies)
    except Exception as error:
        send(replies, [b"failed", str(error).encode(), b"", b"", b"", b""])
        return
    cells: deque[str] = deque()
    n_cells = threading.Semaphore(0)

    def listen() -> None:
        while True:
            operation, length = REQUEST.unpack(read_exactly(requests, REQUEST.size))
            code = read_exactly(requests, length).decode()
            if operation == RUN:
                cells.append(code)
                n_cells.release()
            elif operation == INTERRUPT:
                session.interrupt()
            else:
                session.kill()
                os._exit(1)

    send(replies, [b"ready", str(os.getpid()).encode(), b"", b"", b"", b""])
    threading.Thread(target=listen, daemon=True).start()
    while True:
        # An interrupt may come just after its cell has ended.
        try:
            n_cells.acquire()
            code = cells.popleft()
            result = Result(max_bytes)
            session.run(code, result)
        except KeyboardInterrupt:
            continue
        send(replies, result.fields())
        if result.status == "failed_with_kernel_death":
            return


if __name__ == "__main__":
    main()
