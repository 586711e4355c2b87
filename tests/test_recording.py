"""Recorders: what is recorded, whom it belongs to, and what happens when the disk does not play."""

from __future__ import annotations

import asyncio
import datetime
import enum
import json
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chz
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from nanoeval._jsonl import encode_line
from nanoeval._line_writer import LineWriter
from nanoeval.eval import Eval, EvalSpec, RunnerArgs, Task
from nanoeval.json_recorder import JsonRecorder, JsonRecorderConfig, json_recorder
from nanoeval.recorder import dummy_recorder, get_recorder, set_default_recorder
from nanoeval.recorder_protocol import BasicRunSpec, RecorderProtocol

RUN_SPEC = BasicRunSpec(run_id="run-1", run_set_id="set-1")


@chz.chz
class OneQuestion(Eval[Task, bool]):
    def get_name(self) -> str:
        return "one question / of many"


def spec(**runner: Any) -> EvalSpec:
    return EvalSpec(eval=OneQuestion(), runner=RunnerArgs(run_set_id="set-1", **runner))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file; fails on half a line."""
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


@pytest.fixture
def json_file(tmp_path: Path) -> Path:
    return tmp_path / "records" / "events.jsonl"


@pytest.fixture
def recorder(json_file: Path) -> Iterator[JsonRecorder]:
    with JsonRecorder(RUN_SPEC, json_file) as opened:
        yield opened


# What every recorder promises: the contract suite runs on each.


@pytest.fixture(params=["json", "dummy"])
async def any_recorder(request: pytest.FixtureRequest, json_file: Path) -> RecorderProtocol:
    config = (
        JsonRecorderConfig(filename=json_file)
        if request.param == "json"
        else dummy_recorder(log=False)
    )
    return await config.factory(spec(), 1)


async def test_recorders_keep_the_protocol(any_recorder: RecorderProtocol) -> None:
    """Code that was written against the protocol would meet a missing method."""
    assert isinstance(any_recorder, RecorderProtocol)
    assert any_recorder.run_spec.run_set_id == "set-1"
    assert any_recorder.run_spec.run_id
    assert any_recorder.evalboard_url("run") is None
    with any_recorder as entered:
        assert entered is any_recorder


async def test_get_recorder_finds_the_recorder_of_the_rollout(
    any_recorder: RecorderProtocol,
) -> None:
    """Events of an evaluate() would go nowhere, or to another run."""
    with set_default_recorder(any_recorder, "q1", "2.1"):
        assert get_recorder() is any_recorder
        assert any_recorder.current_sample_id() == "q1"
        assert any_recorder.current_group_id() == "2.1"
    assert any_recorder.current_sample_id() is None
    assert any_recorder.current_group_id() is None
    with pytest.raises(LookupError, match="set_default_recorder"):
        get_recorder()


async def test_as_default_recorder_alone_makes_get_recorder_work(
    any_recorder: RecorderProtocol,
) -> None:
    """A test of an evaluate() that uses the protocol's own method would find no recorder."""
    with any_recorder.as_default_recorder("q1", "1.0"):
        assert get_recorder() is any_recorder


async def test_rollouts_in_flight_do_not_see_each_other(any_recorder: RecorderProtocol) -> None:
    """With two rollouts in one loop, the last one to start would own the events of both."""

    async def rollout(name: str) -> list[str | None]:
        with set_default_recorder(any_recorder, name, f"{name}.0"):
            await asyncio.sleep(0.001)
            here = [get_recorder().current_sample_id(), get_recorder().current_group_id()]
            there = await asyncio.to_thread(lambda: get_recorder().current_sample_id())
            return [*here, there]

    seen = await asyncio.gather(*(rollout(f"q{i}") for i in range(20)))
    assert seen == [[f"q{i}", f"q{i}.0", f"q{i}"] for i in range(20)]


async def test_a_run_within_a_rollout_has_its_own_ids(any_recorder: RecorderProtocol) -> None:
    """A final report of an inner run would carry the outer rollout's question."""
    inner = await dummy_recorder(log=False).factory(spec(), 1)
    with set_default_recorder(any_recorder, "outer", "1.0"):
        assert inner.current_sample_id() is None
        with set_default_recorder(inner, "inner", "1.0"):
            assert get_recorder() is inner
        assert get_recorder() is any_recorder
        assert any_recorder.current_sample_id() == "outer"


