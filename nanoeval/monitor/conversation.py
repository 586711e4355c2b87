"""Shows recorded events as a conversation. Knows the json_recorder's fields, and no database.

Images are shown only where the record holds them itself: nothing is loaded from elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from nanoeval.monitor import events, markup
from nanoeval.monitor.markup import Content, Markup

MAX_TEXT = 20_000
MAX_DETAILS = 4000
MAX_UNFOLDED = 160
# What a browser draws as an image and cannot run.
_IMAGE = re.compile(r"data:image/(png|jpeg|jpg|gif|webp|bmp);base64,[A-Za-z0-9+/=\s]+\Z")
_SHOWN_ELSEWHERE = frozenset({"timestamp", "record_type", "sample_id", "group_id"})


def as_markup(recorded: list[dict[str, Any]]) -> Markup:
    """The events one below the other, oldest first; prompts that repeat are shown once."""
    shown: list[Markup] = []
    told: list[Any] = []
    for event in recorded:
        kind = event.get("record_type")
        if kind == "sampling":
            messages = _messages(event.get("prompt"))
            new = messages[_common_length(told, messages) :]
            shown += (_turn(*_message(message)) for message in new)
            reply = event.get("sampled")
            shown.append(_turn("reply", _content(reply), event, css="turn reply"))
            told = [*messages, {"role": "assistant", "content": reply}]
        else:
            shown.append(_turn(str(kind), _other(event), event))
    return markup.joined(shown)


def _common_length(told: list[Any], messages: list[Any]) -> int:
    """How many of the first messages were shown with the call before."""
    count = 0
    for before, now in zip(told, messages, strict=False):
        if before != now:
            break
        count += 1
    return count


def _messages(prompt: Any) -> list[Any]:
    if isinstance(prompt, list) and all(isinstance(part, dict) for part in prompt):
        return prompt
    return [{"role": "prompt", "content": prompt}]


def _message(message: dict[str, Any]) -> tuple[str, Content]:
    content = _content(message.get("content"))
    rest = {k: v for k, v in message.items() if k not in ("role", "content") and v is not None}
    if rest:
        content = markup.joined([content, _details(rest)])
    return str(message.get("role", "message")), content


def _turn(
    who: str, content: Content, event: dict[str, Any] | None = None, css: str = "turn"
) -> Markup:
    label: Content = markup.element("b", who)
    if event is not None:
        moment = events.moment_of(event)
        label = markup.joined([label, markup.element("div", markup.clock(moment)[11:])])
        if event.get("record_type") == "sampling":
            more = {
                k: v
                for k, v in event.items()
                if k not in _SHOWN_ELSEWHERE | {"prompt", "sampled"} and v is not None
            }
            content = markup.joined([content, _details(more)])
    return markup.element(
        "div", markup.element("div", label, "who dim") + markup.element("div", content), css
    )


def _other(event: dict[str, Any]) -> Content:
    fields = {k: v for k, v in event.items() if k not in _SHOWN_ELSEWHERE and v is not None}
    kind = event.get("record_type")
    if kind == "match":
        verdict = markup.badge(
            "finished" if event.get("correct") else "failed",
            "right" if event.get("correct") else "wrong",
        )
        fields.pop("correct", None)
        parts = [
            markup.joined([markup.dim(f"{name} "), _inline(value)])
            for name, value in fields.items()
        ]
        return markup.joined([verdict, " ", markup.joined(parts, " · ")])
    if kind == "error":
        message = fields.pop("message", None) or fields.pop("error", None)
        fields.pop("error", None)
        return markup.joined([markup.element("div", message, "text"), _details(fields)])
    if kind == "extra":
        return _content(event.get("data"))
    if list(fields) == ["status"]:
        return str(fields["status"])
    return _details(fields)


def _inline(value: Any) -> Content:
    return markup.shortened(value if isinstance(value, str) else json.dumps(value), 300)


def _content(content: Any) -> Markup:
    """A message's content: a text, a list of parts, or anything else as JSON."""
    if content is None:
        return markup.dim("nothing")
    if isinstance(content, str):
        return _text_or_image(content)
    if isinstance(content, list):
        return markup.joined(_part(part) for part in content)
    return _details(content)


def _part(part: Any) -> Markup:
    if not isinstance(part, dict):
        return _content(part)
    if isinstance(part.get("text"), str):
        return _text_or_image(part["text"])
    for url in _urls(part):
        if _IMAGE.match(url):
            return _image(url)
        if url.startswith(("http://", "https://")):
            return markup.element("div", markup.dim("image at ") + markup.code(url))
    return _details(part)


def _urls(part: dict[str, Any]) -> Iterator[str]:
    image = part.get("image_url", part.get("image"))
    if isinstance(image, dict):
        image = image.get("url")
    if isinstance(image, str):
        yield image
    source = part.get("source")
    if isinstance(source, dict) and isinstance(source.get("data"), str):
        yield f"data:{source.get('media_type', 'image/png')};base64,{source['data']}"


def _text_or_image(text: str) -> Markup:
    if text.startswith("data:image/") and _IMAGE.match(text):
        return _image(text)
    cut = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} … ({len(text):,} characters)"
    return markup.element("div", cut, "text")


def _image(url: str) -> Markup:
    return Markup(markup.element("img", None, src=url, alt="image").html.replace("</img>", ""))


def _details(value: Any) -> Markup:
    """Anything as JSON, folded unless it is short."""
    if not value:
        return Markup("")
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= MAX_UNFOLDED:
        return markup.element("pre", text)
    text = json.dumps(value, ensure_ascii=False, indent=1)
    if len(text) > MAX_DETAILS:
        text = f"{text[:MAX_DETAILS]} …"
    keys = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
    summary = markup.element("summary", markup.shortened(keys, 90), "dim")
    return markup.element("details", summary + markup.element("pre", text))
