"""The folders and processes of local computers: made, found again, removed. No event loop here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from nanoeval._process_identity import ProcessIdentity, this_process

# Every process of a computer carries this variable, with the name of the computer's folder.
ENV_MARK = "NANOEVAL_COMPUTER"
_OWNER_FILE = "owner.json"
_SECONDS_TO_WRITE_OWNER = 60.0
_SECONDS_TO_DIE = 5.0


def make_folder(folder: Path) -> None:
    """Make a computer's folder, for this user alone: `home`, `tmp`, and a note of the owner."""
    while True:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            owner_id = folder.parent.stat().st_uid
            if owner_id != os.getuid():
                raise PermissionError(
                    f"{folder.parent} belongs to user {owner_id}, not to you; remove it, or set"
                    " the runtime's root to another folder"
                )
            folder.mkdir(mode=0o700)
            break
        except FileNotFoundError:
            continue  # the last computer beside this one has just been removed, and both's root
    (folder / _OWNER_FILE).write_text(json.dumps(asdict(this_process())))
    (folder / "home").mkdir()
    (folder / "tmp").mkdir()


def remove(folder: Path) -> None:
    """Kill the processes that carry the folder's mark, and delete it."""
    # Again until none is left, because one may have started another meanwhile.
    give_up_at = time.monotonic() + _SECONDS_TO_DIE
    while (pids := _marked_processes(folder.name)) and time.monotonic() < give_up_at:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    shutil.rmtree(folder, onerror=_make_writable_and_retry)
    with suppress(OSError):
        folder.parent.rmdir()  # unless there are others in it


def remove_abandoned(root: Path) -> None:
    """Remove the computers beneath `root` whose owner was killed before it could."""
    try:
        folders = list(root.iterdir())
    except FileNotFoundError:
        return
    for folder in folders:
        try:
            owner = ProcessIdentity(**json.loads((folder / _OWNER_FILE).read_text()))
            is_abandoned = owner.is_known_dead()
        except (FileNotFoundError, NotADirectoryError):
            is_abandoned = _is_older_than(folder, _SECONDS_TO_WRITE_OWNER)
        except (ValueError, TypeError):
            is_abandoned = False  # being written
        if is_abandoned:
            remove(folder)


def _is_older_than(folder: Path, seconds: float) -> bool:
    try:
        return time.time() - folder.stat().st_mtime > seconds
    except FileNotFoundError:
        return False


def _marked_processes(mark: str) -> list[int]:
    wanted = f"{ENV_MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = entry.read_bytes().split(b"\0")
        except OSError:
            continue  # gone, or somebody else's
        if wanted in variables:
            found.append(int(entry.parent.name))
    return found


def _make_writable_and_retry(function: object, path: str, exc_info: object) -> None:
    # A task may have taken its own rights away, and another process may be at the same work.
    with suppress(OSError):
        os.chmod(os.path.dirname(path), 0o700)
        if os.path.isdir(path) and not os.path.islink(path):
            os.chmod(path, 0o700)
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)
