"""Computers that are containers of a Docker Engine."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import chz
import structlog

from nanoeval.recorder import get_recorder
from nanoeval.solvers.computer_tasks.code_execution_interface import (
    ComputerConfiguration,
    ComputerInterface,
    ComputerRuntime,
    ComputerSetupError,
    NetworkMode,
)
from nanoeval.solvers.computer_tasks.runtimes._cleanup import uninterrupted
from nanoeval.solvers.computer_tasks.runtimes._docker_computer import (
    DockerComputer,
    remove_for_sure,
)
from nanoeval.solvers.computer_tasks.runtimes._docker_engine import (
    LABEL_COMPUTER,
    LABEL_OWNER,
    LABEL_RUN_SET,
    LABEL_TASK,
    DockerError,
    EngineUnavailableError,
    connect,
    engine_errors,
    owner_label,
    remove_abandoned,
    remove_run_set,
)
from nanoeval.solvers.computer_tasks.runtimes._docker_spec import (
    SideContainer,
    check_task,
    main_config,
    side_containers,
)

__all__ = ["DockerError", "DockerRuntime", "EngineUnavailableError", "remove_leftovers"]

logger = structlog.stdlib.get_logger(component=__name__)

# Answers that another try would not change.
_FINAL_STATUSES = frozenset({400, 404, 409})

# On an internal network the host itself would still be reachable, and all that it serves. The first
# is what older engines know, the second what newer ones do.
_NO_WAY_TO_THE_HOST = {
    "com.docker.network.bridge.inhibit_ipv4": "true",
    "com.docker.network.bridge.gateway_mode_ipv4": "isolated",
}


@chz.chz
class DockerRuntime(ComputerRuntime):
    """Runs each task in a fresh container, and its side containers beside it on a private network.

    A container shares this machine's kernel: it holds off accidents and ordinary code, not somebody
    who attacks the kernel. With network_mode "none" nothing leads out. The image must have `sh`,
    and python3 for cells. `limits` and `resources` are enforced where the task sets them itself.
    """

    image: str | None = chz.field(
        default=None, doc="Image of tasks that name none in docker_image."
    )
    pull: Literal["missing", "always", "never"] = chz.field(
        default="missing", doc="When to pull images from their registry."
    )
    command_timeout: float = chz.field(default=3600, doc="Seconds that one command may take.")
    max_output_bytes: int = chz.field(
        default=16 << 20, doc="What is kept of a command's output: its start and its end."
    )
    pids_limit: int = chz.field(default=4096, doc="Processes and threads in a main container.")
    start_timeout: float = chz.field(
        default=300, doc="Seconds for one start, pulling aside; a task's own timeout wins."
    )
    start_tries: int = chz.field(default=3, doc="Tries of a start before it is a system error.")
    max_concurrent_starts: int = chz.field(
        default=8, doc="Computers of one process that start at the same time."
    )
    host_config: dict[str, Any] = chz.field(
        default_factory=dict,
        doc="Put over the main container's HostConfig, as the Engine API names things.",
    )

    @chz.validate
    def _check_values(self) -> None:
        for name in ("pids_limit", "start_tries", "max_concurrent_starts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def __getstate__(self) -> dict[str, Any]:
        # The places for starts belong to this process.
        return {name: value for name, value in self.__dict__.items() if name.startswith("X_")}

    async def check(self) -> None:
        """Raise EngineUnavailableError where no engine answers."""
        async with connect() as docker:
            with engine_errors("asking for the engine's version"):
                await docker.version()

    async def _do_runtime_setup(
        self, task: ComputerConfiguration, computer: ComputerInterface
    ) -> None:
        pass

    @asynccontextmanager
    async def _start_computer(self, task: ComputerConfiguration) -> AsyncIterator[DockerComputer]:
        check_task(task)
        sides = side_containers(task)
        image = task.docker_image or self.image
        if image is None:
            raise ValueError(
                "the task names no docker_image; set it, or the runtime's image for all tasks"
            )
        async with connect() as docker:
            async with self._place_for_a_start():
                await self._remove_abandoned(docker)
                image_config = await self._get_image(docker, image)
                for side in sides:
                    await self._get_image(docker, side.config["Image"])
                config = main_config(task, image, image_config, self.pids_limit)
                config["HostConfig"].update(self.host_config)
                computer = await self._start_with_retries(docker, task, config, sides)
            try:
                yield computer
            finally:
                await uninterrupted(computer.stop())

    async def _start_with_retries(
        self,
        docker: Any,
        task: ComputerConfiguration,
        config: dict[str, Any],
        sides: list[SideContainer],
    ) -> DockerComputer:
        for n_failed in range(self.start_tries):
            computer_id = secrets.token_hex(6)
            try:
                # Never left half-way: the engine goes on with what it was told, unseen.
                names = await uninterrupted(
                    self._create_and_start(docker, task, computer_id, config, sides)
                )
                break
            except BaseException as error:
                await uninterrupted(remove_for_sure(docker, computer_id))
                is_final = isinstance(error, DockerError) and error.status in _FINAL_STATUSES
                if not isinstance(error, DockerError | TimeoutError) or is_final:
                    raise
                if n_failed + 1 == self.start_tries:
                    raise DockerError(
                        f"the computer did not start, {self.start_tries} times: {error}"
                    ) from error
            await asyncio.sleep(0.5 * 2**n_failed)
        return DockerComputer(
            docker,
            computer_id=computer_id,
            container_names=names,
            cwd=task.cwd,
            command_timeout=self.command_timeout,
            max_output_bytes=self.max_output_bytes,
            jupyter_setup=None if task.jupyter_setup is None else list(task.jupyter_setup),
        )

    async def _create_and_start(
        self,
        docker: Any,
        task: ComputerConfiguration,
        computer_id: str,
        config: dict[str, Any],
        sides: list[SideContainer],
    ) -> list[str]:
        """Start the side containers, then the main one; their names, the main one's first."""
        labels = _labels(task, computer_id)
        base = f"nanoeval-{_task_part(task)}-{computer_id}"
        names = [f"{base}-{side.name}" for side in sides]
        network = None
        with engine_errors("starting a container"):
            async with asyncio.timeout(task.timeout or self.start_timeout):
                if sides:
                    network = await docker.networks.create(
                        {
                            "Name": base,
                            "Internal": True,
                            "Options": _NO_WAY_TO_THE_HOST,
                            "Labels": labels,
                        }
                    )
                is_open = task.network_mode == NetworkMode.UNPROXIED
                around = _Surroundings(labels, network, is_open)
                for name, side in zip(names, sides, strict=True):
                    await _start(docker, name, side.name, side.config, around)
                await _start(docker, base, "main", config, around)
        return [base, *names]

    async def _get_image(self, docker: Any, image: str) -> dict[str, Any]:
        """The image's configuration, after pulling it where that is wanted."""
        try:
            if self.pull != "always":
                return await _inspect_image(docker, image)
        except DockerError as error:
            if error.status != 404:
                raise
            if self.pull == "never":
                raise ComputerSetupError(
                    f'image {image!r} is not there, and pull="never"; build or load it first'
                ) from error
        try:
            logger.info(f"pulling {image}", _print=True)
            with engine_errors(f"pulling {image}"):
                await docker.images.pull(image)
            return await _inspect_image(docker, image)
        except EngineUnavailableError:
            raise
        except DockerError as error:
            raise ComputerSetupError(
                f"image {image!r} is not there and could not be pulled; build or load it first, or"
                f" check its name ({error})"
            ) from error

    async def _remove_abandoned(self, docker: Any) -> None:
        try:
            if n := await remove_abandoned(docker):
                logger.info(f"removed {n} containers of processes that were killed")
        except EngineUnavailableError:
            raise
        except DockerError as error:
            logger.warning(f"containers of killed processes are still there: {error}")

    @asynccontextmanager
    async def _place_for_a_start(self) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        places = self.__dict__.get("_places")
        if places is None or places[0] is not loop:
            places = (loop, asyncio.Semaphore(self.max_concurrent_starts))
            # chz objects refuse plain attribute assignment.
            object.__setattr__(self, "_places", places)
        async with places[1]:
            yield


