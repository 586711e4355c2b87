"""How much a rollout may do: actions, tokens, seconds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import chz

from nanoeval.eval import RolloutSystemError
from nanoeval.solvers.computer_tasks.pausable_timer import PausableTimer

# Seconds that must be left of a sample's time for what lies between its phases.
_SPARE_SECONDS = 10


class ActionLimitExceededError(Exception):
    """A rollout took one action more than it may."""


class SystemErrorDetected(RolloutSystemError):
    """A tool found that the system, not the model, broke the rollout."""

    def __init__(self, name: str = "", text: str = "") -> None:
        super().__init__(name, text)
        self.name = name
        self.text = text

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


@chz.chz
class LimitsHelper:
    """The limits of one rollout, in actions, tokens and seconds."""

    max_actions: int = chz.field(default=100, doc="Actions an agent may take.")
    max_time_seconds: float = chz.field(default=3600, doc="Seconds for an agent's work.")
    grading_timeout: float = chz.field(default=600, doc="Seconds for one grading.")
    exception_handling_timeout: float = chz.field(
        default=600, doc="Seconds for what follows an agent's time-out, before grading."
    )
    total_sample_timeout: float = chz.field(
        default=3600 * 4, doc="Seconds for a whole rollout, start and grading included."
    )
    validate_connection_limit: float = chz.field(
        default=60 * 5, doc="Seconds for a started computer to answer its first command."
    )
    max_tokens: int | None = chz.field(
        default=None, doc="Prompt and completion tokens of all calls together; None = no limit."
    )

    @chz.validate
    def _check_values(self) -> None:
        for name in (
            "max_time_seconds",
            "grading_timeout",
            "exception_handling_timeout",
            "total_sample_timeout",
            "validate_connection_limit",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 seconds")
        if self.max_actions < 0:
            raise ValueError(f"max_actions={self.max_actions} must be at least 0")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1, or None")
        needed = self.max_time_seconds + self.exception_handling_timeout + _SPARE_SECONDS
        if needed > self.total_sample_timeout:
            raise ValueError(
                f"total_sample_timeout={self.total_sample_timeout} must be at least"
                f" max_time_seconds + exception_handling_timeout + {_SPARE_SECONDS} = {needed}"
            )

    @asynccontextmanager
    async def enforce_timeout(
        self, timeout_type: str, timeout_seconds: float
    ) -> AsyncIterator[PausableTimer]:
        """Raise NamedTimeoutError when the block takes longer. Pauses do not count."""
        async with PausableTimer(timeout_type, timeout_seconds) as timer:
            yield timer

    @asynccontextmanager
    async def enforce_rollout_limits(self) -> AsyncIterator[Callable[[], None]]:
        """Yield a function to call before each action.

        Call `max_actions + 1` raises ActionLimitExceededError. The block raises NamedTimeoutError
        ("max_time") when it takes longer than `max_time_seconds`.
        """
        n_actions = 0

        def count_action() -> None:
            nonlocal n_actions
            n_actions += 1
            if n_actions > self.max_actions:
                raise ActionLimitExceededError(f"Exceeded max actions = {self.max_actions}")

        async with self.enforce_timeout("max_time", self.max_time_seconds):
            yield count_action
