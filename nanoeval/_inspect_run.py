"""Looks into one eval of a run set: how it went over time, its errors, its tasks. Only ever reads.

Every function takes a connection of `_inspect.reading`. Costs stand beside the queries for an eval
of 1,000,000 tasks, because the monitor asks again and again while the run goes on.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from nanoeval import _schema

# A search that takes more CPU time is cut off, and says so.
SEARCH_SECONDS = 1.0
MAX_FOUND = 2000
SNIPPET_CHARS = 1000

_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt|Timeout)(:|$)")

State = Literal["any", "queued", "running", "scored", "retried", "failed"]
Verdict = Literal["any", "right", "partial", "wrong"]
Sort = Literal["position", "duration", "finished", "started", "score"]

STATES: dict[int, State] = {
    _schema.QUEUED: "queued",
    _schema.RUNNING: "running",
    _schema.SCORED: "scored",
    _schema.RETRIED: "retried",
    _schema.FAILED: "failed",
}
_ENDED = {"scored": _schema.SCORED, "retried": _schema.RETRIED, "failed": _schema.FAILED}
# Bounds of the score, low <= score < high.
_BOUNDS: dict[Verdict, tuple[float | None, float | None]] = {
    "any": (None, None),
    "right": (1.0, None),
    "partial": (5e-324, 1.0),
    "wrong": (None, 5e-324),
}

NEW_OUTCOMES = """
SELECT o.seq, o.state, o.started_at, o.finished_at, o.score
FROM outcome AS o WHERE o.eval_id = :eval_id AND o.seq > :after ORDER BY o.seq"""

# One of each `step` outcomes, without reading the others; not always the same of each, since evals
# that run side by side take turns.
SAMPLED_OUTCOMES = """
WITH RECURSIVE n (k) AS (
    SELECT :after / :step + 1 WHERE :after / :step + 1 <= :last / :step
    UNION ALL SELECT n.k + 1 FROM n WHERE n.k < :last / :step)
SELECT o.seq, o.state, o.started_at, o.finished_at, o.score
FROM n CROSS JOIN outcome AS o ON o.seq = n.k * :step - (n.k * 7919) % :step
WHERE o.eval_id = :eval_id AND o.seq > :after"""

LAST_OUTCOME = "SELECT coalesce(max(o.seq), 0) FROM outcome AS o"

IN_FLIGHT = """
SELECT t.id, t.question_id, t.attempt_id, t.retry_idx, c.started_at, c.executor_id
FROM claim AS c JOIN task AS t ON t.id = c.task_id
WHERE c.eval_id = :eval_id ORDER BY c.started_at, t.id LIMIT :limit"""

STARTS_IN_FLIGHT = "SELECT c.started_at FROM claim AS c WHERE c.eval_id = :eval_id"

QUEUE = """
SELECT count(*), coalesce(sum(t.not_before > :now), 0), min(t.not_before), max(t.not_before)
FROM task AS t WHERE t.eval_id = :eval_id AND t.state = 0"""

# From the index outcome_error alone, which holds the beginnings of the messages.
ERRORS = """
SELECT o.error_type, substr(o.error_message, 1, 120), sum(o.state = 3), sum(o.state = 4),
    sum(o.state = 0)
FROM outcome AS o WHERE o.eval_id = :eval_id AND o.error_type IS NOT NULL
GROUP BY o.error_type, substr(o.error_message, 1, 120)"""

FIRST_TASKS = """
SELECT t.id FROM task AS t WHERE t.eval_id = :eval_id
ORDER BY t.id LIMIT :limit OFFSET :offset"""

LAST_TASKS = """
SELECT t.id FROM task AS t WHERE t.eval_id = :eval_id
ORDER BY t.id DESC LIMIT :limit OFFSET :offset"""

CLAIMED_TASKS = """
SELECT c.task_id FROM claim AS c WHERE c.eval_id = :eval_id
ORDER BY c.started_at * :direction, c.task_id LIMIT :limit OFFSET :offset"""

QUEUED_TASKS = """
SELECT t.id FROM task AS t WHERE t.eval_id = :eval_id AND t.state = 0
ORDER BY t.not_before, t.id LIMIT :limit OFFSET :offset"""

# In the order of their ends; stops as soon as it has enough.
ENDED_TASKS = """
SELECT o.task_id FROM outcome AS o
WHERE o.eval_id = :eval_id AND o.state <> 0 AND (:state IS NULL OR o.state = :state)
    AND (:low IS NULL OR o.score >= :low) AND (:high IS NULL OR o.score < :high)
