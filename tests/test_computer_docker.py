"""What holds for computers in containers, against a real Docker Engine."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.server
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chz
import pytest

from nanoeval.eval import RolloutSystemError
from nanoeval.solvers.computer_tasks.code_execution_interface import (
    ComputerSetupError,
    ContainerResources,
    NetworkMode,
    VolumeMount,
)
from nanoeval.solvers.computer_tasks.runtimes import DockerRuntime
from nanoeval.solvers.computer_tasks.runtimes._docker_spec import (
    main_config,
    parse_size,
    side_containers,
)
from nanoeval.solvers.computer_tasks.runtimes.docker import (
    DockerError,
    EngineUnavailableError,
    remove_leftovers,
)
from tests.computer.fakes import AnswerTask, recording
from tests.computer.load import run_killed

if TYPE_CHECKING:
    from tests.docker_engine import DockerEngine

pytest_plugins = ["tests.docker_engine"]
pytestmark = pytest.mark.timeout(300)
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[DockerEngine]:
    """The engine; whatever a test leaves on it is a failure."""
    pytest.importorskip("aiodocker", reason='pip install "nanoeval[computer]"')
    engine: DockerEngine = request.getfixturevalue("docker_engine")
    yield engine
    assert (engine.containers(), engine.networks()) == ([], [])


@pytest.fixture
async def computer(engine: DockerEngine) -> AsyncIterator[Any]:
    async with DockerRuntime(image=engine.minimal, pids_limit=200).run(AnswerTask()) as started:
        yield started


@contextlib.contextmanager
def web_server(directory: Path) -> Iterator[int]:
    """A server on all addresses of this host; its port."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(directory))

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("0.0.0.0", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def fetch(host: str, port: int) -> str:
    """A bash command that prints what a web server answers."""
    return (
        f"timeout 3 bash -c 'exec 3<>/dev/tcp/{host}/{port};"
        r' printf "GET /fact HTTP/1.0\r\n\r\n" >&3; cat <&3' + "'"
    )


SERVE = """
import socket
server = socket.create_server(("", 8000))
while True:
    connection, _ = server.accept()
    connection.recv(1000)
    connection.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\nforty-two")
    connection.close()
"""

# ---- what a task asks for


def test_sizes_are_read_as_docker_reads_them() -> None:
    """A limit that is a thousand times off kills the task or the host."""
    assert [parse_size(text) for text in ("1024", "1k", "1.5g", "64MiB", "2 gb")] == [
        1024,
        1024,
        3 << 29,
        64 << 20,
        2 << 30,
    ]
    with pytest.raises(ValueError, match="'much' is not a size"):
        parse_size("much")


def test_only_limits_that_a_task_sets_itself_are_enforced() -> None:
    """The contract's defaults, a fifth of a core and 1 GB, would break tasks unaware of them."""
    unaware = main_config(AnswerTask(num_gpus=2), "image", {}, 100)["HostConfig"]
    assert not {"Memory", "NanoCpus", "CpuShares"} & set(unaware)
    assert unaware["DeviceRequests"] == [{"Count": 2, "Capabilities": [["gpu"]]}]
    task = AnswerTask(
        limits=ContainerResources(cpu=2, memory=512), resources=ContainerResources(memory=4096)
    )
    aware = main_config(task, "image", {}, 100)["HostConfig"]
    assert (aware["NanoCpus"], aware["Memory"]) == (2e9, 512 << 20)
    assert aware["MemoryReservation"] == 512 << 20, "the engine refuses more than the limit"


def test_compose_services_become_side_containers_in_their_order() -> None:
    """What cannot be served is refused by name, instead of missing later."""

    def sides(text: str, **fields: Any) -> Any:
        return side_containers(AnswerTask(docker_compose_yaml=text, **fields))

    text = """
services:
  web: {image: web:1, depends_on: [db], command: serve --port 80, ports: ["80:80"]}
  db: {image: "host:5000/team/db@sha256:abc", environment: {A: 1, B: null}, mem_limit: 64m}
"""
    cache, db, web = sides(text, side_images=["host:5000/team/redis:7"])
    assert (cache.name, db.name, web.name) == ("redis", "db", "web")
    assert web.config["Cmd"] == ["serve", "--port", "80"]
    assert db.config["Env"] == ["A=1"]
    assert db.config["HostConfig"] == {"Memory": 64 << 20}
    for bad, message in {
        "services: {a: {build: .}}": r"service 'a' .* unsupported keys \['build'\] and no image",
        "a: b": "has no services",
        "services: {a: {image: x, depends_on: [b]}}": "'b', which is not defined",
        "services: {a: {image: x, depends_on: [b]}, b: {image: x, depends_on: [a]}}": "a -> b -> a",
        "services: [": "is not YAML",
    }.items():
        with pytest.raises(ValueError, match=message):
            sides(bad)
    with pytest.raises(ValueError, match=r"share the names \['redis'\]"):
        side_containers(AnswerTask(side_images=["redis:7", "other/redis"]))


async def test_what_no_engine_serves_is_refused() -> None:
    """A task that counts on a proxy must not run without one."""
    for mode in (NetworkMode.WEBCACHE_GET_ONLY, NetworkMode.API_ACCESS):
        with pytest.raises(ValueError, match=f"network_mode='{mode.value}' needs a proxy"):
            async with DockerRuntime(image="x").run(AnswerTask(network_mode=mode)):
                pass
    with pytest.raises(ValueError, match="names no docker_image"):
        async with DockerRuntime().run(AnswerTask()):
            pass
    with pytest.raises(ValueError, match="start_tries=0"):
        DockerRuntime(start_tries=0)


async def test_an_engine_that_is_not_there_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Most people meet this error first."""
    pytest.importorskip("aiodocker", reason='pip install "nanoeval[computer]"')
    for host in (f"unix://{tmp_path}/none.sock", "tcp://127.0.0.1:9"):
        monkeypatch.setenv("DOCKER_HOST", host)
        with pytest.raises(EngineUnavailableError) as caught:
            await DockerRuntime().check()
        assert str(caught.value).startswith(f"no Docker Engine answers at {host}")
        assert "\n" not in str(caught.value)


# ---- start and end


@pytest.mark.docker
async def test_a_missing_image_is_named_with_what_to_do(engine: DockerEngine) -> None:
    """No retry would bring it."""
    for pull in ("never", "missing"):
        with pytest.raises(ComputerSetupError, match=r"image 'no/such-image:1' is not there"):
            async with DockerRuntime(image="no/such-image:1", pull=pull).run(AnswerTask()):
                pass


@pytest.mark.docker
async def test_containers_say_whose_they_are_and_go_however_the_block_ends(
    engine: DockerEngine,
) -> None:
    """Success, failure, time-out, cancellation: nothing is left behind."""
    runtime = DockerRuntime(image=engine.minimal)
    with recording():
        async with runtime.run(AnswerTask(question_id="a b")) as computer:
            (name,) = await computer.fetch_container_names()
            shown = engine.docker("inspect", "-f", "{{json .Config.Labels}}", name).stdout
            assert '"nanoeval.run_set":"run-set"' in shown
            assert '"nanoeval.task":"a b.1"' in shown
    assert engine.containers() == []
    with pytest.raises(KeyError):
        async with runtime.run(AnswerTask()):
            raise KeyError("mine")
    assert engine.containers() == []
    for seconds in (0.05, 0.3, 0.8, 1.5):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(seconds), runtime.run(AnswerTask()) as computer:
                await computer.send_shell_command("sleep 100")
        assert engine.containers() == []


@pytest.mark.docker
async def test_what_a_killed_process_left_goes_with_the_next_start(engine: DockerEngine) -> None:
    """SIGKILL gives nobody a chance to clean up; a living owner's containers are left alone."""
    program = [sys.executable, "-m", "tests.computer.start_and_wait", "docker", engine.minimal]
    with subprocess.Popen(program, cwd=REPOSITORY, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        assert await remove_leftovers() == 0
        assert len(engine.containers()) == 1
        owner.kill()
    async with DockerRuntime(image=engine.minimal).run(AnswerTask()):
        assert len(engine.containers()) == 1


@pytest.mark.docker
async def test_a_run_sets_containers_can_be_removed_by_its_name(engine: DockerEngine) -> None:
    """What `nanoeval.bin.rm` does."""
    with recording():
        async with DockerRuntime(image=engine.minimal).run(AnswerTask()):
            assert await remove_leftovers("another") == 0
            assert await remove_leftovers("run-set") == 1
            assert engine.containers() == []


@pytest.mark.docker
async def test_a_failed_start_is_tried_again_and_leaves_nothing(engine: DockerEngine) -> None:
    """Engines under load fail now and then."""
    tries = []

    @chz.chz
    class Flaky(DockerRuntime):
        n_failures: int

        async def _create_and_start(self, *arguments: Any) -> list[str]:
            names = await super()._create_and_start(*arguments)
            tries.append(names)
            if len(tries) <= self.n_failures:
                raise DockerError("the engine answered 500")
            return names

    async with Flaky(image=engine.minimal, n_failures=1).run(AnswerTask()):
        assert len(tries) == 2
        assert engine.containers() == tries[1]
    tries.clear()
    with pytest.raises(DockerError, match="did not start, 2 times: the engine answered 500"):
        async with Flaky(image=engine.minimal, n_failures=9, start_tries=2).run(AnswerTask()):
            pass


@pytest.mark.docker
async def test_no_more_than_max_concurrent_starts_start_at_once(engine: DockerEngine) -> None:
    """An engine that is asked for fifty at once fails some of them."""
    now = most = 0

    @chz.chz
    class Counting(DockerRuntime):
        async def _create_and_start(self, *arguments: Any) -> list[str]:
            nonlocal now, most
            now += 1
            most = max(most, now)
            try:
                return await super()._create_and_start(*arguments)
            finally:
                now -= 1

    runtime = Counting(image=engine.minimal, max_concurrent_starts=2)

    async def rollout() -> None:
        async with runtime.run(AnswerTask()) as computer:
            await computer.check_shell_command("sleep 1")

    await asyncio.gather(*(rollout() for _ in range(6)))
    assert most == 2


@pytest.mark.docker
async def test_the_images_own_command_runs_and_its_end_ends_nothing(engine: DockerEngine) -> None:
    """Task images prepare themselves in it, and the task waits for that."""
    engine.docker("create", "--name", "base", engine.minimal, "true")
    engine.docker("commit", "-c", 'CMD ["sh", "-c", "echo done > /setup_done"]', "base", "own-cmd")
    engine.docker("rm", "base")
    async with DockerRuntime(image="own-cmd").run(AnswerTask()) as computer:
        for _ in range(50):
            if (await computer.send_shell_command("cat /setup_done")).output == b"done\n":
                return
            await asyncio.sleep(0.1)
        pytest.fail("the image's command did not run")


# ---- limits and mounts


@pytest.mark.docker
async def test_limits_hold_inside_the_container(engine: DockerEngine, tmp_path: Path) -> None:
    """CPU, memory, processes, /dev/shm, read-only mounts."""
    (tmp_path / "fact").write_text("forty-two")
    task = AnswerTask(
        limits=ContainerResources(cpu=0.5, memory=64),
        shm_size="8m",
        volume_mounts=[VolumeMount(host_path=str(tmp_path), container_path="/mnt/data")],
    )
    async with DockerRuntime(image=engine.minimal, pids_limit=50).run(task) as computer:
        (name,) = await computer.fetch_container_names()
        shown = engine.docker("inspect", "-f", "{{json .HostConfig}}", name).stdout
        assert '"NanoCpus":500000000' in shown
        assert '"PidsLimit":50' in shown
        assert (await computer.check_shell_command("cat /mnt/data/fact")).output == b"forty-two"
        assert (await computer.send_shell_command("echo x > /mnt/data/fact")).exit_code != 0
        shm = await computer.check_shell_command("df -k /dev/shm | tail -1")
        assert shm.output.split()[1] == b"8192"
        greedy = await computer.send_shell_command("python3 -c 'x = bytearray(500_000_000)'")
        assert greedy.exit_code == 137
        assert (await computer.send_shell_command("echo alive")).output == b"alive\n"
    missing = [VolumeMount(host_path=str(tmp_path / "none"), container_path="/mnt/data")]
    with pytest.raises(DockerError, match="does not exist"):
        async with DockerRuntime(image=engine.minimal).run(AnswerTask(volume_mounts=missing)):
            pass


@pytest.mark.docker
async def test_a_command_that_forks_without_end_harms_nobody_else(computer: Any) -> None:
    """It meets the limit on processes, is killed with all of them, and the container goes on."""
    result = await computer.send_shell_command(
        "bomb() { bomb | bomb & }; bomb; sleep 100", timeout=3
    )
    assert result.exit_code == 124
    for _ in range(100):
        alive = await computer.send_shell_command("echo alive", timeout=10)
        if alive.output == b"alive\n":
            return
        await asyncio.sleep(0.1)
    pytest.fail(f"the container does not recover: {alive}")


@pytest.mark.docker
async def test_a_full_disk_is_an_exit_code_or_a_named_error(engine: DockerEngine) -> None:
    """A command fails as it would anywhere; an upload says what is full."""
    small = {
        "Type": "volume",
        "Target": "/small",
        "VolumeOptions": {
            "DriverConfig": {
                "Name": "local",
                "Options": {"type": "tmpfs", "device": "tmpfs", "o": "size=1m"},
            }
        },
    }
    runtime = DockerRuntime(image=engine.minimal, host_config={"Mounts": [small]})
    async with runtime.run(AnswerTask()) as computer:
        filled = await computer.send_shell_command("head -c 2000000 /dev/zero > /small/zeros")
        assert filled.exit_code == 1
        assert b"No space left on device" in filled.output
        with pytest.raises(OSError, match="disk is full") as caught:
            await computer.upload(bytes(2_000_000), "/small/upload")
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == "/small/upload"


# ---- networks


@pytest.fixture
def outside(engine: DockerEngine, tmp_path: Path) -> Iterator[str]:
    """A command that prints "outside" where a way leads out of the container."""
    (tmp_path / "fact").write_text("outside")
    with web_server(tmp_path) as port:
        yield fetch(engine.address_of_host(), port)


@pytest.mark.docker
async def test_network_mode_none_has_no_way_out_and_unproxied_has(
    engine: DockerEngine, outside: str
) -> None:
    """Until disable_internet() takes it away."""
    runtime = DockerRuntime(image=engine.minimal)
    async with runtime.run(AnswerTask()) as computer:
        assert b"outside" not in (await computer.send_shell_command(outside)).output
        await computer.disable_internet()
    async with runtime.run(AnswerTask(network_mode=NetworkMode.UNPROXIED)) as computer:
        assert b"outside" in (await computer.check_shell_command(outside)).output
        await computer.disable_internet()
        assert b"outside" not in (await computer.send_shell_command(outside)).output


@pytest.mark.docker
@pytest.mark.parametrize("mode", [NetworkMode.NONE, NetworkMode.UNPROXIED])
async def test_side_containers_are_reachable_by_name_in_every_mode(
    engine: DockerEngine, outside: str, mode: NetworkMode
) -> None:
    """Also after disable_internet(), and from each other."""
    code = SERVE.replace("\n", "\n          ")
    compose = f"""
services:
  facts:
    image: {engine.minimal}
    command:
      - python3
      - -c
      - |
          {code}
  idle: {{image: {engine.minimal}, command: sleep 1000}}
"""
    task = AnswerTask(docker_compose_yaml=compose, network_mode=mode)
    async with DockerRuntime(image=engine.minimal).run(task) as computer:
        names = await computer.fetch_container_names()
        assert [name.rsplit("-", 1)[-1] for name in names[1:]] == ["facts", "idle"]
        assert sorted(engine.containers()) == sorted(names)
        reach = fetch("facts", 8000)
        for _ in range(50):
            answer = await computer.send_shell_command(reach)
            if answer.exit_code == 0:
                break
            await asyncio.sleep(0.1)
        assert b"forty-two" in answer.output
        seen = (await computer.send_shell_command(outside)).output
        assert (b"outside" in seen) == (mode == NetworkMode.UNPROXIED)
        await computer.disable_internet()
        assert b"forty-two" in (await computer.check_shell_command(reach)).output
        assert b"outside" not in (await computer.send_shell_command(outside)).output


# ---- what goes wrong


@pytest.mark.docker
async def test_a_container_killed_from_outside_is_a_system_error(
    engine: DockerEngine, computer: Any
) -> None:
    """In the middle of a command, before one, and in a cell: at once, never a hang."""
    (name,) = await computer.fetch_container_names()
    running = asyncio.create_task(computer.send_shell_command("sleep 100"))
    await asyncio.sleep(0.5)
    started = time.perf_counter()
    engine.docker("kill", name)
    with pytest.raises(RolloutSystemError, match=r"the container is gone: .* \(exit code 137\)"):
        await running
    with pytest.raises(RolloutSystemError):
        await computer.send_shell_command("true")
    with pytest.raises(RolloutSystemError):
        await computer.execute("1")
    engine.docker("rm", name)
    for call in (
        computer.send_shell_command("true"),
        computer.upload(b"x", "file"),
        computer.download("file"),
    ):
        with pytest.raises(RolloutSystemError, match="No such container"):
            await call
    assert time.perf_counter() - started < 10


@pytest.mark.docker
async def test_a_command_that_kills_everything_loses_itself_alone(computer: Any) -> None:
    """The connection goes with it, and the next command makes a new one."""
    killed = await computer.send_shell_command("kill -9 -1")
    assert killed.exit_code == 137
    assert (await computer.send_shell_command("echo alive")).output == b"alive\n"


@pytest.mark.docker
async def test_an_engine_restarted_in_mid_run_costs_the_rollout_and_no_more(
    engine: DockerEngine,
) -> None:
    """The rollout is a system error, its container goes, and the next one starts."""
    runtime = DockerRuntime(image=engine.minimal)

    async def rollout() -> None:
        async with runtime.run(AnswerTask()) as computer:
            running = asyncio.create_task(computer.send_shell_command("sleep 100"))
            await asyncio.sleep(0.5)
            restarting = asyncio.create_task(asyncio.to_thread(engine.restart))
            try:
                await running
            finally:
                await restarting

    with pytest.raises(RolloutSystemError):
        await rollout()
    assert engine.containers() == []
    async with runtime.run(AnswerTask()) as computer:
        assert (await computer.send_shell_command("echo alive")).output == b"alive\n"


# ---- images that lack something, or bring something


@pytest.mark.docker
async def test_an_image_without_python_runs_commands_all_the_same(engine: DockerEngine) -> None:
    """Slower, but with time-outs, exit codes and files; cells say what they need."""
    async with DockerRuntime(image=engine.no_python).run(AnswerTask()) as computer:
        result = await computer.send_shell_command(r"pwd; printf '\377'; echo err >&2; exit 3")
        assert (result.output, result.exit_code) == (b"/root\n\xfferr\n", 3)
        endless = await computer.send_shell_command("echo so far; sleep 1240.5", timeout=1)
        assert endless.exit_code == 124
        assert endless.output.startswith(b"so far\n")
        left = await computer.send_shell_command("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
        assert b"sleep 1240.5" not in left.output
        await computer.upload(b"x", "a/b")
        assert await computer.download("a/b") == b"x"
        with pytest.raises(ComputerSetupError, match="its image needs python3"):
            await computer.execute("1")


@pytest.mark.docker
async def test_a_task_can_bring_the_command_that_starts_its_kernel(engine: DockerEngine) -> None:
    """As tasks with an environment of their own (conda) do."""
    runtime = DockerRuntime(image=engine.jupyter)
    start = (
        "import os; os.environ['MARK'] = 'mine'; from jupyter_client.kernelapp import main; main()"
    )
    task = AnswerTask(jupyter_setup=["python3", "-c", start])
    async with runtime.run(task) as computer:
        cell = await computer.check_execute("import os; x = 1; os.environ['MARK']")
        assert cell.parsed_final_expression_output == "mine"
        endless = await computer.execute("while True: pass", timeout=1)
        assert endless.status == "cancelled"
        assert (await computer.check_execute("x")).parsed_final_expression_output == 1
    failing = AnswerTask(jupyter_setup=["sh", "-c", "echo no such environment; exit 3"])
    async with runtime.run(failing) as computer:
        with pytest.raises(ComputerSetupError, match=r"(?s)exit code 3, .* no such environment"):
            await computer.execute("1")


# ---- many at once


@pytest.mark.docker
@pytest.mark.slow
async def test_40_rollouts_with_random_kills_are_each_graded_once(engine: DockerEngine) -> None:
    """Eight at once; containers that are killed are replaced, and nothing is left over."""
    runtime = DockerRuntime(image=engine.minimal)
    # Process 1 of a container ignores KILL from inside; TERM is what its shell ends on.
    summary = await run_killed(runtime, n_instances=40, concurrency=8, kill="kill 1; sleep 30")
    assert summary["accuracy"] == 1.0
    assert summary["aggregations"]["num_attempts"] == 40
    assert summary["aggregations"]["num_system_error"] == 0
