"""Write an eval in 100 readable lines; run it fast, safely and visibly. Start with `eval`."""

from typing import TYPE_CHECKING, Any

from nanoeval.eval import Eval, EvalSpec, RolloutSystemError, RunnerArgs, Task

if TYPE_CHECKING:
    from nanoeval.evaluation import run, validate

__all__ = ["Eval", "EvalSpec", "RolloutSystemError", "RunnerArgs", "Task", "run", "validate"]


def __getattr__(name: str) -> Any:
    # The engine is loaded by those who run something: what only defines evals starts sooner.
    if name in {"run", "validate"}:
        from nanoeval import evaluation

        return getattr(evaluation, name)
    raise AttributeError(f"module 'nanoeval' has no attribute {name!r}")
