"""Chat messages in OpenAI's form: images in, images out. Knows no model."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from typing import Any

from nanoeval.models.protocol import Prompt


def image_part(png: bytes) -> dict[str, Any]:
    """A content part that carries a PNG image."""
    url = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    return {"type": "image_url", "image_url": {"url": url}}


def as_png(image: bytes) -> bytes:
    """An encoded image as PNG; one that is PNG already is returned as it is.

    Raises RuntimeError, which names the install command, where the package to convert is missing.
    """
    if image.startswith(b"\x89PNG"):
        return image
    try:
        from PIL import Image
    except ImportError as error:
        raise RuntimeError(
            'converting an image to PNG needs a package: pip install "nanoeval[endpoint]"'
        ) from error
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image)).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def hide_images(prompt: Prompt) -> Prompt:
    """`prompt` with every embedded image replaced by `sha256:<hex>` of its bytes.

    The same object comes back when there is none; images given by address stay as they are.
    """
    if isinstance(prompt, str):
        return prompt
    for message in prompt:
        if isinstance(message.get("content"), list):
            break
    else:
        return prompt
    return [
        {**message, "content": [_hide(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in prompt
    ]


def _hide(part: Any) -> Any:
    if not isinstance(part, dict) or part.get("type") != "image_url":
        return part
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str) or not url.startswith("data:"):
        return part
    payload = url.partition(",")[2]
    try:
        content = base64.b64decode(payload, validate=True)
    except binascii.Error:
        content = payload.encode()
    return {
        "type": "image_url",
        "image_url": {"url": f"sha256:{hashlib.sha256(content).hexdigest()}"},
    }


def text_of(content: Any) -> str:
    """The text of a message's content: a string, a list of parts, or null, which is empty."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def flatten(messages: list[dict[str, Any]]) -> str:
    """A chat as one plain prompt, for models without a chat template: the texts, a blank line each.

    Raises ValueError for messages with anything but text.
    """
    texts = []
    for message in messages:
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts or []:
            if part.get("type") != "text":
                raise ValueError(
                    f"a plain completion takes text alone, not {part.get('type')!r} parts; use the"
                    ' chat endpoint (api="chat")'
                )
            texts.append(part["text"].strip())
    return "\n\n".join(texts) + "\n\n"
