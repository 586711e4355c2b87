"""What `run` promises, and what bad input gets: one clear error, and finished results kept."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import chz
import numpy as np
import pytest
from pydantic import PrivateAttr, ValidationError
from tqdm import tqdm

from nanoeval import RolloutSystemError, RunnerArgs, Task, run, validate
from nanoeval._run_set import backup_path
from nanoeval.bin.resume import resume
from nanoeval.evaluation import run_eval_in_database
from nanoeval.library_config import LibraryConfig, get_library_config, set_library_config
from nanoeval.recorder import get_recorder
from nanoeval.recorder_protocol import RecorderConfig, RecorderProtocol
from nanoeval.setup import global_exit_stack, nanoeval_entrypoint
from tests.sample_evals import Sum, Sums, lines, spec

REPOSITORY = Path(__file__).resolve().parent.parent


@chz.chz
class Odd(Sums):
    """Misbehaves in one way, named by `what`."""

    what: str = ""

    def get_name(self) -> Any:
        return asyncio.sleep(0) if self.what == "no name" else super().get_name()

    def get_tasks(self) -> Any:
        return [] if self.what == "plain get_tasks" else self._tasks()

    async def _tasks(self) -> Any:
        if self.what == "get_tasks":
            raise RuntimeError("no such file")
        listed = {"no tasks": [], "no list": None, "one task": Sum(question_id="q0", a=1)}
        if self.what in listed:
            return listed[self.what]
        if self.what == "duplicates":
            return [Sum(question_id=f"q{i % 3}", a=i) for i in range(5)]
        if self.what == "another retry":
            return [Sum(question_id="q0", a=1), Sum(question_id="q0", a=1, retry_idx=1)]
        if self.what == "not a task":
            return [{"question_id": "q"}]
        if self.what == "unpicklable task":
            return [Locked(question_id="q7", inner={"deep": [threading.Lock()]})]
        return await super().get_tasks()

    @asynccontextmanager
    async def _context(self) -> AsyncIterator[None]:
        if self.what == "_context":
            raise AttributeError("no such attribute")
        if self.what == "_context cancels":
            raise asyncio.CancelledError
        yield
        if self.what == "interrupt":
            raise OSError("the pool is gone")

    async def evaluate(self, task: Any) -> Any:
        if self.what == "cancel":
            raise asyncio.CancelledError
        if self.what == "interrupt" and task.a == 3:
            raise KeyboardInterrupt
        if self.what == "exit" and task.a == 3:
            raise GeneratorExit
        return await super().evaluate(task)

    def get_summary(self, results: Any) -> Any:
        return {} if self.what == "plain summary" else self._summary(results)

    async def _summary(self, results: Any) -> Any:
        if self.what == "no summary":
            return None
        if self.what == "get_summary" and "SAMPLE_MENDED" not in os.environ:
            raise ZeroDivisionError("division by zero")
        return await super().get_summary(results)

    async def update_progress(self, partial_results: Any, pbar: Any) -> None:
        if self.what == "update_progress":
            raise KeyError("missing")


class Locked(Task):
    """Holds what nobody can pickle."""

    model_config: ClassVar[Any] = {"arbitrary_types_allowed": True}
    inner: Any


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        ("no tasks", ValueError, "No tasks to evaluate"),
        ("duplicates", ValueError, "('q0', 1)"),
        ("not a task", TypeError, "must return nanoeval.Task"),
        ("unpicklable task", TypeError, "task 'q7.1' cannot be pickled: .inner['deep'][0] holds a"),
        ("get_tasks", RuntimeError, "raised by sums.get_tasks()"),
        ("_context", AttributeError, "raised by sums._context"),
        ("_context cancels", RuntimeError, "sums._context() raised CancelledError by itself"),
        ("another retry", ValueError, "('q0', 1)"),
        ("plain get_tasks", TypeError, "Odd.get_tasks() gave a list; write it as `async def`"),
        ("no list", TypeError, "Odd.get_tasks() returned None; it must return a list"),
        ("one task", TypeError, "Odd.get_tasks() returned a Sum; it must return a list"),
        ("no name", TypeError, "Odd.get_name() returned a coroutine; it must return a short text"),
        ("plain summary", TypeError, "Odd.get_summary gave a dict; write it as `async def`"),
        ("no summary", TypeError, "Odd.get_summary returned None; it must return a dict"),
        ("get_summary", ZeroDivisionError, "all results are kept"),
    ],
)
async def test_bad_evals_get_an_error_that_names_the_place(
    what: str, error: type[Exception], says: str
) -> None:
    """A person would search for the cause, or take a half-run eval for a whole one."""
    with pytest.raises(error) as caught:
        await run(spec(Odd(what=what)))
    assert says in "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


async def test_tasks_that_were_refused_leave_nothing_behind(database_folder: Path) -> None:
    """A resume would find half an eval."""
    with pytest.raises(ValueError, match="twice"):
        await run(spec(Odd(what="duplicates"), run_set_id="refused"))
    db = sqlite3.connect(database_folder / "refused.db")
    assert db.execute("SELECT count(*) FROM eval").fetchone() == (0,)
    assert db.execute("SELECT count(*) FROM task").fetchone() == (0,)
    db.close()


@pytest.mark.parametrize(
    ("what", "error"), [("interrupt", KeyboardInterrupt), ("exit", GeneratorExit)]
)
async def test_even_exits_raised_by_evaluate_end_the_run(
    what: str, error: type[BaseException], database_folder: Path
) -> None:
    """The loop would be torn down with rollouts at work and results not handed in."""
    with pytest.raises(BaseExceptionGroup) as caught:
        await run(spec(Odd(what=what), concurrency=1, run_set_id=what))
    assert isinstance(caught.value.exceptions[0], error)
    if what == "interrupt":  # what the clean-up raised stands beside it, not in its place
        assert "raised by sums._context() as it was left" in caught.value.exceptions[1].__notes__
    db = sqlite3.connect(database_folder / f"{what}.db")
    assert db.execute("SELECT num_scored, state FROM eval").fetchone() == (3, "failed")
    db.close()


async def test_a_cancellation_by_the_evals_own_code_is_a_system_error() -> None:
    """One rollout that cancels itself would end the run, or hang it."""
    summary = await run(spec(Odd(n=2, what="cancel"), max_retries=1))
    assert summary["num_failed"] == 2


async def test_an_exception_in_update_progress_ends_the_run(database_folder: Path) -> None:
    """A broken display would go unseen."""
    eval = Odd(n=100, seconds=0.1, what="update_progress")
    with pytest.raises(ExceptionGroup) as caught:
        await run(spec(eval, concurrency=4, run_set_id="progress"))
    (error,) = caught.value.exceptions
    assert "raised by sums.update_progress()" in error.__notes__
    db = sqlite3.connect(database_folder / "progress.db")
    (num_scored,) = db.execute("SELECT num_scored FROM eval").fetchone()
    db.close()
    assert num_scored > 0


async def test_a_summary_that_raised_can_be_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished rollouts would have to be paid for again."""
    with pytest.raises(ZeroDivisionError):
        await run(spec(Odd(what="get_summary"), run_set_id="summary"))
    monkeypatch.setenv("SAMPLE_MENDED", "1")
    (summary,) = await resume("summary")
    assert summary["num_scored"] == 20


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"concurrency": 0}, "concurrency=0"),
        ({"concurrency": -1}, "concurrency=-1"),
        ({"num_processes": 0, "experimental_use_multiprocessing": True}, "num_processes=0"),
        ({"num_processes": 2}, "experimental_use_multiprocessing"),
        ({"n_tasks": 0}, "n_tasks=0"),
        ({"slack_name": "me", "enable_slackbot": False}, "slack_name='me'"),
        ({"max_retries": -1}, "max_retries=-1"),
        ({"retry_backoff": -1.0}, "retry_backoff=-1.0"),
        ({"rollout_timeout": 0.0}, "rollout_timeout=0.0"),
        ({"summary_interval": -2.0}, "summary_interval=-2.0"),
        ({"fail_on_error": 1.5}, "fail_on_error=1.5"),
        ({"run_set_id": "a/b"}, "run_set_id='a/b'"),
        ({"run_set_id": "é" * 101}, "200 bytes at most, not 202"),
        ({"run_set_id": "a\0b"}, "run_set_id='a"),
        ({"concurrency": 2.5}, "concurrency=2.5"),
        ({"concurrency": "5"}, "concurrency='5'"),
        ({"n_tasks": True}, "n_tasks=True"),
        ({"max_retries": None}, "max_retries=None"),
        ({"retry_backoff": "1"}, "retry_backoff='1'"),
        ({"rollout_timeout": float("nan")}, "rollout_timeout=nan"),
        ({"executor": "threads"}, "executor='threads'"),
        ({"recorder": "dummy"}, "recorder='dummy'"),
    ],
)
def test_bad_runner_arguments_name_field_and_value(arguments: dict[str, Any], says: str) -> None:
    """A typing mistake would show hours later, or never."""
    with pytest.raises(ValueError, match="must|needs|default") as caught:
        RunnerArgs(**arguments)
    assert says in str(caught.value)


