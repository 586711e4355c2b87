"""The live bar of a run. Knows counts, not how they come about."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

from tqdm import tqdm

from nanoeval._store import Progress
from nanoeval.library_config import get_library_config
from nanoeval.setup import say

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
    num_failed = 0

    def set_postfix(self, ordered_dict: Any = None, refresh: bool = True, **kwargs: Any) -> None:
        """Show what an eval's `update_progress` has to say, after the counts."""
        self.set_by_eval = {**dict(ordered_dict or {}), **kwargs}

    def show_counts(self, counts: dict[str, str]) -> None:
        super().set_postfix({**counts, **(self.set_by_eval or {})}, refresh=False)


class ProgressBar:
    """Shows done/total, rate, time left, running, retried, failed, and the score so far."""

    def __init__(self, bar: _Bar, mirror: _Mirror, is_terminal: bool) -> None:
        self.bar = bar
        self._mirror = mirror
        self._is_terminal = is_terminal
        self._shown_at = 0.0 if is_terminal else time.monotonic()

    def show(self, progress: Progress) -> None:
        """Take note of how far the run is; the screen follows a few times per second."""
        self._note(progress)
        now = time.monotonic()
        interval = SECONDS_PER_REFRESH if self._is_terminal else SECONDS_PER_LINE
        if now - self._shown_at < interval:
            return
        self._shown_at = now
        self._draw(progress)

    def finish(self, progress: Progress) -> None:
        """Show the last state, whenever the one before was shown."""
        self._note(progress)
        self._draw(progress)

    def _note(self, progress: Progress) -> None:
        self.bar.total = progress.num_tasks
        self.bar.n = progress.num_done
        self.bar.num_failed = progress.num_failed

    def _draw(self, progress: Progress) -> None:
        self.bar.show_counts(_counts(progress))
        with suppress(OSError):  # a full disk, or a terminal or reader that has gone
            if self._is_terminal:
                self.bar.refresh()
            elif sys.stderr is not None:
                print(str(self.bar), file=sys.stderr, flush=True)
        self._mirror.show(progress)


class _Mirror:
    """The bar of `LibraryConfig.get_slack_tqdm`: anybody's code, on which no run depends."""

    def __init__(self, username: str | None, name: str, num_tasks: int) -> None:
        self._bar: Any = None
        self._is_ours = False
        with self._telling():
            made = get_library_config().get_slack_tqdm(username) if username else None
            self._is_ours = callable(made)
            if made is not None and self._is_ours:
                is_tqdm = isinstance(made, type) and issubclass(made, tqdm)
                # The console has a bar already.
                options = {"file": _Nowhere()} if is_tqdm else {}
                made = made(total=num_tasks, desc=name, **options)
            self._bar = made

    def show(self, progress: Progress) -> None:
        with self._telling():
            if self._bar is not None:
                self._bar.total = progress.num_tasks
                self._bar.n = progress.num_done
                self._bar.refresh()

    def close(self) -> None:
        """Close the bar, unless the hook gave one that was made before."""
        with self._telling():
            if self._bar is not None and self._is_ours:
                self._bar.close()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Tell what the bar raises, and do without it from then on."""
        try:
            yield
        except Exception as error:
            self._bar = None
            problem = f"{type(error).__name__}: {error}"
            say(f"nanoeval: the bar of get_slack_tqdm failed ({problem}); the run does without it")


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
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    has_width = is_terminal and _has_width()
    bar = _Bar(
        total=num_tasks,
        desc=name,
        unit="",
        bar_format=BAR_FORMAT,
        # Some pseudo-terminals have no size, on which tqdm would draw nothing.
        ncols=100 if is_terminal and not has_width else None,
        dynamic_ncols=has_width,
        # On a terminal the engine decides when to draw; elsewhere it prints lines itself.
        file=sys.stderr if is_terminal else _Nowhere(),
        mininterval=3600,
    )
    with bar, closing(_Mirror(slack_name, name, num_tasks)) as mirror:
        yield ProgressBar(bar, mirror, is_terminal)


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
