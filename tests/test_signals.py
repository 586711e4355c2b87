"""Signals to a program that uses `nanoeval_entrypoint`, and to what it has forked."""

from __future__ import annotations

import signal
import subprocess
import sys
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
