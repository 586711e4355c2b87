"""The arguments of `nano-eval`, read and checked. Imports little; asks no server."""

from __future__ import annotations

import argparse
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from nanoeval.endpoint.config import (
    DEFAULT_CONCURRENCY,
    APIConfig,
    EndpointError,
    parse_pairs,
    parse_value,
    split_pairs,
)
from nanoeval.endpoint.output import check_targets

KEY_VARIABLE, AGAINST_KEY_VARIABLE = "OPENAI_API_KEY", "NANO_EVAL_AGAINST_API_KEY"
MODEL_ARGS = (
    *("model", "base_url", "api_key", "num_concurrent", "api", "stream"),
    *("timeout", "connect_timeout", "max_tries"),
)
TEXTS = ("model", "base_url", "api_key")

EXAMPLES = """\
examples:
  nano-eval --tasks gsm8k_cot_llama --base_url=http://localhost:8000/v1 --max_samples 100
  nano-eval --tasks gsm8k_cot_llama,chartqa --gen_kwargs temperature=0.7,max_tokens=1024 \\
      --seed 42 --output results.json --min gsm8k_cot_llama.exact_match=0.8
  nano-eval --tasks gsm8k_cot_llama --base_url=http://a/v1 --against=http://b/v1
  nano-eval compare a.json b.json --margin 0.02 --html difference.html
  nano-eval tasks

Exit status: 0 all samples answered, 1 a threshold of --min failed, 2 samples without an answer,
3 the server or the arguments are wrong; with --against and compare: 0 same, 1 different, 2 cannot
tell, 3 wrong. The key is read from OPENAI_API_KEY, that of a second server from
NANO_EVAL_AGAINST_API_KEY if it has one of its own; keys are never printed or stored.
"""


class Parser(argparse.ArgumentParser):
    """Reports errors as EndpointError, so that all of them look alike."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **fields
        )

    def error(self, message: str) -> NoReturn:
        raise EndpointError(f"{message}; see {self.prog} --help")


def add_comparison_options(parser: argparse.ArgumentParser) -> None:
    """What `compare` and --against have in common."""
    parser.add_argument(
        "--margin", type=margin, default=0.02, help="largest difference that counts as none (0.02)"
    )
    parser.add_argument("--plot", type=picture, metavar="PNG", help="draw the differences")
    parser.add_argument("--html", type=Path, metavar="FILE", help="a page with every flip")


def check_parser() -> argparse.ArgumentParser:
    """The arguments of a check."""
    parser = Parser(
        prog="nano-eval",
        description="Is the server behind an OpenAI-compatible API correct, and is it the same as"
        " that one?\nCommands beside this one: nano-eval tasks, nano-eval compare A.json B.json",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("--tasks", required=True, help="names, separated by commas (see: nano-eval tasks)")
    add("--base_url", help="up to and with /v1 ($OPENAI_BASE_URL, else the usual ports here)")
    add("--model", help="the model's name (default: the one that the server lists)")
    add("--max_samples", type=_positive, help="ask the first so many (default: all)")
    add("--num_concurrent", help=f"requests in flight, or auto (default: {DEFAULT_CONCURRENCY})")
    add("--model_args", default="", help=f"name=value,... of {', '.join(MODEL_ARGS)}")
    add("--gen_kwargs", default="", help="name=value,... for every request, passed on as they are")
    add("--seed", type=int, help="sent with every request")
    add("--api", choices=("chat", "completions"), help="which endpoint (default: chat)")
    add("--stream", action="store_true", default=None, help="measure the time to the first token")
    add("--timeout", type=float, help="seconds for one request (default: 600)")
    add("--connect_timeout", type=float, help="seconds to connect (default: 10)")
    add("--max_tries", type=_positive, help="tries of one request (default: 5)")
    add("--min", action="append", default=[], metavar="[TASK.]METRIC=VALUE", help="a threshold")
    add("--output", type=Path, metavar="FILE", help="write the results with every sample as JSON")
    add("--against", metavar="URL", help="a second server, asked in turn and compared")
    add("--against_args", default="", help="name=value,... of model, api_key for the second")
    add(
        "--run_set_id",
        type=_file_name,
        help="name of the run's database; the same again goes on with it",
    )
    add_comparison_options(parser)
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 1 on")
    return number


def picture(text: str) -> Path:
    """The file of a plot; refused here where it could not be drawn in the end."""
    if find_spec("matplotlib") is None:
        raise EndpointError('--plot needs a package: pip install "nanoeval[endpoint]"')
    return Path(text)


def margin(text: str) -> float:
    """A margin of the command line; named for what argparse says of one that is no number."""
    value = float(text)
    if not 0 < value < 1:
        raise EndpointError(f"--margin={value} must lie between 0 and 1, such as 0.02 for 2 points")
    return value


def _file_name(text: str) -> str:
    if not text or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r} must be a name without slashes")
    return text


@dataclass(frozen=True)
class Plan:
    """A command line that makes sense as far as one can tell without a server."""

    options: argparse.Namespace
    arguments: list[str]
    tasks: dict[str, Any]
    config: APIConfig
    thresholds: list[tuple[str | None, str, float]]
    against: APIConfig | None


def make_plan(options: argparse.Namespace, arguments: list[str]) -> Plan:
    """Check what can be checked without a server. Raises EndpointError."""
    check_targets(options.output, options.plot, options.html)
    settings = _settings(options)
    gen_kwargs = parse_pairs(options.gen_kwargs, "--gen_kwargs")
    url = settings.pop("base_url", None) or ""
    key = _key(settings.pop("api_key", None), "--model_args", KEY_VARIABLE)
    config = APIConfig(url=url, gen_kwargs=gen_kwargs, api_key=key, **settings)
    against = None
    if options.against is not None:
        others = _known_pairs(options.against_args, "--against_args", ("model", "api_key"))
        has_own_key = "api_key" in others or AGAINST_KEY_VARIABLE in os.environ
        variable = AGAINST_KEY_VARIABLE if has_own_key else KEY_VARIABLE
        against = APIConfig(
            url=options.against,
            gen_kwargs=gen_kwargs,
            api_key=_key(others.get("api_key"), "--against_args", variable),
            api_key_env=variable,
            **{**settings, "model": others.get("model")},
        )
    elif options.against_args or options.plot or options.html:
        raise EndpointError("--against_args, --plot and --html need --against=URL")
    from nanoeval.endpoint.tasks import TASKS

    names = list(dict.fromkeys(name.strip() for name in options.tasks.split(",") if name.strip()))
    tasks = {name: TASKS[name] for name in names}
    if not tasks:
        raise EndpointError("--tasks names none; see: nano-eval tasks")
    return Plan(options, arguments, tasks, config, _thresholds(options.min, tasks), against)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of APIConfig that are given, by an option or else in --model_args."""
    settings = _known_pairs(options.model_args, "--model_args", MODEL_ARGS)
    for name in MODEL_ARGS:
        if (value := getattr(options, name, None)) is not None:
            settings[name] = parse_value(value) if name == "num_concurrent" else value
    return settings


