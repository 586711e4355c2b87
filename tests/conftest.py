"""What every test gets: folders of its own, and no settings of the person who runs it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Databases, records and backups of one test are seen by no other."""
    for name in [name for name in os.environ if name.startswith(("NANOEVAL_", "OPENAI_"))]:
        if name != "NANOEVAL_DATASETS_DIR":
            monkeypatch.delenv(name)
    # As the default does, databases go to memory where there is some.
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
    monkeypatch.setenv("NANOEVAL_DATABASE_DIR", str(folder / "databases"))
    monkeypatch.setenv("NANOEVAL_LOG_DIR", str(folder / "records"))
    monkeypatch.setenv("NANOEVAL_ROOT_DIR", str(folder / "root"))
    # Importing it takes longer than most tests; its own test turns it on.
    monkeypatch.setenv("NANOEVAL_AIOMONITOR", "0")
    main = sys.modules["__main__"]
    yield
    # Streamlit's test runner leaves a module of its own there, which no later process could import.
    sys.modules["__main__"] = main
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def database_folder() -> Path:
    """Where this test's databases lie; made by the first run."""
    return Path(os.environ["NANOEVAL_DATABASE_DIR"])


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Where everything a test needs has been brought, a skipped test is a failure."""
    if not os.environ.get("NANOEVAL_FAIL_ON_SKIP") or exitstatus != pytest.ExitCode.OK:
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and (skipped := reporter.stats.get("skipped")):
        reporter.write_line(f"{len(skipped)} tests were skipped, and NANOEVAL_FAIL_ON_SKIP is set")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
