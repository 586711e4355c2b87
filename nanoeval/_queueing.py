"""Puts an eval and its tasks into the database, and finds its code again. Knows no rollouts."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, nullcontext
from typing import Any

from nanoeval import _codec, _outcomes
from nanoeval._outcomes import noting
from nanoeval._run_set import RunSet
from nanoeval._store import BATCH_BYTES, NewTask, StoredEval
from nanoeval.eval import EvalSpec, Task, get_name, get_tasks
from nanoeval.library_config import get_library_config
from nanoeval.recorder_protocol import RecorderProtocol

TASKS_PER_INSERT = 1024


class MissingCodeError(RuntimeError):
    """The code of a stored eval cannot be imported here; the message says what to do."""


async def queue_eval(
    run_set: RunSet, spec: EvalSpec, folders: str | None = None
) -> tuple[int, int]:
    """List the eval's tasks and queue them; returns the eval's id and how many tasks it has.

    `folders`, as in StoredEval, are by default those of this process.
    """
    name = get_name(spec.eval)
    blob = _codec.dumps(spec, "the EvalSpec of %s", name)
    needs_definitions = b"__main__" in blob
    eval_id = await run_set.store.add_eval(
        name,
        await spec.model_name(),
        spec.runner.concurrency,
        blob,
        # Already now: a run that is killed while it lists its tasks begins anew from the spec.
        _codec.main_definitions() if needs_definitions else None,
        folders or _code_folders(),
    )
    num_tasks = 0
    inserting: deque[asyncio.Task[None]] = deque()
    try:
        async for tasks in _selected_tasks(spec):
            # The database takes in two batches while the next is pickled.
            for rows in _rows(tasks):
                if len(inserting) == 2:
                    await inserting.popleft()
                adding = run_set.store.add_tasks(eval_id, num_tasks, rows)
                inserting.append(asyncio.create_task(adding))
                await asyncio.sleep(0)
                needs_definitions = needs_definitions or b"__main__" in rows[0].payload
                num_tasks += len(rows)
        while inserting:
            await inserting.popleft()
        if num_tasks == 0:
            raise ValueError(f"No tasks to evaluate: {name}.get_tasks() returned none")
        await run_set.store.refuse_duplicates(eval_id)
        if needs_definitions:
            # Once more: get_tasks() may have set what `evaluate` looks up.
            await run_set.store.set_definitions(eval_id, _codec.main_definitions())
    except BaseException:
        await asyncio.gather(*inserting, return_exceptions=True)
        await run_set.store.delete_eval(eval_id)
        raise
    return eval_id, num_tasks


def _code_folders() -> str:
    return json.dumps([os.path.abspath(sys.path[0]), os.getcwd()])


async def stored_spec(run_set: RunSet, stored: StoredEval) -> EvalSpec:
    """What was queued as an eval, its classes made known to this process.

    Raises MissingCodeError where they cannot be imported.
    """
    folders = json.loads(stored.folders)
    sys.path += [folder for folder in dict.fromkeys(folders) if folder not in sys.path]
    try:
        _codec.install_main_definitions(await run_set.store.definitions(stored.eval_id))
        spec: EvalSpec = _codec.loads(stored.spec)
    except (ImportError, AttributeError) as error:
        raise MissingCodeError(
            f"the code of {stored.name} cannot be imported ({error}); it was looked for in"
            f" {' and '.join(folders) or 'the working folder'} too. Set PYTHONPATH to the folder of"
            " its modules, then resume the run set"
        ) from error
    return spec


async def _selected_tasks(spec: EvalSpec) -> AsyncIterator[Sequence[Task]]:
    """The first `n_tasks` tasks, shuffled if asked for, in batches.

    Tasks of a generator are taken as they come; only shuffling needs them all at once.
    """
    n_tasks = spec.runner.n_tasks
    with noting(f"raised by {spec.eval.get_name()}.get_tasks()"):
        tasks = await get_tasks(spec.eval)
        if isinstance(tasks, AsyncIterable) and not spec.runner.shuffle:
            async for batch in _in_batches(tasks, n_tasks):
                yield batch
            return
        if isinstance(tasks, AsyncIterable):
            listed = [task async for batch in _in_batches(tasks, n_tasks) for task in batch]
        else:
            listed = list(tasks)[:n_tasks]
    if spec.runner.shuffle:
        random.shuffle(listed)
    for first in range(0, len(listed), TASKS_PER_INSERT):
        yield listed[first : first + TASKS_PER_INSERT]


async def _in_batches(
    tasks: AsyncIterable[Task], n_tasks: int | None
) -> AsyncIterator[Sequence[Task]]:
    batch: list[Task] = []
    n_taken = 0
    # A generator may hold a file or a connection open.
    async with aclosing(tasks) if isinstance(tasks, AsyncGenerator) else nullcontext():
        async for task in tasks:
            n_taken += 1
            batch.append(task)
            if n_taken == n_tasks:
                break
            if len(batch) == TASKS_PER_INSERT:
                yield batch
                batch = []
    if batch:
        yield batch


def _rows(tasks: Sequence[Task]) -> Iterator[list[NewTask]]:
    """The rows of `tasks`, in as many parts as keep each within what a transaction takes."""
    rows: list[NewTask] = []
    size = 0
    for task in tasks:
        rows.append(row := _new_task(task))
        size += len(row.payload)
        if size >= BATCH_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


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
        _codec.dumps_model(task, "task '%s.%s'", task.question_id, task.attempt_id),
    )


def recorder_config(spec: EvalSpec) -> Any:
    return spec.runner.recorder or get_library_config().get_default_recorder()


async def start_eval(
    run_set: RunSet, spec: EvalSpec, eval_id: int, num_tasks: int
) -> RecorderProtocol:
    """Build the run's recorder and let the queued tasks go."""
    config = recorder_config(spec)
    try:
        with noting(f"raised by {type(config).__name__}.factory"):
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
