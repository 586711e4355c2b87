"""The program that crash tests kill: `python crash_program.py RUN_SET LOG MODE [N] [SECONDS]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanoeval import run
from nanoeval.setup import nanoeval_entrypoint
from tests.sample_evals import Sums, spec


async def main(
    run_set_id: str, log: str, mode: str, n: str = "2000", seconds: str = "0.02"
) -> None:
    processes = {"experimental_use_multiprocessing": True, "num_processes": 2}
    eval = Sums(n=int(n), seconds=float(seconds), flaky=50, log=log)
    summary = await run(
        spec(
            eval,
            run_set_id=run_set_id,
            concurrency=20,
            **(processes if mode == "processes" else {}),
        )
    )
    print(json.dumps(summary))


if __name__ == "__main__":
    nanoeval_entrypoint(main(*sys.argv[1:]))
