"""The eval of computer tasks and what a solver of them is. Knows no runtime."""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import chz
import structlog

from nanoeval.asyncio_utils import HasAsyncContextManager, generator_with_cleanup
from nanoeval.eval import Eval, RolloutSystemError
from nanoeval.recorder import get_recorder
from nanoeval.solvers.computer_tasks._transcript import (
    Transcript,
    messages_of,
    strip_all_metadata,
)
from nanoeval.solvers.computer_tasks.steps import FinalResult, FinalResultWithException, Step
from nanoeval.solvers.computer_tasks.task import ComputerTask, Grade

__all__ = [
    "DummyPythonCodingSolver",
    "PythonCodingEval",
    "PythonCodingSolver",
    "simple_timer",
    "strip_all_metadata",
]

logger = structlog.stdlib.get_logger(component=__name__)


@chz.chz
class PythonCodingSolver(ABC, HasAsyncContextManager):
    """Does computer tasks. Entered once per process, around all its rollouts there."""

    @abstractmethod
    def shortname(self) -> str:
        """A name for reports and paths."""

    @abstractmethod
    def run(self, task: ComputerTask) -> AsyncGenerator[Step | FinalResult, None]:
        """Yield a Step per action, if any, and one FinalResult, which ends the rollout."""

    def get_additional_metrics(self) -> dict[str, Any]:
        """What the summary holds under `solver`."""
        return {}


@chz.chz
class DummyPythonCodingSolver(PythonCodingSolver):
    """Says that everything is right without starting a computer; for tests of an eval's wiring."""

    def shortname(self) -> str:
        return "dummy"

    async def run(self, task: ComputerTask) -> AsyncGenerator[Step | FinalResult, None]:
        del task
        yield FinalResult(grade=Grade(score=1, grader_log="the dummy solver is always right"))


@contextmanager
def simple_timer(name: str) -> Iterator[None]:
    """Log when the block starts, and how it ended after how many seconds."""
    started = time.monotonic()
    logger.info(f"[{name}] started")
    try:
        yield
    except BaseException as error:
        elapsed = time.monotonic() - started
        logger.warning(f"[{name}] failed", elapsed=elapsed, error=type(error).__name__)
        raise
    logger.info(f"[{name}] finished", elapsed=time.monotonic() - started)


