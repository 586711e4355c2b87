"""The rollout that recorded events belong to, which all our recorders share. Knows no recorder."""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import Any

from nanoeval.recorder_protocol import RecorderProtocol

current_recorder: ContextVar[RecorderProtocol] = ContextVar("nanoeval_recorder")
# When an event happened, where it is recorded later than that: seconds since the epoch.
event_time: ContextVar[float | None] = ContextVar("nanoeval_event_time", default=None)
_current_rollout: ContextVar[RolloutScope | None] = ContextVar("nanoeval_rollout", default=None)


class RolloutScope:
    """Inside the block, events of `recorder` belong to one rollout. Enter it once.

    A class and not a generator: it is entered for every rollout, and costs a tenth this way.
    """

    __slots__ = ("_recorder_token", "_rollout_token", "extra", "group_id", "recorder", "sample_id")

    def __init__(
        self, recorder: RecorderBase, sample_id: str, group_id: str, extra: dict[str, Any]
    ) -> None:
        self.recorder = recorder
        self.sample_id = sample_id
        self.group_id = group_id
        self.extra = extra
        self._rollout_token: Token[RolloutScope | None]
        self._recorder_token: Token[RecorderProtocol]

    def __enter__(self) -> None:
        self._rollout_token = _current_rollout.set(self)
        self._recorder_token = current_recorder.set(self.recorder)  # type: ignore[arg-type]

    def __exit__(self, *exc_info: Any) -> None:
        current_recorder.reset(self._recorder_token)
        _current_rollout.reset(self._rollout_token)


class RecorderBase:
    """The part of the recorder protocol that tells which rollout is active.

    Rollouts are told apart by context variables: tasks of one loop, and threads started with
    `asyncio.to_thread`, each see their own.
    """

    def current_rollout(self) -> RolloutScope | None:
        """The scope that is active here; None outside one, and inside one of another recorder."""
        scope = _current_rollout.get()
        return scope if scope is not None and scope.recorder is self else None

    def current_sample_id(self) -> str | None:
        """The question id of the active rollout, or None outside one."""
        scope = self.current_rollout()
        return (scope.sample_id or None) if scope else None

    def current_group_id(self) -> str | None:
        """`"{attempt_id}.{retry_idx}"` of the active rollout, or None outside one."""
        scope = self.current_rollout()
        return (scope.group_id or None) if scope else None

    def as_default_recorder(self, sample_id: str, group_id: str, **extra: Any) -> RolloutScope:
        """Make this the recorder of one rollout; `extra` is added to each event of the block."""
        return RolloutScope(self, sample_id, group_id, extra)
