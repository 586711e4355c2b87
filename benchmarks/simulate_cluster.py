"""What limits nanoeval on a Ray cluster: a table of scenarios from `cluster_model.py`.

    python benchmarks/simulate_cluster.py [--json results.json] [--set actors_per_node=16 events=10]
    python benchmarks/simulate_cluster.py --measure

The model runs on the costs that `--measure` found; measuring prints this machine's, and how well
the model foretells real runs with them. A window of the steady state is simulated; what 100 million
rollouts take is that rate, carried on.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster_model import STATIONS, Cluster, Costs, Simulation

NUM_TASKS = 100_000_000
# How long the model runs before its window and in it, at least: seconds, calls of every actor,
# rollouts. Where the calls queue, short and long ones alternate, so that it takes several of each.
WARM_UP = (10.0, 4, 0)
WINDOW = (10.0, 12, 3_000)

# What could be changed, each on top of those before it: (field of Costs or Cluster, value).
CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "the desk itself tells that there is no news": {"poll": math.inf},
    "one caller per node, for all its actors": {"actors_per_node": 1, "places_per_actor": 512},
    "calls that wait share a transaction": {"do_calls_share_transactions": True},
}


@dataclass(frozen=True)
class Outlook:
    """What a cluster does in its steady state. `shares` are the stations' shares of their time."""

    cluster: Cluster
    per_second: float
    shares: dict[str, float]

    @property
    def of_ideal(self) -> float:
        return self.per_second / self.cluster.ideal

    @property
    def bottleneck(self) -> str:
        """The station that is always busy, or nothing where the rollouts themselves are it."""
        name, share = max(self.shares.items(), key=lambda item: item[1])
        return name if share > 0.95 else ""

    @property
    def wasted(self) -> float:
        """The share of all work that node failures throw away: the age of what is in flight."""
        age = self.cluster.seconds * math.exp(self.cluster.sigma**2) / 2
        return age / self.cluster.seconds_between_failures


def go_on(simulation: Simulation, seconds: float, calls: int, rollouts: int) -> None:
    until = simulation.now + seconds
    num_calls = simulation.num_calls + calls * simulation.cluster.num_actors
    num_ended = simulation.num_ended + rollouts
    while (
        simulation.now < until
        or simulation.num_calls < num_calls
        or simulation.num_ended < num_ended
    ):
        simulation.run_until(simulation.now + 1.0)


def foretell(cluster: Cluster, costs: Costs) -> Outlook:
    """Simulate a window of the steady state."""
    simulation = Simulation(cluster, costs)
    go_on(simulation, *WARM_UP)
    began, ended = simulation.now, simulation.num_ended
    busy = {name: station.busy for name, station in simulation.stations.items()}
    go_on(simulation, *WINDOW)
    window = simulation.now - began
    shares = {
        name: min(1.0, (station.busy - busy[name]) / window)
        for name, station in simulation.stations.items()
    }
    return Outlook(cluster, (simulation.num_ended - ended) / window, shares)


def changed(cluster: Cluster, costs: Costs, changes: dict[str, Any]) -> tuple[Cluster, Costs]:
    of_costs = {name: value for name, value in changes.items() if hasattr(costs, name)}
    of_cluster = {name: value for name, value in changes.items() if name not in of_costs}
    return replace(cluster, **of_cluster), replace(costs, **of_costs)


def shown(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"


def table(outlooks: list[Outlook]) -> str:
    """The outlooks as a Markdown table."""
    lines = [
        "| nodes | rollout | in flight | ideal, /s | reached, /s | " + " | ".join(STATIONS)
        + " | first limit | work lost | 100 million take |",
        "|--:|--:|--:|--:|--:|" + "--:|" * len(STATIONS) + "---|--:|--:|",
    ]  # fmt: skip
    for o in outlooks:
        cells = [
            str(o.cluster.nodes),
            f"{o.cluster.seconds:.0f} s",
            f"{o.cluster.in_flight:,}",
            shown(o.cluster.ideal),
            f"{shown(o.per_second)} ({o.of_ideal:.0%})",
            *(f"{o.shares[name]:.0%}" for name in STATIONS),
            o.bottleneck or "rollouts",
            f"{o.wasted:.2%}",
            f"{NUM_TASKS / o.per_second / 3600:,.1f} h",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def file_text(costs: Costs, cluster: Cluster) -> str:
    """What the one database of 100 million rollouts asks for, from costs per byte and row."""
    size = NUM_TASKS * (costs.file_bytes_per_rollout + cluster.task_bytes + cluster.result_bytes)
    seconds = {
        "queueing": NUM_TASKS * costs.queue_per_row,
        "the look for duplicates": NUM_TASKS * costs.duplicates_per_row,
        "a backup": size * costs.backup_per_byte,
        "the check before a resume": size * costs.check_per_byte,
        "reading the results for the summary": NUM_TASKS * costs.summary_per_row,
    }
    times = ", ".join(f"{what} {value / 60:.0f} min" for what, value in seconds.items())
    return f"{NUM_TASKS:,} rollouts in one file: {size / 2**30:,.0f} GiB; {times}."


def changes_table(costs: Costs, changes: dict[str, Any]) -> str:
    """What each change would reach, rollouts per second; the last line is without any of them."""
    clusters = [
        changed(Cluster(nodes, seconds), costs, changes)[0]
        for nodes in (100, 300)
        for seconds in (1.0, 60.0)
    ]
    names = [f"{cluster.nodes} nodes, {cluster.seconds:.0f} s" for cluster in clusters]
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "--:|" * len(clusters)]
    so_far: dict[str, Any] = {}
    for what, change in CHANGES.items():
        so_far |= change
        outlooks = [foretell(*changed(cluster, costs, so_far)) for cluster in clusters]
        cells = [f"{o.per_second:,.0f} ({o.bottleneck or 'rollouts'})" for o in outlooks]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    shards = [foretell(replace(cluster, nodes=10), costs) for cluster in clusters]
    cells = [
        f"{shard.per_second * cluster.nodes / 10:,.0f} ({shard.bottleneck or 'rollouts'})"
        for shard, cluster in zip(shards, clusters, strict=True)
    ]
    lines.append(
        "| none of these, but a run set and a driver per 10 nodes | " + " | ".join(cells) + " |"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="measure this machine's costs")
    parser.add_argument("--json", type=Path, help="also write the scenarios' results here")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="of Cluster")
    arguments = parser.parse_args()
    if arguments.measure:
        from cluster_costs import measure

        measure()
        return
    costs = Costs()
    pairs = (change.partition("=") for change in arguments.set)
    changes = {name: json.loads(value) for name, _, value in pairs}
    outlooks = [
        foretell(replace(Cluster(nodes, seconds), **changes), costs)
        for nodes in (1, 10, 100, 300)
        for seconds in (1.0, 60.0, 600.0)
    ]
    print(table(outlooks), file_text(costs, outlooks[0].cluster), sep="\n\n")
    print("\nWith changes, each on top of those above it:\n")
    print(changes_table(costs, changes))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(outlook) for outlook in outlooks], indent=2))


if __name__ == "__main__":
    main()
