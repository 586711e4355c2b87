"""What a model is: `complete`, and where it can `loglikelihood`. Knows no particular model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import chz

from nanoeval.asyncio_utils import HasAsyncContextManager

# Chat messages in OpenAI's form ({"role": ..., "content": str or a list of content parts}),
# or one string for a single user message (chat models) or a plain prompt (completion models).
Prompt = str | Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Usage:
    """Tokens of one call; None where the model did not say."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True)
class Completion:
    """One reply. `latency` and `time_to_first_token` are seconds; `raw` is what the model sent."""

    text: str
    finish_reason: str | None = None
    usage: Usage = field(default_factory=Usage)
    # Log-probabilities in the model's own form, where asked for and given.
    logprobs: Any = None
    latency: float = 0.0
    # None unless the reply was streamed.
    time_to_first_token: float | None = None
    raw: Any = None


@dataclass(frozen=True)
class ContinuationScore:
    """The log-likelihood (natural log, summed over tokens) of one continuation after a context."""

    logprob: float
    n_tokens: int
    # Whether greedy decoding would have produced exactly this continuation.
    is_greedy: bool


@chz.chz
class Model(HasAsyncContextManager):
    """A language model. Enter it (`async with model:`) before many calls; calls work without.

    Calls record themselves to the current recorder, where there is one, and raise
    RolloutSystemError for what the system, not the model, broke.
    """

    def get_model_name(self) -> str:
        """The name for reports."""
        raise NotImplementedError(f"{type(self).__name__} must define get_model_name()")

    async def complete(self, prompt: Prompt, **params: Any) -> Completion:
        """Answer `prompt`; `params` (temperature, max_tokens, ...) are passed on as they are."""
        raise NotImplementedError(f"{type(self).__name__} must define complete(prompt)")

    async def loglikelihood(
        self, context: Prompt, continuations: Sequence[str]
    ) -> list[ContinuationScore]:
        """Score each of `continuations` after `context`; one score each, in their order.

        A model that cannot raises TypeError, which names it.
        """
        raise TypeError(f"{type(self).__name__} cannot give log-likelihoods of continuations")
