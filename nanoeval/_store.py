"""A run set's database: the queue, the results, who works on them. Every writing SQL statement.

Knows bytes, not what they mean: nothing here is unpickled. All times are seconds since the epoch.
One connection per process writes, on a thread of its own; a call is one transaction.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import aiosqlite

from nanoeval import _schema
from nanoeval._process_identity import ProcessIdentity, this_process
from nanoeval.fs_paths import check_private

T = TypeVar("T")

BUSY_TIMEOUT = 30.0
# A larger write-ahead log means fewer, larger checkpoints on the writing thread.
WAL_AUTOCHECKPOINT_PAGES = 4000
RESULTS_PER_READ = 2000

CREATE_RUN_SET = """
INSERT INTO run_set (id, created_at, nanoeval_version, host, command)
SELECT :id, :now, :version, :host, :command WHERE NOT EXISTS (SELECT 1 FROM run_set AS r)"""

SET_DEFINITIONS = "UPDATE run_set SET definitions = :definitions WHERE definitions IS NULL"
GET_DEFINITIONS = "SELECT r.definitions FROM run_set AS r"

ADD_EXECUTOR = """
INSERT INTO executor
    (role, host, host_id, pid, process_started, started_at, heartbeat_at, lease_until)
VALUES (:role, :host, :host_id, :pid, :process_started, :now, :now, :lease_until)"""

BEAT = """
UPDATE executor SET heartbeat_at = :now, lease_until = :lease_until
WHERE id = :executor_id AND ended_at IS NULL"""

RENEW_LOST_LEASE = """
UPDATE executor SET ended_at = NULL, end_reason = NULL, lease_until = :lease_until,
    heartbeat_at = :now
WHERE id = :executor_id AND ended_at IS NOT NULL"""

LIVE_EXECUTORS = """
SELECT e.id, e.role, e.host, e.host_id, e.pid, e.process_started, e.lease_until
FROM executor AS e WHERE e.ended_at IS NULL"""

END_EXECUTOR = """
UPDATE executor SET ended_at = :now, end_reason = :reason
WHERE id = :executor_id AND ended_at IS NULL"""

DIAGNOSE_EXECUTOR = """
UPDATE executor SET num_stalls = num_stalls + :stalls,
    num_slow_callbacks = num_slow_callbacks + :slow_callbacks,
    diagnosis = coalesce(:diagnosis, diagnosis),
    aiomonitor_port = coalesce(:aiomonitor_port, aiomonitor_port)
WHERE id = :executor_id"""

REQUEUE_OF_EXECUTOR = """
UPDATE task SET state = 0, executor_id = NULL, losses = losses + :losses
WHERE state = 1 AND executor_id = :executor_id"""

REQUEUE_OF_EVAL = """
UPDATE task SET state = 0, executor_id = NULL
WHERE state = 1 AND executor_id = :executor_id AND eval_id = :eval_id"""

ADD_EVAL = """
INSERT INTO eval (name, model_name, state, concurrency, created_at, spec)
VALUES (:name, :model_name, 'queueing', :concurrency, :now, :spec)"""

LAST_TASK_ID = "SELECT coalesce(max(t.id), 0) FROM task AS t"

ADD_TASK = """
INSERT INTO task (id, eval_id, question_id, attempt_id, retry_idx, position, task_preview)
VALUES (:id, :eval_id, :question_id, :attempt_id, :retry_idx, :position, :task_preview)"""

ADD_TASK_PAYLOAD = "INSERT INTO task_payload (task_id, payload) VALUES (:id, :payload)"

FIND_TASK = """
SELECT 1 FROM task AS t WHERE t.eval_id = :eval_id AND t.question_id = :question_id
    AND t.attempt_id = :attempt_id AND t.retry_idx = :retry_idx"""

START_EVAL = """
UPDATE eval SET run_id = :run_id, recorder = :recorder, records = :records, state = 'running',
    started_at = :now, num_tasks = (SELECT count(*) FROM task AS t WHERE t.eval_id = :eval_id)
WHERE id = :eval_id"""

RESTART_EVAL = """
UPDATE eval SET state = 'running', finished_at = NULL, error = NULL WHERE id = :eval_id"""

END_EVAL = """
UPDATE eval SET state = :state, finished_at = :now, summary = coalesce(:summary, summary),
    error = :error
