"""Runs evals: list the tasks, queue them, have them carried out, summarize. Read after eval.py.

The road of one rollout: `run` → an executor's `execute` → `Worker` → the eval's `evaluate`.
"""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
import time
import traceback
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import chz

from nanoeval import _codec, _outcomes
from nanoeval._database_file import backup
from nanoeval._executors import in_process, processes
from nanoeval._inspect import list_run_sets
from nanoeval._monitor_process import monitor_process
from nanoeval._progress import ProgressBar, progress_bar
from nanoeval._run_set import RunSet, backup_path, database_path, join_run_set, resume_command
from nanoeval._store import NewTask, StoredEval
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
    get_tasks,
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

TASKS_PER_INSERT = 512
# Decoding results for update_progress takes at most this share of the loop's time.
SHARE_FOR_PROGRESS = 0.05
SECONDS_PER_UPDATE = 1.0
SECONDS_PER_BACKUP = 180.0


async def run(spec: EvalSpec) -> dict[str, Any]:
    """Run an eval to its end and return its summary, with `run_id` added.

    Raises ValueError if the eval lists no tasks or one twice; TypeError if the spec or a task
    cannot be pickled; an ExceptionGroup of what `evaluate` raised, where that ended the run; and
    whatever the eval's other methods raise. Results that were finished before are kept, and a note
    on the exception gives the command that resumes the run.
    """
    runner = spec.runner
    if runner.run_set_id is None:
        spec = chz.replace(spec, runner=chz.replace(runner, run_set_id=default_run_set_id()))
    assert spec.runner.run_set_id is not None
    async with joined(spec.runner.run_set_id) as run_set:
        eval_id, num_tasks = await _queue(run_set, spec)
        recorder = await _start(run_set, spec, eval_id, num_tasks)
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


async def resume_eval(run_set: RunSet, stored: StoredEval) -> dict[str, Any]:
    """Go on with one eval of an open run set; its tasks are listed anew if they never all were."""
    _codec.install_main_definitions(await run_set.store.definitions())
    spec: EvalSpec = _codec.loads(stored.spec)
    recorder: RecorderProtocol
    if stored.run_id is None:
        await run_set.store.delete_eval(stored.eval_id)
        eval_id, num_tasks = await _queue(run_set, spec)
        recorder = await _start(run_set, spec, eval_id, num_tasks)
        return await _carry_out(run_set, spec, eval_id, recorder)
    if stored.recorder is not None:
        recorder = _codec.loads(stored.recorder)
    else:
        recorder = await _recorder_config(spec).factory(spec, stored.num_tasks)
    await run_set.store.restart_eval(stored.eval_id)
    return await _carry_out(run_set, spec, stored.eval_id, recorder, run_id=stored.run_id)


@asynccontextmanager
async def joined(run_set_id: str) -> AsyncIterator[RunSet]:
    """Take part in a run set as a driver, through the connection that this process has, if any."""
    path = database_path(run_set_id)
    async with shared_resource(("run set", path), join_run_set(path, role="driver")) as run_set:
        yield run_set


async def _queue(run_set: RunSet, spec: EvalSpec) -> tuple[int, int]:
    """List the eval's tasks and queue them; returns the eval's id and how many tasks it has."""
    name = spec.eval.get_name()
    blob = _codec.dumps(spec, f"the EvalSpec of {name}")
    needs_definitions = b"__main__" in blob
    eval_id = await run_set.store.add_eval(
        name, await spec.model_name(), spec.runner.concurrency, blob
    )
    num_tasks = 0
    try:
        async for tasks in _selected_tasks(spec):
            rows = [_new_task(task) for task in tasks]
            await run_set.store.add_tasks(eval_id, num_tasks, rows)
            needs_definitions = needs_definitions or b"__main__" in rows[0].payload
            num_tasks += len(rows)
        if num_tasks == 0:
            raise ValueError(f"No tasks to evaluate: {name}.get_tasks() returned none")
        await run_set.store.refuse_duplicates(eval_id)
        if needs_definitions and (definitions := _codec.main_definitions()) is not None:
            await run_set.store.set_definitions(definitions)
    except BaseException:
        await run_set.store.delete_eval(eval_id)
        raise
    return eval_id, num_tasks


async def _selected_tasks(spec: EvalSpec) -> AsyncIterator[Sequence[Task]]:
    """The first `n_tasks` tasks, shuffled if asked for, in batches.

    Tasks of a generator are taken as they come; only shuffling needs them all at once.
    """
    n_tasks = spec.runner.n_tasks
    with _noting(f"raised by {spec.eval.get_name()}.get_tasks()"):
        tasks = await get_tasks(spec.eval)
        if isinstance(tasks, AsyncIterable) and not spec.runner.shuffle:
            async for batch in _in_batches(tasks, n_tasks):
                yield batch
            return
        listed = [t async for t in tasks] if isinstance(tasks, AsyncIterable) else list(tasks)
    listed = listed[:n_tasks]
    if spec.runner.shuffle:
        random.shuffle(listed)
    for first in range(0, len(listed), TASKS_PER_INSERT):
        yield listed[first : first + TASKS_PER_INSERT]


