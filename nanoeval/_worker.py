"""Runs the rollouts of one eval in one process: claim, evaluate, finish. Knows no SQL.

A worker hands in what is finished and claims more in one transaction (`Store.exchange`), while the
rollouts it has go on. How many it may have is the store's business.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from nanoeval import _codec, _outcomes, _schema
from nanoeval._database_file import StoreError
from nanoeval._store import ALONE_AFTER, BATCH_BYTES, Claim, Exchange, Finish, Progress
from nanoeval.asyncio_utils import cancel_task, uninterrupted
from nanoeval.eval import Eval, RolloutSystemError, RunnerArgs
from nanoeval.recorder import set_default_recorder
from nanoeval.recorder_protocol import RecorderProtocol
from nanoeval.setup import say

T = TypeVar("T")

# Enough to make a transaction worth its cost, few enough to overlap it with rollouts.
CLAIM_BATCH = 1024
# With more bytes of results than this still to be stored, no further rollout begins.
MAX_HELD_BYTES = 4 * BATCH_BYTES
# With nothing claimed, look again this often for what other processes put back or change.
FIRST_POLL = 0.005
LONGEST_POLL = 0.25
LONGEST_BACKOFF = 60.0
# The longest that a server which names its own wait is obeyed.
LONGEST_RETRY_AFTER = 3600.0
# A person is told of a type of error once a rollout has failed so often, the last time with it.
TRIES_TO_TELL = 3


@dataclass(frozen=True)
class Job:
    """One eval as a worker needs it."""

    eval_id: int
    run_id: str
    eval: Eval[Any, Any]
    runner: RunnerArgs
    recorder: RecorderProtocol


class ClaimSource(Protocol):
    """Where a worker gets its claims, and hands in what came of them: a `Store`, near or far."""

    async def exchange(
        self,
        executor_id: int,
        eval_id: int,
        finishes: Sequence[Finish],
        wanted: int,
        num_sharers: int = 1,
    ) -> Exchange: ...

    async def release(self, executor_id: int, eval_id: int) -> None: ...


class FatalRolloutError(Exception):
    """`evaluate` raised what ends the run. `error` is the exception, `task_name` its task."""

    def __init__(self, task_name: str, error: BaseException) -> None:
        super().__init__(task_name, error)
        self.task_name = task_name
        self.error = error


class TooManyFailuresError(RuntimeError):
    """More rollouts raised unexpected exceptions than `fail_on_error` allows."""


class Worker:
    """Serves one eval until it is done; see `serve`."""

    def __init__(
        self,
        store: ClaimSource,
        executor_id: int,
        job: Job,
        num_sharers: int = 1,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self._store = store
        self._executor_id = executor_id
        self._job = job
        self._num_sharers = num_sharers
        self._on_progress = on_progress
        self._timeout = job.runner.rollout_timeout
        self._capacity = self._share_of(job.runner.concurrency)
        self._running: dict[int, asyncio.Task[None]] = {}
        self._started_at: dict[int, tuple[Claim, float]] = {}
        self._finished: list[Finish] = []
        self._something_finished = asyncio.Event()
        # Of results that the database has not taken in yet.
        self._held_bytes = 0
        self._has_room_for_results = asyncio.Event()
        self._is_stopping = False
        self._serving: asyncio.Task[Any] | None = None
        self._cancelled_before = 0
        self._is_to_stop = False
        self._fatal: list[FatalRolloutError] = []
        self._told: set[str] = set()

    def rollouts_in_flight(self) -> list[tuple[str, float]]:
        """(task name, start time) of the rollouts at work, oldest first. Safe from any thread."""
        at_work = sorted(self._started_at.copy().values(), key=lambda item: item[1])
        return [(f"{c.question_id}.{c.attempt_id}.{c.retry_idx}", began) for c, began in at_work]

    def start_no_more(self) -> None:
        """Begin no further rollout: a cancellation is on its way. Safe from any thread."""
        self._is_to_stop = True

    async def serve(self) -> None:
        """Run rollouts until the eval is done or no longer running.

        However this ends, rollouts at work are cancelled and awaited, finished ones are handed in
        and claims are given back. Raises a group of FatalRolloutErrors if `evaluate` ended the
        run, StoreError if the database failed, and what the eval's `_context` raises.
        """
        self._serving = asyncio.current_task()
        assert self._serving is not None
        # A caller may have been cancelled, and have decided to go on, before.
        self._cancelled_before = self._serving.cancelling()
        try:
            await self._serve_in_context()
        except Exception as error:
            if not self._fatal:
                raise
            raise ExceptionGroup("rollouts ended the run", [*self._fatal, error]) from None
        if self._fatal:
            raise ExceptionGroup("rollouts ended the run", self._fatal)

    async def _serve_in_context(self) -> None:
        async with AsyncExitStack() as contexts:
            try:
                await self._serve(contexts)
            except StoreError:
                await uninterrupted(self._end_rollouts())
                raise
            except BaseException:
                await uninterrupted(self._wind_up())
                raise
            await uninterrupted(self._wind_up())

    async def _wind_up(self) -> None:
        """End the rollouts at work, hand in what is finished and give back the rest."""
        await self._end_rollouts()
        while self._finished:
            await self._exchange(wanted=0)
        await self._store.release(self._executor_id, self._job.eval_id)

    async def _end_rollouts(self) -> None:
        # From here on a cancelled rollout is ours, not the eval's own doing. What it makes of that,
        # a result or an error of its own, is not what an undisturbed one would have come to.
        self._is_stopping = True
        rollouts = list(self._running.values())
        for rollout in rollouts:
            rollout.cancel()
        if rollouts:
            await asyncio.wait(rollouts)

    async def _serve(self, contexts: AsyncExitStack) -> None:
        # Owned by `_running`, which `_wind_up` cancels and awaits. A TaskGroup would do the same,
        # at the cost of another turn of the loop per rollout.
        start = asyncio.get_running_loop().create_task
        is_entered = False
        poll = FIRST_POLL
        wanted = self._room()
        asking = start(self._exchange(wanted))
        try:
            while not self._fatal:
                exchange = await asking
                if exchange.is_lease_lost:
                    await self._drop_all_rollouts()
                    wanted = self._room()
                    asking = start(self._exchange(wanted))
                    continue
                progress = exchange.progress
                self._capacity = self._share_of(progress.concurrency)
                self._on_progress(progress)
                if progress.state != "running" or progress.is_done:
                    return
                self._stop_if_too_many_failed(progress)
                room = self._room(exchange.num_claims)
                is_there_more = exchange.num_claims == wanted and room > 0
                if is_there_more:
                    # The database works on the next ones while these are started.
                    wanted = room
                    asking = start(self._exchange(wanted))
                    await asyncio.sleep(0)
                if exchange.num_claims and not is_entered:
                    await self._enter_eval(contexts)
                    is_entered = True
                for claim in exchange.claims():
                    self._running[claim.task_id] = start(self._rollout(claim))
                if not is_there_more:
                    poll = FIRST_POLL if exchange.num_claims else min(2 * poll, LONGEST_POLL)
                    await self._wait(exchange.next_due, poll)
                    wanted = self._room()
                    asking = start(self._exchange(wanted))
        finally:
            # What it brings too late is given back by `_wind_up`.
            await cancel_task(asking)

    def _is_cancelled(self) -> bool:
        """Whether this run was told to stop, though the loop has not come round to stopping it."""
        return self._serving is not None and self._serving.cancelling() > self._cancelled_before

    def _room(self, num_coming: int = 0) -> int:
        """How many more rollouts than those `num_coming` this process may have, at most a batch."""
        return max(0, int(min(CLAIM_BATCH, self._capacity - len(self._running) - num_coming)))

    async def _enter_eval(self, contexts: AsyncExitStack) -> None:
        eval, name = self._job.eval, self._job.eval.get_name()
        contexts.enter_context(set_default_recorder(self._job.recorder, "", ""))
        try:
            await eval.__aenter__()
        except asyncio.CancelledError as error:
            if self._is_cancelled():
                raise
            raise RuntimeError(f"{name}._context() raised CancelledError by itself") from error
        except Exception as error:
            error.add_note(f"raised by {name}._context()")
            raise

        async def leave(*exc_info: Any) -> bool | None:
            try:
                return await eval.__aexit__(*exc_info)
            except Exception as error:
                if error is not exc_info[1]:
                    error.add_note(f"raised by {name}._context() as it was left")
                raise

        contexts.push_async_exit(leave)

    def _share_of(self, concurrency: int | None) -> float:
        """How many rollouts this process may have, so that what it cannot keep up with others can.

        The store sees to it that all together never have more than `concurrency`.
        """
        return math.inf if concurrency is None else math.ceil(concurrency / self._num_sharers)

    async def _exchange(self, wanted: int) -> Exchange:
        finished = self._finished_batch()
        exchange = await self._store.exchange(
            self._executor_id, self._job.eval_id, finished, wanted, self._num_sharers
        )
        self._held_bytes -= sum([_size(finish) for finish in finished])
        self._has_room_for_results.set()
        return exchange

    def _finished_batch(self) -> list[Finish]:
        """Take what is to be handed in: all that is finished, or as much as a transaction holds."""
        n = len(self._finished)
        if self._held_bytes > BATCH_BYTES:
            sizes = itertools.accumulate(map(_size, self._finished))
            n = next((i for i, total in enumerate(sizes, 1) if total >= BATCH_BYTES), n)
        batch, self._finished = self._finished[:n], self._finished[n:]
        if not self._finished:
            self._something_finished.clear()
        return batch

    async def _wait(self, next_due: float | None, poll: float) -> None:
        """Wait until a rollout has finished, a queued task is due, or it is time to look again."""
        timeout = poll if self._num_sharers > 1 else LONGEST_POLL
        if next_due is not None:
            timeout = min(timeout, max(next_due - time.time(), FIRST_POLL))
        try:
            async with asyncio.timeout(timeout):
                await self._something_finished.wait()
        except TimeoutError:
            return
        # Let the others that end in this turn of the loop share the transaction.
        await asyncio.sleep(0)

    async def _drop_all_rollouts(self) -> None:
        """The claims are void: others run these tasks now."""
        dropped = list(self._running.values())
        self._running.clear()
        for rollout in dropped:
            rollout.cancel()
        if dropped:
            await asyncio.wait(dropped)
        self._finished.clear()
        self._held_bytes = 0

    async def _rollout(self, claim: Claim) -> None:
        """Run one claim to its end. Never raises: what went wrong becomes an outcome."""
        while self._held_bytes > MAX_HELD_BYTES:
            self._has_room_for_results.clear()
            await self._has_room_for_results.wait()
        if self._is_to_stop or self._is_cancelled():
            return  # it waited its turn behind rollouts that compute; the claim is given back
        started_at = time.time()
        group_id = f"{claim.attempt_id}.{claim.retry_idx}"
        self._started_at[claim.task_id] = (claim, started_at)
        timeout = self._timeout
        limit = None
        try:
            task = _codec.loads(claim.payload)
            if claim.losses > ALONE_AFTER and claim.losses > self._job.runner.max_retries:
                raise _outcomes.LostRolloutError(
                    f"the worker processes that ran this rollout died {claim.losses} times, in the"
                    " end with no other at work, so most likely because of it (out of memory?)"
                )
            with set_default_recorder(self._job.recorder, claim.question_id, group_id):
                if timeout is None:
                    result = await self._job.eval.evaluate(task)
                else:
                    async with asyncio.timeout(timeout) as limit:
                        result = await self._job.eval.evaluate(task)
                if self._is_stopping:
                    return  # the claim is given back
                finish = self._scored(claim, started_at, result)
                self._record_completed()
        except BaseException as error:
            if self._running.get(claim.task_id) is not asyncio.current_task():
                return  # the claim was taken back
            if self._is_stopping:
                return  # the claim is given back
            if limit is not None and limit.expired() and isinstance(error, TimeoutError):
                error = _with_cause(
                    RolloutSystemError(f"the rollout took longer than rollout_timeout={timeout} s"),
                    error,
                )
            finish = self._failed(claim, started_at, error)
        finally:
            del self._started_at[claim.task_id]
        if self._running.pop(claim.task_id, None) is not None:
            self._finished.append(finish)
            self._held_bytes += _size(finish)
            self._something_finished.set()

    def _scored(self, claim: Claim, started_at: float, result: Any) -> Finish:
        return Finish(
            claim,
            _schema.SCORED,
            started_at,
            time.time(),
            payload=_codec.dumps(result, "the result of task %r", claim.question_id),
            score=_outcomes.score_of(result),
            preview=_outcomes.preview(result),
        )

    def _failed(self, claim: Claim, started_at: float, error: BaseException) -> Finish:
        """The outcome of a rollout that raised: tried again, recorded, or the end of the run."""
        try:
            return self._sorted_out(claim, started_at, error)
        except Exception as unstorable:  # anybody's exception classes and tasks
            unstorable.add_note(f"while a {type(error).__name__} of evaluate() was being stored")
            finish = _raised(claim, started_at, unstorable)
            self._end_run(finish, unstorable)
            return finish

    def _sorted_out(self, claim: Claim, started_at: float, error: BaseException) -> Finish:
        if isinstance(error, asyncio.CancelledError):
            error = _with_cause(
                RolloutSystemError("the rollout was cancelled by the eval's own code"), error
            )
        finish = _raised(claim, started_at, error)
        what = f"the error of task {claim.question_id!r}"
        # Raised by our own `await` of what `evaluate` gave.
        if isinstance(error, TypeError) and "'await' expression" in str(error):
            error.add_note(f"is {type(self._job.eval).__name__}.evaluate() an `async def`?")
        if isinstance(error, RolloutSystemError):
            is_last = claim.retry_idx >= self._job.runner.max_retries
            if not is_last and not isinstance(error, _outcomes.LostRolloutError):
                finish.state = _schema.RETRIED
                # Afresh: `evaluate` may have changed the one it got.
                next_try = _codec.loads(claim.payload)
                next_try = next_try.model_copy(update={"retry_idx": claim.retry_idx + 1})
                finish.retry_payload = _codec.dumps_model(next_try, "task %r", claim.question_id)
                finish.not_before = time.time() + self._backoff(claim.retry_idx, error)
                self._tell_of_trouble(finish)
            else:
                finish.payload = _outcomes.dump_error(error, what)
        elif isinstance(error, Exception) and self._job.runner.fail_on_error is not True:
            finish.is_unexpected = True
            stand_in = _outcomes.UnexpectedRolloutError.from_error(error)
            finish.payload = _outcomes.dump_error(stand_in, what)
        else:
            self._end_run(finish, error)
        self._record_error(finish, error)
        return finish

    def _tell_of_trouble(self, finish: Finish) -> None:
        """Say, once for each type of error, why rollouts fail again and again."""
        claim, kind = finish.claim, finish.error_type or ""
        if claim.retry_idx == TRIES_TO_TELL - 1 and kind not in self._told:
            self._told.add(kind)
            message = " ".join((finish.error_message or "").split())[:200]
            name = f"{claim.question_id}.{claim.attempt_id}"
            say(f"nanoeval: task {name} failed {TRIES_TO_TELL} times, now with {kind}: {message}")

    def _end_run(self, finish: Finish, error: BaseException) -> None:
        finish.state = _schema.QUEUED
        name = f"{finish.claim.question_id}.{finish.claim.attempt_id}"
        self._fatal.append(FatalRolloutError(name, error))

    def _record_completed(self) -> None:
        try:
            self._job.recorder.record_sample_completed()
        except Exception as error:
            recorder = type(self._job.recorder).__name__
            error.add_note(f"raised by {recorder}.record_sample_completed")
            raise

    def _record_error(self, finish: Finish, error: BaseException) -> None:
        claim = finish.claim
        group_id = f"{claim.attempt_id}.{claim.retry_idx}"
        try:
            with set_default_recorder(self._job.recorder, claim.question_id, group_id):
                self._job.recorder.record_error(
                    finish.error_message or "",
                    error if isinstance(error, Exception) else None,
                    error_type=finish.error_type,
                    traceback=finish.traceback,
                    is_retried=finish.state == _schema.RETRIED,
                )
        except Exception as recorder_error:
            recorder_error.add_note(f"raised by {type(self._job.recorder).__name__}.record_error")
            self._end_run(finish, recorder_error)

    def _backoff(self, retry_idx: int, error: RolloutSystemError) -> float:
        """Seconds to the next try: what the error asks for, else doubling waits with full jitter.

        At least half of each wait is kept, so that a server that limits rates does get its rest.
        """
        asked_for = _seconds(error.retry_after)
        if asked_for is not None:
            return min(max(0.0, asked_for), LONGEST_RETRY_AFTER)
        wait = min(LONGEST_BACKOFF, self._job.runner.retry_backoff * 2.0 ** min(retry_idx, 60))
        return wait * random.uniform(0.5, 1.0)

    def _stop_if_too_many_failed(self, progress: Progress) -> None:
        share = self._job.runner.fail_on_error
        if isinstance(share, bool) or progress.num_unexpected <= share * progress.num_tasks:
            return
        raise TooManyFailuresError(
            f"{progress.num_unexpected} of {progress.num_tasks} rollouts failed with unexpected"
            f" exceptions, more than fail_on_error={share} allows; each stands in the database and"
            " in the records. Mend the cause and resume, or allow a larger share"
        )


def _raised(claim: Claim, started_at: float, error: BaseException) -> Finish:
    return Finish(
        claim,
        _schema.FAILED,
        started_at,
        time.time(),
        error_type=type(error).__name__,
        error_message=_outcomes.message_of(error),
        traceback=_outcomes.encodable(_outcomes.format_traceback(error)),
    )


def _seconds(retry_after: object) -> float | None:
    """What a server asked for; None for what is no number of seconds, such as a header's date."""
    try:
        seconds = float(retry_after)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return seconds if math.isfinite(seconds) else None


