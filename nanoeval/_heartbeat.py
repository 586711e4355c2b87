"""Keeps an executor's lease, and takes back what dead executors held. Knows no rollouts."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

from nanoeval._database_file import connect, in_transaction
from nanoeval._process_identity import ProcessIdentity
from nanoeval._store import beat


class Heartbeat:
    """Renews an executor's lease from a thread of its own, and reaps executors that died.

    The thread has its own connection, so that neither a blocked event loop nor a long transaction
    of the writing thread costs the lease. `on_reaped` is called, on that thread, with each dead
    executor's process and the number of its tasks that went back to the queue.
    """

    def __init__(
        self,
        path: Path,
        executor_id: int,
        lease: float,
        on_reaped: Callable[[ProcessIdentity, int], None],
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
        while not self._stop.wait(interval):
            try:
                db = db or connect(self._path)
                for process, requeued in in_transaction(db, self._beat):
                    self._on_reaped(process, requeued)
            except sqlite3.Error:
                continue  # the writing connection meets the same trouble and reports it
        if db is not None:
            db.close()

    def _beat(self, db: sqlite3.Connection) -> list[tuple[ProcessIdentity, int]]:
        return beat(db, self._executor_id, self._lease)
