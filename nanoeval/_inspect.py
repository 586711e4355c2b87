"""Looks at run sets for people: which there are, and how they stand. Only ever reads.

Every connection is read-only and short; nothing is created, migrated, locked or unpickled. What
cannot be read becomes a sentence in `problem`, not an exception. Further queries of the package's
viewers go through `reading` (one connection, errors told as sentences) and keep their SQL in
constants beside the function that uses them.
"""

from __future__ import annotations

import difflib
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_type_hints
from urllib.parse import quote

from nanoeval import _schema
from nanoeval._process_identity import ProcessIdentity, this_process
from nanoeval._run_set import backup_path, resume_command
from nanoeval.fs_paths import check_private, database_dirs

# A reader of a WAL database hardly ever waits: only while somebody recovers or closes the file.
BUSY_TIMEOUT = 1.0

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = TypeVar("Row", bound="DataclassInstance")

RunSetState = Literal[
    "running", "finished", "failed", "interrupted", "crashed", "empty", "unreadable"
]
Standing = Literal["live", "silent", "dead", "ended"]

COUNT_TABLES = """
SELECT count(*), coalesce(sum(m.name IN ('run_set', 'eval', 'executor', 'task')), 0)
FROM sqlite_master AS m WHERE m.type = 'table'"""

RUN_SET = "SELECT r.created_at, r.nanoeval_version, r.host, r.command FROM run_set AS r"

EVALS = """
SELECT e.id, e.run_id, e.name, e.model_name, e.state, e.concurrency, e.num_tasks, e.num_scored,
    e.num_failed, e.num_retried, e.num_unexpected, e.num_with_score, e.score_sum,
    (SELECT count(*) FROM claim AS c WHERE c.eval_id = e.id) AS num_running,
    e.created_at, e.started_at, e.finished_at, e.records, e.error
FROM eval AS e ORDER BY e.id"""

EXECUTORS = """
SELECT x.id, x.role, x.host, x.host_id, x.pid, x.process_started, x.started_at, x.heartbeat_at,
    x.lease_until, x.ended_at, x.end_reason, x.aiomonitor_port, x.num_stalls,
    x.num_slow_callbacks, x.diagnosis,
    (SELECT count(*) FROM claim AS c WHERE c.executor_id = x.id) AS num_running
FROM executor AS x WHERE x.ended_at IS NULL OR :ended_too ORDER BY x.id"""


class UnreadableRunSetError(RuntimeError):
    """A run set's file cannot be read; the message is a sentence for people."""


