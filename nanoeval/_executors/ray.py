"""Carries out a run's rollouts in actors of a Ray cluster. Needs the package `ray`.

The database stays here. `_ray_actors.Desk`, an actor on this node, is the workers' way to it; what
they record comes back through it to this process's own recorder.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from nanoeval import _codec
from nanoeval._executors._answers import STOP_WITHIN
from nanoeval._recorder_base import event_time
from nanoeval._run_set import RunSet
from nanoeval._store import Progress
from nanoeval._worker import Job, first_errors
from nanoeval.asyncio_utils import cancel_task, uninterrupted
from nanoeval.eval import RunnerArgs
from nanoeval.library_config import get_library_config
from nanoeval.recorder import set_default_recorder
from nanoeval.setup import say, shared_resource

POLL = 0.1
# Workers that could not be placed for so long are told of, once.
SECONDS_TO_TELL = 10.0
# Desks or workers that die this often in a row, with nothing done in between, end the run.
MAX_FAILED_STARTS = 3


class RayClusterError(RuntimeError):
    """The Ray cluster cannot be used, or its actors end before they have begun to serve."""


def require_ray(runner: RunnerArgs) -> None:
    """Raise ImportError or ValueError, with the remedy, where `runner` cannot be served by Ray."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = _address_for(runner)
    if (_started_address() if address == "auto" else address).startswith(("local", "127.")):
        # Read by Ray as it is imported: a cluster of this machine alone is on loopback alone.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            'executor="ray" needs the package ray: pip install "nanoeval[ray]"'
        ) from error
    try:
        ray.remote(_Probe).options(**_actor_options(runner))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"ray_actor_options={runner.ray_actor_options!r} cannot be given to an actor: {error}"
        ) from error


class _Probe:
    """An actor that is never made."""


def _address_for(runner: RunnerArgs) -> str:
    """The cluster that is asked for, else "auto" where this machine belongs to one, else "local".

    Ray itself would also join what another program started for itself alone, and wait for minutes
    for a cluster that is gone. Raises ValueError for an address that cannot serve.
    """
    asked = runner.ray_address or os.environ.get("RAY_ADDRESS") or ""
    if "://" in asked:
        raise ValueError(
            f"ray_address={asked!r}: the run's database is on this machine, so this must be a node"
            " of the cluster: run the program there (`ray job submit` does), or join with"
            " `ray start --address=HOST:PORT`; then leave ray_address out"
        )
    return asked or ("auto" if _listens(_started_address()) else "local")


def _started_address() -> str:
    """The cluster that `ray start` made this machine a part of, as it noted it; "" without one."""
    note = Path(os.environ.get("RAY_TMPDIR") or "/tmp", "ray", "ray_current_cluster")
    return note.read_text().strip() if note.exists() else ""


def _listens(address: str, seconds: float = 2.0) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=seconds).close()
    except (OSError, ValueError):
        return False
    return True


def _actor_options(runner: RunnerArgs) -> dict[str, Any]:
    return {"num_cpus": 1, **(runner.ray_actor_options or {})}


async def execute(run_set: RunSet, job: Job, on_progress: Callable[[Progress], None]) -> None:
    """Run all rollouts of `job` in actors; `on_progress` is called as they finish."""
    require_ray(job.runner)
    options = json.dumps(_actor_options(job.runner), default=repr, sort_keys=True)
    key = ("ray", job.runner.ray_address, job.runner.ray_num_actors, options)
    async with shared_resource(key, RayPool(job.runner)) as pool:
        serving = asyncio.ensure_future(pool.serve(run_set, job))
        try:
            while not serving.done():
                await asyncio.wait([serving], timeout=POLL)
                on_progress(await run_set.store.progress(job.eval_id))
            await serving
        finally:
            await cancel_task(serving)


def _connected_to() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


