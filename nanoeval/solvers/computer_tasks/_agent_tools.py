"""The tools of a chat model on a computer: what it is told of them, and what they do."""

from __future__ import annotations

import asyncio
import inspect
import json
from dataclasses import dataclass
from typing import Any

from nanoeval.solvers.computer_tasks.code_execution_interface import (
    ComputerInterface,
    JupyterComputerInterface,
    JupyterExecutionResult,
)

# Seconds for a computer to end a command that ran out of time.
_MARGIN = 30.0
BASH, PYTHON, SUBMIT = "bash", "python", "submit"


@dataclass(frozen=True)
class ToolCall:
    """One call that a model asks for. `arguments` is None where they were not a JSON object."""

    id: str
    name: str
    arguments: dict[str, Any] | None

    def answer(self, text: str) -> dict[str, Any]:
        """The message that carries the call's result."""
        return {"role": "tool", "tool_call_id": self.id, "content": text}


def parse_calls(message: dict[str, Any]) -> list[ToolCall]:
    """The calls in a reply, in their order; empty for a reply that is only text."""
    calls = []
    for index, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function") or {}
        try:
            arguments = json.loads(function.get("arguments") or "{}")
        except ValueError:
            arguments = None
        calls.append(
            ToolCall(
                id=call.get("id") or f"call_{index}",
                name=str(function.get("name")),
                arguments=arguments if isinstance(arguments, dict) else None,
            )
        )
    return calls


class Tools:
    """The tools of one computer. What a call gives back is text for the model, never an error."""

    def __init__(
        self, computer: ComputerInterface, command_timeout: float, max_output_chars: int
    ) -> None:
        self._computer = computer
        self._seconds = command_timeout
        self._max_output_chars = max_output_chars
        parameters = inspect.signature(computer.send_shell_command).parameters
        self._takes_timeout = "timeout" in parameters

    def definitions(self) -> list[dict[str, Any]]:
        """The tools in the form of a chat request's `tools`."""
        tools = [_tool(BASH, "Run a command in a fresh bash shell.", command="The command.")]
        if isinstance(self._computer, JupyterComputerInterface):
            about = "Run a cell in one lasting Python session; its last line's value is shown."
            tools.append(_tool(PYTHON, about, code="The cell."))
        return [*tools, _tool(SUBMIT, "Say that the task is done and hand it in.")]

    async def use(self, call: ToolCall) -> str:
        """Carry out `call`; what the model is shown of it, at most `max_output_chars` long.

        Errors of the computer itself pass through.
        """
        wanted = {BASH: "command", PYTHON: "code"}.get(call.name)
        if wanted is None or (call.name == PYTHON and not self._has_python()):
            return f"There is no tool {call.name!r}."
        text = (call.arguments or {}).get(wanted)
        if not isinstance(text, str):
            return f'The arguments must be a JSON object with a string "{wanted}".'
        shown = await (self._run_command(text) if call.name == BASH else self._run_cell(text))
        return self._shortened(shown) or "[no output]"

    async def _run_command(self, command: str) -> str:
        if self._takes_timeout:
            running = self._computer.send_shell_command(command, timeout=self._seconds)  # type: ignore[call-arg]
        else:
            running = self._computer.send_shell_command(command)
        try:
            # The computer's own time-out comes first, because it keeps the output so far.
            async with asyncio.timeout(self._seconds + _MARGIN * self._takes_timeout) as limit:
                result = await running
        except TimeoutError:
            if not limit.expired():
                raise
            return f"[the command took longer than {self._seconds:g} seconds]"
        text = result.unicode_output_best_effort
        return text if result.exit_code == 0 else f"{text}\n[exit code {result.exit_code}]"

    async def _run_cell(self, code: str) -> str:
        assert isinstance(self._computer, JupyterComputerInterface)
        result = await self._computer.execute(code, timeout=max(1, round(self._seconds)))
        return _cell_text(result)

    def _has_python(self) -> bool:
        return isinstance(self._computer, JupyterComputerInterface)

    def _shortened(self, text: str) -> str:
        if len(text) <= self._max_output_chars:
            return text
        half = self._max_output_chars // 2
        left_out = len(text) - 2 * half
        return f"{text[:half]}\n[... {left_out} characters left out ...]\n{text[-half:]}"


def _cell_text(result: JupyterExecutionResult) -> str:
    parts = [result.output, result.final_expression_output or ""]
    exception = result.in_kernel_exception
    if isinstance(exception, dict):
        parts.append("".join(exception.get("traceback") or ()) or str(exception))
    elif exception is not None:
        parts.append(str(exception))
    if result.status not in ("success", "failed_with_in_kernel_exception"):
        parts.append(f"[the cell ended with status {result.status}]")
    return "\n".join(part.rstrip("\n") for part in parts if part)


def _tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    properties = {
        key: {"type": "string", "description": about} for key, about in parameters.items()
    }
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": schema},
    }