async def test_an_error_inside_leaves_no_recorder_behind(any_recorder: RecorderProtocol) -> None:
    """The next rollout of the same task would record into the failed one."""
    with pytest.raises(ZeroDivisionError), set_default_recorder(any_recorder, "q1", "1.0"):
        _ = 1 / 0
    with pytest.raises(LookupError):
        get_recorder()


async def test_dummy_recorder_logs_samplings_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    """NANOEVAL_LOG_ALL would show nothing of what a model said, or always all of it."""
    caplog.set_level(logging.INFO)
    silent = await dummy_recorder(log=False).factory(spec(), 1)
    silent.record_sampling("2+2?", "secret")
    logging_one = await dummy_recorder().factory(spec(), 1)
    logging_one.record_sampling("2+2?", "four")
    assert "four" in caplog.text
    assert "secret" not in caplog.text


# What the JSON recorder writes.


def test_each_event_is_one_line_with_its_ids(recorder: JsonRecorder, json_file: Path) -> None:
    """Readers that follow the documented fields would find other ones, or null ids."""
    with set_default_recorder(recorder, "q1", "1.0"):
        recorder.record_sampling([{"role": "user", "content": "2+2?"}], "4", tokens=7)
        recorder.record_match(True, expected="4", picked="4", prob_correct=0.5, subject="sums")
        recorder.record_extra({"note": "fine"})
        recorder.record_error("no luck", ValueError("bad"), url="http://x")
        recorder.record_sample_completed(seconds=1.5)
    recorder.record_final_report({"accuracy": 1.0})
    recorder.__exit__()
    lines = read_lines(json_file)
    for line in lines:
        stamp = datetime.datetime.fromisoformat(line.pop("timestamp"))
        assert abs((datetime.datetime.now(datetime.UTC) - stamp).total_seconds()) < 60
    ids = {"sample_id": "q1", "group_id": "1.0"}
    error = lines.pop(3)
    assert "ValueError: bad" in error.pop("traceback")
    assert error == {
        "record_type": "error",
        **ids,
        "message": "no luck",
        "error": "bad",
        "error_type": "ValueError",
        "url": "http://x",
    }
    verdict = {"correct": True, "expected": "4", "picked": "4", "prob_correct": 0.5}
    assert lines == [
        {
            "record_type": "sampling",
            **ids,
            "prompt": [{"role": "user", "content": "2+2?"}],
            "sampled": "4",
            "tokens": 7,
        },
        {"record_type": "match", **ids, **verdict, "subject": "sums"},
        {"record_type": "extra", **ids, "data": {"note": "fine"}},
        {"record_type": "sample_completed", **ids, "status": "completed", "seconds": 1.5},
        {
            "record_type": "final_report",
            "sample_id": None,
            "group_id": None,
            "final_report": {"accuracy": 1.0},
        },
    ]
    recorder.__enter__()


def test_extra_fields_never_hide_the_documented_ones(
    recorder: JsonRecorder, json_file: Path
) -> None:
    """A caller's `timestamp` or `sample_id` field would make its line unfindable."""
    with recorder.as_default_recorder("q1", "1.0", host="a", sample_id2="b"):
        recorder.record_match(False, sample_id="mine", record_type="mine", host="c")
    recorder._writer.flush()
    (line,) = read_lines(json_file)
    assert line["sample_id"] == "q1"
    assert line["record_type"] == "match"
    assert line["extra_sample_id"] == line["extra_record_type"] == "mine"
    assert line["host"] == "a"
    assert line["sample_id2"] == "b"
    assert line["extra_host"] == "c"


def test_a_value_changed_after_the_call_is_recorded_as_it_was(
    recorder: JsonRecorder, json_file: Path
) -> None:
    """Agents append to one conversation; each record would show its end."""
    conversation = [{"role": "user", "content": "hello"}]
    recorder.record_sampling(conversation, "hi")
    conversation.append({"role": "assistant", "content": "hi"})
    recorder.record_sampling(conversation, "bye")
    recorder._writer.flush()
    assert [len(line["prompt"]) for line in read_lines(json_file)] == [1, 2]


class Colour(enum.Enum):
    RED = "red"


class Answer(BaseModel):
    picked: set[int]
    at: datetime.datetime


@dataclass
class Point:
    x: float
    raw: bytes


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


