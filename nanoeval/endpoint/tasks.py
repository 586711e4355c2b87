"""The tasks that an endpoint can be checked with: the `GenerationEval`s in nanoeval/evals."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

from nanoeval.endpoint.config import EndpointError
from nanoeval.evals._generation import GenerationEval

# How a module of nanoeval/evals shows, without being imported, that it defines a task.
MARK = "(GenerationEval):"


class TaskRegistry(Mapping[str, type[GenerationEval]]):
    """Names of tasks to their eval classes, which are imported when they are asked for.

    A task's name is that of its module; a class of one's own is found as `module:Class`.
    """

    def __getitem__(self, name: str) -> type[GenerationEval]:
        """Raises EndpointError (also a KeyError) with the nearest names for one that is unknown."""
        module_name, colon, class_name = name.partition(":")
        if not colon:
            if name not in self._names():
                raise UnknownTask(name, self._names())
            module_name = f"nanoeval.evals.{name}"
        if not all(part.isidentifier() for part in module_name.split(".")):
            raise EndpointError(f"task {name!r}: write it as module:Class")
        if "" not in sys.path:  # a script's path lacks the working folder
            sys.path.insert(0, "")
        try:
            module = import_module(module_name)
        except (ImportError, SyntaxError) as error:
            raise EndpointError(f"task {name!r}: {error}; write it as module:Class") from error
        candidates = [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, GenerationEval)
            and value.__module__ == module.__name__
            and class_name in {"", value.__name__}
        ]
        if len(candidates) != 1:
            raise EndpointError(
                f"task {name!r}: {module_name} defines {len(candidates)} GenerationEval classes"
                f" {class_name and f'named {class_name}'}; name one as module:Class"
            )
        return candidates[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def describe(self) -> dict[str, str]:
        """Each task with the first sentence of its module's docstring."""
        return {
            name: (import_module(self[name].__module__).__doc__ or "").strip().splitlines()[0]
            for name in self
        }

    @staticmethod
    def _names() -> list[str]:
        import nanoeval.evals

        folder = Path(nanoeval.evals.__path__[0])
        files = sorted(folder.glob("[!_]*.py"))
        return [file.stem for file in files if MARK in file.read_text(encoding="utf-8")]


class UnknownTask(EndpointError, KeyError):
    """No task has this name."""

    def __init__(self, name: str, known: list[str]) -> None:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"; the nearest: {', '.join(near)}" if near else ""
        super().__init__(f"task {name!r} is not known{hint}; all of them: {', '.join(known)}")

    def __str__(self) -> str:  # KeyError would show the message quoted
        return str(self.args[0])


TASKS = TaskRegistry()