def test_a_slash_in_a_question_id_is_refused() -> None:
    """Files and links named after the question would break."""
    with pytest.raises(ValidationError, match='contains a "/"'):
        Task(question_id="a/b")


async def test_a_spec_that_cannot_be_pickled_names_the_field() -> None:
    """A run would be lost to resume without a word."""
    with pytest.raises(TypeError, match=r"the EvalSpec of sums cannot be pickled: \.eval"):
        await run(spec(Sums(name="sums", log=Unpicklable())))  # type: ignore[arg-type]


class Unpicklable(str):
    """A str that cannot be pickled."""

    def __reduce__(self) -> Any:
        raise TypeError("holds a live connection")


@pytest.mark.parametrize("where", ["factory", "enter", "record", "final", "error"])
async def test_a_recorder_that_raises_ends_the_run(where: str, database_folder: Path) -> None:
    """Records would be missing from a run that looks whole."""
    eval = Odd(n=5, flaky=1 if where == "error" else 0)
    with pytest.raises(Exception) as caught:
        await run(spec(eval, recorder=BrokenRecorderConfig(where=where), run_set_id=where))
    assert "the disk is gone" in repr(caught.value) + repr(getattr(caught.value, "exceptions", ""))


@chz.chz
class BrokenRecorderConfig(RecorderConfig):
    """Makes recorders that raise at one place."""

    where: str

    async def factory(self, spec: Any, num_tasks: int) -> RecorderProtocol:
        if self.where == "factory":
            raise OSError("the disk is gone")
        config = get_library_config().get_dummy_recorder(False)
        recorder: Any = await config.factory(spec, num_tasks)
        methods = {"record": "record_sample_completed", "final": "record_final_report"}
        methods["error"] = "record_error"
        if self.where == "enter":
            recorder.__class__ = Unenterable
        else:
            setattr(recorder, methods[self.where], _raise)
        return recorder  # type: ignore[no-any-return]


