"""What an endpoint check costs the client, beside a bare aiohttp loop in the same minute.

    python benchmarks/endpoint.py [--json results.json] [--repeat 3]

Both send the same requests (GSM8K prompts of 8 shots, made up here) to a loopback server in a
process of its own. The bare loop posts and reads JSON, nothing else; the check is the whole of the
command `nano-eval`: arguments, loading, probe, run, records, database, report. Each is measured in
a fresh process, after its imports.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPLY = "We count both parts and add them up.\nThe final answer is 7"
# (requests, in flight, seconds that the server takes). In the second case the latency is longer, as
# one Python process can neither send nor answer the 10,000 requests/s that 0.2 s would ask for.
CASES = {"5,000 at 256": (5_000, 256, 0.2), "20,000 at 2,048": (20_000, 2_048, 2.5)}
WAYS = ("bare", "nanoeval")


def write_data(folder: Path, n: int) -> None:
    """`n` made-up problems in the place where GSM8K is looked for."""
    target = folder / "openai" / "gsm8k" / "main"
    target.mkdir(parents=True, exist_ok=True)
    rows = (
        {"question": f"Ann has {n} pears and {n % 7} plums. How many fruits?", "answer": "#### 7"}
        for n in range(n)
    )
    (target / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


async def run_bare(url: str, n: int, concurrency: int) -> int:
    """Post and read `n` requests; returns the number of replies with the text."""
    import aiohttp

    from nanoeval.evals import gsm8k_cot_llama

    bodies = iter(
        [
            {
                "model": "scripted",
                "messages": gsm8k_cot_llama.prompt(row),
                "temperature": 0,
                "max_tokens": 512,
            }
            for row in gsm8k_cot_llama.load()[:n]
        ]
    )
    answered = 0

    async def worker(session: aiohttp.ClientSession) -> None:
        nonlocal answered
        for body in bodies:
            async with session.post(f"{url}/chat/completions", json=body) as response:
                reply = await response.json()
                answered += reply["choices"][0]["message"]["content"] == REPLY

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(worker(session) for _ in range(concurrency)))
    return answered


def run_check(url: str, n: int, concurrency: int) -> int:
    """The same through the command; returns the number of right answers."""
    from nanoeval.endpoint.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        sys.argv = [
            "nano-eval",
            "--tasks=gsm8k_cot_llama",
            f"--base_url={url}",
            f"--num_concurrent={concurrency}",
            f"--max_samples={n}",
        ]
        status = main()
    if status != 0:
        raise SystemExit(f"nano-eval ended with {status}")
    metrics = json.loads(printed.getvalue())["results"]["gsm8k_cot_llama"]["metrics"]
    return round(metrics["exact_match"] * n)


def measure(way: str, url: str, n: int, concurrency: int) -> dict[str, float]:
    """Run one way in this process; seconds of wall and CPU, peak memory in MiB."""
    import aiohttp  # noqa: F401 - imported before the clock starts
    import numpy as np  # noqa: F401

    import nanoeval.endpoint.check
    import nanoeval.endpoint.cli
    import nanoeval.evals.gsm8k_cot_llama  # noqa: F401
    from nanoeval.setup import raise_file_limit

    raise_file_limit()
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    if way == "bare":
        answered = asyncio.run(run_bare(url, n, concurrency))
    else:
        answered = run_check(url, n, concurrency)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    if answered != n:
        raise SystemExit(f"{way}: {answered} of {n} replies are right")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, "memory_mib": after.ru_maxrss / 1024}


def measure_apart(way: str, url: str, n: int, concurrency: int, folder: Path) -> dict[str, float]:
    """`measure` in a fresh process."""
    environment = {
        **os.environ,
        "NANOEVAL_DATASETS_DIR": str(folder / "data"),
        "NANOEVAL_LOG_DIR": str(folder / "records"),
        "NANOEVAL_ROOT_DIR": str(folder / "root"),
    }
    command = [sys.executable, __file__, "--measure", way, url, str(n), str(concurrency)]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def run_case(n: int, concurrency: int, latency: float, repeat: int) -> dict[str, Any]:
    """Medians over `repeat` rounds in which the two ways take turns."""
    from nanoeval.testing import ScriptedServerProcess

    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data", n)
        with ScriptedServerProcess(reply=REPLY, latency=latency, log_size=0) as server:
            for _ in range(repeat):
                for way in WAYS:
                    found[way].append(measure_apart(way, server.base_url, n, concurrency, folder))
    medians = {
        way: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for way, runs in found.items()
    }
    bare, check = medians["bare"], medians["nanoeval"]
    ideal = n / concurrency * latency
    return {
        "ideal_s": ideal,
        **medians,
        "wall_to_bare": check["wall_s"] / bare["wall_s"],
        "cpu_to_bare": check["cpu_s"] / bare["cpu_s"],
        "wall_to_ideal": check["wall_s"] / ideal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of an endpoint check.")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        way, url, n, concurrency = options.measure
        print(json.dumps(measure(way, url, int(n), int(concurrency))))
        return
    results = {name: run_case(*case, repeat=options.repeat) for name, case in CASES.items()}
    line = "{:<16} {:<9} {:>8} {:>8} {:>8} {:>9} {:>8} {:>9}"
    print(line.format("case", "", "ideal s", "wall s", "CPU s", "x ideal", "x CPU", "MiB"))
    for name, result in results.items():
        for way in WAYS:
            own = result[way]
            print(
                line.format(
                    name if way == "bare" else "",
                    way,
                    f"{result['ideal_s']:.2f}",
                    f"{own['wall_s']:.2f}",
                    f"{own['cpu_s']:.2f}",
                    f"{own['wall_s'] / result['ideal_s']:.2f}",
                    f"{own['cpu_s'] / result['bare']['cpu_s']:.2f}",
                    f"{own['memory_mib']:.0f}",
                )
            )
    if options.json:
        machine = {"python": platform.python_version(), "cpus": os.cpu_count()}
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2))


if __name__ == "__main__":
    main()
