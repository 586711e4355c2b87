"""The hooks of library_config: their defaults, and that an override is what happens."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import pytest

from nanoeval._dummy_recorder import DummyRecorder, DummyRecorderConfig
from nanoeval.json_recorder import JsonRecorderConfig
from nanoeval.library_config import LibraryConfig, get_library_config, set_library_config
from nanoeval.recorder import dummy_recorder, get_recorder, set_default_recorder
from nanoeval.recorder_protocol import BasicRunSpec, RecorderConfig, RecorderProtocol, RunSpec, uuid

RUN_SPEC = BasicRunSpec(run_id="run-1", run_set_id="set-1")


@pytest.fixture(autouse=True)
def default_hooks() -> Iterator[None]:
    yield
    set_library_config(LibraryConfig())


async def test_without_an_integration_all_is_silent(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everybody who configured nothing would read warnings about it at every run."""
    caplog.set_level(logging.DEBUG)
    hooks = get_library_config()
    await hooks.send_user_notification("started", extra="details")
    assert hooks.get_slack_tqdm("somebody") is None
    assert caplog.records == []
    assert capsys.readouterr() == ("", "")


def test_recorders_by_default() -> None:
    """Runs that name no recorder would record nothing, or the dummy one would write files."""
    assert isinstance(get_library_config().get_default_recorder(), JsonRecorderConfig)
    assert isinstance(dummy_recorder(), DummyRecorderConfig)


def test_hooks_in_force_are_those_that_were_set() -> None:
    """An organization's hooks would not be called."""

    class Hooks(LibraryConfig):
        def get_dummy_recorder(self, log: bool) -> RecorderConfig:
            return RecorderConfig()

    hooks = Hooks()
    set_library_config(hooks)
    assert get_library_config() is hooks
    assert type(dummy_recorder()) is RecorderConfig


def test_a_class_in_place_of_an_instance_is_named() -> None:
    """The mistake would show as a missing argument deep inside a run."""
    with pytest.raises(TypeError, match="pass an instance of a subclass, not the class"):
        set_library_config(LibraryConfig)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs a LibraryConfig"):
        set_library_config(object())  # type: ignore[arg-type]


def test_an_overridden_recorder_context_surrounds_each_rollout() -> None:
    """An organization's tracing would miss the rollouts, or replace the recorder's ids."""
    seen: list[Any] = []

    class Hooks(LibraryConfig):
        @contextmanager
        def set_recorder_context(
            self, rec: RecorderProtocol, sample_id: str, group_id: str
        ) -> Iterator[None]:
            seen.append((sample_id, group_id, get_recorder() is rec))
            with super().set_recorder_context(rec, sample_id, group_id):
                yield
            seen.append("left")

    set_library_config(Hooks())
    recorder = DummyRecorder(RUN_SPEC)
    with set_default_recorder(recorder, "q1", "1.0"):
        assert recorder.current_sample_id() == "q1"
    assert seen == [("q1", "1.0", True), "left"]


def test_a_recorder_context_that_fails_leaves_nothing_behind() -> None:
    """Code after a failed hook would record into a rollout that never began."""

    class Hooks(LibraryConfig):
        @contextmanager
        def set_recorder_context(
            self, rec: RecorderProtocol, sample_id: str, group_id: str
        ) -> Iterator[None]:
            raise ConnectionError("tracing is down")
            yield

    set_library_config(Hooks())
    with (
        pytest.raises(ConnectionError, match="tracing is down"),
        set_default_recorder(DummyRecorder(RUN_SPEC), "q1", "1.0"),
    ):
        pytest.fail("the block was entered")
    with pytest.raises(LookupError):
        get_recorder()


def test_default_metrics_are_computed() -> None:
    """The hook that all bundled evals call would give nothing."""
    samples = pd.DataFrame({"instance": ["a", "b"], "attempt": [0, 0], "answer_group_id": [0, 1]})
    groups = pd.DataFrame(
        {"instance": ["a", "b"], "answer_group_id": [0, 1], "is_correct": [True, False]}
    )
    assert get_library_config().compute_default_metrics(samples, groups)["accuracy"] == 0.5


def test_run_specs_keep_their_protocol() -> None:
    """A user's own run spec would be refused, or two runs would get the same id."""
    assert isinstance(RUN_SPEC, RunSpec)
    assert len({uuid() for _ in range(1000)}) == 1000
