"""Writes what people and programs read: stderr, stdout, files. Knows not what it says.

Replies hold what a terminal or a file cannot: it goes out escaped, and costs nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, TextIO

from nanoeval.endpoint.config import EndpointError


class OutputError(EndpointError):
    """A file or stream that should hold the results cannot be written."""


def say(line: str) -> None:
    """A line for people, on stderr."""
    _print(line, sys.stderr)


def show(text: str) -> None:
    """Text that was asked for, on stdout."""
    _print(text, sys.stdout)


def show_json(value: Any) -> None:
    """`value` on stdout, in letters that its encoding has."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    show(text)


def _print(text: str, stream: TextIO) -> None:
    encoding = stream.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except OSError as error:
        # What is still in the buffer must not fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        # Whoever closed a pipe has seen enough.
        if not isinstance(error, BrokenPipeError):
            raise OutputError(f"{stream.name} cannot be written: {error.strerror}") from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` on one line, like `write_text`."""
    # The only letters that UTF-8 lacks are lone surrogates, whose escape in JSON is Python's.
    write_text(path, json.dumps(value, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: what it held stays until then. Raises OutputError."""
    content = text.encode("utf-8", "backslashreplace")
    is_device = path.exists() and not path.is_file()
    target = path if is_device else path.resolve()
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if is_device:
            path.write_bytes(content)
            return
        try:
            unfinished.write_bytes(content)
            if target.exists():
                shutil.copymode(target, unfinished)
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def check_targets(*paths: Path | None) -> None:
    """Refuse output files that could not be written, before anything is done for them."""
    for path in paths:
        if path is None:
            continue
        folder = path.absolute().parent
        if not folder.is_dir():
            raise EndpointError(f"{path}: the folder {folder} does not exist")
        if path.is_dir():
            raise EndpointError(f"{path} is a folder; name a file in it")
        # A file is written beside its old self, which takes its folder; a pipe is not.
        needed = [path, folder] if path.is_file() else [path if path.exists() else folder]
        if not all(os.access(place, os.W_OK) for place in needed):
            raise EndpointError(f"{path} cannot be written: permission denied")
