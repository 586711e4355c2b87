"""What a script gets and gives: a request in, a reply out. Knows no HTTP."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nanoeval.testing._faults import Fault


@dataclass(frozen=True)
class Request:
    """One request for a reply. `body` is its JSON, `headers` are looked up in any case."""

    api: Literal["chat", "completions"]
    body: dict[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)
    # The n-th request of all, from 1.
    number: int = 1
    # The n-th time that this very body came, from 1.
    try_number: int = 1

    @property
    def model(self) -> str:
        """The model that was asked for."""
        return str(self.body.get("model", ""))

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages of a chat; empty for a plain completion."""
        return list(self.body.get("messages") or [])

    @property
    def prompt(self) -> str:
        """The text of the user's last message, or the plain prompt."""
        if self.api == "completions":
            return str(self.body.get("prompt", ""))
        for message in reversed(self.messages):
            if message.get("role") == "user":
                return text_of(message.get("content"))
        return text_of(self.messages[-1].get("content")) if self.messages else ""

    @property
    def text(self) -> str:
        """All that the model is given to read: every message's text, a line each."""
        if self.api == "completions":
            return self.prompt
        return "\n".join(text_of(message.get("content")) for message in self.messages)

    @property
    def images(self) -> list[str]:
        """The addresses (`data:` ones as a rule) of all images, in their order."""
        return [
            url
            for message in self.messages
            if isinstance(content := message.get("content"), list)
            for part in content
            if (url := _image_url(part)) is not None
        ]


@dataclass(frozen=True)
class Reply:
    """A reply with more to say than its text. None as `text` is a null content.

    `latency` (seconds) and the token counts replace the server's own; `fields` are added to the
    message (`reasoning_content`, `tool_calls`), or to the choice of a plain completion.
    """

    text: str | None = ""
    finish_reason: str = "stop"
    latency: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


Answer = str | Reply | Fault | None
# One text for everything, a text by prompt, or a function of the request.
Script = str | Mapping[str, str] | Callable[[Request], Answer | Awaitable[Answer]]


async def answer(script: Script, request: Request) -> Reply | Fault:
    """What `script` says to `request`. KeyError for a prompt that a mapping does not hold."""
    if isinstance(script, str):
        return Reply(script)
    if isinstance(script, Mapping):
        if request.prompt not in script:
            raise KeyError(f"no reply is scripted for the prompt {request.prompt[:200]!r}")
        return Reply(script[request.prompt])
    said = script(request)
    if inspect.isawaitable(said):
        said = await said
    if isinstance(said, Reply | Fault):
        return said
    if said is None or isinstance(said, str):
        return Reply(said)
    raise TypeError(
        f"the reply function returned a {type(said).__name__}; it must return a str, a Reply,"
        " a Fault or None"
    )


def text_of(content: Any) -> str:
    """The text of a message's content, which is a string or a list of parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def _image_url(part: Any) -> str | None:
    if not isinstance(part, dict) or part.get("type") not in {"image_url", "input_image"}:
        return None
    image = part.get("image_url")
    return str(image.get("url")) if isinstance(image, dict) else str(image)
