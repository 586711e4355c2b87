"""Runs on a Ray cluster: three nodes on this machine, of which some die."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chz
import pytest

from nanoeval import RunnerArgs, run
from nanoeval.bin.resume import resume
from nanoeval.recorder import get_recorder
from nanoeval.recorders import json_recorder
from nanoeval.setup import global_exit_stack
from tests.ray_cluster import RAY_MISSING, alive, local_cluster, outcomes, until
from tests.sample_evals import Sums, append, lines, spec

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.skipif(RAY_MISSING, reason='needs Ray: pip install "nanoeval[ray]"'),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Ray's own test cluster: a head without room for workers, and two nodes of two CPUs each."""
    with local_cluster(num_cpus=0) as cluster:
        for _ in range(2):
            cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        yield cluster


def worker_pids(log: Path) -> list[int]:
    return list({int(line.split()[1]) for line in lines(log)})


async def test_a_lost_node_costs_its_rollouts_in_flight_and_nothing_else(
    cluster: Any, tmp_path: Path
) -> None:
    """One machine that goes away would cost the run, or results that were there."""
    log = tmp_path / "log"
    eval = Sums(n=5000, seconds=0.05, log=str(log))
    runner = {"executor": "ray", "ray_num_actors": 4, "concurrency": 40}
    running = asyncio.ensure_future(run(spec(eval, run_set_id="nodes", **runner)))
    await until(lambda: outcomes("nodes") > 1000)
    # Not in a thread, with which Ray would end the node.
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    cluster.add_node(num_cpus=2)
    summary = await running
    assert summary["num_rollouts"] == summary["num_scored"] == 5000
    assert summary["accuracy"] == 0.5
    executed = Counter(line.split()[0] for line in lines(log))
    assert len(executed) == 5000
    # Two of four actors died, with ten rollouts each.
    assert sum(executed.values()) - 5000 <= 20
    assert len(worker_pids(log)) >= 5


async def test_a_hanging_actor_does_not_hold_up_the_run(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One machine that stalls would stall the run, and its late answers would count twice."""
    monkeypatch.setenv("NANOEVAL_LEASE_SECONDS", "2")
    log = tmp_path / "log"
    eval = Sums(n=400, seconds=0.05, log=str(log))
    runner = {"executor": "ray", "ray_num_actors": 2, "concurrency": 8}
    running = asyncio.ensure_future(run(spec(eval, run_set_id="hanging", **runner)))
    await until(lambda: outcomes("hanging") > 50 and len(worker_pids(log)) == 2)
    stopped, woken = worker_pids(log)
    os.kill(stopped, signal.SIGSTOP)
    os.kill(woken, signal.SIGSTOP)
    await asyncio.sleep(3)
    os.kill(woken, signal.SIGCONT)
    summary = await running
    assert summary["num_rollouts"] == summary["num_scored"] == 400
    assert summary["accuracy"] == 0.5


async def test_a_blocked_event_loop_keeps_its_claims_on_ray(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollout that computes for longer than a lease would be done again and again."""
    monkeypatch.setenv("NANOEVAL_LEASE_SECONDS", "1")
    log = tmp_path / "log"
    await run(spec(Blocking(n=2, seconds=3.0, log=str(log)), executor="ray", ray_num_actors=1))
    assert sorted(line.split()[0] for line in lines(log)) == ["q0.1.0", "q1.1.0"]


@chz.chz
class Blocking(Sums):
    """Blocks the event loop."""

    async def evaluate(self, task: Any) -> bool:
        append(self.log, f"{task.name}.{task.retry_idx} {os.getpid()}")
        time.sleep(self.seconds)
        return True


async def test_a_killed_desk_is_replaced(cluster: Any, tmp_path: Path) -> None:
    """The one actor that holds the database would be the end of the run."""
    log = tmp_path / "log"
    eval = Sums(n=1000, seconds=0.05, log=str(log))
    runner = {"executor": "ray", "ray_num_actors": 2, "concurrency": 20}
    running = asyncio.ensure_future(run(spec(eval, run_set_id="desk", **runner)))
    await until(lambda: outcomes("desk") > 100)
    found = subprocess.run(["pgrep", "-f", "ray::Desk"], capture_output=True, text=True, check=True)
    for pid in found.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    summary = await running
    assert summary["num_rollouts"] == summary["num_scored"] == 1000
    executed = Counter(line.split()[0] for line in lines(log))
    assert sum(executed.values()) - 1000 <= 40


async def test_events_of_workers_reach_the_drivers_recorder(cluster: Any, tmp_path: Path) -> None:
    """Records of other machines would lie there, or say that all happened at the end."""
    file = tmp_path / "records.jsonl"
    recorder = json_recorder(filename=file)
    runner = {"executor": "ray", "ray_num_actors": 2, "recorder": recorder, "concurrency": 4}
    began = time.time()
    summary = await run(spec(Recording(n=40, seconds=0.2), **runner))
    assert summary["num_scored"] == 40
    events = [json.loads(line) for line in file.read_text().splitlines()]
    assert events[-1]["record_type"] == "final_report"
    samplings = [event for event in events if event["record_type"] == "sampling"]
    assert {(e["sample_id"], e["group_id"]) for e in samplings} == {
        (f"q{a}", "1.0") for a in range(40)
    }
    assert {e["prompt"] for e in samplings} == {f"{a} + 0" for a in range(40)}
    assert all(event["where"] == "a worker" for event in samplings)
    # Four at once, ten times: the times are those of the rollouts.
    times = sorted(event["timestamp"] for event in samplings)
    assert times[0] > time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(began))
    assert len({moment[:20] for moment in times}) >= 2
    completed = [event for event in events if event["record_type"] == "sample_completed"]
    assert len(completed) == 40


