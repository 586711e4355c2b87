"""One run set's database as a file: opened, checked, copied, its errors explained.

Knows the schema's version; of the tables only that `run_set` has a row.
"""

from __future__ import annotations

import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from nanoeval import _schema
from nanoeval._process_identity import exists
from nanoeval.fs_paths import check_private

T = TypeVar("T")

BUSY_TIMEOUT = 30.0
# A larger write-ahead log means fewer, larger checkpoints on the writing thread.
WAL_AUTOCHECKPOINT_PAGES = 4000
# What SQLite keeps beside a database. Left behind without it, they are taken for those of the next.
SIDE_FILES = ("-wal", "-shm", "-journal")


class StoreError(RuntimeError):
    """The database cannot be used; the message says what is safe and what to do."""


def open_existing(path: Path) -> sqlite3.Connection:
    """Open for writing. Unlike SQLite left to itself, it never creates a file that is missing."""
    return sqlite3.connect(
        f"file:{quote(str(path))}?mode=rw",
        uri=True,
        timeout=BUSY_TIMEOUT,
        isolation_level=None,
        check_same_thread=False,
    )


def connect(path: Path) -> sqlite3.Connection:
    """Open an existing file, in the way all our connections are, and bring its schema up to date.

    An empty file becomes a database without rows.
    """
    db = open_existing(path)
    try:
        _schema.refuse_newer(db, str(path))
        _use_write_ahead_log(db)
        # In WAL mode NORMAL survives the death of any process without a sync per commit.
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(f"PRAGMA wal_autocheckpoint = {WAL_AUTOCHECKPOINT_PAGES}")
        db.execute("PRAGMA temp_store = MEMORY")
        _schema.migrate(db, str(path))
    except BaseException:
        db.close()
        raise
    return db


def _use_write_ahead_log(db: sqlite3.Connection) -> None:
    """Switch a new file to the write-ahead log; a file that has one is left as it is."""
    deadline = time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            # SQLite's own waiting does not cover two processes that switch at once.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def in_transaction(db: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
    """Do `work` in one transaction that may write; nothing of it stays if it raises."""
    db.execute("BEGIN IMMEDIATE")
    try:
        result = work(db)
        db.execute("COMMIT")
        return result
    except BaseException:
        # A full disk rolls back by itself; a second rollback would hide the cause.
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


@contextmanager
def explained_errors(path: Path) -> Iterator[None]:
    """Turn errors of SQLite and of files into StoreErrors that say what is safe and what to do."""
    try:
        yield
    except OSError as error:
        raise StoreError(_unwritable(path, error)) from error
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise StoreError(_explain(error, path)) from error


def _explain(error: Exception, path: Path) -> str:
    """What a person needs to know of an SQLite error: what is safe, and what to do."""
    text = str(error)
    if "unable to open" in text and not path.exists():
        return (
            f"{path} is gone: somebody deleted it. End the run where it still goes on, then resume"
            " the run set: its backup, if one was made, is used"
        )
    if "full" in text:
        return (
            f"the disk that holds {path} is full; everything committed before is safe in that"
            " file. Make room there (or move the file and set NANOEVAL_DATABASE_DIR to its new"
            " folder), then resume the run set"
        )
    if "locked" in text or "busy" in text:
        return (
            f"{path} was locked by another process for more than {BUSY_TIMEOUT:.0f} s ({text});"
            " its contents are safe. End what holds it (an open sqlite shell, a backup), then"
            " resume the run set"
        )
    if "readonly" in text or "unable to open" in text:
        return _unwritable(path, error)
    # A damaged schema may not even be text.
    if (
        isinstance(error, UnicodeDecodeError)
        or "malformed" in text
        or "not a database" in text
        or "corrupt" in text
    ):
        return _damaged(path, text)
    return f"{path}: {text}"


def _unwritable(path: Path, error: Exception) -> str:
    return (
        f"{path} cannot be written ({error}). Set NANOEVAL_DATABASE_DIR to a folder that this user"
        " can write to"
    )


def _damaged(path: Path, detail: str) -> str:
    return (
        f"{path} is damaged ({detail}); nothing was read from it. A backup, if one was made, is"
        f" used when it is moved away, and with it {path.name}-wal and {path.name}-shm where they"
        " are, and the run set is resumed"
    )


def check_database(path: Path) -> None:
    """Look whether a database can be used, without changing or unpickling anything.

    Raises PermissionError if it belongs to someone else, NewerSchemaError if a later version wrote
    it, StoreError if it is damaged or cannot be read. Blocks: call it in a thread.
    """
    check_private(path)
    with (
        explained_errors(path),
        # Not read-only: the log of a killed process has to be played back first.
        closing(open_existing(path)) as db,
    ):
        _schema.refuse_newer(db, str(path))
        problems = db.execute("PRAGMA quick_check(1)").fetchall()
        if problems != [("ok",)]:
            raise StoreError(_damaged(path, problems[0][0]))
        if db.execute("PRAGMA user_version").fetchone() == (0,):
            raise StoreError(_damaged(path, "it has no tables of nanoeval"))


class BackupSource:
    """A database that is in use, as backups are made of it.

    Its connection is opened at once and kept. So it holds up no writer, and goes on seeing what the
    run writes when somebody deletes the file (a log-out may clear /dev/shm). Everything here
    blocks: call it in a thread, one call at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = open_existing(path)
        # SQLite opens the file and its log with the first read.
        self._db.execute("PRAGMA user_version").fetchone()
        self._file = _file_at(path)

    def close(self) -> None:
        self._db.close()

    def is_in_place(self) -> bool:
        """Whether the path still leads to the file that is in use."""
        return _file_at(self.path) == self._file

    def back_up(self, target: Path) -> None:
        """Copy the database consistently, replacing `target` in one step.

        Raises OSError or sqlite3.Error, and StoreError for a database that was emptied; `target` is
        then as it was.
        """
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left_behind in partial_copies(target, of_dead_processes=True):
            left_behind.unlink(missing_ok=True)
        copy = target.with_suffix(f".{os.getpid()}.{threading.get_ident()}.partial")
        try:
            copy.touch(mode=0o600, exist_ok=False)
            with closing(sqlite3.connect(copy)) as write:
                # A copy that is not finished is thrown away: it is made safe once, when whole.
                write.execute("PRAGMA synchronous = OFF")
                write.execute("PRAGMA journal_mode = OFF")
                self._db.backup(write)
            _refuse_empty(copy, self.path)
            with open(copy, "rb+") as whole:
                os.fsync(whole)
            copy.replace(target)
        finally:
            copy.unlink(missing_ok=True)


def partial_copies(target: Path, *, of_dead_processes: bool = False) -> list[Path]:
    """Backups to `target` that are being made, or that a killed process left half done."""
    name = re.compile(rf"{re.escape(target.stem)}\.(\d+)\.\d+\.partial")
    matches = [(path, name.fullmatch(path.name)) for path in target.parent.glob("*.partial")]
    return [
        path
        for path, match in matches
        if match and not (of_dead_processes and exists(int(match[1])))
    ]


def _file_at(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _refuse_empty(copy: Path, path: Path) -> None:
    with closing(sqlite3.connect(f"file:{quote(str(copy))}?immutable=1", uri=True)) as db:
        try:
            row = db.execute("SELECT 1 FROM run_set AS r").fetchone()
        except sqlite3.DatabaseError:
            row = None
    if row is None:
        raise StoreError(f"{path} was emptied or damaged")
