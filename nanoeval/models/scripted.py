"""A model whose replies are written down: for tests and trials, without a network."""

from __future__ import annotations

import asyncio
import difflib
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chz

from nanoeval.models._messages import hide_images
from nanoeval.models.protocol import Completion, ContinuationScore, Model, Prompt, Usage
from nanoeval.recorder import get_recorder


@chz.chz
class ScriptedModel(Model):
    """Replies what `reply` says: a text for everything, a text by prompt, or a function of it.

    A function gets the prompt as `complete` got it and returns a text or a Completion; it may be
    async, and what it raises reaches the caller. A mapping is asked for the last message's text. A
    function is named `module:function` on a command line.
    """

    reply: Callable[[Prompt], Any] | Mapping[str, Any] | str = chz.field(
        doc="A text, a mapping from prompts to texts, or a function (module:function)."
    )
    score: Callable[[Prompt, str], float] | None = chz.field(
        default=None, doc="Log-likelihood of a continuation after a context; None = cannot."
    )
    name: str = "scripted"
    latency: float = chz.field(default=0.0, doc="Seconds that each reply takes.")

    def get_model_name(self) -> str:
        """The name for reports."""
        return self.name

    async def complete(self, prompt: Prompt, **params: Any) -> Completion:
        """The scripted reply to `prompt`; `params` change nothing but are recorded.

        Usage counts words. Raises KeyError for a prompt that the mapping does not hold.
        """
        started = time.perf_counter()
        if self.latency:
            await asyncio.sleep(self.latency)
        reply = self._reply_to(prompt)
        if inspect.isawaitable(reply):
            reply = await reply
        latency = time.perf_counter() - started
        if not isinstance(reply, Completion):
            usage = Usage(len(_last_text(prompt).split()), len(str(reply).split()))
            reply = Completion(str(reply), "stop", usage, latency=latency, raw=reply)
        try:
            recorder = get_recorder()
        except LookupError:
            return reply
        recorder.record_sampling(
            hide_images(prompt),
            reply.text,
            model=self.name,
            params=params,
            finish_reason=reply.finish_reason,
            usage={
                "prompt_tokens": reply.usage.prompt_tokens,
                "completion_tokens": reply.usage.completion_tokens,
            },
            latency=reply.latency,
        )
        return reply

    async def loglikelihood(
        self, context: Prompt, continuations: Sequence[str]
    ) -> list[ContinuationScore]:
        """What `score` says of each continuation; the best one is called greedy."""
        if self.score is None:
            return await super().loglikelihood(context, continuations)
        values = [self.score(context, continuation) for continuation in continuations]
        return [
            ContinuationScore(value, max(1, len(text.split())), value == max(values))
            for text, value in zip(continuations, values, strict=True)
        ]

    def _reply_to(self, prompt: Prompt) -> Any:
        if isinstance(self.reply, str):
            return self.reply
        if not isinstance(self.reply, Mapping):
            return self.reply(prompt)
        text = _last_text(prompt)
        if text not in self.reply:
            near = difflib.get_close_matches(text, self.reply, n=1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise KeyError(f"no reply is scripted for the prompt {text[:200]!r}{hint}")
        return self.reply[text]


def _last_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    content = prompt[-1].get("content") if prompt else ""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content or "")
