"""Any Python value as one line of JSON. Knows nothing of runs, recorders and files."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import enum
import functools
import json
import json.encoder
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import chz
from pydantic import BaseModel

# Python refuses to print larger integers in decimal.
MAX_INT_BITS = 10_000
# Longer messages are not kept in case they come again.
MAX_KEPT_CHARS = 4_000


def encode_line(record: dict[str, Any]) -> bytes:
    """`record` as one line of JSON, newline included, whatever it holds; never raises.

    pydantic, dataclass and chz objects become objects, sets sorted lists, times ISO 8601, bytes
    text (a data URL where they are no UTF-8), numpy what `tolist` gives, exceptions their type and
    message, NaN and infinities null, anything else its repr.
    """
    prompt = encode_messages(record.get("prompt"))
    try:
        if prompt is None:
            text = _encode(record)
        else:
            others = {key: value for key, value in record.items() if key != "prompt"}
            text = f'{_encode(others)[:-1]}, "prompt": {prompt}}}'
    except Exception:  # a value's own code may raise anything; the slow way finds and replaces it
        text = _encode(_plain(record, ()))
    if not text.isascii():
        # str.splitlines would cut lines here, though JSON allows them.
        for separator in ("\x85", "\u2028", "\u2029"):
            text = text.replace(separator, f"\\u{ord(separator):04x}")
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, as in file names that are no UTF-8
        return json.dumps(json.loads(text)).encode() + b"\n"


def encode_messages(messages: Any) -> str | None:
    """The JSON of chat messages with a role and a text; None for anything else.

    Each is encoded once as long as it comes again: the shots of a prompt go out with every request
    and into every record.
    """
    if type(messages) is not list or not messages:
        return None
    parts = []
    for message in messages:
        if type(message) is not dict or len(message) != 2:
            return None
        role, content = message.get("role"), message.get("content")
        if type(role) is not str or type(content) is not str:
            return None
        is_short = len(content) <= MAX_KEPT_CHARS
        parts.append((_message if is_short else _message.__wrapped__)(role, content))
    return f"[{', '.join(parts)}]"


@functools.lru_cache(maxsize=256)
def _message(role: str, content: str) -> str:
    return _encode({"role": role, "content": content})


def _jsonable(value: Any) -> Any:  # noqa: PLR0911 - one line per kind of value
    """`value`, which JSON does not know, in terms of what it knows."""
    if isinstance(value, BaseModel):
        return value.model_dump(warnings=False)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
    if isinstance(value, set | frozenset):
        return _sorted(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return _bytes_as_text(bytes(value))
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, BaseException):
        return {"type": type(value).__name__, "message": str(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if not isinstance(value, type) and callable(tolist := getattr(value, "tolist", None)):
        return tolist()
    if not isinstance(value, type) and chz.is_chz(value):
        return {name: getattr(value, name) for name in chz.chz_fields(value)}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return repr(value)


def encoder(default: Callable[[Any], Any], allow_nan: bool) -> Callable[[Any], str]:
    """Like the `encode` of a JSONEncoder that keeps text as it is, in half the time for a record.

    That one makes its encoder in C anew for each value, to find values that hold themselves; this
    one raises RecursionError for those.
    """
    make_encoder = getattr(json.encoder, "c_make_encoder", None)
    if make_encoder is None:  # not CPython
        return json.JSONEncoder(ensure_ascii=False, allow_nan=allow_nan, default=default).encode
    as_text = json.encoder.encode_basestring
    encode = make_encoder(None, default, as_text, None, ": ", ", ", False, False, allow_nan)
    return lambda value: "".join(encode(value, 0))


_encode = encoder(_jsonable, allow_nan=False)


def _plain(value: Any, inside: tuple[int, ...]) -> Any:  # noqa: PLR0911 - as above
    """`value` with each part that cannot be encoded replaced; `inside` are the ids around it."""
    if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
        return hex(value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if id(value) in inside or len(inside) > 50:
        return f"<{type(value).__name__}, which holds itself or is nested too deep>"
    inside = (*inside, id(value))
    if isinstance(value, dict):
        return {_plain_key(key): _plain(part, inside) for key, part in list(value.items())}
    if isinstance(value, list | tuple):
        return [_plain(part, inside) for part in list(value)]
    try:
        known = _jsonable(value)
    except Exception as error:  # whatever the value's own code raised, its place is marked
        return f"<{type(value).__name__}, which cannot be shown: {type(error).__name__}>"
    return _plain(known, inside)


def _plain_key(key: Any) -> str:
    if isinstance(key, str):
        return str(key)
    if key is None or isinstance(key, bool | int | float):
        return json.dumps(key)
    try:
        return str(key)
    except Exception:  # as above
        return f"<{type(key).__name__}>"


def _sorted(values: set[Any] | frozenset[Any]) -> list[Any]:
    """The same order in every process, which sets of strings do not have."""
    try:
        return sorted(values)
    except TypeError:
        return sorted(values, key=repr)


def _bytes_as_text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return f"data:application/octet-stream;base64,{base64.b64encode(value).decode()}"


def utc_timestamp(now: float | None = None) -> str:
    """`now`, seconds since the epoch (None = this moment), in UTC as ISO 8601 with microseconds."""
    now = time.time() if now is None else now
    return f"{_utc_second(int(now))}.{int(now % 1 * 1e6):06d}+00:00"


@functools.lru_cache(maxsize=2)
def _utc_second(seconds: int) -> str:
    # Kept, since all events of a second share it, and writing it costs as much as a small record.
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
