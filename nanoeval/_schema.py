"""The tables of a run set's database and their numbered migrations. Knows no queries.

A migration is never edited after it has shipped. All that a file lacks run in one transaction, so
that nobody sees it half way; `user_version` holds the number of the last one applied.
"""

from __future__ import annotations

import sqlite3
from importlib.metadata import PackageNotFoundError, version

# task.state and outcome.state
QUEUED = 0
RUNNING = 1
SCORED = 2  # evaluate returned; the result is counted
RETRIED = 3  # a system error, followed by another try with the next retry_idx
FAILED = 4  # the last try failed; its error is counted

_INITIAL = """
CREATE TABLE run_set (
    id TEXT NOT NULL,
    created_at REAL NOT NULL,          -- seconds since the epoch, as all times here
    nanoeval_version TEXT NOT NULL,
    host TEXT NOT NULL,
    command TEXT NOT NULL,             -- how the process was started, for people
    definitions BLOB                   -- classes of __main__, pickled by value
);

CREATE TABLE eval (
    id INTEGER PRIMARY KEY,
    run_id TEXT UNIQUE,                -- NULL while the tasks are being queued
    name TEXT NOT NULL,
    model_name TEXT NOT NULL,
    state TEXT NOT NULL,               -- queueing, running, finished, failed, interrupted
    concurrency INTEGER,               -- rollouts in flight over all executors; NULL = unlimited
    num_tasks INTEGER NOT NULL DEFAULT 0,
    num_scored INTEGER NOT NULL DEFAULT 0,
    num_failed INTEGER NOT NULL DEFAULT 0,
    num_retried INTEGER NOT NULL DEFAULT 0,
    num_unexpected INTEGER NOT NULL DEFAULT 0, -- of num_failed: not declared as system errors
    num_with_score INTEGER NOT NULL DEFAULT 0,
    score_sum REAL NOT NULL DEFAULT 0,
    created_at REAL NOT NULL,
    started_at REAL,
    finished_at REAL,
    records TEXT,                      -- where the recorder writes, if that is a file
    summary TEXT,                      -- JSON
    error TEXT,                        -- what ended the run, with its traceback
    spec BLOB NOT NULL,
    recorder BLOB                      -- NULL where the recorder cannot be pickled
);

CREATE TABLE executor (
    id INTEGER PRIMARY KEY,
    role TEXT NOT NULL,                -- driver or worker
    host TEXT NOT NULL,
    host_id TEXT NOT NULL,             -- tells machines, boots and process namespaces apart
    pid INTEGER NOT NULL,
    process_started TEXT NOT NULL,     -- tells a process from a later one with the same pid
    started_at REAL NOT NULL,
    heartbeat_at REAL NOT NULL,
    lease_until REAL NOT NULL,
    ended_at REAL,
    end_reason TEXT,
    aiomonitor_port INTEGER,
    num_stalls INTEGER NOT NULL DEFAULT 0,
    num_slow_callbacks INTEGER NOT NULL DEFAULT 0,
    diagnosis TEXT                     -- JSON: the last stall; see _diagnostics
);

-- One row per try of a rollout: (question, attempt, retry). Rows keep their size as they change.
CREATE TABLE task (
    id INTEGER PRIMARY KEY,
    eval_id INTEGER NOT NULL REFERENCES eval (id),
    question_id TEXT NOT NULL,
    attempt_id INTEGER NOT NULL,
    retry_idx INTEGER NOT NULL,
    position INTEGER NOT NULL,         -- in the order of get_tasks; a retry keeps it
    state INTEGER NOT NULL DEFAULT 0,
    not_before REAL NOT NULL DEFAULT 0,
    claims INTEGER NOT NULL DEFAULT 0, -- times claimed; an answer to an older claim is dropped
    losses INTEGER NOT NULL DEFAULT 0, -- times its executor died while the run went on
    outcome_seq INTEGER                -- how it ended last
);
CREATE INDEX task_queued ON task (eval_id, not_before, id) WHERE state = 0;

CREATE INDEX task_retried ON task (eval_id, question_id, attempt_id) WHERE retry_idx > 0;

-- Pickles live apart, so that columns are read and changed without touching them.
CREATE TABLE task_payload (
    task_id INTEGER PRIMARY KEY,
    preview TEXT,                      -- JSON, cut to a few KB
    payload BLOB NOT NULL
);

-- One row per rollout at work.
CREATE TABLE claim (
    task_id INTEGER PRIMARY KEY,
    eval_id INTEGER NOT NULL,
    executor_id INTEGER NOT NULL,
    number INTEGER NOT NULL,           -- task.claims when it was made
    started_at REAL NOT NULL
);

-- One row per ended try, in the order of commits: `seq` is a cursor. Only states SCORED and FAILED
-- count in a summary.
CREATE TABLE outcome (
    seq INTEGER PRIMARY KEY,
    eval_id INTEGER NOT NULL,
    task_id INTEGER NOT NULL,
    executor_id INTEGER NOT NULL,
    state INTEGER NOT NULL,
    started_at REAL NOT NULL,
    finished_at REAL NOT NULL,
    score REAL,
    is_unexpected INTEGER NOT NULL,    -- failed by an exception that was not a system error
    error_type TEXT,
    error_message TEXT,
    traceback TEXT
);
CREATE INDEX outcome_error ON outcome (eval_id, error_type, substr(error_message, 1, 120), state)
    WHERE error_type IS NOT NULL;

CREATE TABLE outcome_payload (
    seq INTEGER PRIMARY KEY,
    preview TEXT,                      -- of the result, JSON, cut to a few KB
    payload BLOB                       -- the result, or the error that stands for it
);

-- Everything about a try that a person may want to see.
CREATE VIEW try AS
SELECT t.id, t.eval_id, t.question_id, t.attempt_id, t.retry_idx, t.position, t.state,
    t.not_before, t.claims, t.losses, p.preview AS task_preview,
    coalesce(c.executor_id, o.executor_id) AS executor_id,
    coalesce(c.started_at, o.started_at) AS started_at,
    o.finished_at, o.score, o.error_type, o.error_message, o.traceback,
    r.preview AS result_preview
FROM task AS t
    LEFT JOIN task_payload AS p ON p.task_id = t.id
    LEFT JOIN claim AS c ON c.task_id = t.id
    LEFT JOIN outcome AS o ON o.seq = t.outcome_seq
    LEFT JOIN outcome_payload AS r ON r.seq = t.outcome_seq;
"""

