"""A run set's database: the queue, the results, who works on them. Every writing SQL statement.

Knows bytes, not what they mean: nothing here is unpickled. All times are seconds since the epoch.
One connection per process writes, on a thread of its own; a call is one transaction.

Many rows travel as one statement, which runs without Python's lock, beside the rollouts; row by
row, each row would wait for the lock anew. For the same reason the two changes that every exchange
makes are triggers, several statements that run as one; see `PROCEDURES`.
"""

from __future__ import annotations

import json
import sqlite3
import time
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import aiosqlite

from nanoeval import _schema
from nanoeval._database_file import connect, explained_errors, in_transaction
from nanoeval._process_identity import ProcessIdentity, this_process
from nanoeval.fs_paths import check_private

T = TypeVar("T")

RESULTS_PER_READ = 2000
# How many bytes of pickles one transaction takes in, gives out or reads, though always one pickle.
# Bounds the memory that batches take, whatever the size of tasks and results.
BATCH_BYTES = 16 * 2**20
# Rows that one INSERT takes in. A few sizes only, so that its statements stay prepared.
ROWS_PER_STATEMENT = (512, 64, 8, 1)
# How many rollouts an executor may have in all, with one among them whose executors have died once,
# twice, and so on; later one alone. So a rollout that kills its process is told from those that
# merely were beside it.
GROUP_AFTER_LOSSES = (256, 32, 4)
ALONE_AFTER = len(GROUP_AFTER_LOSSES) + 1
ANY_LOSSES = (0, 2**31)

CREATE_RUN_SET = """
INSERT INTO run_set (id, created_at, nanoeval_version, host, command)
SELECT :id, :now, :version, :host, :command WHERE NOT EXISTS (SELECT 1 FROM run_set AS r)"""

SET_DEFINITIONS = "UPDATE eval SET definitions = :definitions WHERE id = :eval_id"
GET_DEFINITIONS = "SELECT e.definitions FROM eval AS e WHERE e.id = :eval_id"

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

PUT_BACK_CLAIMED = """
UPDATE task SET state = 0, losses = losses + :losses
WHERE id IN (
    SELECT c.task_id FROM claim AS c
    WHERE c.executor_id = :executor_id AND (:eval_id IS NULL OR c.eval_id = :eval_id))"""
COUNT_PUT_BACK = """
UPDATE eval SET num_running = num_running - (
    SELECT count(*) FROM claim AS c WHERE c.executor_id = :executor_id AND c.eval_id = eval.id)
WHERE :eval_id IS NULL OR id = :eval_id"""
DROP_CLAIMS = """
DELETE FROM claim WHERE executor_id = :executor_id AND (:eval_id IS NULL OR eval_id = :eval_id)"""

ADD_EVAL = """
INSERT INTO eval (name, model_name, state, concurrency, created_at, spec, definitions, folders)
VALUES (:name, :model_name, 'queueing', :concurrency, :now, :spec, :definitions, :folders)"""

LAST_TASK_ID = "SELECT coalesce(max(t.id), 0) FROM task AS t"

ADD_TASKS = "INSERT INTO task (id, eval_id, position, question_id, attempt_id, retry_idx)"
ADD_TASK_PAYLOADS = "INSERT INTO task_payload (task_id, preview, payload)"

# Once per eval: an index that refuses duplicates would cost more for each task.
DUPLICATES = """
SELECT t.question_id, t.attempt_id FROM task AS t WHERE t.eval_id = :eval_id
GROUP BY t.question_id, t.attempt_id HAVING count(*) > 1
ORDER BY min(t.id) LIMIT 6"""

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
    e.num_unexpected, e.num_with_score, e.score_sum, e.num_running
