"""The way to a Docker Engine: connecting, its errors as ours, and removing what was left behind."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from typing import Any

import aiohttp
import structlog

from nanoeval._process_identity import ProcessIdentity, this_process
from nanoeval.eval import RolloutSystemError

logger = structlog.stdlib.get_logger(component=__name__)

LABEL_COMPUTER = "nanoeval.computer"
LABEL_OWNER = "nanoeval.owner"
LABEL_RUN_SET = "nanoeval.run_set"
LABEL_TASK = "nanoeval.task"
_CONNECT_SECONDS = 10.0


class DockerError(RolloutSystemError):
    """The Docker Engine failed, or what runs in it was taken away."""

    status: int | None = None


class EngineUnavailableError(DockerError):
    """No Docker Engine answers."""


@asynccontextmanager
async def connect() -> AsyncIterator[Any]:
    """An `aiodocker.Docker` of the engine at $DOCKER_HOST, else at the usual sockets."""
    try:
        import aiodocker
    except ImportError as error:
        raise ModuleNotFoundError(
            'DockerRuntime needs: pip install "nanoeval[computer]"'
        ) from error
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
    try:
        docker = aiodocker.Docker(url=os.environ.get("DOCKER_HOST"), timeout=timeout)
    except (AssertionError, ValueError, OSError) as error:
        raise _unavailable(error) from error
    # The engine would compress every download, at a tenth of the speed.
    docker.session.headers["Accept-Encoding"] = "identity"
    try:
        yield docker
    finally:
        await docker.close()


@contextmanager
def engine_errors(doing: str) -> Iterator[None]:
    """Turn what aiodocker and aiohttp raise inside the block into a DockerError."""
    import aiodocker

    try:
        yield
    except aiodocker.DockerContainerError as error:
        raise _refused(doing, error) from error
    except aiodocker.DockerError as error:
        # aiodocker wraps a failed connection as status 900.
        if error.status >= 900:
            raise _unavailable(error.__cause__ or error) from error
        raise _refused(doing, error) from error
    except (aiohttp.ClientConnectorError, FileNotFoundError, ConnectionRefusedError) as error:
        raise _unavailable(error) from error
    except (aiohttp.ClientError, OSError) as error:
        raise DockerError(
            f"{doing}: lost the Docker Engine ({type(error).__name__}: {error}); was it restarted?"
        ) from error


def _refused(doing: str, error: Any) -> DockerError:
    ours = DockerError(f"{doing}: the Docker Engine answered {error.status}: {error.message}")
    ours.status = error.status
    return ours


def _unavailable(error: BaseException) -> EngineUnavailableError:
    where = os.environ.get("DOCKER_HOST") or "/var/run/docker.sock"
    return EngineUnavailableError(
        f"no Docker Engine answers at {where} ({type(error).__name__}); start it, or set"
        " DOCKER_HOST to one that runs"
    )


def owner_label() -> str:
    """This process, in a form that `remove_abandoned` understands."""
    return json.dumps(asdict(this_process()))


async def remove_abandoned(docker: Any) -> int:
    """Remove containers and networks whose owner, a process of this host, was killed.

    Returns how many containers there were. Those of other hosts are left alone.
    """
    return await _remove(docker, [LABEL_OWNER], _is_abandoned)


async def remove_run_set(docker: Any, run_set_id: str) -> int:
    """Remove the containers and networks of one run set, whoever made them; returns how many."""
    return await _remove(docker, [f"{LABEL_RUN_SET}={run_set_id}"], lambda labels: True)


async def remove_computer(docker: Any, computer_id: str) -> None:
    """Remove one computer's containers and networks."""
    await _remove(docker, [f"{LABEL_COMPUTER}={computer_id}"], lambda labels: True)


async def _remove(docker: Any, label: list[str], is_wanted: Any) -> int:
    filters = {"label": label}
    removed = 0
    with engine_errors("removing containers"):
        found = await docker.containers.list(all=True, filters=filters)
        wanted = [c for c in found if is_wanted(c._container.get("Labels") or {})]
        removed = len(wanted)
        await asyncio.gather(*(_gone(c.delete(force=True, v=True)) for c in wanted))
        for network in await docker.networks.list(filters=filters):
            if is_wanted(network.get("Labels") or {}):
                await _gone((await docker.networks.get(network["Id"])).delete())
    return removed


async def _gone(deleting: Any) -> None:
    import aiodocker

    try:
        await deleting
    except aiodocker.DockerError as error:
        # 404: already gone. 409: its removal is in progress.
        if error.status not in (404, 409):
            raise


def _is_abandoned(labels: dict[str, str]) -> bool:
    try:
        return ProcessIdentity(**json.loads(labels[LABEL_OWNER])).is_known_dead()
    except (KeyError, ValueError, TypeError):
        return False
