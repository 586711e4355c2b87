"""What each benchmark can do, and where its functions are. Knows no model and no run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nanoeval.evals import hellaswag, mme, mmlu, mmmu_pro, textvqa
from nanoeval.evals._choices import LETTERS
from nanoeval.models.protocol import Prompt

Row = dict[str, Any]
Strategy = Literal["rank_ll", "gen_letter", "gen_answer"]
TaskName = Literal["mmlu", "hellaswag", "mmmu_pro", "textvqa", "mme"]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's plain functions with what a configuration may ask of it.

    `score` grades a reply (for HellaSwag there is none). `labels` names a row's options. The first
    of `strategies` is the default. `selects` lists the dataset keys that are its own.
    """

    title: str
    load: Callable[..., list[Row]]
    prompt: Callable[[Row, Strategy], Prompt]
    score: Callable[[Row, str], tuple[str, float]] | None
    labels: Callable[[Row], Sequence[str]]
    strategies: tuple[Strategy, ...]
    split: str
    gold: Callable[[Row], str] = lambda row: str(row["answer"])
    sees: bool = False
    selects: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    max_new_tokens: int = 8
    groups: str | None = "subject"


def _letters(row: Row) -> Sequence[str]:
    return LETTERS[: len(row["options"])]


def _mmmu_pro_prompt(row: Row, strategy: Strategy) -> Prompt:
    return mmmu_pro.prompt(row) if strategy == "gen_letter" else mmmu_pro.prompt(row, "Answer:")


BENCHMARKS: Mapping[str, Benchmark] = {
    "mmlu": Benchmark(
        title="MMLU",
        load=mmlu.load,
        prompt=lambda row, strategy: mmlu.prompt(row),
        score=mmlu.score,
        labels=_letters,
        strategies=("rank_ll", "gen_letter"),
        split="test",
        selects={"subjects": mmlu.SUBJECTS},
    ),
    "hellaswag": Benchmark(
        title="HellaSwag",
        load=hellaswag.load,
        prompt=lambda row, strategy: hellaswag.prompt(row),
        score=None,
        labels=_letters,
        strategies=("rank_ll",),
        split="validation",
        groups=None,
    ),
    "mmmu_pro": Benchmark(
        title="MMMU-Pro",
        load=mmmu_pro.load,
        prompt=_mmmu_pro_prompt,
        score=mmmu_pro.score,
        labels=_letters,
        strategies=("gen_letter", "rank_ll"),
        split="test",
        sees=True,
        selects={"subset_name": mmmu_pro.SUBSETS},
    ),
    "textvqa": Benchmark(
        title="TextVQA",
        load=textvqa.load,
        prompt=lambda row, strategy: textvqa.prompt(row),
        score=textvqa.score,
        labels=lambda row: (),
        strategies=("gen_answer",),
        split="validation",
        gold=textvqa.target,
        sees=True,
        max_new_tokens=32,
        groups=None,
    ),
    "mme": Benchmark(
        title="MME",
        load=mme.load,
        prompt=lambda row, strategy: mme.prompt(row),
        score=mme.score,
        labels=lambda row: mme.OPTIONS,
        strategies=("gen_answer", "rank_ll"),
        split="test",
        sees=True,
        groups="category",
    ),
}
