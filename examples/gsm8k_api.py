"""GSM8K, the whole test split, by a model behind any OpenAI-compatible API.

    python examples/gsm8k_api.py model.name=my-model model.base_url=http://localhost:8000/v1
    python examples/gsm8k_api.py model.name=gpt-4o attempts=4 runner.concurrency=256
    python examples/gsm8k_api.py --help

The problems come from the Hugging Face hub (`pip install "nanoeval[datasets]"`), or without a
network from `$NANOEVAL_DATASETS_DIR/openai/gsm8k/main/test.jsonl`. OPENAI_BASE_URL and
OPENAI_API_KEY are used where they are set.
"""

from __future__ import annotations

import json

import chz

import nanoeval
from nanoeval import EvalSpec, RunnerArgs
from nanoeval.evals.gsm8k import GSM8K
from nanoeval.models.openai_api import OpenAIModel
from nanoeval.setup import nanoeval_entrypoint


async def main(model: OpenAIModel, runner: RunnerArgs, attempts: int = 1) -> None:
    """Run and print the summary as JSON."""
    eval = GSM8K(model=model, attempts=attempts)
    # The name of the model stands in reports, unless the runner is given another.
    runner = chz.replace(runner, model_name=runner.model_name or model.name)
    summary = await nanoeval.run(EvalSpec(eval=eval, runner=runner))
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    nanoeval_entrypoint(chz.entrypoint(main))
