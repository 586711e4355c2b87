"""Log-likelihoods from a completion that echoes its prompt. Knows the reply's form only."""

from __future__ import annotations

from typing import Any

from nanoeval.models.protocol import ContinuationScore


class ServerLacks(Exception):
    """The server cannot do what was asked of it (prompt log-probabilities, say)."""


def score_echo(logprobs: Any, context: str, continuation: str) -> ContinuationScore:
    """Score `continuation` from the log-probabilities of an echoed `context + continuation`.

    `logprobs` is a completion choice's own: lists `tokens`, `token_logprobs`, `top_logprobs`, with
    or without one generated token at the end. A token that straddles the border counts as part of
    the continuation. Raises ServerLacks when the prompt's tokens are not in it.
    """
    tokens = logprobs.get("tokens") if isinstance(logprobs, dict) else None
    if not isinstance(tokens, list):
        raise ServerLacks("the server gave no log-probabilities: it ignores `logprobs` or `echo`")
    first, end = _span(tokens, context, continuation)
    values = logprobs.get("token_logprobs") or []
    best = logprobs.get("top_logprobs") or []
    if len(values) < end or len(best) < end or any(v is None for v in values[first:end]):
        raise ServerLacks("the server gave no log-probabilities of the prompt's last tokens")
    scores = [float(value) for value in values[first:end]]
    is_greedy = all(
        score >= max((best[first + i] or {}).values(), default=score)
        for i, score in enumerate(scores)
    )
    return ContinuationScore(sum(scores), end - first, is_greedy)


def _span(tokens: list[str], context: str, continuation: str) -> tuple[int, int]:
    """First and one past the last token of `continuation`.

    Counted from the end, because servers put a begin-of-text token first, or none.
    """
    whole = context + continuation
    for end in (len(tokens) - 1, len(tokens)):
        if not "".join(tokens[:end]).endswith(whole):
            continue
        first, left = end, len(continuation)
        while left > 0:
            first -= 1
            left -= len(tokens[first])
        return first, end
    raise ServerLacks("the server did not echo the prompt: it ignores `echo`")
