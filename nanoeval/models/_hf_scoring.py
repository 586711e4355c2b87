"""Forward passes: log-likelihoods of options after prompts, and greedy or sampled text.

Knows tensors and no files, chat templates or event loops.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import structlog
import torch

from nanoeval.models._hf_batching import MAX_PADDING, BatchStatistics, plan_batches
from nanoeval.models.protocol import ContinuationScore

# Tokens of one pass over options, the prompts that they attend to counted.
MAX_EXPANDED_TOKENS = 32_768
# Numbers in one block of float32 logits: 512 MiB.
MAX_LOGITS = 1 << 27
# How far the two ways of scoring may lie apart, per token, before the fast one is given up.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
TOLERANCE_HALF = 0.1

logger = structlog.get_logger(component=__name__)


@dataclass(frozen=True)
class Prompts:
    """Prompts as the model takes them: `inputs` holds left-padded input_ids and attention_mask."""

    inputs: dict[str, torch.Tensor]
    lengths: list[int]


@dataclass(frozen=True)
class _Row:
    """One option with two tokens or more, after prompt `prompt` of the batch."""

    prompt: int
    option: int
    tokens: list[int]


class Scorer:
    """Scores options after prompts; each prompt goes through the model once for all its options.

    `collate` turns encoded prompts into Prompts, whose keys and values are kept. There are three
    ways to the options, of which the first that the model can is taken: *packed*, all options of a
    question in one row under a mask that keeps them apart; *copied*, each option in a row with a
    copy of its prompt's keys and values; *plain*, each option behind its whole prompt. What a model
    can is tried on the first batch, against the plain way.
    """

    def __init__(
        self,
        model: Any,
        collate: Callable[[Sequence[Any]], Prompts],
        pad_id: int,
        statistics: BatchStatistics,
    ) -> None:
        self._model = model
        self._collate = collate
        self._pad_id = pad_id
        self._statistics = statistics
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted and not has_sectioned_positions(
            model.config
        )
        self._takes_logits_to_keep = "logits_to_keep" in accepted
        self.way: Literal["packed", "copied", "plain"] | None = None

    @torch.inference_mode()
    def score(
        self, prompts: Sequence[Any], options: Sequence[Sequence[list[int]]]
    ) -> list[list[ContinuationScore]]:
        """One list of scores for each prompt, one score for each of its options (token ids)."""
        if self.way is None:
            # The longest and the shortest, so that padding is part of the trial.
            ends = sorted({0, len(prompts) - 1})
            self.way = self._find_way([prompts[i] for i in ends], [options[i] for i in ends])
        if self.way == "plain":
            return [
                self._score_plainly(prompt, own)
                for prompt, own in zip(prompts, options, strict=True)
            ]
        return self._score_shared(prompts, options, self.way)

    def _find_way(
        self, prompts: Sequence[Any], options: Sequence[Sequence[list[int]]]
    ) -> Literal["packed", "copied", "plain"]:
        plain = [
            score
            for prompt, own in zip(prompts, options, strict=True)
            for score in self._score_plainly(prompt, own)
        ]
        tolerance = TOLERANCE.get(self._model.dtype, TOLERANCE_HALF)
        reasons = []
        ways: tuple[Literal["packed", "copied"], ...] = (
            ("packed", "copied") if self._may_pack() else ("copied",)
        )
        for way in ways:
            try:
                shared = list(chain.from_iterable(self._score_shared(prompts, options, way)))
            except (
                AttributeError,
                TypeError,
                ValueError,
                NotImplementedError,
                IndexError,
            ) as error:
                reasons.append(f"{way}: {type(error).__name__}: {error}"[:200])
                continue
            worst = max(
                abs(a.logprob - b.logprob) / a.n_tokens for a, b in zip(plain, shared, strict=True)
            )
            if worst <= tolerance:
                return way
            reasons.append(f"{way}: log-likelihoods differ by {worst:.2g} per token")
        logger.warning(
            f"{type(self._model).__name__} cannot encode a prompt once for all its options"
            f" ({'; '.join(reasons)}); each option is scored behind its whole prompt, which takes"
            " longer"
        )
        return "plain"

    def _may_pack(self) -> bool:
        """Whether a mask of our own reaches every layer as it is."""
        config = self._model.config
        attention = str(getattr(config, "_attn_implementation", None))
        has_window = getattr(config.get_text_config(), "sliding_window", None)
        return self._takes_positions and attention in ("sdpa", "eager") and not has_window

    def _score_shared(
        self,
        prompts: Sequence[Any],
        options: Sequence[Sequence[list[int]]],
        way: Literal["packed", "copied"],
    ) -> list[list[ContinuationScore]]:
        batch = self._collate(prompts)
        self._statistics.count(batch.lengths)
        rows = [
            _Row(prompt, index, tokens)
            for prompt, own in enumerate(options)
            for index, tokens in enumerate(own)
            if len(tokens) > 1
        ]
        output = self._forward(
            batch.inputs, self._positions(batch.inputs["attention_mask"]), use_cache=bool(rows)
        )
        first = _score_first_tokens(output.logits[:, -1], options)
        scores = [[list(score) for score in own] for own in first]
        score_rest = self._score_packed if way == "packed" else self._score_copied
        for row, (logprob, is_greedy) in score_rest(rows, batch, output.past_key_values):
            scores[row.prompt][row.option][0] += logprob
            scores[row.prompt][row.option][1] *= is_greedy
        return [
            [
                ContinuationScore(float(logprob), len(tokens), bool(is_greedy))
                for (logprob, is_greedy), tokens in zip(found, own, strict=True)
            ]
            for found, own in zip(scores, options, strict=True)
        ]

    def _score_packed(
        self, rows: list[_Row], batch: Prompts, cache: Any
    ) -> Iterator[tuple[_Row, tuple[float, bool]]]:
        """The options' tokens after their first, those of one prompt side by side in one row."""
        owned: list[list[_Row]] = [[] for _ in batch.lengths]
        for row in rows:
            owned[row.prompt].append(row)
        lengths = [sum(len(row.tokens) - 1 for row in own) for own in owned]
        max_tokens = max(1, MAX_LOGITS // _vocabulary_size(self._model.config))
        for part in plan_batches(lengths, max_tokens, None, _spare_padding(batch, lengths)):
            # In the cache's own order, in which all of them need no copy of it.
            some = sorted(index for index in part if lengths[index])
            if some:
                own_cache = cache if len(some) == len(owned) else _selected(cache, some)
                yield from self._score_pack([owned[i] for i in some], some, batch, own_cache)

    def _score_pack(
        self, owned: list[list[_Row]], of_prompt: list[int], batch: Prompts, cache: Any
    ) -> Iterator[tuple[_Row, tuple[float, bool]]]:
        prompt_mask = batch.inputs["attention_mask"][of_prompt].bool()
        device = prompt_mask.device
        tokens, targets, option, offset = (
            _right_padded(values, fill, device)
            for values, fill in (
                ([[t for row in own for t in row.tokens[:-1]] for own in owned], self._pad_id),
                ([[t for row in own for t in row.tokens[1:]] for own in owned], self._pad_id),
                ([[i for i, row in enumerate(own) for _ in row.tokens[1:]] for own in owned], -1),
                ([[i for row in own for i in range(len(row.tokens) - 1)] for own in owned], 0),
            )
        )
        self._statistics.count((option >= 0).sum(-1).tolist())
        # A token sees its prompt, and of its own option what stands before it.
        is_own = (option[:, :, None] == option[:, None, :]) & (
            offset[:, :, None] >= offset[:, None, :]
        )
        seen = torch.cat([prompt_mask[:, None, :].expand(-1, tokens.shape[1], -1), is_own], dim=-1)
        dtype = self._model.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(
            ~seen, torch.finfo(dtype).min
        )
        positions = prompt_mask.sum(-1, keepdim=True) + offset
        inputs = {
            "input_ids": tokens,
            "attention_mask": mask[:, None],
            "past_key_values": cache,
        }
        output = self._forward(inputs, positions, use_cache=True, keep_all=True)
        values, is_best = _score_tokens(output.logits, targets)
        for index, own in enumerate(owned):
            start = 0
            for row in own:
                end = start + len(row.tokens) - 1
                yield row, (sum(values[index][start:end]), all(is_best[index][start:end]))
                start = end

    def _score_copied(
        self, rows: list[_Row], batch: Prompts, cache: Any
    ) -> Iterator[tuple[_Row, tuple[float, bool]]]:
        """The options' tokens after their first, each option with a copy of its prompt's cache."""
        mask = batch.inputs["attention_mask"]
        width = mask.shape[1]
        lengths = [len(row.tokens) - 1 for row in rows]
        max_rows = max(1, MAX_EXPANDED_TOKENS // (width + max(lengths, default=1)))
        max_tokens = max(1, MAX_LOGITS // _vocabulary_size(self._model.config))
        for part in plan_batches(lengths, max_tokens, max_rows):
            some = [rows[index] for index in part]
            own_lengths = [lengths[index] for index in part]
            self._statistics.count(own_lengths)
            tokens = _right_padded([row.tokens for row in some], self._pad_id, mask.device)
            own = _right_padded([[1] * length for length in own_lengths], 0, mask.device)
            of_prompt = [row.prompt for row in some]
            inputs = {
                "input_ids": tokens[:, :-1],
                "attention_mask": torch.cat([mask[of_prompt], own.to(mask.dtype)], dim=1),
                "past_key_values": _selected(cache, of_prompt),
            }
            positions = self._positions(inputs["attention_mask"])[:, width:]
            output = self._forward(inputs, positions, use_cache=True, keep_all=True)
            values, is_best = _score_tokens(output.logits, tokens[:, 1:])
            for index, row in enumerate(some):
                end = own_lengths[index]
                yield row, (sum(values[index][:end]), all(is_best[index][:end]))

    def _score_plainly(self, prompt: Any, options: Sequence[list[int]]) -> list[ContinuationScore]:
        """Each option in a forward pass of its own, behind its whole prompt."""
        scores = []
        for tokens in options:
            batch = self._collate([prompt])
            inputs = dict(batch.inputs)
            own = torch.tensor([tokens], device=inputs["input_ids"].device)
            added = {
                "input_ids": own,
                "attention_mask": torch.ones_like(own),
                "token_type_ids": torch.zeros_like(own),
            }
            for name, tail in added.items():
                if name in inputs:
                    whole = torch.cat([inputs[name], tail.to(inputs[name].dtype)], dim=1)
                    inputs[name] = whole[:, :-1]
            self._statistics.count([inputs["input_ids"].shape[1]])
            positions = self._positions(inputs["attention_mask"])
            output = self._forward(inputs, positions, use_cache=False, keep_all=True)
            [values], [is_best] = _score_tokens(output.logits[:, -len(tokens) :], own)
            scores.append(ContinuationScore(sum(values), len(tokens), all(is_best)))
        return scores

    def _positions(self, mask: torch.Tensor) -> torch.Tensor:
        """Positions counted from each row's first real token, as if there were no padding."""
        return (mask.long().cumsum(-1) - 1).clamp(min=0)

    def _forward(
        self,
        inputs: dict[str, Any],
        positions: torch.Tensor,
        use_cache: bool,
        keep_all: bool = False,
    ) -> Any:
        extra: dict[str, Any] = {"position_ids": positions} if self._takes_positions else {}
        if self._takes_logits_to_keep and not keep_all:
            extra["logits_to_keep"] = 1
        return self._model(**inputs, **extra, use_cache=use_cache)


def has_sectioned_positions(config: Any) -> bool:
    """Whether a token has several positions (time, height, width), which the model works out."""
    text = config.get_text_config()
    for name in ("rope_parameters", "rope_scaling"):
        if "mrope_section" in (getattr(text, name, None) or {}):
            return True
    return False


def _vocabulary_size(config: Any) -> int:
    return int(config.get_text_config().vocab_size)


def _spare_padding(batch: Prompts, lengths: list[int]) -> float:
    """The share of padding that options may hold so that MAX_PADDING holds for all tokens.

    Options are short beside prompts: few large passes with more padding are faster than many.
    """
    width = batch.inputs["input_ids"].shape[1]
    padding = width * len(batch.lengths) - sum(batch.lengths)
    spare = MAX_PADDING * (sum(batch.lengths) + sum(lengths)) - padding
    return max(MAX_PADDING, spare / max(1.0, spare + sum(lengths)))


def _right_padded(rows: list[list[int]], fill: int, device: torch.device) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=device)


def _selected(cache: Any, of_prompt: list[int]) -> Any:
    """A cache whose rows are copies of those rows; `cache` itself stays as it is."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    device = next(layer.keys.device for layer in cache.layers)
    selected.batch_select_indices(torch.tensor(of_prompt, device=device))
    return selected


def _score_first_tokens(
    logits: torch.Tensor, options: Sequence[Sequence[list[int]]]
) -> list[list[tuple[float, bool]]]:
    """Log-likelihood of each option's first token, and whether it is the likeliest."""
    prompts = [i for i, own in enumerate(options) for _ in own]
    tokens = [option[0] for own in options for option in own]
    logits = logits.float()
    values = (logits[prompts, tokens].double() - logits.logsumexp(-1).double()[prompts]).tolist()
    best = logits.argmax(-1).tolist()
    is_best = [best[i] == token for i, token in zip(prompts, tokens, strict=True)]
    found = iter(zip(values, is_best, strict=True))
    return [[next(found) for _ in own] for own in options]


def _score_tokens(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[list[list[float]], list[list[bool]]]:
    """Of each target its log-likelihood, and whether it is the likeliest token there."""
    logits = logits.float()
    values = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
    return values.tolist(), (logits.argmax(-1) == targets).tolist()
