"""Lines to a file that others append to as well, written by a thread. Knows not what they say."""

from __future__ import annotations

import atexit
import errno
import logging
import os
import threading
from collections import deque
from pathlib import Path

# Lines gather for this long before they are written together.
GATHER_SECONDS = 0.05
# A full disk is tried again this often.
RETRY_SECONDS = 1.0
# One write carries whole lines of about this size; lines that could not be written are kept in
# memory up to the second figure.
WRITE_BYTES = 1024**2
MAX_KEPT_BYTES = 64 * 1024**2

logger = logging.getLogger(__name__)


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
                f"events cannot be recorded ({error.strerror}); make the place writable, where a"
                " run that is resumed goes on recording. For a new run set NANOEVAL_LOG_DIR to a"
                " folder that you may write to, or use the recorder dummy_recorder()",
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
