"""Replies in the JSON of the OpenAI API, whole and streamed. Knows no HTTP.

Fields: platform.openai.com/docs/api-reference, chat and (legacy) completions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal
from zlib import crc32

_TOKEN = re.compile(r"\s*\S+|\s+")

# Natural logarithm of the probability of a token (second) after a text (first).
LogProb = Callable[[str, str], float]


def tokenize(text: str) -> list[str]:
    """Split `text` into this server's tokens: words, each with the blanks before it."""
    return _TOKEN.findall(text)


def count_tokens(text: str) -> int:
    """The length of `tokenize(text)`, in a tenth of the time."""
    return len(text.split()) + text[-1:].isspace()


def default_logprob(before: str, token: str) -> float:
    """A log-probability that looks like one and depends on the token and what stands before it."""
    share = crc32((before[-32:] + "\0" + token).encode()) / 2**32
    return math.log(0.05 + 0.9 * share)


@dataclass(frozen=True)
class Choice:
    """One choice of a reply. The first `n_echoed` of its tokens are the prompt's.

    None as `tokens` is a null content. `logprobs` is one number per token, None where there is
    none; empty when nobody asked. `n_top` alternatives are listed for each token.
    """

    index: int
    tokens: Sequence[str] | None
    finish_reason: str
    logprobs: Sequence[float | None] = ()
    n_top: int = 0
    n_echoed: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_generated(self) -> int:
        """How many tokens are the reply's own."""
        return len(self.tokens or ()) - self.n_echoed

    @property
    def text(self) -> str | None:
        """The text, None for a null content."""
        return None if self.tokens is None else "".join(self.tokens)


@dataclass(frozen=True)
class Envelope:
    """What all choices of one reply share."""

    api: Literal["chat", "completions"]
    id: str
    model: str
    created: int
    usage: Mapping[str, int] | None

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The reply as one JSON object."""
        kind = "chat.completion" if self.api == "chat" else "text_completion"
        reply = self._head(kind) | {"choices": [self._choice(choice) for choice in choices]}
        return reply if self.usage is None else reply | {"usage": dict(self.usage)}

    def pieces(self, choices: Sequence[Choice]) -> Iterator[dict[str, Any]]:
        """The reply as the JSON objects of a stream: token by token, then usage if there is any."""
        kind = "chat.completion.chunk" if self.api == "chat" else "text_completion"
        for choice in choices:
            for part in self._parts(choice):
                yield self._head(kind) | {"choices": [part]}
        if not choices:
            yield self._head(kind) | {"choices": []}
        if self.usage is not None:
            yield self._head(kind) | {"choices": [], "usage": dict(self.usage)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        reply: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish_reason}
        if self.api == "chat":
            reply["message"] = {"role": "assistant", "content": choice.text, **choice.fields}
        else:
            reply |= {"text": choice.text, **choice.fields}
        return reply | {"logprobs": self._logprobs(choice, 0, len(choice.tokens or ()))}

    def _parts(self, choice: Choice) -> Iterator[dict[str, Any]]:
        index = {"index": choice.index}
        if self.api == "chat":
            opening = {"role": "assistant", "content": None if choice.tokens is None else ""}
            yield {**index, "delta": {**opening, **choice.fields}, "finish_reason": None}
        for i, token in enumerate(choice.tokens or ()):
            text = {"delta": {"content": token}} if self.api == "chat" else {"text": token}
            yield {**index, **text, "logprobs": self._logprobs(choice, i, i + 1)} | {
                "finish_reason": None
            }
        last: dict[str, Any] = (
            {"delta": {}} if self.api == "chat" else {"text": "", **choice.fields}
        )
        yield {**index, **last, "logprobs": None, "finish_reason": choice.finish_reason}

    def _logprobs(self, choice: Choice, start: int, end: int) -> dict[str, Any] | None:
        if not choice.logprobs or choice.tokens is None:
            return None
        tokens, values = choice.tokens[start:end], choice.logprobs[start:end]
        tops = [_top(t, v, choice.n_top) for t, v in zip(tokens, values, strict=True)]
        if self.api == "chat":
            entries = zip(tokens, values, tops, strict=True)
            return {"content": [_chat_entry(*entry) for entry in entries], "refusal": None}
        offset = sum(len(token) for token in choice.tokens[:start])
        offsets = list(accumulate(map(len, tokens[:-1]), initial=offset))
        return {
            "tokens": list(tokens),
            "token_logprobs": list(values),
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def _top(token: str, logprob: float | None, n_top: int) -> dict[str, float] | None:
    """The token's own entry and the `n_top` likeliest, made-up alternatives among them.

    The alternatives take a half, a quarter, ... of what probability the token leaves, so a token
    is the likeliest one when its own probability is at least a third.
    """
    if logprob is None:
        return None
    rest = max(1.0 - math.exp(logprob), 1e-9)
    others = {f" alternative{i}": math.log(rest / 2**i) for i in range(1, n_top + 1)}
    ranked = sorted({token: logprob, **others}.items(), key=lambda entry: -entry[1])[:n_top]
    return {**dict(ranked), token: logprob}


def _chat_entry(
    token: str, logprob: float | None, top: Mapping[str, float] | None
) -> dict[str, Any]:
    shown = [{"token": t, "logprob": v, "bytes": list(t.encode())} for t, v in (top or {}).items()]
    own = {"token": token, "logprob": logprob, "bytes": list(token.encode())}
    return {**own, "top_logprobs": shown}