_COUNT_CLAIMS = """
ALTER TABLE eval ADD COLUMN num_running INTEGER NOT NULL DEFAULT 0;
UPDATE eval SET num_running = (SELECT count(*) FROM claim AS c WHERE c.eval_id = eval.id);
"""

_FIND_LOST_ONES = """
CREATE INDEX task_lost ON task (eval_id, state, losses) WHERE losses > 0;
"""

_KEEP_CODE_PER_EVAL = """
-- Classes of __main__, pickled by value: an edited script may add an eval to its run set.
ALTER TABLE eval ADD COLUMN definitions BLOB;
-- JSON: where its modules may lie, the folders of its script and of its process.
ALTER TABLE eval ADD COLUMN folders TEXT NOT NULL DEFAULT '[]';
UPDATE eval SET definitions = (SELECT r.definitions FROM run_set AS r);
-- This column is not used any more.
UPDATE run_set SET definitions = NULL;
"""

MIGRATIONS = (_INITIAL, _COUNT_CLAIMS, _FIND_LOST_ONES, _KEEP_CODE_PER_EVAL)


class NewerSchemaError(RuntimeError):
    """A database was written by a newer nanoeval than this one."""


def library_version() -> str:
    """The installed version of nanoeval."""
    try:
        return version("nanoeval")
    except PackageNotFoundError:
        return "unknown"


def migrate(db: sqlite3.Connection, path: str) -> None:
    """Bring the database to this version's schema.

    Raises NewerSchemaError for a file of a later schema, naming the version that wrote it.
    """
    refuse_newer(db, path)
    if db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),):
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        # Another process may do the same; whoever gets the lock second finds it done.
        (found,) = db.execute("PRAGMA user_version").fetchone()
        for script in MIGRATIONS[found:]:
            for statement in script.split(";\n"):
                if statement.strip():
                    db.execute(statement)
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # a full disk has ended it
            db.execute("ROLLBACK")
        raise


def refuse_newer(db: sqlite3.Connection, path: str) -> None:
    """Raise NewerSchemaError if the file's schema is later than this version's."""
    (found,) = db.execute("PRAGMA user_version").fetchone()
    if found > len(MIGRATIONS):
        row = db.execute("SELECT nanoeval_version FROM run_set").fetchone()
        writer = f"nanoeval {row[0]}" if row else "an unknown version"
        raise NewerSchemaError(
            f"{path} has schema {found}, written by {writer}; this is nanoeval {library_version()},"
            f" which reads up to schema {len(MIGRATIONS)}. The file was left as it is; install that"
            " version or a later one to use it"
        )
