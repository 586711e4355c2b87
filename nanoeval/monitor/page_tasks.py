"""All tries of a run: filtered and sorted by the database, a page at a time."""

from __future__ import annotations

import json
import time
from typing import cast

import streamlit as st

from nanoeval import _inspect, _inspect_run
from nanoeval._inspect_run import Sort, State, TaskFilter, TaskLine, TaskPage, Verdict
from nanoeval.monitor import markup, view
from nanoeval.monitor.markup import Content
from nanoeval.monitor.view import Chosen

PAGE_SIZE = 50

# The words stand in the address too.
STATES: tuple[State, ...] = ("any", "queued", "running", "scored", "failed", "retried")
VERDICTS: tuple[Verdict, ...] = ("any", "right", "partial", "wrong")
SORTS: tuple[Sort, ...] = ("position", "finished", "duration", "started", "score")
COLUMNS = {
    "Task": "nowrap",
    "State": "",
    "Score": "num",
    "Duration": "num",
    "Ended": "nowrap",
    "Question": "wide",
    "Result": "wide",
}


def show() -> None:
    """The tasks of the run that the address names, with the filters that it names."""
    with view.telling_errors():
        file = view.chosen_file()
        if file is None:
            return
        chosen = view.look(file)
        if chosen is None:
            return
        view.show_heading(chosen, "tasks")
        wanted, page = _ask(chosen)

        def part() -> None:
            now = view.look(file)
            if now is not None:
                _show_page(now, wanted, page)

        view.show_live(part)


def _ask(chosen: Chosen) -> tuple[TaskFilter, int]:
    """The filters as widgets that write themselves into the address."""
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        state = _choice("State", "state", STATES)
        verdict = _choice("Answer", "score", VERDICTS)
        sort = _choice("Order", "order", SORTS)
        text = st.text_input(
            "Text",
            key="text",
            bind="query-params",
            placeholder="in task, result or error",
            width=220,
        )
        descending = st.toggle("last first", key="desc", bind="query-params")
        page = st.number_input("Page", 1, key="page", bind="query-params", width=130)
    error, line = st.query_params.get("error"), st.query_params.get("line")
    if error:
        everything = markup.link("show all", "tasks", **chosen.query)
        with_line = f", {line}" if line else ""
        view.say(markup.joined([f"Only tries that ended with {error}{with_line} – ", everything]))
    wanted = TaskFilter(
        cast(State, state),
        cast(Verdict, verdict),
        error or None,
        line or None,
        text or "",
        cast(Sort, sort),
        bool(descending),
    )
    return wanted, int(page or 1)


def _choice(label: str, key: str, options: tuple[str, ...]) -> str:
    chosen = st.selectbox(label, options, key=key, bind="query-params", width=130)
    return str(chosen or options[0])


def _show_page(chosen: Chosen, wanted: TaskFilter, page: int) -> None:
    found = _read(chosen, wanted, page)
    total = found.num_matching
    if total is None and wanted == TaskFilter(wanted.state, is_descending=wanted.is_descending):
        total = _counted(chosen, wanted.state)
    if not found.lines:
        view.say("No task matches." if page == 1 else f"There is no page {page}.")
    else:
        first = (page - 1) * PAGE_SIZE + 1
        of = f" of {total:,}" if total is not None else ""
        view.say(f"{first:,} – {first + len(found.lines) - 1:,}{of}{_pages(found)}")
        view.show_html(markup.table(COLUMNS, (_line(chosen, line) for line in found.lines)))
    if found.is_cut_off:
        view.say(
            "The search was cut off, so there may be more. The beginning of a question's id is"
            " found fastest."
        )


def _pages(found: TaskPage) -> str:
    return "; more on the next page" if found.has_more else ""


def _counted(chosen: Chosen, state: State) -> int | None:
    """How many tries there are in a state, from the counters of the run."""
    eval = chosen.eval
    counts: dict[State, int] = {
        "any": eval.num_tasks + eval.num_retried,
        "scored": eval.num_scored,
        "failed": eval.num_failed,
        "retried": eval.num_retried,
        "running": eval.num_running,
    }
    return counts.get(state)


def _read(chosen: Chosen, wanted: TaskFilter, page: int) -> TaskPage:
    with _inspect.reading(chosen.path) as db:
        found: TaskPage = view.rare_reads().get(
            ("tasks", chosen.path, chosen.eval.eval_id, chosen.eval.created_at, wanted, page),
            view.version(db, chosen),
            lambda: _inspect_run.find_tasks(
                db, chosen.eval.eval_id, wanted, PAGE_SIZE, (page - 1) * PAGE_SIZE
            ),
        )
    return found


def _line(chosen: Chosen, line: TaskLine) -> list[Content]:
    name = f"{line.question_id}.{line.attempt_id}"
    task = markup.link(name, "task", **chosen.query, task=line.task_id)
    if line.retry_idx:
        task += markup.dim(f" try {line.retry_idx + 1}")
    seconds = line.seconds
    if line.state == "running" and line.started_at is not None:
        seconds = time.time() - line.started_at
    return [
        task,
        markup.badge(line.state),
        "" if line.score is None else f"{line.score:g}",
        "" if seconds is None else markup.duration(seconds),
        "" if line.seconds is None else markup.ago(line.finished_at),
        markup.shortened(readable(line.task_preview), 160),
        _result(line),
    ]


def _result(line: TaskLine) -> Content:
    if line.error_type is not None and line.state != "scored":
        return markup.joined([line.error_type, ": ", markup.shortened(line.error_message, 120)])
    if line.state == "queued" and line.not_before > time.time():
        return markup.dim(f"due in {markup.duration(line.not_before - time.time())}")
    return markup.shortened(readable(line.result_preview), 160)


def readable(preview: str | None) -> str:
    """A preview's fields on one line; one that was cut within its JSON stays as it is."""
    if preview is None:
        return ""
    try:
        value = json.loads(preview)
    except ValueError:
        return preview
    if not isinstance(value, dict):
        return str(value)
    return " · ".join(f"{name}: {part}" for name, part in value.items() if part is not None)