ORDER BY o.seq LIMIT :limit OFFSET :offset"""

LAST_ENDED_TASKS = """
SELECT o.task_id FROM outcome AS o
WHERE o.eval_id = :eval_id AND o.state <> 0 AND (:state IS NULL OR o.state = :state)
    AND (:low IS NULL OR o.score >= :low) AND (:high IS NULL OR o.score < :high)
ORDER BY o.seq DESC LIMIT :limit OFFSET :offset"""

# 0.3 s: reads all outcomes.
SORTED_TASKS = """
SELECT o.task_id FROM outcome AS o
WHERE o.eval_id = :eval_id AND o.state <> 0 AND (:state IS NULL OR o.state = :state)
    AND (:low IS NULL OR o.score >= :low) AND (:high IS NULL OR o.score < :high)
ORDER BY
    CASE :sort WHEN 'duration' THEN o.finished_at - o.started_at WHEN 'started' THEN o.started_at
        ELSE o.score END * :direction,
    o.seq * :direction
LIMIT :limit OFFSET :offset"""

# 0.2 s.
COUNT_SCORES = """
SELECT count(*) FROM outcome AS o
WHERE o.eval_id = :eval_id AND o.state <> 0 AND (:state IS NULL OR o.state = :state)
    AND (:low IS NULL OR o.score >= :low) AND (:high IS NULL OR o.score < :high)"""

TASKS_WITH_ERROR = """
SELECT o.task_id FROM outcome AS o
WHERE o.eval_id = :eval_id AND o.error_type = :error_type
    AND (:state IS NULL OR o.state = :state)
    AND (:error_line IS NULL OR substr(o.error_message, 1, length(:error_line)) = :error_line)
ORDER BY o.seq * :direction LIMIT :limit OFFSET :offset"""

# Names first: a search for one succeeds however many tasks there are.
TASKS_WITH_TEXT = """
WITH hit (task_id) AS (
    SELECT t.id FROM task AS t
    WHERE t.eval_id = :eval_id AND t.question_id LIKE :text ESCAPE '\\'
    UNION ALL
    SELECT o.task_id FROM outcome AS o
    WHERE o.eval_id = :eval_id AND o.error_message LIKE :text ESCAPE '\\'
    UNION ALL
    SELECT p.task_id FROM task_payload AS p WHERE p.preview LIKE :text ESCAPE '\\'
    UNION ALL
    SELECT o.task_id FROM outcome_payload AS r CROSS JOIN outcome AS o ON o.seq = r.seq
    WHERE r.preview LIKE :text ESCAPE '\\')
SELECT DISTINCT h.task_id
FROM hit AS h
    CROSS JOIN task AS t ON t.id = h.task_id
    LEFT JOIN outcome AS o ON o.seq = t.outcome_seq
WHERE t.eval_id = :eval_id AND (:task_state IS NULL OR t.state = :task_state)
    AND (:low IS NULL OR o.score >= :low) AND (:high IS NULL OR o.score < :high)
    AND (:error_type IS NULL OR o.error_type = :error_type)
    AND (:error_line IS NULL
        OR substr(o.error_message, 1, length(:error_line)) = :error_line)
LIMIT :max_found"""

SORTED_HITS = """
SELECT t.id FROM json_each(:ids) AS j CROSS JOIN task AS t ON t.id = j.value
    LEFT JOIN outcome AS o ON o.seq = t.outcome_seq
