"""nanoeval: write an eval in 100 readable lines; run it fast, safely and visibly."""

from nanoeval.eval import (
    Eval,
    EvalSpec,
    RolloutSystemError,
    RunnerArgs,
    Task,
)
from nanoeval.evaluation import run, validate

__all__ = ["Eval", "EvalSpec", "RolloutSystemError", "RunnerArgs", "Task", "run", "validate"]
