"""The benchmarks' plain functions: loading, prompt, score. No model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoeval.baselines.charts import draw_accuracy
from nanoeval.endpoint.tasks import TASKS
from nanoeval.evals import hellaswag, mme, mmlu, mmmu_pro, textvqa
from nanoeval.evals._choices import (
    best_option,
    first_letter,
    lettered,
    read_gold,
    read_options,
    take_evenly,
)
from nanoeval.evals._datasets import DatasetError
from tests import tiny_models

REAL_DATA = Path(__file__).resolve().parents[2] / "shared/data"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("PIL", reason='pip install "nanoeval[hf]"')
    monkeypatch.setenv("NANOEVAL_DATASETS_DIR", str(tmp_path))
    return tiny_models.make_data(tmp_path)


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("(C) because", "C"),
        ("The answer is D.", "D"),
        ("**A**", "A"),
        ("I'm sure it's C", "C"),  # ten options hold an I
        ("Answer: _J_", "J"),
        ("K or B", "B"),  # K is no option
        ("AB1 Cat", "?"),
        ("b", "?"),
        ("", "?"),
        ("答案是B。", "?"),  # no letter stands alone inside a word of another script
        ("答案：B。", "B"),
    ],
)
def test_first_stand_alone_letter(reply: str, letter: str) -> None:
    """A letter taken from the middle of a word counts guesses as answers."""
    assert first_letter(reply, 10) == letter


def test_options_come_as_lists_or_as_strings_that_spell_them() -> None:
    """MMMU-Pro spells its options in Python; a split at commas would break them."""
    wanted = ["it's, well", "two"]
    for value in (wanted, tuple(wanted), str(wanted), '["it\'s, well", "two"]'):
        assert read_options(value, "x") == wanted
    assert lettered([str(n) for n in range(12)]).splitlines()[-1] == "L. 11"
    for value in ([], "", None, "[]", "just text", 7):
        with pytest.raises(DatasetError, match="example x.3 has no options"):
            read_options(value, "x.3")


def test_gold_outside_the_options_names_the_example() -> None:
    """A gold label that no option can match counts every answer as wrong."""
    options = ["a", "b", "c", "d"]
    assert [read_gold(value, options, "x") for value in (0, "3", "C", " B ")] == list("ADCB")
    for value in (4, -1, "E", "", None, True, "AB"):
        with pytest.raises(DatasetError, match="example x.3 has the gold label"):
            read_gold(value, options, "x.3")


def test_ties_go_to_the_lower_letter() -> None:
    """Two machines that break ties differently report different accuracies."""
    assert best_option([-2.0, -1.0, -1.0, -1.0]) == 1
    assert best_option([-1.0]) == 0


def test_a_subset_is_spread_over_subjects_and_keeps_its_order() -> None:
    """The first hundred of MMLU would all be of one subject."""
    groups = ["aaaaa", "b", "ccc"]
    assert take_evenly(groups, 6) == list("aaabcc")
    assert take_evenly(groups, None) == list("aaaaabccc")
    assert take_evenly(groups, 100) == list("aaaaabccc")


def test_mmlu_prompt_and_score(data: Path) -> None:
    """The prompt's form is part of the benchmark: another one gives other numbers."""
    rows = mmlu.load(tiny_models.SUBJECTS)
    assert [row["id"] for row in rows][:7:6] == ["abstract_algebra.0", "anatomy.0"]
    options = "A. the dog\nB. 0 lazy dogs and a cup\nC. a table\nD. no"
    assert mmlu.prompt(rows[0]) == f"What is the fox number 0?\n{options}\nAnswer:"
    assert mmlu.score(rows[1], "B, I think") == ("B", 1.0)
    assert mmlu.score(rows[1], "no idea") == ("?", 0.0)
    assert len(mmlu.load(tiny_models.SUBJECTS, subset_size=5)) == 5
    with pytest.raises(ValueError, match="'anatomie' is not known; the nearest: anatomy"):
        mmlu.load(["anatomie"])


def test_mmlu_is_there_for_endpoint_checks(data: Path) -> None:
    """`nano-eval --tasks mmlu` finds tasks by their modules."""
    assert {"mmlu", "mmmu_pro", "textvqa", "mme"} <= set(TASKS)
    row = mmlu.load(["anatomy"])[2]
    assert TASKS["mmlu"].prompt(row)[0]["content"] == mmlu.prompt(row)
    assert TASKS["mmlu"].score(row, "C") == {"exact_match": 1.0}