WHERE id = :eval_id"""

SET_PARTIAL_SUMMARY = "UPDATE eval SET summary = :summary WHERE id = :eval_id"

SET_CONCURRENCY = "UPDATE eval SET concurrency = :concurrency WHERE id = :eval_id"

DELETE_TASK_PAYLOADS = """
DELETE FROM task_payload
WHERE task_id IN (SELECT t.id FROM task AS t WHERE t.eval_id = :eval_id)"""
DELETE_TASKS = "DELETE FROM task WHERE eval_id = :eval_id"
DELETE_EVAL = "DELETE FROM eval WHERE id = :eval_id"

PROGRESS = """
SELECT e.state, e.concurrency, e.num_tasks, e.num_scored, e.num_failed, e.num_retried,
    e.num_unexpected, e.num_with_score, e.score_sum,
    (SELECT count(*) FROM task AS t WHERE t.eval_id = e.id AND t.state = 1) AS num_running
FROM eval AS e WHERE e.id = :eval_id"""

COUNT_OUTCOMES = """
UPDATE eval SET num_scored = num_scored + :scored, num_failed = num_failed + :failed,
    num_retried = num_retried + :retried, num_unexpected = num_unexpected + :unexpected,
    num_with_score = num_with_score + :with_score, score_sum = score_sum + :score_sum
WHERE id = :eval_id"""

# Both check that the claim still holds: an answer to a claim that was taken back is dropped.
ADD_RESULT = """
INSERT INTO result (eval_id, task_id, payload)
SELECT t.eval_id, t.id, :payload FROM task AS t
WHERE t.id = :task_id AND t.state = 1 AND t.executor_id = :executor_id AND t.claims = :claim"""

FINISH_TASK = """
UPDATE task SET state = :state, started_at = :started_at, finished_at = :finished_at,
    score = :score, result_preview = :preview, error_type = :error_type,
    error_message = :error_message, traceback = :traceback
WHERE id = :task_id AND state = 1 AND executor_id = :executor_id AND claims = :claim"""

LAST_RESULT = "SELECT coalesce(max(r.seq), 0) FROM result AS r"
TASKS_WITH_RESULT_SINCE = "SELECT r.task_id FROM result AS r WHERE r.seq > :seq"

ADD_RETRY = """
INSERT INTO task
    (id, eval_id, question_id, attempt_id, retry_idx, position, task_preview, not_before)
SELECT :id, t.eval_id, t.question_id, t.attempt_id, t.retry_idx + 1, t.position, t.task_preview,
    :not_before
FROM task AS t WHERE t.id = :task_id"""

# The error stays readable on the row, and the try is made again when the run is resumed.
PUT_BACK_WITH_ERROR = """
UPDATE task SET state = 0, executor_id = NULL, error_type = :error_type,
    error_message = :error_message, traceback = :traceback
WHERE id = :task_id AND state = 1 AND executor_id = :executor_id AND claims = :claim"""

CLAIM = """
UPDATE task SET state = 1, executor_id = :executor_id, claims = claims + 1, started_at = :now
WHERE id IN (
    SELECT t.id FROM task AS t
    WHERE t.eval_id = :eval_id AND t.state = 0 AND t.not_before <= :now
    ORDER BY t.not_before, t.id LIMIT :limit)
RETURNING id, eval_id, claims, question_id, attempt_id, retry_idx, losses,
    (SELECT p.payload FROM task_payload AS p WHERE p.task_id = task.id)"""

NEXT_DUE = "SELECT min(t.not_before) FROM task AS t WHERE t.eval_id = :eval_id AND t.state = 0"

MAKE_DUE = "UPDATE task SET not_before = 0 WHERE eval_id = :eval_id AND state = 0 AND not_before > 0"

EVALS = """
SELECT e.id, e.run_id, e.name, e.state, e.num_tasks, e.num_scored, e.num_failed, e.spec, e.recorder
FROM eval AS e ORDER BY e.id"""

RESULTS_SINCE = """
SELECT r.seq, t.position, p.payload, r.payload
FROM result AS r
    JOIN task AS t ON t.id = r.task_id
    JOIN task_payload AS p ON p.task_id = r.task_id
