"""What runs on Ray carry: actors on two nodes of this machine, beside one actor.

    python benchmarks/ray_cluster.py [--json results.json]

No-op rollouts through four actors on two nodes, and CPU-bound ones (20 ms of pure Python each)
through four and through one. The start of actors is not counted: a short run starts them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from overhead import Noop, machine
from processes import Burn

from nanoeval import EvalSpec, RunnerArgs, run
from nanoeval.recorders import dummy_recorder
from nanoeval.setup import global_exit_stack

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@contextlib.contextmanager
def two_nodes() -> Iterator[None]:
    """Ray's own test cluster on loopback: a head without room, and two nodes of two CPUs."""
    from tests.ray_cluster import local_cluster

    with local_cluster(num_cpus=0) as cluster:
        for _ in range(2):
            cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        yield


async def seconds_of(eval: Noop, num_actors: int) -> float:
    """The wall time of one run."""
    runner = RunnerArgs(
        executor="ray",
        ray_num_actors=num_actors,
        recorder=dummy_recorder(log=False),
        should_backup=False,
    )
    async with global_exit_stack:
        await run(EvalSpec(eval=Noop(n=200, sleep=0.01), runner=runner))
        started_at = time.perf_counter()
        await run(EvalSpec(eval=eval, runner=runner))
        return time.perf_counter() - started_at


def measure(eval: Noop, num_actors: int) -> float:
    with contextlib.redirect_stderr(io.StringIO()):
        return asyncio.run(seconds_of(eval, num_actors))


def measure_all(repeat: int) -> list[dict[str, Any]]:
    """Medians; the ratio is that of pairs which took turns."""
    noop, burn = Noop(n=20_000), Burn(n=400)
    seconds = [measure(noop, 4) for _ in range(repeat)]
    pairs = [(measure(burn, 1), measure(burn, 4)) for _ in range(repeat)]
    return [
        {
            "what": "no-op, four actors on two nodes",
            "rollouts": noop.n,
            "per_second": round(noop.n / statistics.median(seconds)),
        },
        {
            "what": "20 ms of CPU, four actors to one",
            "rollouts": burn.n,
            "per_second": round(burn.n / statistics.median(four for _, four in pairs)),
            "ratio": round(statistics.median(one / four for one, four in pairs), 2),
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; the median counts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NANOEVAL_ROOT_DIR"] = folder
        with two_nodes():
            rows = measure_all(arguments.repeat)
    for row in rows:
        ratio = f"{row['ratio']:>8.2f}" if "ratio" in row else ""
        print(f"{row['what']:<36} {row['rollouts']:>7,} {row['per_second']:>9,}/s {ratio}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
