"""The first page: all run sets, newest first."""

from __future__ import annotations

from collections.abc import Iterator

from nanoeval import _inspect
from nanoeval._inspect import EvalRow, RunSetRow
from nanoeval.monitor import markup, view
from nanoeval.monitor.markup import Content, Markup

COLUMNS = {
    "Eval": "wide",
    "Model": "",
    "State": "",
    "Progress": "wide",
    "Accuracy": "num",
    "Started": "nowrap",
    "Run set": "",
}


def show() -> None:
    """All run sets of this user on this machine."""
    view.show_live(_show_list)


def _show_list() -> None:
    files = sorted(_inspect.run_set_files(), key=lambda file: file.changed_at, reverse=True)
    if not files:
        view.say("There are no run sets on this machine yet. Start an eval, and it appears here.")
        return
    rows = [_inspect.look_at(file) for file in files[: view.MAX_RUN_SETS]]
    rows.sort(key=lambda row: row.created_at, reverse=True)
    view.show_html(markup.table(COLUMNS, (line for row in rows for line in _lines(row))))
    if len(files) > len(rows):
        view.say(f"The {len(rows)} that changed last are shown, of {len(files)}.")


def _lines(row: RunSetRow) -> Iterator[list[Content]]:
    if not row.evals:
        what = row.problem or "empty: no eval has been queued in it"
        name = markup.dim(markup.shortened(what, 200))
        yield [name, "", markup.badge(row.state), "", "", _started(row.created_at), _name(row)]
    for eval in reversed(row.evals):
        yield [
            markup.link(eval.name, "run", run_set=row.run_set_id, eval=eval.eval_id),
            eval.model_name,
            _state(row, eval),
            _progress(eval),
            _accuracy(eval),
            _started(eval.started_at or eval.created_at),
            _name(row),
        ]


def _name(row: RunSetRow) -> Markup:
    name = markup.code(row.run_set_id)
    if row.can_be_resumed:
        name += markup.element("div", markup.joined(["resume: ", markup.code(row.resume_command)]))
    return name


def _state(row: RunSetRow, eval: EvalRow) -> Markup:
    is_over = eval.state not in ("queueing", "running")
    return markup.badge(eval.state if is_over or row.is_live else "crashed")


def _started(moment: float) -> Markup:
    return markup.element("span", markup.ago(moment), title=markup.clock(moment))


def _progress(eval: EvalRow) -> Markup:
    """A bar and what it means."""
    if eval.state == "queueing":
        return markup.dim("listing its tasks")
    told = f"{eval.num_done:,} of {eval.num_tasks:,}"
    if eval.num_failed:
        told += f", {eval.num_failed:,} failed"
    is_over = eval.num_done >= eval.num_tasks
    return markup.bar(eval.num_done, eval.num_failed, eval.num_tasks, is_over) + told


def _accuracy(eval: EvalRow) -> Content:
    interval = view.score_interval(eval)
    if interval is None:
        return "" if eval.score_mean is None else view.score_text(eval)
    low, high = (100 * end for end in interval)
    return markup.joined([view.score_text(eval), " ", markup.dim(f"{low:.1f} – {high:.1f}")])
