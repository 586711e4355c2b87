"""Models from the Hugging Face hub or a folder, run in this process by torch and transformers.

Knows no eval. Importing it does not import torch.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, Literal

import chz

from nanoeval.models import _hf_loading
from nanoeval.models._hf_batching import BatchStatistics, DeviceThread
from nanoeval.models._hf_loading import Checkpoint, CheckpointError
from nanoeval.models._hf_requests import Generated, GenerateRequest, ScoreRequest
from nanoeval.models._messages import hide_images
from nanoeval.models.protocol import Completion, ContinuationScore, Model, Prompt, Usage
from nanoeval.recorder import get_recorder

__all__ = ["CheckpointError", "HFModel", "keep_loaded"]

DEFAULT_MAX_TOKENS = 256
# A forward pass cannot be interrupted; the thread of a closed model ends by itself after it.
SECONDS_TO_CLOSE = 1.0

# Sampled requests are all different, even when their prompts are equal.
_nonces = itertools.count(1)

_kept: ContextVar[dict[Any, DeviceThread] | None] = ContextVar("nanoeval_hf_kept", default=None)


@asynccontextmanager
async def keep_loaded() -> AsyncIterator[Mapping[Any, DeviceThread]]:
    """Keep each checkpoint that is loaded inside the block until its end; gives what is kept.

    Models that are entered one after the other, or restored from a pickle, then share one set of
    weights when their fields are equal.
    """
    kept: dict[Any, DeviceThread] = {}
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)
        for thread in kept.values():
            await _close(thread)


@chz.chz
class HFModel(Model):
    """A causal language model, or a vision-language model, of the `transformers` library.

    Concurrent calls are gathered into batches by length; one thread owns the device, and the event
    loop stays free. Enter the model around many calls: entering loads the weights, leaving frees
    them. Pickled, it is its fields and no weights.
    """

    model_id: str = chz.field(doc="A name on the hub, or a folder.")
    revision: str | None = chz.field(default=None, doc="The hub's commit, branch or tag.")
    is_vlm: bool = chz.field(default=False, doc="Load with its processor, to take images.")
    dtype: str = chz.field(default="auto", doc="float32, bfloat16, ...; auto = the checkpoint's.")
    device: str = chz.field(default="auto", doc="cpu, cuda, cuda:1, ...; auto = CUDA if there.")
    trust_remote_code: bool = chz.field(default=False, doc="Run code that the checkpoint brings.")
    attn_impl: str | None = chz.field(
        default=None, doc="sdpa, eager, flash_attention_2; None = the library's choice."
    )
    batch_size: int | Literal["auto"] = chz.field(
        default="auto", doc="Requests in a batch at most; auto = by their tokens and the device."
    )

    @chz.validate
    def _check_values(self) -> None:
        if self.batch_size != "auto" and self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1, or auto")
        if self.dtype not in _hf_loading.DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {', '.join(_hf_loading.DTYPES)}")

    def __getstate__(self) -> dict[str, Any]:
        # Threads and weights belong to this process.
        return {name: value for name, value in self.__dict__.items() if name.startswith("X_")}

    def get_model_name(self) -> str:
        """The name for reports."""
        return self.model_id

    def describe(self) -> dict[str, Any]:
        """What a report says of the model; reads its configuration, not its weights.

        Raises CheckpointError for a checkpoint that cannot be loaded as asked. Blocks.
        """
        return _hf_loading.describe(self._checkpoint())

    def get_statistics(self) -> BatchStatistics:
        """What the device has done for this model since it was loaded."""
        return self._thread().statistics

    async def complete(self, prompt: Prompt, **params: Any) -> Completion:
        """Answer `prompt`: messages through the chat template, a string as text to go on from.

        `params` are OpenAI's: max_tokens (256), temperature (0, greedy), top_p, seed, stop. Raises
        TypeError for any other.
        """
        started = time.perf_counter()
        request = _generate_request(prompt, params)
        reply: Generated = await self._ask(request)
        completion = Completion(
            reply.text,
            reply.finish_reason,
            Usage(reply.prompt_tokens, reply.completion_tokens),
            latency=time.perf_counter() - started,
            raw=reply,
        )
        self._record(prompt, completion.text, completion.latency, usage=completion.usage)
        return completion

    async def loglikelihood(
        self, context: Prompt, continuations: Sequence[str]
    ) -> list[ContinuationScore]:
        """Score each of `continuations`, tokenized on its own without special tokens.

        They follow the tokens of `context`: messages through the chat template up to the
        assistant's turn, a string with the special tokens that its tokenizer adds. A context that
        is too long for the model loses its beginning. Raises ValueError for a continuation without
        tokens.
        """
        started = time.perf_counter()
        request = _score_request(context, continuations)
        # Equal continuations are scored once, so that a tie is exactly a tie.
        found = dict(zip(request.continuations, await self._ask(request), strict=True))
        scores = [found[text] for text in continuations]
        sampled = [
            {"continuation": text, "logprob": score.logprob, "n_tokens": score.n_tokens}
            for text, score in zip(continuations, scores, strict=True)
        ]
        self._record(context, sampled, time.perf_counter() - started)
        return scores

    async def plan_loglikelihoods(self, requests: Sequence[tuple[Prompt, Sequence[str]]]) -> None:
        """Cut the batches of coming `loglikelihood` calls now; see `_hf_batching.expect`."""
        self._thread().expect(_score_request(context, texts) for context, texts in requests)

    async def plan_completions(self, prompts: Sequence[Prompt], **params: Any) -> None:
        """Cut the batches of coming greedy `complete` calls with these `params` now."""
        self._thread().expect(_generate_request(prompt, params) for prompt in prompts)

    @asynccontextmanager
    async def _context(self) -> AsyncGenerator[None, None]:
        async with self._in_use() as thread:
            # Shielded: a cancelled wait must not cancel what others wait for.
            await asyncio.shield(asyncio.wrap_future(thread.loaded))
            yield

    @asynccontextmanager
    async def _in_use(self) -> AsyncGenerator[DeviceThread, None]:
        """The device's thread, which the last user closes unless `keep_loaded` keeps it."""
        state = self.__dict__
        kept = _kept.get()
        if "_device_thread" not in state:
            key = (self._checkpoint(), self.batch_size)
            thread = kept.get(key) if kept is not None else None
            if thread is None:
                thread = self._new_thread()
            if kept is not None:
                kept[key] = thread
            state["_device_thread"], state["_users"] = thread, 0
        thread = state["_device_thread"]
        state["_users"] += 1
        try:
            yield thread
        finally:
            state["_users"] -= 1
            if state["_users"] == 0:
                del state["_device_thread"], state["_users"]
                if kept is None or thread not in kept.values():
                    await _close(thread)

    def _new_thread(self) -> DeviceThread:
        checkpoint, rows = self._checkpoint(), self.batch_size

        def make_backend(statistics: BatchStatistics) -> Any:
            from nanoeval.models._hf_backend import HFBackend

            return HFBackend(checkpoint, rows != "auto", statistics)

        thread = DeviceThread(make_backend, None if rows == "auto" else rows)
        thread.start()
        return thread

    def _thread(self) -> DeviceThread:
        thread: DeviceThread | None = self.__dict__.get("_device_thread")
        if thread is None:
            raise RuntimeError("enter the model first: `async with model:`")
        return thread

    async def _ask(self, request: ScoreRequest | GenerateRequest) -> Any:
        async with self._in_use() as thread:
            await asyncio.shield(asyncio.wrap_future(thread.loaded))
            return await asyncio.wrap_future(thread.submit(request))

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(
            self.model_id,
            self.revision,
            self.is_vlm,
            self.dtype,
            self.device,
            self.trust_remote_code,
            self.attn_impl,
        )

    def _record(
        self, prompt: Prompt, sampled: Any, latency: float, usage: Usage | None = None
    ) -> None:
        try:
            recorder = get_recorder()
        except LookupError:
            return
        extra: dict[str, Any] = {}
        if usage is not None:
            extra["usage"] = {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
            }
        recorder.record_sampling(
            hide_images(prompt), sampled, model=self.model_id, latency=latency, **extra
        )


async def _close(thread: DeviceThread) -> None:
    thread.close()
    await asyncio.to_thread(thread.join, SECONDS_TO_CLOSE)


def _as_text(prompt: Prompt) -> tuple[str, bool]:
    """A prompt as a hashable pair: its text, or its messages as JSON, and which of the two."""
    if isinstance(prompt, str):
        return prompt, False
    return json.dumps(list(prompt), sort_keys=True), True


def _score_request(context: Prompt, continuations: Sequence[str]) -> ScoreRequest:
    if not continuations:
        raise ValueError("loglikelihood needs at least one continuation")
    return ScoreRequest(*_as_text(context), tuple(dict.fromkeys(continuations)))


def _generate_request(prompt: Prompt, params: dict[str, Any]) -> GenerateRequest:
    stop = params.get("stop") or ()
    known = {"max_tokens": DEFAULT_MAX_TOKENS, **params}
    known["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if known.get("temperature"):
        known["nonce"] = next(_nonces)
    try:
        return GenerateRequest(*_as_text(prompt), **known)
    except TypeError as error:
        raise TypeError(
            f"HFModel.complete takes max_tokens, temperature, top_p, seed and stop: {error}"
        ) from error
