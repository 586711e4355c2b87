"""HTML for the monitor's pages: escaped text, tables, tiles, figures. Knows no database.

Everything that comes from a run is escaped; no page loads anything from elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from urllib.parse import urlencode

STYLE = """
<style>
.stMainBlockContainer { padding: 2.6rem 1.5rem 3rem; max-width: 1320px; }
.ne { font-size: 0.86rem; line-height: 1.4; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.ne a { color: inherit; text-decoration: underline; text-underline-offset: 0.2em;
  text-decoration-color: color-mix(in srgb, currentColor 35%, transparent); }
.ne a:hover { text-decoration-color: currentColor; }
.ne .dim { color: color-mix(in srgb, currentColor 64%, transparent); }
.ne code { background: color-mix(in srgb, currentColor 7%, transparent); color: inherit;
  font-size: 0.76rem; padding: 0.1em 0.4em; border-radius: 4px; user-select: all;
  overflow-wrap: anywhere; }
.ne .badge { display: inline-block; border-radius: 999px; padding: 0 0.6em; font-size: 0.76rem;
  white-space: nowrap; --tone: #7a8290;
  background: color-mix(in srgb, var(--tone) 20%, transparent);
  color: color-mix(in srgb, var(--tone) 62%, currentColor); }
.ne .good { --tone: #1a9e5f; } .ne .busy { --tone: #2f7de1; }
.ne .warn { --tone: #c98a0b; } .ne .bad { --tone: #d64545; }
.ne .tiles { display: grid; gap: 0.6rem 1.6rem; margin: 0.2rem 0 0.4rem;
  grid-template-columns: repeat(auto-fill, minmax(9.4rem, 1fr)); }
.ne .tile b { display: block; font-size: 1.32rem; font-weight: 600; line-height: 1.25; }
.ne .tile span { display: block; font-size: 0.76rem; }
.ne .bar { height: 5px; border-radius: 3px; overflow: hidden; display: flex; margin: 0.3rem 0;
  background: color-mix(in srgb, currentColor 12%, transparent); min-width: 5rem; }
.ne .bar i { background: #2f7de1; } .ne .bar i.done { background: #1a9e5f; }
.ne .bar i.failed { background: #d64545; }
.ne table { border-collapse: collapse; width: 100%; border: 0; margin: 0; }
.ne th { text-align: left; font-weight: 500; font-size: 0.74rem; padding: 0.2rem 0.9rem 0.2rem 0;
  border: 0; border-bottom: 1px solid color-mix(in srgb, currentColor 22%, transparent);
  color: color-mix(in srgb, currentColor 64%, transparent); white-space: nowrap; }
.ne td { padding: 0.32rem 0.9rem 0.32rem 0; vertical-align: top; border: 0;
  border-bottom: 1px solid color-mix(in srgb, currentColor 9%, transparent);
  overflow-wrap: anywhere; }
.ne .num { text-align: right; white-space: nowrap; }
.ne .nowrap { white-space: nowrap; max-width: 22rem; overflow: hidden;
  text-overflow: ellipsis; }
.ne td.nowrap, .ne td.num { width: 1%; }
.ne .wide { min-width: 14rem; }
.ne pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: 0; border: 0;
  background: none; font-size: 0.78rem; line-height: 1.45; color: inherit; }
.ne .text { white-space: pre-wrap; overflow-wrap: anywhere; }
.ne .turn { display: grid; grid-template-columns: 6.2rem minmax(0, 1fr); gap: 0.2rem 1rem;
  padding: 0.5rem 0;
  border-bottom: 1px solid color-mix(in srgb, currentColor 9%, transparent); }
.ne .turn .who { font-size: 0.76rem; }
.ne .turn.reply { background: color-mix(in srgb, #2f7de1 7%, transparent); }
.ne .turn img { max-width: min(100%, 28rem); border-radius: 6px; display: block; margin: 0.3rem 0; }
.ne h2 { font-size: 1.5rem; font-weight: 600; margin: 0; padding: 0; line-height: 1.25;
  overflow-wrap: anywhere; }
.ne h3 { font-size: 0.95rem; font-weight: 600; margin: 1.1rem 0 0.3rem; padding: 0; }
.ne p.note { margin: 0.3rem 0; max-width: 60rem; font-size: inherit; }
@media (max-width: 720px) {
  .stMainBlockContainer { padding: 2.6rem 0.9rem 2rem; }
  .ne .wide { min-width: 0; }
  .ne thead { display: none; }
  .ne tr { display: block; padding: 0.5rem 0;
    border-bottom: 1px solid color-mix(in srgb, currentColor 16%, transparent); }
  .ne td { display: grid; grid-template-columns: 6.2rem minmax(0, 1fr); gap: 0.6rem; border: 0;
    padding: 0.1rem 0; text-align: left; white-space: normal; }
  .ne td::before { content: attr(data-name); font-size: 0.76rem;
    color: color-mix(in srgb, currentColor 64%, transparent); }
  .ne td:empty { display: none; }
  .ne td.num { text-align: left; }
  .ne td.nowrap, .ne td.num { width: auto; }
  .ne td.num::before { text-align: left; }
  .st-key-bar { gap: 0 !important; }
  .st-key-bar a { padding-left: 0.3rem; padding-right: 0.3rem; }
  .ne .tiles { grid-template-columns: repeat(auto-fill, minmax(7.6rem, 1fr)); gap: 0.5rem 0.8rem; }
  .ne .turn { grid-template-columns: 1fr; }
}
</style>
"""

TONES = {
    "running": "busy",
    "queueing": "busy",
    "finished": "good",
    "scored": "good",
    "live": "good",
    "failed": "bad",
    "crashed": "bad",
    "dead": "bad",
    "unreadable": "bad",
    "interrupted": "warn",
    "retried": "warn",
    "silent": "warn",
}


@dataclass(frozen=True, slots=True)
class Markup:
    """Text that is HTML already."""

    html: str

    def __add__(self, other: Markup | str) -> Markup:
        return Markup(self.html + html(other))


Content = Markup | str | int | float | None


def html(value: Content) -> str:
    """`value` as HTML; all but Markup is escaped."""
    if isinstance(value, Markup):
        return value.html
    if value is None:
        return ""
    return escape(f"{value:,}" if isinstance(value, int) else str(value))


def element(name: str, value: Content, css: str = "", **attributes: str) -> Markup:
    """One element with escaped attributes."""
    if css:
        attributes = {"class": css, **attributes}
    told = "".join(f' {key}="{escape(text, quote=True)}"' for key, text in attributes.items())
    return Markup(f"<{name}{told}>{html(value)}</{name}>")


def joined(values: Iterable[Content], separator: Content = "") -> Markup:
    """The values one after the other."""
    return Markup(html(separator).join(html(value) for value in values))


def dim(value: Content) -> Markup:
    return element("span", value, "dim")


def code(value: str) -> Markup:
    """Something to copy: one click marks it all."""
    return element("code", value)


def badge(state: str, text: str = "") -> Markup:
    """A coloured word."""
    return element("span", text or state, f"badge {TONES.get(state, '')}".strip())


def link(text: Content, page: str, **query: str | int | None) -> Markup:
    """A link to another page of the monitor, which may be kept and sent."""
    return element("a", text, href=page_url(page, **query), target="_self")


def page_url(page: str, **query: str | int | None) -> str:
    given = {name: value for name, value in query.items() if value not in (None, "")}
    return f"{page}?{urlencode(given)}" if given else page


def table(columns: Mapping[str, str], rows: Iterable[Sequence[Content]]) -> Markup:
    """A table that turns into a list of cards on narrow screens.

    `columns` gives for each heading the CSS classes of its cells.
    """
    head = joined(element("th", name, css) for name, css in columns.items())
    body = []
    for row in rows:
        cells = zip(columns.items(), row, strict=True)
        body.append(element("tr", joined(_cell(name, css, value) for (name, css), value in cells)))
    return element("table", element("thead", element("tr", head)) + element("tbody", joined(body)))


def _cell(name: str, css: str, value: Content) -> Markup:
    # On narrow screens a cell is a grid of its name and its content, which must be one element.
    inner = element("div", value) if html(value) else None
    return element("td", inner, css, **{"data-name": name})


def tiles(figures: Iterable[tuple[str, Content, Content]]) -> Markup:
    """Large figures side by side: (name, figure, remark)."""
    shown = [
        element(
            "div",
            element("span", name, "dim") + element("b", figure) + element("span", remark, "dim"),
            "tile",
        )
        for name, figure, remark in figures
    ]
    return element("div", joined(shown), "tiles")


def bar(done: int, failed: int, total: int, is_over: bool) -> Markup:
    """A progress bar."""
    total = max(total, 1)
    parts = ((done - failed, "done" if is_over else ""), (failed, "failed"))
    shares = [
        element("i", "", css, style=f"width:{100 * count / total:.2f}%") for count, css in parts
    ]
    return element("div", joined(shares), "bar")


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def duration(seconds: float | None) -> str:  # noqa: PLR0911 - one line per magnitude
    """`380 ms`, `4.1 s`, `41 s`, `3 min 05 s`, `2 h 10 min`, `4 d 3 h`."""
    if seconds is None:
        return "–"
    if seconds < 1:
        return f"{1000 * max(seconds, 0):.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} d {hours % 24} h"


def ago(moment: float | None) -> str:
    if moment is None:
        return "–"
    seconds = time.time() - moment
    return "now" if seconds < 1 else f"{duration(seconds)} ago"


def clock(moment: float | None) -> str:
    """Local date and time, to the second."""
    if moment is None:
        return "–"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def shortened(text: str | None, limit: int = 120) -> str:
    """One line of at most `limit` characters."""
    line = " ".join((text or "").split())
    return line if len(line) <= limit else line[: limit - 2] + " …"
