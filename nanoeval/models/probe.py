"""Finds out, before a run, whether a server can do what the run needs. Knows no eval.

A server that drops images or log-probabilities in silence gives scores that are chance; asking once
tells.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import chz

from nanoeval.models._http import RequestRefused, ServerFailure
from nanoeval.models._logprobs import ServerLacks
from nanoeval.models._messages import image_part
from nanoeval.models.openai_api import OpenAICompletion, OpenAIModel

NEEDS = frozenset({"text", "images", "logprobs", "prompt_logprobs"})
QUESTION = "Reply with the word ready."
COLOUR_QUESTION = "Which colour fills this picture? Reply with one word."
PROBE_TOKENS = 16


@dataclass(frozen=True)
class Probe:
    """What a probe found. `model` is the one to go on with; `notes` are for a person to read."""

    model: OpenAIModel
    completion: OpenAICompletion | None = None
    notes: list[str] = field(default_factory=list)


async def probe(
    model: OpenAIModel, needs: Collection[str] = ("text",), params: Mapping[str, Any] | None = None
) -> Probe:
    """Ask one short question with the run's own `params` and look for each of `needs` in the reply.

    Raises ServerLacks when the server cannot do what is needed or ignores it in silence,
    RequestRefused when it refuses the request for another reason, ServerFailure when it cannot be
    reached. A streaming server that refuses or ignores the question for token counts is no
    failure: the model that comes back does not ask, or a note says so.
    """
    if unknown := sorted(set(needs) - NEEDS):
        raise ValueError(f"needs={unknown} are not known; use {', '.join(sorted(NEEDS))}")
    if "prompt_logprobs" in needs:
        await model.loglikelihood("The capital of France is", [" Paris"])
        return Probe(model)
    found = await _ask(model, "images" in needs, {**model.params, **(params or {})})
    if "logprobs" in needs and found.completion and not found.completion.logprobs:
        raise ServerLacks(
            f"{model.get_base_url()} ignores `logprobs`: its reply holds no log-probabilities"
        )
    return found


async def _ask(
    model: OpenAIModel, has_image: bool, params: dict[str, Any], tokens: int = PROBE_TOKENS
) -> Probe:
    """Ask for at most `tokens` tokens, where `params` limit them with max_tokens."""
    # Other limits (max_completion_tokens, ...) are the user's own: two at once are refused.
    limit = params.get("max_tokens")
    is_cut = isinstance(limit, int) and limit > tokens
    asked = chz.replace(model, params={**params, "max_tokens": tokens} if is_cut else params)
    notes: list[str] = []
    try:
        completion = await asked.complete(_picture_question() if has_image else QUESTION)
    except RequestRefused as error:
        if error.status in {401, 403, 404}:
            raise
        if model.stream and model.stream_usage and "stream_options" in str(error):
            found = await _ask(chz.replace(model, stream_usage=False), has_image, params, tokens)
            return dataclasses.replace(
                found, notes=[*found.notes, "no token counts when streaming"]
            )
        if is_cut:
            # The run's own limit may go with its other parameters (min_tokens) where ours does not.
            return await _ask(model, has_image, params, params["max_tokens"])
        if has_image:
            await asked.complete(QUESTION)
            raise ServerLacks(f"the server refuses images: {error}") from error
        raise
    if has_image:
        notes += await _check_sight(asked, completion)
    if model.stream and completion.time_to_first_token is None:
        notes.append("the server does not stream: there are no times to first token")
    if completion.usage.completion_tokens is None:
        notes.append("the server does not count tokens: there are no token figures")
    return Probe(model, completion, notes)


async def _check_sight(model: OpenAIModel, completion: OpenAICompletion) -> list[str]:
    """Nothing if the reply names the colour; else see whether the image cost any tokens."""
    if "red" in completion.text.lower():
        return []
    try:
        blind = await model.complete(COLOUR_QUESTION)
    except (RequestRefused, ServerFailure):
        blind = None
    with_image = completion.usage.prompt_tokens
    if blind is not None and with_image is not None and with_image == blind.usage.prompt_tokens:
        raise ServerLacks(
            f"{model.get_base_url()} ignores images: a prompt with one has as many tokens"
            f" ({with_image}) as without"
        )
    return [
        "asked for the colour of a red picture the model said"
        f" {completion.text[:40]!r}: see that it gets images at all"
    ]


def _picture_question() -> list[dict[str, Any]]:
    text = {"type": "text", "text": COLOUR_QUESTION}
    return [{"role": "user", "content": [image_part(red_png()), text]}]


def red_png(size: int = 64) -> bytes:
    """A red square as PNG (ISO/IEC 15948), `size` pixels wide."""
    row = b"\x00" + b"\xff\x00\x00" * size
    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(row * size)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
