"""Where computers come from: `LocalRuntime` (this machine), `DockerRuntime` (containers)."""

from nanoeval.solvers.computer_tasks.runtimes.docker import DockerRuntime
from nanoeval.solvers.computer_tasks.runtimes.local import LocalRuntime

__all__ = ["DockerRuntime", "LocalRuntime"]