def _raise(*args: Any, **kwargs: Any) -> None:
    raise OSError("the disk is gone")


from nanoeval._dummy_recorder import DummyRecorder  # noqa: E402


class Unenterable(DummyRecorder):
    """Cannot be entered."""

    def __enter__(self) -> Any:
        raise OSError("the disk is gone")


async def test_n_tasks_are_the_first_and_shuffling_comes_after(tmp_path: Path) -> None:
    """A quick look at ten questions would see others each time."""
    log = tmp_path / "log"
    await run(spec(Sums(n=50, log=str(log)), n_tasks=10, shuffle=True, concurrency=1))
    ran = [line.split(".")[0] for line in lines(log)]
    assert sorted(ran) == sorted(f"q{i}" for i in range(10))
    assert ran != [f"q{i}" for i in range(10)]


async def test_tasks_may_come_from_an_async_generator() -> None:
    """A million tasks would have to be in memory at once."""

    @chz.chz
    class Streamed(Sums):
        async def get_tasks(self) -> Any:
            for a in range(self.n):
                yield Sum(question_id=f"q{a}", a=a)

    summary = await run(spec(Streamed(n=2000), n_tasks=1500))
    assert summary["num_scored"] == 1500


@pytest.mark.parametrize("shuffle", [False, True])
async def test_a_generator_lists_no_more_than_is_asked_for(shuffle: bool) -> None:
    """A quick look at two questions would fail for the third, or leave its file open."""
    steps = []

    @chz.chz
    class Guarded(Sums):
        async def get_tasks(self) -> Any:
            try:
                for a in range(self.n):
                    steps.append(a)
                    yield Sum(question_id=f"q{a}", a=a)
            finally:
                steps.append("closed")

        async def evaluate(self, task: Sum) -> bool:
            steps.append("evaluated")
            return True

    await run(spec(Guarded(n=9), n_tasks=2, shuffle=shuffle))
    assert steps == [0, 1, "closed", "evaluated", "evaluated"]


