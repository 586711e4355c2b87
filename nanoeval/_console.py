"""Log lines on stderr, beside a live progress bar."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog
from structlog.stdlib import ProcessorFormatter

ENV_LOG_ALL = "NANOEVAL_LOG_ALL"

CLEAR_LINE = "\r\x1b[K"

EventDict = MutableMapping[str, Any]


def setup_console_logging() -> None:
    """Route structlog through standard logging, and show the part meant for people on stderr."""
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            _add_rollout,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.processors.StackInfoRenderer(),
            ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, ConsoleHandler) or _is_plain_console(handler):
            root.removeHandler(handler)
    root.addHandler(ConsoleHandler())
    if root.level > logging.INFO or root.level == logging.NOTSET:
        root.setLevel(logging.INFO)


class ConsoleHandler(logging.Handler):
    """Writes to whatever `sys.stderr` is at that moment, above the progress bars."""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(is_for_people)
        self.setFormatter(
            ProcessorFormatter(
                foreign_pre_chain=[
                    _add_component,
                    structlog.contextvars.merge_contextvars,
                    _add_rollout,
                    structlog.stdlib.ExtraAdder(),
                ],
                processors=[
                    structlog.stdlib.add_log_level,
                    structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
                    _keep_what_people_read,
                    _render,
                ],
            )
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; a failure goes the way of all logging failures."""
        try:
            _write_above_bars(self.format(record) + "\n")
        except Exception:  # logging's own rule: a log line never breaks the program
            self.handleError(record)


def is_for_people(record: logging.LogRecord) -> bool:
    """Whether the console shows `record`: a warning, `_print=True`, or INFO where all is wanted."""
    if record.levelno >= logging.WARNING:
        return True
    if record.levelno >= logging.INFO and os.environ.get(ENV_LOG_ALL):
        return True
    fields = record.msg if isinstance(record.msg, dict) else record.__dict__
    return bool(fields.get("_print", False))


def _write_above_bars(text: str) -> None:
    if sys.stderr is None:  # where it was closed when the process started
        return
    tqdm_module = sys.modules.get("tqdm")
    bar_class = getattr(tqdm_module, "tqdm", None)
    if bar_class is None or not getattr(bar_class, "_instances", None):
        # The bar at the cursor may be another process's, the one that started this worker.
        sys.stderr.write(CLEAR_LINE + text if _is_terminal() else text)
        sys.stderr.flush()
        return
    # Clears the bars, writes, and draws them again, under tqdm's own lock.
    bar_class.write(text, file=sys.stderr, end="")


def _is_plain_console(handler: logging.Handler) -> bool:
    """Whether `logging.basicConfig` made it: kept beside ours, it would print each line twice."""
    return type(handler) is logging.StreamHandler and handler.stream in (sys.stdout, sys.stderr)


def _add_rollout(logger: Any, name: str, event: EventDict) -> EventDict:
    """Name the rollout that logs; looked up here, so that one that logs nothing pays nothing."""
    del logger, name
    from nanoeval._recorder_base import current_recorder

    recorder = current_recorder.get(None)
    if recorder is None or not (question := recorder.current_sample_id()):
        return event
    attempt, _, retry = (recorder.current_group_id() or "").partition(".")
    event.setdefault("run_id", recorder.run_spec.run_id)
    event.setdefault("question_id", question)
    event.setdefault("attempt_id", attempt)
    event.setdefault("retry_idx", retry)
    return event


def _add_component(logger: Any, name: str, event: EventDict) -> EventDict:
    """Name the standard logger, as ours are named by their field `component`."""
    del logger, name
    event["component"] = event["_record"].name
    # Left on the record by another handler's formatter; not what was logged beside the message.
    for name_of_formatter in ("message", "asctime"):
        event.pop(name_of_formatter, None)
    return event


def _keep_what_people_read(logger: Any, name: str, event: EventDict) -> EventDict:
    """Drop our own marks; a message made for people also needs no level and no module."""
    del logger, name
    component = event.pop("component", None)
    if event.pop("_print", False) and event.get("level") == "info":
        del event["level"]
    elif component:
        event["component"] = component
    return ProcessorFormatter.remove_processors_meta(None, "", event)


def _render(logger: Any, name: str, event: EventDict) -> str:
    is_colored = _is_terminal() and not os.environ.get("NO_COLOR")
    return _renderer(is_colored)(logger, name, event)


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@functools.cache
def _renderer(is_colored: bool) -> structlog.dev.ConsoleRenderer:
    return structlog.dev.ConsoleRenderer(
        colors=is_colored,
        pad_event_to=0,
        pad_level=False,
        sort_keys=False,
        exception_formatter=structlog.dev.plain_traceback,
    )
