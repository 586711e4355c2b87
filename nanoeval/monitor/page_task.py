"""One task: every try at it, the task and its results as fields, and what was recorded."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import streamlit as st

from nanoeval import _inspect, _inspect_run
from nanoeval._inspect_run import Try
from nanoeval.monitor import conversation, events, markup, view
from nanoeval.monitor.markup import Content, Markup
from nanoeval.monitor.view import Chosen


def show() -> None:
    """The task that the address names."""
    with view.telling_errors():
        file = view.chosen_file()
        if file is None:
            return

        def part() -> None:
            chosen = view.look(file)
            if chosen is not None:
                _show_task(chosen)

        view.show_live(part)


def _show_task(chosen: Chosen) -> None:
    wanted = st.query_params.get("task", "")
    with _inspect.reading(chosen.path) as db:
        # SQLite's integers have 18 digits and some.
        is_id = wanted.isdecimal() and len(wanted) <= 18
        found = _inspect_run.find_try(db, int(wanted)) if is_id else None
        if found is None or found.eval_id != chosen.eval.eval_id:
            view.show_heading(chosen, "tasks")
            all_tasks = markup.link("All tasks", "tasks", **chosen.query)
            view.say(markup.joined([f"This run has no task {wanted!r}. ", all_tasks]))
            return
        key = (chosen.path, chosen.eval.created_at, found.eval_id, found.question_id)
        siblings: list[Try] = view.rare_reads().get(
            ("tries", *key),
            view.version(db, chosen),
            lambda: _inspect_run.tries_of_question(db, found.eval_id, found.question_id),
        )
    tries = [t for t in siblings if t.attempt_id == found.attempt_id] or [found]
    _show_heading(chosen, found, tries)
    _show_fields("Task", found.task_preview)
    _show_attempts(chosen, found, siblings)
    for shown in reversed(tries):
        _show_try(chosen, shown, is_only=len(tries) == 1)


def _show_heading(chosen: Chosen, found: Try, tries: list[Try]) -> None:
    last = tries[-1]
    title = markup.joined([f"{found.question_id}.{found.attempt_id} ", markup.badge(last.state)])
    facts: list[Content] = [
        markup.link(chosen.eval.name, "run", **chosen.query),
        chosen.eval.model_name,
        f"attempt {found.attempt_id}",
        "1 try" if len(tries) == 1 else f"{len(tries)} tries",
    ]
    if last.score is not None:
        facts.append(f"score {last.score:g}")
    line = markup.element("div", markup.joined(facts, " · "), "dim")
    view.show_html(markup.element("h2", title) + line)


def _show_attempts(chosen: Chosen, found: Try, siblings: list[Try]) -> None:
    """Links to the other attempts at the question, with their scores."""
    last: dict[int, Try] = {t.attempt_id: t for t in siblings}
    if len(last) < 2:
        return
    links = []
    for attempt_id, sibling in sorted(last.items())[:50]:
        result = sibling.state if sibling.score is None else f"{sibling.score:g}"
        name = f"{attempt_id}: {result}"
        is_this = attempt_id == found.attempt_id
        links.append(
            markup.element("b", name)
            if is_this
            else markup.link(name, "task", **chosen.query, task=sibling.task_id)
        )
    view.say(markup.joined(["Attempts at this question: ", markup.joined(links, " · ")]))


def _show_try(chosen: Chosen, shown: Try, is_only: bool) -> None:
    heading = markup.element(
        "h3",
        markup.joined(
            ["Result" if is_only else f"Try {shown.retry_idx + 1}", " ", markup.badge(shown.state)]
        ),
    )
    view.show_html(heading + markup.dim(_times(shown)))
    _show_fields("Result", shown.result_preview)
    if shown.error_type is not None:
        first = markup.shortened(f"{shown.error_type}: {shown.error_message}", 300)
        view.show_html(markup.element("div", first, "text"))
        with st.expander("Traceback", key=f"traceback{shown.task_id}"):
            st.code(shown.traceback or "none was kept", language=None, wrap_lines=True)
    _show_events(chosen, shown)


def _times(shown: Try) -> str:
    facts = []
    if shown.started_at is not None:
        facts.append(f"began {markup.clock(shown.started_at)}")
    if shown.state == "running" and shown.started_at is not None:
        facts.append(f"has run for {markup.duration(time.time() - shown.started_at)}")
    elif shown.finished_at is not None and shown.started_at is not None:
        facts.append(f"took {markup.duration(shown.finished_at - shown.started_at)}")
    if shown.state == "queued":
        wait = shown.not_before - time.time()
        facts.append(f"due in {markup.duration(wait)}" if wait > 0 else "due")
    if shown.claims > 1:
        facts.append(f"claimed {shown.claims} times")
    if shown.losses:
        facts.append(f"its executor died {shown.losses} times")
    return " · ".join(facts)


def _show_fields(title: str, preview: str | None) -> None:
    if preview is None:
        return
    try:
        value = json.loads(preview)
    except ValueError:
        value = preview
    if not isinstance(value, dict):
        value = {title.lower(): value}
    view.show_html(markup.joined(_named(name, _field(part)) for name, part in value.items()))


def _named(name: str, content: Markup) -> Markup:
    return markup.element(
        "div",
        markup.element("div", name, "who dim") + markup.element("div", content),
        "turn",
    )


def _field(value: Any) -> Markup:
    if isinstance(value, str):
        return markup.element("div", value, "text")
    return markup.element("pre", json.dumps(value, ensure_ascii=False, indent=2))


def _show_events(chosen: Chosen, shown: Try) -> None:
    if chosen.eval.records is None or shown.started_at is None:
        return
    path = Path(chosen.eval.records)
    ended = None if shown.state == "running" else shown.finished_at
    try:
        found: events.Found = view.rare_reads().get(
            ("events", path, shown.task_id, shown.claims),
            (ended, path.stat().st_size if ended is None else 0),
            lambda: events.find_events(
                path, shown.question_id, shown.group_id, shown.started_at, ended
            ),
        )
    except OSError as error:
        view.say(f"The recorded events cannot be read: {error}.")
        return
    if not found.events:
        view.say(markup.joined(["No events of this try stand in ", markup.code(str(path)), "."]))
        return
    view.show_html(conversation.as_markup(found.events))
    if found.is_cut_off:
        view.say("There may be more events; the search was cut off.")
    lines = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in found.events)
    with st.container(horizontal=True, vertical_alignment="center"):
        st.download_button(
            "JSON lines of this try",
            lines,
            file_name=f"{shown.question_id}.{shown.group_id}.jsonl",
            mime="application/jsonl",
            on_click="ignore",
            key=f"lines{shown.task_id}",
        )
        view.say(markup.joined(["from ", markup.code(str(path))]))
