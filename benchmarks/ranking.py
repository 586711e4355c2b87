"""Times `rank_ll` against the plain loop: one forward pass for each option.

    python benchmarks/ranking.py [--questions 400] [--device cpu]

Makes a random GPT-2-like model of 30 million parameters and four-option questions of 100 to 300
tokens, scores them both ways with the same weights and threads, and says how many times as fast
the batched way is, how far its log-likelihoods lie from the loop's, how much of the tokens was
padding, and how long a second task waits for the model when a suite keeps it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from nanoeval.models.hf import HFModel, keep_loaded

VOCABULARY = 8000
PROMPT_TOKENS = (100, 300)
OPTION_TOKENS = (3, 15)
NUM_OPTIONS = 4

Question = tuple[str, list[str]]


def make_checkpoint(folder: Path) -> int:
    """Save a random model and a tokenizer of one token a word; returns the number of parameters."""
    words = {f"w{i}": i + 1 for i in range(VOCABULARY - 1)}
    backing = Tokenizer(models.WordLevel({"<unk>": 0, **words}, unk_token="<unk>"))
    backing.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backing, unk_token="<unk>")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=512,
            n_layer=8,
            n_head=8,
            n_positions=512,
            initializer_range=0.1,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def make_questions(count: int) -> list[Question]:
    """Prompts and four options each, of random words."""
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(f"w{rng.randrange(VOCABULARY - 1)}" for _ in range(rng.randint(low, high)))

    return [
        (text(*PROMPT_TOKENS), [" " + text(*OPTION_TOKENS) for _ in range(NUM_OPTIONS)])
        for _ in range(count)
    ]


@torch.inference_mode()
def plain_loop(folder: Path, questions: list[Question], device: str) -> tuple[float, list[float]]:
    """Seconds and log-likelihoods of the loop; the model is loaded and warm before the clock."""
    model = GPT2LMHeadModel.from_pretrained(folder).to(device).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model(torch.ones(1, 16, dtype=torch.long, device=device))
    started = time.perf_counter()
    found = []
    for prompt, options in questions:
        before = tokenizer(prompt)["input_ids"]
        for option in options:
            own = tokenizer(option, add_special_tokens=False)["input_ids"]
            tokens = torch.tensor([before + own], device=device)
            logprobs = model(tokens[:, :-1]).logits.float().log_softmax(-1)[0, len(before) - 1 :]
            found.append(logprobs.gather(-1, tokens[0, len(before) :, None]).sum().item())
    return time.perf_counter() - started, found


async def batched(
    folder: Path, questions: list[Question], device: str
) -> tuple[float, list[float], float, float]:
    """Seconds, log-likelihoods, padding's share, and the seconds a second task waits to start."""
    model = HFModel(model_id=str(folder), device=device)
    async with keep_loaded():
        async with model:
            await model.loglikelihood("w1 w2", [" w3 w4"])
            started = time.perf_counter()
            scores = await asyncio.gather(*(model.loglikelihood(*q) for q in questions))
            elapsed = time.perf_counter() - started
            padding = model.get_statistics().padding_share
        started = time.perf_counter()
        async with HFModel(model_id=str(folder), device=device):
            waited = time.perf_counter() - started
    return elapsed, [score.logprob for own in scores for score in own], padding, waited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    questions = make_questions(arguments.questions)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        millions = make_checkpoint(folder) / 1e6
        fast, found, padding, waited = asyncio.run(batched(folder, questions, arguments.device))
        slow, wanted = plain_loop(folder, questions, arguments.device)
    worst = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
    print(f"model       {millions:.0f} million parameters, {torch.get_num_threads()} threads")
    print(f"plain loop  {slow:6.1f} s  {len(questions) / slow:6.1f} questions/s")
    print(f"rank_ll     {fast:6.1f} s  {len(questions) / fast:6.1f} questions/s")
    print(f"ratio       {slow / fast:6.2f}  (wanted: at least 3)")
    print(f"difference  {worst:.1e}  (wanted: at most 1e-4)")
    print(f"padding     {padding:6.1%}  (wanted: under 10 %)")
    print(f"second task waits {waited * 1000:.1f} ms for the model")


if __name__ == "__main__":
    main()
