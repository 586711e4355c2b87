"""MME: two yes-or-no questions about each image, in 14 categories (Fu et al., 2023)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import chz

from nanoeval.evals._choices import NOTHING, user_message
from nanoeval.evals._datasets import DatasetError, load_rows
from nanoeval.evals._generation import GenerationEval

OPTIONS = ["Yes", "No"]
COGNITION = frozenset(
    {"commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"}
)


def load(
    split: str = "test", subset_size: int | None = None, revision: str | None = None
) -> list[dict[str, Any]]:
    """The first `subset_size` (None = all) questions; `subject` is the category."""
    rows = load_rows("lmms-lab/MME", None, split, revision)
    found = []
    for index, row in enumerate(rows[:subset_size]):
        image_id = str(row.get("question_id", index))
        answer = str(row.get("answer")).strip().capitalize()
        if answer not in OPTIONS:
            raise DatasetError(
                f"example {image_id} has the answer {row.get('answer')!r}, not Yes or No"
            )
        found.append(
            {
                "id": image_id,
                "subject": row["category"],
                "question": row["question"],
                "options": OPTIONS,
                "answer": answer,
                "image": rows.image(row["image"]),
                "revision": rows.revision,
            }
        )
    return found


def prompt(row: dict[str, Any]) -> list[dict[str, Any]]:
    """One message: the image and the question, which itself asks for yes or no."""
    return user_message(row["image"], row["question"].strip())


def score(row: dict[str, Any], reply: str) -> tuple[str, float]:
    """The first yes or no of `reply` ("?" for none), and 1.0 if it is right, else 0.0."""
    found = re.search(r"\b(yes|no)\b", reply, re.IGNORECASE)
    picked = found.group().capitalize() if found else NOTHING
    return picked, float(picked == row["answer"])


def totals(verdicts: Sequence[tuple[str, str, bool]]) -> dict[str, Any]:
    """MME's own totals of (category, image id, correct).

    `per_category` gives each category's accuracy, its share of images with every question right
    (`accuracy_plus`) and 100 times their sum (`score`); `perception_score` and `cognition_score`
    add those up.
    """
    images: dict[str, dict[str, list[bool]]] = {}
    for category, image, correct in verdicts:
        images.setdefault(category, {}).setdefault(image, []).append(correct)
    per_category = {category: _category(own) for category, own in images.items()}
    sums = {"perception_score": 0.0, "cognition_score": 0.0}
    for category, values in per_category.items():
        sums["cognition_score" if category in COGNITION else "perception_score"] += values["score"]
    return {**sums, "per_category": per_category}


def _category(images: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    verdicts = [correct for own in images.values() for correct in own]
    accuracy = sum(verdicts) / len(verdicts)
    plus = sum(all(own) for own in images.values()) / len(images)
    return {"accuracy": accuracy, "accuracy_plus": plus, "score": 100 * (accuracy + plus)}


@chz.chz
class MME(GenerationEval):
    """MME asked of a chat model that sees."""

    load, prompt = staticmethod(load), staticmethod(prompt)
    target = staticmethod(lambda row: str(row["answer"]))
    score = staticmethod(lambda row, reply: {"exact_match": score(row, reply)[1]})

    def needs(self) -> frozenset[str]:
        return frozenset({"images"})
