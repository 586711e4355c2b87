"""Puts the steps of one rollout on the record. Knows no solver and no recorder in particular."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from nanoeval.recorder_protocol import RecorderProtocol
from nanoeval.solvers.computer_tasks.steps import FinalResult, Step

_LAST_MESSAGES = 5


class Transcript:
    """The record of one rollout's conversation: no message goes into it twice.

    A step records those of its last five messages that are not on the record yet, the final result
    the whole conversation. With `pretty`, each message is a sampling of its own, and the final
    result adds those that no step recorded.
    """

    def __init__(self, recorder: RecorderProtocol, pretty: bool = False) -> None:
        self._recorder = recorder
        self._pretty = pretty
        self._recorded: set[str] = set()

    def record(self, step: Step | FinalResult) -> None:
        """Record `step`, which is left as it is."""
        messages = messages_of(step.convo)
        keys = _keys(messages)
        first = 0 if isinstance(step, FinalResult) else max(0, len(messages) - _LAST_MESSAGES)
        fresh = [i for i in range(first, len(messages)) if keys[i] not in self._recorded]
        self._recorded.update(keys[i] for i in fresh)
        if self._pretty:
            for i in fresh:
                self._record_message(messages[i])
        else:
            kept = range(len(messages)) if isinstance(step, FinalResult) else fresh
            self._recorder.record_extra(_dump(step, [messages[i] for i in kept]))

    def _record_message(self, message: Any) -> None:
        fields = _plain(message)
        if not isinstance(fields, dict):
            fields = {"content": str(message)}
        content = fields.pop("content", "")
        fields.pop("metadata", None)
        role = fields.get("role") or (fields.get("author") or {}).get("role", "")
        self._recorder.record_sampling(
            prompt=f"{role} {json.dumps(fields, default=str, ensure_ascii=False)}",
            sampled=content if isinstance(content, str) else json.dumps(content, default=str),
        )


def messages_of(convo: Any) -> Sequence[Any]:
    """The messages of a conversation: its `messages`, or itself where it is a list; else none."""
    if isinstance(convo, dict):
        convo = convo.get("messages", [])
    messages = getattr(convo, "messages", convo)
    return messages if isinstance(messages, list | tuple) else []


def strip_all_metadata(convo: Any, allowed_metadata_fields: list[str] | None = None) -> Any:
    """A copy of a conversation whose metadata, and its messages', keeps the allowed fields only.

    What has no `metadata` comes back as it is; the argument is never changed.
    """
    allowed = set(allowed_metadata_fields or ())

    def strip(part: Any) -> Any:
        metadata = getattr(part, "metadata", None)
        if not isinstance(part, BaseModel) or not isinstance(metadata, dict):
            return part
        return part.model_copy(
            update={"metadata": {k: v for k, v in metadata.items() if k in allowed}}
        )

    stripped = strip(convo)
    if isinstance(stripped, BaseModel) and hasattr(stripped, "messages"):
        messages = [strip(message) for message in stripped.messages]
        stripped = stripped.model_copy(update={"messages": messages})
    return stripped


def _dump(step: Step | FinalResult, messages: list[Any]) -> dict[str, Any]:
    rest = step.model_copy(update={"convo": None})
    data = rest.model_dump(mode="json", fallback=str)
    if step.convo is not None:
        convo = _plain(strip_all_metadata(step.convo))
        shown = [_plain(strip_all_metadata(message)) for message in messages]
        data["convo"] = {**convo, "messages": shown} if isinstance(convo, dict) else shown
    return data


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", fallback=str)
    return dict(value) if isinstance(value, dict) else value


def _keys(messages: Sequence[Any]) -> list[str]:
    """A key per message: its id, else its content and how often that came before."""
    seen: Counter[str] = Counter()
    keys = []
    for message in messages:
        own = message.get("id") if isinstance(message, dict) else getattr(message, "id", None)
        if own is None:
            text = json.dumps(_plain(message), sort_keys=True, default=str)
            digest = hashlib.sha256(text.encode()).hexdigest()
            seen[digest] += 1
            own = f"{digest} {seen[digest]}"
        keys.append(str(own))
    return keys