LOOP: list[Any] = []
LOOP.append(LOOP)
NOON = datetime.datetime(2030, 1, 2, 12, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), None),
        ([1.5, float("inf")], [1.5, None]),
        (np.float64("nan"), None),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array([[1.0, np.nan]]), [[1.0, None]]),
        ({3, 1, 2}, [1, 2, 3]),
        (frozenset({"b", "a"}), ["a", "b"]),
        (b"text", "text"),
        (b"\xff\x00", "data:application/octet-stream;base64,/wA="),
        (NOON, "2030-01-02T12:00:00+00:00"),
        (datetime.timedelta(minutes=2), 120.0),
        (Colour.RED, "red"),
        (ValueError("bad"), {"type": "ValueError", "message": "bad"}),
        (Answer(picked={1}, at=NOON), {"picked": [1], "at": "2030-01-02T12:00:00+00:00"}),
        (Point(float("nan"), b"x"), {"x": None, "raw": "x"}),
        ({1: "a", (1, 2): "b", None: "c"}, {"1": "a", "(1, 2)": "b", "null": "c"}),
        (Path("/a/b"), "/a/b"),
        ("line\nbreak\u2028and\x85more", "line\nbreak\u2028and\x85more"),
        ("lone \udcff surrogate", "lone \udcff surrogate"),
        (Hostile(), "<Hostile, which cannot be shown: RuntimeError>"),
        (LOOP, ["<list, which holds itself or is nested too deep>"]),
        (RunnerArgs, repr(RunnerArgs)),
        (-(10**5000), hex(-(10**5000))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_value_becomes_strict_json(value: Any, expected: Any) -> None:
    """One odd value in a prompt would end the rollout, or make the file unreadable."""
    line = encode_line({"value": value})
    assert line.count(b"\n") == 1
    assert len(line.decode().splitlines()) == 1
    assert json.loads(line, parse_constant=pytest.fail) == {"value": expected}


def test_chz_objects_are_recorded_by_field() -> None:
    """An eval's configuration would show as an address."""
    recorded = json.loads(encode_line({"value": RunnerArgs(n_tasks=3)}))["value"]
    assert recorded["n_tasks"] == 3
    assert recorded["max_retries"] == 16


python_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.dates(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner)
        | st.dictionaries(st.integers() | st.text() | st.none() | st.floats(), inner)
    ),
    max_leaves=10,
)


@settings(max_examples=150, deadline=None)
@given(python_values)
def test_every_record_is_one_line(value: Any) -> None:
    """A line break inside a record would cut it, and its neighbour, for every reader."""
    line = encode_line({"value": value}).decode()
    assert line.endswith("\n")
    assert len(line.splitlines()) == 1
    json.loads(line, parse_constant=pytest.fail)


# Many writers, one file.


def record_from_process(recorder: JsonRecorder, name: str, count: int) -> None:
    """What a worker process does with its copy of the recorder."""
    with recorder:
        for index in range(count):
            with set_default_recorder(recorder, f"{name}-{index}", "1.0"):
                recorder.record_sampling("x" * (index % 5000), name)


