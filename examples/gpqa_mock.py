"""GPQA without a model: the smallest whole run.

    NANOEVAL_DATASETS_DIR=tests/fixtures/datasets python examples/gpqa_mock.py

runs on a few self-made questions; without the variable the real ones come from the Hugging Face
hub, for those who accepted their terms there (`pip install "nanoeval[datasets]"`, HF_TOKEN).
"""

from __future__ import annotations

import json

import nanoeval
from nanoeval import EvalSpec, RunnerArgs
from nanoeval.examples._gpqa import GPQAEval
from nanoeval.setup import nanoeval_entrypoint
from nanoeval.solvers.mcq import MockSolver


async def main() -> None:
    """Run and print the summary as JSON."""
    summary = await nanoeval.run(
        EvalSpec(eval=GPQAEval(solver=MockSolver(), n_consensus=4), runner=RunnerArgs())
    )
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    nanoeval_entrypoint(main())
