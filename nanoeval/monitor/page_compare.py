"""Two runs of the same eval: how much they differ, how sure that is, which questions flipped."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import streamlit as st

from nanoeval import _inspect, _inspect_run
from nanoeval.monitor import charts, comparison, markup, view
from nanoeval.monitor.comparison import Comparison, Flip
from nanoeval.monitor.markup import Content
from nanoeval.monitor.view import Chosen

# The page waits so long for a comparison; a longer one appears when it is done.
WAIT = 0.4
# A live run is compared anew after so many outcomes.
STEP = 500

FLIP_COLUMNS = {"Question": "nowrap", "First": "num", "Second": "num", "Look": "nowrap"}

Runs = dict[str, Chosen]


def show() -> None:
    """Compare the run that the address names with another of the same eval."""
    with view.telling_errors():
        file = view.chosen_file()
        first = view.look(file) if file is not None else None
        if first is None:
            return
        view.show_heading(first, "compare")
        others = _others(first)
        if not others:
            view.say(
                f"There is no other run of {first.eval.name} to compare with. Run it again, with"
                " another model for instance, and it appears here."
            )
            return
        second = others[_choose(others)]
        view.show_live(lambda: _show_comparison(first, second))


def _choose(others: Runs) -> str:
    """Which run to compare with, kept in the address."""
    keys = list(others)
    wanted = st.query_params.get("with")
    chosen = st.selectbox(
        "Compare with",
        keys,
        index=keys.index(wanted) if wanted in keys else 0,
        format_func=lambda key: _label(others[key]),
        key="compared",
        on_change=lambda: st.query_params.update({"with": st.session_state["compared"]}),
    )
    return chosen or keys[0]


def _others(first: Chosen) -> Runs:
    """The other runs of the same eval, newest first; keys go into the address."""
    files = sorted(_inspect.run_set_files(), key=lambda file: file.changed_at, reverse=True)
    found: Runs = {}
    for file in files[: view.MAX_RUN_SETS]:
        row = _inspect.look_at(file)
        for eval in reversed(row.evals):
            is_first = (row.run_set_id, eval.eval_id) == (
                first.row.run_set_id,
                first.eval.eval_id,
            )
            if eval.name == first.eval.name and not is_first:
                found[f"{row.run_set_id}:{eval.eval_id}"] = Chosen(row, eval)
    return found


def _label(run: Chosen) -> str:
    started = markup.clock(run.eval.started_at or run.eval.created_at)
    return f"{run.eval.model_name}, {started}, {run.row.run_set_id}"


def _show_comparison(first: Chosen, second: Chosen) -> None:
    figures: list[tuple[str, Content, Content]] = [
        ("first", view.score_text(first.eval), first.eval.model_name),
        ("second", view.score_text(second.eval), second.eval.model_name),
    ]
    found = _compared(first, second)
    if found is None:
        view.show_html(markup.tiles(figures))
        view.say("The questions are being compared; with very many of them this takes a while.")
        return
    if not found.num_paired:
        view.show_html(markup.tiles(figures))
        view.say("The two runs have no question in common that both have a score for.")
        return
    interval = found.interval
    reach = "one question only" if interval is None else _signed_range(*interval)
    figures += [
        ("second minus first", f"{100 * found.difference:+.2f}", f"points; 95 %: {reach}"),
        ("questions", f"{found.num_paired:,}", _unpaired(found)),
        ("turned right", f"{found.num_gained:,}", "wrong in the first run"),
        ("turned wrong", f"{found.num_lost:,}", "right in the first run"),
    ]
    view.show_html(markup.tiles(figures))
    if interval is not None:
        chart = charts.interval_chart(interval[0], found.difference, interval[1])
        st.vega_lite_chart(*chart, key="interval", alt="difference with its 95 % interval")
        view.say(_verdict(interval))
    _show_flips("Turned wrong", found.lost, found.num_lost, first, second)
    _show_flips("Turned right", found.gained, found.num_gained, first, second)


def _signed_range(low: float, high: float) -> str:
    return f"{100 * low:+.2f} … {100 * high:+.2f}"


def _unpaired(found: Comparison) -> str:
    if not found.num_only_first and not found.num_only_second:
        return "in both runs"
    return f"in both; {found.num_only_first:,} and {found.num_only_second:,} in one only"


def _verdict(interval: tuple[float, float]) -> str:
    low, high = interval
    if low <= 0 <= high:
        return "The interval holds zero: on these questions the two runs cannot be told apart."
    return f"The interval excludes zero: the {'second' if low > 0 else 'first'} run is better."


def _show_flips(title: str, flips: list[Flip], total: int, first: Chosen, second: Chosen) -> None:
    if not flips:
        return
    rows: Iterator[list[Content]] = (
        [
            flip.question_id,
            f"{flip.first_mean:.2g}",
            f"{flip.second_mean:.2g}",
            markup.joined(
                [
                    markup.link("first", "task", **first.query, task=flip.first_task),
                    " · ",
                    markup.link("second", "task", **second.query, task=flip.second_task),
                ]
            ),
        ]
        for flip in flips
    )
    view.show_html(markup.element("h3", f"{title}: {total:,}") + markup.table(FLIP_COLUMNS, rows))
    if total > len(flips):
        view.say(f"The first {len(flips)} are shown.")


class Comparisons:
    """Compares in a thread of its own, so that the page need not wait; remembers the results."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, "comparison")
        self._known: dict[object, Future[Comparison]] = {}

    def get(
        self, key: object, first: tuple[Path, int], second: tuple[Path, int]
    ) -> Comparison | None:
        """The comparison of two runs, (database, eval id) each; None while it goes on."""
        if key not in self._known:
            if len(self._known) > 32:
                self._known.clear()
            self._known[key] = self._worker.submit(_compare, *first, *second)
        try:
            return self._known[key].result(timeout=WAIT)
        except TimeoutError:
            return None


@st.cache_resource(show_spinner=False)
def _comparisons() -> Comparisons:
    return Comparisons()


def _compared(first: Chosen, second: Chosen) -> Comparison | None:
    with _inspect.reading(first.path) as db:
        steps = [_inspect_run.last_outcome(db)]
    with _inspect.reading(second.path) as db:
        steps.append(_inspect_run.last_outcome(db))
    is_live = first.is_live or second.is_live
    key = (
        *((run.path, run.eval.eval_id, run.eval.created_at) for run in (first, second)),
        *(step // STEP if is_live else step for step in steps),
    )
    return _comparisons().get(
        key, (first.path, first.eval.eval_id), (second.path, second.eval.eval_id)
    )


def _compare(first_path: Path, first_eval: int, second_path: Path, second_eval: int) -> Comparison:
    with _inspect.reading(first_path) as a, _inspect.reading(second_path) as b:
        return comparison.compare(
            _inspect_run.question_scores(a, first_eval),
            _inspect_run.question_scores(b, second_eval),
        )