class UnknownRunSetError(LookupError):
    """There is no run set of that id; the message names the nearest that exist."""


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One eval of a run set. `state` is the column: queueing, running, finished, failed or
    interrupted; a crash leaves queueing or running behind."""

    eval_id: int
    run_id: str | None
    name: str
    model_name: str
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
    created_at: float
    started_at: float | None
    finished_at: float | None
    records: str | None
    error: str | None

    @property
    def num_done(self) -> int:
        return self.num_scored + self.num_failed

    @property
    def score_mean(self) -> float | None:
        """The mean score of the results that have one; None while there are none."""
        return self.score_sum / self.num_with_score if self.num_with_score else None


@dataclass(frozen=True, slots=True)
class ExecutorRow:
    """One process that takes or took part in a run set. `role` is driver or worker."""

    executor_id: int
    role: str
    host: str
    host_id: str
    pid: int
    process_started: str
    started_at: float
    heartbeat_at: float
    lease_until: float
    ended_at: float | None
    end_reason: str | None
    aiomonitor_port: int | None
    num_stalls: int
    num_slow_callbacks: int
    diagnosis: str | None
    num_running: int

    @property
    def process(self) -> ProcessIdentity:
        return ProcessIdentity(self.host, self.host_id, self.pid, self.process_started)

    @property
    def standing(self) -> Standing:
        """How the process is now; silent means past its lease, but not seen to be dead."""
        if self.ended_at is not None:
            return "ended"
        if self.process.is_known_dead():
            return "dead"
        return "silent" if self.lease_until < time.time() else "live"

    @property
    def is_on_this_host(self) -> bool:
        return self.host_id == this_process().host_id


@dataclass(frozen=True, slots=True)
class RunSetFile:
    """Where a run set lies. `backup` is its copy, None without one; with `is_backup` there is
    only the copy, and `path` is that."""

    run_set_id: str
    path: Path
    is_backup: bool = False
    backup: Path | None = None

    @property
    def size_bytes(self) -> int:
        """Of the file with its write-ahead log; 0 where it is gone."""
        return sum(_size(Path(f"{self.path}{suffix}")) for suffix in ("", "-wal"))

    @property
    def changed_at(self) -> float:
        """When it was last written; 0 where it is gone."""
        return max(_changed_at(Path(f"{self.path}{suffix}")) for suffix in ("", "-wal"))


@dataclass(frozen=True, slots=True)
class _Origin:
    created_at: float
    nanoeval_version: str
    host: str
    command: str


@dataclass(frozen=True, slots=True)
class RunSetRow:
    """How a run set stands. With `problem`, a sentence, the file could not be read: then only
    `file` and its times are known.

    `executors` are those that have not ended; an executor that died stands among them until
    another notices.
    """

    file: RunSetFile
    size_bytes: int
    changed_at: float
    created_at: float
    nanoeval_version: str = ""
    host: str = ""
    command: str = ""
    evals: tuple[EvalRow, ...] = ()
    executors: tuple[ExecutorRow, ...] = ()
    problem: str | None = field(default=None, kw_only=True)

    @property
    def run_set_id(self) -> str:
        return self.file.run_set_id

    @property
    def finished_at(self) -> float | None:
        """When the last of its evals ended; None while one has not."""
        ends = [e.finished_at for e in self.evals]
        return None if None in ends else max((end for end in ends if end is not None), default=None)

    @property
    def is_live(self) -> bool:
        """Whether a process that drives runs of it is at work, as far as can be seen from here."""
        return any(x.role == "driver" and x.standing == "live" for x in self.executors)

    @property
    def state(self) -> RunSetState:
        if self.problem is not None:
            return "unreadable"
        if self.is_live:
            return "running"
        states = {e.state for e in self.evals}
        if states & {"queueing", "running"}:
            return "crashed"
        if "failed" in states:
            return "failed"
        if "interrupted" in states:
            return "interrupted"
        return "finished" if states else "empty"

    def state_of(self, e: EvalRow) -> str:
        """The state of one of its evals; crashed where nobody works on it any more."""
        is_open = e.state in ("queueing", "running")
        return "crashed" if is_open and not self.is_live else e.state

    @property
    def can_be_resumed(self) -> bool:
        return self.state in ("crashed", "failed", "interrupted")

    @property
    def resume_command(self) -> str:
        """What to type to go on with it."""
        return resume_command(self.run_set_id)


def run_set_files() -> list[RunSetFile]:
    """Every run set on this machine, in no order: working files and backups without one.

    Raises OSError where the folder for databases cannot be used.
    """
    backups = {path.stem: path for path in _databases_in(backup_dirs())}
    files: dict[str, RunSetFile] = {}
    for path in _databases_in(database_dirs()):
        # The first folder wins: it is the one that resume would use.
        files.setdefault(path.stem, RunSetFile(path.stem, path, backup=backups.get(path.stem)))
    for run_set_id, path in backups.items():
        files.setdefault(run_set_id, RunSetFile(run_set_id, path, is_backup=True, backup=path))
    return list(files.values())


def backup_dirs() -> list[Path]:
    """The folder of the backups, in a list; empty where there is none on this machine."""
    folder = backup_path("any").parent
    return [folder] if folder.is_dir() else []


def list_run_sets() -> list[RunSetRow]:
    """All run sets of `run_set_files`, newest first."""
    rows = [look_at(file) for file in run_set_files()]
    return sorted(rows, key=lambda row: row.created_at, reverse=True)


def find_run_set(run_set_id: str) -> RunSetFile:
    """The file of a run set. Raises UnknownRunSetError, naming the nearest ids that exist."""
    files = run_set_files()
    for file in files:
        if file.run_set_id == run_set_id:
            return file
    files.sort(key=lambda file: file.changed_at, reverse=True)
    near = nearest_ids(run_set_id, [file.run_set_id for file in files])
    if near:
        remedy = f"did you mean {' or '.join(near)}?"
    elif files:
        remedy = f"the newest is {files[0].run_set_id}."
    else:
        places = ", ".join(str(place) for place in [*database_dirs(), *backup_dirs()])
        remedy = f"there are no run sets in {places}"
    raise UnknownRunSetError(
        f"there is no run set {run_set_id!r}; {remedy}"
        f"{' `python -m nanoeval.bin.ls` lists all' if files else ''}"
    )


def nearest_ids(wrong: str, known: Sequence[str], limit: int = 3) -> list[str]:
    """Up to `limit` of the `known` ids that are most like `wrong`, best first; often none."""
    containing = [id for id in known if wrong and (wrong in id or id in wrong)]
    similar = difflib.get_close_matches(wrong, known, n=limit, cutoff=0.5)
    return list(dict.fromkeys([*containing, *similar]))[:limit]


def look_at(file: RunSetFile) -> RunSetRow:
    """How one run set stands; a file that cannot be read gives a row with a `problem`."""
    size_bytes, changed_at = file.size_bytes, file.changed_at
    try:
        with reading(file.path) as db:
            # One snapshot, so that counts and states belong together.
            db.execute("BEGIN")
            origin = next(typed_rows(_Origin, db.execute(RUN_SET)), None)
            evals, executors = read_evals(db), read_executors(db)
    except UnreadableRunSetError as error:
        return RunSetRow(file, size_bytes, changed_at, changed_at, problem=str(error))
    if origin is None:
        return RunSetRow(file, size_bytes, changed_at, changed_at, problem=_empty(file.path))
    return RunSetRow(
        file,
        size_bytes,
        changed_at,
        origin.created_at,
        origin.nanoeval_version,
        origin.host,
        origin.command,
        evals,
        executors,
    )


def read_evals(db: sqlite3.Connection) -> tuple[EvalRow, ...]:
    """The evals of a run set, in the order in which they were queued."""
    return tuple(typed_rows(EvalRow, db.execute(EVALS)))


def read_executors(db: sqlite3.Connection, *, ended_too: bool = False) -> tuple[ExecutorRow, ...]:
    """The executors of a run set, oldest first."""
    rows = db.execute(EXECUTORS, {"ended_too": ended_too})
    return tuple(typed_rows(ExecutorRow, rows))


def typed_rows(row_type: type[Row], rows: Iterable[tuple[Any, ...]]) -> Iterator[Row]:
    """Each row as a dataclass whose fields are the query's columns, in their order.

    Raises sqlite3.DatabaseError, which `reading` explains, where a value is not of its field's
    type: SQLite itself does not notice when damage changes one.
    """
    types = get_type_hints(row_type)
    names = [field.name for field in fields(row_type)]
    for columns in rows:
        for name, value in zip(names, columns, strict=True):
            if not isinstance(value, types[name]):
                raise sqlite3.DatabaseError(f"malformed value {value!r:.50} of {name}")
        yield row_type(*columns)


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A read-only connection to a run set's file, for one look: hold it for seconds at most.

    Raises UnreadableRunSetError, from here and for any SQLite error of the block, where the file is
    missing, someone else's, empty, damaged, locked, no run set, or of a newer schema.
    """
    try:
        check_private(path)
    except FileNotFoundError as error:
        raise UnreadableRunSetError(f"{path} is gone") from error
    except OSError as error:
        raise UnreadableRunSetError(str(error)) from error
    if _size(path) == 0:
        raise UnreadableRunSetError(_empty(path))
    try:
        with closing(_connect(path)) as db:
            _check_schema(db, path)
            yield db
    except _schema.NewerSchemaError as error:
        raise UnreadableRunSetError(str(error)) from error
    except (sqlite3.Error, UnicodeDecodeError) as error:
        # UnicodeDecodeError: SQLite's message quotes a damaged file, and Python cannot decode it.
        raise UnreadableRunSetError(_explain(error, path)) from error


