"""Writes a baseline's files: summary, predictions, table and chart."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoeval.baselines.summary import group_accuracies
from nanoeval.eval import RolloutSystemError

if TYPE_CHECKING:
    from nanoeval.baselines.config import BaselineConfig
    from nanoeval.baselines.evaluation import Example, Verdict

    Results = Sequence[tuple[Example, Verdict | RolloutSystemError]]

# Lies in the report's folder while a run is unfinished, so that the same command goes on with it.
UNFINISHED = ".unfinished_run.json"
# Counts are no results: the table leaves them to the summary.
TABLE_KEYS = (
    "accuracy",
    "accuracy_stderr",
    "macro_accuracy",
    "macro_accuracy_stderr",
    "micro_accuracy",
    "perception_score",
    "cognition_score",
)


class ReportError(OSError):
    """A report cannot be written where it should be."""


def check_folder(output_dir: str) -> Path:
    """The folder, made if it is not there; ReportError if it cannot be written to."""
    folder = Path(output_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ReportError(
            f"report.output_dir: cannot write to {folder}: {error.strerror or error}; name another"
            " folder"
        ) from error
    return folder


def write(config: BaselineConfig, summary: Mapping[str, Any], results: Results) -> None:
    """Write the files that `config.report` asks for; the summary last, as a sign of the whole."""
    names = config.report
    folder = check_folder(names.output_dir)
    if names.save_predictions:
        rows = (json.dumps(row, ensure_ascii=False) for row in prediction_rows(config, results))
        write_text(folder / names.predictions_filename, "".join(f"{row}\n" for row in rows))
    if names.save_table:
        write_table(folder / names.table_filename, table_rows(summary))
    if names.save_plot and "accuracy" in summary:
        from nanoeval.baselines.charts import draw_accuracy

        draw_accuracy(folder / names.plot_filename, config.benchmark.title, summary)
    write_json(folder / names.summary_filename, summary)


def prediction_rows(config: BaselineConfig, results: Results) -> Iterator[dict[str, Any]]:
    """One row for each example, in the data set's order; an example that failed has its error."""
    for task, verdict in results:
        row: dict[str, Any] = {
            "task": config.task,
            "subject": task.subject,
            "id": task.example_id,
            "index": task.index,
            "gold": task.gold,
        }
        if isinstance(verdict, RolloutSystemError):
            yield {**row, "predicted": None, "correct": False, "error": str(verdict)}
            continue
        row |= {"predicted": verdict.picked, "correct": verdict.correct, "score": verdict.score}
        if verdict.logprobs is not None:
            yield {**row, "scores": list(verdict.logprobs)}
        else:
            yield {**row, "reply": verdict.reply}


def table_rows(summary: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Labels and values: the totals, then one accuracy for each group."""
    rows = [(key, summary[key]) for key in TABLE_KEYS if summary.get(key) is not None]
    return rows + list(group_accuracies(summary).items())


def write_table(path: Path, rows: Sequence[tuple[str, float]]) -> None:
    """A CSV file with the columns label and value."""
    with _Replacing(path) as file, file.open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(["label", "value"])
        writer.writerows(rows)


def write_json(path: Path, value: Any) -> None:
    """JSON that a person can read."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """A whole file or none: a reader never sees half of it."""
    with _Replacing(path) as file:
        file.write_text(text, encoding="utf-8")


class _Replacing:
    """A file to write in the place of `path`, which it becomes at the end of the block."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new = path.with_name(f".{path.name}.{os.getpid()}")

    def __enter__(self) -> Path:
        return self._new

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._new.replace(self._path)
        else:
            self._new.unlink(missing_ok=True)
