"""The eval of a baseline: any benchmark, by ranking or by generation. Writes its own report."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import chz

from nanoeval.baselines import report
from nanoeval.baselines.benchmarks import Row
from nanoeval.baselines.config import BaselineConfig
from nanoeval.baselines.summary import summarize
from nanoeval.eval import Eval, RolloutSystemError, Task
from nanoeval.evals._choices import NOTHING, best_option
from nanoeval.evals._generation import sample_hash
from nanoeval.models.protocol import Model, Prompt
from nanoeval.recorder import get_recorder


class Example(Task):
    """One example by its place in the data set; `fingerprint` is a hash of all that is asked."""

    index: int
    example_id: str
    subject: str | None
    gold: str
    fingerprint: str
    revision: str | None


@dataclass(frozen=True)
class Verdict:
    """What was picked ("?" for nothing) and its score in [0, 1].

    `logprobs` are those that were ranked, one for each option; `reply` is what was generated.
    """

    picked: str
    score: float
    logprobs: tuple[float, ...] | None = None
    reply: str | None = None

    @property
    def correct(self) -> bool:
        """Whether the score is full."""
        return self.score >= 1.0


@chz.chz
class BaselineEval(Eval[Example, Verdict]):
    """Asks `model` what `config` says. Its full summary is also written as the report."""

    config: BaselineConfig
    model: Model
    model_facts: dict[str, Any] = chz.field(doc="What the report says of the model.")

    def __getstate__(self) -> dict[str, Any]:
        # Examples are loaded anew where the eval is restored.
        return {name: value for name, value in self.__dict__.items() if name.startswith("X_")}

    @cached_property
    def rows(self) -> list[Row]:
        """The examples, loaded when first asked for."""
        return self.config.load_examples()

    def get_name(self) -> str:
        return self.config.task

    async def get_tasks(self) -> list[Example]:
        return await asyncio.to_thread(self._list_examples)

    def _list_examples(self) -> list[Example]:
        gold = self.config.benchmark.gold
        return [
            Example(
                question_id=f"{self.config.task}.{index}",
                index=index,
                example_id=row["id"],
                subject=row["subject"],
                gold=gold(row),
                fingerprint=self._fingerprint(row),
                revision=row["revision"],
            )
            for index, row in enumerate(self.rows)
        ]

    def _fingerprint(self, row: Row) -> str:
        prompt = self._prompt(row)
        messages = [{"content": prompt}] if isinstance(prompt, str) else list(prompt)
        gold = self.config.benchmark.gold(row)
        return sample_hash(messages, "\n".join([*row.get("options", ()), gold]))

    def _prompt(self, row: Row) -> Prompt:
        return self.config.benchmark.prompt(row, self.config.strategy)

    @asynccontextmanager
    async def _context(self) -> AsyncGenerator[None, None]:
        await asyncio.to_thread(lambda: self.rows)
        async with self.model:
            if not self.config.benchmark.sees:
                await self._plan_batches()
            yield

    async def _plan_batches(self) -> None:
        """Let a local model cut its batches over all examples, so that a run can be repeated."""
        is_ranked = self.config.strategy == "rank_ll"
        plan = getattr(self.model, "plan_loglikelihoods" if is_ranked else "plan_completions", None)
        if plan is None:
            return
        if is_ranked:
            await plan([(self._prompt(row), _continuations(row)) for row in self.rows])
        else:
            await plan([self._prompt(row) for row in self.rows], **self._params())

    def _params(self) -> dict[str, Any]:
        scoring = self.config.scoring
        return {"max_tokens": self.config.max_new_tokens, "temperature": 0, "seed": scoring.seed}

    async def evaluate(self, task: Example) -> Verdict:
        row = self.rows[task.index]
        if row["id"] != task.example_id or self.config.benchmark.gold(row) != task.gold:
            raise ValueError(
                f"example {task.index} is now {row['id']!r}, not {task.example_id!r}: the data set"
                f" has changed since this run began; delete {report.UNFINISHED} in"
                f" {self.config.report.output_dir} to start a new run"
            )
        is_ranked = self.config.strategy == "rank_ll"
        verdict = await (self._rank(row, task.gold) if is_ranked else self._ask(row))
        get_recorder().record_match(verdict.correct, expected=task.gold, picked=verdict.picked)
        return verdict

    async def _rank(self, row: Row, gold: str) -> Verdict:
        scores = await self.model.loglikelihood(self._prompt(row), _continuations(row))
        by_length = self.config.scoring.normalize_by_length
        logprobs = [s.logprob / s.n_tokens if by_length else s.logprob for s in scores]
        picked = self.config.benchmark.labels(row)[best_option(logprobs)]
        return Verdict(picked, float(picked == gold), logprobs=tuple(logprobs))

    async def _ask(self, row: Row) -> Verdict:
        reply = (await self.model.complete(self._prompt(row), **self._params())).text
        score = self.config.benchmark.score
        assert score is not None, "a benchmark without a score for replies is only ranked"
        return Verdict(*score(row, reply), reply=reply)

    def process_invalid(self, task: Example) -> Verdict:
        return Verdict(picked=NOTHING, score=0.0)

    async def get_summary(self, results: list[tuple[Example, Verdict]]) -> dict[str, Any]:
        return await asyncio.to_thread(summarize, self.config.task, results)

    async def get_full_summary(
        self, results: list[tuple[Example, Verdict | RolloutSystemError]]
    ) -> dict[str, Any]:
        """The summary of all that was asked; also writes the report's files."""
        metrics = await super().get_full_summary(results)
        if metrics["is_valid"]:
            metrics.pop("metrics_including_errors", None)
        summary = {"task": self.config.task, **metrics, **self._facts(results)}
        if results:
            await asyncio.to_thread(report.write, self.config, summary, results)
        return summary

    def _facts(self, results: Sequence[tuple[Example, Any]]) -> dict[str, Any]:
        """What the numbers are about: examples, scoring, model."""
        config = self.config
        whole = "".join(task.fingerprint for task, _ in results)
        is_ranked = config.strategy == "rank_ll"
        errors = (r for _, r in results if isinstance(r, RolloutSystemError))
        return {
            "total_examples": len(results),
            "first_error": next((f"{type(e).__name__}: {e}" for e in errors), None),
            "split": config.split,
            "subset_size": config.dataset.subset_size,
            "subset_name": config.dataset.subset_name,
            "dataset_revision": next((task.revision for task, _ in results), None),
            "samples_hash": hashlib.sha256(whole.encode()).hexdigest(),
            "scoring": {
                "strategy": config.strategy,
                "normalize_by_length": config.scoring.normalize_by_length,
                "max_new_tokens": None if is_ranked else config.max_new_tokens,
            },
            "seed": config.scoring.seed,
            **self.model_facts,
        }


def _continuations(row: Row) -> Sequence[str]:
    return [f" {option}" for option in row["options"]]