async def _in_batches(
    tasks: AsyncIterable[Task], n_tasks: int | None
) -> AsyncIterator[Sequence[Task]]:
    batch: list[Task] = []
    n_taken = 0
    async for task in tasks:
        if n_taken == n_tasks:
            break
        n_taken += 1
        batch.append(task)
        if len(batch) == TASKS_PER_INSERT:
            yield batch
            batch = []
    if batch:
        yield batch


def _new_task(task: Task) -> NewTask:
    if not isinstance(task, Task):
        raise TypeError(
            f"get_tasks() returned a {type(task).__name__} ({task!r:.100}); it must return"
            " nanoeval.Task objects or objects of a subclass"
        )
    return NewTask(
        task.question_id,
        task.attempt_id,
        task.retry_idx,
        _outcomes.preview(task),
        _codec.dumps(task, f"task {task.name!r}"),
    )


def _recorder_config(spec: EvalSpec) -> Any:
    return spec.runner.recorder or get_library_config().get_default_recorder()


async def _start(run_set: RunSet, spec: EvalSpec, eval_id: int, num_tasks: int) -> RecorderProtocol:
    """Build the run's recorder and let the queued tasks go."""
    config = _recorder_config(spec)
    try:
        with _noting(f"raised by {type(config).__name__}.factory"):
            recorder: RecorderProtocol = await config.factory(spec, num_tasks)
        await run_set.store.start_eval(
            eval_id,
            recorder.run_spec.run_id,
            _pickled_or_none(recorder),
            str(getattr(recorder, "filename", None) or "") or None,
        )
    except BaseException:
        await run_set.store.delete_eval(eval_id)
        raise
    return recorder


def _pickled_or_none(recorder: RecorderProtocol) -> bytes | None:
    try:
        return _codec.dumps(recorder, "the recorder")
    except _codec.NotPicklableError:
        return None  # another process builds its own through the recorder's factory


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
    executor = processes if spec.runner.experimental_use_multiprocessing else in_process
    before = await store.progress(eval_id)
    started_at = time.monotonic()
    await _notify(spec, f"{name}: {before.num_tasks} tasks, run {job.run_id} starts")
    try:
        async with _watched(run_set, spec, before.num_tasks) as bar:
            bar.bar.initial = before.num_done
            with recorder:
                async with _background(*_chores(run_set, job, bar)):
                    await executor.execute(run_set, job, bar.show)
                bar.finish(await store.progress(eval_id))
                summary = await _summarize(run_set, job)
                recorder.record_final_report(summary)
            await store.end_eval(eval_id, "finished", _to_json(summary))
    except BaseException as error:
        await _report_failure(run_set, job, error)
        if isinstance(error, ExceptionGroup) and error.subgroup(FatalRolloutError):
            raise _unwrapped(job, run_set, error) from None
        raise
    seconds = time.monotonic() - started_at
    await _notify(spec, f"{name}: run {job.run_id} finished in {seconds:.0f} s", _to_json(summary))
    say(summary_text(name, summary, seconds))
    return summary | {"run_id": job.run_id}


@asynccontextmanager
async def _watched(run_set: RunSet, spec: EvalSpec, num_tasks: int) -> AsyncIterator[ProgressBar]:
    """A progress bar for the block, the monitor if asked for, and backups to its end."""
    async with AsyncExitStack() as beside:
        if spec.runner.use_monitor:
            key, monitor = run_set.run_set_id, monitor_process(run_set.run_set_id)
            await beside.enter_async_context(shared_resource(("monitor", key), monitor))
        if spec.runner.should_backup:
            beside.push_async_callback(_back_up, run_set)
        name, slack_name = spec.eval.get_name(), spec.runner.slack_name
        yield beside.enter_context(progress_bar(name, num_tasks, slack_name))


def _chores(run_set: RunSet, job: Job, bar: ProgressBar) -> list[Any]:
    """What goes on beside the rollouts, where it is asked for."""
    chores: list[Any] = []
    if job.runner.should_backup:
        chores.append(_back_up_now_and_then(run_set))
    partial = _PartialResults(run_set, job.eval_id)
    if type(job.eval).update_progress is not Eval.update_progress:
        chores.append(_update_progress(job, partial, bar))
    if job.runner.summary_interval is not None:
        chores.append(_summarize_now_and_then(run_set, job, partial))
    return chores


@asynccontextmanager
async def _background(*chores: Any) -> AsyncIterator[None]:
    """Run `chores` during the block; one that raises ends the block with an ExceptionGroup."""
    raised: Exception | None = None
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(chore) for chore in chores]
        try:
            yield
        except Exception as error:
            raised = error
        finally:
            for task in tasks:
                task.cancel()
    if raised is not None:
        raise raised


