"""Python objects to bytes and back. Knows nothing of what the bytes are for.

Standard pickle comes first: it is small and fast. What it cannot name (local classes, lambdas) goes
by value through cloudpickle. Classes of `__main__` are pickled by name as well; another process,
whose `__main__` is another module, gets their definitions once per eval through `main_definitions`
and `install_main_definitions` instead of once per object.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib import import_module
from operator import attrgetter
from types import ModuleType
from typing import Any
from zlib import crc32

from pydantic import BaseModel

PROTOCOL = 5
# Of bytes followed by their own CRC-32, lowest byte first, the CRC-32 is always this.
CRC32_RESIDUE = 0x2144DF1C
# Begins what `dumps_model` makes; all other pickles begin with 0x80.
MODEL = b"M"
# Where `__main__` keeps the names that came from another process.
INSTALLED = "__nanoeval_installed__"
# SQLite's own limit for one value is 10^9 bytes.
MAX_BYTES = 900 * 2**20


class NotPicklableError(TypeError):
    """An object that has to be stored cannot be pickled; the message names the part that cannot."""


class DamagedPickleError(ValueError):
    """Stored bytes are not those that were written."""


def dumps(value: Any, what: str, *names: object) -> bytes:
    """Pickle `value`.

    Raises NotPicklableError, which names the field at fault and, as `what % names`, the value.
    """
    if value is True or value is False:  # the most common result of all
        return TRUE if value else FALSE
    try:
        blob = pickle.dumps(value, PROTOCOL)
    except Exception:  # pickle raises whatever an object's own __reduce__ raises
        blob = _dumps_by_value(value, what % names if names else what)
    return _sealed(blob, what, names)


def dumps_model(model: BaseModel, what: str, *names: object) -> bytes:
    """Like `dumps`, for a model that is plain data, such as a task: takes half as long to restore.

    Its fields are pickled behind the name of its class, instead of what pydantic wraps around both.
    """
    model_class = type(model)
    if not _has_plain_state(model_class) or model.__pydantic_private__ is not None:
        return dumps(model, what, *names)
    name = _name_of(model_class)
    state = (model.__dict__, model.__pydantic_fields_set__, model.__pydantic_extra__)
    try:
        if _class_named(name) is not model_class:  # made in a function, or replaced since
            return dumps(model, what, *names)
        blob = MODEL + name + b"\n" + pickle.dumps(state, PROTOCOL)
    except Exception:  # as above
        return dumps(model, what, *names)
    return _sealed(blob, what, names)


@lru_cache(maxsize=128)
def _name_of(model_class: type[BaseModel]) -> bytes:
    return f"{model_class.__module__}:{model_class.__qualname__}".encode()


def _class_named(name: bytes) -> Any:
    module, _, qualified = name.decode().partition(":")
    try:
        return sys.modules[module].__dict__[qualified]
    except KeyError:  # not imported yet, or inside another class
        return attrgetter(qualified)(import_module(module))


@lru_cache(maxsize=128)
def _has_plain_state(model_class: type[BaseModel]) -> bool:
    """Whether models of a class are pickled in pydantic's way, and none of their own."""
    return (
        model_class.__reduce__ is object.__reduce__
        and model_class.__reduce_ex__ is object.__reduce_ex__
        and model_class.__getstate__ is BaseModel.__getstate__
        and model_class.__setstate__ is BaseModel.__setstate__
        and not hasattr(model_class, "__getnewargs__")
        and not hasattr(model_class, "__getnewargs_ex__")
    )


def _restored(blob: bytes) -> BaseModel:
    end = blob.index(b"\n")
    model_class = _class_named(blob[len(MODEL) : end])
    fields, fields_set, extra = pickle.loads(memoryview(blob)[end + 1 :])
    model: BaseModel = model_class.__new__(model_class)
    put = object.__setattr__
    put(model, "__dict__", fields)
    put(model, "__pydantic_fields_set__", fields_set)
    put(model, "__pydantic_extra__", extra)
    put(model, "__pydantic_private__", None)
    return model


