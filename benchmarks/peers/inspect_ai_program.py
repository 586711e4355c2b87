"""One workload through inspect-ai; `peers.py` runs this with inspect-ai's own Python.

`peers.py` says as JSON what to run. Prints its seconds, after a warm-up run. The log goes to the
folder that it is started in.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from inspect_ai import Task, eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import get_model
from inspect_ai.scorer import Score, Scorer, Target, accuracy, scorer
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver


@solver
def no_op() -> Solver:
    """Returns the state as it came."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        return state

    return solve


@solver
def sleep() -> Solver:
    """Awaits one second."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        await asyncio.sleep(1)
        return state

    return solve


# Without the standard error, so that the summary is as small as the others'.
@scorer(metrics=[accuracy()])
def is_answered(wanted: str) -> Scorer:
    """Right when the completion is `wanted`."""

    async def score(state: TaskState, target: Target) -> Score:
        return Score(value=state.output.completion == wanted)

    return score


def run(order: dict[str, Any]) -> None:
    """Run the workload and check that all questions were answered."""
    n, is_http = order["n"], order["workload"] == "http"
    task = Task(
        dataset=MemoryDataset([Sample(id=i, input=f"Question {i}?") for i in range(n)]),
        solver={"noop": no_op, "sleep": sleep, "http": generate}[order["workload"]](),
        scorer=is_answered(order["reply"]),
    )
    model = (
        get_model("openai-api/scripted/scripted", base_url=order["url"], api_key="none")
        if is_http
        else "none/none"
    )
    (log,) = eval(
        task,
        model=model,
        # For no-ops, more at once is no faster here and takes more memory.
        max_samples=100 if order["workload"] == "noop" else order["in_flight"],
        # A number turns off the adaptive limit, which starts low.
        max_connections=order["in_flight"],
        temperature=0,
        max_tokens=512,
        # The log is written as by default; copies of the first requests in it, and what a person
        # would watch meanwhile, are off.
        log_model_api=False,
        display="none",
        score_display=False,
        log_realtime=False,
        log_level="error",
        ctl_server=False,
    )
    assert log.status == "success", log.error
    assert log.results is not None
    assert log.results.completed_samples == n, log.results
    assert log.results.scores[0].metrics["accuracy"].value == 1, log.results


def main() -> None:
    order = json.loads(sys.argv[1])
    run({**order, **order["warm_up"]})
    started_at = time.perf_counter()
    run(order)
    print(json.dumps({"seconds": time.perf_counter() - started_at}))


if __name__ == "__main__":
    main()
