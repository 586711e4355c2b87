"""Runs evals: list the tasks, queue them, have them carried out, summarize. Read after eval.py.

The road of one rollout: `run` → an executor's `execute` → `Worker` → the eval's `evaluate`.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import chz

from nanoeval import _codec
from nanoeval._chores import back_up, background, chores_of, decoded, to_json
from nanoeval._executors import in_process, processes, ray
from nanoeval._inspect import list_run_sets
from nanoeval._monitor_process import monitor_process, require_streamlit
from nanoeval._outcomes import noting
from nanoeval._progress import ProgressBar, progress_bar
from nanoeval._queueing import queue_eval, recorder_config, start_eval, stored_spec
from nanoeval._run_set import RunSet, database_path, join_run_set, resume_command
from nanoeval._store import Progress, StoredEval
from nanoeval._summary_text import summary_text
from nanoeval._worker import FatalRolloutError, Job
from nanoeval.eval import (
    Eval,
    EvalSpec,
    RetryableSystemError,
    RolloutSystemError,
    RunnerArgs,
    SystemErrorsNotSupported,
    Task,
    assert_no_system_errors,
)
from nanoeval.fs_paths import database_dirs
from nanoeval.library_config import get_library_config
from nanoeval.recorder import dummy_recorder
from nanoeval.recorder_protocol import RecorderProtocol
from nanoeval.setup import default_run_set_id, say, shared_resource

__all__ = [
    "Eval",
    "EvalSpec",
    "RetryableSystemError",
    "RolloutSystemError",
    "RunnerArgs",
    "SystemErrorsNotSupported",
    "Task",
    "assert_no_system_errors",
    "run",
    "run_eval_in_database",
    "validate",
]

EXECUTORS = {"in_process": in_process, "processes": processes, "ray": ray}


class UnfinishedRunError(RuntimeError):
    """A run stopped before all of its rollouts were done, for no reason that was raised."""

    def __init__(self, name: str, progress: Progress) -> None:
        why = (
            "its executor gave up"
            if progress.state == "running"
            else f"another process has set its state to {progress.state!r} meanwhile"
        )
        super().__init__(
            f"{name} stopped with {progress.num_done} of {progress.num_tasks} rollouts done: {why}"
        )


async def run(spec: EvalSpec) -> dict[str, Any]:
    """Run an eval to its end and return its summary, with `run_id` added.

    Raises ValueError if the eval lists no tasks or one twice; TypeError if the spec or a task
    cannot be pickled; an ExceptionGroup of what `evaluate` raised, where that ended the run; and
    whatever the eval's other methods raise. Results that were finished before are kept, and a note
    on the exception gives the command that resumes the run.
    """
    if not hasattr(spec, "runner"):
        raise TypeError(
            f"run() was given a {type(spec).__name__}; it takes an EvalSpec(eval=...,"
            " runner=RunnerArgs(...))"
        )
    runner = spec.runner
    if runner.use_monitor:
        require_streamlit()
    if runner.executor_name == "ray":
        ray.require_ray(runner)
    if runner.run_set_id is None:
        spec = chz.replace(spec, runner=chz.replace(runner, run_set_id=default_run_set_id()))
    assert spec.runner.run_set_id is not None
    async with joined(spec.runner.run_set_id) as run_set:
        eval_id, num_tasks = await queue_eval(run_set, spec)
        recorder = await start_eval(run_set, spec, eval_id, num_tasks)
        return await _carry_out(run_set, spec, eval_id, recorder)


async def validate(spec: EvalSpec) -> dict[str, Any]:
    """Run an eval like `run`, without recording and without notifications."""
    runner = chz.replace(
        spec.runner, recorder=dummy_recorder(log=False), enable_slackbot=False, slack_name=None
    )
    return await run(chz.replace(spec, runner=runner))


async def run_eval_in_database(run_id: str) -> dict[str, Any]:
    """Go on with a run that is in a database already, by its `run_id`; returns its summary.

    Raises LookupError if no run set in the database folder has it.
    """
    for row in list_run_sets():
        if run_id in [evaluation.run_id for evaluation in row.evals]:
            async with joined(row.run_set_id) as run_set:
                evals = await run_set.store.evals()
                return await resume_eval(run_set, next(e for e in evals if e.run_id == run_id))
    raise LookupError(f"no run set in {database_dirs()[0]} has a run with run_id={run_id!r}")


async def resume_eval(
    run_set: RunSet, stored: StoredEval, spec: EvalSpec | None = None
) -> dict[str, Any]:
    """Go on with one eval of an open run set; its tasks are listed anew if they never all were.

    `spec` stands in for the stored one, as where keys or time-outs have changed.
    """
    spec = spec or await stored_spec(run_set, stored)
    recorder: RecorderProtocol
    if stored.run_id is None:
        await run_set.store.delete_eval(stored.eval_id)
        eval_id, num_tasks = await queue_eval(run_set, spec, stored.folders)
        recorder = await start_eval(run_set, spec, eval_id, num_tasks)
        return await _carry_out(run_set, spec, eval_id, recorder)
    if stored.recorder is not None:
        recorder = _codec.loads(stored.recorder)
    else:
        recorder = await recorder_config(spec).factory(spec, stored.num_tasks)
    await run_set.store.restart_eval(stored.eval_id)
    return await _carry_out(run_set, spec, stored.eval_id, recorder, run_id=stored.run_id)


@asynccontextmanager
async def joined(run_set_id: str) -> AsyncIterator[RunSet]:
    """Take part in a run set as a driver, through the connection that this process has, if any."""
    path = database_path(run_set_id)
    async with shared_resource(("run set", path), join_run_set(path, role="driver")) as run_set:
        yield run_set


async def _carry_out(
    run_set: RunSet,
    spec: EvalSpec,
    eval_id: int,
    recorder: RecorderProtocol,
    run_id: str | None = None,
) -> dict[str, Any]:
    """Have all rollouts of a queued eval done, summarize and report."""
    store, name = run_set.store, spec.eval.get_name()
    job = Job(eval_id, run_id or recorder.run_spec.run_id, spec.eval, spec.runner, recorder)
    executor = EXECUTORS[spec.runner.executor_name]
    before = await store.progress(eval_id)
    started_at = time.monotonic()
    await _notify(spec.runner, f"{name}: {before.num_tasks} tasks, run {job.run_id} starts")
    try:
        async with _watched(run_set, spec, before.num_tasks) as bar:
            bar.bar.initial = before.num_done
            with recorder:
                async with background(*chores_of(run_set, job, bar)):
                    await executor.execute(run_set, job, bar.show)
                progress = await store.progress(eval_id)
                if not progress.is_done:
                    raise UnfinishedRunError(name, progress)
                bar.finish(progress)
                summary = await _summarize(run_set, job)
                with noting(f"raised by {type(recorder).__name__}.record_final_report"):
                    recorder.record_final_report(summary)
            await store.end_eval(eval_id, "finished", to_json(summary))
    except BaseException as error:
        if isinstance(error, ExceptionGroup) and error.subgroup(FatalRolloutError):
            unwrapped = _unwrapped(job, run_set, error)
            await _report_failure(run_set, job, unwrapped)
            raise unwrapped from None
        await _report_failure(run_set, job, error)
        raise
    seconds = time.monotonic() - started_at
    await _notify(
        spec.runner, f"{name}: run {job.run_id} finished in {seconds:.0f} s", to_json(summary)
    )
    if text := summary_text(name, summary, seconds):
        say(text)
    return summary | {"run_id": job.run_id}


@asynccontextmanager
async def _watched(run_set: RunSet, spec: EvalSpec, num_tasks: int) -> AsyncIterator[ProgressBar]:
    """A progress bar for the block, the monitor if asked for, and backups to its end."""
    async with AsyncExitStack() as beside:
        if spec.runner.use_monitor:
            key, monitor = run_set.run_set_id, monitor_process(run_set.run_set_id)
            await beside.enter_async_context(shared_resource(("monitor", key), monitor))
        if spec.runner.should_backup:
            beside.push_async_exit(_back_up_unless_raised(run_set))
        name, slack_name = spec.eval.get_name(), spec.runner.slack_name
        yield beside.enter_context(progress_bar(name, num_tasks, slack_name))


def _back_up_unless_raised(run_set: RunSet) -> Callable[..., Awaitable[None]]:
    """An error is to be noted first, so that the backup tells of it too."""

    async def leave(kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            await back_up(run_set)

    return leave


async def _summarize(run_set: RunSet, job: Job) -> dict[str, Any]:
    """The eval's summary of what is in the database, in the order of its tasks."""
    results = decoded(run_set.store.results(await run_set.store.counted(job.eval_id)))
    with noting(f"raised by the summary of {job.eval.get_name()}; all results are kept"):
        return dict(await job.eval.get_streamed_summary(results))