async def test_private_attributes_reach_evaluate() -> None:
    """Evals that keep state on their tasks would lose it on the way."""

    class Private(Task):
        _secret: int = PrivateAttr(default=0)

    @chz.chz
    class Secrets(Sums):
        async def get_tasks(self) -> Any:
            task = Private(question_id="q")
            task._secret = 42
            return [task]

        async def evaluate(self, task: Any) -> bool:
            return bool(task._secret == 42)

    assert (await run(spec(Secrets())))["accuracy"] == 1.0


async def test_what_a_rollout_does_to_its_task_reaches_neither_retry_nor_summary() -> None:
    """A retry would start from a half-used task."""

    @chz.chz
    class Mutating(Sums):
        async def evaluate(self, task: Any) -> bool:
            task.a += 100
            if task.retry_idx == 0:
                raise RolloutSystemError("again")
            return bool(task.a == 100)

        async def get_summary(self, results: Any) -> dict[str, Any]:
            return {"a": [task.a for task, _ in results], "right": [r for _, r in results]}

    summary = await run(spec(Mutating(n=1)))
    assert (summary["a"], summary["right"]) == ([0], [True])


async def test_retry_after_is_waited_for(tmp_path: Path) -> None:
    """A server that asks for a pause would be hammered."""

    @chz.chz
    class Limited(Sums):
        async def evaluate(self, task: Any) -> bool:
            if task.retry_idx == 0:
                raise RolloutSystemError("429", retry_after=0.6)
            return True

    began = asyncio.get_running_loop().time()
    await run(spec(Limited(n=1)))
    assert asyncio.get_running_loop().time() - began >= 0.6


async def test_every_try_stays_readable(database_folder: Path) -> None:
    """Why a rollout needed three tries would be forgotten."""
    await run(spec(Sums(n=1, flaky=1, n_breaks=2), run_set_id="tries"))
    db = sqlite3.connect(database_folder / "tries.db")
    tries = db.execute(
        "SELECT retry_idx, state, error_type, error_message, traceback, started_at, finished_at"
        " FROM try ORDER BY retry_idx"
    ).fetchall()
    db.close()
    assert [t[:4] for t in tries] == [
        (0, 3, "RolloutSystemError", "q0 broke at try 0"),
        (1, 3, "RolloutSystemError", "q0 broke at try 1"),
        (2, 2, None, None),
    ]
    assert "sample_evals.py" in tries[0][4]
    assert all(started <= finished for *_, started, finished in tries)


async def test_a_share_of_failures_can_be_allowed() -> None:
    """A run of thousands would end at the first odd question, or never."""

    @chz.chz
    class Brittle(Sums):
        async def evaluate(self, task: Any) -> bool:
            if task.a % 4 == 0:
                raise KeyError("odd question")
            return True

    summary = await run(spec(Brittle(n=40), fail_on_error=0.5))
    assert (summary["num_scored"], summary["num_failed"]) == (30, 10)
    with pytest.raises(RuntimeError, match=r"more than fail_on_error=0\.1 allows"):
        await run(spec(Brittle(n=4000), fail_on_error=0.1, concurrency=20))


async def test_partial_summaries_come_at_the_interval(database_folder: Path) -> None:
    """A run of a day would say nothing until its end."""
    task = asyncio.ensure_future(
        run(spec(Sums(n=200, seconds=0.1), concurrency=10, summary_interval=0.2, run_set_id="part"))
    )
    await asyncio.sleep(1.2)
    db = sqlite3.connect(database_folder / "part.db")
    (text,) = db.execute("SELECT summary FROM eval").fetchone()
    db.close()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert 0 < json.loads(text)["num_scored"] < 200


