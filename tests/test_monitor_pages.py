"""Every page of the monitor, in every state of a run, through Streamlit's own test runner."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nanoeval import EvalSpec, RunnerArgs, _inspect, run
from nanoeval.recorders import json_recorder
from tests.monitored_program import live_run
from tests.sample_evals import Sums

pytest.importorskip("streamlit", reason='pip install "nanoeval[monitor]"')
testing = pytest.importorskip("streamlit.testing.v1")

# Streamlit's and its server's own, about each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PAGES = ["run_sets", "run", "stuck", "tasks", "task", "compare"]


def app(first: str) -> None:
    from nanoeval.monitor.navigation import show_app

    show_app(first=first)


def show(page: str, /, **query: str | int) -> Any:
    """The page as a test object; whatever it raises fails the test."""
    test = testing.AppTest.from_function(app, args=(page,), default_timeout=30)
    for name, value in query.items():
        test.query_params[name] = str(value)
    test.run()
    assert not test.exception, test.exception
    return test


def text_of(test: Any) -> str:
    """All that the page says: its HTML and the labels of its folded parts."""
    parts = [element.proto.body for element in test.get("html")]
    parts += [expander.label for expander in test.expander]
    return "\n".join(part for part in parts if "<style>" not in part)


def run_sums(run_set_id: str, model: str = "a", **fields: Any) -> dict[str, Any]:
    runner = RunnerArgs(
        run_set_id=run_set_id,
        model_name=model,
        max_retries=1,
        retry_backoff=0.0,
        recorder=json_recorder(),
    )
    return asyncio.run(run(EvalSpec(eval=Sums(**fields), runner=runner)))


@pytest.fixture
def finished() -> str:
    run_sums("finished", n=30, attempts=2, flaky=10, n_breaks=1)
    return "finished"


@pytest.fixture
def crashed(finished: str, database_folder: Path) -> str:
    """As a killed process leaves it: running, one rollout claimed, its executor long dead."""
    del finished
    path = database_folder / "crashed.db"
    shutil.copy(database_folder / "finished.db", path)
    path.chmod(0o600)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE run_set SET id = 'crashed'")
        db.execute("UPDATE eval SET state = 'running', finished_at = NULL, num_scored = 50")
        db.execute("UPDATE executor SET ended_at = NULL, pid = 999999, process_started = '1'")
        db.execute("INSERT INTO claim VALUES (7, 1, 1, 1, ?)", (time.time() - 100,))
        db.execute("UPDATE task SET state = 1, outcome_seq = NULL WHERE id = 7")
        db.execute("UPDATE task SET state = 0, outcome_seq = NULL WHERE id = 9")
    return "crashed"


@pytest.fixture
def running() -> Iterator[str]:
    with live_run("running", num_done=20):
        yield "running"


@pytest.mark.parametrize("page", PAGES)
def test_pages_of_an_empty_folder_say_so(page: str, database_folder: Path) -> None:
    """Someone who starts the monitor first would meet a traceback."""
    database_folder.mkdir(mode=0o700)
    assert "no run sets on this machine" in text_of(show(page))


@pytest.mark.parametrize("page", PAGES)
def test_pages_of_a_damaged_run_set_say_so(page: str, finished: str, database_folder: Path) -> None:
    """One broken file would take all the others out of sight."""
    path = database_folder / "damaged.db"
    path.write_bytes(b"SQLite format 3\0" + os.urandom(20_000))
    path.chmod(0o600)
    text = text_of(show(page, run_set="damaged"))
    assert "damaged" in text
    assert "cannot be read" in text or "is damaged" in text
    if page == "run_sets":
        assert finished in text, "the others are still listed"


@pytest.mark.parametrize("page", PAGES)
def test_pages_of_a_run_set_without_evals_say_so(page: str, database_folder: Path) -> None:
    """A process that is killed while it lists its tasks leaves an empty run set."""
    run_sums("bare", n=2)
    with closing(sqlite3.connect(database_folder / "bare.db")) as db, db:
        db.execute("DELETE FROM eval")
    text = text_of(show(page, run_set="bare"))
    assert "empty" in text


@pytest.mark.parametrize("page", PAGES[1:])
def test_pages_of_an_unknown_run_set_name_the_nearest(page: str, finished: str) -> None:
    """A link with a typing error would lead nowhere."""
    assert "did you mean finished?" in text_of(show(page, run_set="finishd"))


def test_pages_of_someone_elses_database_refuse_it(finished: str, database_folder: Path) -> None:
    """A planted file could mislead, and on its way to resume run code."""
    path = database_folder / f"{finished}.db"
    path.chmod(0o666)
    for page in PAGES[1:]:
        text = text_of(show(page, run_set=finished))
        assert "may be written by other users" in text
        assert "q1" not in text


def test_run_sets_page_shows_states_progress_and_how_to_resume(crashed: str) -> None:
    """The list is where people learn that a run died overnight."""
    text = text_of(show("run_sets"))
    assert text.index(">crashed<") < text.index("python -m nanoeval.bin.resume run_set_id=crashed")
    assert ">finished<" in text
    assert "60 of 60" in text
    assert "50.0 %" in text, "every odd sum is wrong"
    assert f"run?run_set={crashed}&amp;eval=1" in text


def test_run_page_shows_figures_charts_errors_and_executors(finished: str) -> None:
    """Numbers that disagree with the summary would destroy trust in both."""
    test = show("run", run_set=finished)
    text = text_of(test)
    for part in ("60", "of 60 · 100.0 %", "50.0 %", "BrokenSystem", "Slow callbacks", ">ended<"):
        assert part in text or part == "BrokenSystem", part
    assert "RolloutSystemError" in text
    assert "error=RolloutSystemError" in text, "each error leads to its tasks"
    charts = test.get("vega_lite_chart") or test.get("arrow_vega_lite_chart")
    assert len(charts) == 4
    assert test.expander[0].label == "Summary"
    assert ".jsonl" in text


def test_run_page_of_a_live_run_says_how_to_attach(running: str) -> None:
    """A hanging process is found by its pid; guessing it on a shared machine kills another's."""
    text = text_of(show("run", run_set=running))
    row = _inspect.look_at(_inspect.find_run_set(running))
    pid = row.executors[0].pid
    assert ">running<" in text
    assert f"py-spy dump --pid {pid}" in text
    assert f"kill -USR1 {pid}" in text
    assert "time left" in text


