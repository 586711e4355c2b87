"""The command `python -m nanoeval.testing.server`: a scripted server until it is stopped."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanoeval.setup import raise_file_limit
from nanoeval.testing._faults import KINDS, Fault
from nanoeval.testing._script import Request
from nanoeval.testing._server import ScriptedServer

EXAMPLES = """\
examples:
  python -m nanoeval.testing.server
  python -m nanoeval.testing.server --port 0 --latency 0.2 --fault 429:0.05 --fault cut:0.01
  python -m nanoeval.testing.server --reply-function my_replies:answer --model llama --api-key k
  python -m nanoeval.testing.server --reply-file replies.jsonl     # {"prompt": ..., "reply": ...}

faults (KIND = every request, KIND:RATE = a share of them, KIND@3,7 = the third and the seventh):
  400 ... 599    an HTTP error of that status
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM. The exit status is 0, or 2 for wrong arguments."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        server = _server(options)
        raise_file_limit()
        asyncio.run(_serve(server))
    except (ValueError, OSError, ImportError, AttributeError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


async def _serve(server: ScriptedServer) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    async with server:
        print(server.base_url, flush=True)
        print("Serving until Ctrl-C; counters under /stats.", file=sys.stderr, flush=True)
        await stopped.wait()
    stats = server.stats()
    faults = ", ".join(f"{n} x {kind}" for kind, n in sorted(stats.faults.items())) or "none"
    print(
        f"{stats.num_requests} requests, {stats.num_replies} replies, faults: {faults},"
        f" at most {stats.max_in_flight} in flight",
        file=sys.stderr,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nanoeval.testing.server",
        description="Serve the OpenAI API on this host with scripted replies, for tests."
        " Prints its base URL on the first line of stdout.",
        epilog=EXAMPLES + "\n".join(f"  {kind:<14} {what}" for kind, what in KINDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=int, default=8000, help="port, 0 = any that is free (%(default)s)")
    reply = parser.add_mutually_exclusive_group()
    reply.add_argument("--reply", metavar="TEXT", help="the reply to everything")
    reply.add_argument(
        "--reply-function", metavar="MODULE:FUNCTION", help="called with each request; gives a text"
    )
    reply.add_argument(
        "--reply-file", type=Path, metavar="FILE", help="JSON lines with `prompt` and `reply`"
    )
    add("--model", action="append", metavar="NAME", help="a name to serve (scripted); repeatable")
    add("--latency", type=float, default=0.0, metavar="SECONDS", help="before each reply (0)")
    add("--time-per-token", type=float, default=0.0, metavar="SECONDS", help="after that (0)")
    add("--slots", type=int, metavar="N", help="requests worked on at once; more wait (no limit)")
    add("--fault", action="append", default=[], metavar="KIND[:RATE]", help="repeatable; see below")
    add("--models-fault", metavar="KIND", help="what /v1/models meets")
    add(
        "--retry-after", type=float, default=1.0, metavar="SECONDS", help="told by a 429 or 503 (1)"
    )
    add("--seed", type=int, default=0, help="chooses which requests the faults hit (%(default)s)")
    add("--api-key", metavar="KEY", help="refuse requests without it")
    add("--header", action="append", default=[], metavar="NAME=VALUE", help="on every reply")
    add("--ignore", action="append", default=[], metavar="FIELD", help="take it for absent")
    add("--refuse", action="append", default=[], metavar="FIELD", help="answer it with 400")
    return parser


def _server(options: argparse.Namespace) -> ScriptedServer:
    given: dict[str, Any] = {}
    reply = _reply(options)
    if reply is not None:
        given["reply"] = reply
    if options.model:
        given["models"] = options.model
    if options.models_fault:
        given["models_fault"] = Fault.parse(options.models_fault, options.retry_after)
    return ScriptedServer(
        **given,
        latency=options.latency,
        time_per_token=options.time_per_token,
        slots=options.slots,
        faults=[Fault.parse(text, options.retry_after) for text in options.fault],
        seed=options.seed,
        api_key=options.api_key,
        headers=dict(_header(text) for text in options.header),
        ignores=options.ignore,
        refuses=options.refuse,
        host=options.host,
        port=options.port,
    )


def _reply(
    options: argparse.Namespace,
) -> str | Mapping[str, str] | Callable[[Request], Any] | None:
    if options.reply_function is not None:
        return load_function(options.reply_function)
    if options.reply_file is not None:
        return _read_replies(options.reply_file)
    reply: str | None = options.reply
    return reply


def load_function(name: str) -> Callable[..., Any]:
    """The function that `module:function` names; modules of the working folder included."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"{name!r} must be MODULE:FUNCTION, such as my_replies:answer")
    if "" not in sys.path:
        sys.path.insert(0, "")
    found = getattr(importlib.import_module(module), function)
    if not callable(found):
        raise ValueError(f"{name!r} is a {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]


def _read_replies(path: Path) -> dict[str, str]:
    replies = {}
    with path.open(encoding="utf-8") as lines:
        for i, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                replies[row["prompt"]] = row["reply"]
            except (ValueError, KeyError, TypeError) as error:
                wanted = '{"prompt": ..., "reply": ...}'
                raise ValueError(f"{path}, line {i} is not {wanted}: {error!r}") from error
    return replies


def _header(text: str) -> tuple[str, str]:
    name, is_pair, value = text.partition("=")
    if not is_pair:
        raise ValueError(f"--header {text!r} must be NAME=VALUE")
    return name.strip(), value.strip()


if __name__ == "__main__":
    sys.exit(main())