WHERE r.eval_id = :eval_id AND r.seq > :seq ORDER BY r.seq LIMIT :limit"""


class StoreError(RuntimeError):
    """The database cannot be used; the message says what is safe and what to do."""


class DuplicateTaskError(ValueError):
    """An eval listed the same (question, attempt, retry) twice."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A task this executor may run now, until its lease ends."""

    task_id: int
    eval_id: int
    claim: int
    question_id: str
    attempt_id: int
    retry_idx: int
    losses: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class NewTask:
    """A task to be queued."""

    question_id: str
    attempt_id: int
    retry_idx: int
    preview: str | None
    payload: bytes


@dataclass(slots=True)
class Finish:
    """What came of one claim.

    `state` is SCORED or FAILED (`payload` is then the pickled result or error), RETRIED
    (`retry_payload` is then the task of the next try, due at `not_before`), or QUEUED: put back
    with its error, because it ended the run.
    """

    claim: Claim
    state: int
    started_at: float
    finished_at: float
    payload: bytes | None = None
    score: float | None = None
    preview: str | None = None
    error_type: str | None = None
    error_message: str | None = None
    traceback: str | None = None
    is_unexpected: bool = False
    retry_payload: bytes | None = None
    not_before: float = 0.0

    def row(self, executor_id: int) -> dict[str, Any]:
        return {
            "task_id": self.claim.task_id,
            "claim": self.claim.claim,
            "executor_id": executor_id,
            "state": self.state,
            "started_at": self.started_at,
            "finished_at": self.finished_at,
            "payload": self.payload,
            "score": self.score,
            "preview": self.preview,
            "error_type": self.error_type,
            "error_message": self.error_message,
            "traceback": self.traceback,
        }


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an eval is. `num_scored + num_failed` of `num_tasks` are done."""

    state: str
    concurrency: int | None
    num_tasks: int
    num_scored: int
    num_failed: int
    num_retried: int
    num_unexpected: int
    num_with_score: int
    score_sum: float
    num_running: int

    @property
    def num_done(self) -> int:
        return self.num_scored + self.num_failed

    @property
    def is_done(self) -> bool:
        return self.num_done >= self.num_tasks


@dataclass(frozen=True, slots=True)
class Exchange:
    """The answer to `Store.exchange`: new claims, and how the eval stands after it.

    `next_due` is when the next queued task is due, where fewer than wanted were due; None when no
    task is queued. With `is_lease_lost` nothing was accepted: all earlier claims are void, and the
    executor has a new lease.
    """

    claims: list[Claim]
    progress: Progress
    next_due: float | None
    is_lease_lost: bool = False


@dataclass(frozen=True, slots=True)
class StoredEval:
    """One eval of a run set, as it was queued."""

    eval_id: int
    run_id: str | None
    name: str
    state: str
    num_tasks: int
    num_scored: int
    num_failed: int
    spec: bytes
    recorder: bytes | None


class _Writer(aiosqlite.Connection):
    """An aiosqlite connection that carries a whole transaction in one trip to its thread."""

    async def transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        result: T = await self._execute(_in_transaction, self._conn, work)
        return result

    async def read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        result: T = await self._execute(query, self._conn)
        return result


def _in_transaction(db: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
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


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(
        path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
    )
    try:
        _schema.refuse_newer(db, str(path))
        db.execute("PRAGMA journal_mode = WAL")
        # In WAL mode NORMAL survives the death of any process without a sync per commit.
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(f"PRAGMA wal_autocheckpoint = {WAL_AUTOCHECKPOINT_PAGES}")
        db.execute("PRAGMA temp_store = MEMORY")
        _schema.migrate(db, str(path))
    except BaseException:
        db.close()
        raise
    return db


class Store:
    """One run set's database, open for writing."""

    def __init__(self, path: Path, lease: float) -> None:
        self.path = path
        self.lease = lease
        self._writer: _Writer | None = None

    async def __aenter__(self) -> Self:
        """Open or create the file. Raises StoreError, NewerSchemaError or PermissionError."""
        if self.path.exists():
            check_private(self.path)
        with self._explained_errors():
            # Made private from its first byte; SQLite gives its side files the same mode.
            self.path.touch(mode=0o600)
            self._writer = await _Writer(partial(_connect, self.path), iter_chunk_size=64)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            await writer.close()

    async def create_run_set(self, run_set_id: str, command: str) -> None:
        """Note what this database is, unless that is noted already."""
        row = {
            "id": run_set_id,
            "now": time.time(),
            "version": _schema.library_version(),
            "host": this_process().host,
            "command": command,
        }
        await self._write(lambda db: db.execute(CREATE_RUN_SET, row))

    async def set_definitions(self, definitions: bytes) -> None:
        """Keep the definitions of `__main__` for other processes."""
        await self._write(lambda db: db.execute(SET_DEFINITIONS, {"definitions": definitions}))

    async def definitions(self) -> bytes | None:
        """What `set_definitions` kept."""
        row = await self._read(lambda db: db.execute(GET_DEFINITIONS).fetchone())
        return None if row is None else row[0]

    async def add_executor(self, role: str) -> int:
        """Register this process as `role` and return its executor id; its lease starts now."""
        return await self._write(partial(_add_executor, role=role, lease=self.lease))

    async def end_executor(self, executor_id: int, reason: str, losses: int = 0) -> int:
        """End an executor and requeue what it had claimed; returns how many tasks that were."""
        return await self._write(
            partial(_end_executor, executor_id=executor_id, reason=reason, losses=losses)
        )

    async def reap(self) -> list[tuple[ProcessIdentity, int]]:
        """End executors that are dead or past their lease; returns each with its requeued tasks."""
        return await self._write(_reap)

    async def live_executors(self) -> list[tuple[int, str, ProcessIdentity]]:
        """(id, role, process) of the executors that have neither ended nor been found dead."""
        rows = await self._read(_live_executors)
        return [(id, role, process) for id, role, process, _ in rows]

    async def diagnose(self, executor_id: int, **counts: Any) -> None:
        """Add to an executor's diagnosis: stalls, slow_callbacks, diagnosis, aiomonitor_port."""
        row = {"stalls": 0, "slow_callbacks": 0, "diagnosis": None, "aiomonitor_port": None}
        row |= {"executor_id": executor_id, **counts}
        await self._write(lambda db: db.execute(DIAGNOSE_EXECUTOR, row))

    async def add_eval(
        self, name: str, model_name: str, concurrency: int | None, spec: bytes
    ) -> int:
        """Add an eval without tasks, not yet started; returns its id."""
        row = {
            "name": name,
            "model_name": model_name,
            "concurrency": concurrency,
            "now": time.time(),
            "spec": spec,
        }
        eval_id = await self._write(lambda db: db.execute(ADD_EVAL, row).lastrowid)
        assert eval_id is not None
        return eval_id

    async def add_tasks(self, eval_id: int, first_position: int, tasks: Sequence[NewTask]) -> None:
        """Queue tasks as one transaction, in their order.

        Raises DuplicateTaskError, naming the first of them, and queues none of `tasks` then.
        """
        await self._write(
            partial(_add_tasks, eval_id=eval_id, first_position=first_position, tasks=tasks)
        )

    async def delete_tasks(self, eval_id: int) -> None:
        """Take all tasks of an eval out again."""
        await self._write(partial(_delete_tasks, eval_id=eval_id))

    async def delete_eval(self, eval_id: int) -> None:
        """Take an eval out again, with its tasks."""
        await self._write(partial(_delete_eval, eval_id=eval_id))

    async def start_eval(
        self, eval_id: int, run_id: str, recorder: bytes | None, records: str | None
    ) -> None:
        """All tasks are queued: they may be claimed from now on."""
        row = {
            "eval_id": eval_id,
            "run_id": run_id,
            "recorder": recorder,
            "records": records,
            "now": time.time(),
        }
        await self._write(lambda db: db.execute(START_EVAL, row))

    async def restart_eval(self, eval_id: int) -> None:
        """A resumed eval may be claimed from again; tasks in back-off are due at once."""
        await self._write(partial(_restart_eval, eval_id=eval_id))

    async def end_eval(
        self, eval_id: int, state: str, summary: str | None = None, error: str | None = None
    ) -> None:
        """Note how an eval ended: finished, failed or interrupted."""
        row = {
            "eval_id": eval_id,
            "state": state,
            "summary": summary,
            "error": error,
            "now": time.time(),
        }
        await self._write(lambda db: db.execute(END_EVAL, row))

    async def set_partial_summary(self, eval_id: int, summary: str) -> None:
        """Keep a summary of the results so far, as JSON."""
        row = {"eval_id": eval_id, "summary": summary}
        await self._write(lambda db: db.execute(SET_PARTIAL_SUMMARY, row))

    async def set_concurrency(self, eval_id: int, concurrency: int | None) -> None:
        """Change how many rollouts of an eval may be in flight; a live run follows."""
        row = {"eval_id": eval_id, "concurrency": concurrency}
        await self._write(lambda db: db.execute(SET_CONCURRENCY, row))

    async def evals(self) -> list[StoredEval]:
        """All evals of the run set, oldest first."""
        rows = await self._read(lambda db: db.execute(EVALS).fetchall())
        return [StoredEval(*row) for row in rows]

    async def progress(self, eval_id: int) -> Progress:
        """How far an eval is."""
        return await self._read(partial(_progress, eval_id=eval_id))

    async def exchange(
        self,
        executor_id: int,
        eval_id: int,
        finishes: Sequence[Finish],
        wanted: int,
        num_sharers: int = 1,
    ) -> Exchange:
        """Hand in what came of earlier claims and take up to `wanted` new ones, in one transaction.

        Free means queued and due; the longest due come first. Claims never exceed the eval's
        concurrency, counted over all executors, and none is given unless the eval is running.
        With `num_sharers` executors at work, one never takes so many that another is left idle.
        """
        return await self._write(
            partial(
                _exchange,
                executor_id=executor_id,
                eval_id=eval_id,
                finishes=finishes,
                wanted=wanted,
                num_sharers=num_sharers,
                lease=self.lease,
            )
        )

    async def release(self, executor_id: int, eval_id: int) -> None:
        """Put back what an executor has claimed of an eval and will not run."""
        row = {"executor_id": executor_id, "eval_id": eval_id}
        await self._write(lambda db: db.execute(REQUEUE_OF_EVAL, row))

    async def results_since(
        self, eval_id: int, seq: int = 0
    ) -> AsyncIterator[list[tuple[int, int, bytes, bytes]]]:
        """Yield, in batches, (seq, position, task pickle, result pickle) committed after `seq`."""
        while True:
            row = {"eval_id": eval_id, "seq": seq, "limit": RESULTS_PER_READ}
            batch = await self._read(lambda db, row=row: db.execute(RESULTS_SINCE, row).fetchall())
            if not batch:
                return
            yield batch
            seq = batch[-1][0]

    async def check_integrity(self) -> None:
        """Raise StoreError if the file is damaged."""
        problems = await self._read(lambda db: db.execute("PRAGMA quick_check(1)").fetchall())
        if problems != [("ok",)]:
            raise StoreError(_damaged(self.path, problems[0][0]))

    async def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        assert self._writer is not None, "the store is closed"
        with self._explained_errors():
            return await self._writer.transact(work)

    async def _read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        assert self._writer is not None, "the store is closed"
        with self._explained_errors():
            return await self._writer.read(query)

    @contextmanager
    def _explained_errors(self) -> Any:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise StoreError(explain(error, self.path)) from error