FROM eval AS e WHERE e.id = :eval_id"""
LAST_OUTCOME = "SELECT coalesce(max(o.seq), 0) FROM outcome AS o"
OUTCOMES_SINCE = "SELECT o.seq FROM outcome AS o WHERE o.seq > :last_seq ORDER BY o.seq"

# What came of claims is put into a table of the connection's own, and taken in from there by one
# call of `hand_in`, below.
STAGE_OUTCOMES = """
INSERT INTO handed_in (
    place, task_id, number, state, started_at, finished_at, score, preview, payload)"""
STAGE_ERRORS = """
UPDATE handed_in SET is_unexpected = :is_unexpected, error_type = :error_type,
    error_message = :error_message, traceback = :traceback WHERE place = :place"""
HAND_IN = """
INSERT INTO hand_in (executor_id, eval_id, last_seq) VALUES (:executor_id, :eval_id, :last_seq)"""

ADD_RETRY = """
INSERT INTO task (id, eval_id, question_id, attempt_id, retry_idx, position, not_before)
SELECT :id, t.eval_id, t.question_id, t.attempt_id, t.retry_idx + 1, t.position, :not_before
FROM task AS t WHERE t.id = :task_id"""

ADD_RETRY_PAYLOAD = """
INSERT INTO task_payload (task_id, preview, payload)
SELECT :id, p.preview, :payload FROM task_payload AS p WHERE p.task_id = :task_id"""

HAS_LOST_ONES = """
SELECT EXISTS (
    SELECT 1 FROM task AS t WHERE t.eval_id = :eval_id AND t.losses > 0 AND t.state IN (0, 1))"""
HELD = """
SELECT count(*), coalesce(max(t.losses), 0)
FROM claim AS c JOIN task AS t ON t.id = c.task_id WHERE c.executor_id = :executor_id"""
LEAST_LOST = """
SELECT min(t.losses) FROM task AS t
WHERE t.eval_id = :eval_id AND t.losses > 0 AND t.state = 0 AND t.not_before <= :now"""

# One row for all: their number, their ids, their columns as JSON in the order of Claim, and their
# pickles as one blob. The longest due come first.
DUE_TASKS = """
WITH due AS (
    SELECT t.id, t.claims + 1 AS number, t.question_id, t.attempt_id, t.retry_idx, t.losses,
        length(p.payload) AS size,
        sum(length(p.payload)) OVER (ORDER BY t.not_before, t.id ROWS UNBOUNDED PRECEDING) AS bytes
    FROM task AS t JOIN task_payload AS p ON p.task_id = t.id
    WHERE t.eval_id = :eval_id AND t.state = 0 AND t.not_before <= :now
        AND t.losses BETWEEN :least_losses AND :most_losses
    ORDER BY t.not_before, t.id LIMIT :limit)
SELECT count(*), json_group_array(d.id),
    json_group_array(json_array(
        d.id, d.number, d.question_id, d.attempt_id, d.retry_idx, d.losses, d.size)),
    CAST(group_concat(p.payload, '') AS BLOB)
FROM due AS d CROSS JOIN task_payload AS p ON p.task_id = d.id
WHERE d.bytes - d.size < :batch_bytes"""

# Claims what DUE_TASKS found: one call of `take`, below.
TAKE = """
INSERT INTO take (executor_id, eval_id, now, ids) VALUES (:executor_id, :eval_id, :now, :ids)"""

# Called by an INSERT, whose values are NEW; a view that is never read gives the call its columns.
# They belong to the connection, not to the file.
PROCEDURES = (
    """
CREATE TEMP TABLE handed_in (
    place INTEGER PRIMARY KEY, task_id, number, state, started_at, finished_at, score,
    preview, payload, is_unexpected DEFAULT 0, error_type, error_message, traceback)""",
    """
CREATE TEMP VIEW hand_in AS
SELECT NULL AS executor_id, NULL AS eval_id, NULL AS last_seq""",
    # An answer to a claim that was taken back finds no claim, and is dropped. The rest follows from
    # the outcomes that are added.
    """
