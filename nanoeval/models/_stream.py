"""Streamed replies (server-sent events) put together to what the same reply is unstreamed."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from nanoeval.models._http import BadReply


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
            raise BadReply("error_reply", f"the server reports an error: {chunk}", str(chunk))
        for part in chunk.pop("choices", None) or []:
            choice = choices.setdefault(part.get("index", 0), {"index": part.get("index", 0)})
            if _merge(choice, part) and first_token is None:
                first_token = time.perf_counter() - started
        reply.update({name: value for name, value in chunk.items() if value is not None})
    if not is_done and not all(c.get("finish_reason") for c in choices.values()):
        raise BadReply("cut", "the stream ended before the reply was complete")
    reply["choices"] = [choices[index] for index in sorted(choices)]
    return reply, first_token


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of each event. (aiohttp's own line reader refuses lines beyond 128 KiB.)"""
    rest = b""
    async for chunk in response.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
    if rest.startswith(b"data:"):
        yield rest[5:].strip()


def _parse(data: bytes) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError as error:
        raise BadReply("not_json", f"an event of the stream is not JSON: {data[:200]!r}") from error
    if not isinstance(chunk, dict):
        raise BadReply("not_json", f"an event of the stream is not an object: {data[:200]!r}")
    return chunk


def _merge(choice: dict[str, Any], part: dict[str, Any]) -> bool:
    """Add one piece to what there is of a choice; True when it brought text."""
    delta = part.get("delta")
    brought_text = False
    if isinstance(delta, dict):
        message = choice.setdefault("message", {"role": "assistant", "content": None})
        for name, value in delta.items():
            if isinstance(value, str) and name != "role":
                message[name] = (message.get(name) or "") + value
                brought_text |= value != ""
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
