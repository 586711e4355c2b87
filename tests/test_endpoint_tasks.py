"""The bundled tasks score as the harness does, and a new one is a short file."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanoeval.endpoint import TASKS, EndpointError
from nanoeval.evals import chartqa, gsm8k_cot_llama
from nanoeval.evals._generation import GenerationEval, Sample, sample_hash
from nanoeval.evals._sample_summary import busy_seconds, summarize_samples
from nanoeval.models._messages import flatten
from nanoeval.models.scripted import ScriptedModel

FIXTURES = Path(__file__).parent / "fixtures" / "endpoint"
EVALS = Path(gsm8k_cot_llama.__file__).parent


def gsm8k_scores(reply: str, target: str) -> dict[str, float]:
    return gsm8k_cot_llama.score({"answer": f"So it is.\n#### {target}"}, reply)


def chartqa_scores(reply: str, target: str) -> dict[str, float]:
    return chartqa.score({"label": [target]}, reply)


@pytest.mark.parametrize(
    ("name", "score"), [("gsm8k_cot_llama", gsm8k_scores), ("chartqa", chartqa_scores)]
)
def test_verdicts_are_those_of_the_harness(name: str, score: Any) -> None:
    """A score under the harness's name that is not the harness's score would mislead everybody."""
    verdicts = json.loads((FIXTURES / f"{name}.json").read_text())
    seen: dict[str, set[float]] = {}
    for verdict in verdicts:
        own = score(verdict["reply"], verdict["target"])
        expected = verdict["scores"]
        assert {metric: own[metric] for metric in expected} == expected, verdict
        for metric, value in expected.items():
            seen.setdefault(metric, set()).add(value)
    assert len(verdicts) > 500
    assert all(values == {0.0, 1.0} for values in seen.values())


@pytest.mark.parametrize(
    ("reply", "target", "expected"),
    [
        ("The final answer is 18", "18", 1),
        ("the final answer is: **$1,234.00**.", "1234", 1),
        ("The final answer is \\boxed{-7}", "-7", 1),
        ("The final answer is 5. No. The final answer is 6", "6", 1),
        ("The final answer is 5. No. The final answer is 6", "5", 0),
        ("So there are 12 boxes, 3 more than 9", "9", 1),
        ("So there are 12 boxes, 3 more than 9", "12", 0),
        ("no number at all", "3", 0),
        ("", "3", 0),
        ("The final answer is 0.5", "1/2", 0),
    ],
)
def test_exact_match_takes_the_stated_number_else_the_last(
    reply: str, target: str, expected: float
) -> None:
    """Formatting must not cost a point, and a later number must not earn one."""
    assert gsm8k_scores(reply, target)["exact_match"] == expected


def test_gsm8k_prompt_is_eight_turns_and_the_question() -> None:
    """Fewer shots would be another task under the same name."""
    messages = gsm8k_cot_llama.prompt({"question": "How {many}?"})
    assert [message["role"] for message in messages] == ["user", "assistant"] * 8 + ["user"]
    assert messages[-1]["content"].endswith("Problem: How {many}?")
    for reply in messages[1::2]:
        number = reply["content"].rpartition(" ")[2]
        assert gsm8k_scores(reply["content"], number)["strict_match"] == 1
    assert flatten(messages).count("Problem: ") == 9


def test_chartqa_rows_become_png_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is sent another form of image may refuse it."""
    image = pytest.importorskip("PIL.Image", reason='pip install "nanoeval[endpoint]"')
    folder = tmp_path / "HuggingFaceM4" / "ChartQA" / "default"
    folder.mkdir(parents=True)
    image.new("RGB", (4, 4), "red").save(folder / "a.jpg")
    image.new("RGB", (4, 4), "blue").save(folder / "b.png")
    rows = [
        {"image": name, "query": "Which colour?", "label": ["Red"], "human_or_machine": 0}
        for name in ("a.jpg", "b.png")
    ]
    (folder / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    monkeypatch.setenv("NANOEVAL_DATASETS_DIR", str(tmp_path))
    loaded = chartqa.load()
    assert all(row["image"].startswith(b"\x89PNG") for row in loaded)
    [message] = chartqa.prompt(loaded[0])
    assert message["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert "Which colour?" in message["content"][1]["text"]
    assert chartqa.target(loaded[0]) == "Red"
    hashes = {sample_hash(chartqa.prompt(row), chartqa.target(row)) for row in loaded}
    assert len(hashes) == 2


def test_each_task_is_a_file_under_100_lines() -> None:
    """A benchmark that takes more is not one that people add in an afternoon."""
    assert {"chartqa", "gsm8k_cot_llama"} <= set(TASKS)
    for name in TASKS:
        assert len((EVALS / f"{name}.py").read_text().splitlines()) < 100
        check = TASKS[name](model=ScriptedModel(reply=""))
        assert isinstance(check, GenerationEval)
        assert check.get_name() == name


def test_unknown_task_names_the_nearest() -> None:
    """A typing error should cost one second."""
    with pytest.raises(EndpointError, match="the nearest: gsm8k_cot_llama"):
        TASKS["gsm8k_cot_lama"]
    assert "nothing" not in TASKS
    own = TASKS["nanoeval.evals.chartqa:ChartQA"]
    assert own is chartqa.ChartQA
    with pytest.raises(EndpointError, match="module:Class"):
        TASKS["no_such_module:Thing"]


def test_gsm8k_test_split_is_loaded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure about GSM8K is about these 1,319 problems."""
    data = Path(os.environ.get("NANOEVAL_SHARED", Path(__file__).parents[2] / "shared")) / "data"
    if not (data / "openai" / "gsm8k").is_dir():
        pytest.skip("needs ../shared/data with the GSM8K test split")
    monkeypatch.setenv("NANOEVAL_DATASETS_DIR", str(data))
    rows = gsm8k_cot_llama.load()
    assert len(rows) == 1319
    assert all(gsm8k_scores(row["answer"], gsm8k_cot_llama.target(row)) for row in rows)
    assert all(float(gsm8k_cot_llama.target(row).replace(",", "")) is not None for row in rows)


def samples() -> list[Sample]:
    answered = [
        Sample(
            scores={"exact_match": score},
            reply="x",
            finish_reason=reason,
            completion_tokens=10,
            prompt_tokens=5,
            latency=2.0,
            started=start,
        )
        for score, reason, start in ((1.0, "stop", 0.0), (0.0, "length", 1.0), (1.0, "stop", 10.0))
    ]
    return [*answered, Sample(error="http_500", error_message="x", tries=5)]


def test_summary_accounts_for_every_sample() -> None:
    """A failed request that vanishes makes a broken server look good."""
    summary = summarize_samples(samples(), ["exact_match"])
    assert summary["metrics"]["exact_match"] == pytest.approx(2 / 3)
    # Standard deviation of (1, 0, 1) with n - 1 is sqrt(1/3); over sqrt(3) that is 1/3.
    assert summary["metrics"]["exact_match_stderr"] == pytest.approx(1 / 3)
    assert (summary["num_samples"], summary["num_answered"], summary["num_errors"]) == (4, 3, 1)
    assert summary["errors"] == {"http_500": 1}
    assert summary["accuracy_including_errors"] == 0.5
    assert summary["tokens"]["completion"] == 30
    # Busy from 0 to 3 and from 10 to 12.
    assert summary["tokens"]["per_second"] == pytest.approx(30 / 5)
    assert summary["tokens"]["per_second_per_request"] == 5.0
    assert summary["latency"] == {"p50": 2.0, "p90": 2.0, "p99": 2.0}
    assert "1 of 3 replies stopped for length" in summary["warnings"][0]


def test_summary_takes_whatever_a_server_calls_itself() -> None:
    """One odd name would lose the summary of a whole run, after its last sample."""
    names: list[Any] = [["a"], 5, "b", None]
    odd = [replace(sample, model=name) for sample, name in zip(samples(), names, strict=True)]
    assert summarize_samples(odd, ["exact_match"])["reported_models"] == ["5", "['a']", "b"]


def test_summary_of_nothing_and_of_errors_alone_has_no_metrics() -> None:
    """A mean of nothing must not become a number."""
    assert summarize_samples([], ["exact_match"])["metrics"] == {}
    failed = summarize_samples(samples()[-1:], ["exact_match"])
    assert failed["metrics"] == {}
    assert failed["accuracy_including_errors"] == 0.0


def test_busy_seconds_is_the_union() -> None:
    """Counting overlaps twice would halve the reported throughput."""
    assert busy_seconds([(0, 2), (1, 3), (10, 12), (11, 11.5)]) == 5
    assert busy_seconds([]) == 0