@pytest.mark.slow
def test_threads_and_processes_share_one_file(json_file: Path) -> None:
    """Lines of several writers would run into each other, or overwrite each other."""
    recorder = JsonRecorder(RUN_SPEC, json_file)
    spawn = multiprocessing.get_context("spawn")
    workers: list[Any] = [
        spawn.Process(target=record_from_process, args=(recorder, f"process{n}", 2000))
        for n in range(2)
    ]
    workers += [
        threading.Thread(target=record_from_process, args=(recorder, f"thread{n}", 2000))
        for n in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    recorder._writer.close()
    lines = read_lines(json_file)
    names = [f"{kind}-{i}" for kind in names_of_writers() for i in range(2000)]
    assert sorted(line["sample_id"] for line in lines) == sorted(names)


def names_of_writers() -> list[str]:
    return ["process0", "process1", "thread0", "thread1", "thread2"]


def test_a_copy_keeps_the_ids_and_appends(recorder: JsonRecorder, json_file: Path) -> None:
    """A resumed run, or a worker process, would start a file of its own or write over ours."""
    recorder.record_extra(1)
    recorder._writer.flush()
    with pickle.loads(pickle.dumps(recorder)) as copy:
        assert copy.run_spec == RUN_SPEC
        copy.record_extra(2)
    assert [line["data"] for line in read_lines(json_file)] == [1, 2]


def test_half_a_line_of_a_killed_process_spoils_no_other(json_file: Path) -> None:
    """What was being written when a process was killed would swallow the next record."""
    json_file.parent.mkdir()
    json_file.write_text('{"data": 1}\n{"data": "cut of')
    with JsonRecorder(RUN_SPEC, json_file) as recorder:
        recorder.record_extra(2)
    first, cut, last = json_file.read_text().splitlines()
    assert json.loads(first) == {"data": 1}
    assert cut.startswith('{"data": "cut')
    assert json.loads(last)["data"] == 2


def test_a_recorder_works_again_after_its_block(recorder: JsonRecorder, json_file: Path) -> None:
    """Two runs that share a recorder, or an event after the block, would be lost."""
    for index in range(3):
        with recorder:
            recorder.record_extra(index)
    recorder.__exit__()
    recorder.record_extra("late")
    recorder._writer.close()
    assert [line["data"] for line in read_lines(json_file)] == [0, 1, 2, "late"]
    recorder.__enter__()


def run_python(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *args],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


NEVER_CLOSED = """
import sys
from nanoeval.json_recorder import JsonRecorder
from nanoeval.recorder_protocol import BasicRunSpec
recorder = JsonRecorder(BasicRunSpec(run_id="r", run_set_id="s"), sys.argv[1])
recorder.record_extra("kept")
"""


def test_events_are_written_when_the_interpreter_exits(json_file: Path) -> None:
    """A worker process that ends without leaving the block would lose its last events."""
    done = run_python(NEVER_CLOSED, str(json_file))
    assert done.stderr == ""
    assert [line["data"] for line in read_lines(json_file)] == ["kept"]


FORKED = """
import os, sys, time, warnings
warnings.simplefilter("ignore")
from nanoeval.json_recorder import JsonRecorder
from nanoeval.recorder_protocol import BasicRunSpec
with JsonRecorder(BasicRunSpec(run_id="r", run_set_id="s"), sys.argv[1]) as recorder:
    recorder.record_extra("parent")
    child = os.fork()
    if child == 0:
        recorder.record_extra("child")
        recorder._writer.close()
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_a_forked_child_records_its_own_events_only(json_file: Path) -> None:
    """A library that forks would write the parent's waiting lines twice, or never its own."""
    assert run_python(FORKED, str(json_file)).stderr == ""
    assert sorted(line["data"] for line in read_lines(json_file)) == ["child", "parent"]


# A disk that does not play.


def test_recording_never_waits_for_the_disk(tmp_path: Path) -> None:
    """A slow network disk would block the event loop, and with it every rollout."""
    pipe = tmp_path / "events.jsonl"
    os.mkfifo(pipe)
    recorder = JsonRecorder(RUN_SPEC, pipe)
    started = time.monotonic()
    for _ in range(200):
        recorder.record_extra("x" * 10_000)  # 2 MB; a pipe takes 64 KiB
    assert time.monotonic() - started < 1
    seen = bytearray()
    with pipe.open("rb") as reader:
        while seen.count(b"\n") < 200:
            seen += os.read(reader.fileno(), 1 << 20)
        recorder._writer.close()
    assert {len(json.loads(line)["data"]) for line in seen.splitlines()} == {10_000}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full (Linux)")
def test_a_full_disk_is_one_error_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The run would hang, raise away its results, or lose events without a word."""
    with JsonRecorder(RUN_SPEC, "/dev/full") as recorder:
        for _ in range(5):
            recorder.record_extra("lost")
            recorder._writer.flush()
    first, last = [record.getMessage() for record in caplog.records]
    assert first.startswith("events cannot be recorded in /dev/full: No space left on device")
    assert last.startswith("5 events could not be recorded in /dev/full")


DISK_FILLS_UP = """
import json, logging, resource, sys
from nanoeval._line_writer import LineWriter
from pathlib import Path
logging.basicConfig()
writer = LineWriter(Path(sys.argv[1]))
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
for index in range(40):
    writer.add(json.dumps({"index": index, "text": "x" * 50}).encode() + b"\\n")
writer.flush()
print(Path(sys.argv[1]).stat().st_size)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
writer.close()
"""


def test_events_kept_while_the_disk_is_full_are_written_later(json_file: Path) -> None:
    """Space made in time would not save the events, or write some of them twice."""
    done = run_python(DISK_FILLS_UP, str(json_file))
    assert done.stdout == "1000\n"
    assert "recorded again" in done.stderr
    indexes = []
    n_cut = 0
    for line in json_file.read_text().splitlines():
        try:
            indexes.append(json.loads(line)["index"])
        except json.JSONDecodeError:
            n_cut += 1
    assert indexes == list(range(40))
    assert n_cut == 1  # what fitted into the last bytes


def test_events_kept_in_memory_are_bounded(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that stays full would take the machine's memory too."""
    monkeypatch.setattr("nanoeval._line_writer.MAX_KEPT_BYTES", 1000)
    writer = LineWriter(Path("/dev/full"))
    for _ in range(100):
        writer.add(b"x" * 99 + b"\n")
    writer.flush()
    assert sum(map(len, writer._lines)) <= 1000
    writer.close()
    assert "100 events could not be recorded" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("folder", ["a-file/records", "/proc/nanoeval-records"])
async def test_a_folder_that_cannot_be_written_is_told_before_the_run(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of rollouts would go by before anybody knew that nothing was recorded."""
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("NANOEVAL_LOG_DIR", str(tmp_path / folder))
    with pytest.raises(OSError, match="set NANOEVAL_LOG_DIR to a folder") as raised:
        await json_recorder().factory(spec(), 1)
    assert str(tmp_path / folder) in str(raised.value)
    with (
        pytest.raises(OSError, match="events cannot be recorded"),
        JsonRecorder(RUN_SPEC, tmp_path / folder / "x.jsonl"),
    ):
        pytest.fail("the block was entered")


# Which file.


async def test_a_run_gets_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs started in the same second would mix their events."""
    monkeypatch.setenv("NANOEVAL_LOG_DIR", str(tmp_path))
    recorders = [await json_recorder().factory(spec(model_name="m"), 7) for _ in range(2)]
    files = []
    for recorder in recorders:
        assert isinstance(recorder, JsonRecorder)
        recorder._writer.close()
        files.append(recorder.filename)
    assert files[0] != files[1]
    assert {file.parent for file in files} == {tmp_path}
    (line,) = read_lines(files[0])
    assert line["record_type"] == "run_started"
    assert line["run_spec"] == {"run_id": recorders[0].run_spec.run_id, "run_set_id": "set-1"}
    assert line["eval_name"] == "one question / of many"
    assert line["model_name"] == "m"
    assert line["num_tasks"] == 7


async def test_records_go_to_a_folder_beside_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed from a wheel, records would go into site-packages."""
    monkeypatch.delenv("NANOEVAL_LOG_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    recorder = await json_recorder().factory(spec(), 1)
    assert isinstance(recorder, JsonRecorder)
    recorder._writer.close()
    assert recorder.filename.parent == tmp_path / "records"


async def test_a_chosen_file_is_appended_to(json_file: Path) -> None:
    """Recording a second run into one file would delete the first."""
    for config in (JsonRecorderConfig(filename=json_file), json_recorder(json_file)):
        recorder = await config.factory(spec(), 1)
        assert isinstance(recorder, JsonRecorder)
        recorder._writer.close()
    assert [line["record_type"] for line in read_lines(json_file)] == ["run_started"] * 2


def test_lines_appear_within_a_moment(recorder: JsonRecorder, json_file: Path) -> None:
    """Somebody who watches a stuck rollout would not see its last event."""
    recorder.record_extra("now")
    wait_for(lambda: json_file.stat().st_size > 0)
    assert read_lines(json_file)[0]["data"] == "now"


def wait_for(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "prompt",
    [
        [{"role": "user", "content": 'é\u2028"x"'}],
        [{"role": "user", "content": "a"}, {"content": "b", "role": "assistant"}] * 2,
        [{"role": "user", "content": "long" * 2_000}],
        [{"role": "user", "content": "a", "name": "Ann"}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        [{"role": "tool", "content": None}],
        [{"role": "user", "content": "\ud800"}],
        [{1: "user", "content": "a"}],
        ["user"],
        [],
        "text",
    ],
)
def test_prompts_are_recorded_as_they_are(prompt: Any) -> None:
    """What is encoded once for all its shots would lose or mix up messages."""
    record = {"sample_id": "q", "prompt": prompt, "sampled": "s"}
    line = encode_line(record)
    assert json.loads(line) == json.loads(json.dumps(record))
    assert len(line.decode().splitlines()) == 1
