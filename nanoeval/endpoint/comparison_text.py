"""A comparison for people: text for a terminal, a page, a plot. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nanoeval.endpoint.compare import first_divergence
from nanoeval.endpoint.config import EndpointError
from nanoeval.endpoint.report import aligned

SHOWN_FLIPS = 3
SNIPPET = 160


def verdict_line(task: Mapping[str, Any]) -> str:
    """The verdict of a task in one sentence."""
    low, high = task["interval"]
    figures = (
        f"{task['metric']} {task['first']:.4f} and {task['second']:.4f}, difference"
        f" {100 * task['difference']:+.2f} points (95 %: {100 * low:+.2f} to {100 * high:+.2f})"
    )
    margin = f"{100 * task['margin']:g} points"
    if task["verdict"] == "same":
        return f"SAME within {margin}: {figures}"
    if task["verdict"] == "different":
        return f"DIFFERENT: {figures}"
    more = f"{task['more_samples']:,} more samples needed"
    return f"CANNOT TELL at a margin of {margin}: {more}; {figures}"


def as_text(comparison: Mapping[str, Any]) -> str:
    """The whole comparison for a terminal, with the first few flips."""
    lines = []
    for name, task in comparison["tasks"].items():
        lines += [f"{name}: {verdict_line(task)}", *_details(task, comparison["names"]), ""]
    if comparison["left_out"]:
        lines.append(f"not in both, left out: {', '.join(comparison['left_out'])}")
    return _writable("\n".join(lines).rstrip())


def _writable(text: str) -> str:
    """`text` with half characters (lone surrogates), which no file takes, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _details(task: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    lines = [f"  {line}" for line in (*_outcome(task, names), _identity(task))]
    lines += ["  " + line for line in aligned(_side_rows(task, names)).splitlines()]
    titles = distinct_parts([flip["prompt"] for flip in task["flips"]])
    for flip, title in list(zip(task["flips"], titles, strict=True))[:SHOWN_FLIPS]:
        lines += _flip_lines(flip, title, names)
    if (left := len(task["flips"]) - SHOWN_FLIPS) > 0:
        lines.append(f"  and {left} more flips (all of them in the JSON and with --html)")
    return lines


def _outcome(task: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """What the verdict rests on."""
    lines = [
        f"p of no difference {task['p_different']:.3g}, p of a difference beyond the margin"
        f" {task['p_equivalent']:.3g}, {task['num_pairs']} pairs"
    ]
    if task["only_first"] is not None:
        lines.append(
            f"right in {names[0]} alone: {task['only_first']}, in {names[1]} alone:"
            f" {task['only_second']}"
        )
    if task["num_unanswered"]:
        whole = task["including_errors"]
        lines.append(
            f"{task['num_unanswered']} samples lack an answer and are left out; counted as wrong,"
            f" the difference is {100 * whole['difference']:+.2f} points: {whole['verdict']}"
        )
    return lines


def _identity(task: Mapping[str, Any]) -> str:
    text = f"{100 * task['identical_replies']:.1f} % of replies identical to the letter"
    if where := task["first_divergence"]:
        text += (
            f"; the others part after {where['median']:g} characters (median; earliest"
            f" {where['earliest']})"
        )
    return text


def _side_rows(task: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("", "model", "errors", "tokens in", "out", "tokens/s", "p50 s", "p90 s", "p99 s")
    ]
    for name, side in zip(names, task["sides"], strict=True):
        tokens, latency = side["tokens"] or {}, side["latency"] or {}
        figures = [
            side["num_errors"],
            tokens.get("prompt"),
            tokens.get("completion"),
            tokens.get("per_second"),
            *(latency.get(point) for point in ("p50", "p90", "p99")),
        ]
        rows.append((name, str(side["model"]), *map(_figure, figures)))
    return rows


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or value >= 100 else f"{value:.3g}"


def distinct_parts(prompts: Sequence[str]) -> list[str]:
    """The prompts without the instruction that all of them begin or end with, cut at words."""
    if len(prompts) < 2:
        return list(prompts)
    start = _shared_length(prompts)
    end = _shared_length([prompt[start:][::-1] for prompt in prompts])
    start = prompts[0].rfind(" ", 0, start + 1) + 1
    rests = [prompt[start:] for prompt in prompts]
    cut = rests[0][len(rests[0]) - end :].find(" ")
    kept = end - cut if cut >= 0 else 0
    return [rest[: len(rest) - kept].strip() or rest for rest in rests]


def _shared_length(texts: Sequence[str]) -> int:
    """How many characters all texts begin with; the least and the greatest of them tell."""
    position = first_divergence(min(texts), max(texts))
    return len(texts[0]) if position is None else position


def _flip_lines(flip: Mapping[str, Any], title: str, names: Sequence[str]) -> list[str]:
    lines = [f"  flip {flip['id']} (right: {flip['target']}): {_snippet(title)}"]
    for name, score, reply in zip(names, flip["scores"], flip["replies"], strict=True):
        lines.append(f"    {name} ({score:g}): ...{_snippet(reply or '', from_end=True)}")
    return lines


def _snippet(text: str, from_end: bool = False) -> str:
    flat = " ".join(text.split())
    return flat[-SNIPPET:] if from_end else flat[:SNIPPET]


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { border-bottom: 1px solid #ccc; padding: .3rem .7rem; text-align: left; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.same { color: #05603a; } .different { color: #a11; } .cannot { color: #7a5200; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .6rem; margin: 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
details { margin: .6rem 0; } mark { background: #ffe08a; }
"""


def as_html(comparison: Mapping[str, Any]) -> str:
    """One page without outside parts: verdicts, figures, every flip with both replies."""
    names = [escape(name) for name in comparison["names"]]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{names[0]} and {names[1]}</title><style>{STYLE}</style></head><body>",
        f"<h1>{names[0]} and {names[1]}: {escape(comparison['verdict'])}</h1>",
    ]
    for task_name, task in comparison["tasks"].items():
        css = task["verdict"].split()[0]
        parts.append(
            f"<h2>{escape(task_name)}</h2><p class='{css}'>{escape(verdict_line(task))}</p>"
        )
        parts.append(_interval_svg(task))
        facts = (*_outcome(task, comparison["names"]), _identity(task))
        parts.append(f"<p>{'. '.join(escape(fact) for fact in facts)}.</p>")
        parts.append(_html_table(_side_rows(task, comparison["names"])))
        parts.append(f"<h3>{len(task['flips'])} flips</h3>")
        titles = distinct_parts([flip["prompt"] for flip in task["flips"]])
        parts += [
            _html_flip(flip, title, names)
            for flip, title in zip(task["flips"], titles, strict=True)
        ]
    return _writable("\n".join([*parts, "</body></html>"]))


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["<table>"]
    for number, row in enumerate(rows):
        cell = "th" if number == 0 else "td"
        cells = "".join(
            f"<{cell}{' class=n' if column > 1 else ''}>{escape(text)}</{cell}>"
            for column, text in enumerate(row)
        )
        lines.append(f"<tr>{cells}</tr>")
    return "".join([*lines, "</table>"])


def _html_flip(flip: Mapping[str, Any], title: str, names: Sequence[str]) -> str:
    sides = "".join(
        f"<div><b>{name}: {score:g}</b><pre>{_marked(reply or '', flip['diverge_at'])}</pre></div>"
        for name, score, reply in zip(names, flip["scores"], flip["replies"], strict=True)
    )
    heading = escape(f"{flip['id']}: {_snippet(title)}")
    return (
        f"<details><summary>{heading}</summary><pre>{escape(flip['prompt'])}</pre>"
        f"<p>Right: {escape(str(flip['target']))}</p><div class=pair>{sides}</div></details>"
    )


def _marked(text: str, start: int | None) -> str:
    if start is None:
        return escape(text)
    return f"{escape(text[:start])}<mark>{escape(text[start:])}</mark>"


def _interval_svg(task: Mapping[str, Any]) -> str:
    """The difference and its interval over the band of the margin."""
    margin, (low, high) = task["margin"], task["interval"]
    reach = 1.15 * max(margin, abs(low), abs(high))

    def x(value: float) -> float:
        return 300.0 + 280.0 * value / float(reach)

    return (
        "<svg width='600' height='60' role='img' aria-label='difference and 95 % interval'>"
        f"<rect x='{x(-margin):.1f}' y='5' width='{x(margin) - x(-margin):.1f}' height='35'"
        " fill='#dff0e4'/><line x1='300' x2='300' y1='5' y2='40' stroke='#999'/>"
        f"<line x1='{x(low):.1f}' x2='{x(high):.1f}' y1='22' y2='22' stroke='#234'"
        " stroke-width='3'/>"
        f"<circle cx='{x(task['difference']):.1f}' cy='22' r='6' fill='#234'/>"
        f"<text x='{x(-margin):.1f}' y='56' font-size='12' text-anchor='middle'>"
        f"{-100 * margin:g}</text><text x='{x(margin):.1f}' y='56' font-size='12'"
        f" text-anchor='middle'>+{100 * margin:g} points</text></svg>"
    )


def write_plot(comparison: Mapping[str, Any], path: Path) -> None:
    """Each task's difference with its interval, over the band of the margin, as an image file."""
    from matplotlib.figure import Figure

    tasks, margin = comparison["tasks"], 100 * comparison["margin"]
    figure = Figure(figsize=(8, 1.6 + 0.7 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(-margin, margin, color="#dff0e4", label=f"margin, {margin:g} points")
    axes.axvline(0, color="#999999", linewidth=1)
    for row, task in enumerate(tasks.values()):
        value = 100 * task["difference"]
        low, high = (100 * end for end in task["interval"])
        axes.errorbar(
            value, row, xerr=[[value - low], [high - value]], fmt="o", capsize=5, color="#223344"
        )
    axes.set_yticks(
        range(len(tasks)),
        [_writable(f"{name}\n{task['verdict']}") for name, task in tasks.items()],
    )
    axes.set_ylim(-0.6, len(tasks) - 0.4)
    axes.invert_yaxis()
    first, second = map(_writable, comparison["names"])
    axes.set_xlabel(f"points, {second} minus {first}, with 95 % interval")
    axes.legend(loc="best", fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise EndpointError(f"cannot write the plot {path}: {error}") from error
