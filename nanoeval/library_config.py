"""The hooks by which an organization adapts nanoeval. Knows no run.

Subclass `LibraryConfig`, override what you need, and call `set_library_config` before the first
run.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from nanoeval.recorder_protocol import RecorderConfig, RecorderProtocol

if TYPE_CHECKING:
    import pandas as pd


class LibraryConfig:
    """What happens where nanoeval meets its surroundings. Shared by all runs of the process."""

    async def send_user_notification(self, message: str, extra: str | None = None) -> None:
        """Tell people that a run started or ended; `extra` holds details. Silent by default."""
        del message, extra

    def setup_logging(self) -> None:
        """Send structlog and standard logging to stderr; may be called again and again.

        Shown are warnings and above, calls with `_print=True`, and everything from INFO on where
        NANOEVAL_LOG_ALL is set. Lines do not tear a live tqdm bar.
        """
        from nanoeval._console import setup_console_logging

        setup_console_logging()

    def set_recorder_context(
        self, rec: RecorderProtocol, sample_id: str, group_id: str
    ) -> AbstractContextManager[None]:
        """A context manager around each rollout, inside which events of `rec` belong to it."""
        return rec.as_default_recorder(sample_id, group_id)

    def get_dummy_recorder(self, log: bool) -> RecorderConfig:
        """The recorder that keeps nothing; with `log`, samplings are logged at INFO."""
        from nanoeval._dummy_recorder import DummyRecorderConfig

        return DummyRecorderConfig(log=log)

    def get_default_recorder(self) -> RecorderConfig:
        """The recorder of runs that name none: JSON lines."""
        from nanoeval.json_recorder import json_recorder

        return json_recorder()

    def writable_root_dir(self) -> str:
        """Where backups of databases go: a private folder of this user that outlives a reboot.

        See `nanoeval.fs_paths.default_root_dir`; NANOEVAL_ROOT_DIR overrides it.
        """
        from nanoeval.fs_paths import default_root_dir

        return str(default_root_dir())

    def get_slack_tqdm(self, username: str | None) -> Any | None:
        """A tqdm class that also reports to `username`, or None for the console alone.

        It is made with `total` and `desc`, and closed at the end. A bar that is made already, or
        any function that makes one, will do as well; one that raises is told and left out.
        """
        del username
        return None

    def compute_default_metrics(
        self, samples_df: pd.DataFrame, answer_group_correctness_df: pd.DataFrame
    ) -> dict[str, Any]:
        """Metrics of graded answers; see `nanoeval.metrics.standard.compute_default_metrics`."""
        from nanoeval._statistics import default_metrics

        return default_metrics(samples_df, answer_group_correctness_df)


_library_config = LibraryConfig()


def get_library_config() -> LibraryConfig:
    """The hooks in force."""
    return _library_config


def set_library_config(hooks: LibraryConfig) -> None:
    """Put `hooks` in force for this process; worker processes of its runs use them too."""
    global _library_config  # noqa: PLW0603 - one of the two documented process-wide hooks
    if not isinstance(hooks, LibraryConfig):
        raise TypeError(
            f"set_library_config needs a LibraryConfig, not {hooks!r};"
            " pass an instance of a subclass, not the class"
        )
    _library_config = hooks
