"""Carries out a plan: from the first request to the results and the exit status."""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanoeval.endpoint.config import APIConfig, EndpointError
from nanoeval.endpoint.options import Plan, resume_command
from nanoeval.endpoint.output import OutputError, say, show_json, write_json, write_text

OK, THRESHOLD_FAILED, UNANSWERED, WRONG = 0, 1, 2, 3
COMPARE_STATUS = {"same": 0, "different": 1, "cannot tell": 2}


def complain(error: BaseException | str) -> int:
    """Say what is wrong, on one line; returns the exit status for it."""
    say(f"nano-eval: error: {' '.join(str(error).split())}")
    return WRONG


async def carry_out_plan(plan: Plan) -> int:
    """Run the plan, and turn what can go wrong into a line and an exit status."""
    from nanoeval._database_file import StoreError
    from nanoeval.evals._datasets import DatasetError
    from nanoeval.evals._generation import ServerGone
    from nanoeval.models.openai_api import RequestRefused, ServerFailure
    from nanoeval.setup import default_run_set_id

    known: tuple[type[Exception], ...] = (
        *(EndpointError, DatasetError, ServerGone),
        *(RequestRefused, ServerFailure, StoreError, OSError),
    )
    run_set_id = plan.options.run_set_id or default_run_set_id()
    resume = f"what is answered is kept; to go on: {resume_command(plan.arguments, run_set_id)}"
    output: dict[str, Any] = {}
    try:
        return await _run(plan, run_set_id, output)
    except asyncio.CancelledError:
        say(f"nano-eval: interrupted; {resume}")
        return UNANSWERED
    except known as error:
        is_more_to_do = "unfinished" in output or isinstance(error, OutputError)
        return complain(f"{error}; {resume}" if is_more_to_do else error)
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        if not isinstance(first, known):
            raise
        return complain(f"{first}; {resume}")


async def _run(plan: Plan, run_set_id: str, output: dict[str, Any]) -> int:
    """Fill `output` task by task and show it; where a later task fails, what is finished."""
    from nanoeval.endpoint.check import carry_out

    started = time.perf_counter()
    await _load_others(plan)
    config, checks = await _prepare(plan)
    output |= {"results": {}, "config": _shown_config(plan, config)}
    sides = [output["results"]]
    if plan.against is not None:
        output["against"] = {"results": {}}
        sides.append(output["against"]["results"])
    has_samples = plan.options.output is not None or plan.against is not None
    try:
        for name, check in checks.items():
            reports = await carry_out(
                check, config, plan.options.max_samples, run_set_id, has_samples=has_samples
            )
            for side, report in zip(sides, reports, strict=True):
                side[name] = report
            output["total_seconds"] = round(time.perf_counter() - started, 3)
    except BaseException:
        if output["results"]:
            output["unfinished"] = [name for name in checks if name not in output["results"]]
            _tell(plan, output)
            _write_and_show(output, plan.options.output)
        raise
    failed = _tell(plan, output)
    status = _finish(plan, output)
    return THRESHOLD_FAILED if failed else status


async def _load_others(plan: Plan) -> None:
    """Load what the tasks after the first will ask, so that what is missing costs no results."""
    for task in list(plan.tasks.values())[1:]:
        await asyncio.to_thread(task.load)


async def _prepare(plan: Plan) -> tuple[APIConfig, dict[str, Any]]:
    """The first server with its model chosen, and each task's check, ready to run."""
    from nanoeval.endpoint.check import prepare_check
    from nanoeval.endpoint.paired import PairedEval
    from nanoeval.endpoint.server import find_url

    config, against = plan.config, plan.against
    if not config.url:
        config = replace(config, url=await find_url())
    if against is not None and against.api != config.api:
        raise EndpointError(
            f"the first server is asked by its {config.api} API, that of --against by its"
            f" {against.api} API: their replies cannot be paired; end both addresses in /v1 and"
            " choose with --api"
        )
    checks: dict[str, Any] = {}
    for name, task in plan.tasks.items():
        checks[name] = check = await prepare_check(task, config, plan.options.seed)
        config = replace(config, model=check.model.get_model_name())
        notes = list(check.server["notes"])
        if against is not None:
            other = await prepare_check(task, against, plan.options.seed, config.model)
            checks[name] = PairedEval(first=check, against=other)
            notes += [f"{against.url}: {note}" for note in other.server["notes"]]
        for note in notes:
            say(f"note: {name}: {note}")
    return config, checks


def _tell(plan: Plan, output: dict[str, Any]) -> bool:
    """The table, warnings and thresholds, for people; returns whether a threshold failed."""
    from nanoeval.endpoint.report import failed_thresholds, table, warnings

    say(table(output["results"]))
    lines = warnings(output["results"])
    if plan.against is not None:
        others = warnings(output["against"]["results"])
        lines += [f"{plan.against.url}: {line}" for line in others]
    for line in lines:
        say(f"warning: {line}")
    failed = failed_thresholds(plan.thresholds, output["results"])
    for line in failed:
        say(f"nano-eval: {line}")
    return bool(failed)


def _finish(plan: Plan, output: dict[str, Any]) -> int:
    """Write and show the results, with a comparison if there are two sides."""
    results = output["results"]
    if plan.against is None:
        _write_and_show(output, plan.options.output)
        return UNANSWERED if any(report["num_errors"] for report in results.values()) else OK
    from nanoeval.endpoint.compare import compare_reports

    others = output["against"]["results"]
    urls = [next(iter(side.values()))["server"]["base_url"] for side in (results, others)]
    names = [url.partition("://")[2].removesuffix("/v1") for url in urls]
    try:
        output["comparison"] = compare_reports(results, others, plan.options.margin, names)
    finally:
        # Both have been asked: their results are worth something without a comparison too.
        _write_and_show(output, plan.options.output)
    return show_comparison(output["comparison"], plan.options)


def _shown_config(plan: Plan, config: APIConfig) -> dict[str, Any]:
    """What was asked for, but for keys."""
    from yarl import URL

    from nanoeval.models._http import shown

    options = plan.options
    return {
        "model": config.model,
        "base_url": shown(URL(config.url)),
        "against": options.against and shown(URL(options.against)),
        "tasks": list(plan.tasks),
        "max_samples": options.max_samples,
        "num_concurrent": config.num_concurrent,
        "gen_kwargs": config.gen_kwargs,
        "seed": options.seed,
        "api": config.api,
        "stream": config.stream,
    }


def _write_and_show(output: dict[str, Any], path: Path | None) -> None:
    """The results in the file, then, without samples, on stdout, even if the file failed."""
    from nanoeval.endpoint.report import without_samples

    shown = {**output, "results": without_samples(output["results"])}
    if "against" in output:
        shown["against"] = {"results": without_samples(output["against"]["results"])}
    try:
        if path is not None:
            write_json(path, output)
            say(f"every sample: {path}")
    finally:
        show_json(shown)


def show_comparison(comparison: dict[str, Any], options: argparse.Namespace) -> int:
    """The comparison for people, in the forms that `options` ask for; returns the exit status."""
    from nanoeval.endpoint.comparison_text import as_html, as_text, write_plot

    say(as_text(comparison))
    if options.html:
        write_text(options.html, as_html(comparison))
    if options.plot:
        write_plot(comparison, options.plot)
    return COMPARE_STATUS[comparison["verdict"]]