ORDER BY
    CASE :sort WHEN 'duration' THEN o.finished_at - o.started_at WHEN 'finished' THEN o.finished_at
        WHEN 'started' THEN o.started_at WHEN 'score' THEN o.score ELSE t.id END * :direction,
    t.id * :direction
LIMIT :limit OFFSET :offset"""

TASK_LINES = """
SELECT y.id, y.question_id, y.attempt_id, y.retry_idx, y.state, y.executor_id, y.started_at,
    y.finished_at, y.score, y.error_type, substr(y.error_message, 1, :chars),
    substr(y.task_preview, 1, :chars), substr(y.result_preview, 1, :chars), y.not_before
FROM try AS y WHERE y.id IN (SELECT j.value FROM json_each(:ids) AS j)"""

TRY = """
SELECT y.id, y.eval_id, y.question_id, y.attempt_id, y.retry_idx, y.position, y.state,
    y.not_before, y.claims, y.losses, y.task_preview, y.executor_id, y.started_at, y.finished_at,
    y.score, y.error_type, y.error_message, y.traceback, y.result_preview
FROM try AS y WHERE y.id = :task_id"""

# 0.2 s: no index on names, which each task would pay for.
TASKS_OF_QUESTION = """
SELECT t.id FROM task AS t WHERE t.eval_id = :eval_id AND t.question_id = :question_id
ORDER BY t.attempt_id, t.retry_idx"""

# Seconds: sorts all tasks by question.
QUESTION_SCORES = """
SELECT t.question_id, total(o.score), count(o.score), min(t.id)
FROM outcome AS o JOIN task AS t ON t.id = o.task_id
WHERE o.eval_id = :eval_id AND o.state IN (2, 4)
GROUP BY t.question_id ORDER BY t.question_id"""

SUMMARY = "SELECT e.summary FROM eval AS e WHERE e.id = :eval_id"


@dataclass(frozen=True, slots=True)
class InFlight:
    """A rollout at work."""

    task_id: int
    question_id: str
    attempt_id: int
    retry_idx: int
    started_at: float
    executor_id: int

    @property
    def group_id(self) -> str:
        return f"{self.attempt_id}.{self.retry_idx}"


@dataclass(frozen=True, slots=True)
class Queue:
    """What waits: `num_backed_off` of `num_queued` are not due before `first_due` .. `last_due`."""

    num_queued: int
    num_backed_off: int
    first_due: float | None
    last_due: float | None


@dataclass(frozen=True, slots=True)
class ErrorGroup:
    """Ended tries whose errors have one type and one first line."""

    error_type: str
    line: str
    num_retried: int
    num_failed: int
    num_fatal: int  # ended the run; the try was put back into the queue

    @property
    def num_tries(self) -> int:
        return self.num_retried + self.num_failed + self.num_fatal


@dataclass(frozen=True, slots=True)
class TaskFilter:
    """Which tries to show, in which order. The text is looked for anywhere, whatever its case."""

    state: State = "any"
    verdict: Verdict = "any"
    error_type: str | None = None
    error_line: str | None = None
    text: str = ""
    sort: Sort = "position"
    is_descending: bool = False


@dataclass(frozen=True, slots=True)
class TaskLine:
    """One try, as a list shows it; long texts are cut."""

    task_id: int
    question_id: str
    attempt_id: int
    retry_idx: int
    state: State
    executor_id: int | None
    started_at: float | None
    finished_at: float | None
    score: float | None
    error_type: str | None
    error_message: str | None
    task_preview: str | None
    result_preview: str | None
    not_before: float

    @property
    def seconds(self) -> float | None:
        if self.state == "running" or self.started_at is None or self.finished_at is None:
            return None
        return self.finished_at - self.started_at


@dataclass(frozen=True, slots=True)
class TaskPage:
    """Some of the tries that a filter lets through.

    `num_matching` is None where counting would cost too much. With `is_cut_off` the search took too
    long and stopped: there may be more.
    """

    lines: list[TaskLine]
    has_more: bool
    num_matching: int | None
    is_cut_off: bool = False


@dataclass(frozen=True, slots=True)
class Try:
    """One try with all that the database knows of it in columns; previews are JSON."""

    task_id: int
    eval_id: int
    question_id: str
    attempt_id: int
    retry_idx: int
    position: int
    state: State
    not_before: float
    claims: int
    losses: int
    task_preview: str | None
    executor_id: int | None
    started_at: float | None
    finished_at: float | None
    score: float | None
    error_type: str | None
    error_message: str | None
    traceback: str | None
    result_preview: str | None

    @property
    def group_id(self) -> str:
        return f"{self.attempt_id}.{self.retry_idx}"


def last_outcome(db: sqlite3.Connection) -> int:
    """The cursor behind the outcomes so far; 0 before the first."""
    (seq,) = db.execute(LAST_OUTCOME).fetchone()
    return int(seq)


def sampled_outcomes(
    db: sqlite3.Connection, eval_id: int, after: int, last: int, step: int
) -> Iterator[tuple[int, int, float, float, float | None]]:
    """(seq, state, start, end, score) of one of each `step` outcomes behind `after`, up to `last`.

    With a `step` above 1, the last outcomes that do not fill one are left for the next time.
    """
    row = {"eval_id": eval_id, "after": after, "last": last, "step": step}
    return db.execute(NEW_OUTCOMES if step == 1 else SAMPLED_OUTCOMES, row)


def rollouts_in_flight(db: sqlite3.Connection, eval_id: int, limit: int) -> list[InFlight]:
    """The rollouts at work that began first, oldest first."""
    rows = db.execute(IN_FLIGHT, {"eval_id": eval_id, "limit": limit})
    return [InFlight(*columns) for columns in rows]


def starts_in_flight(db: sqlite3.Connection, eval_id: int) -> list[float]:
    """When the rollouts at work began, in no order."""
    return [started_at for (started_at,) in db.execute(STARTS_IN_FLIGHT, {"eval_id": eval_id})]


def queue(db: sqlite3.Connection, eval_id: int) -> Queue:
    """What waits to be run."""
    return Queue(*db.execute(QUEUE, {"eval_id": eval_id, "now": time.time()}).fetchone())


def error_groups(db: sqlite3.Connection, eval_id: int) -> list[ErrorGroup]:
    """The errors of ended tries, most frequent first."""
    groups: dict[tuple[str, str], list[int]] = {}
    for error_type, start, *counts in db.execute(ERRORS, {"eval_id": eval_id}):
        line = (start or "").partition("\n")[0]
        sums = groups.setdefault((error_type, line), [0, 0, 0])
        groups[error_type, line] = [a + b for a, b in zip(sums, counts, strict=True)]
    found = [ErrorGroup(*key, *counts) for key, counts in groups.items()]
    return sorted(found, key=lambda group: group.num_tries, reverse=True)


def find_tasks(
    db: sqlite3.Connection, eval_id: int, wanted: TaskFilter, limit: int, offset: int
) -> TaskPage:
    """The tries that `wanted` lets through, `limit` of them from the `offset`-th on.

    With a text, only the first MAX_FOUND hits are sorted and shown.
    """
    row = _parameters(eval_id, wanted) | {"limit": limit + 1, "offset": offset}
    statement, is_cut_off = _statement(wanted), False
    if wanted.text:
        hits, is_cut_off = _until_too_long(db, TASKS_WITH_TEXT, row)
        row["ids"] = json.dumps(hits)
        is_cut_off = is_cut_off or len(hits) == MAX_FOUND
    ids = [id for (id,) in db.execute(statement, row)]
    num_matching = None
    if wanted.verdict != "any" and not wanted.text:
        (num_matching,) = db.execute(COUNT_SCORES, row).fetchone()
    return TaskPage(_lines(db, ids[:limit]), len(ids) > limit, num_matching, is_cut_off)


def _statement(wanted: TaskFilter) -> str:  # noqa: PLR0911 - one line per kind of list
    if wanted.text:
        return SORTED_HITS
    if wanted.state == "running":
        return CLAIMED_TASKS
    if wanted.state == "queued":
        return QUEUED_TASKS
    if wanted.error_type is not None:
        return TASKS_WITH_ERROR
    if wanted.sort in ("duration", "started", "score"):
        return SORTED_TASKS
    if (wanted.state, wanted.verdict, wanted.sort) == ("any", "any", "position"):
        return LAST_TASKS if wanted.is_descending else FIRST_TASKS
    return LAST_ENDED_TASKS if wanted.is_descending else ENDED_TASKS


def _parameters(eval_id: int, wanted: TaskFilter) -> dict[str, Any]:
    low, high = _BOUNDS[wanted.verdict]
    numbers = {name: number for number, name in STATES.items()}
    return {
        "eval_id": eval_id,
        "state": _ENDED.get(wanted.state),
        "task_state": numbers.get(wanted.state),
        "low": low,
        "high": high,
        "error_type": wanted.error_type,
        "error_line": wanted.error_line or None,
        "text": f"%{_escaped(wanted.text)}%",
        "max_found": MAX_FOUND,
        "sort": wanted.sort,
        "direction": -1 if wanted.is_descending else 1,
    }


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


def _until_too_long(
    db: sqlite3.Connection, statement: str, row: dict[str, Any]
) -> tuple[list[int], bool]:
    """The ids that a statement gives within SEARCH_SECONDS, and whether it was cut off."""
    deadline = time.thread_time() + SEARCH_SECONDS
    db.set_progress_handler(lambda: time.thread_time() > deadline, 20_000)
    ids: list[int] = []
    try:
        for (id,) in db.execute(statement, row):
            ids.append(id)
    except sqlite3.OperationalError as error:
        if "interrupted" not in str(error):
            raise
        return ids, True
    finally:
        db.set_progress_handler(None, 0)
    return ids, False


def _lines(db: sqlite3.Connection, ids: list[int]) -> list[TaskLine]:
    rows = db.execute(TASK_LINES, {"ids": json.dumps(ids), "chars": SNIPPET_CHARS})
    lines = {}
    for id, question_id, attempt_id, retry_idx, state, *rest in rows:
        lines[id] = TaskLine(id, question_id, attempt_id, retry_idx, STATES[state], *rest)
    return [lines[id] for id in ids if id in lines]


def find_try(db: sqlite3.Connection, task_id: int) -> Try | None:
    """One try; None where there is none of that id."""
    columns = db.execute(TRY, {"task_id": task_id}).fetchone()
    if columns is None:
        return None
    values = list(columns)
    values[6] = STATES[values[6]]
    return Try(*values)


def tries_of_question(db: sqlite3.Connection, eval_id: int, question_id: str) -> list[Try]:
    """All tries of all attempts at a question, by attempt and retry."""
    row = {"eval_id": eval_id, "question_id": question_id}
    ids = [id for (id,) in db.execute(TASKS_OF_QUESTION, row)]
    return [found for id in ids if (found := find_try(db, id)) is not None]


def question_scores(db: sqlite3.Connection, eval_id: int) -> Iterator[tuple[str, float, int, int]]:
    """(question id, sum of scores, number of scores, a task id) of each question, sorted by it."""
    return db.execute(QUESTION_SCORES, {"eval_id": eval_id})


def error_line(error: str) -> str:
    """The line of a traceback, of a group of exceptions also, that names the exception."""
    lines = [line.strip(" |+-") for line in error.splitlines()]
    named = [line for line in lines if _EXCEPTION.match(line)]
    return named[-1] if named else next((line for line in reversed(lines) if line), "")


def summary_json(db: sqlite3.Connection, eval_id: int) -> str | None:
    """The eval's summary as it was stored, of all results or of those so far; None before one."""
    row = db.execute(SUMMARY, {"eval_id": eval_id}).fetchone()
    return None if row is None else row[0]