def _known_pairs(text: str, option: str, known: Sequence[str]) -> dict[str, Any]:
    pairs = parse_pairs(text, option, TEXTS)
    for name in pairs:
        if name not in known:
            raise EndpointError(f"{option}: {name!r} is not known; use {', '.join(known)}")
    return pairs


def _key(given: str | None, option: str, variable: str) -> str | None:
    """The key that was given, else the one in the environment's `variable`, without space around.

    What is stored of a run names the variable, not the key.
    """
    key = os.environ.get(variable) if given is None else given
    if key is not None and not key.strip().isprintable():
        source = variable if given is None else f"api_key in {option}"
        raise EndpointError(
            f"{source} has a line break or another control character inside; a key is one line of"
            " plain text"
        )
    return key and key.strip()


def _thresholds(texts: Sequence[str], tasks: dict[str, Any]) -> list[tuple[str | None, str, float]]:
    """(task or None for all that have it, metric, least value) of each --min."""
    from nanoeval.models.scripted import ScriptedModel

    metrics = {
        name: task(model=ScriptedModel(reply="")).metric_names() for name, task in tasks.items()
    }
    found = []
    for text in (part for whole in texts for part in whole.split(",")):
        full_name, equals, value = text.partition("=")
        task, dot, metric = full_name.strip().rpartition(".")
        choices = metrics.get(task, ()) if dot else {m for own in metrics.values() for m in own}
        try:
            least = float(value)
        except ValueError:
            least = math.nan
        if not equals or not math.isfinite(least):
            raise EndpointError(f"--min {text!r} is not METRIC=VALUE, such as exact_match=0.8")
        if metric not in choices:
            shown = "; ".join(f"{name}: {', '.join(own)}" for name, own in metrics.items())
            raise EndpointError(f"--min {text!r}: no such metric ({shown})")
        found.append((task or None, metric, least))
    return found


def without_keys(arguments: Sequence[str]) -> list[str]:
    """The arguments as they may be kept and shown: without api_key, however it is written."""
    kept = []
    for argument in arguments:
        has_name = argument.startswith("--")
        option, equals, text = argument.partition("=") if has_name else ("", "", argument)
        if "api_key" in text:
            try:
                pairs = split_pairs(text, option)
            except EndpointError:  # no run will come of these
                pairs = []
            text = ",".join(p for p in pairs if p.partition("=")[0].strip() != "api_key")
        kept.append(f"{option}{equals}{text}")
    return kept


def resume_command(arguments: Sequence[str], run_set_id: str) -> str:
    """The command line again, without keys, for the same run set."""
    kept = without_keys(arguments)
    if not any(argument.startswith("--run_set_id") for argument in kept):
        kept.append(f"--run_set_id={run_set_id}")
    return shlex.join(["nano-eval", *kept])
