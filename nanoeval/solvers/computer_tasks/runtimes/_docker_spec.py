"""What a task asks for, as the Docker Engine's JSON. Pure functions; knows no connection."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from nanoeval.solvers.computer_tasks.code_execution_interface import (
    ComputerConfiguration,
    NetworkMode,
)

logger = structlog.stdlib.get_logger(component=__name__)

# Runs the image's own command, if it has one, and stays alive whatever becomes of that.
_KEEP_ALIVE = (
    'trap "exit 0" TERM; if [ $# -gt 0 ]; then "$@" </dev/null & fi;'
    " while :; do sleep 86400 & wait $!; done"
)
_UNSERVED = ("azure_vm_sku", "azure_files_config", "azure_container_config", "disk_mount_path")
_SERVICE_KEYS = {
    "image", "command", "entrypoint", "environment", "hostname", "working_dir", "user", "shm_size",
    "mem_limit", "cpus", "pids_limit", "privileged", "cap_add", "tmpfs", "depends_on",
}  # fmt: skip
# All services share one private network, on which every port is open; none restarts.
_NEEDLESS_SERVICE_KEYS = {"ports", "expose", "networks", "restart", "container_name", "links"}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", re.IGNORECASE)


@dataclass(frozen=True)
class SideContainer:
    """A container beside the main one, reachable from it as `name`."""

    name: str
    config: dict[str, Any]


def check_task(task: ComputerConfiguration) -> None:
    """Refuse what no Docker Engine serves, and warn of what other runtimes would serve."""
    if task.network_mode not in (NetworkMode.NONE, NetworkMode.UNPROXIED):
        raise ValueError(
            f"network_mode={task.network_mode.value!r} needs a proxy that DockerRuntime has not;"
            ' use "none" or "unproxied", or a runtime of your own'
        )
    ignored = [name for name in _UNSERVED if getattr(task, name)]
    ignored += [name for name in ("volumes_config", "alcatraz_limits") if task.__dict__.get(name)]
    if ignored:
        logger.warning(f"DockerRuntime has no use for the task's {', '.join(ignored)}")


def main_config(
    task: ComputerConfiguration, image: str, image_config: Mapping[str, Any], pids_limit: int
) -> dict[str, Any]:
    """The main container. `image_config` is the `Config` of the image's inspection."""
    own = [*(image_config.get("Entrypoint") or []), *(image_config.get("Cmd") or [])]
    return {
        "Image": image,
        "Entrypoint": ["sh", "-c", _KEEP_ALIVE, "sh", *own],
        "Cmd": [],
        "Env": [f"{n}={value}" for n, value in task.environment.items() if value is not None],
        "HostConfig": {
            "PidsLimit": pids_limit,
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "10m"}},
            **_resource_limits(task),
        },
    }


def _resource_limits(task: ComputerConfiguration) -> dict[str, Any]:
    # The defaults of `resources` and `limits` are far below what an unaware task needs, so only
    # those that a task sets itself are enforced.
    limits: dict[str, Any] = {}
    if "limits" in task.model_fields_set:
        limits["NanoCpus"] = round(task.limits.cpu * 1e9)
        limits["Memory"] = task.limits.memory << 20
    if task.mem_limit:
        limits["Memory"] = parse_size(task.mem_limit)
    if "Memory" in limits:
        limits["MemorySwap"] = limits["Memory"]  # no swap on top
    if "resources" in task.model_fields_set:
        limits["CpuShares"] = max(2, round(task.resources.cpu * 1024))
        reserved = task.resources.memory << 20
        limits["MemoryReservation"] = min(reserved, limits.get("Memory", reserved))
    if task.shm_size:
        limits["ShmSize"] = parse_size(task.shm_size)
    if task.volume_mounts:
        limits["Mounts"] = [
            {
                "Type": "bind",
                "Source": mount.host_path,
                "Target": mount.container_path,
                "ReadOnly": True,
            }
            for mount in task.volume_mounts
        ]
    if task.num_gpus:
        limits["DeviceRequests"] = [{"Count": task.num_gpus, "Capabilities": [["gpu"]]}]
    return limits


