"""What an endpoint check is told: the server, the request, how hard to press. Imports little."""

from __future__ import annotations

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
        if self.api not in {"chat", "completions"}:
            raise EndpointError(f"api={self.api!r} is not known; use chat or completions")
        if self.num_concurrent != "auto" and (
            not isinstance(self.num_concurrent, int) or self.num_concurrent < 1
        ):
            raise EndpointError(
                f"num_concurrent={self.num_concurrent!r} must be a number from 1 on, or auto"
            )


def parse_pairs(text: str, what: str) -> dict[str, Any]:
    """The values of `name=value,name=value`; commas inside brackets and quotes do not separate.

    A value is read as JSON where it is JSON (numbers, true, null, lists, objects) and as a string
    elsewhere; Python's True, False and None are read too. Raises EndpointError, naming `what`.
    """
    pairs: dict[str, Any] = {}
    for part in _split(text):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise EndpointError(
                f"{what}: {part!r} is not name=value; write them as a=1,b=text,c=[1,2]"
            )
        pairs[name.strip()] = parse_value(value.strip())
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


def _split(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character == '"':
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]
