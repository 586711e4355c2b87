"""Which process this is, and whether a recorded one still lives. Knows nothing of databases."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessIdentity:
    """Tells a process from every other, on this machine and elsewhere.

    `host_id` holds host name, boot and process namespace; `started` is the kernel's start time of
    the process, empty where the system does not tell.
    """

    host: str
    host_id: str
    pid: int
    started: str

    def is_known_dead(self) -> bool:
        """Whether the process ran here and is seen to be gone; False also means "cannot tell"."""
        if self.host_id != _host_id():
            return False
        if not exists(self.pid):
            return True
        now_started = _start_time(self.pid)
        return bool(self.started and now_started and now_started != self.started)


def exists(pid: int) -> bool:
    """Whether a process of this machine has this pid now, be it somebody else's."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def this_process() -> ProcessIdentity:
    """The identity of the calling process."""
    return ProcessIdentity(
        host=socket.gethostname(),
        host_id=_host_id(),
        pid=os.getpid(),
        started=_start_time(os.getpid()),
    )


def _host_id() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = namespace = ""
    return f"{socket.gethostname()} {boot} {namespace}".strip()


def _start_time(pid: int) -> str:
    """Field 22 of /proc/PID/stat, ticks since boot; empty for a zombie, which is dead to us."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # The command, field 2, is in parentheses and may hold spaces and parentheses itself.
    fields = stat.rpartition(")")[2].split()
    return "zombie" if fields[0] == "Z" else fields[19]
