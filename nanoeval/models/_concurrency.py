"""How many requests to keep in flight: a fixed number, or the most that pays. Knows no HTTP."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any

START = 16
# Factor of a step: coarse until the first one that did not pay, fine from then on.
COARSE = 2.0
FINE = 1.25
SHRINK = 0.7
# A latency of this many times the last one, at the same limit, is a server in trouble.
SLOWED = 2.0
# Throughput must rise by this share of what the added slots promise, or they are given back.
WORTH = 0.25
# Fewer refusals than this share come at any load (a gateway's, a node's); throughput judges them.
TOLERATED = 0.25
HIGHEST = 4096
SMALLEST_WINDOW = 16


class AdaptiveLimit:
    """Raises the limit while throughput grows with it; backs off when throttled or slowed down.

    It multiplies up, as TCP's slow start does (RFC 5681), because steps of one creep; after a step
    that did not pay it returns to the limit that did and tries again `patience` windows later.
    """

    def __init__(self, start: int = START, highest: int = HIGHEST, patience: int = 10) -> None:
        self.limit = start
        self._highest = highest
        self._patience = patience
        self._rest = 0
        self._growth = COARSE
        # Limit, throughput and latency of the last level that paid.
        self._paid: tuple[int, float, float] | None = None

    def learn(self, throughput: float, latency: float, throttled: bool) -> None:
        """Take one window's answers/s, median latency (seconds) and whether it was throttled."""
        if throttled or self._is_slowed(latency):
            self.limit = max(1, int(self.limit * SHRINK))
            self._paid, self._rest, self._growth = None, self._patience, FINE
        elif self._rest > 0:
            self._rest -= 1
            self._paid = (self.limit, throughput, latency)
        elif self._paid is None or self._pays(throughput, latency):
            self._paid = (self.limit, throughput, latency)
            self.limit = min(self._highest, max(self.limit + 1, int(self.limit * self._growth)))
        else:
            self.limit, self._rest, self._growth = self._paid[0], self._patience, FINE

    def _is_slowed(self, latency: float) -> bool:
        """Whether the same number in flight takes much longer than it did."""
        if self._paid is None or self._paid[0] < self.limit:
            return False
        return latency > SLOWED * self._paid[2] > 0

    def _pays(self, throughput: float, latency: float) -> bool:
        assert self._paid is not None
        limit, old_throughput, old_latency = self._paid
        if self.limit <= limit:
            return True
        promised = self.limit / limit - 1
        gained = throughput / old_throughput - 1
        slowed = latency / old_latency - 1 if old_latency > 0 else 0.0
        return gained >= WORTH * promised and slowed <= promised


class Slot:
    """Waits for its turn and holds it for the block: one request in flight. Enter it once.

    `report` says how the request went. A class and not a generator: it is entered for every
    request, and costs a fraction this way.
    """

    __slots__ = ("_limiter", "_started", "_throttled")

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._throttled = False

    def report(self, *, throttled: bool) -> None:
        self._throttled = throttled

    async def __aenter__(self) -> Slot:
        self._started = await self._limiter.acquire()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        self._limiter.release(self._started, self._throttled)


class Limiter:
    """Lets as many requests through at once as its limit says, first come first served.

    A window opens when those in flight under the last limit have ended, and is judged once as many
    more have; only where requests were waiting, for an idle limiter says nothing about the server.
    """

    def __init__(
        self,
        limit: int | AdaptiveLimit,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._adaptive = None if isinstance(limit, int) else limit
        self._fixed = limit if isinstance(limit, int) else 0
        self._clock = clock
        self._in_flight = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._open_window()

    @property
    def limit(self) -> int:
        """The present limit."""
        return self._fixed if self._adaptive is None else self._adaptive.limit

    def slot(self) -> Slot:
        """For a block that waits for a free slot and holds it."""
        return Slot(self)

    async def acquire(self) -> float:
        """Wait for a free slot and take it; returns the moment, for `release`."""
        if self._in_flight < self.limit and not self._waiting:
            self._in_flight += 1
        else:
            await self._turn()
        return self._clock()

    def release(self, started: float, throttled: bool) -> None:
        """Give back a slot that was taken at `started`."""
        self._in_flight -= 1
        if self._adaptive is not None:
            self._count(self._adaptive, self._clock() - started, throttled)
        self._wake()

    async def _turn(self) -> None:
        self._saturated = True
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._in_flight -= 1  # the slot was handed over in the same moment
                self._wake()
            raise

    def _wake(self) -> None:
        while self._waiting and self._in_flight < self.limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self._in_flight += 1
                turn.set_result(None)

    def _open_window(self, left_over: int = 0) -> None:
        self._opened = self._clock()
        self._left_over = left_over
        self._latencies: list[float] = []
        self._num_throttled = 0
        self._saturated = bool(self._waiting)

    def _count(self, limit: AdaptiveLimit, latency: float, throttled: bool) -> None:
        if self._left_over > 0:
            self._left_over -= 1
            if self._left_over == 0:
                self._opened = self._clock()
            return
        self._latencies.append(latency)
        self._num_throttled += throttled
        elapsed = self._clock() - self._opened
        if len(self._latencies) < max(limit.limit, SMALLEST_WINDOW) or elapsed <= 0:
            return
        is_throttled = self._num_throttled > TOLERATED * len(self._latencies)
        if self._saturated or is_throttled:
            throughput = (len(self._latencies) - self._num_throttled) / elapsed
            limit.learn(throughput, median(self._latencies), is_throttled)
        self._open_window(left_over=self._in_flight)
