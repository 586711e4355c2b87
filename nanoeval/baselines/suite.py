"""Several baselines from one YAML file: NANOEVAL_SUITE=PATH python -m nanoeval.baselines.suite"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from nanoeval.baselines import report
from nanoeval.baselines.charts import draw_suite
from nanoeval.baselines.config import BaselineConfig, SuiteConfig, load_suite, validated
from nanoeval.baselines.runs import from_environment, model_name, run_async, with_one_line
from nanoeval.models.hf import keep_loaded
from nanoeval.setup import global_exit_stack, say

ENV_SUITE = "NANOEVAL_SUITE"
SUMMARY, TABLE, CHART = "suite_summary.json", "suite_table.md", "suite.png"


def run(config: SuiteConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Carry out a suite, write its summary, table and chart, and return the summary. Blocks.

    A task that fails is reported as failed and does not keep the others from running. Raises
    ConfigError before anything runs.
    """
    suite = validated(config, SuiteConfig, "suite")
    return asyncio.run(run_async_suite(suite, suite.named_tasks()))


def run_from_yaml(path: str | Path) -> dict[str, Any]:
    """`run` with the suite in a YAML file."""
    return asyncio.run(run_async_suite(*load_suite(path)))


async def run_async_suite(
    suite: SuiteConfig, tasks: Mapping[str, BaselineConfig]
) -> dict[str, Any]:
    """`run`, on the running event loop, with the tasks as `suite.named_tasks()` gives them."""
    folder = report.check_folder(suite.output_dir)
    entries: list[dict[str, Any]] = []
    loads = 0
    async with global_exit_stack:
        # Tasks in a row that share a model share its weights; others free them first.
        for _, group in groupby(tasks.items(), key=lambda item: item[1].model):
            async with keep_loaded() as kept:
                for name, config in group:
                    entries.append(await _run_one(name, config))
                loads += len(kept)
    summary = {
        "num_tasks": len(entries),
        "num_failed": sum(entry["status"] == "failed" for entry in entries),
        "model_loads": loads,
        "tasks": entries,
    }
    await asyncio.to_thread(_write, folder, summary)
    return summary


async def _run_one(name: str, config: BaselineConfig) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": name,
        "task": config.task,
        "title": config.benchmark.title,
        "model": model_name(config.model),
        "output_dir": config.report.output_dir,
    }
    try:
        summary = await run_async(config)
    except Exception as error:  # a task's own failure is one row of the suite
        message = explain(error)
        say(f"{name} failed: {message}")
        return {**entry, "status": "failed", "error": message, "summary": None}
    return {**entry, "status": "done", "error": None, "summary": summary}


def explain(error: BaseException) -> str:
    """An error on one line; of a group its first member's."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _write(folder: Path, summary: Mapping[str, Any]) -> None:
    entries = summary["tasks"]
    report.write_text(folder / TABLE, table(entries))
    done = [entry for entry in entries if entry["status"] == "done"]
    accuracies: dict[str, dict[str, Sequence[float]]] = {}
    for entry in done:
        own = entry["summary"]
        values = (own["accuracy"], *own["accuracy_ci95"])
        accuracies.setdefault(entry["model"], {})[_column(entry)] = values
    draw_suite(folder / CHART, accuracies)
    report.write_json(folder / SUMMARY, summary)


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one row for each model, one column for each task, then the particulars.

    Accuracies in percent with their standard errors; a task that failed shows as "failed", one
    that was not run with that model as a dash.
    """
    columns = list(dict.fromkeys(_column(entry) for entry in entries))
    rows: dict[str, dict[str, str]] = {}
    for entry in entries:
        rows.setdefault(entry["model"], {})[_column(entry)] = _cell(entry)
    lines = _markdown(
        ["Model", *columns],
        [[model, *(own.get(column, "–") for column in columns)] for model, own in rows.items()],
    )
    lines += ["", "Accuracy in percent ± one standard error.", ""]
    lines += _markdown(
        ["Task", "Model", "Scoring", "Split", "Examples", "Accuracy", "95 % interval"],
        [_particulars(entry, _column(entry)) for entry in entries],
    )
    failed = [entry for entry in entries if entry["status"] == "failed"]
    if failed:
        lines += ["", *(f"- {entry['name']} failed: {entry['error']}" for entry in failed)]
    return "\n".join(lines) + "\n"


def _column(entry: Mapping[str, Any]) -> str:
    """The benchmark's title, or the entry's name where it has one of its own."""
    return str(entry["title"] if entry["name"] == entry["task"] else entry["name"])


def _cell(entry: Mapping[str, Any]) -> str:
    if entry["status"] == "failed":
        return "failed"
    accuracy, stderr = entry["summary"]["accuracy"], entry["summary"]["accuracy_stderr"]
    return f"{100 * accuracy:.1f}" + (f" ± {100 * stderr:.1f}" if stderr is not None else "")


def _particulars(entry: Mapping[str, Any], column: str) -> list[str]:
    start = [column, entry["model"]]
    if entry["status"] == "failed":
        return [*start, "", "", "", "failed", ""]
    own = entry["summary"]
    low, high = own["accuracy_ci95"]
    by_length = ", per token" if own["scoring"]["normalize_by_length"] else ""
    return [
        *start,
        own["scoring"]["strategy"] + by_length,
        own["split"],
        str(own["total_examples"]),
        _cell(entry),
        f"{100 * low:.1f} to {100 * high:.1f}",
    ]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
    cells.insert(1, ["---"] * len(header))
    return [f"| {' | '.join(row)} |" for row in cells]


async def _main() -> dict[str, Any]:
    return await run_async_suite(*load_suite(from_environment(ENV_SUITE)))


if __name__ == "__main__":
    if with_one_line(_main)["num_failed"]:
        sys.exit(1)
