"""Command lines of the programs here: `key=value` arguments, help, and errors as one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

import chz
from chz.blueprint import (
    ConstructionException,
    ExtraneousBlueprintArg,
    InvalidBlueprintArg,
    MissingBlueprintArg,
)

from nanoeval._database_file import StoreError
from nanoeval._inspect import UnknownRunSetError, UnreadableRunSetError
from nanoeval._queueing import MissingCodeError
from nanoeval._schema import NewerSchemaError

HELP_WORDS = {"--help", "-h", "help"}
EXIT_INTERRUPTED = 130

ARGUMENT_ERRORS = (
    ConstructionException,
    ExtraneousBlueprintArg,
    InvalidBlueprintArg,
    MissingBlueprintArg,
)
EXPECTED_ERRORS = (
    UnknownRunSetError,
    UnreadableRunSetError,
    NewerSchemaError,
    StoreError,
    MissingCodeError,
    OSError,
)


class CommandError(Exception):
    """What the person asked for cannot be done; the message is the line they see."""


class StillRunningError(CommandError):
    """A run set is at work in another process."""


def run_command(main: Callable[..., None], manual: str | None) -> NoReturn:
    """Call `main` with the arguments of the command line, and exit.

    `manual` is shown for --help. The exit status is 0, or 1 after an error, which is one line on
    stderr, or 130 after Ctrl-C.
    """
    argv = sys.argv[1:]
    if HELP_WORDS & set(argv):
        print((manual or "").strip())
        sys.exit(0)
    try:
        _call(main, argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; without this Python complains at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (CommandError, *EXPECTED_ERRORS) as error:
        sys.exit(f"nanoeval: {error}")
    sys.exit(0)


def _call(main: Callable[..., None], argv: list[str]) -> None:
    for argument in argv:
        if "=" not in argument:
            raise CommandError(f"{argument!r} is not of the form key=value; see --help")
    try:
        chz.Blueprint(main).make_from_argv(argv)
    except ARGUMENT_ERRORS as error:
        # chz explains at length; these lines say which argument, and what it may have meant.
        first, *others = str(error).splitlines()
        hints = [line for line in others if line.startswith(("Did you mean", "Could not cast"))]
        lines = [first.partition(" to Blueprint for ")[0], *hints, "See --help"]
        raise CommandError(" ".join(_sentence(line) for line in lines)) from error


def _sentence(text: str) -> str:
    return text if text.endswith("?") else f"{text.rstrip('.')}."
