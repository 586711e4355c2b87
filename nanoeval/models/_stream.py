"""Streamed replies (server-sent events) put together to what the same reply is unstreamed."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from nanoeval.models._http import BadReply
from nanoeval.models._messages import text_of


async def read_stream(
    response: aiohttp.ClientResponse, started: float
) -> tuple[dict[str, Any], float | None]:
    """The whole reply, and the seconds from `started` to its first token (None: it had none).

    Raises BadReply("cut") for a stream that ends before its reply does.
    """
    reply: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    first_token = None
    is_done = False
    async for data in _events(response):
        if data == b"[DONE]":
            is_done = True
            break
        chunk = _parse(data)
        if chunk.get("error"):
            raise BadReply("error_reply", "the server reports an error", str(chunk))
        try:
            has_text = _add_choices(choices, chunk.pop("choices", None) or [])
        except (AttributeError, TypeError) as error:
            what = "the choices of a streamed event have another form than OpenAI's"
            raise BadReply("bad_event", what, _decoded(data)) from error
        if has_text and first_token is None:
            first_token = time.perf_counter() - started
        reply.update({name: value for name, value in chunk.items() if value is not None})
    if not is_done and not all(c.get("finish_reason") for c in choices.values()):
        raise BadReply("cut", "the stream ended before the reply was complete")
    reply["choices"] = [choices[index] for index in sorted(choices)]
    return reply, first_token


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of each event, as the HTML standard's section 9.2.6 reads them.

    (aiohttp's own line reader refuses lines beyond 128 KiB.)
    """
    rest = b""
    data: list[bytes] = []
    async for chunk in response.content.iter_any():
        lines = (rest + chunk).splitlines(keepends=True)
        # The last line may go on; also one that ends with CR, whose LF may be on its way.
        rest = b"" if lines[-1].endswith(b"\n") else lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                data.append(line[5:].strip())
            elif data and line.isspace():
                yield b"\n".join(data)
                data.clear()
    if rest.startswith(b"data:"):
        data.append(rest[5:].strip())
    if data:
        yield b"\n".join(data)


def _parse(data: bytes) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except (ValueError, RecursionError) as error:
        what = "an event of the stream is not JSON"
        raise BadReply("not_json", what, _decoded(data)) from error
    if not isinstance(chunk, dict):
        raise BadReply("not_json", "an event of the stream is not an object", _decoded(data))
    return chunk


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _add_choices(choices: dict[int, dict[str, Any]], parts: list[dict[str, Any]]) -> bool:
    """Add an event's pieces to what there is of each choice; True when they brought text.

    Raises AttributeError or TypeError for pieces of another form.
    """
    brought_text = False
    for part in parts:
        index = part.get("index") or 0
        if not isinstance(index, int):
            raise TypeError(f"index={index!r} must be a whole number")
        brought_text |= _merge(choices.setdefault(index, {"index": index}), part)
    return brought_text


def _merge(choice: dict[str, Any], part: dict[str, Any]) -> bool:
    """Add one piece to what there is of a choice; True when it brought text."""
    delta = part.get("delta")
    brought_text = False
    if isinstance(delta, dict):
        message = choice.setdefault("message", {"role": "assistant", "content": None})
        for name, value in delta.items():
            text = text_of(value) if name == "content" and isinstance(value, list) else value
            if isinstance(text, str) and name != "role":
                message[name] = (message.get(name) or "") + text
                brought_text |= text != ""
            elif isinstance(value, list):
                message.setdefault(name, []).extend(value)
    if isinstance(part.get("text"), str):
        choice["text"] = choice.get("text", "") + part["text"]
        brought_text |= part["text"] != ""
    if isinstance(logprobs := part.get("logprobs"), dict):
        merged = choice.setdefault("logprobs", {})
        for name, values in logprobs.items():
            if isinstance(values, list):
                merged.setdefault(name, []).extend(values)
    if part.get("finish_reason"):
        choice["finish_reason"] = part["finish_reason"]
    return brought_text
