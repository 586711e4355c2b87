"""Measures what `cluster_model.py` asks for, on the real store, recorder and worker.

Last it compares the model with real runs in process. Run by `simulate_cluster.py --measure`.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import math
import os
import pickle
import sqlite3
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import chz
from cluster_model import Cluster, Costs, Simulation
from overhead import Noop, machine

from nanoeval import EvalSpec, RunnerArgs, Task, _codec, _schema, run
from nanoeval._chores import decoded
from nanoeval._database_file import BackupSource, check_database, connect, in_transaction
from nanoeval._store import Claim, Exchange, Finish, NewTask, Progress, Store, beat, reap
from nanoeval._worker import Job, Worker
from nanoeval.json_recorder import JsonRecorder
from nanoeval.recorder_protocol import BasicRunSpec
from nanoeval.recorders import dummy_recorder
from nanoeval.setup import tune_interpreter

LARGE = 100_000
TASK_BYTES = 500
# Rollouts, seconds that each sleeps, in flight.
MODELLED_RUNS = {
    "no-op, 4,096 in flight": (30_000, 0.0, 4_096),
    "sleep of 1 s, 5,000 in flight": (20_000, 1.0, 5_000),
    "sleep of 50 ms, 4,096 in flight": (40_000, 0.05, 4_096),
    "sleep of 50 ms, 64 in flight": (5_000, 0.05, 64),
}


@asynccontextmanager
async def queued(folder: str, n: int) -> AsyncIterator[tuple[Store, int, int]]:
    """A store with a running eval of `n` tasks; yields it with the ids of executor and eval."""
    path = Path(folder) / f"{time.monotonic_ns()}.db"
    async with Store(path, lease=3600) as store:
        await store.create_run_set(path.stem, "benchmark")
        executor_id = await store.add_executor("driver")
        eval_id = await store.add_eval("benchmark", "none", None, b"")
        payload = _codec.dumps(b"x" * TASK_BYTES, "a task")
        for first in range(0, n, 512):
            positions = range(first, min(first + 512, n))
            tasks = [NewTask(str(i), 1, 0, None, payload) for i in positions]
            await store.add_tasks(eval_id, first, tasks)
        await store.start_eval(eval_id, path.stem, None, None)
        yield store, executor_id, eval_id


def finishes_of(claims: list[Claim], payload: bytes) -> list[Finish]:
    now = time.time()
    return [Finish(c, _schema.SCORED, now, now, payload, score=1.0, preview="true") for c in claims]


async def exchange_seconds(
    folder: str, batch: int, calls: int, result_bytes: int = 20, num_held: int = 0
) -> float:
    """Seconds of an exchange that finishes `batch` and claims as many, `num_held` being claimed."""
    payload = _codec.dumps(b"x" * result_bytes, "a result")
    async with queued(folder, batch * (calls + 2) + num_held) as (store, executor_id, eval_id):
        if num_held:
            await store.exchange(await store.add_executor("worker"), eval_id, [], num_held)
        claims = (await store.exchange(executor_id, eval_id, [], batch)).claims()
        spent = 0.0
        for _ in range(calls):
            finishes = finishes_of(claims, payload)
            started_at = time.perf_counter()
            claims = (await store.exchange(executor_id, eval_id, finishes, batch)).claims()
            spent += time.perf_counter() - started_at
    return spent / calls


async def store_costs(folder: str) -> dict[str, float]:
    """What exchanges cost: each, per rollout, per claim in flight, per byte of a result."""
    seconds = {
        n: await exchange_seconds(folder, n, max(20, 8_000 // n)) for n in (1, 16, 128, 1024)
    }
    for n, value in seconds.items():
        print(f"exchange of {n:>5} rollouts: {value * 1e3:8.3f} ms, {value / n * 1e6:7.1f} µs each")
    per_rollout = (seconds[1024] - seconds[1]) / 1023
    held = await exchange_seconds(folder, 1, 200, num_held=LARGE)
    heavy = await exchange_seconds(folder, 128, 20, result_bytes=20_000)
    return {
        "transaction": seconds[1] - per_rollout,
        "transaction_per_rollout": per_rollout,
        "transaction_per_claim_held": max(0.0, held - seconds[1]) / LARGE,
        "transaction_per_byte": max(0.0, heavy - seconds[128]) / (128 * 20_000),
    }


async def file_costs(folder: str, n: int = LARGE) -> dict[str, float]:
    """What a finished database costs to keep, copy, check and read."""
    payload = _codec.dumps(True, "a result")
    began = time.perf_counter()
    async with queued(folder, n) as (store, executor_id, eval_id):
        queueing = time.perf_counter() - began
        began = time.perf_counter()
        await store.refuse_duplicates(eval_id)
        looking = time.perf_counter() - began
        claims = (await store.exchange(executor_id, eval_id, [], 1024)).claims()
        while claims:
            finishes = finishes_of(claims, payload)
            claims = (await store.exchange(executor_id, eval_id, finishes, 1024)).claims()
        started_at = time.perf_counter()
        async for _ in decoded(store.results(await store.counted(eval_id))):
            pass
        summary = time.perf_counter() - started_at
    size = store.path.stat().st_size
    with closing(BackupSource(store.path)) as source:
        copying = seconds_of(lambda: source.back_up(store.path.with_suffix(".copy")))
    checking = seconds_of(lambda: check_database(store.path))
    return {
        "queue_per_row": queueing / n,
        "duplicates_per_row": looking / n,
        "backup_per_byte": copying / size,
        "check_per_byte": checking / size,
        "summary_per_row": summary / n,
        "file_bytes_per_rollout": size / n - TASK_BYTES - len(payload),
    }


async def heartbeat_costs(folder: str) -> dict[str, float]:
    """What a heartbeat costs, and a look for the dead for each executor that there is."""
    n = 1_000
    async with queued(folder, 1) as (store, executor_id, _):
        for _ in range(n - 1):
            await store.add_executor("worker")
        db = connect(store.path)
        # Not this machine's processes: their leases alone tell whether they live.
        db.execute("UPDATE executor SET host_id = 'elsewhere'")

        def median_of(work: Callable[[sqlite3.Connection], object]) -> float:
            beats = [seconds_of(lambda: in_transaction(db, work)) for _ in range(50)]
            return statistics.median(beats)

        alone = median_of(lambda db: beat(db, executor_id, 3600))
        looking = median_of(lambda db: reap(db, losses=1))
        db.close()
    return {"heartbeat": alone, "heartbeat_per_actor": looking / n}


def seconds_of(work: Callable[[], object]) -> float:
    started_at = time.perf_counter()
    work()
    return time.perf_counter() - started_at


def desk_costs() -> dict[str, float]:
    """What the desk unpickles and pickles: per rollout, and per byte of payload."""

    def seconds(size: int, n: int = 1024) -> float:
        claims = [Claim(i, 1, str(i), 1, 0, 0, os.urandom(TASK_BYTES)) for i in range(n)]
        finishes = finishes_of(claims, b"")
        for finish in finishes:
            finish.payload = os.urandom(size)  # one for all would be pickled once
        handed_in = pickle.dumps(finishes, 5)

        def pass_on() -> None:
            pickle.loads(handed_in)
            pickle.dumps(claims, 5)

        return min(seconds_of(pass_on) for _ in range(20)) / n

    small, large = seconds(20), seconds(20_000)
    return {"desk_per_rollout": small, "desk_per_byte": max(0.0, large - small) / 20_000}


def recorder_costs(folder: str) -> dict[str, float]:
    """What the JSON recorder takes for an event, and for each of its bytes."""

    def seconds(size: int, n: int = 5_000) -> float:
        recorder = JsonRecorder(
            BasicRunSpec(run_id="none", run_set_id="benchmark"), Path(folder) / f"{size}.jsonl"
        )
        with recorder:
            text = "x" * size
            return seconds_of(lambda: [recorder.record_sampling(text, "2") for _ in range(n)]) / n

    small, large = seconds(50), seconds(10_000)
    return {
        "record_per_event": small,
        "record_per_byte": max(0.0, large - small) / (10_000 - 50),
    }


class EndlessStore:
    """Gives claims and takes finishes without a database: what is left is the worker's own cost."""

    def __init__(self, n: int) -> None:
        self._payload = _codec.dumps_model(Task(question_id="q"), "a task")
        self._n, self._num_claimed, self._num_done = n, 0, 0

    async def exchange(
        self, executor_id: int, eval_id: int, finishes: list[Finish], wanted: int, sharers: int
    ) -> Exchange:
        await asyncio.sleep(0)
        self._num_done += len(finishes)
        first = self._num_claimed
        self._num_claimed = min(self._n, first + wanted)
        size = len(self._payload)
        rows = [(i, 1, str(i), 1, 0, 0, size) for i in range(first, self._num_claimed)]
        counts = (self._n, self._num_done, 0, 0, 0, 0, 0.0, self._num_claimed - self._num_done)
        progress = Progress("running", 4096, *counts)
        payloads = self._payload * len(rows)
        return Exchange(progress, num_claims=len(rows), columns=json.dumps(rows), payloads=payloads)

    async def release(self, executor_id: int, eval_id: int) -> None:
        pass


