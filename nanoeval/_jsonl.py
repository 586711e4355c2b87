"""JSON lines: any Python value as one line, and lines to a shared file from a thread of its own.

Knows nothing of runs and recorders.
"""

from __future__ import annotations

import atexit
import base64
import dataclasses
import datetime
import enum
import errno
import functools
import json
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import chz
from pydantic import BaseModel

# Lines gather for this long before they are written together.
GATHER_SECONDS = 0.05
# A full disk is tried again this often.
RETRY_SECONDS = 1.0
# One write carries whole lines of about this size; lines that could not be written are kept in
# memory up to the second figure.
WRITE_BYTES = 1024**2
MAX_KEPT_BYTES = 64 * 1024**2
# Python refuses to print larger integers in decimal.
MAX_INT_BITS = 10_000

logger = logging.getLogger(__name__)


def encode_line(record: dict[str, Any]) -> bytes:
    """`record` as one line of JSON, newline included, whatever it holds; never raises.

    pydantic, dataclass and chz objects become objects, sets sorted lists, times ISO 8601, bytes
    text (a data URL where they are no UTF-8), numpy what `tolist` gives, exceptions their type and
    message, NaN and infinities null, anything else its repr.
    """
    try:
        text = _encoder.encode(record)
    except Exception:  # a value's own code may raise anything; the slow way finds and replaces it
        text = _encoder.encode(_plain(record, ()))
    if not text.isascii():
        # str.splitlines would cut lines here, though JSON allows them.
        for separator in ("\x85", "\u2028", "\u2029"):
            text = text.replace(separator, f"\\u{ord(separator):04x}")
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, as in file names that are no UTF-8
        return json.dumps(json.loads(text)).encode() + b"\n"


