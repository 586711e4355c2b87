"""The monitor in a real browser, over a run that goes on."""

from __future__ import annotations

import re
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.monitored_program import live_run
from tests.test_monitor_program import address, monitor

pytest.importorskip("streamlit", reason='pip install "nanoeval[monitor]"')
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(CHROMIUM is None, reason="apt-get install -y chromium"),
]


@pytest.fixture
def site() -> Iterator[str]:
    """The address of a monitor over a live run."""
    with live_run("live", num_done=20), monitor() as (_, said):
        yield address(said).rstrip("/")


@pytest.fixture
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as engine:
        started = engine.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any) -> Any:
    opened = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    opened.set_default_timeout(20_000)
    return opened


def number(page: Any, name: str) -> int:
    """The large figure of that name on the page of a run."""
    tile = page.locator(".tile", has=page.locator(f"span:text-is('{name}')")).first
    return int(tile.locator("b").inner_text().replace(",", ""))


def test_reader_gets_from_the_list_to_an_event_by_links(page: Any, site: str) -> None:
    """The way from "it hangs" to "this call hangs" must not need the command line."""
    asked: set[str] = set()
    page.on("request", lambda request: asked.add(request.url))
    page.goto(site)
    page.get_by_role("link", name="endless").first.click()
    page.get_by_text("time left").wait_for()
    page.wait_for_selector("svg.marks")
    page.get_by_role("link", name="In flight").click()
    page.get_by_text("older than 10 times that").wait_for()
    assert "run_set=live" in page.url
    first_row = page.locator("tbody tr").first
    assert "q3.1" in first_row.inner_text()
    assert "I think it is, 3." in first_row.inner_text()
    first_row.get_by_role("link").click()
    page.get_by_text("has run for").wait_for()
    conversation = page.locator(".turn")
    assert "Is 3 even?" in conversation.first.inner_text()
    assert page.locator(".turn img").count() == 1
    assert page.locator(".turn.reply").inner_text().endswith("I think it is, 3.")
    hosts = {re.sub(r"^\w+://([^/]+)/.*", r"\1", url) for url in asked if "://" in url}
    assert hosts == {site.removeprefix("http://")}, "nothing is loaded from elsewhere"


def test_numbers_move_while_filters_scroll_and_folds_stay(page: Any, site: str) -> None:
    """A page that jumps back to its top every two seconds cannot be read."""
    page.goto(f"{site}/run?run_set=live")
    page.get_by_text("time left").wait_for()
    before = number(page, "done")
    page.wait_for_timeout(4500)
    assert number(page, "done") > before

    page.goto(f"{site}/tasks?run_set=live")
    page.get_by_text("more on the next page").wait_for()
    _select(page, "State", "scored")
    page.wait_for_url(re.compile("state=scored"))
    page.get_by_label("Text").fill("Is 1")
    page.get_by_label("Text").press("Enter")
    page.wait_for_url(re.compile("text=Is"))
    page.wait_for_timeout(1500)
    container = page.locator("[data-testid=stMain]")
    container.evaluate("element => element.scrollTo(0, 300)")
    page.wait_for_timeout(4500)
    assert container.evaluate("element => element.scrollTop") == 300
    rows = page.locator("tbody tr").all_inner_texts()
    assert rows
    assert all("Is 1" in row and "scored" in row for row in rows)
    assert page.get_by_label("Text").input_value() == "Is 1"


@pytest.mark.parametrize("address", ["run?run_set=live", "compare?run_set=live"])
def test_charts_are_drawn(page: Any, site: str, address: str, database_folder: Path) -> None:
    """A chart without its data is an empty frame, which no test of the page's text would see."""
    other = database_folder / "other.db"
    other.touch(mode=0o600)
    with (
        closing(sqlite3.connect(database_folder / "live.db")) as source,
        closing(sqlite3.connect(other)) as target,
    ):
        source.backup(target)
        target.execute("UPDATE run_set SET id = 'other'")
        target.execute("UPDATE outcome SET score = 1 - score WHERE seq % 3 = 0")
        target.commit()
    page.goto(f"{site}/{address}")
    page.locator("svg.marks").first.wait_for()
    page.wait_for_timeout(2500)
    drawn = page.evaluate(_DRAWN)
    assert len(drawn) == (4 if address.startswith("run") else 1)
    assert all(length > 60 for length in drawn), drawn
    assert "NaN" not in page.locator("[data-testid=stMain]").inner_text()


