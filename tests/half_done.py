"""Makes a run set in which some tasks are done, without running them."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from nanoeval import _codec, _schema
from nanoeval._queueing import queue_eval, start_eval
from nanoeval._run_set import database_path
from nanoeval._store import Finish, Store
from nanoeval.evaluation import joined
from tests.sample_evals import spec


def make_half_done(run_set_id: str, eval: Any, n_done: int) -> None:
    """A run set with `eval` queued and its first `n_done` tasks answered True."""
    asyncio.run(_make(run_set_id, eval, n_done))


async def _make(run_set_id: str, eval: Any, n_done: int) -> None:
    evaluation = spec(eval, run_set_id=run_set_id, concurrency=None)
    async with joined(run_set_id) as run_set:
        eval_id, n = await queue_eval(run_set, evaluation)
        await start_eval(run_set, evaluation, eval_id, n)
        store: Store = run_set.store
        finishes: list[Finish] = []
        left = n_done
        while left or finishes:
            answer = await store.exchange(run_set.executor_id, eval_id, finishes, min(left, 5000))
            now = time.time()
            true = _codec.dumps(True, "the result")
            finishes = [
                Finish(c, _schema.SCORED, now, now, true, 1.0, "true") for c in answer.claims()
            ]
            left -= len(finishes)
    assert os.path.exists(database_path(run_set_id))