def _jsonable(value: Any) -> Any:  # noqa: PLR0911 - one line per kind of value
    """`value`, which JSON does not know, in terms of what it knows."""
    if isinstance(value, BaseModel):
        return value.model_dump(warnings=False)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
    if isinstance(value, set | frozenset):
        return _sorted(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return _bytes_as_text(bytes(value))
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, BaseException):
        return {"type": type(value).__name__, "message": str(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if not isinstance(value, type) and callable(tolist := getattr(value, "tolist", None)):
        return tolist()
    if not isinstance(value, type) and chz.is_chz(value):
        return {name: getattr(value, name) for name in chz.chz_fields(value)}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return repr(value)


_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_jsonable)


def _plain(value: Any, inside: tuple[int, ...]) -> Any:  # noqa: PLR0911 - as above
    """`value` with each part that cannot be encoded replaced; `inside` are the ids around it."""
    if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
        return hex(value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if id(value) in inside or len(inside) > 50:
        return f"<{type(value).__name__}, which holds itself or is nested too deep>"
    inside = (*inside, id(value))
    if isinstance(value, dict):
        return {_plain_key(key): _plain(part, inside) for key, part in list(value.items())}
    if isinstance(value, list | tuple):
        return [_plain(part, inside) for part in list(value)]
    try:
        known = _jsonable(value)
    except Exception as error:  # whatever the value's own code raised, its place is marked
        return f"<{type(value).__name__}, which cannot be shown: {type(error).__name__}>"
    return _plain(known, inside)


def _plain_key(key: Any) -> str:
    if isinstance(key, str):
        return str(key)
    if key is None or isinstance(key, bool | int | float):
        return json.dumps(key)
    try:
        return str(key)
    except Exception:  # as above
        return f"<{type(key).__name__}>"


def _sorted(values: set[Any] | frozenset[Any]) -> list[Any]:
    """The same order in every process, which sets of strings do not have."""
    try:
        return sorted(values)
    except TypeError:
        return sorted(values, key=repr)


def _bytes_as_text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return f"data:application/octet-stream;base64,{base64.b64encode(value).decode()}"


class LineWriter:
    """Appends lines to one file; other threads and processes may append to it as well.

    `add` never waits for the disk. Lines are written whole, many at a time, by a thread that starts
    with the first line. What is not written yet when the process is killed is lost, at most
    GATHER_SECONDS of it. A disk error is logged once; the lines are kept, and tried again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lines: deque[bytes] = deque()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._start_lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._file: int | None = None
        self._is_failing = False
        self._dropped = 0

    def add(self, line: bytes) -> None:
        """Queue one line, newline included."""
        if self._pid != os.getpid():
            # A forked child has this object but not its thread; the parent writes its own lines.
            self._reset()
        self._lines.append(line)
        # Set after the line is there, and cleared before lines are taken: none is overlooked.
        if not self._wake.is_set():
            self._wake.set()
        if self._thread is None:
            self._start()

    def check(self) -> None:
        """Open the file, and create its folder. Raises OSError, which says what to do."""
        try:
            with self._write_lock:
                self._open()
        except OSError as error:
            raise type(error)(
                error.errno,
                f"events cannot be recorded ({error.strerror}); set NANOEVAL_LOG_DIR to a folder"
                " that you may write to, or use the recorder dummy_recorder()",
                str(self.path),
            ) from error

    def flush(self) -> None:
        """Write what is queued, in the calling thread. A disk error is logged, not raised."""
        with self._write_lock:
            self._write_queued()

    def close(self) -> None:
        """Flush, end the thread and close the file; a later `add` opens it again."""
        with self._start_lock:
            thread, self._thread = self._thread, None
            self._stop.set()
            self._wake.set()
            atexit.unregister(self.close)
        if thread is not None:
            thread.join(timeout=5)
        with self._write_lock:
            self._write_queued()
            self._report_lost()
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _start(self) -> None:
        with self._start_lock:
            if self._thread is not None:
                return
            self._stop = threading.Event()
            self._thread = threading.Thread(
                target=self._run, args=(self._stop,), name=f"records:{self.path.name}", daemon=True
            )
            # Daemon threads are cut off at exit; this writes what they leave.
            atexit.register(self.close)
            self._thread.start()

    def _run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            if not self._is_failing:
                self._wake.wait()
            stop.wait(RETRY_SECONDS if self._is_failing else GATHER_SECONDS)
            self._wake.clear()
            self.flush()

    def _write_queued(self) -> None:
        try:
            while self._lines:
                self._write_some()
        except OSError as error:
            self._note_failure(error)
            return
        if self._is_failing:
            self._is_failing = False
            logger.warning(f"events are recorded again in {self.path}")

    def _write_some(self) -> None:
        """Write up to WRITE_BYTES, with one call, so that lines of other processes fall between."""
        file = self._open()
        taken: list[bytes] = []
        size = 0
        while self._lines and size < WRITE_BYTES:
            taken.append(self._lines.popleft())
            size += len(taken[-1])
        # A killed process or a full disk may have left half a line.
        repair = b"" if self._ends_with_whole_line(file) else b"\n"
        written = 0
        try:
            written = os.write(file, repair + b"".join(taken))
            if written < size + len(repair):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:
            written -= len(repair)
            while taken and written >= len(taken[0]):
                written -= len(taken.pop(0))
            self._lines.extendleft(reversed(taken))
            raise

    def _open(self) -> int:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        return self._file

    def _ends_with_whole_line(self, file: int) -> bool:
        try:
            size = os.fstat(file).st_size
            return size == 0 or os.pread(file, 1, size - 1) == b"\n"
        except OSError:  # a pipe or a terminal has no end to look at
            return True

    def _note_failure(self, error: OSError) -> None:
        if not self._is_failing:
            self._is_failing = True
            logger.error(
                f"events cannot be recorded in {self.path}: {error.strerror or error}; the run goes"
                " on, and they are written as soon as there is room"
            )
        kept = sum(map(len, self._lines))
        while kept > MAX_KEPT_BYTES:
            kept -= len(self._lines.pop())
            self._dropped += 1

    def _report_lost(self) -> None:
        if self._is_failing:
            self._dropped += len(self._lines)
            self._lines.clear()
        if self._dropped:
            logger.error(
                f"{self._dropped} events could not be recorded in {self.path}; results are not"
                " affected, they are in the run's database"
            )
        self._dropped = 0
        self._is_failing = False


def utc_timestamp() -> str:
    """This moment in UTC as ISO 8601, to the microsecond."""
    now = time.time()
    return f"{_utc_second(int(now))}.{int(now % 1 * 1e6):06d}+00:00"


@functools.lru_cache(maxsize=2)
def _utc_second(seconds: int) -> str:
    # Kept, since all events of a second share it, and writing it costs as much as a small record.
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
