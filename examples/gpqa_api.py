"""GPQA by a model behind any OpenAI-compatible API.

    OPENAI_BASE_URL=http://localhost:8000/v1 python examples/gpqa_api.py my-model

OPENAI_API_KEY is sent where it is set. The data comes as in gpqa_mock.py.
"""

from __future__ import annotations

import json
import sys

import nanoeval
from nanoeval import EvalSpec, RunnerArgs
from nanoeval.examples._gpqa import GPQAEval
from nanoeval.models.openai_api import OpenAIModel
from nanoeval.setup import nanoeval_entrypoint
from nanoeval.solvers.mcq_api import OpenAIAPIMCQSolver


async def main(model_name: str) -> None:
    """Run and print the summary as JSON."""
    model = OpenAIModel(name=model_name, params={"temperature": 0.0, "max_tokens": 4096})
    summary = await nanoeval.run(
        EvalSpec(
            eval=GPQAEval(solver=OpenAIAPIMCQSolver(model=model)),
            runner=RunnerArgs(concurrency=32, model_name=model_name),
        )
    )
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} MODEL")
    nanoeval_entrypoint(main(sys.argv[1]))
