"""The nouns of nanoeval: Task, Eval, EvalSpec, RunnerArgs. Read this first.

Knows nothing of how a run is carried out.
"""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from inspect import isawaitable, iscoroutine
from typing import Any, Generic, Literal, TypeVar

import chz
from chz.factories import function
from pydantic import BaseModel, field_validator

from nanoeval.asyncio_utils import HasAsyncContextManager
from nanoeval.recorder_protocol import RecorderConfig

ENV_ALLOW_ZERO_CONCURRENCY = "NANOEVAL_ALLOW_ZERO_CONCURRENCY"
# File names have 255 bytes at most, and those of a run set's files add to its id.
MAX_ID_BYTES = 200


class Task(BaseModel):
    """One scoreable unit: one attempt at one question. Subclass it to add fields.

    `(question_id, attempt_id)` is counted once in a summary. The engine sets `retry_idx`: it is 0
    at first and one more each time the system, not the model, broke the rollout.
    """

    question_id: str
    attempt_id: int = 1
    retry_idx: int = 0
    # Kept for tasks written with it; pickling is checked once, when a task is queued.
    unsafe_skip_serialization_validation: bool = False

    @property
    def name(self) -> str:
        """`"{question_id}.{attempt_id}"`."""
        return f"{self.question_id}.{self.attempt_id}"

    @field_validator("question_id")
    @classmethod
    def _refuse_unstorable(cls, value: str) -> str:
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"question_id={value!r} holds half of a character, which cannot be stored;"
                    ' value.encode(errors="backslashreplace").decode() can'
                ) from error
        if "/" in value:
            raise ValueError(
                f'question_id={value!r} contains a "/", which names of files and links cannot'
                ' carry; replace it, for example with "_"'
            )
        return value


TTask = TypeVar("TTask", bound=Task)
TResult = TypeVar("TResult")


class RolloutSystemError(Exception):
    """The system, not the model, broke a rollout: raise it from `evaluate` to have it retried.

    `retry_after` is the number of seconds to wait before the next try, where the cause says so (an
    HTTP `Retry-After`, say); None leaves it to the runner's back-off.
    """

    retry_after: float | None = None

    def __init__(self, *args: object, retry_after: float | None = None) -> None:
        super().__init__(*args)
        if retry_after is not None:
            self.retry_after = retry_after


RetryableSystemError = RolloutSystemError


class SystemErrorsNotSupported(ValueError):
    """A summary met system errors and has no rule for them."""


def assert_no_system_errors(
    results: Sequence[tuple[TTask, TResult | RolloutSystemError]],
) -> Sequence[tuple[TTask, TResult]]:
    """Return `results` unchanged, or raise SystemErrorsNotSupported naming what failed."""
    failed = [(task, r) for task, r in results if isinstance(r, RolloutSystemError)]
    if failed:
        shown = "; ".join(f"{task.name}: {type(r).__name__}: {r}" for task, r in failed[:5])
        more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
        raise SystemErrorsNotSupported(
            f"{len(failed)} of {len(results)} results are system errors, for which this summary has"
            f" no rule ({shown}{more}); drop them, or count them as failures, before summarizing"
        )
    return results  # type: ignore[return-value]