def explain(error: sqlite3.DatabaseError, path: Path) -> str:
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
    if "malformed" in text or "not a database" in text or "corrupt" in text:
        return _damaged(path, text)
    return f"{path}: {text}"


def _damaged(path: Path, detail: str) -> str:
    return (
        f"{path} is damaged ({detail}); nothing was read from it. A backup, if one was made, is"
        " used when the damaged file is moved away and the run set is resumed"
    )


def _add_executor(db: sqlite3.Connection, role: str, lease: float) -> int:
    process, now = this_process(), time.time()
    row = {
        "role": role,
        "host": process.host,
        "host_id": process.host_id,
        "pid": process.pid,
        "process_started": process.started,
        "now": now,
        "lease_until": now + lease,
    }
    executor_id = db.execute(ADD_EXECUTOR, row).lastrowid
    assert executor_id is not None
    return executor_id


def _end_executor(
    db: sqlite3.Connection, executor_id: int, reason: str, losses: int = 0
) -> int:
    row = {"executor_id": executor_id, "reason": reason, "now": time.time(), "losses": losses}
    db.execute(END_EXECUTOR, row)
    return db.execute(REQUEUE_OF_EXECUTOR, row).rowcount


def _live_executors(db: sqlite3.Connection) -> list[tuple[int, str, ProcessIdentity, float]]:
    return [
        (id, role, ProcessIdentity(host, host_id, pid, started), lease_until)
        for id, role, host, host_id, pid, started, lease_until in db.execute(LIVE_EXECUTORS)
    ]