async def test_update_progress_sees_the_results_so_far() -> None:
    """An eval's own display would stay empty."""
    seen: list[int] = []

    @chz.chz
    class Watching(Sums):
        async def update_progress(self, partial_results: Any, pbar: Any) -> None:
            seen.append(len(partial_results))
            pbar.set_postfix(right=sum(r for _, r in partial_results))

    await run(spec(Watching(n=60, seconds=0.2, flaky=7, n_breaks=9), concurrency=4, max_retries=0))
    assert seen == sorted(seen)
    assert 0 < seen[0] < 60


async def test_validate_records_and_notifies_nothing(tmp_path: Path) -> None:
    """A check of an eval would look like a run of it."""
    told: list[str] = []

    class Telling(LibraryConfig):
        async def send_user_notification(self, message: str, extra: str | None = None) -> None:
            told.append(message)

    before = get_library_config()
    set_library_config(Telling())
    try:
        summary = await validate(spec(Sums(n=3), recorder=None))
        assert (summary["num_scored"], told) == (3, [])
        await run(spec(Sums(n=3)))
        assert len(told) == 2
    finally:
        set_library_config(before)
    assert not Path(os.environ["NANOEVAL_LOG_DIR"]).exists()


async def test_rollouts_see_their_recorder_and_others_do_not() -> None:
    """Events would be filed under another rollout."""
    seen: set[tuple[str | None, str | None]] = set()

    @chz.chz
    class Recording(Sums):
        async def evaluate(self, task: Any) -> bool:
            await asyncio.sleep(0.001 * (5 - task.a))
            recorder = get_recorder()
            seen.add((recorder.current_sample_id(), recorder.current_group_id()))
            return True

    await run(spec(Recording(n=5)))
    assert seen == {(f"q{a}", "1.0") for a in range(5)}
    with pytest.raises(LookupError):
        get_recorder()


async def test_a_run_can_be_continued_by_its_run_id() -> None:
    """Programs that know only the run's id could not go on with it."""
    summary = await run(spec(Sums(n=5), run_set_id="by_id"))
    again = await run_eval_in_database(summary["run_id"])
    assert again == summary
    with pytest.raises(LookupError, match="run_id='nobody'"):
        await run_eval_in_database("nobody")


async def test_runs_without_a_run_set_share_one_inside_the_global_exit_stack(
    database_folder: Path,
) -> None:
    """Ten evals of one program would be scattered over ten databases."""
    async with global_exit_stack:
        await asyncio.gather(run(spec(Sums(n=3, name="a"))), run(spec(Sums(n=3, name="b"))))
    assert len(list(database_folder.glob("*.db"))) == 1


async def test_a_result_of_any_size_and_kind_comes_back_unchanged() -> None:
    """Texts that databases find odd would be changed on the way."""
    results = [
        "",
        "\x00",
        "é\ud800",
        b"\x00\xff" * 10,
        None,
        float("nan"),
        {"a": [1, {2}]},
        "x" * 10**6,
    ]

    @chz.chz
    class Strange(Sums):
        async def evaluate(self, task: Any) -> Any:
            return results[task.a]

        async def get_summary(self, results: Any) -> dict[str, Any]:
            return {"results": [result for _, result in results]}

    summary = await run(spec(Strange(n=len(results))))
    assert repr(summary["results"]) == repr(results)


async def test_strange_question_ids_and_errors_are_kept() -> None:
    """A question named in another script would break the queue."""
    names = ["", " ", "ünï", "日本語", "a'b\"c;--", "x" * 5000, "tab\tnew\nline"]

    @chz.chz
    class Named(Sums):
        async def get_tasks(self) -> Any:
            return [Sum(question_id=name, a=0) for name in names]

        async def evaluate(self, task: Any) -> Any:
            raise RolloutSystemError(task.question_id + "\x00 \ud800")

        async def get_full_summary(self, results: Any) -> dict[str, Any]:
            return {"names": [t.question_id for t, _ in results], "e": [str(e) for _, e in results]}

    summary = await run(spec(Named(), max_retries=0))
    assert summary["names"] == names
    assert summary["e"] == [name + "\x00 \ud800" for name in names]


