"""The live bar of a run. Knows counts, not how they come about."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from nanoeval._store import Progress
from nanoeval.library_config import get_library_config

# Without a terminal a bar would fill a log: one line this often instead.
SECONDS_PER_LINE = 30.0
SECONDS_PER_REFRESH = 0.1
BAR_FORMAT = (
    "{desc}: {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}"
    " [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
)


class _Bar(tqdm):  # type: ignore[misc]
    """A tqdm bar whose postfix an eval may set beside the engine's own counts."""

    set_by_eval: dict[str, Any] | None = None

    def set_postfix(self, ordered_dict: Any = None, refresh: bool = True, **kwargs: Any) -> None:
        """Show what an eval's `update_progress` has to say, after the counts."""
        self.set_by_eval = {**dict(ordered_dict or {}), **kwargs}

    def show_counts(self, counts: dict[str, str]) -> None:
        super().set_postfix({**counts, **(self.set_by_eval or {})}, refresh=False)


class ProgressBar:
    """Shows done/total, rate, time left, running, retried, failed, and the score so far."""

    def __init__(self, name: str, bar: _Bar, mirror: Any, is_terminal: bool) -> None:
        self.bar = bar
        self._name = name
        self._mirror = mirror
        self._is_terminal = is_terminal
        self._shown_at = 0.0 if is_terminal else time.monotonic()

    def show(self, progress: Progress) -> None:
        """Take note of how far the run is; the screen follows a few times per second."""
        self.bar.total = progress.num_tasks
        self.bar.n = progress.num_done
        now = time.monotonic()
        interval = SECONDS_PER_REFRESH if self._is_terminal else SECONDS_PER_LINE
        if now - self._shown_at < interval:
            return
        self._shown_at = now
        self._draw(progress)

    def finish(self, progress: Progress) -> None:
        """Show the last state, whenever the one before was shown."""
        self.bar.total = progress.num_tasks
        self.bar.n = progress.num_done
        self._draw(progress)

    def _draw(self, progress: Progress) -> None:
        self.bar.show_counts(_counts(progress))
        if self._is_terminal:
            self.bar.refresh()
        else:
            print(str(self.bar), file=sys.stderr, flush=True)
        if self._mirror is not None:
            self._mirror.total = self.bar.total
            self._mirror.n = self.bar.n
            self._mirror.refresh()


def _counts(progress: Progress) -> dict[str, str]:
    counts = {"running": str(progress.num_running)}
    if progress.num_retried:
        counts["retried"] = str(progress.num_retried)
    if progress.num_failed:
        counts["failed"] = str(progress.num_failed)
    if progress.num_with_score:
        counts["score"] = f"{progress.score_sum / progress.num_with_score:.3f}"
    return counts


@contextmanager
def progress_bar(name: str, num_tasks: int, slack_name: str | None) -> Iterator[ProgressBar]:
    """A bar on stderr for the block; on a terminal live, else a line every half minute."""
    is_terminal = sys.stderr.isatty()
    mirror = get_library_config().get_slack_tqdm(slack_name) if slack_name else None
    with _Bar(
        total=num_tasks,
        desc=name,
        unit="",
        bar_format=BAR_FORMAT,
        # Some pseudo-terminals have no size, on which tqdm would draw nothing.
        ncols=None if _has_width() else 100,
        dynamic_ncols=_has_width(),
        # On a terminal the engine decides when to draw; elsewhere it prints lines itself.
        file=sys.stderr if is_terminal else _Nowhere(),
        mininterval=3600,
    ) as bar:
        yield ProgressBar(name, bar, mirror, is_terminal)


def _has_width() -> bool:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # no terminal, or no file at all
        return False


class _Nowhere:
    """A file that keeps nothing."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        return
