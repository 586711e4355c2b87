"""What a person sees on the console."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PRELUDE = """
import logging, sys, structlog
from nanoeval.library_config import get_library_config
get_library_config().setup_logging()
get_library_config().setup_logging()  # twice is once
log = structlog.stdlib.get_logger(component="mine")
plain = logging.getLogger("theirs")
"""


def run(script: str, **env: str) -> tuple[str, str]:
    """What a program prints to stdout and to stderr, after it has set up logging."""
    clean = {k: v for k, v in os.environ.items() if k != "NANOEVAL_LOG_ALL"}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
        env=clean | env,
    )
    return done.stdout, done.stderr


ALL_LEVELS = """
for logger in (log, plain):
    logger.debug("a debug")
    logger.info("an info")
    logger.warning("a warning %s", "with argument")
    logger.error("an error")
log.info("for people", _print=True, n=3)
plain.info("for people too", extra={"_print": True, "n": 4})
"""


def test_the_console_shows_warnings_and_what_is_meant_for_people() -> None:
    """A run would drown in its log lines, or print its errors twice or among its results."""
    out, err = run(ALL_LEVELS)
    assert out == ""
    assert [line.split(" ", 1)[1] for line in err.splitlines()] == [
        "[warning] a warning with argument component=mine",
        "[error] an error component=mine",
        "[warning] a warning with argument component=theirs",
        "[error] an error component=theirs",
        "for people n=3",
        "for people too n=4",
    ]


def test_log_all_shows_everything_from_info_on() -> None:
    """Somebody who looks for the cause of a problem would not see what happened before it."""
    _, err = run(ALL_LEVELS, NANOEVAL_LOG_ALL="1")
    assert err.count("an info") == 2
    assert "a debug" not in err


def test_tracebacks_are_shown() -> None:
    """An error would be told without its place."""
    _, err = run("""
try:
    1 / 0
except ZeroDivisionError:
    log.exception("mine failed")
    plain.exception("theirs failed")
""")
    assert err.count("ZeroDivisionError: division by zero") == 2


def test_a_line_names_its_rollout() -> None:
    """Among thousands of rollouts nobody could tell which one warned."""
    _, err = run("""
import asyncio
from nanoeval._dummy_recorder import DummyRecorder
from nanoeval.recorder import set_default_recorder
from nanoeval.recorder_protocol import BasicRunSpec
recorder = DummyRecorder(BasicRunSpec(run_id="run-1", run_set_id="set-1"))
with set_default_recorder(recorder, "q7", "2.1"):
    log.warning("mine")
    asyncio.run(asyncio.to_thread(plain.warning, "theirs"))
structlog.contextvars.bind_contextvars(host="node-3")
log.warning("outside")
""")
    mine, theirs, outside = err.splitlines()
    for line in (mine, theirs):
        for field in ("run_id=run-1", "question_id=q7", "attempt_id=2", "retry_idx=1"):
            assert field in line
    assert "question_id" not in outside
    assert "host=node-3" in outside


def test_log_lines_do_not_tear_a_progress_bar() -> None:
    """A warning would be printed into the bar, and half of each be lost."""
    _, err = run("""
from tqdm import tqdm
for index in tqdm(range(20), file=sys.stderr, mininterval=0):
    log.warning("number", index=index)
""")
    pieces = [piece.strip() for piece in err.replace("\r", "\n").split("\n")]
    warnings = [piece for piece in pieces if "warning" in piece]
    assert len(warnings) == 20
    for index, line in enumerate(warnings):
        assert line.endswith(f"[warning] number index={index} component=mine")
    assert any(piece.startswith("100%") for piece in pieces)


def test_a_terminal_gets_colours_unless_it_says_no() -> None:
    """Log files would be full of escape codes."""
    _, err = run(ALL_LEVELS)
    assert "\x1b" not in err
    fake_terminal = "sys.stderr.isatty = lambda: True\n" + ALL_LEVELS
    assert "\x1b[1m" in run(fake_terminal, TERM="xterm")[1]
    assert "\x1b[1m" not in run(fake_terminal, TERM="xterm", NO_COLOR="1")[1]
    assert "\x1b" not in run(fake_terminal, TERM="dumb")[1]


def test_a_worker_process_does_not_write_into_its_parents_bar() -> None:
    """A warning of a worker would stand behind half a progress bar."""
    _, err = run("sys.stderr.isatty = lambda: True\nplain.warning('x')", TERM="xterm")
    assert err.startswith("\n\x1b[K")  # a carriage return, as text mode reads it


def test_basic_config_before_us_prints_no_line_twice() -> None:
    """A script that called logging.basicConfig first would show every warning twice."""
    _, err = run("""
logging.basicConfig(force=True)
get_library_config().setup_logging()
plain.warning("once")
""")
    assert err.count("once") == 1


def test_handlers_of_others_are_left_alone(tmp_path: object) -> None:
    """A user's own log file would stop growing when a run starts."""
    _, err = run(f"""
logging.getLogger().addHandler(logging.FileHandler({str(tmp_path) + "/own.log"!r}))
get_library_config().setup_logging()
plain.info("kept")
print(open({str(tmp_path) + "/own.log"!r}).read(), file=sys.stderr)
""")
    assert err.strip() == "kept"


@pytest.mark.parametrize("stream", ["None", "open('/dev/full', 'w')"])
def test_a_console_that_cannot_be_written_ends_nothing(stream: str) -> None:
    """A run in the background would die when its terminal is gone."""
    out, _ = run(f"""
logging.raiseExceptions = False
sys.stderr = {stream}
log.warning("nobody reads this")
print("alive")
sys.stderr = None
""")
    assert out == "alive\n"
