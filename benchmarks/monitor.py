"""What the monitor costs on a run set of a million finished tasks, and what it costs a live run.

    python benchmarks/monitor.py [--tasks 1000000] [--json results.json]
    python benchmarks/monitor.py --live [--json results.json]

Makes the run set with plain SQL, in a private folder under /dev/shm where there is one, and shows
every page through Streamlit's own test runner: CPU and wall time of the first show, of a refresh,
and the memory that a refresh adds. With --live, runs 5,000 rollouts in flight with and without an
open monitor, in turns, instead.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nanoeval import _schema

SECONDS_PER_TASK = 0.004
RETRIED_EVERY = 50
FAILED_EVERY = 97

# Four attempts per question, in the order of get_tasks.
TASKS = """
WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < :tasks)
INSERT INTO task (id, eval_id, question_id, attempt_id, retry_idx, position, state, claims,
    outcome_seq)
SELECT i + 1, :eval_id, 'question-' || (i / 4), i % 4, 0, i,
    CASE WHEN i % :retried_every = 0 THEN 3 WHEN i % :failed_every = 0 THEN 4 ELSE 2 END, 1, i + 1
FROM n"""

OUTCOMES = """
WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < :tasks)
INSERT INTO outcome (seq, eval_id, task_id, executor_id, state, started_at, finished_at, score,
    is_unexpected, error_type, error_message, traceback)
SELECT i + 1, :eval_id, i + 1, 1 + i % 4,
    CASE WHEN i % :retried_every = 0 THEN 3 WHEN i % :failed_every = 0 THEN 4 ELSE 2 END,
    :began + i * :spacing - 0.2 - abs(random() % 1000) / 400.0
        - CASE WHEN i % 31 = 0 THEN 9.0 ELSE 0.0 END,
    :began + i * :spacing,
    CASE WHEN i % :retried_every = 0 OR i % :failed_every = 0 THEN NULL
        ELSE (abs(random() % 100) < :percent) * 1.0 END,
    0,
    CASE WHEN i % :retried_every = 0 THEN 'RateLimitError'
        WHEN i % :failed_every = 0 THEN 'ModelServerError' END,
    CASE WHEN i % :retried_every = 0 THEN 'HTTP 429: slow down' || char(10) || 'request ' || i
        WHEN i % :failed_every = 0 THEN 'HTTP ' || (500 + i % 4) || ' from /v1/completions' END,
    CASE WHEN i % :retried_every = 0 OR i % :failed_every = 0
        THEN 'Traceback (most recent call last):' || char(10) || '  …' END
FROM n"""

RETRIES = """
INSERT INTO task (id, eval_id, question_id, attempt_id, retry_idx, position, state, claims,
    outcome_seq)
SELECT :tasks + t.position / :retried_every + 1, t.eval_id, t.question_id, t.attempt_id, 1,
    t.position, 2, 1, :tasks + t.position / :retried_every + 1
FROM task AS t WHERE t.eval_id = :eval_id AND t.state = 3"""

RETRIES_OUTCOMES = """
INSERT INTO outcome (seq, eval_id, task_id, executor_id, state, started_at, finished_at, score,
    is_unexpected)
SELECT t.id, t.eval_id, t.id, 1, 2, :began + :tasks * :spacing - 2,
    :began + :tasks * :spacing + t.position / :retried_every * 0.00001, 1.0, 0
FROM task AS t WHERE t.eval_id = :eval_id AND t.retry_idx = 1"""

TASK_PAYLOADS = """
INSERT INTO task_payload (task_id, preview, payload)
SELECT t.id, '{"question": "What is ' || t.position || ' plus ' || (t.position * 7)
    || '? Show in one line how you came to it, then answer with the number alone.", "expected": "'
    || (t.position * 8) || '"}', zeroblob(200)
FROM task AS t WHERE t.eval_id = :eval_id"""

OUTCOME_PAYLOADS = """
INSERT INTO outcome_payload (seq, preview, payload)
SELECT o.seq, CASE WHEN o.state = 2 THEN '{"correct": ' || iif(o.score, 'true', 'false')
    || ', "picked": "' || (o.task_id * 8) || '", "reply": "Seven times as many and one more."}' END,
    zeroblob(120)
FROM outcome AS o WHERE o.eval_id = :eval_id"""

STATEMENTS = (TASKS, OUTCOMES, RETRIES, RETRIES_OUTCOMES, TASK_PAYLOADS, OUTCOME_PAYLOADS)

EVAL = """
INSERT INTO eval (id, run_id, name, model_name, state, concurrency, created_at, started_at,
    finished_at, records, summary, spec)
VALUES (:eval_id, :run_id, 'sums', :model, 'finished', 4096, :began, :began,
    :began + :tasks * :spacing + 2, :records, :summary, x'00')"""

COUNTS = """
UPDATE eval SET num_tasks = :tasks, num_scored = n.scored, num_failed = n.failed,
    num_retried = n.retried, num_with_score = n.with_score, score_sum = n.sum
