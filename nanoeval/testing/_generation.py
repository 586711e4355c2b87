"""Does to a scripted text what a server does to a model's: stop, length, echo, log-probabilities.

Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nanoeval.testing._openai_json import Choice, LogProb, count_tokens, tokenize
from nanoeval.testing._script import Reply, Request


def split_prompts(request: Request) -> list[Request]:
    """One request for each prompt of a plain completion that has several; else the request."""
    prompts = request.body.get("prompt") if request.api == "completions" else None
    if not isinstance(prompts, list):
        return [request]
    return [replace(request, body={**request.body, "prompt": prompt}) for prompt in prompts]


def make_choices(
    requests: Sequence[Request], replies: Sequence[Reply], logprob: LogProb
) -> list[Choice]:
    """The choices of a reply: for each request in turn, its reply `n` times."""
    n = int(requests[0].body.get("n") or 1)
    pairs = [pair for pair in zip(requests, replies, strict=True) for _ in range(n)]
    return [_choice(i, request, reply, logprob) for i, (request, reply) in enumerate(pairs)]


def count_usage(
    requests: Sequence[Request], replies: Sequence[Reply], choices: Sequence[Choice]
) -> dict[str, int]:
    """Tokens in and out; what a `Reply` says of itself stands above what is counted."""
    n = len(choices) // len(requests)
    prompt = completion = 0
    for i, (request, reply) in enumerate(zip(requests, replies, strict=True)):
        n_prompt, counted = reply.prompt_tokens, reply.completion_tokens
        prompt += count_tokens(request.text) if n_prompt is None else n_prompt
        n_made = sum(choice.n_generated for choice in choices[i * n : (i + 1) * n])
        completion += n_made if counted is None else counted * n
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


def _choice(index: int, request: Request, reply: Reply, logprob: LogProb) -> Choice:
    if reply.text is None:
        return Choice(index, None, reply.finish_reason, fields=reply.fields)
    body, finish_reason = request.body, reply.finish_reason
    tokens = tokenize(_cut_at_stop(reply.text, body.get("stop")))
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    if limit is not None and len(tokens) > limit:
        tokens, finish_reason = tokens[:limit], "length"
    n_echoed = 0
    if request.api == "completions" and body.get("echo"):
        echoed = tokenize(request.prompt)
        tokens, n_echoed = [*echoed, *tokens], len(echoed)
    asked, n_top = _asked_logprobs(request)
    values = _logprobs(tokens, logprob, n_echoed > 0) if asked else []
    return Choice(index, tokens, finish_reason, values, n_top, n_echoed, reply.fields)


def _cut_at_stop(text: str, stop: Any) -> str:
    stops = [stop] if isinstance(stop, str) else stop or []
    ends = [end for mark in stops if mark and (end := text.find(mark)) >= 0]
    return text[: min(ends)] if ends else text


def _asked_logprobs(request: Request) -> tuple[bool, int]:
    """Whether log-probabilities are wanted, and for how many alternatives of each token.

    A chat asks with a truth value and `top_logprobs`, a plain completion with a number, 0 included.
    """
    asked = request.body.get("logprobs")
    if request.api == "chat":
        return bool(asked), int(request.body.get("top_logprobs") or 0)
    return asked is not None and asked is not False, int(asked or 0)


def _logprobs(tokens: Sequence[str], logprob: LogProb, has_prompt: bool) -> list[float | None]:
    """The first token of a prompt has nothing before it, and so no probability."""
    values: list[float | None] = []
    before = ""
    for token in tokens:
        values.append(None if has_prompt and not values else logprob(before, token))
        before += token
    return values
