"""What goes to a shell and what comes back, whatever its length and content."""

from __future__ import annotations

from typing import Any

# What GNU timeout(1) exits with.
TIMED_OUT = 124


class BoundedOutput:
    """Keeps the first and the last half of `max_bytes` bytes, and counts what lies between."""

    def __init__(self, max_bytes: int) -> None:
        self._half = max(1, max_bytes // 2)
        self._head = bytearray()
        self._tail = bytearray()
        self.total_bytes = 0

    @property
    def is_cut(self) -> bool:
        """Whether anything was left out."""
        return self.total_bytes > 2 * self._half

    def write(self, data: bytes) -> None:
        """Take the next bytes."""
        self.total_bytes += len(data)
        room = self._half - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data[-self._half :]
        # Trimmed now and then only, because each trim moves the whole tail.
        if len(self._tail) > 2 * self._half:
            del self._tail[: -self._half]

    def getvalue(self) -> bytes:
        """All of it, or its two ends with a line between them that says how much is missing."""
        if not self.is_cut:
            return bytes(self._head + self._tail)
        notice = cut_notice(self.total_bytes - 2 * self._half)
        return bytes(self._head) + notice + bytes(self._tail[-self._half :])


def sendable(text: str) -> str:
    """`text` with a "?" for each lone surrogate, which models write now and then."""
    return text.encode("utf-8", errors="replace").decode()


def cut_notice(n_bytes: int) -> bytes:
    """What stands in the middle of an output instead of the `n_bytes` that were there."""
    return f"\n[... {n_bytes} bytes of output left out ...]\n".encode()


def timeout_notice(seconds: float) -> bytes:
    """The last line of the output of a command that ran out of time."""
    return f"\n[the command was killed: it took longer than {seconds:g} seconds]\n".encode()


def timeout_exception(seconds: float) -> dict[str, Any]:
    """What `system_exception` holds for a cell that ran out of time."""
    return {"name": "TimeoutError", "args": [f"the cell took longer than {seconds:g} seconds"]}