class RayPool:
    """A connection to a cluster, and actors on it; an async context manager that ends them."""

    def __init__(self, runner: RunnerArgs) -> None:
        self._runner = runner
        self._options = _actor_options(runner)
        # Ray's own processes die with the thread that started them, and its calls block.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nanoeval-ray")
        self._is_ours = False
        self.workers: list[Any] = []
        self.numbers = itertools.count(1)

    async def __aenter__(self) -> Self:
        try:
            await self._in_thread(self._connect)
        except BaseException:
            # Ray's start cannot be interrupted; without an end in order, its agents would stay.
            await uninterrupted(self.__aexit__())
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._in_thread(self._disconnect)
        self._thread.shutdown(wait=False)

    async def _in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _connect(self) -> None:
        import ray

        logger = logging.getLogger("ray")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it would tell that signals are ours, and where it logs
        try:
            if not ray.is_initialized():
                self._join_or_start()
                self._is_ours = True
            elif self._runner.ray_address not in {None, "auto", "local", (here := _connected_to())}:
                raise RayClusterError(
                    f"ray_address={self._runner.ray_address!r}, but this process is connected to"
                    f" the cluster at {here!r}; leave ray_address out, or call ray.shutdown() first"
                )
            num_actors = self._runner.ray_num_actors or self._num_that_fit()
            self.workers = [self._new_worker() for _ in range(num_actors)]
        finally:
            logger.setLevel(level)

    def _join_or_start(self) -> None:
        import ray

        address = _address_for(self._runner)
        quiet = {"configure_logging": False, "log_to_driver": False}
        try:
            if address == "local":
                ray.init(address="local", include_dashboard=False, **quiet)
                return
            if not _listens(_started_address() if address == "auto" else address, seconds=10):
                raise ConnectionError("nobody listens there")
            # Ray finds the noted one by itself, and only then whether it wants a token.
            ray.init(address=None if address == "auto" else address, **quiet)
        except (OSError, ValueError, RuntimeError) as error:
            raise RayClusterError(
                f"no Ray cluster at ray_address={address!r} ({error}). Start one with"
                " `ray start --head` (with RAY_AUTH_MODE=token in both places where it asks for a"
                " token), or leave ray_address out for one on this machine"
            ) from error

    async def kill(self, actor: Any) -> None:
        """End an actor at once."""
        import ray

        await self._in_thread(ray.kill, actor)

    async def replace(self, place: int) -> None:
        """Put a new worker where one died or hangs."""
        await self.kill(self.workers[place])
        self.workers[place] = await self._in_thread(self._new_worker)

    async def tell_of_missing(self, num_placed: int) -> None:
        """Say what workers wait for that have found no place."""
        import ray

        has = await self._in_thread(ray.cluster_resources)
        asked = {name: value for name, value in self._options.items() if name != "runtime_env"}
        say(
            f"nanoeval: {num_placed} of {len(self.workers)} worker actors have found room: each"
            f" asks for {asked}, and the cluster has {has}"
        )

    def _num_that_fit(self) -> int:
        import ray

        num_cpus = float(self._options["num_cpus"] or 1)
        return max(1, int(ray.cluster_resources().get("CPU", 1) / num_cpus))

    def _disconnect(self) -> None:
        import ray

        for worker in self.workers:
            ray.kill(worker)
        if self._is_ours:
            ray.shutdown()

    def _new_worker(self) -> Any:
        import ray

        from nanoeval._executors._ray_actors import RayWorker

        config = _codec.dumps(get_library_config(), "library_config")
        path = [folder for folder in sys.path if folder]
        return ray.remote(RayWorker).options(**self._options).remote(path, config)

    def _new_desk(self, run_set: RunSet) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from nanoeval._executors._ray_actors import Desk

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        desk = ray.remote(Desk).options(
            num_cpus=0, scheduling_strategy=here, max_concurrency=10_000
        )
        return desk.remote(str(run_set.store.path), run_set.store.lease)

    async def serve(self, run_set: RunSet, job: Job) -> None:
        """Have all workers serve `job`; returns when its eval is done.

        What dies is replaced and its claims go back. Raises what `Worker.serve` raised in any of
        them, after all have stopped, and what the recorder raises.
        """
        n_failed = 0
        while n_failed < MAX_FAILED_STARTS:
            before = (await run_set.store.progress(job.eval_id)).num_done
            shift = _Shift(self, run_set, job, await self._in_thread(self._new_desk, run_set))
            if await shift.work():
                return
            num_done = (await run_set.store.progress(job.eval_id)).num_done
            n_failed = 0 if num_done > before else n_failed + 1
            say("nanoeval: the actor that holds the run's database is gone; another takes over")
        raise RayClusterError(
            f"{n_failed} desk actors in a row ended before anything was done; see Ray's own logs,"
            " in its session folder"
        )


