"""Keeps an executor's lease, and takes back what dead executors held. Knows no rollouts."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Self

from nanoeval._database_file import connect, in_transaction
from nanoeval._process_identity import ProcessIdentity
from nanoeval._store import beat, reap


class Heartbeat:
    """Renews an executor's lease from a thread of its own.

    The thread has its own connection, so that neither a blocked event loop nor a long transaction
    of the writing thread costs the lease. With `on_reaped` it also reaps executors that died: one
    per run set should, since looking costs more the more there are. `on_reaped` is called, on that
    thread, with each dead executor's process and how many of its tasks went back to the queue.
    """

    def __init__(
        self,
        path: Path,
        executor_id: int,
        lease: float,
        on_reaped: Callable[[ProcessIdentity, int], None] | None = None,
    ) -> None:
        self._path, self._executor_id, self._lease = path, executor_id, lease
        self._on_reaped = on_reaped
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nanoeval-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        interval = min(self._lease / 4, 2.0)
        db: sqlite3.Connection | None = None
        beaten_at = time.time()
        while not self._stop.wait(interval):
            # After the machine slept, or its clock was set, every lease looks old: until the others
            # have had the time to renew theirs too, that says nothing about them.
            is_late = time.time() - beaten_at > self._lease / 2
            beaten_at = time.time()
            try:
                db = db or connect(self._path)
                reaped = in_transaction(db, partial(self._beat, may_reap=not is_late))
                if self._on_reaped is not None:
                    for process, requeued in reaped:
                        self._on_reaped(process, requeued)
            except sqlite3.Error:
                continue  # the writing connection meets the same trouble and reports it
        if db is not None:
            db.close()

    def _beat(self, db: sqlite3.Connection, may_reap: bool) -> list[tuple[ProcessIdentity, int]]:
        beat(db, self._executor_id, self._lease)
        return reap(db, losses=1) if may_reap and self._on_reaped is not None else []
