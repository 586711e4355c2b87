"""The command `nano-eval`: carries out what the arguments say and prints the results.

Exit status: 0 all samples answered, 1 a threshold failed, 2 samples without an answer, 3 the server
or the arguments are wrong. `compare` and --against: 0 same, 1 different, 2 cannot tell, 3 wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanoeval.endpoint.config import APIConfig, EndpointError
from nanoeval.endpoint.options import (
    Parser,
    Plan,
    add_comparison_options,
    check_parser,
    check_targets,
    make_plan,
    resume_command,
)

OK, THRESHOLD_FAILED, UNANSWERED, WRONG = 0, 1, 2, 3
ENVIRONMENT = {
    # The table says it; what the engine prints of a summary would say it twice.
    "NANOEVAL_SUMMARY": "none",
    # Its import costs as much CPU as two thousand requests, and it slows down the others.
    "NANOEVAL_AIOMONITOR": "0",
    # A hub that is out of reach is one line of ours, not a page of its client's retries.
    "HF_HUB_VERBOSITY": "error",
}
COMPARE_STATUS = {"same": 0, "different": 1, "cannot tell": 2}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        # A process of our own. Walking over what is there to stay costs a tenth of its CPU.
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
    arguments = [_underscored(argument) for argument in given]
    # The engine keeps the command line with the run.
    sys.argv[:] = [re.sub(r"api_key=[^,]*", "api_key=***", argument) for argument in sys.argv]
    commands: dict[str, Callable[[list[str]], int]] = {"tasks": _tasks, "compare": _compare}
    try:
        if arguments and arguments[0] in commands:
            return commands[arguments[0]](arguments[1:])
        return _check(arguments)
    except EndpointError as error:
        return _complain(error)
    except BrokenPipeError:
        # Whoever read the output has seen enough; keep the interpreter from complaining at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception:  # a defect: its status must not read as a threshold that failed
        traceback.print_exc()
        return WRONG


def _underscored(argument: str) -> str:
    """`--max-samples=5` as `--max_samples=5`."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _complain(error: BaseException | str) -> int:
    print(f"nano-eval: error: {' '.join(str(error).split())}", file=sys.stderr)
    return WRONG


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _tasks(arguments: list[str]) -> int:
    parser = Parser(prog="nano-eval tasks", description="List the tasks that can be run.")
    parser.parse_args(arguments)
    from nanoeval.endpoint.report import aligned
    from nanoeval.endpoint.tasks import TASKS

    print(aligned([[name, sentence] for name, sentence in TASKS.describe().items()]))
    return OK


def _compare(arguments: list[str]) -> int:
    parser = Parser(
        prog="nano-eval compare",
        description="Are two results the same? Pairs them sample by sample.",
        epilog="Exit status: 0 same, 1 different, 2 cannot tell, 3 the files cannot be compared.",
    )
    parser.add_argument("first", type=Path, metavar="A.json", help="written by --output")
    parser.add_argument("second", type=Path, metavar="B.json")
    add_comparison_options(parser)
    options = parser.parse_args(arguments)
    check_targets(options.plot, options.html)
    from nanoeval.endpoint.compare import compare_reports, load_reports

    names = _distinct_names(options.first, options.second)
    comparison = compare_reports(
        load_reports(options.first), load_reports(options.second), options.margin, names
    )
    print(json.dumps(comparison, indent=2, ensure_ascii=False))
    return _show_comparison(comparison, options)


def _distinct_names(first: Path, second: Path) -> list[str]:
    if first.name != second.name:
        return [first.name, second.name]
    return [str(first), str(second)]


def _show_comparison(comparison: dict[str, Any], options: argparse.Namespace) -> int:
    from nanoeval.endpoint.comparison_text import as_html, as_text, write_plot

    sys.stdout.flush()
    _say(as_text(comparison))
    if options.html:
        options.html.write_text(as_html(comparison), encoding="utf-8")
    if options.plot:
        write_plot(comparison, options.plot)
    return COMPARE_STATUS[comparison["verdict"]]


