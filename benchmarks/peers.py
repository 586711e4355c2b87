"""nanoeval beside inspect-ai and lm-evaluation-harness, on the same workloads in one session.

    python benchmarks/peers.py [--only noop http] [--repeat 3] [--json results.json] [--readme]

Each tool has a virtual environment of its own, which is made here where it is missing (this alone
needs the network); nanoeval is installed anew from this checkout each time. The tools take turns,
each in a fresh process, by the programs in `benchmarks/peers/`, which say how each is set up. All
their files go to one folder in memory.

A tool is compared by its seconds from the making of the questions to the summary, after a warm-up
of one question: without its imports, which would tell against the larger tools in runs as short as
these. The seconds of the whole process, warm-up included, are shown too.

`--json` keeps what the file has of workloads not measured now, so that workloads can be measured
one at a time; `--only` without names then prints the whole. `--readme` puts the table, with machine
and versions, into `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# The place of the table in README.md.
BEGIN, END = "<!-- written by peers.py -->", "<!-- until here -->"
OURS = "nanoeval"
LATENCY = 0.2
TIMEOUT = 300.0


@dataclass(frozen=True)
class Tool:
    """`requirements` are what pip installs, `program` the file in `peers/` that runs a workload.

    `saves` is told to the program: whether to write samples, where the tool leaves a choice.
    """

    distribution: str
    requirements: tuple[str, ...]
    program: str
    saves: bool = False


TOOLS = {
    # hatchling builds it from the checkout.
    OURS: Tool("nanoeval", ("hatchling", str(HERE.parent)), "nanoeval_program.py"),
    "inspect-ai": Tool("inspect-ai", ("inspect-ai", "openai"), "inspect_ai_program.py"),
    # By default it writes nothing, unlike the others: so it runs as it is and doing what they do.
    "lm-eval": Tool("lm-eval", ("lm-eval[api]",), "lm_eval_program.py"),
    "lm-eval, saving": Tool("lm-eval", ("lm-eval[api]",), "lm_eval_program.py", saves=True),
}


@dataclass(frozen=True)
class Workload:
    """`ideal` is the seconds that the waiting alone takes with `in_flight` at once."""

    what: str
    name: str
    n: int
    in_flight: int
    reply: str = ""
    ideal: float | None = None


WORKLOADS = {
    "noop": Workload("no-op", "noop", 5_000, 4_096),
    "many": Workload("no-op", "noop", 50_000, 4_096),
    "sleep": Workload("sleep of 1 s", "sleep", 2_000, 2_000, ideal=1.0),
    "http": Workload("HTTP, 0.2 s", "http", 2_000, 256, "7", ideal=2_000 / 256 * LATENCY),
}
NOT_RUN = {
    ("many", "inspect-ai"): "takes minutes: see the rate at 5,000",
    ("sleep", "lm-eval"): "not expressible: a model gets all requests in one blocking call",
    ("sleep", "lm-eval, saving"): "not expressible",
}


def make_environment(folder: Path, name: str) -> Path:
    """The Python of the environment of tool `name`; makes it, and brings ours up to date."""
    home = folder / TOOLS[name].distribution
    python, complete = home / "bin" / "python", home / "complete"
    pip = [str(python), "-m", "pip", "-qq", "install"]
    if not complete.exists():
        print(f"installing {name} into {home}", file=sys.stderr)
        venv.create(home, clear=True, with_pip=True)
        subprocess.run([*pip, *TOOLS[name].requirements], check=True)
        complete.touch()
    elif name == OURS:
        again = ["--no-deps", "--force-reinstall", "--no-build-isolation", str(HERE.parent)]
        subprocess.run([*pip, *again], check=True)
    return python


def version_of(python: Path, distribution: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@contextmanager
def scripted_server(python: Path) -> Iterator[str]:
    """Our server of scripted replies in a process of its own; yields its base URL."""
    command = [str(python), "-m", "nanoeval.testing.server", "--port=0", f"--latency={LATENCY}"]
    server = subprocess.Popen(
        [*command, "--reply=7"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(OURS, HERE),
        text=True,
    )
    try:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
    finally:
        server.terminate()
        server.wait()


def environment(tool: str, folder: Path) -> dict[str, str]:
    """The variables of a tool's process: nothing is downloaded, all files go to `folder`."""
    # The tools are to be imported from their own environments alone.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    files = {f"NANOEVAL_{what}_DIR": str(folder / what) for what in ("DATABASE", "LOG", "ROOT")}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    # The peers' progress bars are off, which can only help them.
    bars = {} if tool == OURS else {"TQDM_DISABLE": "1"}
    return {**kept, **files, **offline, **bars}


