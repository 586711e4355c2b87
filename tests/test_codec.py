"""Objects to bytes and back."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, Generic, TypeVar

import pytest
from pydantic import BaseModel, PrivateAttr

from nanoeval import Task, _codec

T = TypeVar("T")


class Plain(Task):
    """A task as most are."""

    numbers: list[int] = []


class Outer:
    """Holds a class."""

    class Inner(Task):
        """A task of a class inside another."""

        text: str


class Open(BaseModel, extra="allow"):
    """Keeps fields that it does not define."""

    a: int = 1


class Secretive(Plain):
    """Has a private attribute."""

    _seen: int = PrivateAttr(default=0)


class Own(Plain):
    """Is pickled in a way of its own."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Own, (), {"numbers": [-1]})

    def __setstate__(self, state: dict[Any, Any]) -> None:
        self.__init__(question_id="made anew", numbers=[-1])  # type: ignore[misc]

    def __init__(self, **fields: Any) -> None:
        super().__init__(**{"question_id": "own", **fields})


class Boxed(BaseModel, Generic[T]):
    """A generic model."""

    value: T


def restored(model: BaseModel) -> Any:
    return _codec.loads(_codec.dumps_model(model, "a task"))


@pytest.mark.parametrize(
    "model",
    [
        Plain(question_id="q", numbers=[1, 2]),
        Outer.Inner(question_id="q", text="é\n\ud800"),
        Open(a=2, b={"c": [None]}),
        Secretive(question_id="q"),
        Boxed[int](value=3),
    ],
    ids=lambda model: type(model).__name__,
)
def test_models_come_back_as_they_were(model: BaseModel) -> None:
    """A task would reach `evaluate` with other fields than it was listed with."""
    back = restored(model)
    assert type(back) is type(model)
    assert back == model
    assert back.model_fields_set == model.model_fields_set


def test_private_attributes_and_own_ways_are_respected() -> None:
    """What a task knows beside its fields would be lost on the way."""
    task = Secretive(question_id="q")
    task._seen = 7
    assert restored(task)._seen == 7
    assert restored(Own(numbers=[5])).numbers == [-1]


def test_classes_of_a_function_come_back() -> None:
    """Tests and notebooks could not define tasks where they need them."""

    class Local(Task):
        text: str

    assert restored(Local(question_id="q", text="x")).text == "x"


def test_a_class_that_was_defined_again_is_not_taken_for_the_old_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A notebook's cell, run again with another field, would give tasks of the old class."""
    module = ModuleType("cell")
    monkeypatch.setitem(sys.modules, "cell", module)
    code = "from nanoeval import Task\nclass Cell(Task):\n    {}: int = 1"
    exec(code.format("old"), module.__dict__)
    old = module.Cell(question_id="q")
    assert type(restored(old)) is module.Cell
    exec(code.format("new"), module.__dict__)
    assert restored(module.Cell(question_id="q")).new == 1
    assert restored(old).old == 1


@pytest.mark.parametrize("value", [True, False, 1, 0, None, 1.0])
def test_small_results_keep_their_type(value: Any) -> None:
    """1 would come back as True, which is scored otherwise."""
    back = _codec.loads(_codec.dumps(value, "a result"))
    assert back == value
    assert type(back) is type(value)


def test_changed_bytes_are_never_unpickled() -> None:
    """A damaged file would give another result, or run whatever its bytes say."""
    for blob in (_codec.dumps(True, ""), _codec.dumps_model(Plain(question_id="q"), "")):
        for place in range(len(blob)):
            changed = bytearray(blob)
            changed[place] ^= 4
            with pytest.raises(_codec.DamagedPickleError):
                _codec.loads(bytes(changed))
