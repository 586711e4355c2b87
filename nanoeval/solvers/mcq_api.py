"""Multiple-choice questions put to a model: the prompt, and the letter read from its reply."""

from __future__ import annotations

import base64
import functools
import re
import string
import unicodedata
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import chz

from nanoeval.models.openai_api import OpenAIModel
from nanoeval.models.protocol import Model
from nanoeval.solvers.mcq import Answer, MCQSolver, MCQTask, Question, is_right, task_random

ONE_ANSWER = (
    "Answer the multiple-choice question below. Think it through step by step, then end with a line"
    ' of the form "Answer: X", where X is the letter of the right answer.'
)
SEVERAL_ANSWERS = (
    "Answer the multiple-choice question below. One or more of its answers are right. Think it"
    ' through step by step, then end with a line of the form "Answer: X, Y" that names the letters'
    " of all right answers and no others."
)
# "Answer: B", "**Answer:** (B)", "answer:", B on the next line. What follows is only looked at, so
# that an "Answer:" within it is found as well.
ANSWER_LINE = re.compile(r"answer[*_]*\s*:(?=[\s*_]*(.*))", re.IGNORECASE)
# Markup that models put around a letter. What closes a bracket stays: it ends a label, "(B) No".
MARKUP = re.compile(
    r"</?[a-z]+>|</\w*|\\(?:boxed|text|textbf|mathrm|mathbf)\b|[*_`$\\({}\[<>\"'“”„‘’«»]"
)
SEPARATORS = re.compile(r"[,;/&+、]|\band\b", re.IGNORECASE)
MAX_ANSWERS = len(string.ascii_uppercase)


def format_question(question: Question) -> str:
    """The question with its answers under letters: "(A) ...", one a line."""
    if len(question.answers) > MAX_ANSWERS:
        raise ValueError(
            f"the question {question.question[:60]!r} has {len(question.answers)} answers;"
            f" letters reach for {MAX_ANSWERS}"
        )
    lettered = zip(string.ascii_uppercase, question.answers, strict=False)
    return question.question + "\n\n" + "\n".join(f"({x}) {answer}" for x, answer in lettered)


def make_messages(question: Question) -> list[dict[str, Any]]:
    """One user message that asks the question, its image first where it has one."""
    instruction = SEVERAL_ANSWERS if question.allow_multiple_choices else ONE_ANSWER
    text = f"{instruction}\n\n{format_question(question)}"
    if question.image is None:
        return [{"role": "user", "content": text}]
    url = f"data:{_media_type(question.image)};base64,{question.image}"
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


def _media_type(image: str) -> str:
    start = base64.b64decode(image[:24] + "=" * (-len(image[:24]) % 4))
    known = {b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}
    kind = next((name for magic, name in known.items() if start.startswith(magic)), "png")
    return f"image/{kind}"


def read_letters(reply: str, num_answers: int, several: bool) -> set[int]:
    """The indices that the last readable "Answer: X" of `reply` names; empty when none is.

    At most one index unless `several`. Letters are capital; a small one counts when it stands
    alone between separators. Words after the letter ("Answer: B, because ...") are passed over;
    after "A. Apple, B. Banana" the letters that are labels count.
    """
    # Full-width letters and punctuation become plain ones.
    lines = ANSWER_LINE.findall(unicodedata.normalize("NFKC", reply))
    for line in reversed(lines):
        picked = _letters_of(MARKUP.sub(" ", line), num_answers, several)
        if picked:
            return {string.ascii_uppercase.index(letter) for letter in picked}
    return set()


def _letters_of(line: str, num_answers: int, several: bool) -> str:
    letter_first = _letter_first(num_answers, several)
    picked, are_labels = "", False
    for item in filter(str.strip, SEPARATORS.split(line)):
        found = letter_first.match(item)
        has_text = found is not None and re.search(r"\w", found["text"]) is not None
        if found and (not are_labels or (found["label"] and has_text)):
            picked += re.sub(r"\s", "", found["letters"]).upper()
            are_labels = bool(found["label"]) and has_text
        if not several or not (are_labels or (found and not has_text)):
            break
    return picked


@functools.cache
def _letter_first(num_answers: int, several: bool) -> re.Pattern[str]:
    """Matches what starts with a letter of an answer: "B", "option B", "B) Paris", "B!"."""
    letters = string.ascii_uppercase[:num_answers]
    capital = rf"[{letters}](?:\s*[{letters}])*" if several else rf"[{letters}]"
    small = rf"[{letters.lower()}](?=\s*[.:)\]]|\W*$)"
    return re.compile(
        r"\s*(?:(?i:options?|choice)\s+)*"
        rf"(?P<letters>{capital}|{small})(?!\w|[-.:]\w)\s*(?P<label>[.:)\]]?)(?P<text>.*)"
    )


@chz.chz
class OpenAIAPIMCQSolver(MCQSolver[Answer]):
    """Asks a model, and reads the letter from the last "Answer: X" of its reply.

    A reply without one is replaced by a guess, the same one for a task in every run, with
    `random_guess` in its metadata; the summary's `num_random_guesses` says how many there were.
    """

    model: str | Model = chz.field(
        doc="The name of a model behind an OpenAI-compatible API ($OPENAI_BASE_URL), or a Model."
    )

    @chz.init_property
    def _asked(self) -> Model:
        return OpenAIModel(name=self.model) if isinstance(self.model, str) else self.model

    @asynccontextmanager
    async def _context(self) -> AsyncGenerator[None, None]:
        async with self._asked:
            yield

    async def solve(self, task: MCQTask) -> Answer:
        """Ask the model, which records the call, and judge what it picked."""
        question = task.question
        several = question.allow_multiple_choices
        reply = await self._asked.complete(make_messages(question))
        letters = read_letters(reply.text, len(question.answers), several)
        metadata = {"correct_format": True} if letters else {"random_guess": True}
        indices = letters or {task_random(task).randrange(len(question.answers))}
        picked = indices if several else indices.pop()
        return Answer(picked=picked, correct=is_right(question, picked), metadata=metadata)

    def compute_extra_metrics(
        self, results: list[tuple[MCQTask, Answer]], n_consensus: int
    ) -> dict[str, Any]:
        """`num_random_guesses`: the replies from which no letter could be read."""
        del n_consensus
        guesses = sum(bool(answer.metadata.get("random_guess")) for _, answer in results)
        return {"num_random_guesses": guesses}


MCQAPISolver = OpenAIAPIMCQSolver
