"""Finds the recorded events of one rollout in a file of JSON lines, without reading it all.

Events stand in the order of time, give or take a moment: where to look is found by bisection over
byte offsets, and what lies there is searched as bytes. Knows the json_recorder's lines only.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

# Lines of several processes mix within about this time, seconds.
DISORDER = 5.0
# No search reads more than this.
MAX_SEARCHED = 256 * 1024**2
MAX_EVENTS = 500
CHUNK = 1 << 22
LONGEST_LINE = 1 << 26


@dataclass(frozen=True, slots=True)
class Found:
    """Events of a rollout, oldest first. With `is_cut_off` there may be more in the file."""

    events: list[dict[str, Any]]
    is_cut_off: bool


def find_events(
    path: Path, question_id: str, group_id: str, began: float | None, ended: float | None
) -> Found:
    """The events of one try; `ended` is None for one that goes on.

    Raises OSError where the file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = _around(file, size, began - DISORDER)[0] if began is not None else 0
        end = _around(file, size, ended + DISORDER)[1] if ended is not None else size
        limit = min(end, start + MAX_SEARCHED)
        lines = []
        for line in _lines_with(file, _marks(question_id, group_id), start, limit):
            lines.append(line)
            if len(lines) == MAX_EVENTS:
                break
    events = [event for line in lines if (event := _parsed(line)) is not None]
    return Found(events, limit < end or len(lines) == MAX_EVENTS)


class LastEvents:
    """The last event of rollouts that go on, found once and then followed as the file grows."""

    # Of what was written before the first look, this much of the end is searched.
    SEARCHED_BEFORE = 32 * 1024**2
    SEARCHED_PER_LOOK = 32 * 1024**2

    def __init__(self, path: Path) -> None:
        self._path = path
        self._end = 0
        self._last: dict[tuple[str, str], dict[str, Any]] = {}

    def look(self, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
        """The last event of each of the `wanted` (question id, group id) that has one.

        Where a rollout's last event lies further back than was searched, it has none here. Raises
        OSError where the file cannot be read.
        """
        with self._path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < self._end:
                self._end, self._last = 0, {}
            reach = self.SEARCHED_PER_LOOK if self._end else self.SEARCHED_BEFORE
            start = max(self._end, size - reach)
            new = wanted - self._last.keys() if self._end else set()
            if new:
                self._take_in(file, max(0, start - reach), start, new)
            self._take_in(file, start, size, wanted)
        self._end = size
        self._last = {key: event for key, event in self._last.items() if key in wanted}
        return self._last

    def _take_in(self, file: BinaryIO, start: int, end: int, wanted: set[tuple[str, str]]) -> None:
        """Note the last event of the wanted rollouts between two offsets."""
        by_mark = {_where(*key): key for key in wanted}
        for line in _lines(file, start, end):
            at = line.find(b'"sample_id": ', 0, 200)
            stop = line.find(b'", "', line.find(b'"group_id": "', at) + 13)
            if at >= 0 and (key := by_mark.get(line[at : stop + 1])) is not None:
                event = _parsed(line)
                if event is not None:
                    self._last[key] = event


def moment_of(event: dict[str, Any]) -> float | None:
    """When an event was recorded."""
    try:
        return datetime.datetime.fromisoformat(event["timestamp"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return None


def _where(question_id: str, group_id: str) -> bytes:
    """How the json_recorder writes whose event a line is."""
    return (
        f'"sample_id": {json.dumps(question_id, ensure_ascii=False)},'
        f' "group_id": {json.dumps(group_id)}'
    ).encode(errors="replace")


def _marks(question_id: str, group_id: str) -> tuple[bytes, ...]:
    escaped = f'"sample_id": {json.dumps(question_id)}, "group_id": {json.dumps(group_id)}'
    return tuple(dict.fromkeys((_where(question_id, group_id), escaped.encode())))


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:  # half a line, left by a process that was killed
        return None
    return event if isinstance(event, dict) else None


def _around(file: BinaryIO, size: int, moment: float) -> tuple[int, int]:
    """Two offsets, near each other: lines before the first are older, behind the second are not."""
    low, high = 0, size
    while high - low > 1 << 16:
        middle = (low + high) // 2
        found = _next_moment(file, middle, high)
        if found is None or found >= moment:
            high = middle
        else:
            low = middle
    # A line that begins before `high` may end behind it.
    return low, min(size, high + _rest_of_line(file, high))


def _rest_of_line(file: BinaryIO, offset: int) -> int:
    file.seek(offset)
    return len(file.readline(LONGEST_LINE))


def _next_moment(file: BinaryIO, offset: int, end: int) -> float | None:
    """The time of the first whole line behind `offset`; None where there is none before `end`."""
    for line in _lines(file, offset, end, skip_first=True):
        if (event := _parsed(line)) is not None and (moment := moment_of(event)) is not None:
            return moment
    return None


def _lines(file: BinaryIO, start: int, end: int, skip_first: bool = False) -> Iterator[bytes]:
    """The lines that begin between two offsets; the first may be the rest of one."""
    file.seek(start)
    if skip_first:
        file.readline(LONGEST_LINE)
    while file.tell() < end and (line := file.readline(LONGEST_LINE)):
        yield line


def _lines_with(file: BinaryIO, marks: tuple[bytes, ...], start: int, end: int) -> Iterator[bytes]:
    """The lines between two offsets that contain one of the marks."""
    rest = b""
    file.seek(start)
    position = start
    while position < end:
        chunk = file.read(min(CHUNK, end - position))
        if not chunk:
            break
        position += len(chunk)
        block = rest + chunk
        whole, _, rest = block.rpartition(b"\n")
        if len(rest) > LONGEST_LINE:
            rest = b""
        if any(mark in whole for mark in marks):
            yield from _marked(whole, marks)
    if any(mark in rest for mark in marks):
        yield rest


def _marked(block: bytes, marks: tuple[bytes, ...]) -> Iterator[bytes]:
    for line in block.split(b"\n"):
        if any(mark in line for mark in marks):
            yield line
