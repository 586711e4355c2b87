"""The contract of executors, run on each."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import chz
import pytest

from nanoeval import run
from nanoeval.setup import global_exit_stack
from tests.ray_cluster import RAY_MISSING, local_cluster, outcomes, until
from tests.sample_evals import Burn, InFlight, Sums, append, lines, spec

MODES: dict[str, dict[str, Any]] = {
    "in_process": {},
    "processes": {"experimental_use_multiprocessing": True, "num_processes": 2},
    "ray": {"executor": "ray", "ray_num_actors": 2},
}
ON_RAY = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(RAY_MISSING, reason='needs Ray: pip install "nanoeval[ray]"'),
]


@pytest.fixture(scope="module")
def node() -> Iterator[None]:
    """A Ray cluster of one node."""
    with local_cluster(num_cpus=4):
        yield


@pytest.fixture(params=["in_process", "processes", pytest.param("ray", marks=ON_RAY)])
def mode(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The RunnerArgs that choose one executor."""
    if request.param == "ray":
        request.getfixturevalue("node")
    return MODES[request.param]


@pytest.fixture(params=["processes", pytest.param("ray", marks=ON_RAY)])
def mode_apart(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Those of the executors whose rollouts run in other processes."""
    if request.param == "ray":
        request.getfixturevalue("node")
    return MODES[request.param]


async def test_every_attempt_is_counted_once(mode: dict[str, Any], tmp_path: Path) -> None:
    """A summary that misses or repeats an attempt is wrong."""
    log = tmp_path / "log"
    summary = await run(spec(Sums(n=60, attempts=3, log=str(log)), concurrency=16, **mode))
    assert summary["num_rollouts"] == summary["num_scored"] == 180
    assert summary["accuracy"] == 0.5
    assert len(lines(log)) == len({line.split()[0] for line in lines(log)}) == 180


async def test_system_errors_are_retried(mode: dict[str, Any], tmp_path: Path) -> None:
    """A broken system would cost a score, or be retried for ever."""
    log = tmp_path / "log"
    eval = Sums(n=40, flaky=4, n_breaks=2, log=str(log))
    summary = await run(spec(eval, max_retries=2, **mode))
    assert summary["num_failed"] == 0
    tries = [line.split()[0] for line in lines(log)]
    assert {f"q{a}.1.{t}" for a in range(0, 40, 4) for t in range(3)} <= set(tries)
    assert len(tries) == 60


async def test_exhausted_retries_reach_the_summary_as_errors(mode: dict[str, Any]) -> None:
    """A rollout that failed for good would vanish from the denominator."""
    summary = await run(spec(Sums(n=10, flaky=5, n_breaks=9), max_retries=1, **mode))
    assert (summary["num_tasks"], summary["num_scored"], summary["num_failed"]) == (10, 8, 2)
    assert not summary["is_valid"]
    assert summary["accuracy_worst_case"] < summary["accuracy"] < summary["accuracy_best_case"]


async def test_context_is_entered_once_per_process(mode: dict[str, Any], tmp_path: Path) -> None:
    """A costly set-up would be paid per rollout, or never undone."""
    log = tmp_path / "context"
    await run(spec(Sums(n=200, seconds=0.002, context_log=str(log)), concurrency=20, **mode))
    entered = [line for line in lines(log) if line.startswith("enter")]
    assert len(entered) == len(set(entered)) == len(lines(log)) // 2
    assert len(entered) <= (2 if mode else 1)
    assert (f"enter {os.getpid()}" in entered) == (not mode)


async def test_concurrency_is_never_exceeded(mode: dict[str, Any], tmp_path: Path) -> None:
    """A server that allows eight requests would see more."""
    folder = tmp_path / "in_flight"
    folder.mkdir()
    eval = InFlight(n=80, seconds=0.01, folder=str(folder), log=str(tmp_path / "log"))
    await run(spec(eval, concurrency=8, **mode))
    seen = [int(line) for line in lines(tmp_path / "log")]
    assert len(seen) == 80
    assert 4 <= max(seen) <= 8


async def test_an_exception_ends_the_run_and_keeps_what_is_finished(
    mode: dict[str, Any], tmp_path: Path
) -> None:
    """A bug in an eval would go unseen, or cost the results that were there."""
    log = tmp_path / "log"
    with pytest.raises(ExceptionGroup) as caught:
        await run(spec(Breaking(n=50, log=str(log)), concurrency=1, run_set_id="broken", **mode))
    (error,) = caught.value.exceptions
    assert isinstance(error, ZeroDivisionError)
    notes = "\n".join(error.__notes__)
    assert "q30.1" in notes
    assert "run_set_id=broken" in notes
    from nanoeval.bin.resume import resume

    append(f"{log}.mended", "now")
    (summary,) = await resume("broken")
    assert summary["num_scored"] == 50
    executed = [line.split()[0] for line in lines(log)]
    assert {q for q in executed if executed.count(q) > 1} == {"q30.1.0"}


@chz.chz
class Breaking(Sums):
    """Raises at question 30, until there is a file LOG.mended."""

    async def evaluate(self, task: Any) -> bool:
        result = await super().evaluate(task)
        if task.a == 30 and not Path(f"{self.log}.mended").exists():
            raise ZeroDivisionError("a bug")
        return result


async def test_unexpected_exceptions_can_be_recorded_as_failures(mode: dict[str, Any]) -> None:
    """One bad question would cost a run that was told to go on."""
    summary = await run(spec(Breaking(n=50), fail_on_error=False, **mode))
    assert (summary["num_scored"], summary["num_failed"]) == (49, 1)


async def test_cancelling_a_run_gives_claims_back(
    mode: dict[str, Any], database_folder: Path
) -> None:
    """Ctrl-C would leave tasks that nobody may run until a lease ends."""
    eval = Sums(n=2000, seconds=0.05)
    task = asyncio.ensure_future(run(spec(eval, concurrency=20, run_set_id="cancelled", **mode)))
    await until(lambda: outcomes("cancelled") > 50)
    began = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - began < 2
    with closing(sqlite3.connect(database_folder / "cancelled.db")) as db:
        assert db.execute("SELECT count(*) FROM claim").fetchone() == (0,)
        (running,) = db.execute("SELECT count(*) FROM task WHERE state = 1").fetchone()
        (done,) = db.execute("SELECT count(*) FROM task WHERE state = 2").fetchone()
    assert running == 0
    assert 0 < done < 2000


async def test_two_runs_side_by_side_do_not_disturb_each_other(mode: dict[str, Any]) -> None:
    """Results of one eval would enter another's summary."""
    first, second = await asyncio.gather(
        run(spec(Sums(n=100, name="first"), concurrency=10, **mode)),
        run(spec(Sums(n=51, name="second"), concurrency=10, **mode)),
    )
    assert first["num_scored"] == 100
    assert second["num_scored"] == 51
    assert first["run_id"] != second["run_id"]


async def test_a_starving_eval_does_not_hold_up_another(
    mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An eval that may not start rollouts would block the others of its run set."""
    monkeypatch.setenv("NANOEVAL_ALLOW_ZERO_CONCURRENCY", "1")
    async with global_exit_stack:
        starved = asyncio.ensure_future(run(spec(Sums(n=5, name="starved"), concurrency=0, **mode)))
        summary = await run(spec(Sums(n=100), concurrency=10, **mode))
        assert summary["num_scored"] == 100
        assert not starved.done()
        starved.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starved


async def test_a_rollout_past_its_timeout_is_a_system_error(mode: dict[str, Any]) -> None:
    """A rollout that hangs would hang the run."""
    summary = await run(spec(Sums(n=3, seconds=30), rollout_timeout=0.05, max_retries=1, **mode))
    assert summary["num_failed"] == 3


async def test_classes_of_a_function_work(mode: dict[str, Any]) -> None:
    """Evals in notebooks and tests would need a module of their own."""

    @chz.chz
    class Local(Sums):
        async def evaluate(self, task: Any) -> bool:
            return True

    assert (await run(spec(Local(n=10), **mode)))["accuracy"] == 1.0


async def test_results_that_cannot_be_pickled_name_their_task(mode: dict[str, Any]) -> None:
    """Nobody would know which field of which result to mend."""
    with pytest.raises(ExceptionGroup) as caught:
        await run(spec(Unpicklable(n=1), **mode))
    assert "the result of task 'q0'" in str(caught.value.exceptions[0])


@chz.chz
class Unpicklable(Sums):
    """Returns something that holds a lock."""

    async def evaluate(self, task: Any) -> Any:
        import threading

        return {"answer": 1, "lock": threading.Lock()}


async def test_ray_that_is_missing_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, database_folder: Path
) -> None:
    """Whoever has no Ray would get a traceback, after the tasks were queued."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'executor="ray" needs .* pip install "nanoeval\[ray\]"'):
        await run(spec(Sums(n=5), executor="ray"))
    assert list(database_folder.glob("*.db")) == []


async def test_processes_share_cpu_bound_work() -> None:
    """Two cores would do no more than one."""
    began = time.monotonic()
    mode = MODES["processes"]
    await run(spec(Burn(n=40, seconds=0.02), **mode))
    assert time.monotonic() - began < 30


async def test_worker_processes_are_reused_inside_the_global_exit_stack(tmp_path: Path) -> None:
    """Each run would pay for starting processes."""
    log = tmp_path / "log"
    async with global_exit_stack:
        for _ in range(2):
            await run(spec(Sums(n=100, seconds=0.005, log=str(log)), **MODES["processes"]))
    assert len({line.split()[1] for line in lines(log)}) <= 2


async def test_a_worker_that_is_killed_is_replaced(
    mode_apart: dict[str, Any], tmp_path: Path
) -> None:
    """One process out of memory would cost the run."""
    log = tmp_path / "log"
    eval = Killing(n=30, seconds=0.01, log=str(log))
    summary = await run(spec(eval, concurrency=4, **mode_apart))
    assert summary["num_scored"] == 30


@chz.chz
class Killing(Sums):
    """The first execution of question 10 kills its process."""

    async def evaluate(self, task: Any) -> bool:
        first = not any(line.startswith("q10.") for line in lines(self.log))
        result = await super().evaluate(task)
        if task.a == 10 and first:
            os.kill(os.getpid(), 9)
        return result


async def test_a_rollout_that_always_kills_its_process_fails_in_the_end(
    mode_apart: dict[str, Any],
) -> None:
    """Workers would be started and killed for ever, or those beside it would fail with it."""
    summary = await run(spec(AlwaysKilling(n=24), concurrency=24, max_retries=0, **mode_apart))
    assert (summary["num_scored"], summary["num_failed"]) == (23, 1)


@chz.chz
class AlwaysKilling(Sums):
    """Question 3 kills its process, each time."""

    async def evaluate(self, task: Any) -> bool:
        if task.a == 3:
            os.kill(os.getpid(), 9)
        await asyncio.sleep(0.02)
        return True


@pytest.mark.parametrize("way", ["exit", "interrupt", "cancel", "cancel_all"])
async def test_what_ends_a_worker_from_inside_ends_the_run(
    mode_apart: dict[str, Any], way: str
) -> None:
    """A run whose rollouts never ran would end as finished and valid."""
    with pytest.raises(RuntimeError, match="ended a worker|raised CancelledError by itself"):
        await run(spec(Leaving(n=40, seconds=0.05, way=way), concurrency=4, **mode_apart))


@chz.chz
class Leaving(Sums):
    """Ends its worker: at its start, or at question 7 by cancelling all tasks but its own."""

    way: str

    @asynccontextmanager
    async def _context(self) -> AsyncIterator[None]:
        if self.way == "exit":
            sys.exit(3)
        if self.way == "interrupt":
            raise KeyboardInterrupt
        if self.way == "cancel":
            raise asyncio.CancelledError
        yield

    async def evaluate(self, task: Any) -> bool:
        if self.way == "cancel_all" and task.a == 7:
            for other in asyncio.all_tasks() - {asyncio.current_task()}:
                other.cancel()
        return await super().evaluate(task)


@pytest.mark.slow
async def test_a_blocked_worker_does_not_hold_up_ctrl_c(
    mode_apart: dict[str, Any], tmp_path: Path, database_folder: Path
) -> None:
    """Whoever stops the run would sit out every blocking call, one after the other."""
    log = tmp_path / "log"
    eval = Blocking(n=8, log=str(log))
    task = asyncio.ensure_future(run(spec(eval, run_set_id="blocked", concurrency=4, **mode_apart)))
    await until(lambda: len(lines(log)) >= 2)
    began = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - began < 2 + 2  # a slow machine's allowance
    with closing(sqlite3.connect(database_folder / "blocked.db")) as db:
        assert db.execute("SELECT count(*) FROM claim").fetchone() == (0,)
        assert db.execute("SELECT sum(losses) FROM task").fetchone() == (0,)


@chz.chz
class Blocking(Sums):
    """Blocks the event loop."""

    async def evaluate(self, task: Any) -> bool:
        append(self.log, "blocks")
        time.sleep(25)
        return True


@pytest.mark.slow
def test_evals_of_a_notebook_cell_work_in_processes(tmp_path: Path) -> None:
    """Whoever works in a notebook would be told to write a module first."""
    manager = pytest.importorskip(
        "jupyter_client.manager", reason='needs jupyter: pip install "nanoeval[test]"'
    )
    cell = f"""
import sys; sys.path.insert(0, {str(Path(__file__).resolve().parent.parent)!r})
import chz
from nanoeval import Eval, EvalSpec, RunnerArgs, Task, run
class Cell(Task):
    n: int
@chz.chz
class InCell(Eval[Cell, int]):
    def get_name(self): return "cell"
    async def get_tasks(self): return [Cell(question_id=str(i), n=i) for i in range(30)]
    async def evaluate(self, task): return twice(task.n) 
    async def get_summary(self, results): return {{"sum": sum(r for _, r in results)}}
def twice(n): return 2 * n
runner = RunnerArgs(experimental_use_multiprocessing=True, num_processes=2, should_backup=False)
summary = await run(EvalSpec(eval=InCell(), runner=runner))
print("sum is", summary["sum"])
"""
    kernel, client = manager.start_new_kernel(cwd=str(tmp_path))
    try:
        printed: list[str] = []
        client.execute_interactive(
            cell,
            timeout=50,
            output_hook=lambda message: printed.append(
                str(message["content"].get("text", message["content"].get("evalue", "")))
            ),
        )
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    assert "sum is 870" in "".join(printed)