def _check(arguments: list[str]) -> int:
    parser = check_parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return WRONG
    plan = make_plan(parser.parse_args(arguments), arguments)
    from nanoeval.setup import nanoeval_entrypoint

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return nanoeval_entrypoint(_carry_out(plan))


async def _carry_out(plan: Plan) -> int:
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
    try:
        return await _run(plan, run_set_id)
    except asyncio.CancelledError:
        _say(f"nano-eval: interrupted; {resume}")
        return UNANSWERED
    except known as error:
        return _complain(error)
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        if not isinstance(first, known):
            raise
        return _complain(f"{first}; {resume}")


async def _run(plan: Plan, run_set_id: str) -> int:
    from nanoeval.endpoint.check import carry_out
    from nanoeval.endpoint.report import table, warnings

    started = time.perf_counter()
    config, checks = await _prepare(plan)
    has_samples = plan.options.output is not None or plan.against is not None
    sides: list[dict[str, Any]] = [{}, {}]
    for name, check in checks.items():
        reports = await carry_out(
            check, config, plan.options.max_samples, run_set_id, has_samples=has_samples
        )
        for side, report in zip(sides, reports, strict=False):
            side[name] = report
    first, second = sides
    output = {
        "results": first,
        "config": _shown_config(plan, config),
        "total_seconds": round(time.perf_counter() - started, 3),
    }
    _say(table(first))
    for line in warnings(first):
        _say(f"warning: {line}")
    failed = _failed_thresholds(plan, first)
    if second:
        output["against"] = {"results": second}
        status = _finish_pair(plan, output)
    else:
        _print_and_write(output, plan.options.output)
        status = UNANSWERED if any(report["num_errors"] for report in first.values()) else OK
    for line in failed:
        _say(f"nano-eval: {line}")
    return THRESHOLD_FAILED if failed else status


async def _prepare(plan: Plan) -> tuple[APIConfig, dict[str, Any]]:
    """The first server with its model chosen, and each task's check, ready to run."""
    from nanoeval.endpoint.check import prepare_check
    from nanoeval.endpoint.paired import PairedEval
    from nanoeval.endpoint.server import find_url

    config, against = plan.config, plan.against
    if not config.url:
        config = replace(config, url=await find_url())
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
            _say(f"note: {name}: {note}")
    return config, checks


def _finish_pair(plan: Plan, output: dict[str, Any]) -> int:
    from nanoeval.endpoint.compare import compare_reports

    assert plan.against is not None
    first, second = output["results"], output["against"]["results"]
    urls = [next(iter(side.values()))["server"]["base_url"] for side in (first, second)]
    names = [url.partition("://")[2].removesuffix("/v1") for url in urls]
    output["comparison"] = compare_reports(first, second, plan.options.margin, names)
    _print_and_write(output, plan.options.output)
    return _show_comparison(output["comparison"], plan.options)


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


def _failed_thresholds(plan: Plan, reports: dict[str, Any]) -> list[str]:
    lines = []
    for task, metric, least in plan.thresholds:
        for name in [task] if task else reports:
            value = reports[name]["metrics"].get(metric)
            if value is None and (task or not reports[name]["metrics"]):
                lines.append(f"{name}: {metric} has no value, wanted at least {least:g}")
            elif value is not None and value < least:
                lines.append(f"{name}: {metric} is {value:.4f}, wanted at least {least:g}")
    return lines


def _print_and_write(output: dict[str, Any], path: Path | None) -> None:
    """The results on stdout without their samples, and in the file with them."""
    from nanoeval.endpoint.report import without_samples

    shown = {**output, "results": without_samples(output["results"])}
    if "against" in output:
        shown["against"] = {"results": without_samples(output["against"]["results"])}
    print(json.dumps(shown, indent=2, ensure_ascii=False), flush=True)
    if path is not None:
        path.write_text(json.dumps(output, ensure_ascii=False) + "\n", encoding="utf-8")
        _say(f"every sample: {path}")


if __name__ == "__main__":
    sys.exit(main())
