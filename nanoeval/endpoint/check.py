"""Carries out endpoint checks, as ordinary runs of the engine. Prints nothing."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from nanoeval import _codec
from nanoeval._queueing import stored_spec
from nanoeval.endpoint.config import APIConfig, EndpointError
from nanoeval.endpoint.paired import PairedEval, split
from nanoeval.endpoint.report import task_report
from nanoeval.endpoint.server import UNNAMED, model_of, prepare
from nanoeval.eval import EvalSpec, RunnerArgs
from nanoeval.evals._generation import GenerationEval, GenerationTask
from nanoeval.evaluation import joined, resume_eval, run
from nanoeval.setup import default_run_set_id, global_exit_stack

Check = GenerationEval | PairedEval


async def run_task(
    task: type[GenerationEval],
    config: APIConfig,
    max_samples: int | None = None,
    *,
    seed: int | None = None,
    run_set_id: str | None = None,
) -> dict[str, Any]:
    """Check one server with one task; returns `metrics`, `num_samples`, `samples` and more.

    The first `max_samples` rows, None = all. `seed` goes into every request. `run_set_id` names
    the run's database; a check of the same task in it is gone on with. Raises EndpointError when
    the server or the arguments are wrong.
    """
    check = await prepare_check(task, config, seed)
    [report] = await carry_out(check, config, max_samples, run_set_id)
    return report


async def prepare_check(
    task: type[GenerationEval],
    config: APIConfig,
    seed: int | None = None,
    preferred: str | None = None,
) -> GenerationEval:
    """The eval that asks the server of `config`, once the server has shown that it can.

    `preferred` is the model to take where the config names none and the server lists it.
    """
    if seed is not None:
        if config.gen_kwargs.get("seed", seed) != seed:
            raise EndpointError(
                f"seed={seed} and seed={config.gen_kwargs['seed']} in gen_kwargs contradict each"
                " other; give one of them"
            )
        config = replace(config, gen_kwargs={"seed": seed, **config.gen_kwargs})
    unasked = task(model=model_of(config, config.model or UNNAMED))
    if config.api == "completions" and "images" in unasked.needs():
        raise EndpointError(f"{unasked.get_name()} sends images: it needs the chat API")
    server = await prepare(config, unasked.needs(), unasked.all_params(), preferred)
    return task(model=server.model, server=server.facts)


async def carry_out(
    check: Check,
    config: APIConfig,
    max_samples: int | None,
    run_set_id: str | None = None,
    *,
    has_samples: bool = True,
) -> list[dict[str, Any]]:
    """Run a check, or go on with it, and return a report of each server, the first one first.

    Without `has_samples` the reports are without them, and thousands of results stay unread.
    """
    started = time.perf_counter()
    async with global_exit_stack:
        run_set_id = run_set_id or default_run_set_id()
        spec = EvalSpec(eval=check, runner=_runner(check, config, max_samples, run_set_id))
        run_id, summary = await _run_or_resume(spec, run_set_id)
        results = await _read_results(run_set_id, run_id) if has_samples or not summary else []
    summary = summary or await check.get_full_summary(results)
    elapsed = time.perf_counter() - started
    sides = [summary["first"], summary["against"]] if isinstance(check, PairedEval) else [summary]
    facts = {
        "num_concurrent": config.num_concurrent,
        "run_set_id": run_set_id,
        "run_id": run_id,
        "elapsed": round(elapsed, 3),
    }
    return [
        task_report(side, own_summary, facts, own if has_samples else None)
        for own_summary, (side, own) in zip(sides, split(check, results), strict=True)
    ]


def _runner(
    check: Check, config: APIConfig, max_samples: int | None, run_set_id: str
) -> RunnerArgs:
    sides = 2 if isinstance(check, PairedEval) else 1
    model = (check.first if isinstance(check, PairedEval) else check).model
    limits: dict[str, Any] = {}
    if config.num_concurrent != "auto":
        # The client holds requests to the number; the runner keeps some more at hand, so that a
        # freed slot does not wait for the database.
        limits["concurrency"] = sides * (config.num_concurrent + config.num_concurrent // 4)
    if max_samples is not None:
        limits["n_tasks"] = sides * max_samples
    # The client has tried each request again already. Once more, later: a server that went away
    # should not leave behind samples that a resumed run takes for failed.
    return RunnerArgs(
        run_set_id=run_set_id, max_retries=1, model_name=model.get_model_name(), **limits
    )


async def _run_or_resume(spec: EvalSpec, run_set_id: str) -> tuple[str, dict[str, Any]]:
    """Have asked what the run set does not hold yet of `spec`; returns run_id and summary.

    The summary is empty for a run that was finished before.
    """
    async with joined(run_set_id) as run_set:
        for stored in await run_set.store.evals():
            if stored.name != spec.eval.get_name():
                continue
            before = await stored_spec(run_set, stored)
            # One module may define several tasks, which then share their name.
            if _task_classes(before) != _task_classes(spec):
                continue
            if difference := _difference(before, spec):
                raise EndpointError(
                    f"run set {run_set_id} holds a check of {stored.name} with other {difference};"
                    " repeat its arguments, or leave --run_set_id out to start afresh"
                )
            if stored.state == "finished" and stored.run_id is not None:
                return stored.run_id, {}
            # How hard to press, how long to wait and the key are those of now.
            await run_set.store.set_concurrency(stored.eval_id, spec.runner.concurrency)
            summary = await resume_eval(run_set, stored, spec)
            return str(summary.pop("run_id")), summary
    summary = await run(spec)
    return str(summary.pop("run_id")), summary


def _sides(spec: EvalSpec) -> list[Any]:
    check: Any = spec.eval
    return [side for side, _ in split(check, [])]


def _task_classes(spec: EvalSpec) -> list[tuple[str, str]]:
    return [(type(side).__module__, type(side).__qualname__) for side in _sides(spec)]


def _difference(before: EvalSpec, now: EvalSpec) -> str:
    """What makes the answers of two checks different things; "" when they can be one."""
    for old, new in zip(_sides(before), _sides(now), strict=True):
        for name, values in {
            "models": (old.model.get_model_name(), new.model.get_model_name()),
            "servers": (old.server.get("base_url"), new.server.get("base_url")),
            "API": (old.model.api, new.model.api),
            "streaming": (old.model.stream, new.model.stream),
            "request parameters": (old.all_params(), new.all_params()),
            "max_samples": (before.runner.n_tasks, now.runner.n_tasks),
        }.items():
            if values[0] != values[1]:
                return f"{name} ({values[0]}, not {values[1]})"
    return ""


async def _read_results(run_set_id: str, run_id: str) -> list[tuple[GenerationTask, Any]]:
    """Every task of a run that has an outcome, with its result or its error."""
    results: list[tuple[GenerationTask, Any]] = []
    async with joined(run_set_id) as run_set:
        for stored in await run_set.store.evals():
            if stored.run_id == run_id:
                counted = await run_set.store.counted(stored.eval_id)
                async for batch in run_set.store.results(counted):
                    results += [(_codec.loads(t), _codec.loads(r)) for t, r in batch]
    return results