def _reap(db: sqlite3.Connection) -> list[tuple[ProcessIdentity, int]]:
    reaped = []
    for executor_id, role, process, lease_until in _live_executors(db):
        if process.is_known_dead():
            reason = "process died"
        elif lease_until < time.time():
            reason = "lease ran out"
        else:
            continue
        losses = int(role == "worker")
        reaped.append((process, _end_executor(db, executor_id, reason, losses)))
    return reaped


def _add_tasks(
    db: sqlite3.Connection, eval_id: int, first_position: int, tasks: Sequence[NewTask]
) -> None:
    (last_id,) = db.execute(LAST_TASK_ID).fetchone()
    rows = [
        {
            "id": last_id + 1 + index,
            "eval_id": eval_id,
            "question_id": task.question_id,
            "attempt_id": task.attempt_id,
            "retry_idx": task.retry_idx,
            "position": first_position + index,
            "task_preview": task.preview,
            "payload": task.payload,
        }
        for index, task in enumerate(tasks)
    ]
    try:
        db.executemany(ADD_TASK, rows)
    except sqlite3.IntegrityError as error:
        db.execute("ROLLBACK")
        raise DuplicateTaskError(_describe_duplicates(db, rows)) from error
    db.executemany(ADD_TASK_PAYLOAD, rows)