async def _report_failure(run_set: RunSet, job: Job, error: BaseException) -> None:
    interrupted = isinstance(error, asyncio.CancelledError | KeyboardInterrupt)
    command = resume_command(run_set.run_set_id)
    progress = None
    try:
        text = "".join(traceback.format_exception(error))
        state = "interrupted" if interrupted else "failed"
        progress = await run_set.store.progress(job.eval_id)
        if progress.state == "running":  # else another process has ended it
            await run_set.store.end_eval(job.eval_id, state, error=text)
        if job.runner.should_backup:
            await back_up(run_set)
    except RuntimeError:
        pass  # the database itself failed: `error` says so
    kept = f"{progress.num_done} of {progress.num_tasks} results are kept. " if progress else ""
    error.add_note(f"{job.eval.get_name()}: {kept}Resume with: {command}")
    if interrupted:
        say(f"{job.eval.get_name()} was interrupted. {kept}Resume with: {command}")
    else:
        await _notify_failure(job, error)


async def _notify_failure(job: Job, error: BaseException) -> None:
    message = f"run {job.run_id} failed: {type(error).__name__}: {error}"
    await _notify(job.runner, f"{job.eval.get_name()}: {message}")


async def _notify(runner: RunnerArgs, message: str, extra: str | None = None) -> None:
    if not runner.enable_slackbot:
        return
    try:
        await get_library_config().send_user_notification(message, extra)
    except Exception as error:  # anybody's code; no run depends on being told of
        say(f"nanoeval: a notification was not sent ({type(error).__name__}: {error}): {message}")


def _unwrapped(job: Job, run_set: RunSet, group: BaseException) -> BaseExceptionGroup[Any]:
    """The original exceptions of `evaluate`, each with a note of its task and what to do."""
    assert isinstance(group, ExceptionGroup)
    errors: list[BaseException] = []
    for fatal in group.exceptions:
        if isinstance(fatal, FatalRolloutError):
            fatal.error.add_note(
                f"raised by task {fatal.task_name!r} of {job.eval.get_name()}; finished results"
                f" are kept. Resume with: {resume_command(run_set.run_set_id)}"
            )
            errors.append(fatal.error)
        else:
            errors.append(fatal)
    return BaseExceptionGroup(f"{job.eval.get_name()} ended by an exception in a rollout", errors)
