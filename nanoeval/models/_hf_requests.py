"""What the device thread is asked, and what it answers. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScoreRequest:
    """Log-likelihoods of `continuations` after `prompt`: a string, or chat messages as JSON."""

    prompt: str
    is_chat: bool
    continuations: tuple[str, ...]


@dataclass(frozen=True)
class GenerateRequest:
    """A reply to `prompt`. A temperature of 0 is greedy; then top_p and seed mean nothing.

    Equal requests are answered once: sampled ones differ by their `nonce`.
    """

    prompt: str
    is_chat: bool
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    nonce: int = 0


@dataclass(frozen=True)
class Generated:
    """A reply, why it ended ("stop" or "length"), and its tokens and its prompt's, counted."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