def _describe_duplicates(db: sqlite3.Connection, rows: list[dict[str, Any]]) -> str:
    seen: set[tuple[str, int, int]] = set()
    duplicates = []
    for row in rows:
        key = (row["question_id"], row["attempt_id"], row["retry_idx"])
        if key in seen or db.execute(FIND_TASK, row).fetchone():
            duplicates.append(key)
        seen.add(key)
    shown = ", ".join(f"({q!r}, {a}, {r})" for q, a, r in duplicates[:5])
    return (
        f"get_tasks() listed the same (question_id, attempt_id, retry_idx) twice: {shown}"
        f"{' and more' if len(duplicates) > 5 else ''}; give repeated attempts of a question"
        " different attempt_ids"
    )


def _delete_tasks(db: sqlite3.Connection, eval_id: int) -> None:
    db.execute(DELETE_TASK_PAYLOADS, {"eval_id": eval_id})
    db.execute(DELETE_TASKS, {"eval_id": eval_id})


def _delete_eval(db: sqlite3.Connection, eval_id: int) -> None:
    _delete_tasks(db, eval_id)
    db.execute(DELETE_EVAL, {"eval_id": eval_id})


def _restart_eval(db: sqlite3.Connection, eval_id: int) -> None:
    db.execute(RESTART_EVAL, {"eval_id": eval_id})
    db.execute(MAKE_DUE, {"eval_id": eval_id})


def _progress(db: sqlite3.Connection, eval_id: int) -> Progress:
    return Progress(*db.execute(PROGRESS, {"eval_id": eval_id}).fetchone())


