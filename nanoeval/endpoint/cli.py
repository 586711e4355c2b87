"""The command `nano-eval`: which of its three commands is meant, and that no error escapes.

Exit status: 0 all samples answered, 1 a threshold failed, 2 samples without an answer, 3 the server
or the arguments are wrong. `compare` and --against: 0 same, 1 different, 2 cannot tell, 3 wrong.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from nanoeval.endpoint.config import EndpointError
from nanoeval.endpoint.options import (
    Parser,
    add_comparison_options,
    check_parser,
    make_plan,
    without_keys,
)
from nanoeval.endpoint.output import check_targets, show, show_json
from nanoeval.endpoint.session import OK, WRONG, carry_out_plan, complain, show_comparison

ENVIRONMENT = {
    # The table says it; what the engine prints of a summary would say it twice.
    "NANOEVAL_SUMMARY": "none",
    # Its import costs as much CPU as two thousand requests, and it slows down the others.
    "NANOEVAL_AIOMONITOR": "0",
    # A hub that is out of reach is one line of ours, not a page of its client's retries.
    "HF_HUB_VERBOSITY": "error",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        # A process of our own. Walking over what is there to stay costs a tenth of its CPU.
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
    arguments = [_underscored(argument) for argument in given]
    # The engine keeps the command line with the run.
    sys.argv[1:] = without_keys(sys.argv[1:])
    commands: dict[str, Callable[[list[str]], int]] = {"tasks": _tasks, "compare": _compare}
    try:
        if arguments and arguments[0] in commands:
            return commands[arguments[0]](arguments[1:])
        return _check(arguments)
    except EndpointError as error:
        return complain(error)
    except Exception:  # a defect: its status must not read as a threshold that failed
        traceback.print_exc()
        return WRONG


def _underscored(argument: str) -> str:
    """`--max-samples=5` as `--max_samples=5`."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _tasks(arguments: list[str]) -> int:
    parser = Parser(prog="nano-eval tasks", description="List the tasks that can be run.")
    parser.parse_args(arguments)
    from nanoeval.endpoint.report import aligned
    from nanoeval.endpoint.tasks import TASKS

    show(aligned([[name, sentence] for name, sentence in TASKS.describe().items()]))
    return OK


def _compare(arguments: list[str]) -> int:
    parser = Parser(
        prog="nano-eval compare",
        description="Are two results the same? Pairs them sample by sample.",
        epilog="Exit status: 0 same, 1 different, 2 cannot tell, 3 the files cannot be compared.",
    )
    parser.add_argument("first", type=Path, metavar="A.json", help="written by --output")
    parser.add_argument("second", type=Path, metavar="B.json")
    add_comparison_options(parser)
    options = parser.parse_args(arguments)
    check_targets(options.plot, options.html)
    from nanoeval.endpoint.compare import compare_reports, load_reports

    names = _distinct_names(options.first, options.second)
    comparison = compare_reports(
        load_reports(options.first), load_reports(options.second), options.margin, names
    )
    show_json(comparison)
    return show_comparison(comparison, options)


def _distinct_names(first: Path, second: Path) -> list[str]:
    if first.name != second.name:
        return [first.name, second.name]
    return [str(first), str(second)]


def _check(arguments: list[str]) -> int:
    parser = check_parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return WRONG
    plan = make_plan(parser.parse_args(arguments), arguments)
    from nanoeval.setup import nanoeval_entrypoint

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return nanoeval_entrypoint(carry_out_plan(plan))


if __name__ == "__main__":
    sys.exit(main())
