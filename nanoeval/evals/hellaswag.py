"""HellaSwag: which of four endings follows, by log-likelihood (Zellers et al., 2019)."""

from __future__ import annotations

from typing import Any

from nanoeval.evals._choices import LETTERS, best_option, read_gold, read_options
from nanoeval.evals._datasets import load_rows


def load(
    split: str = "validation", subset_size: int | None = None, revision: str | None = None
) -> list[dict[str, Any]]:
    """The first `subset_size` (None = all) contexts with their endings, in the data set's order.

    Raises DatasetError, which names the row, for one without endings or gold label: the hub's test
    split has none.
    """
    rows = load_rows("Rowan/hellaswag", None, split, revision)
    found = []
    for index, row in enumerate(rows[:subset_size]):
        row_id = str(row.get("ind", index))
        options = read_options(row.get("endings"), row_id)
        found.append(
            {
                "id": row_id,
                "subject": row.get("activity_label"),
                "context": row["ctx"],
                "options": options,
                "answer": read_gold(row.get("label"), options, row_id),
                "revision": rows.revision,
            }
        )
    return found


def prompt(row: dict[str, Any]) -> str:
    """The context as it is, without an instruction."""
    return str(row["context"])


def score(row: dict[str, Any], logprobs: list[float]) -> tuple[str, float]:
    """The letter of the likeliest ending, and 1.0 if it is the right one, else 0.0."""
    picked = LETTERS[best_option(logprobs)]
    return picked, float(picked == row["answer"])
