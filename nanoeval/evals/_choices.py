"""Options, their letters, and which one a reply or a ranking picks. Knows no benchmark."""

from __future__ import annotations

import ast
import base64
import difflib
import json
import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

from nanoeval.evals._datasets import DatasetError, image_media_type

T = TypeVar("T")

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Shown where a reply picks nothing.
NOTHING = "?"


def read_options(value: Any, row_id: str) -> list[str]:
    """The options that a column holds, as a list or as a string that spells one (JSON or Python).

    Raises DatasetError, which names the row, for none, for more than there are letters, and for
    what is no list.
    """
    if isinstance(value, str):
        for read in (json.loads, ast.literal_eval):
            try:
                value = read(value)
                break
            except (ValueError, SyntaxError):
                continue
    if not isinstance(value, list | tuple) or not value:
        raise DatasetError(
            f"example {row_id} has no options: {value!r:.60}; it needs a list of them"
        )
    if len(value) > len(LETTERS):
        raise DatasetError(f"example {row_id} has {len(value)} options, more than letters")
    return [str(option) for option in value]


def read_gold(value: Any, options: Sequence[str], row_id: str) -> str:
    """The gold letter that a column holds: as a letter, or as a number from 0.

    Raises DatasetError, which names the row, for one that is none of the options.
    """
    letters = LETTERS[: len(options)]
    text = str(value).strip()
    if not isinstance(value, bool) and text.isdecimal() and int(text) < len(options):
        return letters[int(text)]
    if len(text) == 1 and text in letters:
        return text
    raise DatasetError(
        f"example {row_id} has the gold label {value!r}, which is none of its {len(options)}"
        f" options ({letters[0]} to {letters[-1]}, or 0 to {len(options) - 1})"
    )


def lettered(options: Sequence[str]) -> str:
    """One line for each option: "A. text"."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))


def first_letter(reply: str, num_options: int) -> str:
    """The first capital letter in `reply` that stands alone and is an option's; "?" for none.

    Alone means with no letter, digit or apostrophe and letter beside it: "I'm" holds no I.
    """
    letters = LETTERS[:num_options]
    found = re.search(rf"(?<![^\W_])(?<!['’])[{letters}](?![^\W_])(?!['’]\w)", reply)
    return found.group() if found else NOTHING


def best_option(scores: Sequence[float]) -> int:
    """The index of the highest score; of equal ones the lowest."""
    # Ties go to the lower letter, so that two machines grade alike.
    return max(range(len(scores)), key=lambda index: (scores[index], -index))


def take_evenly(groups: Sequence[Sequence[T]], size: int | None) -> list[T]:
    """The first `size` items in all, as evenly from the groups as they allow, in their order."""
    if size is None:
        return [item for group in groups for item in group]
    places = [
        (group, index)
        for column in zip_longest(*(range(len(group)) for group in groups))
        for group, index in enumerate(column)
        if index is not None
    ]
    return [groups[group][index] for group, index in sorted(places[:size])]


def check_known(names: Iterable[str], known: Sequence[str], what: str) -> None:
    """Raise ValueError for the first of `names` that is not known, with the nearest that are."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"the nearest: {', '.join(near)}" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{what} {name!r} is not known; {hint}")


def user_message(*parts: str | bytes) -> list[dict[str, Any]]:
    """One user message of texts (str) and encoded images (bytes), in that order."""
    content: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            data = base64.b64encode(part).decode("ascii")
            url = f"data:{image_media_type(part)};base64,{data}"
            content.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": content}]
