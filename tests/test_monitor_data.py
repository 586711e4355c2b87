"""What the monitor shows is what happened: histories, task lists, events, comparisons."""

from __future__ import annotations

import asyncio
import datetime
import itertools
import json
import random
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import chz
import numpy as np
import pytest

from nanoeval import (
    Eval,
    EvalSpec,
    RolloutSystemError,
    RunnerArgs,
    Task,
    _inspect,
    _inspect_run,
    run,
)
from nanoeval._inspect_run import TaskFilter
from nanoeval._statistics import wilson_interval
from nanoeval.monitor import events, history
from nanoeval.monitor.comparison import compare
from nanoeval.recorder import get_recorder
from nanoeval.recorders import dummy_recorder, json_recorder


class Sum(Task):
    question: str = "?"


@chz.chz
class Mixed(Eval[Sum, dict[str, Any]]):
    """A third is wrong, some are tried again, some fail for good."""

    n: int = 60
    name: str = "mixed"

    def get_name(self) -> str:
        return self.name

    async def get_tasks(self) -> list[Sum]:
        return [
            Sum(question_id=f"q{i:03}", attempt_id=k, question=f"What is {i} + {k}?")
            for i in range(self.n)
            for k in range(2)
        ]

    async def evaluate(self, task: Sum) -> dict[str, Any]:
        number = int(task.question_id[1:])
        get_recorder().record_sampling([{"role": "user", "content": task.question}], f"Ä{number}")
        await asyncio.sleep(0.001 * (number % 7))
        if number % 10 == 3 and task.retry_idx == 0:
            raise RolloutSystemError(f"HTTP 429: slow down\nrequest {task.name}")
        if number % 20 == 7:
            raise RolloutSystemError("HTTP 500: broken 100%_\\")
        return {"correct": number % 3 != 0, "reply": f"it is {number}"}

    async def get_summary(self, results: list[Any]) -> dict[str, Any]:
        return {"n": len(results)}


def run_mixed(run_set_id: str = "mixed", records: Path | None = None, **fields: Any) -> Path:
    recorder = json_recorder(records) if records else dummy_recorder(log=False)
    runner = RunnerArgs(run_set_id=run_set_id, max_retries=1, retry_backoff=0.0, recorder=recorder)
    asyncio.run(run(EvalSpec(eval=Mixed(**fields), runner=runner)))
    return _inspect.find_run_set(run_set_id).path


def all_tries(path: Path) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(path)) as db:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute("SELECT * FROM try ORDER BY id")]


FILTERS: list[tuple[TaskFilter, Any]] = [
    (TaskFilter(), lambda t: True),
    (TaskFilter(is_descending=True), lambda t: True),
    (TaskFilter(state="scored"), lambda t: t["state"] == 2),
    (TaskFilter(state="failed"), lambda t: t["state"] == 4),
    (TaskFilter(state="retried"), lambda t: t["state"] == 3),
    (TaskFilter(state="queued"), lambda t: t["state"] == 0),
    (TaskFilter(state="running"), lambda t: t["state"] == 1),
    (TaskFilter(verdict="right"), lambda t: t["score"] == 1),
    (TaskFilter(verdict="wrong"), lambda t: t["score"] == 0),
    (TaskFilter(verdict="partial"), lambda t: False),
    (TaskFilter(state="scored", verdict="wrong", sort="duration"), lambda t: t["score"] == 0),
    (
        TaskFilter(error_type="RolloutSystemError", error_line="HTTP 429: slow down"),
        lambda t: (t["error_message"] or "").startswith("HTTP 429"),
    ),
    (TaskFilter(text="Q01"), lambda t: "q01" in t["question_id"]),
    (TaskFilter(text="what is 12 +"), lambda t: t["question_id"] == "q012"),
    (TaskFilter(text="it is 41"), lambda t: t["question_id"] == "q041" and t["state"] == 2),
    (TaskFilter(text="100%_\\"), lambda t: "broken" in (t["error_message"] or "")),
    (
        TaskFilter(text="100%_\\", state="retried"),
        lambda t: t["state"] == 3 and "broken" in (t["error_message"] or ""),
    ),
    (TaskFilter(text="%"), lambda t: "broken" in (t["error_message"] or "")),
    (TaskFilter(text="no such text"), lambda t: False),
]  # fmt: skip