def _size(finish: Finish) -> int:
    return len(finish.payload) if finish.payload is not None else 0


def portable_errors(errors: Sequence[BaseException], where: str) -> bytes:
    """Pickle what `Worker.serve` raised for another process, with the tracebacks as notes."""
    portable: list[BaseException] = []
    for error in errors:
        origin = error.error if isinstance(error, FatalRolloutError) else error
        origin.add_note(f"in {where}:\n{_outcomes.format_traceback(origin)}")
        copy: BaseException = _codec.loads(_outcomes.dump_error(origin, "an error"))
        portable.append(
            FatalRolloutError(error.task_name, copy)
            if isinstance(error, FatalRolloutError)
            else copy
        )
    return _codec.dumps(portable, "the errors of %s", where)


async def first_errors(serving: set[asyncio.Task[list[BaseException]]]) -> None:
    """Wait for several workers that serve one eval, each of which returns what it raised.

    Once one has raised, the others are cancelled and awaited. Raises like `Worker.serve`.
    """
    errors: list[BaseException] = []
    try:
        for next_done in asyncio.as_completed(serving):
            errors += await next_done
            if errors:
                break
    finally:
        for task in serving:
            task.cancel()
        others = await asyncio.gather(*serving, return_exceptions=True)
    errors += [
        e for answer in others if isinstance(answer, list) for e in answer if e not in errors
    ]
    fatal = [error for error in errors if isinstance(error, FatalRolloutError)]
    if fatal:
        raise ExceptionGroup("rollouts ended the run", fatal)
    if errors:
        raise errors[0]


def _with_cause(error: RolloutSystemError, cause: BaseException) -> RolloutSystemError:
    error.__cause__ = cause
    return error
