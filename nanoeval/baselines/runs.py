"""Carries out one baseline: checks, an ordinary run of the engine, a report."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

from nanoeval._run_set import backup_path, database_path
from nanoeval.baselines import report
from nanoeval.baselines.config import (
    BaselineConfig,
    ConfigError,
    HFModelConfig,
    ModelConfig,
    load_config,
    validated,
)
from nanoeval.baselines.evaluation import BaselineEval
from nanoeval.bin._command import CommandError
from nanoeval.bin.resume import resume
from nanoeval.eval import EvalSpec, RunnerArgs
from nanoeval.evals._datasets import DatasetError
from nanoeval.evaluation import run as run_eval
from nanoeval.models._hf_loading import own_version
from nanoeval.models.hf import HFModel
from nanoeval.models.openai_api import OpenAIModel
from nanoeval.models.protocol import Model
from nanoeval.recorder_protocol import uuid
from nanoeval.setup import global_exit_stack, nanoeval_entrypoint, say

ENV_CONFIG = "NANOEVAL_CONFIG"
# Rollouts in flight: texts are small, images are not, servers have their limits.
CONCURRENCY_TEXT, CONCURRENCY_IMAGES, CONCURRENCY_SERVER = 4096, 64, 64


def run(config: BaselineConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Carry out the baseline, write its report and return its summary. Blocks.

    An interrupted run of the same configuration is gone on with. Raises ConfigError,
    CheckpointError, DatasetError or ReportError for what can be told before the model is loaded.
    """
    checked = validated(config, BaselineConfig, "config")
    return asyncio.run(_in_stack(run_async(checked)))


def run_from_yaml(path: str | Path, task: str | None = None) -> dict[str, Any]:
    """`run` with the configuration in a YAML file, which must be for `task` where that is given."""
    return run(_load(path, task))


async def run_async(config: BaselineConfig) -> dict[str, Any]:
    """`run`, on the running event loop."""
    folder = report.check_folder(config.report.output_dir)
    model = make_model(config)
    facts = await asyncio.to_thread(describe_model, model)
    marker = folder / report.UNFINISHED
    digest = hashlib.sha256(config.model_dump_json().encode()).hexdigest()
    summaries: list[dict[str, Any]] = []
    run_set_id = _unfinished(marker, digest)
    if run_set_id is not None:
        say(f"Going on with the unfinished run {run_set_id} of this configuration.")
        # None come back where the run ended before its examples were listed.
        summaries = await resume(run_set_id, resume_completed_evals=True)
    if not summaries:
        run_set_id = f"{config.task}-{uuid()}"
        marker.write_text(json.dumps({"run_set_id": run_set_id, "config": digest}))
        summaries = [await run_eval(_spec(config, model, facts, run_set_id))]
    marker.unlink(missing_ok=True)
    (summary,) = summaries
    if summary["num_scored"] == 0:
        raise NothingScoredError(
            f"none of {summary['total_examples']} examples of {config.task} was scored, the first"
            f" for: {summary['first_error']}. Mend that and repeat the command, which starts anew"
        )
    return summary


class NothingScoredError(RuntimeError):
    """All examples of a run failed; its report says so too."""


def make_model(config: BaselineConfig) -> Model:
    """The model that `config.model` describes; nothing is loaded or asked yet."""
    model = config.model
    if isinstance(model, HFModelConfig):
        return HFModel(**model.model_dump())
    return OpenAIModel(
        name=model.model,
        base_url=model.base_url,
        api_key_env=model.api_key_env,
        api="completions" if config.strategy == "rank_ll" else "chat",
    )


def describe_model(model: Model) -> dict[str, Any]:
    """What the report says of the model; CheckpointError for one that cannot be loaded."""
    if isinstance(model, HFModel):
        return model.describe()
    return {
        "model_id": model.get_model_name(),
        "revision": None,
        "dtype": None,
        "device": None,
        "base_url": model.get_base_url() if isinstance(model, OpenAIModel) else None,
        "library_versions": {"nanoeval": own_version()},
    }


def model_name(model: ModelConfig) -> str:
    """The name of a configured model, for tables."""
    return model.model_id if isinstance(model, HFModelConfig) else model.model


def _spec(config: BaselineConfig, model: Model, facts: dict[str, Any], run_set_id: str) -> EvalSpec:
    concurrency = config.runner.concurrency
    if concurrency is None:
        is_local = isinstance(model, HFModel)
        own = CONCURRENCY_IMAGES if config.benchmark.sees else CONCURRENCY_TEXT
        concurrency = own if is_local else CONCURRENCY_SERVER
    return EvalSpec(
        eval=BaselineEval(config=config, model=model, model_facts=facts),
        runner=RunnerArgs(
            run_set_id=run_set_id,
            concurrency=concurrency,
            max_retries=config.runner.max_retries,
            use_monitor=config.runner.use_monitor,
            model_name=model.get_model_name(),
        ),
    )


def _unfinished(marker: Path, digest: str) -> str | None:
    """The run set of an unfinished run of this configuration, if it is still there."""
    try:
        left = json.loads(marker.read_text())
    except (OSError, ValueError):
        return None
    run_set_id = str(left.get("run_set_id"))
    if left.get("config") != digest:
        return None
    is_there = database_path(run_set_id).exists() or backup_path(run_set_id).exists()
    return run_set_id if is_there else None


def _load(path: str | Path, task: str | None) -> BaselineConfig:
    config = load_config(path)
    if task is not None and config.task != task:
        raise ConfigError(
            f"{path}: task: is {config.task}; run it with python -m"
            f" nanoeval.baselines.run_{config.task}, or write task: {task}"
        )
    return config


def main(task: str) -> None:
    """The program of `task`: runs the configuration that $NANOEVAL_CONFIG names."""
    with_one_line(lambda: run_async(_load(from_environment(ENV_CONFIG), task)))


def from_environment(name: str) -> str:
    """The path that a variable holds; ConfigError where it holds none."""
    path = os.environ.get(name)
    if not path:
        raise ConfigError(f"{name} is not set; set it to the path of a YAML file")
    return path


def with_one_line(start: Any) -> Any:
    """Run the coroutine that `start()` gives as a program; a user's mistake is one clear line."""
    try:
        return nanoeval_entrypoint(start())
    except (
        *(ValueError, DatasetError, ImportError, OSError),
        *(CommandError, NothingScoredError),
    ) as error:
        sys.exit(f"nanoeval: {error}")


async def _in_stack(work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    async with global_exit_stack:
        return await work