async def _back_up_now_and_then(run_set: RunSet) -> None:
    while True:
        await _back_up(run_set)
        await asyncio.sleep(SECONDS_PER_BACKUP)


async def _back_up(run_set: RunSet) -> None:
    target = backup_path(run_set.run_set_id)
    try:
        await asyncio.to_thread(backup, run_set.store.path, target)
    except (OSError, sqlite3.Error) as error:
        say(
            f"nanoeval: the backup of run set {run_set.run_set_id} to {target} failed ({error});"
            " the run goes on. Make room there, or set should_backup=False"
        )


class _PartialResults:
    """The results so far, read as they are committed, never twice."""

    def __init__(self, run_set: RunSet, eval_id: int) -> None:
        self._run_set, self._eval_id = run_set, eval_id
        self._seq = 0
        self._results: list[tuple[Any, Any]] = []

    async def read(self) -> list[tuple[Any, Any]]:
        async for batch in self._run_set.store.results_since(self._eval_id, self._seq):
            self._results += [(task, result) for _, task, result in _decoded(batch)]
            self._seq = batch[-1][0]
        return self._results


async def _update_progress(job: Job, partial: _PartialResults, bar: ProgressBar) -> None:
    pause = SECONDS_PER_UPDATE
    while True:
        await asyncio.sleep(pause)
        began = time.monotonic()
        results = [(t, r) for t, r in await partial.read() if not isinstance(r, RolloutSystemError)]
        with _noting(f"raised by {job.eval.get_name()}.update_progress()"):
            await job.eval.update_progress(results, bar.bar)
        pause = max(SECONDS_PER_UPDATE, (time.monotonic() - began) / SHARE_FOR_PROGRESS)


async def _summarize_now_and_then(run_set: RunSet, job: Job, partial: _PartialResults) -> None:
    interval = job.runner.summary_interval
    assert interval is not None
    while True:
        await asyncio.sleep(interval)
        results = list(await partial.read())
        if not results:
            continue
        with _noting(f"raised by {job.eval.get_name()}.get_full_summary() on partial results"):
            summary = await job.eval.get_full_summary(results)
        await run_set.store.set_partial_summary(job.eval_id, _to_json(summary))
        say(f"{job.eval.get_name()}, {len(results)} results so far: {_to_json(summary)}")


def _decoded(batch: Sequence[tuple[int, int, bytes, bytes]]) -> Iterator[tuple[int, Any, Any]]:
    for _, position, task, result in batch:
        yield position, _codec.loads(task), _codec.loads(result)


async def _summarize(run_set: RunSet, job: Job) -> dict[str, Any]:
    """The eval's summary of what is in the database, in the order of its tasks."""
    outcomes: list[tuple[int, Any, Any]] = []
    async for batch in run_set.store.results_since(job.eval_id):
        outcomes += _decoded(batch)
    outcomes.sort(key=lambda outcome: outcome[0])
    with _noting(f"raised by {job.eval.get_name()}.get_full_summary(); all results are kept"):
        return dict(await job.eval.get_full_summary([(task, r) for _, task, r in outcomes]))


async def _report_failure(run_set: RunSet, job: Job, error: BaseException) -> None:
    interrupted = isinstance(error, asyncio.CancelledError | KeyboardInterrupt)
    command = resume_command(run_set.run_set_id)
    progress = None
    try:
        text = "".join(traceback.format_exception(error))
        state = "interrupted" if interrupted else "failed"
        await run_set.store.end_eval(job.eval_id, state, error=text)
        progress = await run_set.store.progress(job.eval_id)
    except RuntimeError:
        pass  # the database itself failed: `error` says so
    kept = f"{progress.num_done} of {progress.num_tasks} results are kept. " if progress else ""
    error.add_note(f"{job.eval.get_name()}: {kept}Resume with: {command}")
    if interrupted:
        say(f"{job.eval.get_name()} was interrupted. {kept}Resume with: {command}")
    else:
        await _notify_failure(job, error)


async def _notify_failure(job: Job, error: BaseException) -> None:
    if job.runner.enable_slackbot:
        await get_library_config().send_user_notification(
            f"{job.eval.get_name()}: run {job.run_id} failed: {type(error).__name__}: {error}"
        )


async def _notify(spec: EvalSpec, message: str, extra: str | None = None) -> None:
    if spec.runner.enable_slackbot:
        await get_library_config().send_user_notification(message, extra)


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
    return BaseExceptionGroup(f"{job.eval.get_name()} ended by an exception in evaluate()", errors)


@contextmanager
def _noting(note: str) -> Iterator[None]:
    """Add `note` to exceptions that leave the block."""
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise


def _to_json(summary: dict[str, Any]) -> str:
    return json.dumps(summary, default=str)
