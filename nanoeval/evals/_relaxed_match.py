"""Relaxed correctness of short answers, as ChartQA defines it. Knows no data set.

Source: Masry et al., "ChartQA" (2022), section 5.1, after Methani et al. (2020). On any reply these
functions give the verdicts of lm-evaluation-harness's task `chartqa`.
"""

from __future__ import annotations

import re
import string

# Numbers may be off by this share of the target.
TOLERANCE = 0.05


def stated_answer(reply: str) -> str:
    """The first line with text after the last "answer:", without Markdown; "" without one."""
    reply = re.sub(r"([aA]nswer)\**:\**", r"\1:", reply)
    start = reply.lower().rfind("answer:")
    lines = reply[start + len("answer:") :].split("\n") if start >= 0 else []
    line = next((line.strip() for line in lines if line.strip()), "")
    return re.sub(r"[*_\[\]()]", "", line)


def is_close(said: str, target: str) -> bool:
    """Numbers within the tolerance, a percentage also as a share; letters and texts as they are."""
    said, target = _clean(said), _clean(target)
    (a, a_percent), (b, b_percent) = _number(said), _number(target)
    if a is not None and b is not None:
        pairs = [(a, b)]
        pairs += [(a / 100, b)] if a_percent else []
        pairs += [(a, b / 100)] if b_percent else []
        return any(abs(x - y) / max(abs(y), 1e-10) <= TOLERANCE for x, y in pairs)
    if len(target) == 1 and target.isalpha() and said:
        return said[0].lower() == target.lower()
    return said.rstrip(string.punctuation).lower() == target.lower()


def is_mentioned(reply: str, target: str) -> bool:
    """Whether a number stands anywhere, or a text where answers tend to stand."""
    try:
        number: float | int = float(target)
        number = int(number) if int(number) == number else number
    except (ValueError, OverflowError):
        places = (f"is {target}", f"was {target}", f" {target}.", f"are {target}", f"\n\n{target}")
        return any(place.lower() in reply for place in places)
    return f"{number:,}" in reply or str(number) in reply


def _clean(text: str) -> str:
    if any(character.isdigit() for character in text):
        while text and text[-1] != "%" and (text[-1] in string.punctuation or text[-1].isspace()):
            text = text[:-1]
        return text.replace(",", "").replace("$", "")
    return text[1:-1] if text[:1] in {'"', "'"} and text[-1] == text[0] else text


def _number(text: str) -> tuple[float | None, bool]:
    text = text.strip()
    try:
        return float(text.rstrip("%")), text.endswith("%")
    except ValueError:
        return None, False