CREATE TEMP TRIGGER on_hand_in INSTEAD OF INSERT ON hand_in BEGIN
    INSERT INTO outcome (seq, eval_id, task_id, executor_id, state, started_at, finished_at, score,
        is_unexpected, error_type, error_message, traceback)
    SELECT NEW.last_seq + h.place, c.eval_id, c.task_id, c.executor_id, h.state, h.started_at,
        h.finished_at, h.score, h.is_unexpected, h.error_type, h.error_message, h.traceback
    FROM handed_in AS h JOIN claim AS c ON c.task_id = h.task_id
    WHERE c.executor_id = NEW.executor_id AND c.number = h.number;

    INSERT INTO outcome_payload (seq, preview, payload)
    SELECT o.seq, h.preview, h.payload
    FROM handed_in AS h JOIN outcome AS o ON o.seq = NEW.last_seq + h.place;

    DELETE FROM handed_in;

    DELETE FROM claim
    WHERE task_id IN (SELECT o.task_id FROM outcome AS o WHERE o.seq > NEW.last_seq);

    UPDATE task SET state = o.state, outcome_seq = o.seq
    FROM outcome AS o WHERE o.seq > NEW.last_seq AND task.id = o.task_id;

    UPDATE eval SET num_running = num_running - n.ended,
        num_scored = num_scored + n.scored, num_failed = num_failed + n.failed,
        num_retried = num_retried + n.retried, num_unexpected = num_unexpected + n.unexpected,
        num_with_score = num_with_score + n.with_score, score_sum = score_sum + n.sum
    FROM (
        SELECT count(*) AS ended,
            coalesce(sum(o.state = 2), 0) AS scored, coalesce(sum(o.state = 4), 0) AS failed,
            coalesce(sum(o.state = 3), 0) AS retried,
            coalesce(sum(o.is_unexpected), 0) AS unexpected,
            count(o.score) AS with_score, coalesce(sum(o.score), 0) AS sum
        FROM outcome AS o WHERE o.seq > NEW.last_seq) AS n
    WHERE id = NEW.eval_id;
END""",
    """
CREATE TEMP VIEW take AS
SELECT NULL AS executor_id, NULL AS eval_id, NULL AS now, NULL AS ids""",
    """
CREATE TEMP TRIGGER on_take INSTEAD OF INSERT ON take BEGIN
    UPDATE task SET state = 1, claims = claims + 1
    WHERE id IN (SELECT j.value FROM json_each(NEW.ids) AS j);

    INSERT INTO claim (task_id, eval_id, executor_id, number, started_at)
    SELECT t.id, t.eval_id, NEW.executor_id, t.claims, NEW.now
    FROM json_each(NEW.ids) AS j JOIN task AS t ON t.id = j.value;

    UPDATE eval SET num_running = num_running + json_array_length(NEW.ids)
    WHERE id = NEW.eval_id;
END""",
)

NEXT_DUE = "SELECT min(t.not_before) FROM task AS t WHERE t.eval_id = :eval_id AND t.state = 0"

MAKE_DUE = (
    "UPDATE task SET not_before = 0 WHERE eval_id = :eval_id AND state = 0 AND not_before > 0"
)

EVALS = """
SELECT e.id, e.run_id, e.name, e.state, e.num_tasks, e.num_scored, e.num_failed, e.spec, e.recorder,
    e.folders
