"""Puts a run set's backup in the place of its working file, where that is gone. Runs nothing."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

from nanoeval._database_file import (
    SIDE_FILES,
    StoreError,
    check_database,
    connect,
    explained_errors,
    in_transaction,
)
from nanoeval._inspect import find_run_set
from nanoeval._process_identity import ProcessIdentity, this_process
from nanoeval._run_set import backup_path
from nanoeval._store import end_all
from nanoeval.bin._command import StillRunningError
from nanoeval.setup import say


def restore_if_gone(run_set_id: str, path: Path) -> None:
    """Copy the backup to `path` if nothing is there, or an empty file.

    Raises UnknownRunSetError if there is no backup either; StillRunningError if a process that was
    at work when the backup was made still lives here; StoreError if the backup is damaged, or
    `path` cannot be written. Blocks: call it in a thread.
    """
    if not _is_gone(path):
        return
    # Of several that resume at once, one restores and the others find it done.
    with _locked(path.parent):
        backup = backup_path(run_set_id)
        if not path.exists() and not backup.exists():
            find_run_set(run_set_id)  # raises, and names the nearest ids
        if _is_gone(path) and backup.exists():
            check_database(backup)
            _restore(backup, path)
            say(f"The working file is gone; going on from its backup {backup}.")


def _is_gone(path: Path) -> bool:
    return not path.exists() or path.stat().st_size == 0


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _restore(backup: Path, path: Path) -> None:
    # Under a name of its own until it is whole: a kill or a full disk leaves no half of it.
    copy = path.with_suffix(".restoring")
    try:
        _delete(copy)
        _copy_privately(backup, copy)
        _end_executors(copy, path)
        # What is left of the file that is gone would be played back over the new one.
        _delete(path)
        with suppress(FileExistsError):  # a run that began this moment keeps its file
            os.link(copy, path)
    except OSError as error:
        raise StoreError(
            f"the backup {backup} cannot be copied to {path} ({error}); it is unharmed. Make room"
            " there, or set NANOEVAL_DATABASE_DIR to another folder, then resume the run set"
        ) from error
    finally:
        _delete(copy)


def _delete(database: Path) -> None:
    for suffix in (*SIDE_FILES, ""):
        Path(f"{database}{suffix}").unlink(missing_ok=True)


def _copy_privately(source: Path, target: Path) -> None:
    def opener(name: str, flags: int) -> int:
        return os.open(name, flags, 0o600)

    with open(source, "rb") as read, open(target, "xb", opener=opener) as write:
        shutil.copyfileobj(read, write)


def _end_executors(copy: Path, path: Path) -> None:
    """What was at work when a backup was made is history; a driver that still lives is not."""
    with explained_errors(copy), closing(connect(copy)) as db:
        drivers = in_transaction(db, partial(end_all, reason="was at work at the backup"))
    for process in filter(_may_live, drivers):
        raise StillRunningError(
            f"run set {path.stem} may still be running: process {process.pid} on {process.host} was"
            f" at work at its last backup, and still lives. Its database is not {path}: it has"
            " another NANOEVAL_DATABASE_DIR, or somebody deleted the file. End that process first"
        )


def _may_live(process: ProcessIdentity) -> bool:
    here = this_process()
    return process.host_id == here.host_id and process != here and not process.is_known_dead()
