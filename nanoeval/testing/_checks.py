"""Which requests a server answers, and what it says of the others. Knows no HTTP but statuses."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from nanoeval.testing._script import Request


class InvalidRequest(Exception):
    """A request that is answered with an HTTP error."""

    def __init__(self, message: str, status: int = 400, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass(frozen=True)
class Rules:
    """What a server has and takes. `ignores` and `refuses` name request fields, or "images"."""

    models: Collection[str]
    api_key: str | None
    ignores: Collection[str]
    refuses: Collection[str]

    def check_key(self, authorization: str | None) -> None:
        """Compare the header's value with the key, where one is asked for."""
        if self.api_key is not None and authorization != f"Bearer {self.api_key}":
            what = "the API key is wrong" if authorization else "an API key is required"
            raise InvalidRequest(what, 401, "invalid_api_key")

    def check_model(self, name: str) -> None:
        """Refuse a model that is not served, and name those that are."""
        if name not in self.models:
            served = ", ".join(self.models) or "none"
            what = f"the model `{name}` does not exist; served here: {served}"
            raise InvalidRequest(what, 404, "model_not_found")

    def read_body(self, raw: bytes, api: Literal["chat", "completions"]) -> dict[str, Any]:
        """The request's JSON without what is ignored; InvalidRequest where it is not in order."""
        try:
            body = json.loads(raw)
        except ValueError as error:
            raise InvalidRequest(f"the body is not JSON: {error}") from error
        _check_fields(body, api)
        self.check_model(body["model"])
        for name in self.refuses:
            if body.get(name) or (name == "images" and Request(api, body).images):
                raise InvalidRequest(f"`{name}` is not supported by this server")
        if not self.ignores:
            return dict(body)
        if "images" in self.ignores and api == "chat":
            body["messages"] = [_without_images(message) for message in body["messages"]]
        return {name: value for name, value in body.items() if name not in self.ignores}


def _check_fields(body: Any, api: str) -> None:
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    if not isinstance(body.get("model"), str):
        raise InvalidRequest("`model` must be a string")
    for name in ("n", "max_tokens", "max_completion_tokens", "top_logprobs"):
        if not isinstance(body.get(name, 0), int | None) or (body.get(name) or 0) < 0:
            raise InvalidRequest(f"`{name}` must be an integer that is not negative")
    if api == "completions":
        prompt = body.get("prompt")
        texts = prompt if isinstance(prompt, list) else [prompt]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InvalidRequest("`prompt` must be a string or a list of strings")
        return
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("`messages` must be a list that is not empty")
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise InvalidRequest("each of `messages` must be an object with a `role`")


def _without_images(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
    return {**message, "content": texts}