async def remove_leftovers(run_set_id: str | None = None) -> int:
    """Remove the containers of killed processes of this host, or all those of one run set.

    Returns how many there were. EngineUnavailableError where no engine answers.
    """
    async with connect() as docker:
        if run_set_id is not None:
            return await remove_run_set(docker, run_set_id)
        return await remove_abandoned(docker)


@dataclass(frozen=True)
class _Surroundings:
    """What the containers of one computer share."""

    labels: dict[str, str]
    # The private network; None where there is only one container.
    network: Any
    has_internet: bool


async def _start(
    docker: Any, name: str, alias: str, config: dict[str, Any], around: _Surroundings
) -> None:
    """Create and start one container, which the others reach as `alias`."""
    host = dict(config["HostConfig"])
    networking: dict[str, Any] = {}
    network = around.network
    if around.has_internet:
        host["NetworkMode"] = "bridge"
    elif network is None:
        host["NetworkMode"] = "none"
    else:
        host["NetworkMode"] = network.id
        # Names of containers only: the engine's resolver would ask the world on their behalf.
        host["Dns"] = ["127.0.0.1"]
        networking = {"EndpointsConfig": {network.id: {"Aliases": [alias]}}}
    settings = {"HostConfig": host, "NetworkingConfig": networking, "Labels": around.labels}
    container = await docker.containers.create({**config, **settings}, name=name)
    if around.has_internet and network is not None:
        endpoint = {"Aliases": [alias]}
        await network.connect({"Container": name, "EndpointConfig": endpoint})
    await container.start()


async def _inspect_image(docker: Any, image: str) -> dict[str, Any]:
    with engine_errors(f"looking for image {image}"):
        found = await docker.images.inspect(image)
    return found.get("Config") or {}


def _labels(task: ComputerConfiguration, computer_id: str) -> dict[str, str]:
    try:
        run_set_id = get_recorder().run_spec.run_set_id
    except LookupError:
        run_set_id = ""
    return {
        LABEL_COMPUTER: computer_id,
        LABEL_OWNER: owner_label(),
        LABEL_RUN_SET: run_set_id,
        LABEL_TASK: str(getattr(task, "name", "")),
    }


def _task_part(task: ComputerConfiguration) -> str:
    """The task's name as far as a container's name may hold it."""
    return re.sub(r"[^a-zA-Z0-9_.-]+", "-", str(getattr(task, "name", "computer")))[:40].strip("-.")