def test_importing_the_library_is_quick() -> None:
    """Every command line of every eval would start late."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = str(REPOSITORY)

    def cpu(code: str) -> float:
        script = f"import resource\n{code}\nr=resource.getrusage(0)\nprint(r.ru_utime+r.ru_stime)"
        run_once = lambda: float(  # noqa: E731
            subprocess.run(
                [sys.executable, "-c", script], env=environment, capture_output=True, check=True
            ).stdout
        )
        return min(run_once() for _ in range(3))

    base = cpu("import chz, pydantic, structlog, tqdm")
    assert cpu("import nanoeval") < 1.7 * base


@chz.chz
class Stubborn(Sums):
    """Makes something of being cancelled: what `answer` says."""

    answer: str = "result"

    async def evaluate(self, task: Any) -> bool:
        if "SAMPLE_MENDED" in os.environ:
            return True
        try:
            await asyncio.sleep(0 if task.a < 4 else 60)
        except asyncio.CancelledError:
            if self.answer == "system error":
                raise RolloutSystemError("cancelled") from None
            if self.answer == "error":
                raise RuntimeError("cancelled") from None
            return False
        return True


@pytest.mark.parametrize("answer", ["result", "system error", "error"])
async def test_what_a_rollout_makes_of_being_stopped_is_no_result(
    answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was interrupted and resumed would have failures that no other run has."""
    eval = Stubborn(n=12, answer=answer)
    running = asyncio.create_task(
        run(spec(eval, run_set_id="stopped", max_retries=0, fail_on_error=False))
    )
    await asyncio.sleep(0.5)
    running.cancel()
    with pytest.raises(asyncio.CancelledError, match=None) as caught:
        await running
    assert "4 of 12 results are kept" in "".join(caught.value.__notes__)
    monkeypatch.setenv("SAMPLE_MENDED", "1")
    (summary,) = await resume("stopped")
    assert (summary["num_scored"], summary["accuracy"]) == (12, 1.0)


@chz.chz
class Computing(Sums):
    """Rollouts that never let go of the event loop."""

    async def evaluate(self, task: Any) -> bool:
        time.sleep(0.1)
        return True


async def test_a_run_whose_rollouts_compute_stops_after_the_one_at_work() -> None:
    """Ctrl-C would wait for all that had been started, minutes of them."""
    running = asyncio.create_task(run(spec(Computing(n=100), run_set_id="computing")))
    await asyncio.sleep(0.5)
    started_at = time.monotonic()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert time.monotonic() - started_at < 2
    (summary,) = await resume("computing")
    assert summary["num_scored"] == 100


class Speechless(RuntimeError):
    """Cannot even say what it is."""

    def __str__(self) -> str:
        raise KeyError("no message")


@pytest.mark.parametrize(
    "error",
    [
        RolloutSystemError("429", retry_after="Wed, 21 Oct 2026 07:28:00 GMT"),  # type: ignore[arg-type]
        RolloutSystemError("429", retry_after="0.01"),  # type: ignore[arg-type]
        RolloutSystemError("429", retry_after=float("nan")),
        Speechless(),
    ],
)
async def test_an_odd_error_is_an_outcome_like_any_other(error: Exception) -> None:
    """The rollout would be neither done nor failed, and its run would wait for it for ever."""
    summary = await asyncio.wait_for(
        run(
            spec(Raising(n=4, error=error), max_retries=1, retry_backoff=0.01, fail_on_error=False)
        ),
        timeout=20,
    )
    assert (summary["num_scored"], summary["num_failed"]) == (3, 1)


@chz.chz
class Raising(Sums):
    """Question 2 raises `error`, each time."""

    error: Exception = RuntimeError()

    async def evaluate(self, task: Any) -> bool:
        if task.a == 2:
            raise self.error
        return True


async def test_a_run_that_another_process_ended_is_not_finished(database_folder: Path) -> None:
    """A driver that slept while its run was resumed and interrupted elsewhere would call a third
    of the results the whole."""
    running = asyncio.create_task(run(spec(Stubborn(n=12), run_set_id="taken over")))
    await asyncio.sleep(0.5)
    with sqlite3.connect(database_folder / "taken over.db") as db:
        db.execute("UPDATE eval SET state = 'interrupted'")
    db.close()
    with pytest.raises(RuntimeError, match=r"4 of 12 rollouts done: another process .*interrupted"):
        await running
    with sqlite3.connect(database_folder / "taken over.db") as db:
        assert db.execute("SELECT state FROM eval").fetchone() == ("interrupted",)
    db.close()


