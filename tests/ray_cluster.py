"""What tests on Ray share: a cluster on loopback, and a recorder that refuses."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import chz

from nanoeval._dummy_recorder import DummyRecorder
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


class Refusing(DummyRecorder):
    """Raises at the first sampling."""

    def record_sampling(self, prompt: Any, sampled: Any, **fields: Any) -> None:
        raise RuntimeError("no more paper")


@chz.chz
class RefusingConfig(RecorderConfig):
    """Builds a `Refusing`."""

    async def factory(self, spec: Any, num_tasks: int) -> Any:
        return Refusing(self._make_default_run_spec(spec))