def _sealed(blob: bytes, what: str, names: tuple[object, ...]) -> bytes:
    """`blob` with its checksum, if the database can hold it."""
    if len(blob) > MAX_BYTES:
        raise NotPicklableError(
            f"{what % names if names else what} takes {len(blob) / 2**20:,.0f} MiB when pickled;"
            f" the database holds {MAX_BYTES / 2**20:,.0f} MiB at most. Keep such data in a file,"
            " and its path here"
        )
    return blob + crc32(blob).to_bytes(4, "little")


TRUE, FALSE = (_sealed(pickle.dumps(value, PROTOCOL), "a bool", ()) for value in (True, False))


def _dumps_by_value(value: Any, what: str) -> bytes:
    import cloudpickle

    try:
        blob: bytes = cloudpickle.dumps(value, PROTOCOL)
        return blob
    except Exception as error:
        path, part = _unpicklable_part(value)
        raise NotPicklableError(
            f"{what} cannot be pickled: {path or 'it'} holds a {type(part).__name__}"
            f" ({_one_line(error)}); keep plain data there, and open such things in _context()"
            " or evaluate()"
        ) from error


def loads(blob: bytes) -> Any:
    """Unpickle what `dumps` or `dumps_model` made. Only ever call it on a file that this user owns.

    Raises DamagedPickleError, before anything is unpickled, for bytes that have changed since.
    """
    if len(blob) == len(TRUE) and blob in {TRUE, FALSE}:
        return blob == TRUE
    # The checksum stands behind the pickle, which knows its own end.
    if crc32(blob) != CRC32_RESIDUE:
        raise DamagedPickleError(
            f"a pickle of {len(blob)} bytes in the database has changed since it was written: the"
            " file is damaged. Go on from its backup, if one was made: move the file away, and with"
            " it those of its name that end in -wal and -shm, and resume the run set"
        )
    if blob[:1] == MODEL:
        return _restored(blob)
    return pickle.loads(blob)


def main_definitions() -> bytes | None:
    """The classes and functions that `__main__` defines, by value; None when it defines none.

    What cannot be pickled by value is left out: it can then not be used in another process.
    """
    import cloudpickle

    main = sys.modules.get("__main__")
    defined = {
        name: value
        for name, value in vars(main).items()
        if getattr(value, "__module__", None) == "__main__"
        and getattr(value, "__qualname__", None) == name
    }
    if not defined:
        return None
    try:
        blob: bytes = cloudpickle.dumps(defined, PROTOCOL)
    except Exception:  # one definition is enough to spoil all; keep those that work
        blob = cloudpickle.dumps(dict(_each_picklable(defined)), PROTOCOL)
    return blob + crc32(blob).to_bytes(4, "little")


def _each_picklable(defined: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    import cloudpickle

    for name, value in defined.items():
        try:
            cloudpickle.dumps(value, PROTOCOL)
        except Exception:
            continue
        yield name, value


def install_main_definitions(blob: bytes | None) -> None:
    """Make definitions from another process's `__main__` known here.

    They replace those of an earlier call. Names that this process's own `__main__` has are kept, as
    they are for any module.
    """
    if blob is None:
        return
    main = vars(sys.modules["__main__"])
    installed: set[str] = main.setdefault(INSTALLED, set())
    for name, value in loads(blob).items():
        if name in installed or name not in main:
            main[name] = value
            installed.add(name)


def empty_main() -> None:
    """For a program whose `__main__` is there for another's definitions, whatever their names."""
    sys.modules["__main__"] = ModuleType("__main__")


def _unpicklable_part(value: Any, depth: int = 0) -> tuple[str, Any]:
    """The path to, and the value of, the innermost part that cannot be pickled."""
    import cloudpickle

    for name, part in _parts(value) if depth < 5 else ():
        try:
            cloudpickle.dumps(part, PROTOCOL)
        except Exception:
            inner, culprit = _unpicklable_part(part, depth + 1)
            return name + inner, culprit
    return "", value


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    else:
        attributes = dict(getattr(value, "__dict__", {}))
        attributes.update(getattr(value, "__pydantic_private__", None) or {})
        for name, part in attributes.items():
            yield f".{name.removeprefix('X_')}", part  # chz keeps field `name` as `X_name`


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