async def test_a_run_after_a_cancellation_that_was_caught_does_its_work() -> None:
    """The last small eval of a program that was interrupted would wait for ever."""

    async def interrupted() -> dict[str, Any]:
        asyncio.get_running_loop().call_soon(asyncio.current_task().cancel)  # type: ignore[union-attr]
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            return await run(spec(Sums(n=4)))
        raise AssertionError("was not cancelled")

    summary = await asyncio.wait_for(asyncio.create_task(interrupted()), timeout=20)
    assert summary["num_scored"] == 4


class OneWay(Exception):
    """Can be pickled, but not be made again."""

    def __init__(self, message: str, *, response: int) -> None:
        super().__init__(message)


class Shy:
    """Whoever asks for its score, or how it looks, gets an error."""

    @property
    def score(self) -> float:
        raise KeyError("no score")

    def __repr__(self) -> str:
        raise KeyError("no looks")


@chz.chz
class Returning(Sums):
    """Question 2 returns `result`."""

    result: Any = None

    async def evaluate(self, task: Any) -> Any:
        return self.result if task.a == 2 else True

    async def get_summary(self, results: list[tuple[Any, Any]]) -> dict[str, Any]:
        return {"num_true": sum(result is True for _, result in results)}


async def test_a_result_that_cannot_be_read_again_is_named_and_can_be_mended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error would name neither the task nor a way out, with all rollouts paid for."""
    result = {"error": OneWay("x", response=1)}
    with pytest.raises(TypeError, match="result of task 'q2.1' was pickled, but cannot") as caught:
        await run(spec(Returning(n=4, result=result), run_set_id="one way"))
    assert "all results are kept" in "".join(caught.value.__notes__)
    monkeypatch.setattr(OneWay, "__init__", lambda self, message, *, response=0: None)
    (summary,) = await resume("one way")
    assert summary["num_true"] == 3


@pytest.mark.parametrize("result", [Shy(), {"score": 10**400}, {"text": 10**5000}])
async def test_a_result_without_a_preview_is_a_result(result: Any) -> None:
    """What is only shown would end the run."""
    assert (await run(spec(Returning(n=4, result=result))))["num_true"] == 3


class Unreachable(LibraryConfig):
    """Its messages reach nobody."""

    async def send_user_notification(self, message: str, extra: str | None = None) -> None:
        raise ConnectionError("no network")


async def test_a_notification_that_fails_changes_nothing_of_a_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A summary would be lost, or an error be replaced, for a message."""
    before = get_library_config()
    set_library_config(Unreachable())
    try:
        assert (await run(spec(Sums(n=4))))["num_scored"] == 4
        with pytest.raises(BaseExceptionGroup) as caught:
            await run(spec(Odd(what="exit"), concurrency=1))
        assert isinstance(caught.value.exceptions[0], GeneratorExit)
    finally:
        set_library_config(before)
    assert "a notification was not sent (ConnectionError: no network)" in capsys.readouterr().err


@chz.chz
class Tabular(Sums):
    """Summarizes by keys that are no strings."""

    async def get_summary(self, results: Any) -> dict[str, Any]:
        return {"by": {("a", 1): 0.5, 3: float("nan")}}


async def test_a_summary_of_any_keys_is_kept(database_folder: Path) -> None:
    """A run would fail at its very end, and again with each resume."""
    summary = await run(spec(Tabular(n=2), run_set_id="keys"))
    assert summary["by"]["a", 1] == 0.5
    db = sqlite3.connect(database_folder / "keys.db")
    (stored,) = db.execute("SELECT summary FROM eval").fetchone()
    assert 0.5 in json.loads(stored)["by"].values()
    db.close()


def test_a_question_id_that_cannot_be_stored_is_refused() -> None:
    """The run would end with an error that names nothing."""
    with pytest.raises(ValidationError, match="half of a character"):
        Task(question_id="smile \ud83d")


