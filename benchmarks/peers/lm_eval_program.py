"""One workload through lm-evaluation-harness; `peers.py` runs this with its own Python.

`peers.py` says as JSON what to run. Prints its seconds, after a warm-up run. By default it writes
nothing and keeps no samples; with `saves` it writes its results and one line per sample to the
folder that it is started in, as its command does with `--output_path` and `--log_samples`.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

import datasets
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.openai_completions import LocalChatCompletion
from lm_eval.tasks import TaskManager


class Noop(LM):
    """Answers every request at once, with nothing."""

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [""] * len(requests)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError


def task_of(n: int, wanted: str) -> dict[str, Any]:
    """A task whose questions are made here and whose scorer compares with `wanted`."""
    rows = [{"question": f"Question {i}?"} for i in range(n)]
    return {
        "task": "questions",
        # In place of files, which the datasets library would convert and cache first.
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "generate_until",
        # Functions, as templates are compiled anew for every question.
        "doc_to_text": lambda doc: doc["question"],
        "doc_to_target": lambda doc: wanted,
        "generation_kwargs": {"until": [], "max_gen_toks": 512, "temperature": 0},
        # Its own metrics come from the network.
        "process_results": lambda doc, replies: {"acc": float(replies[0] == wanted)},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def run(order: dict[str, Any]) -> None:
    """Run the workload and check that all questions were answered."""
    is_http = order["workload"] == "http"
    model = (
        LocalChatCompletion(
            model="scripted",
            base_url=f"{order['url']}/chat/completions",
            num_concurrent=order["in_flight"],
        )
        if is_http
        else Noop()
    )
    results = simple_evaluate(
        model,
        tasks=[task_of(order["n"], order["reply"])],
        # By default all of its own tasks' files are read first, which takes seconds.
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=is_http,
        # The other tools resample nothing either.
        bootstrap_iters=0,
        log_samples=order["saves"],
    )
    if order["saves"]:
        tracker = EvaluationTracker(output_path="saved")
        tracker.save_results_aggregated(results, results["samples"])
        tracker.save_results_samples("questions", results["samples"]["questions"])
    assert results["results"]["questions"]["acc,none"] == 1
    assert results["n-samples"]["questions"]["effective"] == order["n"]


def main() -> None:
    order = json.loads(sys.argv[1])
    logging.disable(logging.WARNING)
    run({**order, **order["warm_up"]})
    started_at = time.perf_counter()
    run(order)
    print(json.dumps({"seconds": time.perf_counter() - started_at}))


if __name__ == "__main__":
    main()