def side_containers(task: ComputerConfiguration) -> list[SideContainer]:
    """The task's side images and compose services, in the order in which they are to start."""
    sides = [
        SideContainer(_short_name(image), {"Image": image, "HostConfig": {}})
        for image in task.side_images
    ]
    if task.docker_compose_yaml:
        sides += _compose_services(task.docker_compose_yaml)
    names = [side.name for side in sides]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"side containers share the names {twice}; give each a name of its own in"
            " docker_compose_yaml"
        )
    return sides


def parse_size(text: str) -> int:
    """Bytes of a size such as "64m", "1.5g" or "1024"; 1k is 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f'{text!r} is not a size; write bytes, or a number with k, m, g or t: "4g"'
        )
    power: int = " kmgt".index(match[2].lower() or " ")
    return round(float(match[1]) * float(1024**power))


def _short_name(image: str) -> str:
    """`host:5000/team/redis:7` is `redis`."""
    return re.split("[@:]", image.rsplit("/", 1)[-1], maxsplit=1)[0]


def _compose_services(text: str) -> list[SideContainer]:
    try:
        import yaml
    except ImportError as error:
        raise ModuleNotFoundError(
            'docker_compose_yaml needs PyYAML: pip install "nanoeval[computer]"'
        ) from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"docker_compose_yaml is not YAML: {error}") from error
    services = data.get("services") if isinstance(data, dict) else None
    if not isinstance(services, dict) or not services:
        raise ValueError(
            "docker_compose_yaml has no services; give the file's text, not its path, with a"
            " `services:` mapping"
        )
    sides = {name: SideContainer(name, _service(name, spec)) for name, spec in services.items()}
    return [sides[name] for name in _start_order(services)]


def _service(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(spec) - _SERVICE_KEYS - _NEEDLESS_SERVICE_KEYS)
    if unknown or "image" not in spec:
        missing = "" if "image" in spec else " and no image (build it first)"
        raise ValueError(
            f"service {name!r} of docker_compose_yaml has unsupported keys {unknown}{missing};"
            f" supported are {sorted(_SERVICE_KEYS)}"
        )
    environment = spec.get("environment") or {}
    if isinstance(environment, dict):
        environment = [f"{n}={value}" for n, value in environment.items() if value is not None]
    config = {
        "Image": spec["image"],
        "Env": environment,
        "Hostname": spec.get("hostname", name),
        "WorkingDir": spec.get("working_dir", ""),
        "User": str(spec.get("user", "")),
    }
    for key, ours in (("command", "Cmd"), ("entrypoint", "Entrypoint")):
        if spec.get(key) is not None:
            config[ours] = shlex.split(spec[key]) if isinstance(spec[key], str) else spec[key]
    tmpfs = spec.get("tmpfs") or []
    host = {
        "ShmSize": parse_size(str(spec["shm_size"])) if "shm_size" in spec else None,
        "Memory": parse_size(str(spec["mem_limit"])) if "mem_limit" in spec else None,
        "NanoCpus": round(float(spec["cpus"]) * 1e9) if "cpus" in spec else None,
        "PidsLimit": spec.get("pids_limit"),
        "Privileged": spec.get("privileged"),
        "CapAdd": spec.get("cap_add"),
        "Tmpfs": dict.fromkeys([tmpfs] if isinstance(tmpfs, str) else tmpfs, ""),
    }
    return {**config, "HostConfig": {key: value for key, value in host.items() if value}}


def _start_order(services: dict[str, dict[str, Any]]) -> list[str]:
    order: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise ValueError(f"services depend on each other: {' -> '.join((*path, name))}")
        if name not in services:
            raise ValueError(f"service {path[-1]!r} depends on {name!r}, which is not defined")
        for needed in services[name].get("depends_on") or ():
            visit(needed, (*path, name))
        if name not in order:
            order.append(name)

    for name in services:
        visit(name, ())
    return order