@chz.chz
class PythonCodingEval(Eval[ComputerTask, FinalResult]):
    """Runs a solver on computer tasks and sums up the grades. Subclasses define `get_instances`."""

    solver: PythonCodingSolver = chz.field(
        default_factory=DummyPythonCodingSolver, doc="What does the tasks."
    )
    n_tries: int = chz.field(default=1, doc="Attempts at each task.")
    record_pretty: bool = chz.field(
        default=False, doc="Record each message as a readable sampling instead of whole steps."
    )
    log_at_end: bool = chz.field(default=False, doc="Record the grader's log as a sampling too.")

    @chz.validate
    def _check_tries(self) -> None:
        if self.n_tries < 1:
            raise ValueError(f"n_tries={self.n_tries} must be at least 1")

    @asynccontextmanager
    async def _context(self) -> AsyncGenerator[None, None]:
        async with self.solver:
            yield

    def get_name(self) -> str:
        """The class's and the solver's name."""
        return f"{type(self).__name__}-{self.solver.shortname()}"

    async def get_instances(self) -> Sequence[ComputerTask]:
        """The tasks, each once; `get_tasks` makes the attempts."""
        raise NotImplementedError(f"{type(self).__name__} must define get_instances()")

    async def get_tasks(self) -> Sequence[ComputerTask]:
        """Each instance `n_tries` times, with attempt ids from 0."""
        instances = await self.get_instances()
        return [
            instance.model_copy(update={"attempt_id": attempt})
            for attempt in range(self.n_tries)
            for instance in instances
        ]

    async def evaluate(self, task: ComputerTask) -> FinalResult:
        """Let the solver do `task` and record its steps.

        ValueError for a solver that ends without a FinalResult, TypeError for one that yields
        something else; a cancellation from inside the solver counts as RolloutSystemError.
        """
        recorder = get_recorder()
        result = await self._run_solver(task, Transcript(recorder, self.record_pretty))
        if self.log_at_end:
            recorder.record_sampling(prompt="", sampled=result.grade.grader_log)
        recorder.record_match(correct=result.correct)
        return result

    async def _run_solver(self, task: ComputerTask, transcript: Transcript) -> FinalResult:
        try:
            async with generator_with_cleanup(self.solver.run(task)) as steps:
                async for step in steps:
                    self._check_step(step)
                    await asyncio.to_thread(transcript.record, step)
                    if isinstance(step, FinalResult):
                        return step
        except asyncio.CancelledError as error:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise RolloutSystemError(
                f"{self.solver.shortname()} was cancelled from within on {task.name}: a time-out"
                " or a task of its own ended it"
            ) from error
        raise ValueError(
            f"{self.solver.shortname()} ended without a FinalResult on {task.name}; run() must"
            " yield one as its last item"
        )

    def _check_step(self, step: Any) -> None:
        if isinstance(step, Step | FinalResult):
            return
        advice = "wanted a Step or a FinalResult"
        if isinstance(step, FinalResultWithException):
            advice = (
                "which is no longer a result; raise nanoeval.RolloutSystemError instead, and the"
                f" rollout is retried (its exception: {step.exception})"
            )
        raise TypeError(f"{self.solver.shortname()} yielded a {type(step).__name__}, {advice}")

    def process_invalid(self, task: ComputerTask) -> FinalResult:
        """Score 0."""
        return FinalResult(
            grade=Grade(score=0, grader_log=f"{task.name} was not graded: the system broke it")
        )

    async def get_summary(self, results: list[tuple[ComputerTask, FinalResult]]) -> dict[str, Any]:
        """The same as `get_full_summary`, which is the one to override."""
        return await self.get_full_summary(list(results))

    async def get_full_summary(
        self, results: list[tuple[ComputerTask, FinalResult | RolloutSystemError]]
    ) -> dict[str, Any]:
        """Right and wrong by grade; system errors only in `metrics_including_errors`.

        The keys of `get_summary_error_aware`, `length_stats`, and `solver`, the solver's own
        metrics.
        """
        from nanoeval.metrics.agents import get_summary_error_aware

        verdicts = [(t, r.correct if isinstance(r, FinalResult) else r) for t, r in results]
        summary = await asyncio.to_thread(get_summary_error_aware, verdicts)
        summary["length_stats"] = self._get_convo_len_stats(results)
        summary["solver"] = self.solver.get_additional_metrics()
        return summary

    def _get_convo_len_stats(
        self, results: list[tuple[ComputerTask, FinalResult | RolloutSystemError]]
    ) -> dict[str, Any]:
        """How rollouts ended, as fractions of those that the system did not break; {} for none.

        Besides `frac_correct`, each fraction is of wrong rollouts that ran into that limit, and
        `frac_model_ended` of those that ran into none. `convo_len_percentiles`, where there are
        conversations, are the quartiles of their number of messages.
        """
        import numpy as np

        done = [r for _, r in results if isinstance(r, FinalResult)]
        if not done:
            return {}
        wrong = [r for r in done if not r.correct]
        stats: dict[str, Any] = {
            "frac_correct": (len(done) - len(wrong)) / len(done),
            "frac_max_time": sum(r.max_time_reached for r in wrong) / len(done),
            "frac_max_steps": sum(r.max_steps_reached for r in wrong) / len(done),
            "frac_max_tokens": sum(r.max_tokens_reached for r in wrong) / len(done),
            "frac_model_ended": sum(_model_ended(r) for r in wrong) / len(done),
        }
        lengths = [len(messages_of(r.convo)) for r in done if r.convo is not None]
        if lengths:
            stats["convo_len_percentiles"] = np.percentile(lengths, [25, 50, 75]).tolist()
        return stats

    async def update_progress(
        self, partial_results: list[tuple[ComputerTask, FinalResult]], pbar: Any
    ) -> None:
        """Show how many are right (corr), broken (errs) and wrong (fail)."""
        done = [r for _, r in partial_results if isinstance(r, FinalResult)]
        n_correct = sum(r.correct for r in done)
        # A run's bar knows of the broken ones, which are not among its partial results.
        n_broken = getattr(pbar, "num_failed", len(partial_results) - len(done))
        pbar.set_postfix(corr=n_correct, errs=n_broken, fail=len(done) - n_correct)

    async def self_test(self) -> None:
        """Check the eval as usual, and that each instance can be written as JSON."""
        await super().self_test()
        for instance in await self.get_instances():
            if not instance.unsafe_skip_serialization_validation:
                json.dumps(instance.model_dump())


def _model_ended(result: FinalResult) -> bool:
    return not (result.max_time_reached or result.max_steps_reached or result.max_tokens_reached)
