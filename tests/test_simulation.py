"""The model of a cluster that docs/scaling.md rests on."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NEVER = 1e12


def load_model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cluster_model", BENCHMARKS / "cluster_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cluster_model"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


model = load_model()
# Nothing costs anything.
FREE = model.Costs(**dict.fromkeys(model.Costs.__dataclass_fields__, 0.0))
CLUSTER = model.Cluster(
    nodes=4, seconds=1.0, actors_per_node=2, places_per_actor=16, seconds_between_failures=NEVER
)


def rate(cluster: object, costs: object, warm_up: float = 5.0, window: float = 20.0) -> float:
    simulation = model.Simulation(cluster, costs)
    simulation.run_until(warm_up)
    ended = simulation.num_ended
    simulation.run_until(warm_up + window)
    return (simulation.num_ended - ended) / window


@pytest.mark.parametrize("is_loss_seen_at_once", [True, False])
def test_every_rollout_ends_exactly_once_while_nodes_fail(is_loss_seen_at_once: bool) -> None:
    """A rollout that is lost or counted twice would make every rate of the model wrong."""
    cluster = replace(
        CLUSTER,
        seconds_between_failures=15.0,
        restart=3.0,
        is_loss_seen_at_once=is_loss_seen_at_once,
    )
    simulation = model.Simulation(cluster, model.Costs(), num_tasks=3_000)
    simulation.run_until(10_000.0)
    assert simulation.is_done
    assert simulation.num_failures > 5
    assert simulation.num_lost > 0
    assert simulation.times_ended == dict.fromkeys(range(3_000), 1)


def test_without_costs_the_rollouts_are_the_limit() -> None:
    """A bias here (a start that is no steady state, say) would show in every scenario."""
    reached = rate(replace(CLUSTER, latency=0.0), FREE, window=100.0)
    assert reached == pytest.approx(CLUSTER.ideal, rel=0.05)


@pytest.mark.parametrize(
    ("costs", "per_second"),
    [
        # Two halves of a rollout, one on its way in and one on its way out.
        (replace(FREE, transaction_per_rollout=0.02), 50.0),
        (replace(FREE, desk_per_rollout=0.04), 25.0),
        # 3 events of 1,000 bytes each.
        (replace(FREE, record_per_event=0.005, record_per_byte=5e-6), 1 / 0.03),
    ],
    ids=["database", "desk", "recorder"],
)
def test_a_station_limits_the_rate_to_what_it_can_serve(costs: object, per_second: float) -> None:
    """The first limit is what the table is about."""
    assert rate(CLUSTER, costs) == pytest.approx(per_second, rel=0.05)


def test_the_network_limits_the_rate_to_its_bandwidth() -> None:
    """5,000 bytes a rollout come back: its result and three events."""
    cluster = replace(CLUSTER, bandwidth=100_000.0)
    assert rate(cluster, FREE) == pytest.approx(20.0, rel=0.05)


def test_calls_that_wait_can_share_a_transaction() -> None:
    """The first rollout to end calls alone, the other 15 ride on the next call: 8 per call."""
    cluster = replace(CLUSTER, seconds=0.01, poll=math.inf)
    costs = replace(FREE, transaction=1.0)
    apart = rate(cluster, costs, window=100.0)
    assert apart == pytest.approx(8.0, rel=0.1)
    shared = rate(replace(cluster, do_calls_share_transactions=True), costs, window=100.0)
    assert shared > 3 * apart


def test_a_failed_node_loses_its_rollouts_in_flight_and_nothing_else() -> None:
    """32 places on each node are lost per failure, at most; what had ended before is kept."""
    cluster = replace(CLUSTER, seconds_between_failures=50.0, restart=5.0, lease=2.0)
    simulation = model.Simulation(cluster, FREE)
    simulation.run_until(1_000.0)
    in_flight_of_a_node = 2 * 16
    assert simulation.num_failures > 50
    per_failure = simulation.num_lost / simulation.num_failures
    assert per_failure == pytest.approx(in_flight_of_a_node, rel=0.05)