FROM eval AS e ORDER BY e.id"""

COUNTED_SINCE = """
SELECT json_group_array(c.seq) FROM (
    SELECT o.seq FROM outcome AS o
    WHERE o.eval_id = :eval_id AND o.seq > :seq AND o.state IN (2, 4) ORDER BY o.seq) AS c"""

COUNTED_IN_ORDER = """
SELECT json_group_array(c.seq) FROM (
    SELECT o.seq FROM outcome AS o JOIN task AS t ON t.id = o.task_id
    WHERE o.eval_id = :eval_id AND o.state IN (2, 4) ORDER BY t.position) AS c"""

# A CROSS JOIN keeps to the order of :seqs; to ORDER BY it would sort all pickles in memory.
READ_RESULTS = """
SELECT p.payload, r.payload
FROM json_each(:seqs) AS j
    CROSS JOIN outcome AS o ON o.seq = j.value
    CROSS JOIN outcome_payload AS r ON r.seq = o.seq
    CROSS JOIN task_payload AS p ON p.task_id = o.task_id"""


# Their number, columns and pickles; see `Exchange`.
NO_CLAIMS = (0, "[]", b"")


class DuplicateTaskError(ValueError):
    """An eval listed the same attempt of a question twice."""


class Claim(NamedTuple):
    """A task this executor may run now, until its lease ends."""

    task_id: int
    number: int
    question_id: str
    attempt_id: int
    retry_idx: int
    losses: int
    payload: bytes


class NewTask(NamedTuple):
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

    progress: Progress
    next_due: float | None = None
    is_lease_lost: bool = False
    num_claims: int = 0
    # As DUE_TASKS gives them: the columns as JSON, and the pickles joined.
    columns: str = "[]"
    payloads: bytes = b""

    def claims(self) -> list[Claim]:
        """The new claims, made afresh with each call."""
        rows = json.loads(self.columns)
        start = 0
        for row in rows:
            end = start + row[-1]
            row[-1] = self.payloads[start:end]
            start = end
        return [Claim._make(row) for row in rows]


@dataclass(frozen=True, slots=True)
class StoredEval:
    """One eval of a run set, as it was queued; `folders`, JSON, is where its modules may lie."""

    eval_id: int
    run_id: str | None
    name: str
    state: str
    num_tasks: int
    num_scored: int
    num_failed: int
    spec: bytes
    recorder: bytes | None
    folders: str


class _Writer(aiosqlite.Connection):
    """An aiosqlite connection that carries a whole transaction in one trip to its thread."""

    async def transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        result: T = await self._execute(in_transaction, self._conn, work)  # type: ignore[no-untyped-call]
        return result

    async def read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        result: T = await self._execute(query, self._conn)  # type: ignore[no-untyped-call]
        return result


class Store:
    """One run set's database, open for writing."""

    def __init__(self, path: Path, lease: float, may_create: bool = True) -> None:
        self.path = path
        self.lease = lease
        self._may_create = may_create
        self._writer: _Writer | None = None

    async def __aenter__(self) -> Self:
        """Open or create the file. Raises StoreError, NewerSchemaError or PermissionError."""
        if self.path.exists():
            check_private(self.path)
        with explained_errors(self.path):
            if self._may_create:
                # Made private from its first byte; SQLite gives its side files the same mode.
                self.path.touch(mode=0o600)
            writer = _Writer(partial(_open, self.path), iter_chunk_size=64)
            await writer
            self._writer = writer
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

    async def set_definitions(self, eval_id: int, definitions: bytes | None) -> None:
        """Keep the definitions of `__main__` that other processes need for an eval."""
        row = {"eval_id": eval_id, "definitions": definitions}
        await self._write(lambda db: db.execute(SET_DEFINITIONS, row))

    async def definitions(self, eval_id: int) -> bytes | None:
        """The definitions of `__main__` that an eval needs, if any."""
        row = {"eval_id": eval_id}
        (definitions,) = await self._read(lambda db: db.execute(GET_DEFINITIONS, row).fetchone())
        return definitions  # type: ignore[no-any-return]

    async def add_executor(self, role: str, process: ProcessIdentity | None = None) -> int:
        """Register `process`, by default this one, as `role`; returns its executor id.

        Its lease starts now.
        """
        return await self._write(
            partial(_add_executor, role=role, lease=self.lease, process=process or this_process())
        )

    async def beat(self, executor_id: int) -> None:
        """Renew an executor's lease."""
        await self._write(partial(beat, executor_id=executor_id, lease=self.lease))

    async def diagnose(self, executor_id: int, **counts: Any) -> None:
        """Add to an executor's diagnosis; see `diagnose` below."""
        await self._write(partial(_diagnose, executor_id=executor_id, **counts))

    async def end_executor(self, executor_id: int, reason: str, losses: int = 0) -> int:
        """End an executor and requeue what it had claimed; returns how many tasks that were."""
        return await self._write(
            partial(_end_executor, executor_id=executor_id, reason=reason, losses=losses)
        )

    async def reap(self, losses: int) -> None:
        """End executors that are dead or past their lease; `losses` is added to their tasks."""
        await self._write(partial(reap, losses=losses))

    async def live_executors(self) -> list[tuple[int, str, ProcessIdentity]]:
        """(id, role, process) of the executors that have neither ended nor been found dead."""
        rows = await self._read(_live_executors)
        return [(id, role, process) for id, role, process, _ in rows]

    async def add_eval(
        self,
        name: str,
        model_name: str,
        concurrency: int | None,
        spec: bytes,
        definitions: bytes | None = None,
        folders: str = "[]",
    ) -> int:
        """Add an eval without tasks, not yet started; returns its id."""
        row = {
            "name": name,
            "model_name": model_name,
            "concurrency": concurrency,
            "now": time.time(),
            "spec": spec,
            "definitions": definitions,
            "folders": folders,
        }
        eval_id = await self._write(lambda db: db.execute(ADD_EVAL, row).lastrowid)
        assert eval_id is not None
        return eval_id

    async def add_tasks(self, eval_id: int, first_position: int, tasks: Sequence[NewTask]) -> None:
        """Queue tasks as one transaction, in order; they can be claimed after `start_eval`."""
        await self._write(
            partial(_add_tasks, eval_id=eval_id, first_position=first_position, tasks=tasks)
        )

    async def delete_eval(self, eval_id: int) -> None:
        """Take an eval out again, with its tasks."""
        await self._write(partial(_delete_eval, eval_id=eval_id))

    async def refuse_duplicates(self, eval_id: int) -> None:
        """Raise DuplicateTaskError if an attempt of a question was queued twice."""
        rows = await self._read(lambda db: db.execute(DUPLICATES, {"eval_id": eval_id}).fetchall())
        if rows:
            shown = ", ".join(f"({q!r}, {a})" for q, a in rows[:5])
            raise DuplicateTaskError(
                f"get_tasks() listed the same (question_id, attempt_id) twice: {shown}"
                f"{' and more' if len(rows) > 5 else ''}; give repeated attempts of a question"
                " different attempt_ids"
            )

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
        now = time.time()
        row = {
            "executor_id": executor_id,
            "eval_id": eval_id,
            "now": now,
            "lease_until": now + self.lease,
            "batch_bytes": BATCH_BYTES,
        }
        exchange = partial(
            _exchange, row=row, finishes=finishes, wanted=wanted, num_sharers=num_sharers
        )
        return await self._write(exchange)

    async def release(self, executor_id: int, eval_id: int) -> None:
        """Put back what an executor has claimed of an eval and will not run."""
        await self._write(partial(_put_back, executor_id=executor_id, eval_id=eval_id))

    async def counted(self, eval_id: int) -> Sequence[int]:
        """The outcomes that count in a summary, by their `seq`, in the order of get_tasks()."""
        return await self._read(partial(_seqs, COUNTED_IN_ORDER, {"eval_id": eval_id}))

    async def counted_since(self, eval_id: int, seq: int) -> Sequence[int]:
        """The outcomes that count and were committed after `seq`, in the order of commits."""
        return await self._read(partial(_seqs, COUNTED_SINCE, {"eval_id": eval_id, "seq": seq}))

    async def results(self, seqs: Sequence[int]) -> AsyncIterator[list[tuple[bytes, bytes]]]:
        """Yield, in batches and in their order, (task pickle, result pickle) of outcomes."""
        n_read = 0
        while n_read < len(seqs):
            wanted = seqs[n_read : n_read + RESULTS_PER_READ]
            batch = await self._read(partial(_results, seqs=json.dumps(list(wanted))))
            yield batch
            n_read += len(batch)

    async def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        assert self._writer is not None, "the store is closed"
        with explained_errors(self.path):
            return await self._writer.transact(work)

    async def _read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        assert self._writer is not None, "the store is closed"
        with explained_errors(self.path):
            return await self._writer.read(query)


