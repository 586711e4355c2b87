"""The page of promises is true to the tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "guarantees.md"


def names_of_tests() -> Iterator[str]:
    """All test functions of the suite."""
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.name


EXISTING = set(names_of_tests())


def promises() -> dict[str, str]:
    """The numbered sections of the page: title to text."""
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    return {s.partition("\n")[0]: s for s in sections if re.match(r"\d+\. ", s)}


@pytest.mark.parametrize("promise", promises())
def test_every_promise_names_tests_that_exist(promise: str) -> None:
    """A promise would stand there unproven, because its test was renamed or taken out."""
    named = set(re.findall(r"`(test_\w+)`", promises()[promise]))
    assert named
    assert named <= EXISTING, f"not in the suite: {sorted(named - EXISTING)}"