async def worker_costs() -> dict[str, float]:
    """What a rollout costs its worker's event loop: one that returns at once, one that waits."""

    async def seconds(sleep: float, n: int = 20_000) -> float:
        recorder_config = dummy_recorder(log=False)
        spec = EvalSpec(eval=Noop(n=n, sleep=sleep), runner=RunnerArgs(recorder=recorder_config))
        recorder = await recorder_config.factory(spec, n)
        store: Any = EndlessStore(n)
        worker = Worker(store, 1, Job(1, "none", spec.eval, spec.runner, recorder))
        started_at = time.process_time()
        await worker.serve()
        return (time.process_time() - started_at) / n

    at_once = await seconds(0.0)
    return {"worker_per_rollout": at_once, "worker_per_wait": await seconds(0.01) - at_once}


def ray_costs(calls: int = 2_000) -> dict[str, float]:
    """What a call takes of an actor's processor in Ray, with next to nothing in it."""
    try:
        import ray
    except ImportError:
        print("desk_per_call is not measured: Ray is missing (pip install ray)")
        return {}

    @ray.remote(num_cpus=0)
    class Desk:
        async def exchange(self, finishes: list[int]) -> list[int]:
            return finishes

        async def cpu_seconds(self) -> float:
            return time.process_time()

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    try:
        desk = Desk.remote()  # type: ignore[attr-defined]
        ray.get([desk.exchange.remote([1]) for _ in range(100)])
        before = ray.get(desk.cpu_seconds.remote())
        for _ in range(calls // 50):
            ray.get([desk.exchange.remote([1]) for _ in range(50)])
        return {"desk_per_call": (ray.get(desk.cpu_seconds.remote()) - before) / calls}
    finally:
        ray.shutdown()


def real_rate(n: int, sleep: float, concurrency: int) -> float:
    """Rollouts per second of a run in process, from the first one's start to the last one's end."""
    seen: list[float] = []

    @chz.chz
    class Timed(Noop):
        async def evaluate(self, task: Task) -> bool:
            seen.append(time.perf_counter())
            correct = await Noop.evaluate(self, task)
            seen.append(time.perf_counter())
            return correct

    recorder = dummy_recorder(log=False)
    runner = RunnerArgs(concurrency=concurrency, recorder=recorder, should_backup=False)
    with contextlib.redirect_stderr(io.StringIO()):
        asyncio.run(run(EvalSpec(eval=Timed(n=n, sleep=sleep), runner=runner)))
    return n / (seen[-1] - seen[0])


def foretold_rate(costs: Costs, n: int, sleep: float, concurrency: int) -> float:
    """What the model says of the same run: one actor, nothing between it and the database."""
    cluster = Cluster(
        nodes=1, seconds=sleep, actors_per_node=1, places_per_actor=concurrency, sigma=0,
        task_bytes=150, result_bytes=20, events=0, latency=0, bandwidth=math.inf,
        seconds_between_failures=1e12,
    )  # fmt: skip
    in_process = replace(costs, desk_per_call=0, desk_per_rollout=0, desk_per_byte=0)
    simulation = Simulation(cluster, in_process, num_tasks=n)
    simulation.run_until(math.inf)
    return n / simulation.now


def measure() -> None:
    """Measure and print all costs, and the model beside real runs with them."""
    tune_interpreter()  # as nanoeval_entrypoint does
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        os.environ |= {f"NANOEVAL_{what}_DIR": f"{folder}/{what}" for what in ("DATABASE", "ROOT")}
        print(machine())
        found = asyncio.run(store_costs(folder)) | asyncio.run(heartbeat_costs(folder))
        found |= desk_costs() | ray_costs() | recorder_costs(folder)
        found |= asyncio.run(worker_costs()) | asyncio.run(file_costs(folder))
        costs = replace(Costs(), **found)
        for name, value in asdict(costs).items():
            print(
                f"    {name}: float = {value:.2e}" + ("" if name in found else "  # not measured")
            )
        for name, case in MODELLED_RUNS.items():
            real = statistics.median(real_rate(*case) for _ in range(3))
            foretold = foretold_rate(costs, *case)
            print(
                f"{name}: {real:,.0f}/s, the model says {foretold:,.0f}/s ({foretold / real:.2f})"
            )