# How much each chart has drawn: the length of the paths of its marks.
_DRAWN = """() => [...document.querySelectorAll('svg.marks')].map(chart =>
  [...chart.querySelectorAll(':is(.mark-area, .mark-line, .mark-rect, .mark-symbol) path')]
    .filter(path => path.getBoundingClientRect().width > 4)
    .reduce((sum, path) => sum + (path.getAttribute('d') || '').length, 0))"""


def test_permanent_link_shows_the_same_list_to_someone_else(browser: Any, site: str) -> None:
    """A link in a message is how people show each other what they found."""
    link = f"{site}/tasks?run_set=live&state=scored&score=wrong&order=duration&desc=true"
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.goto(link)
    page.locator("tbody tr").first.wait_for()
    assert page.url == link
    rows = page.locator("tbody tr").all_inner_texts()
    assert all("correct: False" in row for row in rows)
    seconds = [_seconds(page, index) for index in range(len(rows))]
    assert seconds == sorted(seconds, reverse=True)


def test_list_is_sorted_by_what_the_reader_picks(page: Any, site: str) -> None:
    """The slowest rollouts are what people look for first."""
    page.goto(f"{site}/tasks?run_set=live&state=scored")
    page.locator("tbody tr").first.wait_for()
    _select(page, "Order", "duration")
    page.wait_for_url(re.compile("order=duration"))
    page.get_by_text("last first").click()
    page.wait_for_url(re.compile("desc=true"))
    page.wait_for_timeout(3000)
    seconds = [_seconds(page, index) for index in range(10)]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_are_readable_at_both_widths_and_in_both_themes(
    browser: Any, site: str, width: int, scheme: str
) -> None:
    """On a phone at night is when people look whether their run is still alive."""
    context = browser.new_context(
        viewport={"width": width, "height": 1400}, color_scheme=scheme, device_scale_factor=1
    )
    page = context.new_page()
    page.set_default_timeout(20_000)
    task = _any_task(page, site)
    for name, path in {
        "run_sets": "",
        "run": "run?run_set=live",
        "stuck": "stuck?run_set=live",
        "tasks": "tasks?run_set=live",
        "task": task,
        "compare": "compare?run_set=live",
    }.items():
        page.goto(f"{site}/{path}")
        page.locator(".ne").first.wait_for()
        page.wait_for_timeout(1000)
        assert page.get_by_text("Traceback").count() == 0
        overflow = page.evaluate(_OVERFLOW)
        assert overflow == [], f"{name} is wider than the screen"
        assert page.evaluate(_CONTRAST) >= 4.5, f"{name} is hard to read"
    context.close()


# What reaches beyond the right edge.
_OVERFLOW = """() => [...document.querySelectorAll('.ne, .ne *')]
  .filter(e => e.getBoundingClientRect().right > window.innerWidth + 1)
  .map(e => e.outerHTML.slice(0, 120))"""

# The least contrast of dimmed text against the page, after WCAG 2.
_CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d');
  const rgb = (text, under) => {
    canvas.globalCompositeOperation = 'copy'; canvas.fillStyle = under || text;
    canvas.fillRect(0, 0, 1, 1);
    canvas.globalCompositeOperation = 'source-over'; canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = c => c.map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const back = getComputedStyle(document.querySelector('.stApp')).backgroundColor;
  const ratios = [...document.querySelectorAll('.ne .dim, .ne td, .ne th')].map(e => {
    const [a, b] = [light(rgb(getComputedStyle(e).color, back)), light(rgb(back))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
  return ratios.length ? Math.min(...ratios) : 21;
}"""


def _any_task(page: Any, site: str) -> str:
    page.goto(f"{site}/tasks?run_set=live&state=scored")
    link = page.locator("tbody tr a").first
    link.wait_for()
    return str(link.get_attribute("href"))


def _select(page: Any, label: str, option: str) -> None:
    page.get_by_label(label, exact=True).first.click()
    page.get_by_role("option", name=option, exact=True).click()


def _seconds(page: Any, row: int) -> float:
    """The duration in a row of the list of tasks."""
    text = page.locator("tbody tr").nth(row).locator("td[data-name=Duration]").inner_text()
    value, unit = text.split()[:2]
    return float(value) / 1000 if unit == "ms" else float(value)


def test_cold_page_shows_within_a_moment(page: Any, site: str) -> None:
    """People close what keeps them waiting."""
    page.goto(site)
    page.locator(".ne").first.wait_for()
    began = time.monotonic()
    page.goto(f"{site}/run?run_set=live")
    page.get_by_text("time left").wait_for()
    assert time.monotonic() - began < 5, "1.5 s on a machine that is not shared"
