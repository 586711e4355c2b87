"""What a recorder is. Knows the shapes only; recorders live in `json_recorder` and `recorder`."""

from __future__ import annotations

import uuid as _uuid
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, runtime_checkable

import chz
from pydantic import BaseModel

if TYPE_CHECKING:
    from nanoeval.eval import EvalSpec


def uuid() -> str:
    """A fresh identifier: 12 hexadecimal characters, random."""
    return _uuid.uuid4().hex[:12]


@runtime_checkable
class RunSpec(Protocol):
    """What identifies a run: its own id and the id of the run set (database) it belongs to."""

    run_id: str
    run_set_id: str


class BasicRunSpec(BaseModel):
    """The plain `RunSpec`."""

    run_id: str
    run_set_id: str


@runtime_checkable
class RecorderProtocol(Protocol):
    """Where the events of a run go.

    Every `record_*` method may be called from any thread and from the event loop, and must not
    block. Events belong to the rollout whose `as_default_recorder` block is active.
    """

    run_spec: RunSpec

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc_info: Any) -> None: ...

    def current_sample_id(self) -> str | None:
        """The question id of the active rollout, or None outside one."""

    def current_group_id(self) -> str | None:
        """`"{attempt_id}.{retry_idx}"` of the active rollout, or None outside one."""

    def as_default_recorder(
        self, sample_id: str, group_id: str, **extra: Any
    ) -> AbstractContextManager[None]:
        """Make this the recorder that `get_recorder()` finds, for one rollout."""
        ...

    def record_match(
        self,
        correct: bool,
        *,
        expected: Any = None,
        picked: Any = None,
        prob_correct: Any = None,
        **extra: Any,
    ) -> None:
        """Record a verdict."""

    def record_sampling(
        self,
        prompt: Any,
        sampled: Any,
        *,
        extra_allowed_metadata_fields: list[str] | None = None,
        **extra: Any,
    ) -> None:
        """Record one call of a model: what went in, what came out."""

    def record_sample_completed(self, **extra: Any) -> None:
        """Record that the rollout is over."""

    def record_error(self, msg: str, error: Exception | None, **kwargs: Any) -> None:
        """Record an error; it does not end the rollout."""

    def record_extra(self, data: Any) -> None:
        """Record anything else."""

    def record_final_report(self, final_report: Any) -> None:
        """Record the run's summary."""

    def evalboard_url(self, view: Literal["run", "monitor"]) -> str | None:
        """Where a person can look at the run, or None."""


@chz.chz
class RecorderConfig:
    """How to build a recorder; `RunnerArgs.recorder` holds one."""

    async def factory(self, spec: EvalSpec, num_tasks: int) -> RecorderProtocol:
        """Build the recorder of one run of `num_tasks` tasks."""
        raise NotImplementedError(f"{type(self).__name__} must define factory(spec, num_tasks)")

    def _make_default_run_spec(self, spec: EvalSpec) -> BasicRunSpec:
        return BasicRunSpec(run_id=uuid(), run_set_id=spec.runner.run_set_id or uuid())