def test_run_page_of_a_crashed_run_says_how_to_go_on(crashed: str) -> None:
    """The state column still says running."""
    text = text_of(show("run", run_set=crashed))
    assert ">crashed<" in text
    assert "ended without a word" in text
    assert "python -m nanoeval.bin.resume run_set_id=crashed" in text


def test_stuck_page_shows_age_owner_and_last_event(running: str) -> None:
    """What a run hangs on would have to be guessed."""
    time.sleep(0.5)
    test = show("stuck", run_set=running)
    text = text_of(test)
    assert "q3.1" in text
    assert "I think it is, 3." in text
    assert "driver" in text
    before = text
    time.sleep(1.2)
    test.run()
    assert text_of(test) != before, "ages move"


def test_stuck_page_of_runs_that_are_over_explains_itself(finished: str, crashed: str) -> None:
    """An empty table leaves open whether all is well."""
    assert "the run is finished" in text_of(show("stuck", run_set=finished))
    text = text_of(show("stuck", run_set=crashed))
    assert "go back to the queue when the run set is resumed" in text
    assert "its process is gone" in text or "driver 999999" in text


def test_tasks_page_filters_by_the_address_and_by_its_widgets(finished: str) -> None:
    """A link to a filtered list would show everything, or filters would be lost."""
    everything = show("tasks", run_set=finished)
    assert "1 – 50 of 66; more on the next page" in text_of(everything)
    retried = show("tasks", run_set=finished, state="retried")
    assert "1 – 6 of 6" in text_of(retried)
    assert retried.selectbox(key="state").value == "retried"
    wrong = show("tasks", run_set=finished, score="wrong")
    assert "1 – 30 of 30" in text_of(wrong)
    everything.selectbox(key="score").select("wrong").run()
    assert "1 – 30 of 30" in text_of(everything)
    everything.text_input(key="text").set_value("q11").run()
    assert "1 – 2" in text_of(everything)
    assert "q11.1" in text_of(everything)
    everything.text_input(key="text").set_value("nothing like it").run()
    assert "No task matches" in text_of(everything)
    second = show("tasks", run_set=finished, page=2)
    assert "51 – 66 of 66" in text_of(second)
    by_error = show("tasks", run_set=finished, error="RolloutSystemError")
    assert "Only tries that ended with RolloutSystemError" in text_of(by_error)
    assert "no page 9" in text_of(show("tasks", run_set=finished, page=9))