def test_task_filters_let_through_exactly_what_they_say() -> None:
    """A list that lacks rows, or shows wrong ones, misleads whoever looks for a fault."""
    path = run_mixed()
    tries = all_tries(path)
    with _inspect.reading(path) as db:
        for wanted, is_wanted in FILTERS:
            page = _inspect_run.find_tasks(db, 1, wanted, limit=1000, offset=0)
            expected = {t["id"] for t in tries if is_wanted(t)}
            assert {line.task_id for line in page.lines} == expected, wanted
            assert len(page.lines) == len(expected), f"no row twice: {wanted}"
            assert not page.has_more
            assert page.num_matching in (None, len(expected))


@pytest.mark.parametrize("sort", ["duration", "finished", "started", "score"])
@pytest.mark.parametrize("text", ["", "q0"])
def test_task_lists_are_sorted_and_paged_without_gaps(sort: Any, text: str) -> None:
    """Paging through a sorted list would skip or repeat tasks."""
    path = run_mixed()
    with _inspect.reading(path) as db:
        wanted = TaskFilter(state="scored", sort=sort, is_descending=True, text=text)
        pages = [_inspect_run.find_tasks(db, 1, wanted, 7, offset) for offset in range(0, 120, 7)]
    lines = [line for page in pages for line in page.lines]
    assert len({line.task_id for line in lines}) == len(lines) == 114
    keys = {
        "duration": [line.seconds for line in lines],
        "finished": [line.finished_at for line in lines],
        "started": [line.started_at for line in lines],
        "score": [line.score for line in lines],
    }[sort]
    # Outcomes of one commit may stand in any order of their ends.
    slack = 0.05 if sort == "finished" else 0.0
    assert all(a >= b - slack for a, b in itertools.pairwise(keys))


def test_errors_are_grouped_by_type_and_first_line() -> None:
    """Messages that differ in a request id would hide that they are one error."""
    with _inspect.reading(run_mixed()) as db:
        first, second = _inspect_run.error_groups(db, 1)
    assert (first.error_type, first.line, first.num_retried, first.num_failed) == (
        "RolloutSystemError",
        "HTTP 429: slow down",
        12,
        0,
    )
    assert (second.line, second.num_retried, second.num_failed) == (
        "HTTP 500: broken 100%_\\",
        6,
        6,
    )


def test_history_of_a_small_run_is_exact() -> None:
    """Charts that are a little off send people after faults that are not there."""
    path = run_mixed()
    found = history.History(1)
    with _inspect.reading(path) as db:
        found.update(db)
    tries = [t for t in all_tries(path) if t["finished_at"] is not None]
    assert len(found.rows) == len(tries)
    curve, latency, flow = found.accuracy(), found.latency(), found.flow([], None)
    assert curve is not None
    assert latency is not None
    assert flow is not None
    scores = [t["score"] for t in tries if t["score"] is not None]
    assert curve.mean[-1] == pytest.approx(np.mean(scores))
    assert [curve.low[-1], curve.high[-1]] == pytest.approx(
        wilson_interval(float(np.mean(scores)), len(scores))
    )
    seconds = [t["finished_at"] - t["started_at"] for t in tries]
    assert latency.p50 == pytest.approx(np.percentile(seconds, 50), abs=1e-4)
    assert latency.counts.sum() == len(tries)
    width = flow.time[1] - flow.time[0]
    # A time of these days as a float is exact to a quarter of a microsecond.
    assert (flow.per_second * width).sum() == pytest.approx(len(tries), abs=1)


