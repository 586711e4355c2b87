"""Runs whose tasks and results are large: memory stays bounded, and nothing is read too early."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import chz
import pytest

from nanoeval import _codec, run
from nanoeval._store import BATCH_BYTES, NewTask
from tests.sample_evals import Sum, Sums, spec
from tests.test_store import all_results, open_store, scored

REPOSITORY = Path(__file__).resolve().parent.parent
MIB = 2**20


async def test_a_transaction_gives_out_no_more_bytes_than_a_batch(tmp_path: Path) -> None:
    """A thousand tasks with images would be one blob that SQLite refuses."""
    async with open_store(tmp_path / "s.db") as (store, eval_id, executor_id):
        sizes = [1, 5 * MIB, 1, 7 * MIB, 7 * MIB, 1, 40 * MIB, 1]
        tasks = [NewTask(f"q{i}", 1, 0, None, b"x" * size) for i, size in enumerate(sizes)]
        await store.add_tasks(eval_id, 0, tasks)
        await store.start_eval(eval_id, "again", None, None)
        got: list[str] = []
        results = 0
        while len(got) < len(sizes):
            claims = (await store.exchange(executor_id, eval_id, [], 100)).claims()
            held = [len(claim.payload) for claim in claims]
            assert sum(held) - held[-1] < BATCH_BYTES
            got += [claim.question_id for claim in claims]
            finishes = [scored(claim, b"r" * len(claim.payload)) for claim in claims]
            answer = await store.exchange(executor_id, eval_id, finishes, 0)
            results = answer.progress.num_scored
        assert got == [f"q{i}" for i in range(len(sizes))]
        assert results == len(sizes)
        read = await all_results(store, eval_id)
        assert [(len(task), len(result)) for task, result in read] == [(n, n) for n in sizes]
        batches = store.results(await store.counted(eval_id))
        assert [len(batch) async for batch in batches] == [4, 3, 1]


@chz.chz
class Transcripts(Sums):
    """Each rollout returns a mebibyte at once."""

    async def evaluate(self, task: Any) -> Any:
        return bytes([task.a % 256]) * MIB

    async def get_streamed_summary(self, batches: AsyncIterator[Any]) -> dict[str, Any]:
        firsts = [(task.a, result[0]) async for batch in batches for task, result in batch]
        return {"in_order": firsts == [(a, a % 256) for a in range(self.n)], "n": len(firsts)}


def test_results_waiting_for_the_database_stay_within_bounds(tmp_path: Path) -> None:
    """Rollouts that end faster than their results are stored would fill the memory."""
    program = (
        "import asyncio, resource\n"
        "from nanoeval import run\n"
        "from tests.sample_evals import spec\n"
        "from tests.test_large_results import Transcripts\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "summary = asyncio.run(run(spec(Transcripts(n=500))))\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(summary['in_order'], summary['n'], grown // 1024)"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    in_order, n, grown_mib = done.stdout.split()
    assert (in_order, n) == ("True", "500")
    assert int(grown_mib) < 250


class Sealed:
    """A result that must not be unpickled before the summary."""

    may_open: ClassVar[bool] = False

    def __setstate__(self, state: Any) -> None:
        assert Sealed.may_open, "unpickled before the summary"


async def test_no_result_is_unpickled_before_the_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress of a long run would read every transcript again."""

    @chz.chz
    class Sealing(Sums):
        async def evaluate(self, task: Any) -> Any:
            sealed = Sealed()
            sealed.__dict__["content"] = task.a
            return sealed

        async def get_streamed_summary(self, batches: AsyncIterator[Any]) -> dict[str, Any]:
            monkeypatch.setattr(Sealed, "may_open", True)
            return {"n": sum([len(batch) async for batch in batches])}

    assert (await run(spec(Sealing(n=50))))["n"] == 50


async def test_a_result_beyond_what_the_database_holds_names_its_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SQLite would say "string or blob too big", of no task in particular."""
    monkeypatch.setattr(_codec, "MAX_BYTES", MIB)
    with pytest.raises(ExceptionGroup) as caught:
        await run(spec(Transcripts(n=1)))
    assert "the result of task 'q0' takes 1 MiB when pickled" in str(caught.value.exceptions[0])


class Tagged(Sum):
    """A task with a pickle of its own making."""

    def __reduce__(self) -> Any:
        return Tagged._made, (self.question_id, self.a)

    @classmethod
    def _made(cls, question_id: str, a: int) -> Tagged:
        return cls(question_id=question_id, a=a + 100)


async def test_a_task_with_its_own_pickling_keeps_it() -> None:
    """What a class says of how it is stored would be passed over."""

    @chz.chz
    class Own(Sums):
        async def get_tasks(self) -> Any:
            return [Tagged(question_id="q", a=1)]

        async def evaluate(self, task: Any) -> Any:
            return task.a == 101

    assert (await run(spec(Own())))["accuracy"] == 1.0
