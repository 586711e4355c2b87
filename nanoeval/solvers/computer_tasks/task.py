"""A task on a computer: what to ask, how to set up, how to grade. Knows no solver."""

from __future__ import annotations

import functools
import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from nanoeval.eval import Task
from nanoeval.solvers.computer_tasks.code_execution_interface import (
    ComputerConfiguration,
    ComputerInterface,
    JupyterComputerInterface,
    RuntimeConfig,
    valid_ipython_code,
)

_CLASS_KEY, _MODULE_KEY = "__class_name__", "__module_name__"
_DEFAULT_RETRY_MESSAGE = (
    "There is no submission yet that could be graded. Look at the task again, find what is still"
    " missing, and go on until all of it is done. If one way does not work, try another."
)


class NotAGradeError(TypeError):
    """A task's `grade` returned something else than a Grade."""


class Grade(BaseModel):
    """A grader's verdict. 1 is full marks; `is_continuous` marks scores that may lie between."""

    score: float
    grader_log: str
    is_continuous: bool = False

    def dict(self, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The same as `model_dump`."""
        return self.model_dump(**kwargs)


class ComputerTask(ComputerConfiguration, Task, ABC):
    """One task for an agent. Subclasses define `_setup` and `grade`.

    Both may leave out `runtime_config`, in their definition and in a call.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    # Chat messages in OpenAI's form; the system message is the agent's to give.
    prompt: list[dict[str, Any]]
    grade_every_step: bool = True
    # What an agent is told when it stops without a valid submission.
    retry_message: str = _DEFAULT_RETRY_MESSAGE
    hints: list[str] = Field(default=[])

    @abstractmethod
    async def grade(self, computer: ComputerInterface, runtime_config: RuntimeConfig) -> Grade:
        """Look at what the agent left on `computer` and judge it."""

    @abstractmethod
    async def _setup(self, computer: ComputerInterface, runtime_config: RuntimeConfig) -> None:
        """Put the task onto `computer`, which is known to have what the task asks for."""

    async def check_for_valid_submission(
        self, computer: ComputerInterface, runtime_config: RuntimeConfig
    ) -> bool:
        """Whether there is anything to grade, right or wrong. Needed where agents are poked on."""
        raise NotImplementedError(
            f"{type(self).__name__} must define check_for_valid_submission(computer,"
            " runtime_config) to be used with max_pokes > 0"
        )

    @property
    def supports_pokes(self) -> bool:
        """Whether the task defines `check_for_valid_submission`."""
        own = type(self).check_for_valid_submission
        return own is not ComputerTask.check_for_valid_submission

    async def setup(
        self, computer: ComputerInterface, runtime_config: RuntimeConfig | None = None
    ) -> None:
        """Check the computer, then set up the task on it."""
        runtime_config = runtime_config or RuntimeConfig()
        await super().setup(computer, runtime_config)
        await self._setup(computer, runtime_config)

    @classmethod
    def deserialize(cls, data: dict[str, Any]) -> ComputerTask:
        """Restore what `model_dump()` wrote, as the subclass that wrote it.

        Raises ValueError where the names are missing or lead to no subclass of this class.
        """
        try:
            module, name = data[_MODULE_KEY], data[_CLASS_KEY]
        except KeyError as error:
            raise ValueError(
                f"cannot tell which task this was: {error.args[0]!r} is missing; deserialize"
                " takes what model_dump() of a ComputerTask returned"
            ) from error
        return _find_subclass(cls, module, name).model_validate(data)

    @model_serializer(mode="wrap")
    def _add_class_name(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        names = {_CLASS_KEY: type(self).__name__, _MODULE_KEY: type(self).__module__}
        return {**handler(self), **names}

    @model_validator(mode="before")
    @classmethod
    def _drop_class_name(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {k: v for k, v in data.items() if k not in (_CLASS_KEY, _MODULE_KEY)}
        return data

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: Any) -> Any:
        if not prompt:
            raise ValueError("prompt must have at least one message")
        for index, message in enumerate(prompt):
            if message.get("role") is None:
                raise ValueError(f"prompt[{index}] has no role; wanted role and content")
            if message["role"] == "system":
                raise ValueError(
                    f"prompt[{index}] is a system message; those come from the agent, not from"
                    " the task"
                )
        return prompt

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for name in ("grade", "_setup", "check_for_valid_submission"):
            definer = next(base for base in cls.__mro__ if name in base.__dict__)
            # Those of other tasks are adapted already; those of plain mixins are not.
            if definer is cls or not issubclass(definer, ComputerTask):
                setattr(cls, name, _with_optional_runtime_config(getattr(cls, name)))


def _with_optional_runtime_config(
    method: Callable[..., Awaitable[Any]],
) -> Callable[..., Awaitable[Any]]:
    """Let `method(self, computer[, runtime_config])` be called with and without the config."""
    parameters = inspect.signature(method).parameters
    by_name = "runtime_config" in parameters
    by_position = not by_name and any(
        p.kind <= p.VAR_POSITIONAL and p.default is p.empty
        for p in list(parameters.values())[2:3]  # after self and computer
    )
    by_name = by_name or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    @functools.wraps(method)
    async def adapted(
        self: ComputerTask, computer: ComputerInterface, runtime_config: RuntimeConfig | None = None
    ) -> Any:
        runtime_config = runtime_config or RuntimeConfig()
        if by_position:
            result = await method(self, computer, runtime_config)
        elif by_name:
            result = await method(self, computer, runtime_config=runtime_config)
        else:
            result = await method(self, computer)
        if method.__name__ == "grade" and not isinstance(result, Grade):
            raise NotAGradeError(
                f"{type(self).__name__}.grade returned {type(result).__name__}"
                f" ({str(result)[:100]!r}); it must return a Grade"
            )
        return result

    return adapted


def _find_subclass(base: type[ComputerTask], module: str, name: str) -> type[ComputerTask]:
    def search(cls: type[ComputerTask]) -> type[ComputerTask] | None:
        if (cls.__module__, cls.__name__) == (module, name):
            return cls
        return next(filter(None, map(search, cls.__subclasses__())), None)

    found = search(base)
    if found is None:
        importlib.import_module(module)
        found = search(base)
    if found is None:
        raise ValueError(
            f"there is no class {name!r} in module {module!r} that is a {base.__name__}; import"
            " the module that defines it first"
        )
    return found


class SimpleJupyterTask(ComputerTask):
    """A task of two notebook cells: one sets up, one ends with the score, a bool or a number."""

    setup_cell: str
    grader_cell: str

    @field_validator("setup_cell", "grader_cell")
    @classmethod
    def _check_code(cls, value: str) -> str:
        if not valid_ipython_code(value):
            raise ValueError(f"the cell is not valid Python: {value[:200]!r}")
        return value

    async def _setup(self, computer: ComputerInterface, runtime_config: RuntimeConfig) -> None:
        await _need_jupyter(computer).check_execute(self.setup_cell)

    async def grade(self, computer: ComputerInterface, runtime_config: RuntimeConfig) -> Grade:
        result = await _need_jupyter(computer).check_execute(self.grader_cell)
        score = result.parsed_final_expression_output
        if not isinstance(score, bool | int | float):
            raise ValueError(
                f"the grader cell of {self.question_id!r} ended with {score!r}; wanted a bool or"
                " a number as its last line"
            )
        return Grade(score=float(score), grader_log=result.output)


def _need_jupyter(computer: ComputerInterface) -> JupyterComputerInterface:
    if not isinstance(computer, JupyterComputerInterface):
        raise TypeError(
            f"SimpleJupyterTask needs a computer with Jupyter; {type(computer).__name__} has none"
        )
    return computer