def test_history_follows_a_growing_run_and_thins_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of millions would fill the monitor's memory, or its charts would stop."""
    monkeypatch.setattr(history, "SAMPLE_SIZE", 100)
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.execute("CREATE TABLE outcome (seq INTEGER PRIMARY KEY, eval_id, state, started_at,"
               " finished_at, score)")  # fmt: skip
    found = history.History(1)
    for batch in range(40):
        rows = [
            (1 + s % 2, 2, s - 1.5, float(s), s % 10 < 7)
            for s in range(batch * 50, batch * 50 + 50)
        ]
        db.executemany("INSERT INTO outcome (eval_id, state, started_at, finished_at, score)"
                       " VALUES (?, ?, ?, ?, ?)", rows)  # fmt: skip
        found.update(db)
        assert len(found.rows) <= 200
    # Every second outcome belongs to another eval.
    assert len(found.rows) * found.step == pytest.approx(1000, abs=2 * found.step)
    fresh = history.History(1)
    fresh.update(db)
    latency, same = found.latency(), fresh.latency()
    assert latency is not None
    assert same is not None
    assert latency.p50 == same.p50 == 1.5
    flow = found.flow([], None)
    assert flow is not None
    assert flow.per_second[10:-10].mean() == pytest.approx(0.5, rel=0.2)
    db.execute("DELETE FROM outcome WHERE seq > 100")
    found.update(db)
    assert 50 < found.last <= 100, "a file that was put back is read anew"
    db.close()


def test_recent_rate_forgets_what_is_long_ago() -> None:
    """The time left would be wrong for hours after a pause."""
    found = history.History(1)
    now = 10_000.0
    old = [[s, 2, s - 1, s, 1] for s in range(1, 5000)]
    new = [[5000 + i, 2, 9_970, 9_970 + i / 10, 1] for i in range(300)]
    found.rows = np.array(old + new, dtype=float)
    assert found.recent_rate(now) == pytest.approx(300 / 60, rel=0.05)
    assert found.recent_rate(now + 1000) is None


def stamp(moment: float) -> str:
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).isoformat()


def write_events(path: Path, n: int, began: float) -> None:
    with path.open("w", encoding="utf-8") as file:
        for i in range(n):
            event = {
                "timestamp": stamp(began + i * 0.1),
                "record_type": "sampling",
                "sample_id": f'q{i % 977} "ü"',
                "group_id": f"{i % 3}.0",
                "sampled": f"reply {i} " + "x" * 300,
            }
            file.write(json.dumps(event, ensure_ascii=i % 2 == 0) + "\n")


def test_events_are_found_by_bisection_without_reading_the_file(tmp_path: Path) -> None:
    """A page on one task would read gigabytes, each time it is shown."""
    path, n, began = tmp_path / "r.jsonl", 30_000, time.time() - 10_000
    write_events(path, n, began)
    for i in random.Random(1).sample(range(n), 20):
        moment = began + i * 0.1
        found = events.find_events(path, f'q{i % 977} "ü"', f"{i % 3}.0", moment, moment)
        assert [e["sampled"].split()[1] for e in found.events] == [str(i)]
        assert not found.is_cut_off
    with path.open("rb") as file:
        size = path.stat().st_size
        first, last = events._around(file, size, began + n * 0.05)
    assert abs(first - size / 2) < 200_000
    assert last - first < 100_000


def test_events_of_an_unfinished_or_unknown_time_are_found(tmp_path: Path) -> None:
    """A rollout in flight has no end yet; its events matter most."""
    path, began = tmp_path / "r.jsonl", time.time() - 1000
    write_events(path, 1000, began)
    path.write_text(path.read_text() + '{"timestamp": "2026')  # cut off by a kill
    found = events.find_events(path, 'q5 "ü"', "2.0", None, None)
    assert [e["sampled"].split()[1] for e in found.events] == ["5"]
    assert events.find_events(path, "q5", "2.0", None, None).events == []
    with pytest.raises(FileNotFoundError):
        events.find_events(tmp_path / "gone.jsonl", "q", "1.0", None, None)