FROM (SELECT sum(o.state = 2) AS scored, sum(o.state = 4) AS failed, sum(o.state = 3) AS retried,
        count(o.score) AS with_score, total(o.score) AS sum
    FROM outcome AS o WHERE o.eval_id = :eval_id) AS n
WHERE id = :eval_id"""

EXECUTOR = """
INSERT INTO executor (role, host, host_id, pid, process_started, started_at, heartbeat_at,
    lease_until, ended_at, end_reason, num_slow_callbacks)
VALUES (:role, 'localhost', 'gone', :pid, '1', :began, :ended, :ended, :ended, 'ended', 3)"""


def make_run_set(folder: Path, run_set_id: str, tasks: int, percent: int, model: str) -> Path:
    """Make a finished run set of one eval; `percent` of its results are right."""
    path = folder / f"{run_set_id}.db"
    path.touch(mode=0o600)
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = OFF")
    _schema.migrate(db, str(path))
    duration = tasks * SECONDS_PER_TASK
    row: dict[str, Any] = {
        "eval_id": 1,
        "run_id": f"{run_set_id}-run",
        "model": model,
        "tasks": tasks,
        "percent": percent,
        "began": time.time() - duration - 60,
        "ended": time.time() - 55,
        "spacing": SECONDS_PER_TASK,
        "retried_every": RETRIED_EVERY,
        "failed_every": FAILED_EVERY,
        "records": str(folder / f"{run_set_id}.jsonl"),
        "summary": json.dumps({"accuracy": percent / 100, "num_tasks": tasks}),
    }
    db.execute("BEGIN")
    db.execute(
        "INSERT INTO run_set (id, created_at, nanoeval_version, host, command)"
        " VALUES (?, ?, ?, 'localhost', 'python sums.py')",
        (run_set_id, row["began"], _schema.library_version()),
    )
    for statement in (EVAL, *STATEMENTS, COUNTS):
        db.execute(statement, row)
    for pid in range(4):
        db.execute(EXECUTOR, row | {"role": "worker" if pid else "driver", "pid": 4_000_000 + pid})
    db.execute("COMMIT")
    db.close()
    return path


def make_records(path: Path, tasks: int) -> None:
    """Make the JSON lines of `make_run_set`: two events per task, in the order of time."""
    began = time.time() - tasks * SECONDS_PER_TASK - 60
    with path.open("w") as file:
        for start in range(0, tasks, 1000):
            file.writelines(
                _events(index, began) for index in range(start, min(tasks, start + 1000))
            )


def _events(index: int, began: float) -> str:
    ended = began + index * SECONDS_PER_TASK
    seconds, fraction = divmod(ended, 1)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{fraction * 1e6:06.0f}"
    where = f'"sample_id": "question-{index // 4}", "group_id": "{index % 4}.0"'
    return (
        f'{{"timestamp": "{stamp}+00:00", "record_type": "sampling", {where}, "prompt":'
        f' [{{"role": "user", "content": "What is {index} plus {index * 7}?"}}],'
        f' "sampled": "Seven times as many and one more make {index * 8}."}}\n'
        f'{{"timestamp": "{stamp}+00:00", "record_type": "match", {where}, "correct": true,'
        f' "expected": "{index * 8}", "picked": "{index * 8}", "prob_correct": null}}\n'
    )


PAGES = {
    "Run sets": ("run_sets", {}),
    "Run": ("run", {}),
    "In flight": ("stuck", {}),
    "Tasks": ("tasks", {}),
    "Tasks, wrong ones": ("tasks", {"score": "wrong"}),
    "Tasks, the slowest": ("tasks", {"order": "duration", "desc": "true"}),
    "Tasks, one error": ("tasks", {"error": "ModelServerError", "line": "HTTP 502"}),
    "Tasks, text in a name": ("tasks", {"text": "question-249999"}),
    "Tasks, page 10,000": ("tasks", {"page": "10000"}),
    "Task": ("task", {"task": "500001"}),
    "Compare": ("compare", {"with": "second:1"}),
}
REFRESHES = 5
LIVE_TURNS = 6


def show(first: str) -> None:
    """The script that Streamlit's test runner runs: the monitor, with one page at its root."""
    from nanoeval.monitor.navigation import show_app

    show_app(first=first)


