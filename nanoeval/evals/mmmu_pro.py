"""MMMU-Pro: college-level questions about images, with up to ten options (Yue et al., 2024)."""

from __future__ import annotations

import re
from typing import Any

import chz

from nanoeval.evals._choices import (
    LETTERS,
    check_known,
    first_letter,
    lettered,
    read_gold,
    read_options,
    user_message,
)
from nanoeval.evals._datasets import load_rows
from nanoeval.evals._generation import GenerationEval

SUBSETS = ("standard (10 options)", "standard (4 options)", "vision")
MAX_IMAGES = 7
LETTER_WANTED = "Answer with the letter of the right option alone."


def load(
    subset_name: str = SUBSETS[0],
    split: str = "test",
    subset_size: int | None = None,
    revision: str | None = None,
) -> list[dict[str, Any]]:
    """The first `subset_size` (None = all) questions, images as encoded bytes by their number.

    In the subset "vision" the one image shows question and options as well.
    """
    check_known([subset_name], SUBSETS, "subset_name")
    rows = load_rows("MMMU/MMMU_Pro", subset_name, split, revision)
    found = []
    for index, row in enumerate(rows[:subset_size]):
        row_id = str(row.get("id", index))
        options = read_options(row.get("options"), row_id)
        columns = {0: "image"} | {n: f"image_{n}" for n in range(1, MAX_IMAGES + 1)}
        images = {n: rows.image(row[name]) for n, name in columns.items() if row.get(name)}
        found.append(
            {
                "id": row_id,
                "subject": row.get("subject"),
                "question": row.get("question"),
                "options": options,
                "answer": read_gold(row.get("answer"), options, row_id),
                "images": images,
                "revision": rows.revision,
            }
        )
    return found


def prompt(row: dict[str, Any], ends_with: str = LETTER_WANTED) -> list[dict[str, Any]]:
    """One message: question and lettered options, each image where the text names it.

    Images that the text does not name stand first. `ends_with` is the last line, "" for none.
    """
    letters = LETTERS[: len(row["options"])]
    text = f"The options are {', '.join(letters)}."
    if row["question"]:
        text = f"{row['question'].strip()}\n{lettered(row['options'])}"
    pieces = re.split(r"<image (\d+)>", f"{text}\n{ends_with}".rstrip())
    named = {int(number) for number in pieces[1::2]}
    parts: list[str | bytes] = [image for n, image in row["images"].items() if n not in named]
    for index, piece in enumerate(pieces):
        if index % 2 and int(piece) in row["images"]:
            parts.append(row["images"][int(piece)])
        elif not index % 2 and piece.strip():
            parts.append(piece)
    return user_message(*parts)


def score(row: dict[str, Any], reply: str) -> tuple[str, float]:
    """The letter that `reply` picks ("?" for none), and 1.0 if it is the right one, else 0.0."""
    picked = first_letter(reply, len(row["options"]))
    return picked, float(picked == row["answer"])


@chz.chz
class MMMUPro(GenerationEval):
    """MMMU-Pro, ten options, asked of a chat model that sees."""

    load, prompt = staticmethod(load), staticmethod(prompt)
    target = staticmethod(lambda row: str(row["answer"]))
    score = staticmethod(lambda row, reply: {"exact_match": score(row, reply)[1]})

    def needs(self) -> frozenset[str]:
        return frozenset({"images"})