def _open(path: Path) -> sqlite3.Connection:
    db = connect(path)
    for procedure in PROCEDURES:
        db.execute(procedure)
    return db


def _seqs(query: str, row: dict[str, Any], db: sqlite3.Connection) -> Sequence[int]:
    (seqs,) = db.execute(query, row).fetchone()
    return array("q", json.loads(seqs))


def _results(db: sqlite3.Connection, seqs: str) -> list[tuple[bytes, bytes]]:
    """The first of :seqs, as many as a batch may hold."""
    batch = []
    size = 0
    with closing(db.execute(READ_RESULTS, {"seqs": seqs})) as rows:
        for task, result in rows:
            batch.append((task, result))
            size += len(task) + len(result)
            if size >= BATCH_BYTES:
                break
    return batch


def _add_executor(db: sqlite3.Connection, role: str, lease: float, process: ProcessIdentity) -> int:
    now = time.time()
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


def _end_executor(db: sqlite3.Connection, executor_id: int, reason: str, losses: int = 0) -> int:
    row = {"executor_id": executor_id, "reason": reason, "now": time.time()}
    db.execute(END_EXECUTOR, row)
    return _put_back(db, executor_id, losses=losses)


def _put_back(
    db: sqlite3.Connection, executor_id: int, eval_id: int | None = None, losses: int = 0
) -> int:
    """Requeue what an executor has claimed, of one eval or of all; returns how many tasks."""
    row = {"executor_id": executor_id, "eval_id": eval_id, "losses": losses}
    db.execute(PUT_BACK_CLAIMED, row)
    db.execute(COUNT_PUT_BACK, row)
    return db.execute(DROP_CLAIMS, row).rowcount