@chz.chz
class Recording(Sums):
    """Records one sampling per rollout."""

    async def evaluate(self, task: Any) -> bool:
        assert get_recorder().current_sample_id() == task.question_id
        assert get_recorder().evalboard_url("run") is None
        get_recorder().record_sampling(f"{task.a} + 0", object(), where="a worker")
        return await super().evaluate(task)


async def test_a_recorder_that_raises_ends_a_run_on_ray(cluster: Any) -> None:
    """Records would be lost without a word."""
    from tests.ray_cluster import RefusingConfig

    runner = {"executor": "ray", "ray_num_actors": 1, "recorder": RefusingConfig()}
    with pytest.raises(Exception, match="no more paper") as caught:
        await run(spec(Recording(n=10), **runner))
    assert "record_sampling" in "".join(caught.value.__notes__)


async def test_actors_are_shared_inside_the_global_exit_stack(cluster: Any, tmp_path: Path) -> None:
    """Each run of a program would start its actors anew; and Ray that others began would end."""
    import ray

    log = tmp_path / "log"
    async with global_exit_stack:
        for name in ("first", "second"):
            eval = Sums(n=100, name=name, log=str(log))
            await run(spec(eval, executor="ray", ray_num_actors=2))
    assert len(worker_pids(log)) <= 2
    assert ray.is_initialized()
    await until(lambda: not any(alive(pid) for pid in worker_pids(log)))


async def test_resume_takes_up_a_run_on_ray(cluster: Any, tmp_path: Path) -> None:
    """A run that ended by a bug on another machine could not be gone on with."""
    log = tmp_path / "log"
    runner = {"executor": "ray", "ray_num_actors": 2, "run_set_id": "again"}
    mended = tmp_path / "mended"
    with pytest.raises(ExceptionGroup) as caught:
        await run(spec(BreakingOnce(n=50, log=str(log), name=str(mended)), **runner))
    (error,) = caught.value.exceptions
    assert isinstance(error, ZeroDivisionError)
    assert "an actor on" in "".join(error.__notes__)
    mended.touch()
    (summary,) = await resume("again")
    assert summary["num_scored"] == 50


@chz.chz
class BreakingOnce(Sums):
    """Raises at question 30 until the file `name` exists."""

    async def evaluate(self, task: Any) -> bool:
        if task.a == 30 and not os.path.exists(self.name):
            raise ZeroDivisionError("a bug")
        return await super().evaluate(task)


async def test_actors_get_the_options_that_were_asked_for(cluster: Any, tmp_path: Path) -> None:
    """Rollouts would miss their GPU, their custom resource or their environment."""
    node = cluster.add_node(num_cpus=1, num_gpus=2, resources={"tape": 3})
    cluster.wait_for_nodes()
    options = {
        "num_cpus": 0.5,
        "num_gpus": 1,
        "resources": {"tape": 2},
        "runtime_env": {"env_vars": {"COLOUR": "blue"}},
    }
    log = tmp_path / "log"
    runner = {"executor": "ray", "ray_num_actors": 1, "ray_actor_options": options}
    try:
        await run(spec(Looking(n=3, log=str(log)), **runner))
    finally:
        cluster.remove_node(node, allow_graceful=True)
    for line in lines(log):
        found = json.loads(line)
        assert found["COLOUR"] == "blue"
        assert found["CUDA_VISIBLE_DEVICES"] in {"0", "1"}
        assert (found["CPU"], found["tape"]) == (0.5, 2)
    assert len(lines(log)) == 3


@chz.chz
class Looking(Sums):
    """Notes what its actor has."""

    async def evaluate(self, task: Any) -> bool:
        import ray

        has = ray.get_runtime_context().get_assigned_resources()
        names = ("COLOUR", "CUDA_VISIBLE_DEVICES")
        append(self.log, json.dumps(has | {name: os.environ.get(name) for name in names}))
        return True


async def test_workers_without_room_are_told_of(
    cluster: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run would wait for a GPU that nobody has, and say nothing."""
    from nanoeval._executors import ray as executor

    monkeypatch.setattr(executor, "SECONDS_TO_TELL", 0.3)
    options = {"resources": {"gold": 1}}
    runner = {"executor": "ray", "ray_num_actors": 1, "ray_actor_options": options}
    running = asyncio.ensure_future(run(spec(Sums(n=5), **runner)))
    await asyncio.sleep(2)
    assert not running.done()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert "0 of 1 worker actors have found room" in capsys.readouterr().err


async def test_another_cluster_than_the_connected_one_is_refused(cluster: Any) -> None:
    """Rollouts would run on a cluster that was not asked for."""
    from nanoeval._executors.ray import RayClusterError

    await run(spec(Sums(n=5), executor="ray", ray_num_actors=1, ray_address=cluster.address))
    with pytest.raises(RayClusterError, match=f"10.0.0.1:1.* connected to .*{cluster.address}"):
        await run(spec(Sums(n=5), executor="ray", ray_address="10.0.0.1:1"))


async def test_bad_options_are_refused_before_anything_is_queued(database_folder: Path) -> None:
    """A slip in an option would show after the tasks were queued, deep inside Ray."""
    with pytest.raises(ValueError, match="num_cpu"):
        await run(spec(Sums(), executor="ray", ray_actor_options={"num_cpu": 1}))
    assert list(database_folder.glob("*.db")) == []


def test_rays_arguments_need_ray() -> None:
    """An option would be accepted and ignored."""
    for name, value in {
        "ray_address": "auto",
        "ray_num_actors": 2,
        "ray_actor_options": {},
    }.items():
        with pytest.raises(ValueError, match=f'{name}=.* needs executor="ray"'):
            RunnerArgs(**{name: value})
