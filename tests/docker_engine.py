"""A Docker Engine for the tests of one session: started, used by nobody else, and stopped again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
INSTALL = "tests/install_docker.sh"
CACHE = Path(os.environ.get("NANOEVAL_TEST_CACHE", Path.home() / ".cache/nanoeval-tests"))
MINIMAL, JUPYTER, NO_PYTHON = "nanoeval-minimal", "nanoeval-jupyter", "nanoeval-nopython"
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
START_SECONDS = 60
BUILD_SECONDS = 600


def run(*command: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program of the system, whatever its exit code; `given` is its input."""
    return subprocess.run(command, input=given, check=False, capture_output=True, text=True)


class DockerEngine:
    """One dockerd, with data, exec root and socket in a temporary folder, and three images."""

    minimal, jupyter, no_python = MINIMAL, JUPYTER, NO_PYTHON

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="nanoeval-dockerd-"))
        self.host = f"unix://{self.folder}/docker.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self._had_bridge = Path("/sys/class/net/docker0").exists()
        self._packet_rules = run("iptables-save").stdout
        self._is_forwarding = FORWARDING.read_text()

    def start(self) -> None:
        log = (self.folder / "log").open("ab")
        with log:
            self._process = subprocess.Popen(
                [
                    "dockerd",
                    f"--data-root={self.folder}/data",
                    f"--exec-root={self.folder}/exec",
                    f"--pidfile={self.folder}/pid",
                    f"--host={self.host}",
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        give_up_at = time.monotonic() + START_SECONDS
        while self.docker("version", check=False).returncode != 0:
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                end = (self.folder / "log").read_text()[-2000:]
                raise RuntimeError(f"dockerd did not start; its log ends with:\n{end}")
            time.sleep(0.1)

    def stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            # It lingers for half a minute after it has shut down.
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def restart(self) -> None:
        self.stop()
        self.start()

    def remove(self) -> None:
        """Stop the engine and take away its mounts, its bridge, its rules and its folder."""
        self.stop()
        mounts = Path("/proc/mounts").read_text().splitlines()
        for line in reversed(mounts):
            target = line.split()[1]
            if target.startswith(str(self.folder)):
                run("umount", "-l", target)
        if not self._had_bridge:
            run("ip", "link", "delete", "docker0")
            run("iptables-restore", given=self._packet_rules)
            FORWARDING.write_text(self._is_forwarding)
        shutil.rmtree(self.folder)

    def docker(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command-line client against this engine."""
        return subprocess.run(
            ["docker", "--host", self.host, *arguments],
            check=check,
            capture_output=True,
            text=True,
        )

    def containers(self) -> list[str]:
        """Names of all containers, stopped ones included."""
        return self.docker("ps", "-a", "--format", "{{.Names}}").stdout.split()

    def networks(self) -> list[str]:
        """Names of the networks that computers made."""
        names = self.docker("network", "ls", "--format", "{{.Name}}").stdout.split()
        return [name for name in names if name.startswith("nanoeval-")]

    def address_of_host(self) -> str:
        """The address under which containers with a network reach this host."""
        shown = subprocess.run(
            ["ip", "-4", "-o", "addr", "show", "docker0"],
            check=True,
            capture_output=True,
            text=True,
        )
        return shown.stdout.split("inet ")[1].split("/")[0]

    def make_images(self) -> None:
        self.docker("import", str(CACHE / "minimal.tar"), MINIMAL)
        self.docker("import", str(CACHE / "jupyter.tar"), JUPYTER)
        self.docker("run", "--name", "strip", MINIMAL, "sh", "-c", "rm -f /usr/bin/python3*")
        self.docker("commit", "strip", NO_PYTHON)
        self.docker("rm", "strip")


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[DockerEngine]:
    """An engine with three images, at DOCKER_HOST."""
    missing = [
        name for name in ("dockerd", "docker", "iptables", "ip") if shutil.which(name) is None
    ]
    if missing or os.getuid() != 0:
        pytest.skip(f"needs root and {' and '.join(missing) or 'an engine'}: run {INSTALL} as root")
    if not all((CACHE / name).exists() for name in ("minimal.tar", "jupyter.tar")):
        if shutil.which("debootstrap") is None:
            pytest.skip(f"needs debootstrap to make its images: run {INSTALL} as root")
        subprocess.run([HERE / "install_docker.sh", "images"], check=True, timeout=BUILD_SECONDS)
    engine = DockerEngine()
    before = os.environ.get("DOCKER_HOST")
    try:
        engine.start()
        engine.make_images()
        os.environ["DOCKER_HOST"] = engine.host
        yield engine
    finally:
        if before is None:
            os.environ.pop("DOCKER_HOST", None)
        else:
            os.environ["DOCKER_HOST"] = before
        engine.remove()