def _exchange(
    db: sqlite3.Connection,
    executor_id: int,
    eval_id: int,
    finishes: Sequence[Finish],
    wanted: int,
    num_sharers: int,
    lease: float,
) -> Exchange:
    now = time.time()
    row = {"executor_id": executor_id, "eval_id": eval_id, "now": now, "lease_until": now + lease}
    if db.execute(RENEW_LOST_LEASE, row).rowcount:
        return Exchange([], _progress(db, eval_id), None, is_lease_lost=True)
    if finishes:
        _commit_finishes(db, executor_id, finishes)
    progress = _progress(db, eval_id)
    free = wanted
    if progress.concurrency is not None:
        free = min(free, progress.concurrency - progress.num_running)
    if num_sharers > 1:
        num_queued = progress.num_tasks - progress.num_done - progress.num_running
        free = min(free, max(1, num_queued // (2 * num_sharers)))
    claims: list[Claim] = []
    if free > 0 and progress.state == "running" and not progress.is_done:
        rows = db.execute(CLAIM, row | {"limit": free}).fetchall()
        # RETURNING promises no order.
        claims = sorted((Claim(*columns) for columns in rows), key=lambda c: c.task_id)
    next_due = None
    if len(claims) < wanted:
        (next_due,) = db.execute(NEXT_DUE, row).fetchone()
    return Exchange(claims, progress, next_due)


def _commit_finishes(
    db: sqlite3.Connection, executor_id: int, finishes: Sequence[Finish]
) -> None:
    counted = [f for f in finishes if f.state in (_schema.SCORED, _schema.FAILED)]
    if counted:
        rows = [f.row(executor_id) for f in counted]
        (seq,) = db.execute(LAST_RESULT).fetchone()
        if db.executemany(ADD_RESULT, rows).rowcount < len(rows):
            accepted = {id for (id,) in db.execute(TASKS_WITH_RESULT_SINCE, {"seq": seq})}
            counted = [f for f in counted if f.claim.task_id in accepted]
        db.executemany(FINISH_TASK, rows)
    retried = [f for f in finishes if f.state == _schema.RETRIED and _retry(db, executor_id, f)]
    for finish in finishes:
        if finish.state == _schema.QUEUED:
            db.execute(PUT_BACK_WITH_ERROR, finish.row(executor_id))
    for eval_id in {f.claim.eval_id for f in finishes}:
        db.execute(
            COUNT_OUTCOMES,
            _count(
                eval_id, (f for f in [*counted, *retried] if f.claim.eval_id == eval_id)
            ),
        )


def _retry(db: sqlite3.Connection, executor_id: int, finish: Finish) -> bool:
    """Close a failed try and queue the next; False if the claim no longer held."""
    if db.execute(FINISH_TASK, finish.row(executor_id)).rowcount == 0:
        return False
    (last_id,) = db.execute(LAST_TASK_ID).fetchone()
    row = {
        "id": last_id + 1,
        "task_id": finish.claim.task_id,
        "not_before": finish.not_before,
        "payload": finish.retry_payload,
    }
    db.execute(ADD_RETRY, row)
    db.execute(ADD_TASK_PAYLOAD, row)
    return True


def _count(eval_id: int, finishes: Iterable[Finish]) -> dict[str, Any]:
    counts = {"eval_id": eval_id, "scored": 0, "failed": 0, "retried": 0, "unexpected": 0}
    counts |= {"with_score": 0, "score_sum": 0.0}
    names = {_schema.SCORED: "scored", _schema.FAILED: "failed", _schema.RETRIED: "retried"}
    for finish in finishes:
        counts[names[finish.state]] += 1
        counts["unexpected"] += finish.is_unexpected
        if finish.score is not None:
            counts["with_score"] += 1
            counts["score_sum"] += finish.score
    return counts


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
                db = db or _connect(self._path)
                for process, requeued in _in_transaction(db, self._beat):
                    self._on_reaped(process, requeued)
            except sqlite3.Error:
                continue  # the writing connection meets the same trouble and reports it
        if db is not None:
            db.close()

    def _beat(self, db: sqlite3.Connection) -> list[tuple[ProcessIdentity, int]]:
        now = time.time()
        row = {
            "executor_id": self._executor_id,
            "now": now,
            "lease_until": now + self._lease,
        }
        db.execute(BEAT, row)
        return _reap(db)


def backup(source: Path, target: Path) -> None:
    """Copy a database consistently while it is in use, replacing `target` in one step.

    Blocks: call it in a thread.
    """
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial_copy = target.with_suffix(".partial")
    partial_copy.unlink(missing_ok=True)
    partial_copy.touch(mode=0o600)
    read = sqlite3.connect(f"file:{source}?mode=ro", uri=True, timeout=BUSY_TIMEOUT)
    write = sqlite3.connect(partial_copy)
    try:
        read.backup(write)
    finally:
        write.close()
        read.close()
    partial_copy.replace(target)