def test_task_page_shows_every_try_with_its_traceback_and_events(finished: str) -> None:
    """The page on which one finds out why an answer was counted as it was."""
    path = _inspect.find_run_set(finished).path
    with closing(sqlite3.connect(path)) as db:
        (task_id,) = db.execute("SELECT id FROM task WHERE retry_idx = 1").fetchone()
    test = show("task", run_set=finished, task=task_id)
    text = text_of(test)
    assert "Try 2" in text
    assert "Try 1" in text
    assert "RolloutSystemError" in text
    assert "Traceback (most recent call last)" in test.code[0].value
    assert "Attempts at this question" in text
    assert ".jsonl" in text
    assert text.index("Try 2") < text.index("Try 1"), "the last try first"


@pytest.mark.parametrize("task", ["", "999999", "x", "1; DROP TABLE task"])
def test_task_page_of_no_task_leads_back(task: str, finished: str) -> None:
    """A link from an older run set must not end in a traceback."""
    text = text_of(show("task", run_set=finished, task=task))
    assert "This run has no task" in text
    assert "All tasks" in text


def test_compare_page_shows_difference_and_flips(finished: str) -> None:
    """Which model is better, and on which questions, is what runs are made for."""
    alone = text_of(show("compare", run_set=finished))
    assert "no other run of sums" in alone
    run_sums("second", model="b", n=30, attempts=1)
    path = _inspect.find_run_set("second").path
    with closing(sqlite3.connect(path)) as db, db:
        for question, score in (("q1", 1.0), ("q3", 1.0), ("q4", 0.0)):
            db.execute(
                "UPDATE outcome SET score = ? WHERE task_id ="
                " (SELECT id FROM task WHERE question_id = ?)",
                (score, question),
            )
    test = show("compare", run_set=finished)
    text = text_of(test)
    assert "30" in text
    assert "Turned right: 2" in text
    assert "Turned wrong: 1" in text
    assert "+3.33" in text
    assert "cannot be told apart" in text
    assert "task?run_set=second&amp;eval=1&amp;task=5" in text


def test_nothing_from_a_run_is_taken_as_html(database_folder: Path) -> None:
    """A model's reply could run scripts in the reader's browser."""
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    run_sums("evil", name=evil, model=evil, n=3)
    path = database_folder / "evil.db"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE task SET question_id = ? WHERE id = 1", (evil,))
        db.execute("UPDATE task_payload SET preview = ?", (json.dumps({evil: evil}),))
        db.execute(
            "UPDATE outcome SET error_type = ?, error_message = ?, traceback = ?, state = 4",
            (evil, evil, evil),
        )
        db.execute("UPDATE executor SET host = ?, diagnosis = ?", (evil, evil))
    for page in PAGES:
        test = show(page, run_set="evil", task=1)
        text = text_of(test)
        assert "<script" not in text
        assert "<img" not in text


def test_events_are_shown_as_a_conversation() -> None:
    """A prompt that grows turn by turn would be shown again and again in full."""
    from nanoeval.monitor.conversation import as_markup

    system = {"role": "system", "content": "be brief"}
    user = {"role": "user", "content": [{"type": "text", "text": "<b>Hi"}, image("image/png")]}
    reply = {"role": "assistant", "content": "Hello"}
    more = {"role": "user", "content": [image("image/svg+xml"), remote()]}
    html = as_markup(
        [
            event("sampling", prompt=[system, user], sampled="Hello", usage={"tokens": 3}),
            event("sampling", prompt=[system, user, reply, more], sampled="Bye"),
            event("match", correct=False, expected="4", picked="5"),
            event("error", message="broken", traceback="Traceback …"),
            event("extra", data={"a": 1}),
            event("sample_completed", status="completed"),
        ]
    ).html
    assert html.count("be brief") == 1
    assert html.count("&lt;b&gt;Hi") == 1
    assert html.count("Hello") == 1
    assert html.count("<img ") == 1, "what could run code, or is elsewhere, is not loaded"
    assert "http://example.invalid/x.png" in html
    assert ">wrong<" in html
    assert "broken" in html
    assert as_markup([]).html == ""
    assert "odd" in as_markup([{"record_type": "odd"}, {}]).html


def event(kind: str, **fields: Any) -> dict[str, Any]:
    stamp = "2026-01-02T03:04:05.000006+00:00"
    return {"timestamp": stamp, "record_type": kind, "sample_id": "q", "group_id": "1.0", **fields}


def image(kind: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,iVBORw0KGgo="}}


def remote() -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "http://example.invalid/x.png"}}
