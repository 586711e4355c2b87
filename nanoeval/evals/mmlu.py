"""MMLU: four-option questions from 57 subjects, zero-shot (Hendrycks et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import chz

from nanoeval.evals._choices import (
    check_known,
    first_letter,
    lettered,
    read_gold,
    read_options,
    take_evenly,
)
from nanoeval.evals._datasets import load_rows
from nanoeval.evals._generation import GenerationEval

_SUBJECTS = """
    abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology
    college_chemistry college_computer_science college_mathematics college_medicine college_physics
    computer_security conceptual_physics econometrics electrical_engineering elementary_mathematics
    formal_logic global_facts high_school_biology high_school_chemistry
    high_school_computer_science high_school_european_history high_school_geography
    high_school_government_and_politics high_school_macroeconomics high_school_mathematics
    high_school_microeconomics high_school_physics high_school_psychology high_school_statistics
    high_school_us_history high_school_world_history human_aging human_sexuality international_law
    jurisprudence logical_fallacies machine_learning management marketing medical_genetics
    miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory
    professional_accounting professional_law professional_medicine professional_psychology
    public_relations security_studies sociology us_foreign_policy virology world_religions
"""
SUBJECTS = tuple(_SUBJECTS.split())


def load(
    subjects: Sequence[str] | None = None,
    split: str = "test",
    subset_size: int | None = None,
    revision: str | None = None,
) -> list[dict[str, Any]]:
    """The questions of `subjects` (None = all 57), in the data set's order.

    With `subset_size` the first ones of each subject, as even as they go, so many in all. Raises
    ValueError for a subject that there is not, DatasetError for a row without options or gold.
    """
    check_known(subjects or (), SUBJECTS, "subject")
    return take_evenly([_load(name, split, revision) for name in subjects or SUBJECTS], subset_size)


def _load(subject: str, split: str, revision: str | None) -> list[dict[str, Any]]:
    rows = load_rows("cais/mmlu", subject, split, revision)
    found = []
    for index, row in enumerate(rows):
        row_id = f"{subject}.{index}"
        options = read_options(row.get("choices"), row_id)
        found.append(
            {
                "id": row_id,
                "subject": subject,
                "question": row["question"],
                "options": options,
                "answer": read_gold(row.get("answer"), options, row_id),
                "revision": rows.revision,
            }
        )
    return found


def prompt(row: dict[str, Any]) -> str:
    """The question, the lettered options and "Answer:"."""
    return f"{row['question'].strip()}\n{lettered(row['options'])}\nAnswer:"


def score(row: dict[str, Any], reply: str) -> tuple[str, float]:
    """The letter that `reply` picks ("?" for none), and 1.0 if it is the right one, else 0.0."""
    picked = first_letter(reply, len(row["options"]))
    return picked, float(picked == row["answer"])


@chz.chz
class MMLU(GenerationEval):
    """MMLU asked of a chat model, which answers with a letter."""

    load = staticmethod(load)
    prompt = staticmethod(lambda row: [{"role": "user", "content": prompt(row)}])
    target = staticmethod(lambda row: str(row["answer"]))
    score = staticmethod(lambda row, reply: {"exact_match": score(row, reply)[1]})
