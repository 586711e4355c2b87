"""What tests on Ray share: a cluster on loopback, looks at a run, and a recorder that refuses."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import chz

from nanoeval._dummy_recorder import DummyRecorder
from nanoeval._run_set import database_path
from nanoeval.recorder_protocol import RecorderConfig

RAY_MISSING = importlib.util.find_spec("ray") is None


@contextmanager
def local_cluster(num_cpus: int) -> Iterator[Any]:
    """A cluster whose head has `num_cpus`, on loopback alone, with this process connected to it."""
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": num_cpus, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def outcomes(run_set_id: str) -> int:
    """How many outcomes a run set's database holds."""
    try:
        with closing(sqlite3.connect(f"file:{database_path(run_set_id)}?mode=ro", uri=True)) as db:
            return int(db.execute("SELECT count(*) FROM outcome").fetchone()[0])
    except sqlite3.Error:
        return 0


async def until(condition: Callable[[], bool], seconds: float = 40) -> None:
    """Wait for `condition`; AssertionError when it does not come to pass in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process is there, and not as a zombie."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


class Refusing(DummyRecorder):
    """Raises at the first sampling."""

    def record_sampling(self, prompt: Any, sampled: Any, **fields: Any) -> None:
        raise RuntimeError("no more paper")


@chz.chz
class RefusingConfig(RecorderConfig):
    """Builds a `Refusing`."""

    async def factory(self, spec: Any, num_tasks: int) -> Any:
        return Refusing(self._make_default_run_spec(spec))
