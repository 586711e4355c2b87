"""The frame of the monitor: which pages there are, and the bar that leads from one to another."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from nanoeval.monitor import (
    markup,
    page_compare,
    page_run,
    page_run_sets,
    page_stuck,
    page_task,
    page_tasks,
)

# url path -> (title, in the bar, what shows it). The first is at the root.
PAGES: dict[str, tuple[str, bool, Callable[[], None]]] = {
    "run_sets": ("Run sets", True, page_run_sets.show),
    "run": ("Run", True, page_run.show),
    "stuck": ("In flight", True, page_stuck.show),
    "tasks": ("Tasks", True, page_tasks.show),
    "task": ("Task", False, page_task.show),
    "compare": ("Compare", True, page_compare.show),
}


def show_app(first: str = "run_sets") -> None:
    """Show the page that the address asks for, `first` at the root."""
    st.set_page_config(page_title="nanoeval", layout="wide", initial_sidebar_state="collapsed")
    st.html(markup.STYLE)
    pages = {
        path: st.Page(show, title=title, url_path=path, default=path == first)
        for path, (title, _, show) in PAGES.items()
    }
    current = st.navigation(list(pages.values()), position="hidden")
    with st.container(horizontal=True, gap="medium", key="bar"):
        for path, (title, is_in_bar, _) in PAGES.items():
            if is_in_bar:
                st.page_link(pages[path], label=title, query_params=_kept(path))
    current.run()


def _kept(path: str) -> dict[str, str]:
    """The chosen run stays chosen from page to page."""
    if path == "run_sets":
        return {}
    return {name: st.query_params[name] for name in ("run_set", "eval") if name in st.query_params}
