"""TextVQA from one YAML file: NANOEVAL_CONFIG=PATH python -m nanoeval.baselines.run_textvqa"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanoeval.baselines import runs
from nanoeval.baselines.runs import run

__all__ = ["run", "run_from_yaml"]


def run_from_yaml(path: str | Path) -> dict[str, Any]:
    """Run the configuration in a YAML file, which must be for textvqa; returns the summary."""
    return runs.run_from_yaml(path, "textvqa")


if __name__ == "__main__":
    runs.main("textvqa")
