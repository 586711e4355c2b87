"""The end of a run reads well on a console, and stays JSON on request."""

from __future__ import annotations

import json
import math

import pytest

from nanoeval._summary_text import summary_text

SUMMARY = {
    "num_rollouts": 1319,
    "accuracy": 0.6839123,
    "accuracy_stderr": 0.0128,
    "accuracy_ci95": [0.658, 0.709],
    "accuracy_worst_case": 0.679,
    "accuracy_best_case": 0.6863,
    "num_scored": 1310,
    "num_failed": 9,
    "is_valid": False,
    "pass@4": 0.81,
    "note": "two\nlines",
    "metrics_including_errors": {"accuracy": 0.679, "inner": {"deep": [1, 2.5, None]}},
}


def test_summary_begins_with_the_accuracy_and_its_uncertainty() -> None:
    """The one number that people look for would stand somewhere in a line of JSON."""
    lines = summary_text("gsm8k", SUMMARY, 72.4).splitlines()
    assert lines[0] == "gsm8k: done, 1 min 12 s"
    assert lines[1].split()[:4] == ["accuracy", "0.6839", "±", "0.0128"]
    assert "95 % interval 0.6580 … 0.7090" in lines[1]
    assert "failures as wrong 0.6790, as right 0.6863" in lines[1]
    assert "1,319 = 1,310 scored + 9 failed" in lines[2]
    assert "not valid" in lines[2]


def test_every_metric_is_shown_once_and_nested_ones_stand_below() -> None:
    """A metric that is left out of the text would be missed."""
    text = summary_text("gsm8k", SUMMARY)
    assert text.count("accuracy_stderr") == 0
    assert text.count("pass@4") == 1
    assert "two lines" in text
    assert text.index("note") < text.index("metrics_including_errors") < text.index("deep")
    assert "[1, 2.5000, none]" in text


def test_values_stand_in_one_column() -> None:
    """Ragged lines are hard to scan."""
    lines = summary_text("x", {"a": 1, "a_long_name": 2, "in": {"b": 3}}).splitlines()
    assert {line.index(value) for line, value in zip(lines[1:3], "12", strict=True)} == {
        lines[4].index("3")
    }


@pytest.mark.parametrize(
    "summary",
    [
        {},
        {"accuracy": None, "accuracy_stderr": None},
        {"accuracy": math.nan, "best": math.inf, "tiny": 1e-12, "huge": 1e300},
        {"accuracy": "text", "accuracy_ci95": [1]},
        {"accuracy": True, "objects": [object()], "": "", "long": "x" * 1000},
        {f"metric {i}": i for i in range(500)},
        {1: {2: {3: {}}}},  # type: ignore[dict-item]
    ],
)
def test_odd_summaries_are_shown_too(summary: dict[str, object]) -> None:
    """A run of hours must not end in an error of its last line."""
    text = summary_text("odd", summary)
    assert text.startswith("odd: done")
    assert len(text.splitlines()) <= 65
    assert max(map(len, text.splitlines())) < 200


def test_json_is_printed_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts that read the console need one line that can be parsed."""
    monkeypatch.setenv("NANOEVAL_SUMMARY", "json")
    text = summary_text("gsm8k", SUMMARY, 1.5)
    assert "\n" not in text
    assert json.loads(text) == {"name": "gsm8k", "seconds": 1.5, "summary": SUMMARY}
