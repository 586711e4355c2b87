"""A recorder that keeps events in a list, and tasks small enough to read at a glance."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import chz

from nanoeval._recorder_base import RecorderBase
from nanoeval.recorder import set_default_recorder
from nanoeval.recorder_protocol import BasicRunSpec
from nanoeval.solvers.computer_tasks.code_execution_interface import (
    ComputerConfiguration,
    ComputerInterface,
    ComputerRuntime,
    ExecutionResult,
    RuntimeConfig,
)
from nanoeval.solvers.computer_tasks.task import ComputerTask, Grade

PROMPT = [{"role": "user", "content": "write 14 into answer.txt"}]


class ListRecorder(RecorderBase):
    """Keeps every event as (kind, fields)."""

    def __init__(self) -> None:
        self.run_spec = BasicRunSpec(run_id="run", run_set_id="run-set")
        self.events: list[tuple[str, dict[str, Any]]] = []

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == kind]

    def __enter__(self) -> ListRecorder:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        pass

    def record_match(self, correct: bool, **fields: Any) -> None:
        self.events.append(("match", {"correct": correct, **fields}))

    def record_sampling(self, prompt: Any, sampled: Any, **fields: Any) -> None:
        self.events.append(("sampling", {"prompt": prompt, "sampled": sampled, **fields}))

    def record_sample_completed(self, **fields: Any) -> None:
        self.events.append(("completed", fields))

    def record_error(self, msg: str, error: Exception | None, **fields: Any) -> None:
        self.events.append(("error", {"msg": msg, "error": error, **fields}))

    def record_extra(self, data: Any) -> None:
        self.events.append(("extra", data))

    def record_final_report(self, final_report: Any) -> None:
        self.events.append(("report", final_report))

    def evalboard_url(self, view: str) -> str | None:
        return None


@contextmanager
def recording() -> Iterator[ListRecorder]:
    """A recorder that get_recorder() finds inside the block."""
    recorder = ListRecorder()
    with set_default_recorder(recorder, "question", "1.0"):
        yield recorder


class AnswerTask(ComputerTask):
    """Right when answer.txt holds 14."""

    question_id: str = "answer"
    prompt: list[dict[str, Any]] = PROMPT

    async def _setup(self, computer: ComputerInterface, runtime_config: RuntimeConfig) -> None:
        await computer.upload(b"7+7\n", "question.txt")

    async def grade(self, computer: ComputerInterface, runtime_config: RuntimeConfig) -> Grade:
        answer = await computer.send_shell_command("cat answer.txt")
        return Grade(
            score=float(answer.output.strip() == b"14"),
            grader_log=answer.unicode_output_best_effort,
        )


class GoldAnswerTask(AnswerTask):
    """The same with its solution."""

    async def gold_solution(self, computer: ComputerInterface) -> None:
        await computer.check_shell_command("echo $(($(cat question.txt))) > answer.txt")


class ScriptedComputer(ComputerInterface):
    """Answers commands by the first rule whose text occurs in them; else with exit code 0."""

    def __init__(self, rules: dict[str, tuple[bytes, int]] | None = None) -> None:
        self.rules = rules or {}
        self.commands: list[str] = []
        self.files: dict[str, bytes] = {}

    async def disable_internet(self) -> None:
        pass

    async def upload(self, file: bytes, destination: str) -> None:
        self.files[destination] = file

    async def download(self, file: str) -> bytes:
        return self.files[file]

    async def send_shell_command(self, cmd: str, *, idempotent: bool = False) -> ExecutionResult:
        self.commands.append(cmd)
        for text, (output, exit_code) in self.rules.items():
            if text in cmd:
                return ExecutionResult(output=output, exit_code=exit_code)
        return ExecutionResult(output=b"", exit_code=0)

    async def fetch_container_names(self) -> list[str]:
        return []

    async def stop(self) -> None:
        pass


@chz.chz
class ScriptedRuntime(ComputerRuntime):
    """Gives a ScriptedComputer after `start_seconds` and notes what happened in `log`."""

    log: list[str] = chz.field(default_factory=list)
    start_seconds: float = 0.0

    async def _do_runtime_setup(
        self, task: ComputerConfiguration, computer: ComputerInterface
    ) -> None:
        self.log.append("runtime set-up")

    @asynccontextmanager
    async def _start_computer(
        self, task: ComputerConfiguration
    ) -> AsyncIterator[ComputerInterface]:
        import asyncio

        self.log.append("start")
        try:
            await asyncio.sleep(self.start_seconds)
            yield ScriptedComputer({"pwd -P": (b"/root\n", 0)})
        finally:
            self.log.append("stop")
