"""One run: how far it is, how well it does, how fast, what goes wrong, and who works on it."""

from __future__ import annotations

import time

import streamlit as st

from nanoeval import _inspect, _inspect_run
from nanoeval._diagnostics import Stall
from nanoeval._inspect import ExecutorRow
from nanoeval._inspect_run import ErrorGroup
from nanoeval.monitor import charts, markup, view
from nanoeval.monitor.history import History
from nanoeval.monitor.markup import Content, Markup
from nanoeval.monitor.view import Chosen

MAX_ERRORS_SHOWN = 30
MAX_EXECUTORS_SHOWN = 64

ERROR_COLUMNS = {
    "Error": "nowrap",
    "First line": "wide",
    "Tries": "num",
    "Tried again": "num",
    "Failed": "num",
}
EXECUTOR_COLUMNS = {
    "Executor": "nowrap",
    "Host": "",
    "State": "",
    "Last heartbeat": "nowrap",
    "In flight": "num",
    "Stalls": "num",
    "Slow callbacks": "num",
    "To attach": "wide",
}


def show() -> None:
    """The run that the address names."""
    with view.telling_errors():
        file = view.chosen_file()
        if file is None:
            return

        def part() -> None:
            chosen = view.look(file)
            if chosen is not None:
                _show_run(chosen)

        view.show_live(part)


def _show_run(chosen: Chosen) -> None:
    view.show_heading(chosen, "run")
    with _inspect.reading(chosen.path) as db:
        history = view.history(db, chosen)
        starts = _inspect_run.starts_in_flight(db, chosen.eval.eval_id)
        errors = view.rare_reads().get(
            ("errors", chosen.path, chosen.eval.eval_id, chosen.eval.created_at),
            (chosen.eval.num_failed, chosen.eval.num_retried, chosen.eval.state),
            lambda: _inspect_run.error_groups(db, chosen.eval.eval_id),
        )
        executors = _inspect.read_executors(db, ended_too=True)
        queue = _inspect_run.queue(db, chosen.eval.eval_id)
        summary = _inspect_run.summary_json(db, chosen.eval.eval_id)
    _show_figures(chosen, history, queue)
    _show_how_it_ended(chosen)
    _show_charts(chosen, history, starts)
    _show_errors(chosen, errors)
    _show_executors(executors)
    _show_summary(chosen, summary)


def _show_figures(chosen: Chosen, history: History, queue: _inspect_run.Queue) -> None:
    eval = chosen.eval
    rate = history.recent_rate(time.time()) if chosen.is_live else None
    left = (eval.num_tasks - eval.num_done) / rate if rate else None
    ended_at = None if chosen.is_live else eval.finished_at or chosen.row.changed_at
    began_at = eval.started_at or eval.created_at
    took = (ended_at or time.time()) - began_at
    waiting = f"{queue.num_backed_off:,} of them in back-off" if queue.num_backed_off else ""
    limit = "no limit" if eval.concurrency is None else f"limit {eval.concurrency:,}"
    speed = rate if chosen.is_live else eval.num_done / max(took, 0.001)
    share = markup.percent(eval.num_done / eval.num_tasks if eval.num_tasks else 0)
    figures: list[tuple[str, Content, Content]] = [
        ("done", f"{eval.num_done:,}", f"of {eval.num_tasks:,} · {share}"),
        ("accuracy", view.score_text(eval), _interval(chosen)),
        ("failed", f"{eval.num_failed:,}", f"{eval.num_retried:,} tries were made again"),
        ("in flight", f"{eval.num_running:,}", limit),
        ("queued", f"{queue.num_queued:,}", waiting),
        ("per second", _rate(speed or 0), "in the last minute" if chosen.is_live else "overall"),
    ]
    if chosen.is_live:
        figures.append(("time left", markup.duration(left), f"{markup.duration(took)} so far"))
    else:
        figures.append(("took", markup.duration(took), f"ended {markup.ago(ended_at)}"))
    bar = markup.bar(
        eval.num_done, eval.num_failed, eval.num_tasks, eval.num_done >= eval.num_tasks
    )
    view.show_html(bar + markup.tiles(figures))


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def _interval(chosen: Chosen) -> str:
    interval = view.score_interval(chosen.eval)
    if interval is None:
        return "no scores yet" if chosen.eval.score_mean is None else ""
    return f"95 %: {100 * interval[0]:.1f} – {100 * interval[1]:.1f}"


def _show_how_it_ended(chosen: Chosen) -> None:
    if chosen.row.can_be_resumed and not chosen.is_live:
        told = {
            "crashed": "Its process ended without a word. Finished results are kept. Go on with",
            "failed": "It was ended by an error. Finished results are kept. Go on with",
            "interrupted": "It was interrupted. Finished results are kept. Go on with",
        }.get(chosen.state)
        if told:
            view.say(markup.joined([told, " ", markup.code(chosen.row.resume_command)]))
    if chosen.eval.error and chosen.state == "failed":
        # Not as the label, which is Markdown and may load what it names.
        view.say(markup.shortened(_inspect_run.error_line(chosen.eval.error), 100))
        with st.expander("The error"):
            st.code(chosen.eval.error, language=None, wrap_lines=True)


