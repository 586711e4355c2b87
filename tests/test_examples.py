"""Every example and the demo, run as a person runs them, against a real HTTP server."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import subprocess
import sys
import termios
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from nanoeval.testing import Fault, Request, ScriptedServer

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
FIXTURES = ROOT / "tests" / "fixtures" / "datasets"
MAX_LINES = 100
# Beside this much work it waits for 4 s or so: 20 s in all, on two cores that do nothing else.
MAX_DEMO_CPU_SECONDS = 15


def run_program(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments`, its databases and records under `folder`."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=program_environment(folder, environment),
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )


def run_in_shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run what a person types, with this Python as `python`."""
    (folder / "bin").mkdir(exist_ok=True)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["sh", "-c", command],
        cwd=folder,
        env=program_environment(folder, {"PATH": path}),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def program_environment(folder: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours without what a person may have set, and with places of the test's own."""
    databases = folder / "databases"
    databases.mkdir(mode=0o700, exist_ok=True)
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "NANOEVAL_"))}
    places = {"NANOEVAL_DATABASE_DIR": str(databases), "NANOEVAL_DATASETS_DIR": str(FIXTURES)}
    return {**ours, **places, "NANOEVAL_ROOT_DIR": str(folder / "root"), **(more or {})}


def summary_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON on stdout, which must be all that is there."""
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def records_in(folder: Path) -> list[dict[str, Any]]:
    """All events of all records in the default place."""
    files = sorted((folder / "records").glob("*.jsonl"))
    return [record for file in files for record in json_lines(file)]


def json_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def example_files() -> list[Path]:
    return sorted(EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("example", example_files(), ids=lambda path: path.stem)
def test_examples_are_short_and_tested(example: Path) -> None:
    """An example would grow past one page, or rot because no test runs it."""
    assert len(example.read_text().splitlines()) < MAX_LINES
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*example*.py"))
    assert example.name in tests


def test_my_first_eval_runs_with_nothing_set_up(tmp_path: Path) -> None:
    """The first thing that a newcomer runs would fail."""
    summary = summary_of(run_program([str(EXAMPLES / "my_first_eval.py")], tmp_path))
    assert (summary["num_questions"], summary["num_failed"]) == (400, 0)
    assert 0.8 < summary["accuracy"] < 0.97
    kinds = Counter(record["record_type"] for record in records_in(tmp_path))
    assert kinds["sampling"] == kinds["match"] == kinds["sample_completed"] == 400


def test_my_first_eval_asks_a_real_model(tmp_path: Path) -> None:
    """The command line that the example's docstring shows would not work."""

    def reply(request: Request) -> str:
        return str(sum(map(int, re.findall(r"\d+", request.prompt))))

    arguments = ["sums.model=nanoeval.models.openai_api:OpenAIModel", "sums.model.name=scripted"]
    with ScriptedServer(reply) as server:
        done = run_program(
            [str(EXAMPLES / "my_first_eval.py"), *arguments, "runner.n_tasks=25"],
            tmp_path,
            {"OPENAI_BASE_URL": server.base_url},
        )
    summary = summary_of(done)
    assert (summary["accuracy"], summary["num_questions"], server.num_replies) == (1.0, 25, 25)


def test_my_first_eval_runs_in_worker_processes(tmp_path: Path) -> None:
    """Classes that a program defines in `__main__` could not be used by other processes."""
    options = ["runner.experimental_use_multiprocessing=True", "runner.num_processes=2"]
    done = run_program([str(EXAMPLES / "my_first_eval.py"), *options], tmp_path)
    assert summary_of(done)["num_questions"] == 400


def test_gpqa_mock(tmp_path: Path) -> None:
    """`gpqa_mock.py` would not run."""
    summary = summary_of(run_program([str(EXAMPLES / "gpqa_mock.py")], tmp_path))
    assert summary["num_attempts"] == 4 * summary["num_questions"]
    assert "consensus@4" in summary


def test_gpqa_api(tmp_path: Path) -> None:
    """`gpqa_api.py` would not run."""
    with ScriptedServer("I am sure.\nAnswer: B") as server:
        done = run_program(
            [str(EXAMPLES / "gpqa_api.py"), "scripted"],
            tmp_path,
            {"OPENAI_BASE_URL": server.base_url},
        )
    summary = summary_of(done)
    assert server.num_replies == summary["num_attempts"] > 0
    matches = [r for r in records_in(tmp_path) if r["record_type"] == "match"]
    expected = sum(match["correct"] for match in matches) / len(matches)
    assert summary["accuracy"] == pytest.approx(expected)
    assert all(match["picked"] == 1 for match in matches)


def test_gpqa_simple(tmp_path: Path) -> None:
    """`gpqa_simple.py` would not take its solver from the command line."""
    options = ["gpqa.solver=nanoeval.solvers.mcq:MockSolver", "gpqa.n_consensus=2"]
    summary = summary_of(run_program([str(EXAMPLES / "gpqa_simple.py"), *options], tmp_path))
    assert summary["num_attempts"] == 2 * summary["num_questions"]


def gsm8k_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of a GSM8K test split, as they are."""
    return json_lines(folder / "openai" / "gsm8k" / "main" / "test.jsonl")


def is_answered_right(question: str) -> bool:
    """The scripted model's rule: about three questions in four."""
    return crc32(question.encode()) % 4 != 0


