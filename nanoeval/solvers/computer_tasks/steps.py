"""What a solver yields: a `Step` after each action, one `FinalResult` at the end.

Both are versioned, so that data of older versions still loads.
"""

from __future__ import annotations

import traceback as _traceback
from abc import ABC
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, SerializeAsAny, model_validator

from nanoeval.solvers.computer_tasks.task import Grade

# Turns the values of version n into those of version n + 1.
Migration = Callable[[dict[str, Any]], dict[str, Any]]


class VersionedModel(BaseModel):
    """A model whose older data is migrated, one version at a time, as it is read."""

    schema_version: int = 1
    _migrations: ClassVar[dict[int, Migration]] = {}

    @model_validator(mode="before")
    @classmethod
    def _migrate(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        current = cls.model_fields["schema_version"].default
        # Version 0 is recognized by its field where it did not write its number.
        version = data.get("schema_version", 0 if "correct" in data else current)
        if not isinstance(version, int) or not 0 <= version <= current:
            raise ValueError(
                f"{cls.__name__} has schema_version={version!r}, this nanoeval knows 0 to"
                f" {current}; read it with the version that wrote it, or a newer one"
            )
        values = dict(data)
        for number in range(version, current):
            values = cls._migrations[number](values)
        values["schema_version"] = current
        return values


class Conversation(BaseModel):
    """Chat messages in OpenAI's form, oldest first; what our agents put into `convo`."""

    messages: list[dict[str, Any]]
    metadata: dict[str, Any] = {}


def _grade_from_log(log_field: str) -> Migration:
    def migrate(values: dict[str, Any]) -> dict[str, Any]:
        correct, log = values.pop("correct", False), values.pop(log_field, None)
        values["grade"] = Grade(score=1 if correct else 0, grader_log=log or "")
        return values

    return migrate


def _step_from_0(values: dict[str, Any]) -> dict[str, Any]:
    is_graded = bool(values.get("autograder_result") or values.get("correct"))
    values = _grade_from_log("autograder_result")(values)
    return values if is_graded else {**values, "grade": None}


class Step(VersionedModel):
    """The conversation so far, `elapsed` since the rollout began. Subclass it to add fields.

    `grade` is None where the step was not graded.
    """

    _migrations: ClassVar[dict[int, Migration]] = {0: _step_from_0}

    convo: Any
    grade: SerializeAsAny[Grade] | None
    elapsed: timedelta
    type: Literal["step"] = "step"

    @property
    def correct(self) -> bool:
        """Whether the grade is full marks."""
        return self.grade is not None and self.grade.score == 1


class FinalResult(VersionedModel, ABC):
    """How a rollout ended: its grade, the whole conversation, and which limits it ran into."""

    _migrations: ClassVar[dict[int, Migration]] = {0: _grade_from_log("grader_log")}

    grade: SerializeAsAny[Grade]
    convo: Any = None
    finish_status: Literal["finished-successfully"] = "finished-successfully"
    max_steps_reached: bool = False
    max_tokens_reached: bool = False
    max_time_reached: bool = False
    type: Literal["final_result_successful"] = "final_result_successful"

    @property
    def correct(self) -> bool:
        """Whether the grade is full marks."""
        return self.grade.score == 1


FinalResultSuccessful = FinalResult


class FinalResultWithException(VersionedModel):
    """An outdated way to say that a rollout broke; `PythonCodingEval` refuses it.

    Raise `nanoeval.RolloutSystemError` instead, and the rollout is retried.
    """

    _migrations: ClassVar[dict[int, Migration]] = {0: _grade_from_log("grader_log")}

    grade: SerializeAsAny[Grade]
    convo: Any = None
    finish_status: str
    exception: str
    traceback: str
    type: Literal["final_result_exception"] = "final_result_exception"

    @property
    def correct(self) -> bool:
        """Whether the grade is full marks."""
        return self.grade.score == 1

    @staticmethod
    def from_exception(
        e: BaseException, convo: Any | None, traceback_notes: str = ""
    ) -> FinalResultWithException:
        """A result of score 0 that describes `e`."""
        is_timeout = isinstance(e, TimeoutError)
        return FinalResultWithException(
            grade=Grade(score=0, grader_log=""),
            convo=convo,
            finish_status="error-timeout" if is_timeout else "error-other",
            exception=type(e).__name__,
            traceback="".join(_traceback.format_exception(e)) + traceback_notes,
        )
