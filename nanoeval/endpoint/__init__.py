"""Endpoint checks: is the server behind an OpenAI-compatible API correct, and is it like another?

`run_task(TASKS[name], APIConfig(...))` in Python, `nano-eval` on a command line. What is named here
is loaded when it is used, so that `nano-eval --help` answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanoeval.endpoint.check import run_task
    from nanoeval.endpoint.config import APIConfig, EndpointError
    from nanoeval.endpoint.tasks import TASKS

__all__ = ["TASKS", "APIConfig", "EndpointError", "run_task"]

_HOMES = {
    "APIConfig": "config",
    "EndpointError": "config",
    "TASKS": "tasks",
    "run_task": "check",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
