"""Gathers concurrent requests into batches for the one thread of a device. Knows no torch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from nanoeval.eval import RolloutSystemError

# The share of padding that a batch may hold; under the 10 % that a batch should cost at most.
MAX_PADDING = 0.08
# How long the thread listens for more requests before it starts on those it has.
GATHER_SECONDS = 0.005

logger = structlog.get_logger(component=__name__)


@dataclass(frozen=True)
class Encoded:
    """A request made ready for the device.

    Only requests of one `kind` share a batch. `length` is the number of tokens that padding makes
    equal in a batch.
    """

    kind: Hashable
    length: int
    payload: Any


class Backend(Protocol):
    """What the thread drives. It is made, and its methods are called, on that thread alone."""

    # Tokens of a batch at most, with padding; None = no limit.
    max_tokens: int | None

    def encode(self, requests: Sequence[Any]) -> list[Encoded]:
        """Make requests ready, in bulk."""
        ...

    def run(self, batch: Sequence[Encoded]) -> list[Any]:
        """Results of a batch of one kind, in its order."""
        ...

    def free_memory_after(self, error: Exception) -> bool:
        """Whether `error` means "out of memory"; what can be freed then is free."""
        ...


@dataclass
class BatchStatistics:
    """What the device has done: batches, rows, tokens, and how many of the tokens were padding."""

    batches: int = 0
    requests: int = 0
    tokens: int = 0
    padding: int = 0
    out_of_memory: int = 0
    truncated: int = 0

    def count(self, lengths: Sequence[int]) -> None:
        """Count one forward pass over rows of these lengths, padded to the longest."""
        self.tokens += sum(lengths)
        self.padding += max(lengths) * len(lengths) - sum(lengths)

    @property
    def padding_share(self) -> float:
        """Padding as a share of all tokens that went through the device; 0 before the first."""
        return self.padding / max(1, self.padding + self.tokens)


def plan_batches(
    lengths: Sequence[int],
    max_tokens: int | None,
    max_rows: int | None = None,
    max_padding: float = MAX_PADDING,
) -> list[list[int]]:
    """Cut requests of these lengths into batches of like length; indices, the longest first.

    A batch holds at most `max_rows` rows and `max_tokens` tokens with padding (but at least one
    row), and at most the share `max_padding` of padding. None = no such limit. The longest first,
    so that a device too small shows at once.
    """
    batches: list[list[int]] = []
    longest = total = 0
    # Equal lengths stay in their order, so that the cut does not depend on anything else.
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        rows = len(batches[-1]) + 1 if batches else 0
        is_full = (
            not batches
            or (max_rows is not None and rows > max_rows)
            or (max_tokens is not None and rows * longest > max_tokens)
            or rows * longest - total - length > max_padding * rows * longest
        )
        if is_full:
            batches.append([])
            longest, total = length, 0
        batches[-1].append(index)
        total += length
    return batches


@dataclass(frozen=True)
class _Expect:
    requests: tuple[Any, ...]


@dataclass(frozen=True)
class _Ask:
    request: Any
    future: Future[Any]


class DeviceThread:
    """One thread that owns a device and serves requests, gathered into batches by length.

    Requests are hashable; equal ones that wait together are computed once. An out-of-memory halves
    the batch, and all later ones, and goes on; a single request that does not fit fails as a
    RolloutSystemError.
    """

    def __init__(
        self, make_backend: Callable[[BatchStatistics], Backend], max_rows: int | None = None
    ) -> None:
        self.statistics = BatchStatistics()
        self._make_backend = make_backend
        self._backend: Backend
        self._max_tokens: int | None = None
        self._max_rows = max_rows
        self._arrivals: queue.SimpleQueue[_Ask | _Expect | None] = queue.SimpleQueue()
        self._waiting: dict[Any, list[Future[Any]]] = {}
        self._encoded: dict[Any, Encoded] = {}
        self._planned: dict[Any, tuple[Any, ...]] = {}
        self._results: dict[Any, Any] = {}
        self._is_closed = False
        self.loaded: Future[None] = Future()
        # A daemon, so that a forward pass never keeps a process from ending.
        self._thread = threading.Thread(target=self._serve, name="nanoeval-device", daemon=True)

    def start(self) -> Future[None]:
        """Start the thread; the future is done when the backend is made."""
        self._thread.start()
        return self.loaded

    def submit(self, request: Any) -> Future[Any]:
        """Queue a request. Cancelling the future drops the request if it has not begun."""
        if self._is_closed:
            raise RuntimeError("the model is closed; enter it again (`async with model:`)")
        future: Future[Any] = Future()
        self._arrivals.put(_Ask(request, future))
        return future

    def expect(self, requests: Iterable[Any]) -> None:
        """Cut all these requests into batches now, before they are submitted.

        The first of a batch to be submitted has the whole batch computed. So the batches, and with
        them the last bits of every number, do not depend on timing, on concurrency or on which
        requests an interrupted run had done before.
        """
        self._arrivals.put(_Expect(tuple(dict.fromkeys(requests))))

    def close(self) -> None:
        """End the thread after the batch at hand and fail what still waits."""
        if not self._is_closed:
            self._is_closed = True
            self._arrivals.put(None)

    def join(self, timeout: float) -> None:
        """Wait until the thread has ended, at most `timeout` seconds."""
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _serve(self) -> None:
        try:
            self._backend = self._make_backend(self.statistics)
            self._max_tokens = self._backend.max_tokens
        except BaseException as error:  # handed to whoever waits for the model
            self.loaded.set_exception(error)
            return
        self.loaded.set_result(None)
        try:
            while self._take_arrivals() and not self._is_closed:
                if self._waiting:
                    self._run_next()
        finally:
            self._is_closed = True
            for futures in self._waiting.values():
                for future in futures:
                    future.cancel()
            self._waiting.clear()

    def _take_arrivals(self) -> bool:
        """Move what has arrived into `_waiting`, encoded; waits if nothing does. False = closed."""
        arrivals: list[_Ask | _Expect | None] = []
        timeout: float | None = None
        if self._waiting:
            timeout = 0.0
        while True:
            try:
                arrivals.append(self._arrivals.get(timeout != 0.0, timeout))
            except queue.Empty:
                break
            if arrivals[-1] is None:
                for arrival in arrivals:
                    if isinstance(arrival, _Ask):
                        arrival.future.cancel()
                return False
            timeout = GATHER_SECONDS
        for arrival in arrivals:
            if isinstance(arrival, _Expect):
                self._plan(arrival.requests)
        self._accept([arrival for arrival in arrivals if isinstance(arrival, _Ask)])
        return True

    def _plan(self, requests: tuple[Any, ...]) -> None:
        self._planned.clear()
        self._results.clear()
        encoded = self._encode(requests)
        by_kind: dict[Hashable, list[Any]] = {}
        for request, ready in encoded.items():
            by_kind.setdefault(ready.kind, []).append(request)
        for members in by_kind.values():
            for batch in self._cut(members):
                self._planned.update(dict.fromkeys(batch, tuple(batch)))

    def _accept(self, asks: Sequence[_Ask]) -> None:
        for ask in asks:
            if ask.request in self._results:
                _resolve(ask.future, self._results[ask.request])
            else:
                self._waiting.setdefault(ask.request, []).append(ask.future)
        self._encode([request for request in self._waiting if request not in self._encoded])

    def _encode(self, requests: Sequence[Any]) -> dict[Any, Encoded]:
        """Encode in bulk; where that fails, one by one, and fail those that cannot be."""
        ready: dict[Any, Encoded] = {}
        try:
            if requests:
                ready = dict(zip(requests, self._backend.encode(requests), strict=True))
        except Exception:
            for request in requests:
                try:
                    ready[request] = self._backend.encode([request])[0]
                except Exception as error:  # the request's own outcome
                    self._fail(request, error)
        self._encoded.update(ready)
        return ready

    def _cut(self, requests: Sequence[Any]) -> list[list[Any]]:
        lengths = [self._encoded[request].length for request in requests]
        batches = plan_batches(lengths, self._max_tokens, self._max_rows)
        return [[requests[index] for index in batch] for batch in batches]

    def _run_next(self) -> None:
        """Run the batch that holds the request that has waited longest."""
        for request, futures in list(self._waiting.items()):
            if all(future.cancelled() for future in futures):
                del self._waiting[request]
        if not self._waiting:
            return
        oldest = next(iter(self._waiting))
        batch: Sequence[Any]
        if oldest in self._planned:
            batch = self._planned[oldest]
        else:
            kind = self._encoded[oldest].kind
            alike = [
                request
                for request in self._waiting
                if request not in self._planned and self._encoded[request].kind == kind
            ]
            batch = next(batch for batch in self._cut(alike) if oldest in batch)
        self._run(batch)

    def _run(self, batch: Sequence[Any]) -> None:
        """Run a batch, in parts where the limits, since lowered, say so."""
        left = list(batch)
        while left:
            part = self._cut(left)[0]
            try:
                results = self._backend.run([self._encoded[request] for request in part])
            except Exception as error:
                is_out_of_memory = self._backend.free_memory_after(error)
                if is_out_of_memory and len(part) > 1:
                    self._halve(part)
                    continue
                for request in part:
                    encoded = self._encoded[request]
                    self._fail(request, _too_large(encoded, error) if is_out_of_memory else error)
            else:
                self.statistics.batches += 1
                self.statistics.requests += len(part)
                for request, result in zip(part, results, strict=True):
                    self._finish(request, result)
            done = set(part)
            left = [request for request in left if request not in done]

    def _halve(self, part: Sequence[Any]) -> None:
        self.statistics.out_of_memory += 1
        longest = max(self._encoded[request].length for request in part)
        rows = len(part) // 2
        # Tokens, not rows, fill memory: shorter requests may still share larger batches.
        self._max_tokens = rows * longest
        logger.warning(
            f"out of memory with {len(part)} requests of up to {longest} tokens;"
            f" going on with at most {self._max_tokens} tokens a batch"
        )

    def _finish(self, request: Any, result: Any) -> None:
        del self._encoded[request]
        if request in self._planned:
            self._results[request] = result
        for future in self._waiting.pop(request, ()):
            _resolve(future, result)

    def _fail(self, request: Any, error: Exception) -> None:
        self._encoded.pop(request, None)
        # Asked again, a request that failed is computed again, on its own.
        self._planned.pop(request, None)
        for future in self._waiting.pop(request, ()):
            if future.set_running_or_notify_cancel():
                future.set_exception(error)


def _resolve(future: Future[Any], result: Any) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(result)


def _too_large(encoded: Encoded, cause: Exception) -> RolloutSystemError:
    error = RolloutSystemError(
        f"out of memory on a single prompt of {encoded.length} tokens; use a smaller dtype, another"
        " device or a smaller model"
    )
    error.__cause__ = cause
    return error
