"""TextVQA: questions about the text in photographs (Singh et al., 2019)."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import chz

from nanoeval.evals._choices import user_message
from nanoeval.evals._datasets import DatasetError, load_rows
from nanoeval.evals._generation import GenerationEval

INSTRUCTION = "Answer with one word or a short phrase."
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(value) for value, word in enumerate(NUMBERS)} | {"none": "0"}
# So many of the (ten) annotators who say the same make an answer fully right.
ANNOTATORS_NEEDED = 3


def load(
    split: str = "validation", subset_size: int | None = None, revision: str | None = None
) -> list[dict[str, Any]]:
    """The first `subset_size` (None = all) questions with their annotators' answers."""
    rows = load_rows("facebook/textvqa", None, split, revision)
    found = []
    for index, row in enumerate(rows[:subset_size]):
        row_id = str(row.get("question_id", index))
        if not row.get("answers"):
            raise DatasetError(f"example {row_id} has no answers; the split {split!r} may be blind")
        found.append(
            {
                "id": row_id,
                "subject": None,
                "question": row["question"],
                "answers": [str(answer) for answer in row["answers"]],
                "image": rows.image(row["image"]),
                "revision": rows.revision,
            }
        )
    return found


def prompt(row: dict[str, Any]) -> list[dict[str, Any]]:
    """One message: the photograph, the question and what form the answer should have."""
    return user_message(row["image"], f"{row['question'].strip()}\n{INSTRUCTION}")


def target(row: dict[str, Any]) -> str:
    """The answer that most annotators gave, the first of equally frequent ones."""
    return str(Counter(row["answers"]).most_common(1)[0][0])


def score(row: dict[str, Any], reply: str) -> tuple[str, float]:
    """The reply as it is compared, and its VQA accuracy in [0, 1] (Antol et al., 2015).

    The mean, over leaving out each annotator in turn, of min(1, agreeing others / 3).
    """
    said = normalize(reply)
    agrees = [normalize(answer) == said for answer in row["answers"]]
    shares = [min(1.0, (sum(agrees) - own) / ANNOTATORS_NEEDED) for own in agrees]
    return said, sum(shares) / len(shares)


def normalize(text: str) -> str:
    """First line, lower case, no punctuation but inside numbers, no articles, numbers in digits."""
    line = next(iter(text.strip().splitlines()), "").lower()
    line = re.sub(r"(?<=\d),(?=\d{3}\b)|['’]|[.](?!\d)", "", line)
    words = re.sub(r"[^\w\s.:$%/-]", " ", line).split()
    return " ".join(DIGITS.get(word, word) for word in words if word not in ARTICLES)


@chz.chz
class TextVQA(GenerationEval):
    """TextVQA asked of a chat model that sees."""

    load, prompt, target = staticmethod(load), staticmethod(prompt), staticmethod(target)
    score = staticmethod(lambda row, reply: {"vqa_accuracy": score(row, reply)[1]})

    def metric_names(self) -> tuple[str, ...]:
        return ("vqa_accuracy",)

    def needs(self) -> frozenset[str]:
        return frozenset({"images"})
