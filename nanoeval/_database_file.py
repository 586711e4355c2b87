"""One run set's database as a file: opened, checked, copied, its errors explained.

Knows the schema's version, not its tables.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

from nanoeval import _schema
from nanoeval.fs_paths import check_private

T = TypeVar("T")

BUSY_TIMEOUT = 30.0
# A larger write-ahead log means fewer, larger checkpoints on the writing thread.
WAL_AUTOCHECKPOINT_PAGES = 4000


class StoreError(RuntimeError):
    """The database cannot be used; the message says what is safe and what to do."""


def connect(path: Path) -> sqlite3.Connection:
    """Open for writing, in the way all our connections are, and bring the schema up to date."""
    db = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
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
    """Turn SQLite's errors into StoreErrors that say what is safe and what to do."""
    try:
        yield
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise StoreError(_explain(error, path)) from error


def _explain(error: Exception, path: Path) -> str:
    """What a person needs to know of an SQLite error: what is safe, and what to do."""
    text = str(error)
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
        return (
            f"{path} cannot be written ({text}). Set NANOEVAL_DATABASE_DIR to a folder that this"
            " user can write to"
        )
    # A damaged schema may not even be text.
    if (
        isinstance(error, UnicodeDecodeError)
        or "malformed" in text
        or "not a database" in text
        or "corrupt" in text
    ):
        return _damaged(path, text)
    return f"{path}: {text}"


def _damaged(path: Path, detail: str) -> str:
    return (
        f"{path} is damaged ({detail}); nothing was read from it. A backup, if one was made, is"
        " used when the damaged file is moved away and the run set is resumed"
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
        closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None)) as db,
    ):
        _schema.refuse_newer(db, str(path))
        problems = db.execute("PRAGMA quick_check(1)").fetchall()
        if problems != [("ok",)]:
            raise StoreError(_damaged(path, problems[0][0]))
        if db.execute("PRAGMA user_version").fetchone() == (0,):
            raise StoreError(_damaged(path, "it has no tables of nanoeval"))


def backup(source: Path, target: Path) -> None:
    """Copy a database consistently while it is in use, replacing `target` in one step.

    Blocks: call it in a thread.
    """
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial_copy = target.with_suffix(f".{threading.get_ident()}.partial")
    try:
        partial_copy.touch(mode=0o600, exist_ok=False)
        with (
            closing(sqlite3.connect(source, timeout=BUSY_TIMEOUT)) as read,
            closing(sqlite3.connect(partial_copy)) as write,
        ):
            # A copy that is not finished is thrown away: it is made safe once, when it is whole.
            write.execute("PRAGMA synchronous = OFF")
            write.execute("PRAGMA journal_mode = OFF")
            read.backup(write)
        with open(partial_copy, "rb+") as whole:
            os.fsync(whole)
        partial_copy.replace(target)
    finally:
        partial_copy.unlink(missing_ok=True)
