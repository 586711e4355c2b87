"""GPQA with everything settable on the command line; copy it and put your own eval in its place.

    python examples/gpqa_simple.py gpqa.solver=nanoeval.solvers.mcq:MockSolver
    python examples/gpqa_simple.py gpqa.solver=nanoeval.solvers.mcq_api:OpenAIAPIMCQSolver \
        gpqa.solver.model=gpt-4o gpqa.n_consensus=8 runner.concurrency=32
    python examples/gpqa_simple.py --help

The data comes as in gpqa_mock.py.
"""

from __future__ import annotations

import json

import chz

import nanoeval
from nanoeval import EvalSpec, RunnerArgs
from nanoeval.examples._gpqa import GPQAEval
from nanoeval.setup import nanoeval_entrypoint


async def main(gpqa: GPQAEval, runner: RunnerArgs) -> None:
    """Run and print the summary as JSON."""
    summary = await nanoeval.run(EvalSpec(eval=gpqa, runner=runner))
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    nanoeval_entrypoint(chz.entrypoint(main))
