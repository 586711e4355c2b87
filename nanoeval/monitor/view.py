"""What the pages share: the chosen run, cached reads, and errors told as sentences."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st

from nanoeval import _inspect, _inspect_run
from nanoeval._inspect import EvalRow, RunSetFile, RunSetRow, UnreadableRunSetError
from nanoeval._statistics import wilson_interval
from nanoeval.monitor import markup
from nanoeval.monitor.history import History
from nanoeval.monitor.markup import Content, Markup

# Live parts refresh this often.
REFRESH = 2.0
# A page that shows all run sets opens so many files at most.
MAX_RUN_SETS = 100


@dataclass(frozen=True, slots=True)
class Chosen:
    """The run that a page is about, as it stands now."""

    row: RunSetRow
    eval: EvalRow

    @property
    def path(self) -> Path:
        return self.row.file.path

    @property
    def query(self) -> dict[str, str | int]:
        """What a link to this run carries."""
        return {"run_set": self.row.run_set_id, "eval": self.eval.eval_id}

    @property
    def is_live(self) -> bool:
        return self.row.is_live and self.eval.state in ("queueing", "running")

    @property
    def state(self) -> str:
        """The eval's state as a person sees it: one that claims to run without a driver crashed."""
        if self.eval.state in ("queueing", "running") and not self.row.is_live:
            return "crashed"
        return self.eval.state


def show_html(content: Content) -> None:
    """Put HTML on the page."""
    st.html(f'<div class="ne">{markup.html(content)}</div>')


def say(sentence: Content) -> None:
    show_html(markup.element("p", sentence, "note"))


@contextmanager
def telling_errors() -> Iterator[None]:
    """Show what cannot be read as a sentence in place of the rest of the block."""
    try:
        yield
    except (UnreadableRunSetError, _inspect.UnknownRunSetError, OSError) as error:
        say(f"Nothing can be shown: {error}.")
    except sqlite3.Error as error:
        say(f"Nothing can be shown: the database cannot be read ({error}).")


def chosen_file() -> RunSetFile | None:
    """The run set that the address names, else the newest; None, and a sentence, without any."""
    run_set_id = st.query_params.get("run_set")
    if run_set_id:
        return _inspect.find_run_set(run_set_id)
    files = _inspect.run_set_files()
    if not files:
        say("There are no run sets on this machine yet. Start an eval, and it appears here.")
        return None
    return max(files, key=lambda file: file.changed_at)


def look(file: RunSetFile) -> Chosen | None:
    """The chosen eval of a run set; None, and a sentence, where there is nothing to choose."""
    row = _inspect.look_at(file)
    if row.problem is not None:
        say(f"Nothing can be shown: {row.problem}.")
        return None
    if not row.evals:
        say(f"Run set {row.run_set_id} is empty: no eval has been queued in it.")
        return None
    return Chosen(row, _chosen_eval(row))


def _chosen_eval(row: RunSetRow) -> EvalRow:
    wanted = st.query_params.get("eval")
    for candidate in row.evals:
        if str(candidate.eval_id) == wanted:
            return candidate
    running = [e for e in row.evals if e.state == "running"]
    return (running or row.evals)[-1]


def show_heading(chosen: Chosen, page: str) -> None:
    """Which run this is, and links to the others of its run set."""
    eval = chosen.eval
    title = markup.element("h2", markup.joined([eval.name, " ", markup.badge(chosen.state)]))
    facts: list[Content] = [eval.model_name, markup.code(chosen.row.run_set_id)]
    if eval.run_id:
        facts.append(f"run {eval.run_id}")
    facts.append(f"started {markup.clock(eval.started_at or eval.created_at)}")
    facts.append(f"on {chosen.row.host}")
    line = markup.element("div", markup.joined(facts, " · "), "dim")
    show_html(title + line + _siblings(chosen, page))


def _siblings(chosen: Chosen, page: str) -> Markup:
    if len(chosen.row.evals) == 1:
        return Markup("")
    links = [
        markup.element("b", e.name)
        if e.eval_id == chosen.eval.eval_id
        else markup.link(e.name, page, run_set=chosen.row.run_set_id, eval=e.eval_id)
        for e in chosen.row.evals
    ]
    return markup.element(
        "div", markup.joined(["Evals of this run set: ", markup.joined(links, ", ")])
    )


def score_text(eval: EvalRow) -> str:
    """The mean score so far: a share in percent, else a number."""
    mean = eval.score_mean
    return markup.percent(mean) if mean is None or 0 <= mean <= 1 else f"{mean:.4g}"


def score_interval(eval: EvalRow) -> list[float] | None:
    """Wilson's 95 % interval of the mean score, attempts taken as independent.

    None without scores, and for scores beyond 0 .. 1.
    """
    mean = eval.score_mean
    if mean is None or not 0 <= mean <= 1:
        return None
    return wilson_interval(mean, eval.num_with_score)


@st.cache_resource(max_entries=32, show_spinner=False)
def _history(path: str, eval_id: int, created_at: float) -> History:
    del path, created_at  # a database that was made anew has a history of its own
    return History(eval_id)


def history(db: sqlite3.Connection, chosen: Chosen) -> History:
    """How the run went so far."""
    found = _history(str(chosen.path), chosen.eval.eval_id, chosen.eval.created_at)
    found.update(db)
    return found


class RareReads:
    """Remembers what costly reads gave; while a run changes, they are not made at each refresh."""

    # Such a read takes at most this share of the time.
    SHARE = 0.05
    MAX_ENTRIES = 200

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Any, Any, float]] = {}

    def get(self, key: Any, version: Any, read: Callable[[], Any]) -> Any:
        """What `read` gives; an earlier answer serves for the same version, or for a while."""
        if key in self._known:
            known_version, value, good_until = self._known[key]
            if known_version == version or time.monotonic() < good_until:
                return value
        began = time.thread_time()
        value = read()
        good_until = time.monotonic() + (time.thread_time() - began) / self.SHARE
        if len(self._known) >= self.MAX_ENTRIES:
            self._known.clear()
        self._known[key] = (version, value, good_until)
        return value


@st.cache_resource(show_spinner=False)
def rare_reads() -> RareReads:
    """The one memory of costly reads, for all who look."""
    return RareReads()


def version(db: sqlite3.Connection, chosen: Chosen) -> tuple[int, int, int]:
    """Changes whenever a try of the run does."""
    last = _inspect_run.last_outcome(db)
    return last, chosen.eval.num_running, chosen.eval.num_tasks + chosen.eval.num_retried


def show_live(part: Callable[[], None]) -> None:
    """Show a part of a page, and show it anew every few seconds; the rest stays as it is."""

    @st.fragment(run_every=REFRESH)
    def fragment() -> None:
        with telling_errors():
            part()

    fragment()