def _live_executors(db: sqlite3.Connection) -> list[tuple[int, str, ProcessIdentity, float]]:
    return [
        (id, role, ProcessIdentity(host, host_id, pid, started), lease_until)
        for id, role, host, host_id, pid, started, lease_until in db.execute(LIVE_EXECUTORS)
    ]


def beat(db: sqlite3.Connection, executor_id: int, lease: float) -> None:
    """Renew an executor's lease, in the caller's transaction."""
    now = time.time()
    db.execute(BEAT, {"executor_id": executor_id, "now": now, "lease_until": now + lease})


def reap(db: sqlite3.Connection, losses: int) -> list[tuple[ProcessIdentity, int]]:
    """End the executors that died or let their lease run out, in the caller's transaction.

    Returns the process of each, and how many of its tasks went back to the queue.
    """
    reaped = []
    for executor_id, _, process, lease_until in _live_executors(db):
        if process.is_known_dead():
            reason = "process died"
        elif lease_until < time.time():
            reason = "lease ran out"
        else:
            continue
        reaped.append((process, _end_executor(db, executor_id, reason, losses)))
    return reaped


def end_all(db: sqlite3.Connection, reason: str) -> list[ProcessIdentity]:
    """End all executors, in the caller's transaction; returns the processes of the drivers."""
    executors = _live_executors(db)
    for executor_id, *_ in executors:
        _end_executor(db, executor_id, reason)
    return [process for _, role, process, _ in executors if role == "driver"]


def _add_tasks(
    db: sqlite3.Connection, eval_id: int, first_position: int, tasks: Sequence[NewTask]
) -> None:
    (last_id,) = db.execute(LAST_TASK_ID).fetchone()
    ids = range(last_id + 1, last_id + 1 + len(tasks))
    names = [
        (id, eval_id, first_position + index, task.question_id, task.attempt_id, task.retry_idx)
        for index, (id, task) in enumerate(zip(ids, tasks, strict=True))
    ]
    _insert(db, ADD_TASKS, names)
    payloads = [(id, task.preview, task.payload) for id, task in zip(ids, tasks, strict=True)]
    _insert(db, ADD_TASK_PAYLOADS, payloads)


