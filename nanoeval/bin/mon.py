"""Shows run sets in the browser, while they run and afterwards.

    python -m nanoeval.bin.mon [run_set_id=ID] [port=8501] [address=127.0.0.1]

  run_set_id  the run set to begin with; the others are one click away
  port        where to listen; while it is taken, the next one is tried
  address     the interface to listen on. The monitor has no password: with anything but the
              loopback, everybody who reaches the port reads your prompts and results. For a remote
              machine prefer `ssh -L 8501:127.0.0.1:8501 HOST`

It only reads, also while runs go on. Ctrl-C ends it. A run with runner.use_monitor=True starts one
by itself, which ends with the run.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nanoeval._inspect import find_run_set
from nanoeval._monitor_process import require_streamlit
from nanoeval.bin._command import CommandError, run_command

PORTS_TRIED = 100
# Streamlit's own settings; what is not here comes from the person's, its defaults else.
SETTINGS = {
    "browser.gatherUsageStats": False,
    "server.headless": True,
    "server.fileWatcherType": "none",
    "client.toolbarMode": "minimal",
    "client.showSidebarNavigation": False,
    "theme.light.primaryColor": "#2f7de1",
    "theme.dark.primaryColor": "#5b9bee",
    "theme.light.textColor": "#1f2430",
    "theme.light.secondaryBackgroundColor": "#f3f5f8",
    "theme.dark.backgroundColor": "#14171d",
    "theme.dark.secondaryBackgroundColor": "#1f242d",
}


def main(
    run_set_id: str | None = None,
    port: int = 8501,
    address: str = "127.0.0.1",
    until_stdin_closes: bool = False,
) -> None:
    """Serve the monitor; see the module's docstring. With `until_stdin_closes` it ends then."""
    try:
        require_streamlit()
    except ImportError as error:
        raise CommandError(str(error)) from error
    if run_set_id is not None:
        find_run_set(run_set_id)
    page = f"/run?run_set={quote(run_set_id)}" if run_set_id is not None else "/"
    host = "127.0.0.1" if address in ("0.0.0.0", "::") else address
    if until_stdin_closes:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    with contextlib.ExitStack() as held:
        free = free_port(address, port, held)
        if free != port:
            print(f"nanoeval: port {port} is taken, using {free}", flush=True)
        announcing = (host, free, page, sys.stdout)
        threading.Thread(target=_announce, args=announcing, daemon=True).start()
        serve(address, free)


def free_port(address: str, first: int, held: contextlib.ExitStack) -> int:
    """The first port from `first` on that can be listened on. Raises CommandError without one.

    Until `held` is closed it is kept from other monitors of this user, which look for one too:
    Streamlit takes seconds to listen, and ends where somebody else was quicker.
    """
    reason: str | None = None
    for port in range(first, min(first + PORTS_TRIED, 65536)):
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as holder:
            # A port that was closed a moment ago is free.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                holder.bind((address, port))
            except PermissionError as error:
                raise CommandError(f"port {port} may not be used ({error.strerror})") from error
            except OSError as error:
                reason = error.strerror
                continue
        lock = open(_lock_path(port), "w", opener=_private)  # noqa: SIM115 - closed with `held`
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            reason = "another monitor starts there"
            continue
        held.enter_context(lock)
        return port
    raise CommandError(
        f"no port from {first} on can be listened on at {address} ({reason}); choose another"
    )


def _lock_path(port: int) -> str:
    return os.path.join(tempfile.gettempdir(), f"nanoeval-monitor-{os.getuid()}-{port}.lock")


def _private(path: str, flags: int) -> int:
    # In a folder that others may write to: no link of theirs is followed.
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def serve(address: str, port: int) -> None:
    """Run Streamlit in this process until it is told to end."""
    from streamlit.web import bootstrap

    settings: dict[str, Any] = SETTINGS | {"server.address": address, "server.port": port}
    options = {name.replace(".", "_"): value for name, value in settings.items()}
    app = Path(__file__).resolve().parents[1] / "monitor" / "app.py"
    bootstrap.load_config_options(options)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        # Its banner names other addresses than ours.
        with contextlib.redirect_stdout(nowhere):
            bootstrap.run(str(app), False, [], options)


def _announce(host: str, port: int, page: str, stdout: Any) -> None:
    """Tell where to look, as soon as there is something to see."""
    import nanoeval.monitor.navigation  # noqa: F401 - loaded before the first page asks for it

    while True:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
            break
        time.sleep(0.05)
    where = f"[{host}]" if ":" in host else host
    print(f"nanoeval: the monitor is at http://{where}:{port}{page}", file=stdout, flush=True)


def _end_with_stdin() -> None:
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    run_command(main, __doc__)
