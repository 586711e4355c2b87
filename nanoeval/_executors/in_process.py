"""Carries out a run's rollouts in the calling process, on its event loop."""

from __future__ import annotations

from collections.abc import Callable

from nanoeval._run_set import RunSet
from nanoeval._store import Progress
from nanoeval._worker import Job, Worker


async def execute(run_set: RunSet, job: Job, on_progress: Callable[[Progress], None]) -> None:
    """Run all rollouts of `job` here; `on_progress` is called as they finish."""
    worker = Worker(run_set.store, run_set.executor_id, job, on_progress=on_progress)
    with run_set.shows(worker):
        await worker.serve()
