"""Puts a reply on the wire, whole or as a stream, and spoils it where a fault says so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from aiohttp import web

from nanoeval.testing._faults import Fault
from nanoeval.testing._openai_json import Choice, Envelope

STREAM_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}


def json_response(
    payload: Any, headers: Mapping[str, str], status: int = 200
) -> web.StreamResponse:
    """`payload` as JSON."""
    return web.Response(
        body=json.dumps(payload).encode(),
        status=status,
        headers=headers,
        content_type="application/json",
    )


def error_response(
    status: int, message: str, code: str, headers: Mapping[str, str]
) -> web.StreamResponse:
    """An error in the form of the OpenAI API."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return json_response({"error": error}, headers, status)


async def send_fault(
    request: web.BaseRequest, fault: Fault, headers: Mapping[str, str]
) -> web.StreamResponse:
    """Answer with a fault that leaves nothing of the reply: a status, or no reply at all."""
    message = f"injected fault: {fault.kind}"
    if fault.status is not None:
        if fault.retry_after is not None and fault.status in {429, 503}:
            headers = {**headers, "Retry-After": f"{fault.retry_after:g}"}
        return error_response(fault.status, message, "injected_fault", headers)
    if fault.kind == "error_body":
        return error_response(200, message, "injected_fault", headers)
    if fault.kind == "hang":
        await asyncio.Event().wait()
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


async def send_whole(
    request: web.BaseRequest,
    envelope: Envelope,
    choices: Sequence[Choice],
    fault: Fault | None,
    headers: Mapping[str, str],
) -> web.StreamResponse:
    """Send a reply as one JSON object."""
    kind = fault.kind if fault is not None else ""
    payload = json.dumps(_spoil(envelope, kind).whole(_spoil_choices(choices, kind))).encode()
    if kind == "malformed":
        payload = payload[: len(payload) // 2]
    if kind != "cut":
        return web.Response(body=payload, headers=headers, content_type="application/json")
    response = web.StreamResponse(headers={**headers, "Content-Type": "application/json"})
    response.content_length = len(payload)
    await response.prepare(request)
    await response.write(payload[: len(payload) // 2])
    return _hang_up(request, response)


async def send_stream(
    request: web.BaseRequest,
    envelope: Envelope,
    choices: Sequence[Choice],
    fault: Fault | None,
    headers: Mapping[str, str],
    *,
    time_per_token: float,
) -> web.StreamResponse:
    """Send a reply as server-sent events, one token each."""
    kind = fault.kind if fault is not None else ""
    pieces = list(_spoil(envelope, kind).pieces(_spoil_choices(choices, kind)))
    if kind in {"cut", "malformed"}:
        pieces = pieces[: max(1, len(pieces) // 2)]
    response = web.StreamResponse(headers={**headers, **STREAM_HEADERS})
    await response.prepare(request)
    for event in _events(pieces):
        await response.write(event)
        if time_per_token:
            await asyncio.sleep(time_per_token)
    if kind == "cut":
        return _hang_up(request, response)
    await response.write(b'data: {"id": \n\n' if kind == "malformed" else b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def _events(pieces: Iterable[Mapping[str, Any]]) -> Iterable[bytes]:
    return (b"data: " + json.dumps(piece).encode() + b"\n\n" for piece in pieces)


def _spoil(envelope: Envelope, kind: str) -> Envelope:
    return replace(envelope, usage=None) if kind == "no_usage" else envelope


def _spoil_choices(choices: Sequence[Choice], kind: str) -> Sequence[Choice]:
    if kind == "empty_choices":
        return []
    if kind == "null_content":
        return [replace(choice, tokens=None, logprobs=()) for choice in choices]
    return choices


def _hang_up(request: web.BaseRequest, response: web.StreamResponse) -> web.StreamResponse:
    """Close the connection after what is written, so that the reader sees half a reply."""
    if request.transport is not None:
        request.transport.close()
    return response