def gsm8k_reply(rows: Sequence[Mapping[str, str]], request: Request) -> str:
    """The data set's own solution, or one with another last number."""
    for row in rows:
        if request.prompt.endswith(row["question"]):
            solution, _, answer = row["answer"].partition("####")
            number = int(answer.replace(",", "")) + (not is_answered_right(row["question"]))
            return f"{solution}\nAnswer: {number:,}"
    raise LookupError("the prompt does not end with a question of the data set")


def run_gsm8k(
    rows: Sequence[Mapping[str, str]], folder: Path, data: Path, faults: Sequence[Fault]
) -> tuple[dict[str, Any], ScriptedServer]:
    """Run the example on `rows`, which lie under `data`, against a server with `faults`."""
    with ScriptedServer(lambda request: gsm8k_reply(rows, request), faults=faults) as server:
        model = [f"model.base_url={server.base_url}", "model.name=scripted"]
        done = run_program(
            [str(EXAMPLES / "gsm8k_api.py"), *model, "model.retry_backoff=0.05"],
            folder,
            {"NANOEVAL_DATASETS_DIR": str(data)},
        )
        return summary_of(done), server


def test_gsm8k_api(tmp_path: Path) -> None:
    """`gsm8k_api.py` would not run."""
    rows = gsm8k_rows(FIXTURES)
    summary, server = run_gsm8k(rows, tmp_path, FIXTURES, [])
    right = sum(is_answered_right(row["question"]) for row in rows)
    assert summary["accuracy"] == right / len(rows)
    assert server.num_requests == len(rows)


def shared_data() -> Path:
    """The folder of the real data sets; skips, naming what is missing, where there is none."""
    chosen = os.environ.get("NANOEVAL_DATASETS_DIR")
    data = Path(chosen) if chosen else ROOT.parent / "shared" / "data"
    if not (data / "openai" / "gsm8k" / "main" / "test.jsonl").exists():
        pytest.skip(
            f"the real GSM8K test split is not in {data}: put it there as"
            " openai/gsm8k/main/test.jsonl, or set NANOEVAL_DATASETS_DIR to where it is"
        )
    return data


def test_all_of_gsm8k_through_a_failing_server_gives_the_exact_accuracy(tmp_path: Path) -> None:
    """Failures on the way would change a score, or lose or double a question."""
    data = shared_data()
    rows = gsm8k_rows(data)
    faults = [
        Fault("429", rate=0.02, retry_after=0.05),
        Fault("500", rate=0.02),
        Fault("cut", rate=0.01),
    ]
    summary, server = run_gsm8k(rows, tmp_path, data, faults)
    right = sum(is_answered_right(row["question"]) for row in rows)
    assert len(rows) == 1319
    assert summary["accuracy"] == right / len(rows)
    assert (summary["num_questions"], summary["num_scored"]) == (1319, 1319)
    assert (summary["num_failed"], summary["num_missing"], summary["is_valid"]) == (0, 0, True)
    # Every fault was met, and none of them cost or doubled a reply.
    assert all(server.faults[fault.kind] > 5 for fault in faults)
    assert 0.03 < server.faults.total() / server.num_requests < 0.07
    assert server.num_replies == 1319
    matches = [r for r in records_in(tmp_path) if r["record_type"] == "match"]
    assert len({match["sample_id"] for match in matches}) == len(matches) == 1319


def test_demo_explains_itself_when_piped(tmp_path: Path) -> None:
    """The first of the README's two lines would fail, take too long, or say nothing useful."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_program(["-m", "nanoeval.bin.demo"], tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < MAX_DEMO_CPU_SECONDS
    )
    for wanted in ("std. err.", "95 % interval", "pass@3", "connection cut", "What to try next"):
        assert wanted in done.stdout
    assert "0 rollouts without a result" in done.stdout
    assert "\r" not in done.stdout
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert all(len(line) <= 80 or str(tmp_path) in line for line in lines)
    records = re.search(r"Records +(\S+)", done.stdout)
    assert records is not None
    kinds = Counter(event["record_type"] for event in json_lines(tmp_path / records[1]))
    assert kinds["match"] == 750
    assert " for 750 rollouts in " in done.stdout
    database = re.search(r"Database +(\S+)", done.stdout)
    assert database is not None
    assert Path(database[1]).exists()
    suggested = re.findall(r"^  (\S.*)$", done.stdout.partition("What to try next")[2], re.M)
    assert len(suggested) >= 3
    for command in suggested:
        tried = run_in_shell(command, tmp_path)
        assert tried.returncode == 0, tried.stderr
        assert tried.stdout


def test_demo_shows_a_live_bar_on_a_terminal(tmp_path: Path) -> None:
    """A person would look at a still screen."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 100))
    process = subprocess.Popen(
        [sys.executable, "-m", "nanoeval.bin.demo"],
        cwd=tmp_path,
        env=program_environment(tmp_path, {"TERM": "xterm"}),
        stdout=theirs,
        stderr=theirs,
        stdin=subprocess.DEVNULL,
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:
        pass  # the end of a terminal
    os.close(ours)
    assert process.wait(timeout=20) == 0
    text = shown.decode()
    states = re.findall(r"multiple-choice: +(\d+)%", text)
    assert len(set(states)) > 3, text[-2000:]
    assert "retried=" in text
    assert "score=" in text