def test_the_real_mmlu_has_57_subjects(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subject left out, or a row that cannot be read, changes the benchmark."""
    if not (REAL_DATA / "cais/mmlu").is_dir():
        pytest.skip(f"needs the MMLU test split in {REAL_DATA}/cais/mmlu/<subject>/test.jsonl")
    monkeypatch.setenv("NANOEVAL_DATASETS_DIR", str(REAL_DATA))
    rows = mmlu.load()
    assert len(rows) == 14_042
    assert len({row["subject"] for row in rows}) == 57
    assert len({row["id"] for row in rows}) == len(rows)


def test_hellaswag_asks_the_bare_context(data: Path) -> None:
    """An instruction around the context makes it another benchmark."""
    row = hellaswag.load()[2]
    assert hellaswag.prompt(row) == tiny_models.hellaswag_row(2)["ctx"]
    assert (row["id"], row["answer"]) == ("102", "C")
    assert hellaswag.score(row, [-3.0, -2.0, -1.0, -9.0]) == ("C", 1.0)
    blind = [{**tiny_models.hellaswag_row(0), "label": ""}]
    tiny_models.write_rows(data / "Rowan/hellaswag/default", "test", blind)
    with pytest.raises(DatasetError, match="example 100 has the gold label ''"):
        hellaswag.load(split="test")


def parts(messages: list[dict[str, Any]]) -> list[str]:
    """Texts as they are, images as "*"."""
    return [part.get("text", "*") for part in messages[0]["content"]]


def test_mmmu_pro_puts_images_where_the_text_names_them(data: Path) -> None:
    """A question about "<image 2>" needs the second image there, in both subsets' forms."""
    rows = mmmu_pro.load()
    assert [len(row["options"]) for row in rows[:2]] == [4, 10]
    *question, options = parts(mmmu_pro.prompt(rows[0]))
    assert question == ["*", " Which fox is like ", "*"]
    assert "D. option number 3\nAnswer with the letter" in options
    unnamed = {**rows[0], "question": "Which one?"}
    assert parts(mmmu_pro.prompt(unnamed, ""))[:2] == ["*", "*"]
    vision = mmmu_pro.load("vision")[1]
    assert parts(mmmu_pro.prompt(vision))[0] == "*"
    assert "option number" not in parts(mmmu_pro.prompt(vision))[1], "the image shows the options"
    assert mmmu_pro.score(rows[1], "The answer is J.")[0] == "J"
    with pytest.raises(ValueError, match="nearest: standard"):
        mmmu_pro.load("standard (9 options)")


@pytest.mark.parametrize(
    ("reply", "accuracy"),
    [
        ("Go.", 1.0),
        ("stop", (3 * 2 / 3 + 7 * 1) / 10),
        ("the Halt!", (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("go\nbecause it says so", 1.0),
        ("gone", 0.0),
        ("", 0.0),
    ],
)
def test_textvqa_accuracy_leaves_out_each_annotator(reply: str, accuracy: float) -> None:
    """VQA accuracy without the leave-one-out rule is too kind to answers that three gave."""
    assert textvqa.score(tiny_models.textvqa_row(0), reply)[1] == pytest.approx(accuracy)


def test_textvqa_compares_what_was_meant() -> None:
    """Articles, case, commas in numbers and spelled-out digits are no errors."""
    assert textvqa.normalize("The  Two Dogs, 1,000.5!") == "2 dogs 1000.5"
    assert textvqa.normalize("a.m.") == textvqa.normalize("AM")


def test_mme_scores_pairs_of_questions(data: Path) -> None:
    """MME's score rewards an image only when both of its questions are right."""
    rows = mme.load()
    assert parts(mme.prompt(rows[0])) == ["*", rows[0]["question"]]
    assert mme.score(rows[0], "yes, it is. No doubt") == ("Yes", 1.0)
    assert mme.score(rows[1], "Nothing") == ("?", 0.0)
    color = [("color", image, correct) for image, correct in zip("1122", (1, 1, 1, 0), strict=True)]
    code = [("code_reasoning", "3", correct) for correct in (False, True)]
    totals = mme.totals([*((*key, bool(correct)) for *key, correct in color), *code])
    assert totals["perception_score"] == pytest.approx(75 + 50)
    assert totals["cognition_score"] == pytest.approx(50 + 0)


def test_the_chart_is_readable_at_57_subjects(tmp_path: Path) -> None:
    """Fifty-seven names in a small figure lie on top of each other."""
    image = pytest.importorskip("PIL.Image", reason='pip install "nanoeval[hf]"')
    pytest.importorskip("matplotlib", reason='pip install "nanoeval[hf]"')
    accuracies = {name: index / 57 for index, name in enumerate(mmlu.SUBJECTS)}
    summary = {
        "accuracy": 0.5,
        "accuracy_stderr": 0.01,
        "per_subject": accuracies,
        "total_examples": 14_042,
        "scoring": {"strategy": "rank_ll"},
        "model_id": "org/name",
    }
    draw_accuracy(tmp_path / "a.png", "MMLU", summary)
    with image.open(tmp_path / "a.png") as opened:
        pixels = np.asarray(opened.convert("RGB"))
    assert len(pixels) / 57 > 30, "pixels for each subject's name"
    is_blue = (pixels[:, :, 0] < 90) & (pixels[:, :, 2] > 140)
    assert 0.1 < is_blue.mean() < 0.5, "bars are drawn"
