"""Signals to a program that uses `nanoeval_entrypoint`, and to what it has forked."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_forked_children_of_a_program_end_at_sigterm() -> None:
    """They would take it for a Ctrl-C to the program, and live on."""
    code = f"""
import multiprocessing, sys, time
sys.path.insert(0, {str(REPOSITORY)!r})
from nanoeval.setup import nanoeval_entrypoint
async def main():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    child.start()
    time.sleep(0.2)
    child.terminate()
    child.join(5)
    print(child.exitcode, flush=True)
    child.kill()
nanoeval_entrypoint(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == (str(-signal.SIGTERM), "")


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["in_process", "processes"])
def test_ctrl_c_waits_for_none_but_the_rollout_that_computes(executor: str) -> None:
    """All that had been started would still compute, one after the other."""
    code = f"""
import sys, time, chz
sys.path.insert(0, {str(REPOSITORY)!r})
from nanoeval import EvalSpec, RunnerArgs, run
from nanoeval.setup import nanoeval_entrypoint
from tests.sample_evals import Sums
@chz.chz
class Computing(Sums):
    async def evaluate(self, task):
        print(task.name, flush=True)
        time.sleep(0.3)
        return True
runner = RunnerArgs(executor={executor!r}, should_backup=False)
nanoeval_entrypoint(run(EvalSpec(eval=Computing(n=60), runner=runner)))
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe) as program:
        assert program.stdout is not None
        assert program.stdout.readline()
        time.sleep(0.7)
        began = time.monotonic()
        program.send_signal(signal.SIGINT)
        _, told = program.communicate()
    assert time.monotonic() - began < 2
    assert program.returncode == 130
    assert b"was interrupted." in told
    assert b"did not react" not in told
