"""How a run went over time, from a sample of its outcomes that grows with the run.

Pure numbers: knows neither SQL nor Streamlit. Times are seconds since the epoch.
"""

from __future__ import annotations

import sqlite3
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoeval import _inspect_run, _schema
from nanoeval._statistics import Z_95

FloatArray = NDArray[Any]

# Between one and two times as many outcomes are kept; beyond, every second one is dropped.
SAMPLE_SIZE = 20_000
POINTS = 120
# The speed of a run is that of its last so many seconds.
RECENT = 60.0
_, STATE, START, END, SCORE = range(5)


@dataclass(frozen=True, slots=True)
class Curve:
    """A mean over time: row by row the time, the mean of all scores so far, its 95 % band."""

    time: FloatArray
    mean: FloatArray
    low: FloatArray
    high: FloatArray


@dataclass(frozen=True, slots=True)
class Flow:
    """Per bucket of time: its begin, ended rollouts per second, rollouts in flight at its end."""

    time: FloatArray
    per_second: FloatArray
    in_flight: FloatArray


@dataclass(frozen=True, slots=True)
class Latency:
    """Durations of rollouts in seconds: counts between the bin edges, and percentiles."""

    edges: FloatArray
    counts: FloatArray
    p50: float
    p90: float
    p99: float


class History:
    """A sample of the outcomes of one eval: one of each `step` in the order in which they ended.

    `step` is 1 up to SAMPLE_SIZE outcomes, so that small runs are shown exactly. May be used by
    several threads.
    """

    def __init__(self, eval_id: int) -> None:
        self._eval_id = eval_id
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self.step = 1
        self.last = 0
        self.rows: FloatArray = np.empty((0, 5))

    def update(self, db: sqlite3.Connection) -> None:
        """Take in what has ended since the last update."""
        with self._lock:
            last = _inspect_run.last_outcome(db)
            if last < self.last:  # the file was replaced, by a backup for instance
                self._reset()
            while (last - self.last) // self.step > 2 * SAMPLE_SIZE:
                self._thin()
            last -= last % self.step
            if last <= self.last:
                return
            new = _inspect_run.sampled_outcomes(db, self._eval_id, self.last, last, self.step)
            added = np.array(list(new), dtype=float).reshape(-1, 5)
            self.rows = np.concatenate([self.rows, added])
            self.last = last
            while len(self.rows) > 2 * SAMPLE_SIZE:
                self._thin()

    def _thin(self) -> None:
        self.step *= 2
        self.rows = self.rows[::2]

    def accuracy(self) -> Curve | None:
        """The mean score over time; None before the first score.

        The band treats attempts as independent: Wilson's for scores of 0 and 1, else the normal
        one.
        """
        scored = self.rows[~np.isnan(self.rows[:, SCORE])]
        if not len(scored):
            return None
        scored = scored[np.argsort(scored[:, END], kind="stable")]
        scores = scored[:, SCORE]
        count = np.arange(1, len(scores) + 1)
        mean = np.cumsum(scores) / count
        n = count * self.step
        if np.isin(scores, (0.0, 1.0)).all():
            low, high = _wilson(mean, n)
        else:
            spread = np.sqrt(np.maximum(np.cumsum(scores**2) / count - mean**2, 0.0))
            low, high = mean - Z_95 * spread / np.sqrt(n), mean + Z_95 * spread / np.sqrt(n)
        at = _spread_points(scored[:, END])
        return Curve(scored[at, END], mean[at], low[at], high[at])

    def flow(self, starts_in_flight: list[float], now: float | None) -> Flow | None:
        """Throughput and rollouts in flight; None before the first end.

        `now` is where the time axis ends, None for a run that is over.
        """
        if not len(self.rows):
            return None
        starts, ends = np.sort(self.rows[:, START]), np.sort(self.rows[:, END])
        first, last = float(starts[0]), max(float(ends[-1]), now or 0.0)
        width = max((last - first) / POINTS, 1e-3)
        # Whole buckets only: the end of one that has just begun would look like a collapse.
        n = max(int((last - first) / width), 1)
        if now is None:  # over: the buckets end with the run
            width = max((last - first) / n, 1e-3)
        edges = np.linspace(first, first + n * width, n + 1)
        per_second = np.diff(np.searchsorted(ends, edges, "right")) * self.step / width
        ended = np.searchsorted(starts, edges, "right") - np.searchsorted(ends, edges, "right")
        still = np.searchsorted(np.sort(starts_in_flight), edges, "right")
        return Flow(edges[:-1], per_second, (ended * self.step + still)[1:])

    def recent_rate(self, now: float) -> float | None:
        """Counted outcomes per second of late; None where there were none."""
        counted = np.isin(self.rows[:, STATE], (_schema.SCORED, _schema.FAILED))
        ends = self.rows[counted, END]
        if not len(ends):
            return None
        began = max(float(self.rows[:, START].min()), now - RECENT)
        recent = int((ends > began).sum()) * self.step
        return recent / max(now - began, 1.0) if recent else None

    def latency(self) -> Latency | None:
        """How long rollouts took; None before the first end."""
        if not len(self.rows):
            return None
        seconds = np.maximum(self.rows[:, END] - self.rows[:, START], 1e-4)
        low, high = float(seconds.min()), float(seconds.max())
        if high < low * 1.5:
            low, high = low / 1.25, high * 1.25
        edges = np.geomspace(low, high * 1.0001, 41)
        counts, _ = np.histogram(seconds, edges)
        p50, p90, p99 = (float(p) for p in np.percentile(seconds, (50, 90, 99)))
        return Latency(edges, counts * float(self.step), p50, p90, p99)


def _wilson(mean: FloatArray, n: NDArray[np.int_]) -> tuple[FloatArray, FloatArray]:
    """Wilson's interval for arrays; see `_statistics.wilson_interval`."""
    z2 = Z_95**2
    centre = (mean + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * np.sqrt(mean * (1 - mean) / n + z2 / (4.0 * n * n))
    return np.maximum(centre - half, 0.0), np.minimum(centre + half, 1.0)


def _spread_points(times: FloatArray) -> NDArray[np.int_]:
    """Indexes of about POINTS of the sorted `times`, evenly spread over time, the last included."""
    edges = np.linspace(times[0], times[-1], POINTS)
    at = np.searchsorted(times, edges, "right") - 1
    return np.unique(np.append(at, len(times) - 1))
