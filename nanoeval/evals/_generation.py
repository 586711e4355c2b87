"""Evals that ask a model once per row and score the text of its reply. Knows no benchmark.

A benchmark is one file beside this one, with `load`, `prompt` and `score` as plain functions and
a `GenerationEval` that joins them; its module's name is the name of its task.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import chz

from nanoeval.eval import Eval, RolloutSystemError, Task
from nanoeval.evals._sample_summary import summarize_samples
from nanoeval.models._messages import flatten, hide_images
from nanoeval.models.openai_api import OpenAIModel, RequestRefused, ServerFailure
from nanoeval.models.protocol import Model
from nanoeval.recorder import get_recorder

# The server will say the same to every other request: there is no point in going on.
HOPELESS_STATUSES = frozenset({401, 403, 404})
# A server that fails this often in a row, with no reply in between, is taken for gone.
FAILURES_IN_A_ROW = 64


class ServerGone(Exception):
    """The server stopped answering in the middle of a run."""


class GenerationTask(Task):
    """One row of a data set. `fingerprint` is a hash of its prompt, images and target."""

    row: dict[str, Any]
    fingerprint: str


@dataclass(frozen=True)
class Sample:
    """One reply and its scores. `error` says why there is none, in the words of `ServerFailure`.

    Times are seconds; `started` is a Unix time, when the answered request was sent.
    """

    scores: Mapping[str, float] = field(default_factory=dict)
    reply: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    latency: float | None = None
    time_to_first_token: float | None = None
    tries: int = 1
    status: int | None = None
    started: float = 0.0
    # The model's name and fingerprint as the server reports them.
    model: str | None = None
    fingerprint: str | None = None
    error: str | None = None
    error_message: str | None = None

    @property
    def score(self) -> float | None:
        """The first of the scores; None without a reply."""
        return next(iter(self.scores.values()), None)


@chz.chz
class GenerationEval(Eval[GenerationTask, Sample]):
    """Joins the three functions of a benchmark to the engine. Override the methods below."""

    model: Model
    params: dict[str, Any] = chz.field(
        default_factory=dict, doc="Sent with every request; they stand above the task's own."
    )
    server: dict[str, Any] = chz.field(
        default_factory=dict, doc="What is known of the server, kept with the results."
    )

    @staticmethod
    def load() -> list[dict[str, Any]]:
        """All rows, in their order; runs in a thread."""
        raise NotImplementedError("an eval must define load()")

    @staticmethod
    def prompt(row: dict[str, Any]) -> list[dict[str, Any]]:
        """The chat messages that ask about `row`."""
        raise NotImplementedError("an eval must define prompt(row)")

    @staticmethod
    def target(row: dict[str, Any]) -> str:
        """The right answer."""
        raise NotImplementedError("an eval must define target(row)")

    @staticmethod
    def score(row: dict[str, Any], reply: str) -> dict[str, float]:
        """One number per name in `metric_names()`, in that order."""
        raise NotImplementedError("an eval must define score(row, reply)")

    def metric_names(self) -> tuple[str, ...]:
        """The metrics; the first is the one that is compared and shown while running."""
        return ("exact_match",)

    def default_params(self) -> dict[str, Any]:
        """Request parameters of the task, beneath those of the user."""
        return {"temperature": 0, "max_tokens": 512}

    def needs(self) -> frozenset[str]:
        """What a server must be able to do, in the words of `nanoeval.models.probe`."""
        return frozenset()

    def get_name(self) -> str:
        """The name of the module that defines the benchmark."""
        return type(self).__module__.rpartition(".")[2]

    def all_params(self) -> dict[str, Any]:
        """The parameters that are sent with every request."""
        own = self.model.params if isinstance(self.model, OpenAIModel) else {}
        asked = {**own, **self.params}
        default = self.default_params()
        if "max_completion_tokens" in asked:
            default.pop("max_tokens", None)  # servers refuse both names of one limit
        return {**default, **asked}

    async def get_tasks(self) -> AsyncIterator[GenerationTask]:
        """One task per row; its id is the row's number, from 0."""
        return self._listed()

    async def _listed(self) -> AsyncIterator[GenerationTask]:
        rows = await asyncio.to_thread(self.load)
        for index, row in enumerate(rows):
            fingerprint = sample_hash(self.prompt(row), self.target(row))
            yield GenerationTask(question_id=str(index), row=dict(row), fingerprint=fingerprint)

    async def evaluate(self, task: GenerationTask) -> Sample:
        """Ask once and score. A request that the server refuses becomes a Sample with an error."""
        try:
            sample = await self._ask(task)
        except ServerFailure as error:
            self._count_failure(error)
            raise
        except RequestRefused as error:
            if error.status in HOPELESS_STATUSES:
                raise
            sample = Sample(error=error.kind, error_message=str(error), status=error.status)
        self._failures_in_a_row.clear()
        score = sample.score
        get_recorder().record_match(
            score is not None and score >= 1,
            expected=self.target(task.row),
            scores=dict(sample.scores),
            error=sample.error,
            error_message=sample.error_message,
        )
        return sample

    async def get_summary(self, results: list[tuple[GenerationTask, Sample]]) -> dict[str, Any]:
        """The same as `get_full_summary`, for results without system errors."""
        return await self.get_full_summary(list(results))

    async def get_full_summary(
        self, results: list[tuple[GenerationTask, Sample | RolloutSystemError]]
    ) -> dict[str, Any]:
        """Metrics with standard errors, errors by kind, times, tokens; see `summarize_samples`."""
        samples = [(task, as_sample(task, result)) for task, result in results]
        fingerprints = sorted((int(task.question_id), task.fingerprint) for task, _ in samples)
        whole = "".join(fingerprint for _, fingerprint in fingerprints)
        return {
            **summarize_samples([sample for _, sample in samples], self.metric_names()),
            "samples_hash": hashlib.sha256(whole.encode()).hexdigest(),
            "request": {"api": getattr(self.model, "api", "chat"), "params": self.all_params()},
            "server": self.server,
        }

    @asynccontextmanager
    async def _context(self) -> AsyncGenerator[None, None]:
        async with self.model:
            yield

    async def _ask(self, task: GenerationTask) -> Sample:
        messages: Any = self.prompt(task.row)
        if getattr(self.model, "api", "chat") == "completions":
            messages = flatten(messages)
        completion = await self.model.complete(messages, **self.all_params())
        raw = completion.raw if isinstance(completion.raw, dict) else {}
        return Sample(
            scores=self.score(task.row, completion.text),
            reply=completion.text,
            finish_reason=completion.finish_reason,
            prompt_tokens=completion.usage.prompt_tokens,
            completion_tokens=completion.usage.completion_tokens,
            latency=completion.latency,
            time_to_first_token=completion.time_to_first_token,
            tries=getattr(completion, "tries", 1),
            status=getattr(completion, "status", None),
            # Time spent in the queue for a slot is not the server's.
            started=time.time() - completion.latency,
            model=raw.get("model"),
            fingerprint=raw.get("system_fingerprint"),
        )

    @chz.init_property
    def _failures_in_a_row(self) -> list[str]:
        return []

    def _count_failure(self, error: ServerFailure) -> None:
        self._failures_in_a_row.append(error.kind)
        if len(self._failures_in_a_row) >= FAILURES_IN_A_ROW:
            raise ServerGone(
                f"the last {FAILURES_IN_A_ROW} requests in a row failed, all tries included; the"
                f" last: {error}"
            ) from error


def as_sample(task: GenerationTask, result: Sample | RolloutSystemError) -> Sample:
    """`result`, or the Sample that stands for a system error of `task`."""
    if isinstance(result, Sample):
        return result
    return Sample(
        error=getattr(result, "kind", None) or type(result).__name__,
        error_message=str(result),
        status=getattr(result, "status", None),
        # Each try of the runner is as many of the client.
        tries=getattr(result, "tries", 1) * (1 + task.retry_idx),
    )


def sample_hash(messages: list[dict[str, Any]], target: str) -> str:
    """A hash of a prompt, the images in it and the target, as hexadecimal digits."""
    parts = [target]
    hidden = hide_images(messages)
    assert not isinstance(hidden, str)
    for message in hidden:
        content = message.get("content")
        if isinstance(content, str) and len(message) == 2:
            parts += (str(message.get("role")), content)
        else:
            parts.append(json.dumps(message, sort_keys=True))
    # Lengths keep apart what would read the same end to end.
    whole = "".join([f"{len(part)}:{part}" for part in parts])
    return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()