def _insert(db: sqlite3.Connection, into: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Carry out `into` for all rows, many in one statement."""
    done = 0
    while done < len(rows):
        n = next(size for size in ROWS_PER_STATEMENT if size <= len(rows) - done)
        some = rows[done : done + n]
        place_holders = "(" + ",".join("?" * len(some[0])) + ")"
        statement = into + " VALUES " + ",".join([place_holders] * n)
        db.execute(statement, list(chain.from_iterable(some)))
        done += n


def _delete_eval(db: sqlite3.Connection, eval_id: int) -> None:
    for statement in (DELETE_TASK_PAYLOADS, DELETE_TASKS, DELETE_EVAL):
        db.execute(statement, {"eval_id": eval_id})


def _restart_eval(db: sqlite3.Connection, eval_id: int) -> None:
    db.execute(RESTART_EVAL, {"eval_id": eval_id})
    db.execute(MAKE_DUE, {"eval_id": eval_id})


def _progress(db: sqlite3.Connection, eval_id: int) -> Progress:
    return Progress(*db.execute(PROGRESS, {"eval_id": eval_id}).fetchone())


def _exchange(
    db: sqlite3.Connection,
    row: dict[str, Any],
    finishes: Sequence[Finish],
    wanted: int,
    num_sharers: int,
) -> Exchange:
    if finishes:
        _hand_in(db, row, finishes)
    progress = _progress(db, row["eval_id"])
    # What was handed in after the lease ran out has found no claims.
    if db.execute(RENEW_LOST_LEASE, row).rowcount:
        return Exchange(progress, is_lease_lost=True)
    free = wanted
    if progress.concurrency is not None:
        free = min(free, progress.concurrency - progress.num_running)
    if num_sharers > 1:
        num_queued = progress.num_tasks - progress.num_done - progress.num_running
        free = min(free, max(1, num_queued // (2 * num_sharers)))
    num_claims, columns, payloads = NO_CLAIMS
    has_lost_ones = False
    if free > 0 and progress.state == "running" and not progress.is_done:
        (has_lost_ones,) = db.execute(HAS_LOST_ONES, row).fetchone()
        take = _take_in_groups if has_lost_ones else _take
        num_claims, columns, payloads = take(db, row, free)
    next_due = None
    if num_claims < wanted and not has_lost_ones:
        (next_due,) = db.execute(NEXT_DUE, row).fetchone()
    return Exchange(progress, next_due, False, num_claims, columns, payloads)


def _take(
    db: sqlite3.Connection,
    row: dict[str, Any],
    limit: int,
    losses: tuple[int, int] = ANY_LOSSES,
) -> tuple[int, str, bytes]:
    """Claim up to `limit` due tasks with so many losses: their number, columns and pickles."""
    due = {"limit": limit, "least_losses": losses[0], "most_losses": losses[1]}
    num_claims, ids, columns, payloads = db.execute(DUE_TASKS, row | due).fetchone()
    if num_claims:
        db.execute(TAKE, row | {"ids": ids})
    return num_claims, columns, payloads


def _take_in_groups(
    db: sqlite3.Connection, row: dict[str, Any], limit: int
) -> tuple[int, str, bytes]:
    """Claim like `_take`, those without losses first, then the others in ever smaller groups."""
    num_held, most_losses = db.execute(HELD, row).fetchone()
    if most_losses == 0:
        without = _take(db, row, limit, (0, 0))
        (most_losses,) = db.execute(LEAST_LOST, row).fetchone()
        if without[0] or most_losses is None:
            return without
    group = GROUP_AFTER_LOSSES[most_losses - 1] if most_losses < ALONE_AFTER else 1
    room = min(limit, group - num_held)
    return _take(db, row, room, (1, most_losses)) if room > 0 else NO_CLAIMS


def _hand_in(db: sqlite3.Connection, row: dict[str, Any], finishes: Sequence[Finish]) -> None:
    (last_seq,) = db.execute(LAST_OUTCOME).fetchone()
    _insert(db, STAGE_OUTCOMES, [_outcome(place, f) for place, f in enumerate(finishes, 1)])
    for place, finish in enumerate(finishes, 1):
        if finish.error_type is not None:
            db.execute(STAGE_ERRORS, {"place": place} | _error(finish))
    db.execute(HAND_IN, row | {"last_seq": last_seq})
    if any(finish.state == _schema.RETRIED for finish in finishes):
        for (seq,) in db.execute(OUTCOMES_SINCE, {"last_seq": last_seq}).fetchall():
            finish = finishes[seq - last_seq - 1]
            if finish.state == _schema.RETRIED:
                _add_retry(db, finish)


def _outcome(place: int, f: Finish) -> tuple[Any, ...]:
    """`f` as a row of `handed_in`."""
    claim = f.claim
    return (
        place, claim.task_id, claim.number, f.state, f.started_at, f.finished_at, f.score,
        f.preview, f.payload,
    )  # fmt: skip


def _error(finish: Finish) -> dict[str, Any]:
    names = ("is_unexpected", "error_type", "error_message", "traceback")
    return {name: getattr(finish, name) for name in names}


def _add_retry(db: sqlite3.Connection, finish: Finish) -> None:
    (last_id,) = db.execute(LAST_TASK_ID).fetchone()
    row = {
        "id": last_id + 1,
        "task_id": finish.claim.task_id,
        "not_before": finish.not_before,
        "payload": finish.retry_payload,
    }
    db.execute(ADD_RETRY, row)
    db.execute(ADD_RETRY_PAYLOAD, row)


def diagnose(path: Path, executor_id: int, **counts: Any) -> None:
    """Add to an executor's diagnosis: stalls, slow_callbacks, diagnosis, aiomonitor_port.

    Blocks, on a connection of its own: a watchdog thread calls it while the loop is stuck.
    """
    with closing(connect(path)) as db:
        _diagnose(db, executor_id, **counts)


def _diagnose(db: sqlite3.Connection, executor_id: int, **counts: Any) -> None:
    row = {"stalls": 0, "slow_callbacks": 0, "diagnosis": None, "aiomonitor_port": None}
    db.execute(DIAGNOSE_EXECUTOR, row | {"executor_id": executor_id, **counts})
