"""What an endpoint check is told: the server, the request, how hard to press. Imports little."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

DEFAULT_CONCURRENCY = 8


class EndpointError(Exception):
    """The server or the arguments are wrong; the message is one line that says what to do."""


@dataclass(frozen=True)
class APIConfig:
    """A server and how to ask it.

    `url` reaches up to and with /v1, which is added to an address without a path; one that goes on
    to /chat/completions or /completions is cut, and chooses that API. `model` may be None where the
    server lists exactly one. `api_key` None means the variable `api_key_env`. `gen_kwargs` go into
    every request as they are. Times are seconds.
    """

    url: str
    model: str | None = None
    num_concurrent: int | Literal["auto"] = DEFAULT_CONCURRENCY
    api_key: str | None = field(default=None, repr=False)
    api_key_env: str = "OPENAI_API_KEY"
    gen_kwargs: dict[str, Any] = field(default_factory=dict)
    api: Literal["chat", "completions"] = "chat"
    stream: bool = False
    timeout: float = 600.0
    connect_timeout: float = 10.0
    max_tries: int = 5

    def __post_init__(self) -> None:
        url = self.url.rstrip("/")
        for ending, api in (("/chat/completions", "chat"), ("/completions", "completions")):
            if url.endswith(ending):
                url = url.removesuffix(ending)
                object.__setattr__(self, "api", api)
                break
        if url.count("/") == 2:
            url += "/v1"
        object.__setattr__(self, "url", url)
        self._check_values()

    def _check_values(self) -> None:
        if "@" in self.url.partition("://")[2].partition("/")[0]:
            raise EndpointError(
                "the server's address holds a user name or password, which would be kept with the"
                " results; put them into ~/.netrc (machine HOST login NAME password PASSWORD) and"
                " take them out of the address"
            )
        if self.api not in ("chat", "completions"):
            raise EndpointError(f"api={self.api!r} is not known; use chat or completions")
        if self.num_concurrent != "auto" and not _is_count(self.num_concurrent):
            raise EndpointError(
                f"num_concurrent={self.num_concurrent!r} must be a number from 1 on, or auto"
            )
        if not _is_count(self.max_tries):
            raise EndpointError(f"max_tries={self.max_tries!r} must be a whole number from 1 on")
        if not isinstance(self.stream, bool):
            raise EndpointError(f"stream={self.stream!r} must be true or false")
        for name in ("timeout", "connect_timeout"):
            seconds = getattr(self, name)
            if type(seconds) not in (int, float) or not 0 < seconds < math.inf:
                raise EndpointError(f"{name}={seconds!r} must be a number above 0, in seconds")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def parse_pairs(text: str, what: str, texts: Collection[str] = ()) -> dict[str, Any]:
    """The values of `name=value,name=value`; commas inside brackets and quotes do not separate.

    A value is read as JSON where it is JSON (numbers, true, null, lists, objects) and as a string
    elsewhere; Python's True, False and None are read too. Those named in `texts` are always
    strings. Raises EndpointError, naming `what`.
    """
    pairs: dict[str, Any] = {}
    for part in split_pairs(text, what):
        name, equals, written = (piece.strip() for piece in part.partition("="))
        if not equals or not name:
            raise EndpointError(
                f"{what}: {part!r} is not name=value; write them as a=1,b=text,c=[1,2]"
            )
        value = parse_value(written)
        pairs[name] = written if name in texts and not isinstance(value, str) else value
    return pairs


def parse_value(text: str) -> Any:
    """A value of the command line: JSON, Python's constants, or the text itself."""
    import json

    constants = {"True": True, "False": False, "None": None}
    if text in constants:
        return constants[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def split_pairs(text: str, what: str) -> list[str]:
    """The parts between the commas that separate. Raises EndpointError, naming `what`."""
    parts, depth, is_quoted, is_escaped = [""], 0, False, False
    for character in text:
        if is_quoted:
            is_quoted = is_escaped or character != '"'
            is_escaped = character == "\\" and not is_escaped
        elif character == '"':
            is_quoted = True
        else:
            depth += (character in "[{") - (character in "]}")
        if depth < 0:
            break
        if character == "," and depth == 0 and not is_quoted:
            parts.append("")
        else:
            parts[-1] += character
    if depth or is_quoted:
        raise EndpointError(
            f"{what}: {'a double quote' if is_quoted else 'a bracket'} has no partner; put a text"
            ' that holds one into quotes, as in stop="]" or stop="\\""'
        )
    return [part for part in parts if part.strip()]
