"""GSM8K: grade-school word problems, 8-shot chain of thought as a chat of many turns.

Data: Cobbe et al., "Training verifiers" (2021). Instruction and exemplars are this package's own;
`strict_match` and `flexible_extract` give lm-evaluation-harness's verdicts on any reply.
"""

from __future__ import annotations

import re
from typing import Any

import chz

from nanoeval.evals._datasets import load_rows
from nanoeval.evals._generation import GenerationEval

INSTRUCTION = (
    "Solve this problem step by step. Close with one sentence of the form"
    ' "The final answer is N", where N is the number asked for.\n\nProblem: {question}'
)
EXEMPLARS = (
    "A shelf holds 12 cups. Mia puts 7 more on it. How many cups does it hold now?",
    "The shelf held 12 cups. With 7 more it holds 12 + 7 = 19. The final answer is 19",
    "Tom buys 4 packs of 6 pens. He gives 5 pens away. How many pens are left?",
    "He buys 4 * 6 = 24 pens. After giving 5 away he has 24 - 5 = 19. The final answer is 19",
    "A train ticket costs $14. How much do 3 adults pay who share a $6 discount?",
    "Three tickets cost 3 * 14 = 42 dollars. Less 6 that is 36. The final answer is 36",
    "Lena reads 15 pages a day. Her book has 180 pages. How many days does she need?",
    "She needs 180 / 15 = 12 days. The final answer is 12",
    "A tank of 200 litres is 40% full. How many litres are missing?",
    "It holds 0.4 * 200 = 80 litres, so 200 - 80 = 120 are missing. The final answer is 120",
    "Ben is 9. His sister is twice as old, their brother 5 years older than her. How old is he?",
    "The sister is 2 * 9 = 18, the brother 18 + 5 = 23. The final answer is 23",
    "A baker sells 30 rolls at $2 and 20 at $3. The flour cost $45. What is left to her?",
    "She takes 30 * 2 + 20 * 3 = 60 + 60 = 120. Less 45 that is 75. The final answer is 75",
    "Half of 48 pupils walk to school, a third come by bike. How many do neither?",
    "48 / 2 = 24 walk and 48 / 3 = 16 cycle; 48 - 24 - 16 = 8. The final answer is 8",
)
SHOTS = [
    {"role": "user", "content": INSTRUCTION.format(question=text)}
    if number % 2 == 0
    else {"role": "assistant", "content": text}
    for number, text in enumerate(EXEMPLARS)
]
# The harness's patterns for a number, and what it drops before it compares.
NUMBER = r"((-?[$0-9.,]{2,})|(-?[0-9]+))"
STRICT, FLEXIBLE = re.compile("The final answer is " + NUMBER), re.compile(NUMBER)
PLAIN_NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+"
STATED = re.compile(rf"the final answer is[^\d\n.-]*({PLAIN_NUMBER})", re.IGNORECASE)


def load() -> list[dict[str, Any]]:
    """The 1,319 test problems: `question` and `answer`, which ends in "#### " and the number."""
    return load_rows("openai/gsm8k", "main", "test")


def prompt(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Eight questions and answers as turns of a chat, then the row's own question."""
    return [*SHOTS, {"role": "user", "content": INSTRUCTION.format(question=row["question"])}]


def target(row: dict[str, Any]) -> str:
    """The number after the last "####"."""
    return str(row["answer"]).rpartition("####")[2].strip()


def score(row: dict[str, Any], reply: str) -> dict[str, float]:
    """`exact_match` compares the last stated number, else the last one, by value."""
    found = STATED.findall(reply) or re.findall(PLAIN_NUMBER, reply)
    return {
        "exact_match": float(bool(found) and _value(found[-1]) == _value(target(row))),
        "strict_match": _harness_match(STRICT, reply, target(row)),
        "flexible_extract": _harness_match(FLEXIBLE, reply, target(row)),
    }


def _value(text: str) -> float | str:
    text = text.replace(",", "").replace("$", "")
    return float(text) if re.fullmatch(PLAIN_NUMBER, text) else text


def _harness_match(pattern: re.Pattern[str], reply: str, right: str) -> float:
    found = pattern.findall(reply)
    return float(bool(found) and _bare(found[-1][0]) == _bare(right))


def _bare(text: str) -> str:
    text = text.strip().replace(",", "").replace("$", "").rpartition("#### ")[2]
    return text.removesuffix(".").lower()


@chz.chz
class GSM8KCotLlama(GenerationEval):
    load, prompt = staticmethod(load), staticmethod(prompt)
    target, score = staticmethod(target), staticmethod(score)

    def metric_names(self) -> tuple[str, ...]:
        return ("exact_match", "strict_match", "flexible_extract")
