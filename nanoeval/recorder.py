"""The recorder of the rollout at hand. Knows no particular recorder."""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import Token
from typing import Any, cast

from nanoeval._recorder_base import RolloutScope, current_recorder
from nanoeval.library_config import get_library_config
from nanoeval.recorder_protocol import RecorderConfig, RecorderProtocol

__all__ = ["RecorderProtocol", "dummy_recorder", "get_recorder", "set_default_recorder"]


def get_recorder() -> RecorderProtocol:
    """The recorder of the rollout that the calling code belongs to.

    Raises LookupError outside a rollout.
    """
    try:
        return current_recorder.get()
    except LookupError:
        raise LookupError(
            "there is no current recorder: get_recorder() works inside evaluate() and _context();"
            " elsewhere use `with set_default_recorder(rec, sample_id, group_id):`"
        ) from None


def set_default_recorder(
    rec: RecorderProtocol, sample_id: str, group_id: str
) -> AbstractContextManager[None]:
    """Make `rec` the one that `get_recorder()` finds inside the block.

    `sample_id` is the question id, `group_id` is `"{attempt_id}.{retry_idx}"`.
    """
    context = get_library_config().set_recorder_context(rec, sample_id, group_id)
    # Our own recorders' scope sees to it alone.
    if type(context) is RolloutScope and cast(RecorderProtocol, context.recorder) is rec:
        return context
    return _Current(rec, context)


class _Current:
    """A recorder's own context, with that recorder the current one inside."""

    def __init__(self, rec: RecorderProtocol, context: AbstractContextManager[Any]) -> None:
        self._recorder = rec
        self._context = context
        self._token: Token[RecorderProtocol]

    def __enter__(self) -> None:
        self._token = current_recorder.set(self._recorder)
        try:
            self._context.__enter__()
        except BaseException:
            current_recorder.reset(self._token)
            raise

    def __exit__(self, *exc_info: Any) -> bool | None:
        try:
            return self._context.__exit__(*exc_info)
        finally:
            current_recorder.reset(self._token)


def dummy_recorder(log: bool = True) -> RecorderConfig:
    """A recorder that keeps nothing; with `log`, samplings are logged at INFO."""
    return get_library_config().get_dummy_recorder(log)