@chz.chz
class Eval(HasAsyncContextManager, Generic[TTask, TResult]):
    """What to ask and how to score it.

    Override `get_name`, `get_tasks`, `evaluate` and `get_summary`. Override `_context`, an async
    context manager, for what a process needs while it runs this eval (a client, a container pool):
    it is entered once per executor process, before its first task, and left after its last.
    """

    def get_name(self) -> str:
        """A short name, shown wherever the run is."""
        raise NotImplementedError(f"{type(self).__name__} must define get_name()")

    async def get_tasks(self) -> Sequence[TTask] | AsyncIterable[TTask]:
        """All tasks. An async generator is also accepted; its tasks are queued as they come."""
        raise NotImplementedError(f"{type(self).__name__} must define get_tasks()")

    async def evaluate(self, task: TTask) -> TResult:
        """Carry out one rollout and return its result, anything that can be pickled.

        Raise RolloutSystemError for what the system broke; it is retried. Any other exception ends
        the run, unless the runner's `fail_on_error` says otherwise.
        """
        raise NotImplementedError(f"{type(self).__name__} must define evaluate(task)")

    async def get_summary(self, results: list[tuple[TTask, TResult]]) -> dict[str, Any]:
        """Summarize the results of rollouts that worked.

        `results` may be partial and may hold fewer attempts of one question than of another;
        `nanoeval.metrics` averages over attempts first, then over questions.
        """
        raise NotImplementedError(f"{type(self).__name__} must define get_summary(results)")

    async def get_full_summary(
        self, results: list[tuple[TTask, TResult | RolloutSystemError]]
    ) -> dict[str, Any]:
        """Summarize all results, system errors included.

        By default `get_summary` of those that worked, and under `metrics_including_errors` the
        same with each error replaced by `process_invalid(task)`, where that is defined.
        """
        from nanoeval._outcomes import handle_system_errors_and_compute_metrics

        return await handle_system_errors_and_compute_metrics(
            self.get_summary, results, self.process_invalid
        )

    async def get_streamed_summary(
        self, batches: AsyncIterator[list[tuple[TTask, TResult | RolloutSystemError]]]
    ) -> dict[str, Any]:
        """Summarize all results as they are read, in lists of some, in the order of the tasks.

        Override it where all of them do not fit into memory; by default `get_full_summary` of all.
        """
        return await self.get_full_summary([result async for batch in batches for result in batch])

    def process_invalid(self, task: TTask) -> TResult:
        """The result that stands for a failure of `task` in `metrics_including_errors`."""
        raise NotImplementedError

    async def update_progress(
        self, partial_results: list[tuple[TTask, TResult]], pbar: Any
    ) -> None:
        """Show progress on `pbar`, a tqdm bar, from the results so far. Does nothing by default."""
        del partial_results, pbar

    async def self_test(self) -> None:
        """Check that the eval can list, name and summarize its tasks, without running one.

        Meant for an eval's own tests. Raises what the eval raises, ValueError for a broken promise.
        """
        if not self.get_name():
            raise ValueError(f"{type(self).__name__}.get_name() returned an empty name")
        listed = await list_tasks(self)
        if not listed:
            raise ValueError(f"{self.get_name()}: get_tasks() returned no tasks")
        await self.update_progress([], _SilentBar())
        await self.get_full_summary([])
        error = RolloutSystemError("self test")
        for part in (listed[: len(listed) // 2], listed):
            try:
                await self.get_full_summary([(task, error) for task in part])
            except SystemErrorsNotSupported:
                return


class _SilentBar:
    """Takes any call that a tqdm bar takes, and shows nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


async def list_tasks(eval: Eval[TTask, Any]) -> list[TTask]:
    """All tasks of `eval` as a list, whether `get_tasks` returns a sequence or is a generator."""
    tasks = await get_tasks(eval)
    if isinstance(tasks, AsyncIterable):
        return [task async for task in tasks]
    return list(tasks)


async def get_tasks(eval: Eval[TTask, Any]) -> Sequence[TTask] | AsyncIterable[TTask]:
    """What `eval.get_tasks` gives, awaited if need be: an async generator is not."""
    tasks: Any = eval.get_tasks()
    where = f"{type(eval).__name__}.get_tasks()"
    if not isinstance(tasks, AsyncIterable):
        if not isawaitable(tasks):
            raise TypeError(f"{where} gave a {type(tasks).__name__}; write it as `async def`")
        tasks = await tasks
    if tasks is None or isinstance(tasks, str | Mapping | Task):
        raise TypeError(
            f"{where} returned {_kind_of(tasks)}; it must return a list of nanoeval.Task objects"
        )
    return tasks  # type: ignore[no-any-return]


def get_name(eval: Eval[Any, Any]) -> str:
    """What `eval.get_name` gives; TypeError where that is no name."""
    name: Any = eval.get_name()
    if isinstance(name, str) and name:
        return name
    if iscoroutine(name):
        name.close()
    raise TypeError(
        f"{type(eval).__name__}.get_name() returned {_kind_of(name)}; it must return a short text,"
        " and be no `async def`"
    )


def _kind_of(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


@chz.chz
class RunnerArgs:
    """How to run an eval. Subclass it to change a default."""

    concurrency: int | None = chz.field(
        default=4096,
        doc="Rollouts of this eval in flight at once, all executors together; None = unlimited.",
    )
    experimental_use_multiprocessing: bool = chz.field(
        default=False, doc="Run rollouts in worker processes; for evals that use much CPU."
    )
    executor: Literal["in_process", "processes", "ray"] | None = chz.field(
        default=None,
        doc="Where rollouts run: on this event loop, in processes of this machine, or in actors of"
        " a Ray cluster; None = what experimental_use_multiprocessing says.",
    )
    num_processes: int | None = chz.field(
        default=None, doc="Number of worker processes; None = one per CPU core."
    )
    ray_address: str | None = chz.field(
        default=None, doc="The Ray cluster to use; None = the one of this machine, or a new one."
    )
    ray_num_actors: int | None = chz.field(
        default=None, doc="Number of actors that run rollouts; None = as many as there is room for."
    )
    ray_actor_options: dict[str, Any] | None = chz.field(
        default=None,
        doc="Ray's options of each actor: num_cpus (1 by default), num_gpus, resources,"
        " runtime_env and so on.",
    )
    shuffle: bool = chz.field(default=False, doc="Run the tasks in random order.")
    n_tasks: int | None = chz.field(
        default=None, doc="Run the first n tasks only (taken before shuffling)."
    )
    run_set_id: str | None = chz.field(
        default=None, doc="Name of the database that the run goes into; None = chosen for you."
    )
    recorder: RecorderConfig | None = chz.field(
        meta_factory=function(),
        default=None,
        doc="Where events are recorded; None = what library_config says, JSON lines by default.",
    )
    enable_slackbot: bool = chz.field(
        default=True, doc="Send notifications through the library_config's hook."
    )
    slack_name: str | None = chz.field(default=None, doc="Whom the notifications address.")
    model_name: str | None = chz.field(default=None, doc="The model's name, for reports.")
    eval_set_name: str | None = chz.field(default=None, doc="A name for a group of runs.")
    summary_interval: float | None = chz.field(
        default=None, doc="Seconds between partial summaries; None = only the last."
    )
    use_monitor: bool = chz.field(default=False, doc="Start the web monitor beside the run.")
    max_retries: int = chz.field(
        default=16, doc="Further tries of a rollout that raised RolloutSystemError."
    )
    should_backup: bool = chz.field(
        default=True, doc="Copy the database to the library_config's writable root now and then."
    )
    rollout_timeout: float | None = chz.field(
        default=None, doc="Seconds a rollout may take; beyond it counts as a system error."
    )
    fail_on_error: bool | float = chz.field(
        default=True,
        doc="Unexpected exceptions: True = the first ends the run, False = recorded as failures,"
        " a fraction = recorded until that share of the tasks has failed.",
    )
    retry_backoff: float = chz.field(
        default=1.0,
        doc="Seconds before the first retry; doubles each time, with jitter, up to 60.",
    )

    @property
    def executor_name(self) -> str:
        """The executor that the arguments ask for: in_process, processes or ray."""
        if self.executor is not None:
            return self.executor
        return "processes" if self.experimental_use_multiprocessing else "in_process"

    @chz.validate
    def _check_kinds(self) -> None:
        counts = ("concurrency", "num_processes", "ray_num_actors", "n_tasks", "max_retries")
        numbers = ("retry_backoff", "summary_interval", "rollout_timeout", "fail_on_error")
        for name in (*counts, *numbers):
            value = getattr(self, name)
            if value is None and name in {"max_retries", "retry_backoff", "fail_on_error"}:
                raise ValueError(f"{name}=None has no meaning; leave it out for its default")
            is_flag = isinstance(value, bool) and name != "fail_on_error"
            kind = int if name in counts else int | float
            is_number = isinstance(value, kind) and not is_flag and not math.isnan(value)
            if value is not None and not is_number:
                what = "a whole number" if name in counts else "a number"
                raise ValueError(f"{name}={value!r} must be {what}")
        if self.executor not in {None, "in_process", "processes", "ray"}:
            raise ValueError(
                f'executor={self.executor!r} must be "in_process", "processes" or "ray"'
            )
        if self.recorder is not None and not hasattr(self.recorder, "factory"):
            raise ValueError(
                f"recorder={self.recorder!r} must be a RecorderConfig, such as json_recorder()"
            )

    @chz.validate
    def _check_executor(self) -> None:
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f"num_processes={self.num_processes} must be at least 1")
        if self.experimental_use_multiprocessing and self.executor not in {None, "processes"}:
            raise ValueError(
                f"executor={self.executor!r} contradicts experimental_use_multiprocessing=True;"
                " set one of them"
            )
        if self.num_processes is not None and self.executor_name != "processes":
            raise ValueError(
                f"num_processes={self.num_processes} needs experimental_use_multiprocessing=True"
                ' (or executor="processes"); set both or neither'
            )
        for name in ("ray_address", "ray_num_actors", "ray_actor_options"):
            if getattr(self, name) is not None and self.executor_name != "ray":
                raise ValueError(
                    f'{name}={getattr(self, name)!r} needs executor="ray"; set both or neither'
                )
        if self.ray_num_actors is not None and self.ray_num_actors < 1:
            raise ValueError(f"ray_num_actors={self.ray_num_actors} must be at least 1")

    @chz.validate
    def _check_values(self) -> None:
        zero_allowed = self.concurrency == 0 and os.environ.get(ENV_ALLOW_ZERO_CONCURRENCY)
        if self.concurrency is not None and self.concurrency <= 0 and not zero_allowed:
            raise ValueError(
                f"concurrency={self.concurrency} must be at least 1, or None for no limit"
                f" (0 is allowed with {ENV_ALLOW_ZERO_CONCURRENCY}=1)"
            )
        if self.n_tasks is not None and self.n_tasks < 1:
            raise ValueError(f"n_tasks={self.n_tasks} must be at least 1, or None for all tasks")
        if self.slack_name is not None and not self.enable_slackbot:
            raise ValueError(
                f"slack_name={self.slack_name!r} needs enable_slackbot=True; set both or neither"
            )
        if self.max_retries < 0:
            raise ValueError(f"max_retries={self.max_retries} must be at least 0")
        if self.retry_backoff < 0:
            raise ValueError(f"retry_backoff={self.retry_backoff} must be at least 0 seconds")
        for name in ("summary_interval", "rollout_timeout"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be above 0 seconds, or None")
        if not isinstance(self.fail_on_error, bool) and not 0 < self.fail_on_error <= 1:
            raise ValueError(
                f"fail_on_error={self.fail_on_error} must be True, False or a fraction in (0, 1]"
            )
        if self.run_set_id is not None and (
            not self.run_set_id or not self.run_set_id.isprintable() or "/" in self.run_set_id
        ):
            raise ValueError(
                f"run_set_id={self.run_set_id!r} names a file: it must be non-empty, without '/'"
                " and what cannot be printed"
            )
        if self.run_set_id is not None and len(os.fsencode(self.run_set_id)) > MAX_ID_BYTES:
            raise ValueError(
                f"run_set_id={self.run_set_id[:40]!r}… names a file: it must have {MAX_ID_BYTES}"
                f" bytes at most, not {len(os.fsencode(self.run_set_id))}"
            )


@chz.chz
class EvalSpec:
    """An eval and how to run it: all that `nanoeval.run` needs."""

    eval: Eval[Any, Any]
    runner: RunnerArgs

    async def model_name(self) -> str:
        """The model's name for reports: the runner's `model_name`, else "nanoeval"."""
        return self.runner.model_name or "nanoeval"