def _connect(path: Path) -> sqlite3.Connection:
    # SQLite makes side files even for a read-only connection, and leaves them behind. A database
    # without a write-ahead log is at rest and is read as it is.
    is_at_rest = not Path(f"{path}-wal").exists()
    db = sqlite3.connect(
        f"file:{quote(str(path))}?mode=ro{'&immutable=1' if is_at_rest else ''}",
        uri=True,
        timeout=BUSY_TIMEOUT,
        isolation_level=None,
        check_same_thread=False,
    )
    db.execute("PRAGMA query_only = 1")
    db.execute("PRAGMA temp_store = MEMORY")
    return db


def _check_schema(db: sqlite3.Connection, path: Path) -> None:
    (found,) = db.execute("PRAGMA user_version").fetchone()
    _schema.refuse_newer(db, str(path))
    num_tables, num_own = db.execute(COUNT_TABLES).fetchone()
    if num_tables == 0:
        raise UnreadableRunSetError(_empty(path))
    if num_own < 4:
        raise UnreadableRunSetError(
            f"{path} is an SQLite database, but not the database of a run set"
        )
    if found < len(_schema.MIGRATIONS):
        raise UnreadableRunSetError(
            f"{path} has schema {found} of an older nanoeval, this version reads"
            f" {len(_schema.MIGRATIONS)}; resuming the run set brings it up to date"
        )


def _empty(path: Path) -> str:
    return f"{path} is empty: its process ended before it wrote anything"


def _explain(error: Exception, path: Path) -> str:
    text = str(error)
    if "locked" in text or "busy" in text:
        return f"{path} is locked by another process at the moment; its contents are safe"
    if any(sign in text for sign in ("malformed", "not a database", "corrupt", "decode")):
        return f"{path} is damaged ({text})"
    return f"{path} cannot be read ({text})"


def _databases_in(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(folder.glob("*.db"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
