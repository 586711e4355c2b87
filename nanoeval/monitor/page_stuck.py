"""What is in flight, longest first: what a run hangs on, who has it, and what it did last."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import streamlit as st

from nanoeval import _inspect, _inspect_run
from nanoeval._inspect_run import InFlight
from nanoeval.monitor import events, markup, view
from nanoeval.monitor.markup import Content, Markup
from nanoeval.monitor.view import Chosen

MAX_SHOWN = 100
# From so many times the median on, a rollout stands out.
LONG = 10

COLUMNS = {
    "Task": "nowrap",
    "Age": "num",
    "× median": "num",
    "Owner": "nowrap",
    "Last recorded event": "wide",
}


def show() -> None:
    """The rollouts in flight of the run that the address names."""
    with view.telling_errors():
        file = view.chosen_file()
        if file is None:
            return

        def part() -> None:
            chosen = view.look(file)
            if chosen is not None:
                _show_in_flight(chosen)

        view.show_live(part)


def _show_in_flight(chosen: Chosen) -> None:
    view.show_heading(chosen, "stuck")
    with _inspect.reading(chosen.path) as db:
        rollouts = _inspect_run.rollouts_in_flight(db, chosen.eval.eval_id, MAX_SHOWN)
        queue = _inspect_run.queue(db, chosen.eval.eval_id)
        latency = view.history(db, chosen).latency()
    if not rollouts:
        view.say(_why_none(chosen, queue))
        return
    median = latency.p50 if latency is not None else None
    ages = [time.time() - rollout.started_at for rollout in rollouts]
    told = f"{chosen.eval.num_running:,} in flight"
    if median is not None:
        num_long = sum(age > LONG * median for age in ages)
        told += f"; half of the ended ones took less than {markup.duration(median)}"
        shown_all = len(rollouts) < MAX_SHOWN or num_long < MAX_SHOWN
        told += f"; {'' if shown_all else 'at least '}{num_long} are older than {LONG} times that"
    if not chosen.is_live:
        told += ". Their process is gone: they go back to the queue when the run set is resumed"
    view.say(f"{told}.")
    owners = {x.executor_id: f"{x.role} {x.pid} on {x.host}" for x in chosen.row.executors}
    last = _last_events(chosen, rollouts)
    lines = (
        [
            _task(chosen, rollout),
            markup.duration(age),
            _times_median(age, median),
            owners.get(rollout.executor_id, "its process is gone"),
            _event(last.get((rollout.question_id, rollout.group_id))),
        ]
        for rollout, age in zip(rollouts, ages, strict=True)
    )
    view.show_html(markup.table(COLUMNS, lines))
    if chosen.eval.num_running > len(rollouts):
        view.say(f"The {len(rollouts)} oldest are shown.")


def _why_none(chosen: Chosen, queue: _inspect_run.Queue) -> str:
    if not chosen.is_live:
        return f"Nothing is in flight: the run is {chosen.state}."
    if queue.num_backed_off and queue.num_backed_off == queue.num_queued:
        due = markup.duration((queue.first_due or 0) - time.time())
        return (
            f"Nothing is in flight: all {queue.num_queued:,} queued tasks wait for their next try"
            f" after a system error; the first is due in {due}."
        )
    if chosen.eval.state == "queueing":
        return "Nothing is in flight: the eval is still listing its tasks."
    return "Nothing is in flight at this moment."


def _task(chosen: Chosen, rollout: InFlight) -> Markup:
    name = f"{rollout.question_id}.{rollout.attempt_id}"
    task = markup.link(name, "task", **chosen.query, task=rollout.task_id)
    return task + (markup.dim(f" try {rollout.retry_idx + 1}") if rollout.retry_idx else "")


def _times_median(age: float, median: float | None) -> Content:
    if not median:
        return ""
    ratio = age / median
    if ratio < LONG:
        return f"{ratio:.1f}"
    return markup.element("span", f"{ratio:,.0f}", "badge bad")


def _event(event: dict[str, Any] | None) -> Markup:
    if event is None:
        return markup.dim("none found")
    kind = event.get("record_type", "event")
    shown = event.get("sampled") or event.get("data") or event.get("message") or ""
    text = shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)
    when = markup.dim(f"{kind}, {markup.ago(events.moment_of(event))}")
    return when + markup.element("div", markup.shortened(text, 160))


@st.cache_resource(max_entries=16, show_spinner=False)
def _follower(records: str) -> events.LastEvents:
    return events.LastEvents(Path(records))


def _last_events(chosen: Chosen, rollouts: list[InFlight]) -> dict[tuple[str, str], dict[str, Any]]:
    if chosen.eval.records is None:
        return {}
    wanted = {(rollout.question_id, rollout.group_id) for rollout in rollouts}
    try:
        return _follower(chosen.eval.records).look(wanted)
    except OSError as error:
        view.say(f"The recorded events cannot be read: {error}.")
        return {}