def measure(python: Path, tool: str, workload: Workload, url: str) -> dict[str, float]:
    """Run a workload in a fresh process: seconds of wall and CPU, peak memory in MiB."""
    # One question, so that nothing is imported or built for the first time on the clock.
    warm_up = {"n": 1, "workload": "http" if workload.name == "http" else "noop"}
    order = asdict(workload) | {"workload": workload.name, "url": url, "warm_up": warm_up}
    order["saves"] = TOOLS[tool].saves
    program = HERE / "peers" / TOOLS[tool].program
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as name, tempfile.TemporaryFile("w+") as said:
        started_at = time.perf_counter()
        process = subprocess.Popen(
            ["timeout", f"{TIMEOUT:.0f}", python, program, json.dumps(order)],
            env=environment(tool, Path(name)),
            cwd=name,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - started_at
        if process.returncode != 0:
            said.seek(0)
            raise SystemExit(f"{tool}, {workload.what}: ended with {status}\n{said.read()[-3000:]}")
    return {
        "seconds": json.loads(printed.splitlines()[-1])["seconds"],
        "process_seconds": wall,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "memory_mib": used.ru_maxrss / 1024,
    }


def run_workload(key: str, pythons: dict[str, Path], repeat: int) -> dict[str, Any]:
    """All tools in turns, `repeat` times; per tool the median of each figure.

    `times_ours` is the median over the rounds of the tool's seconds by ours in the same round.
    """
    workload = WORKLOADS[key]
    runs: dict[str, list[dict[str, float]]] = {
        tool: [] for tool in TOOLS if (key, tool) not in NOT_RUN
    }
    with scripted_server(pythons[OURS]) as url:
        for _ in range(repeat):
            for tool, found in runs.items():
                found.append(measure(pythons[tool], tool, workload, url))
    results = {}
    for tool, found in runs.items():
        medians = {name: statistics.median(run[name] for run in found) for name in found[0]}
        ratios = [
            run["seconds"] / ours["seconds"] for run, ours in zip(found, runs[OURS], strict=True)
        ]
        results[tool] = medians | {
            "per_second": workload.n / medians["seconds"],
            "times_ours": statistics.median(ratios),
        }
    return results


def machine() -> str:
    """The processor and its number of cores, memory, Python."""
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text() if info.exists() else "").splitlines()
        if line.startswith("model name")
    ]
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return (
        f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}, {gib:.0f} GiB,"
        f" Python {platform.python_version()}"
    )


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table, with machine and versions above it."""
    versions = ", ".join(f"{tool} {version}" for tool, version in results["versions"].items())
    lines = [
        f"Machine: {results['machine']}. Versions: {versions}.",
        f"Medians of {results['repeat']} rounds.",
        "",
        "| workload | tool | rollouts/s | s | process, s | CPU, s | memory, MiB | times ours |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for key, workload in WORKLOADS.items():
        ideal = f" (ideal: {workload.ideal:.2f} s)" if workload.ideal else ""
        what = f"{workload.what}, {workload.n:,}{ideal}"
        for tool in TOOLS if key in results["workloads"] else ():
            found = results["workloads"][key].get(tool)
            if found is None:
                cells = f"{NOT_RUN.get((key, tool), '—')} | | | | |"
            else:
                cells = (
                    "{per_second:,.0f} | {seconds:.2f} | {process_seconds:.2f} | {cpu_seconds:.2f}"
                    " | {memory_mib:.0f} | {times_ours:.2f}"
                ).format(**found)
            lines.append(f"| {what if tool == OURS else ''} | {tool} | {cells} |")
    return "\n".join(lines)


def write_into(page: Path, text: str) -> None:
    """Put `text` in the place that `page` has for it."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{page} has no place for the table, between {BEGIN!r} and {END!r}"
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def peers_ahead(results: dict[str, Any]) -> list[str]:
    """A line for each workload and figure of time in which a peer beats nanoeval."""
    ahead = []
    for key, found in results["workloads"].items():
        for tool in [tool for tool in found if tool != OURS]:
            for name in ("seconds", "process_seconds", "cpu_seconds", "memory_mib"):
                theirs, ours = found[tool][name], found[OURS][name]
                if theirs < ours:
                    ahead.append(f"{key}: {tool} is ahead in {name}, {theirs:.2f} to {ours:.2f}")
    return ahead


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cache = Path("~/.cache/nanoeval-peers").expanduser()
    parser.add_argument("--only", nargs="*", choices=WORKLOADS, help="measure these workloads")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; the median counts")
    parser.add_argument("--json", type=Path, help="also write the results here, beside older ones")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    parser.add_argument("--environments", type=Path, default=cache, help="the tools' folder")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"workloads": {}}
    if arguments.json and arguments.json.exists():
        results = json.loads(arguments.json.read_text())
    keys = list(WORKLOADS) if arguments.only is None else arguments.only
    if keys:
        pythons = {name: make_environment(arguments.environments, name) for name in TOOLS}
        results["machine"], results["repeat"] = machine(), arguments.repeat
        results["versions"] = {
            tool.distribution: version_of(pythons[name], tool.distribution)
            for name, tool in TOOLS.items()
        }
    for key in keys:
        results["workloads"][key] = run_workload(key, pythons, arguments.repeat)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))
    print(table(results), "", *peers_ahead(results) or ["No peer is ahead."], sep="\n")
    if arguments.readme:
        write_into(HERE / "README.md", table(results))


if __name__ == "__main__":
    main()