class _Shift:
    """The workers' time with one desk: to the end of the eval, or of the desk."""

    def __init__(self, pool: RayPool, run_set: RunSet, job: Job, desk: Any) -> None:
        self._pool, self._run_set, self._job, self._desk = pool, run_set, job, desk
        self._is_over = asyncio.Event()
        self._is_recording_over = False

    async def work(self) -> bool:
        """Whether the eval came to its end; False when the desk was lost. Raises as `serve`."""
        from ray.exceptions import RayActorError

        from nanoeval._executors._ray_actors import DeskLostError

        places = range(len(self._pool.workers))
        watching = asyncio.create_task(self._watch())
        recording = asyncio.create_task(self._record())
        working = asyncio.create_task(
            first_errors({asyncio.create_task(self._serve_in(place)) for place in places})
        )
        try:
            await asyncio.wait([working, recording], return_when=asyncio.FIRST_COMPLETED)
            await cancel_task(working)
            # Also what was recorded before an error, or before Ctrl-C.
            await self._end(recording)
            await working
            return True
        except asyncio.CancelledError:
            await cancel_task(working)
            await uninterrupted(self._end(recording))
            raise
        except (DeskLostError, RayActorError):
            for executor_id, role, _ in await self._run_set.store.live_executors():
                if role == "worker":
                    await self._run_set.store.end_executor(executor_id, "desk lost")
            return False
        finally:
            await cancel_task(working)
            await cancel_task(watching)
            await cancel_task(recording)
            await self._pool.kill(self._desk)

    async def _watch(self) -> None:
        """See when the eval is over; tell, once, of workers that wait for room."""
        told_at = time.monotonic() + SECONDS_TO_TELL
        while not self._is_over.is_set():
            await asyncio.sleep(POLL)
            progress = await self._run_set.store.progress(self._job.eval_id)
            if progress.is_done or progress.state != "running":
                self._is_over.set()
            elif time.monotonic() > told_at:
                told_at = float("inf")
                num_placed = await self._desk.num_registered.remote()
                if num_placed < len(self._pool.workers):
                    await self._pool.tell_of_missing(num_placed)

    async def _serve_in(self, place: int) -> list[BaseException]:
        """Have one worker after the other serve at a place; returns what the eval raised there."""
        from ray.exceptions import RayActorError, RayTaskError

        n_failed = 0
        while True:
            order = await self._order()
            worker = self._pool.workers[place]
            answer = asyncio.ensure_future(_awaited(worker.serve.remote(order, self._desk)))
            over = asyncio.ensure_future(self._is_over.wait())
            try:
                await asyncio.wait([answer, over], return_when=asyncio.FIRST_COMPLETED)
                if not await self._is_answered(answer, order.number):
                    await self._pool.replace(place)
                    return []
                errors = answer.result()
                return list(_codec.loads(errors)) if errors else []
            except asyncio.CancelledError:
                seen = asyncio.ensure_future(_awaited(worker.stop.remote(order.number)))
                if not await self._is_answered(answer, order.number, seen):
                    await self._pool.replace(place)
                await cancel_task(seen)
                raise
            except RayTaskError as error:
                raise error.cause from None
            except RayActorError:
                executor_id = await self._desk.executor_of.remote(order.number)
                n_failed = n_failed + 1 if executor_id is None else 0
                if n_failed == MAX_FAILED_STARTS:
                    raise RayClusterError(
                        f"{n_failed} actors in a row ended before they began to serve; see Ray's"
                        " own logs, in its session folder"
                    ) from None
                await self._bury(executor_id)
                await self._pool.replace(place)
            finally:
                await cancel_task(over)
                await cancel_task(answer)

    async def _is_answered(
        self, answer: asyncio.Future[Any], number: int, seen: asyncio.Future[Any] | None = None
    ) -> bool:
        """Wait for the answer to an order while its worker, in the end perhaps busy with clean-up,
        shows signs of life; one that hangs loses its lease, one that was never placed has none, and
        one whose event loop is blocked has not `seen` the stop."""
        store = self._run_set.store
        began = time.monotonic()
        while not answer.done():
            await asyncio.wait([answer], timeout=POLL)
            does_react = seen is None or seen.done() or time.monotonic() - began < STOP_WITHIN
            if not answer.done():
                executor_id = await self._desk.executor_of.remote(number)
                live = [id for id, _, _ in await store.live_executors()]
                if executor_id not in live or not does_react:
                    await asyncio.wait([answer], timeout=POLL)
                    if not answer.done() and executor_id is not None:
                        await store.end_executor(executor_id, "actor hung")
                    return answer.done()
        return True

    async def _order(self) -> Any:
        from nanoeval._executors._ray_actors import Order

        store, recorder = self._run_set.store, self._job.recorder
        stored = next(e for e in await store.evals() if e.eval_id == self._job.eval_id)
        return Order(
            number=next(self._pool.numbers),
            path=str(store.path),
            lease=store.lease,
            stored=stored,
            definitions=await store.definitions(self._job.eval_id),
            run_spec=recorder.run_spec,
            urls={view: recorder.evalboard_url(view) for view in ("run", "monitor")},
            num_sharers=len(self._pool.workers),
        )

    async def _bury(self, executor_id: int | None) -> None:
        num_requeued = 0
        if executor_id is not None:
            store = self._run_set.store
            num_requeued = await store.end_executor(executor_id, "actor died", losses=1)
        say(
            f"nanoeval: a worker actor is gone; {num_requeued} of its rollouts go back to the"
            " queue, another takes over as soon as there is room"
        )

    async def _end(self, recording: asyncio.Task[None]) -> None:
        """Wait until all is recorded that the desk has; raises what the recorder raises."""
        self._is_recording_over = True
        self._desk.wake.remote()
        await recording

    async def _record(self) -> None:
        """Have the run's recorder record what the workers' did, until there is no more."""
        while True:
            events = await self._desk.events.remote(self._job.eval_id)
            for event in events:
                self._record_event(*_codec.loads(event))
            if not events and self._is_recording_over:
                return

    def _record_event(
        self,
        happened_at: float,
        sample_id: str,
        group_id: str,
        extra: dict[str, Any],
        method: str,
        values: Sequence[Any],
        fields: dict[str, Any],
    ) -> None:
        recorder = self._job.recorder
        token = event_time.set(happened_at)
        try:
            with set_default_recorder(recorder, sample_id, group_id), ExitStack() as inner:
                if extra:
                    scope = recorder.as_default_recorder(sample_id, group_id, **extra)
                    inner.enter_context(scope)
                getattr(recorder, method)(*values, **fields)
        except Exception as error:
            error.add_note(f"raised by {type(recorder).__name__}.{method}")
            raise
        finally:
            event_time.reset(token)


async def _awaited(reference: Any) -> Any:
    return await reference
