"""The program that tests of Ray kill: `python ray_program.py RUN_SET LOG N [resume]`.

Its eval is defined in `__main__`, and its cluster is its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import chz

from nanoeval import run
from nanoeval.bin.resume import resume
from nanoeval.setup import nanoeval_entrypoint
from tests.sample_evals import Sums, spec


@chz.chz
class InMain(Sums):
    """Knows nothing but what is in this file."""

    async def evaluate(self, task: Any) -> bool:
        return parity(await super().evaluate(task))


def parity(is_even: bool) -> bool:
    return is_even


async def main(run_set_id: str, log: str, n: str, what: str = "run") -> None:
    if what == "resume":
        (summary,) = await resume(run_set_id)
    else:
        eval = InMain(n=int(n), seconds=0.05, log=log)
        runner = {"executor": "ray", "ray_num_actors": 2, "concurrency": 20}
        summary = await run(spec(eval, run_set_id=run_set_id, **runner))
    print(json.dumps(summary))


if __name__ == "__main__":
    nanoeval_entrypoint(main(*sys.argv[1:]))