def measure_page(page: str, query: dict[str, str]) -> dict[str, float]:
    """CPU and wall seconds of the first show in a fresh process, and of a refresh; MiB added."""
    from streamlit.testing.v1 import AppTest

    import nanoeval.monitor.navigation  # noqa: F401 - the server loads it before the first page

    test = AppTest.from_function(show, args=(page,), default_timeout=120)
    for name, value in {"run_set": "million", **query}.items():
        test.query_params[name] = value
    began, cpu_began = time.perf_counter(), time.process_time()
    test.run()
    first = time.perf_counter() - began, time.process_time() - cpu_began
    assert not test.exception, test.exception
    time.sleep(5)  # what goes on in the background comes to its end
    test.run()
    before = _resident_mib()
    cpu_began = time.process_time()
    for _ in range(REFRESHES):
        test.run()
    refresh = (time.process_time() - cpu_began) / REFRESHES
    return {
        "first_wall_s": first[0],
        "first_cpu_s": first[1],
        "refresh_cpu_s": refresh,
        "refresh_added_mib": _resident_mib() - before,
        "resident_mib": _resident_mib(),
    }


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure_live(folder: Path, with_monitor: bool, rollouts: int) -> float:
    """Rollouts per second of a run with 5,000 in flight, beside an open page or without one."""
    environment = os.environ | {"NANOEVAL_DATABASE_DIR": str(folder)}
    run_set_id = f"live-{time.time_ns()}"
    arguments = [sys.executable, __file__, "--run", run_set_id, str(rollouts)]
    if with_monitor:
        viewing = [sys.executable, __file__, "--view", run_set_id]
        viewer = subprocess.Popen(viewing, env=environment, stdout=subprocess.PIPE)
        assert viewer.stdout is not None
        viewer.stdout.readline()  # it is up, as a monitor that was opened before
    output = subprocess.check_output(arguments, env=environment, text=True)
    if with_monitor:
        viewer.terminate()
        viewer.wait()
    return float(output)


def run_rollouts(run_set_id: str, rollouts: int) -> None:
    """Run rollouts of about two seconds, 5,000 at a time; print how many per second."""
    import asyncio
    import random

    import chz

    from nanoeval import Eval, EvalSpec, RunnerArgs, Task, run
    from nanoeval.recorders import dummy_recorder

    @chz.chz
    class Sleep(Eval[Task, bool]):
        def get_name(self) -> str:
            return "sleep"

        async def get_tasks(self) -> list[Task]:
            return [Task(question_id=str(index)) for index in range(rollouts)]

        async def evaluate(self, task: Task) -> bool:
            await asyncio.sleep(random.uniform(1.0, 3.0))
            return True

        async def get_summary(self, results: Any) -> dict[str, Any]:
            return {"n": len(results)}

    runner = RunnerArgs(run_set_id=run_set_id, concurrency=5000, recorder=dummy_recorder(log=False))
    began = time.perf_counter()
    asyncio.run(run(EvalSpec(eval=Sleep(), runner=runner)))
    print(rollouts / (time.perf_counter() - began))


def view(run_set_id: str) -> None:
    """Refresh the page of a run every two seconds, as an open monitor does."""
    from streamlit.testing.v1 import AppTest

    test = AppTest.from_function(show, args=("run",), default_timeout=120)
    test.query_params["run_set"] = run_set_id
    test.run()
    print("up", flush=True)
    while True:
        time.sleep(2)
        test.run()


def main() -> None:
    """Measure, print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--live", action="store_true")
    parser.add_argument("--page", help="used by the benchmark itself")
    parser.add_argument("--run", nargs=2, help="used by the benchmark itself")
    parser.add_argument("--view", help="used by the benchmark itself")
    asked = parser.parse_args()
    if asked.page:
        print(json.dumps(measure_page(*PAGES[asked.page])))
    elif asked.run:
        run_rollouts(asked.run[0], int(asked.run[1]))
    elif asked.view:
        view(asked.view)
    else:
        measure(asked)


def live(folder: Path) -> dict[str, Any]:
    speeds = [measure_live(folder, turn % 2 == 1, 60_000) for turn in range(LIVE_TURNS)]
    without, beside = speeds[0::2], speeds[1::2]
    slower = 100 * (1 - statistics.median(beside) / statistics.median(without))
    print(f"5,000 in flight: {statistics.median(without):.0f} rollouts/s, with an open monitor")
    print(f"{statistics.median(beside):.0f}, {slower:.1f} % slower; single runs {speeds}")
    return {"without": without, "with": beside, "slower_percent": slower}


def pages(folder: Path, tasks: int) -> dict[str, Any]:
    results: dict[str, Any] = {"tasks": tasks}
    make_run_set(folder, "million", tasks, percent=70, model="model-a")
    make_records(folder / "million.jsonl", tasks)
    make_run_set(folder, "second", tasks, percent=72, model="model-b")
    print(f"{'page':24} {'first, wall s':>13} {'CPU s':>7} {'refresh CPU s':>14} {'MiB':>6}")
    for page in PAGES:
        output = subprocess.check_output([sys.executable, __file__, "--page", page], text=True)
        found = results[page] = json.loads(output.splitlines()[-1])
        print(
            f"{page:24} {found['first_wall_s']:13.2f} {found['first_cpu_s']:7.2f}"
            f" {found['refresh_cpu_s']:14.3f} {found['refresh_added_mib']:6.1f}",
            flush=True,
        )
    return results


def measure(asked: argparse.Namespace) -> None:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        folder = Path(name)
        os.environ["NANOEVAL_DATABASE_DIR"] = name
        results = live(folder) if asked.live else pages(folder, asked.tasks)
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
