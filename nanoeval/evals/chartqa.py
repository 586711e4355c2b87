"""ChartQA: questions about images of charts.

Data: Masry et al., "ChartQA: a benchmark for question answering about charts with visual and
logical reasoning" (2022), test split. The instruction is this package's own; the three metrics
give lm-evaluation-harness's verdicts of the task of this name on any reply.
"""

from __future__ import annotations

import re
from typing import Any

import chz

from nanoeval.evals._datasets import load_rows
from nanoeval.evals._generation import GenerationEval
from nanoeval.evals._relaxed_match import is_close, is_mentioned, stated_answer
from nanoeval.models._messages import as_png, image_part

INSTRUCTION = (
    "{question}\n\nLook at the chart and reason step by step. Then write, as your last line,"
    ' "Final Answer: " and a single phrase or number, spelled as in the chart. Give a ratio as a'
    " decimal, a percentage with its %, any other number without a unit, and Yes or No where the"
    " question asks for it."
)


def load() -> list[dict[str, Any]]:
    """The test questions: `image` (PNG bytes), `query`, `label` (the right answers)."""
    rows = load_rows("HuggingFaceM4/ChartQA", None, "test")
    return [{**row, "image": as_png(rows.image(row["image"]))} for row in rows]


def prompt(row: dict[str, Any]) -> list[dict[str, Any]]:
    """One message: the chart, then the question."""
    text = INSTRUCTION.format(question=row["query"])
    return [{"role": "user", "content": [image_part(row["image"]), {"type": "text", "text": text}]}]


def target(row: dict[str, Any]) -> str:
    """The label, the first one of several, as in the harness."""
    label = row["label"]
    return str(label if isinstance(label, str) else label[0])


def score(row: dict[str, Any], reply: str) -> dict[str, float]:
    """Within the tolerance; verbatim on the last line; and, with no answer stated, anywhere."""
    right, stated = target(row), stated_answer(reply)
    last_line = re.search(r"Final Answer: (.+)$", reply, re.IGNORECASE)
    said = last_line.group(1).strip().lower().removesuffix(".") if last_line else None
    relaxed = bool(stated) and is_close(stated, right)
    return {
        "relaxed_accuracy": float(relaxed),
        "exact_match": float(said == right.strip().lower()),
        "anywhere_accuracy": float(relaxed if stated else is_mentioned(reply, right)),
    }


@chz.chz
class ChartQA(GenerationEval):
    """ChartQA asked of a chat model that sees."""

    load, prompt = staticmethod(load), staticmethod(prompt)
    target, score = staticmethod(target), staticmethod(score)

    def metric_names(self) -> tuple[str, ...]:
        return ("relaxed_accuracy", "exact_match", "anywhere_accuracy")

    def needs(self) -> frozenset[str]:
        return frozenset({"images"})
