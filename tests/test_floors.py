"""The package's order: imports go down only, private modules stay inside, `import` is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nanoeval

PACKAGE = Path(nanoeval.__file__).parent
REPOSITORY = Path(__file__).resolve().parents[1]

# What stands where, by the first name below `nanoeval`. docs/architecture.md explains the floors.
FLOORS = {
    0: "eval asyncio_utils recorder_protocol _codec _outcomes _statistics _process_identity"
    " _jsonl _line_writer",
    1: "setup library_config fs_paths recorder recorders json_recorder"
    " _recorder_base _dummy_recorder _console",
    2: "_store _schema _database_file _heartbeat _inspect _worker _progress _run_set _summary_text"
    " _inspect_run _diagnostics _stacks _aiomonitor _monitor_process",
    3: "_executors",
    # The package's own __init__ gives the engine, so that importing from it counts as that.
    4: "evaluation _queueing _chores __init__",
    5: "evals solvers models metrics testing contrib examples",
    6: "bin endpoint baselines monitor",
}
CONTENT = 5
# Content is written against the ground and the process floor; the engine must not be needed for it.
CONTENT_MAY_IMPORT = {0, 1, CONTENT}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names.split()}

HEAVY = ["pandas", "aiomonitor", "aiohttp", "streamlit", "datasets", "torch", "transformers"]
HEAVY += ["ray", "scipy", "matplotlib", "yaml", "PIL", "docker", "aiodocker", "jupyter_client"]
HEAVY += ["cloudpickle"]
# The contract names this module, underscore and all.
PUBLIC_ALL_THE_SAME = {"nanoeval.examples._gpqa"}


def modules() -> dict[str, Path]:
    """All modules of the package by name, a package's `__init__` under the package's name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("nanoeval", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported_modules(module: str, path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of each module of ours that `module` imports, inside functions too.

    Imports under `if TYPE_CHECKING:` are left out: they never run.
    """
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in running_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            names = [target(f"{base}.{alias.name}", base) for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "nanoeval":
                yield node.lineno, name


def target(full_name: str, base: str) -> str:
    """The module that `from base import name` loads: the name itself where that is a module."""
    return full_name if full_name in MODULES else base


def running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from [other, *running_nodes(other)]
            continue
        yield child
        yield from running_nodes(child)


def floor(module: str) -> int:
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else "__init__"
    if name not in FLOOR_OF:
        raise AssertionError(
            f"{module} has no floor: put {name!r} into FLOORS in tests/test_floors.py, as low as"
            " its imports allow, and into docs/architecture.md"
        )
    return FLOOR_OF[name]


def may_import(importer: str, imported: str) -> bool:
    if floor(importer) == CONTENT:
        return floor(imported) in CONTENT_MAY_IMPORT
    return floor(imported) <= floor(importer)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    """A lower floor that knows a higher one can neither be read nor tested without it."""
    upward = [
        f"{MODULES[module]}:{line} imports {name} (floor {floor(name)})"
        for line, name in imported_modules(module, MODULES[module])
        if module != "nanoeval" and not may_import(module, name)
    ]
    assert not upward, f"{module} is on floor {floor(module)}; move what it needs down: {upward}"


def test_content_has_no_import_cycles() -> None:
    """One eval could not be read, or taken out, without all others."""
    graph = {
        module: {name for _, name in imported_modules(module, path) if floor(name) == CONTENT}
        for module, path in MODULES.items()
        if module != "nanoeval" and floor(module) == CONTENT
    }
    while leaves := {module for module, needs in graph.items() if not needs - {module}}:
        graph = {m: needs - leaves for m, needs in graph.items() if m not in leaves}
    assert not graph, f"these modules import each other in a circle: {graph}"


def test_examples_use_public_modules_only() -> None:
    """An example that leans on a private module teaches users to do so, and breaks with it."""
    private = [
        f"{path.name}:{line} imports {name}"
        for path in sorted((REPOSITORY / "examples").rglob("*.py"))
        for line, name in imported_modules(f"examples.{path.stem}", path)
        if any(part.startswith("_") for part in name.split(".")) and name not in PUBLIC_ALL_THE_SAME
    ]
    assert not private


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import nanoeval.setup", ["nanoeval.setup"]),
        ("from nanoeval import setup", ["nanoeval.setup"]),
        ("from nanoeval import run", ["nanoeval"]),
        ("def f():\n    from nanoeval.evaluation import run", ["nanoeval.evaluation"]),
        ("from .mcq import Question", ["nanoeval.solvers.mcq"]),
        ("from .. import evaluation", ["nanoeval.evaluation"]),
        ("if TYPE_CHECKING:\n    from nanoeval.evaluation import run", []),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import nanoeval.setup", ["nanoeval.setup"]),
        ("import numpy, nanoevals", []),
    ],
)
def test_this_test_sees_every_kind_of_import(
    source: str, expected: list[str], tmp_path: Path
) -> None:
    """A form of import that the reader overlooks would be the way around the rule."""
    path = tmp_path / "short_answer.py"
    path.write_text(source)
    found = [name for _, name in imported_modules("nanoeval.solvers.short_answer", path)]
    assert found == expected


def test_a_module_without_a_floor_is_named() -> None:
    """A new module could import whatever it likes, unseen."""
    with pytest.raises(AssertionError, match="put 'novelty' into FLOORS"):
        floor("nanoeval.novelty.part")


@pytest.mark.parametrize("module", ["nanoeval", "nanoeval.eval", "nanoeval.json_recorder"])
def test_importing_stays_light(module: str) -> None:
    """Every command line and every worker process would take seconds to start."""
    script = f"import sys, {module}; print(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=True
    )
    assert done.stdout.split() == []