def _show_charts(chosen: Chosen, history: History, starts: list[float]) -> None:
    curve, latency = history.accuracy(), history.latency()
    flow = history.flow(starts, time.time() if chosen.is_live else None)
    if flow is None or latency is None:
        view.say("Nothing has ended yet; charts appear with the first result.")
        return
    sampled = f" (one of each {history.step} rollouts)" if history.step > 1 else ""
    percentiles = " · ".join(
        f"p{p} {markup.duration(value)}"
        for p, value in ((50, latency.p50), (90, latency.p90), (99, latency.p99))
    )
    accuracy = charts.accuracy_chart(curve) if curve is not None else None
    drawn: list[tuple[str, charts.Drawing | None]] = [
        ("Accuracy, with its 95 % band" + sampled, accuracy),
        (f"Duration of a rollout, s: {percentiles}", charts.latency_chart(latency)),
        ("Rollouts ended per second" + sampled, charts.throughput_chart(flow)),
        ("Rollouts in flight" + sampled, charts.in_flight_chart(flow)),
    ]
    left, right = st.columns(2, gap="medium")
    for number, (title, chart) in enumerate(drawn):
        with (left, right)[number % 2]:
            view.show_html(markup.element("h3", title))
            if chart is None:
                view.say("None of the results has a score.")
            else:
                st.vega_lite_chart(*chart, key=f"chart{number}", alt=title)


def _show_errors(chosen: Chosen, errors: list[ErrorGroup]) -> None:
    if not errors:
        return
    view.show_html(
        markup.element("h3", "Errors")
        + markup.table(ERROR_COLUMNS, (_error_line(chosen, e) for e in errors[:MAX_ERRORS_SHOWN]))
    )
    if len(errors) > MAX_ERRORS_SHOWN:
        view.say(f"… and {len(errors) - MAX_ERRORS_SHOWN} other errors, rarer than these.")


def _error_line(chosen: Chosen, error: ErrorGroup) -> list[Content]:
    tasks = markup.link(
        error.error_type,
        "tasks",
        **chosen.query,
        error=error.error_type,
        line=error.line,
    )
    failed: Content = error.num_failed + error.num_fatal
    return [tasks, error.line, error.num_tries, error.num_retried, failed]


def _show_executors(executors: tuple[ExecutorRow, ...]) -> None:
    now = sorted(executors, key=lambda x: (x.ended_at is not None, -x.executor_id))
    shown = now[:MAX_EXECUTORS_SHOWN]
    view.show_html(
        markup.element("h3", "Executors")
        + markup.table(EXECUTOR_COLUMNS, (_executor_line(x) for x in shown))
    )
    if len(now) > len(shown):
        view.say(f"… and {len(now) - len(shown)} that ended earlier.")
    _show_stalls(executors)


def _executor_line(executor: ExecutorRow) -> list[Content]:
    standing = executor.standing
    state = markup.badge(standing)
    if standing == "ended" and executor.end_reason not in (None, "ended"):
        state += f" {executor.end_reason}"
    return [
        f"{executor.role} {executor.pid}",
        executor.host,
        state,
        markup.ago(executor.heartbeat_at),
        executor.num_running,
        _stalls(executor),
        executor.num_slow_callbacks,
        _commands(executor) if standing in ("live", "silent") else "",
    ]


def _stalls(executor: ExecutorRow) -> Content:
    stall = Stall.from_json(executor.diagnosis) if executor.diagnosis else None
    if stall is None:
        return executor.num_stalls
    lasts = "blocked now" if not stall.is_over else f"the last for {stall.seconds:.1f} s"
    told = f"{lasts}, by {stall.place}" + (f", rollout {stall.rollout}" if stall.rollout else "")
    return markup.element("span", f"{executor.num_stalls} – {lasts}", title=told)


def _commands(executor: ExecutorRow) -> Markup:
    commands = [f"py-spy dump --pid {executor.pid}", f"kill -USR1 {executor.pid}"]
    if executor.aiomonitor_port:
        commands.append(f"python -m aiomonitor.cli -p {executor.aiomonitor_port}")
    where = "" if executor.is_on_this_host else f"on {executor.host}: "
    return markup.joined([where, markup.joined(map(markup.code, commands), " ")])


def _show_stalls(executors: tuple[ExecutorRow, ...]) -> None:
    for executor in executors:
        stall = Stall.from_json(executor.diagnosis) if executor.diagnosis else None
        if stall is None or executor.standing == "ended":
            continue
        lasted = "has been blocked" if not stall.is_over else "was last blocked"
        told: list[Content] = [
            f"The event loop of {executor.role} {executor.pid} {lasted} for {stall.seconds:.1f} s"
            f" ({markup.ago(stall.since)}) by ",
            markup.code(stall.place),
            f", rollout {stall.rollout}" if stall.rollout else "",
        ]
        if stall.report:
            told += ["; stacks: ", markup.code(stall.report)]
        view.say(markup.joined(told))


def _show_summary(chosen: Chosen, text: str | None) -> None:
    if text is None:
        return
    with st.expander("Summary" if chosen.state == "finished" else "Summary of the results so far"):
        st.json(text)
    if chosen.eval.records:
        view.say(markup.joined(["Recorded events: ", markup.code(chosen.eval.records)]))