def test_last_events_follow_the_file(tmp_path: Path) -> None:
    """The page of stuck rollouts would show what they did long ago."""
    path = tmp_path / "r.jsonl"

    def append(question: str, text: str) -> None:
        event = {
            "timestamp": stamp(time.time()),
            "record_type": "extra",
            "sample_id": question,
            "group_id": "1.0",
            "data": text,
        }
        with path.open("a") as file:
            file.write(json.dumps(event) + "\n")

    for number in range(50):
        append(f"q{number}", "old")
    follower = events.LastEvents(path)
    wanted = {("q1", "1.0"), ("q2", "1.0"), ("q99", "1.0")}
    assert {k[0]: e["data"] for k, e in follower.look(wanted).items()} == {"q1": "old", "q2": "old"}
    append("q1", "new")
    append("q99", "first")
    seen = follower.look(wanted)
    assert {k[0]: e["data"] for k, e in seen.items()} == {"q1": "new", "q2": "old", "q99": "first"}
    assert set(follower.look({("q30", "1.0")})) == {("q30", "1.0")}, "one that is asked for later"


def test_real_records_are_found_for_each_try(tmp_path: Path) -> None:
    """The monitor must read what the recorder writes, non-ASCII text and retries included."""
    records = tmp_path / "r.jsonl"
    path = run_mixed(records=records)
    with _inspect.reading(path) as db:
        tries = _inspect_run.tries_of_question(db, 1, "q003")
    assert [(t.attempt_id, t.retry_idx) for t in tries] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for t in tries:
        found = events.find_events(records, "q003", t.group_id, t.started_at, t.finished_at).events
        last = "error" if t.retry_idx == 0 else "sample_completed"
        assert [e["record_type"] for e in found] == ["sampling", last]
        assert found[0]["sampled"] == "Ä3"


def test_comparison_pairs_by_question_and_counts_flips() -> None:
    """Two runs would be compared on different questions, and noise be taken for a difference."""
    first = [
        ("a", 2.0, 2, 1),
        ("b", 0.0, 2, 2),
        ("c", 1.0, 1, 3),
        ("d", 0.0, 0, 4),
        ("f", 1.0, 1, 9),
    ]
    second = [("a", 1.0, 2, 5), ("b", 2.0, 2, 6), ("c", 1.0, 1, 7), ("e", 1.0, 1, 8)]
    found = compare(first, second)
    assert found.num_paired == 3
    assert (found.num_only_first, found.num_only_second) == (1, 1)
    assert found.difference == pytest.approx((-0.5 + 1.0 + 0.0) / 3)
    assert [flip.question_id for flip in found.gained] == ["b"]
    assert [(flip.question_id, flip.first_task, flip.second_task) for flip in found.lost] == [
        ("a", 1, 5)
    ]
    differences = np.array([-0.5, 1.0, 0.0])
    low, high = found.interval or (0.0, 0.0)
    reach = 4.3027 * differences.std(ddof=1) / np.sqrt(3)  # Student's t at 2 degrees of freedom
    assert (high - low) / 2 == pytest.approx(reach, rel=1e-3)
    assert compare([], second).interval is None
    assert compare(first[:1], second[:1]).interval is None


def test_question_scores_average_attempts_and_leave_failures_out() -> None:
    """A failed attempt counted as wrong would change a comparison without a word."""
    with _inspect.reading(run_mixed()) as db:
        rows = list(_inspect_run.question_scores(db, 1))
    assert [row[0] for row in rows] == [f"q{i:03}" for i in range(60)]
    by_question = {row[0]: row[1:3] for row in rows}
    assert by_question["q001"] == (2.0, 2)
    assert by_question["q007"] == (0.0, 0), "failed"
    assert by_question["q013"] == (2.0, 2), "tried again"


def test_search_that_takes_too_long_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search in a million tasks would hold the page for minutes."""
    path = run_mixed(n=2000)
    monkeypatch.setattr(_inspect_run, "SEARCH_SECONDS", 0.0)
    with _inspect.reading(path) as db:
        page = _inspect_run.find_tasks(db, 1, TaskFilter(text="nowhere"), 10, 0)
        assert page.is_cut_off
        assert not _inspect_run.find_tasks(db, 1, TaskFilter(), 10, 0).is_cut_off
