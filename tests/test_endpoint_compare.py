"""`nano-eval compare` on results whose truth is known."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from nanoeval.endpoint.cli import main
from nanoeval.endpoint.compare import compare_reports, first_divergence
from nanoeval.endpoint.comparison_text import as_html, as_text, write_plot
from nanoeval.endpoint.config import EndpointError


def report(scores: list[float | None], reply: str = "The final answer is {0:g}") -> dict[str, Any]:
    samples = [
        {
            "id": str(number),
            "fingerprint": f"f{number}",
            "messages": [{"role": "user", "content": f"Question <{number}>?"}],
            "target": "1",
            "reply": None if score is None else reply.format(score),
            "finish_reason": "stop",
            "scores": {} if score is None else {"exact_match": score},
            "error": "http_500" if score is None else None,
        }
        for number, score in enumerate(scores)
    ]
    return {
        "metrics": {},
        "num_errors": sum(score is None for score in scores),
        "errors": {},
        "samples_hash": f"hash of {len(scores)}",
        "request": {"api": "chat", "params": {"temperature": 0, "max_tokens": 512}},
        "tokens": {"prompt": 100, "completion": 50, "per_second": 12.5},
        "latency": {"p50": 1.0, "p90": 2.0, "p99": 3.0},
        "model": "m",
        "warnings": [],
        "server": {"base_url": "http://x/v1"},
        "samples": samples,
    }


def compared(first: dict[str, Any], second: dict[str, Any], margin: float = 0.02) -> dict[str, Any]:
    task: dict[str, Any] = compare_reports({"t": first}, {"t": second}, margin)["tasks"]["t"]
    return task


SAME = report([1.0] * 800 + [0.0] * 200)


def shifted(up: int, down: int) -> dict[str, Any]:
    """SAME with so many right answers turned wrong (down) and wrong ones right (up)."""
    return report([0.0] * down + [1.0] * (800 - down) + [1.0] * up + [0.0] * (200 - up))


def test_equal_results_are_the_same() -> None:
    """A server compared with itself must pass."""
    task = compared(SAME, copy.deepcopy(SAME))
    assert task["verdict"] == "same"
    assert (task["difference"], task["identical_replies"]) == (0.0, 1.0)
    assert task["first_divergence"] is None
    assert task["flips"] == []


def test_shift_of_three_points_is_different_and_shows_its_flips() -> None:
    """A drop of three points is what the command is for."""
    task = compared(SAME, shifted(up=5, down=35))
    assert task["verdict"] == "different"
    assert task["difference"] == pytest.approx(-0.03)
    assert (task["only_first"], task["only_second"]) == (35, 5)
    assert len(task["flips"]) == 40
    flip = task["flips"][0]
    assert flip["prompt"] == "Question <0>?"
    assert flip["replies"] == ["The final answer is 1", "The final answer is 0"]
    assert flip["diverge_at"] == 20
    assert task["first_divergence"]["median"] == 20
    assert task["identical_replies"] == pytest.approx(0.96)


def test_too_few_samples_say_how_many_are_needed() -> None:
    """ "No significant difference" is no proof of sameness."""
    task = compared(report([1.0] * 40 + [0.0] * 10), report([1.0] * 39 + [0.0] * 11))
    assert task["verdict"] == "cannot tell"
    assert task["more_samples"] > 100


def test_samples_without_an_answer_do_not_make_servers_the_same() -> None:
    """A server that fails on hard prompts would look as good as one that answers."""
    second = report([1.0] * 740 + [None] * 60 + [0.0] * 200)
    task = compared(SAME, second)
    assert task["num_unanswered"] == 60
    assert task["difference"] == 0.0
    assert task["including_errors"]["difference"] == pytest.approx(-0.06)
    assert task["verdict"] == "different"


def test_other_samples_and_other_requests_are_refused_by_name() -> None:
    """A difference between requests would be read as one between servers."""
    other = copy.deepcopy(SAME)
    other["request"]["params"] = {"temperature": 0.7, "max_tokens": 512, "seed": 1}
    expected = "temperature is 0 and 0.7; seed is not set and 1"
    with pytest.raises(EndpointError, match=expected):
        compared(SAME, other)
    other["request"]["params"] = {"temperature": 0.0, "max_tokens": 512}
    assert compared(SAME, other)["verdict"] == "same"
    with pytest.raises(EndpointError, match="1000 and 3 samples"):
        compared(SAME, report([1.0] * 3))
    other = copy.deepcopy(SAME)
    other["samples_hash"], other["samples"][7]["fingerprint"] = "other", "other"
    with pytest.raises(EndpointError, match="sample 7 has another target"):
        compared(SAME, other)
    other["samples"][7]["messages"] = []
    with pytest.raises(EndpointError, match="sample 7 has another prompt"):
        compared(SAME, other)
    with pytest.raises(EndpointError, match="nothing to pair"):
        compare_reports({"a": SAME}, {"b": SAME})


def test_first_divergence_is_a_character_index() -> None:
    """It points people at where the kernels parted."""
    assert first_divergence("abc", "abc") is None
    assert first_divergence("abc", "abd") == 2
    assert first_divergence("ab", "abc") == 2
    assert first_divergence("", "x") == 0


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(json.dumps({"results": {"t": SAME}}))
    second.write_text(json.dumps({"results": {"t": shifted(up=5, down=35), "u": SAME}}))
    return first, second


def test_command_prints_json_text_page_and_plot(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Machines read stdout, people read stderr and the page."""
    pytest.importorskip("matplotlib", reason='pip install "nanoeval[endpoint]"')
    page, plot = tmp_path / "x.html", tmp_path / "x.png"
    argv = ["compare", *map(str, files), "--margin", "0.02", f"--html={page}", f"--plot={plot}"]
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["verdict"] == "different"
    assert json.loads(out)["left_out"] == ["u"]
    assert "t: DIFFERENT: exact_match 0.8000 and 0.7700, difference -3.00 points" in err
    assert "right in a.json alone: 35, in b.json alone: 5" in err
    assert "left out: u" in err
    assert plot.read_bytes().startswith(b"\x89PNG")
    html = page.read_text()
    assert html.count("<details>") == 40
    assert "Question &lt;0&gt;?" in html
    assert "<script" not in html
    assert main(["compare", str(files[0]), str(files[0])]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[]", 'holds no "results"'),
        ('{"results": {"t": {"metrics": {}}}}', "no samples to pair"),
        ('{"results": {"t": {"samples": null}}}', "b.json is damaged: t has NoneType in the place"),
        ('{"results": {"t": {"samples": [], "num_samples": 5}}}', "t has 0 of its 5 samples"),
        ('{"results": {"t": {"samples": [5]}}}', "t has int in the place of sample 0"),
        (
            json.dumps({"results": {"t": {"samples": [{**report([1])["samples"][0], "id": 3}]}}}),
            "t has no usable id in sample 0; write it anew with --output",
        ),
    ],
)
def test_unusable_file_is_one_clear_line(
    files: tuple[Path, Path], content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback says nothing to who mixed up two files."""
    if content is None:
        files[1].unlink()
    else:
        files[1].write_text(content)
    assert main(["compare", *map(str, files)]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


def test_page_says_how_many_samples_lack_an_answer() -> None:
    """Who reads only the page would take two thirds of the samples for all of them."""
    first = report([1.0] * 800 + [0.0] * 200)
    second = report([1.0] * 740 + [None] * 60 + [0.0] * 200)
    page = as_html(compare_reports({"t": first}, {"t": second}))
    assert "60 samples lack an answer and are left out; counted as wrong, the difference" in page


def test_half_characters_in_replies_can_be_shown(tmp_path: Path) -> None:
    """One broken emoji in one reply would cost the whole page."""
    other = shifted(up=0, down=1)
    other["samples"][0]["reply"] = "bad \ud83d"
    comparison = compare_reports({"t": SAME}, {"t": other}, names=("a", "b\udcff"))
    (tmp_path / "x.html").write_text(as_html(comparison), encoding="utf-8")
    assert "bad \\ud83d" in (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "bad \\ud83d" in as_text(comparison)
    pytest.importorskip("matplotlib", reason='pip install "nanoeval[endpoint]"')
    write_plot(comparison, tmp_path / "x.png")


def test_bad_margin_and_folder_are_refused(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A margin of 2 (for 2 points) would make everything the same."""
    assert main(["compare", *map(str, files), "--margin=2"]) == 3
    assert main(["compare", *map(str, files), "--html=/no/such/folder/x.html"]) == 3
    err = capsys.readouterr().err
    assert "--margin=2.0 must lie between 0 and 1" in err
    assert "the folder /no/such/folder does not exist" in err