@pytest.mark.slow
@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
def test_a_run_does_without_stderr(stderr: str, database_folder: Path) -> None:
    """A run under cron would fail, or lose its summary when a log's disk is full."""
    code = (
        "import asyncio; from nanoeval import run; from tests.sample_evals import Sums, spec;"
        "print(asyncio.run(run(spec(Sums(n=4))))['num_scored'])"
    )
    done = subprocess.run(
        f'exec {sys.executable} -c "{code}" {stderr}',
        shell=True,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("4\n", 0)


class Mirroring(LibraryConfig):
    """Mirrors the bar, or fails to."""

    def __init__(self, bars: list[Any], fails: bool) -> None:
        self.bars, self.fails = bars, fails

    def get_slack_tqdm(self, username: str | None) -> Any:
        bars, fails = self.bars, self.fails

        class SlackBar(tqdm):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                bars.append(self)
                super().__init__(*args, **kwargs)

            def refresh(self, *args: Any, **kwargs: Any) -> None:
                if fails:
                    raise ConnectionError("no network")

        return SlackBar


@pytest.mark.parametrize("fails", [False, True])
async def test_a_class_of_bars_mirrors_the_bar_and_may_fail(
    fails: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hook asks for a class; a message that cannot be sent would end the run."""
    before, bars = get_library_config(), []  # type: ignore[var-annotated]
    set_library_config(Mirroring(bars, fails))
    try:
        summary = await run(spec(Sums(n=4), slack_name="me"))
    finally:
        set_library_config(before)
    assert summary["num_scored"] == 4
    ((bar,), told) = bars, capsys.readouterr().err
    assert (bar.total, bar.desc) == (4, "sums")
    assert ("get_slack_tqdm failed (ConnectionError: no network)" in told) == fails
    assert fails or bar.n == 4


async def test_what_is_no_spec_is_refused_by_name() -> None:
    """The error would be about an attribute that nobody wrote."""
    with pytest.raises(TypeError, match=r"run\(\) was given a Sums; it takes an EvalSpec"):
        await run(Sums())  # type: ignore[arg-type]

    async def main() -> None:
        raise AssertionError("was called")

    with pytest.raises(TypeError, match=r"takes a coroutine: nanoeval_entrypoint\(main\(\)\)"):
        nanoeval_entrypoint(main)  # type: ignore[arg-type]


async def test_why_rollouts_fail_again_and_again_is_told_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A bar that counts retries for ten minutes does not say that an address is mistyped."""
    error = RolloutSystemError("cannot reach\nhttp://nowhere")
    await run(spec(Raising(n=4, error=error), max_retries=4, retry_backoff=0.01))
    told = "task q2.1 failed 3 times, now with RolloutSystemError: cannot reach http://nowhere"
    assert capsys.readouterr().err.count(told) == 1


async def test_the_backup_of_a_run_that_failed_says_so(tmp_path: Path) -> None:
    """After a reboot it is all there is, and a failed run would look like a crashed one."""
    with pytest.raises(BaseExceptionGroup):
        await run(spec(Odd(what="exit"), concurrency=1, run_set_id="told", should_backup=True))
    db = sqlite3.connect(backup_path("told"))
    state, error = db.execute("SELECT state, error FROM eval").fetchone()
    db.close()
    assert (state, "GeneratorExit" in error) == ("failed", True)


async def test_verdicts_of_numpy_are_scores_while_the_run_goes_on(database_folder: Path) -> None:
    """The bar and the monitor would show none until the summary."""
    await run(spec(Returning(n=4, result=np.bool_(False)), run_set_id="numpy"))
    db = sqlite3.connect(database_folder / "numpy.db")
    assert db.execute("SELECT num_with_score, score_sum FROM eval").fetchone() == (4, 3.0)
    db.close()


@chz.chz
class Talkative(Sums):
    """Has much to say beside the engine's counts."""

    async def update_progress(self, partial_results: Any, pbar: Any) -> None:
        pbar.set_postfix(told="x" * 100, last="seen")


async def test_a_line_without_a_terminal_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """A log would lack what an eval has to say of its own run."""
    await run(spec(Talkative(n=4, seconds=1.2)))
    assert "last=seen" in capsys.readouterr().err
