"""A loaded checkpoint behind the device thread: encodes requests, scores and generates in batches.

Knows no event loop and no recorder.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import structlog
import torch

from nanoeval.models._hf_batching import BatchStatistics, Encoded
from nanoeval.models._hf_loading import Checkpoint, load, max_length
from nanoeval.models._hf_requests import Generated, GenerateRequest, ScoreRequest
from nanoeval.models._hf_scoring import Prompts, Scorer

# Stands for an image in the estimate of a prompt's length, which only its batch depends on.
TOKENS_PER_IMAGE = 1024
CHARACTERS_PER_TOKEN = 4
# Tokens of a batch with padding. A CPU gains little from more than this; a GPU is filled by it, and
# one that is too small for it lowers it by itself.
MAX_TOKENS_CPU = 2048
MAX_TOKENS_ACCELERATOR = 65_536

logger = structlog.get_logger(component=__name__)


@dataclass(frozen=True)
class _Text:
    tokens: list[int]
    options: tuple[list[int], ...] = ()


@dataclass(frozen=True)
class _Sight:
    text: str
    images: tuple[bytes, ...]
    options: tuple[list[int], ...] = ()


class HFBackend:
    """Serves ScoreRequests and GenerateRequests; see `_hf_batching.Backend`."""

    def __init__(
        self, checkpoint: Checkpoint, has_fixed_rows: bool, statistics: BatchStatistics
    ) -> None:
        """Load the checkpoint to its device. With fixed rows, tokens do not limit a batch."""
        self._checkpoint = checkpoint
        self.statistics = statistics
        self._loaded = load(checkpoint)
        on_cpu = self._loaded.model.device.type == "cpu"
        limit = MAX_TOKENS_CPU if on_cpu else MAX_TOKENS_ACCELERATOR
        self.max_tokens: int | None = None if has_fixed_rows else limit
        self._tokenizer = self._loaded.tokenizer
        self._max_length = max_length(self._loaded)
        self._scorer = Scorer(
            self._loaded.model, self._collate, self._tokenizer.pad_token_id, self.statistics
        )

    def encode(self, requests: Sequence[ScoreRequest | GenerateRequest]) -> list[Encoded]:
        """Tokenize prompts, and options each on its own, in one call of the tokenizer each.

        Raises ValueError for an option without tokens.
        """
        prompts = [self._rendered(request) for request in requests]
        options = self._encode_options(requests)
        if self._loaded.processor is not None:
            sights = [_Sight(t, i, o) for (t, i), o in zip(prompts, options, strict=True)]
            return [
                self._as_encoded(request, sight, _estimated_length(sight))
                for request, sight in zip(requests, sights, strict=True)
            ]
        tokens = self._tokenize([text for text, _ in prompts])
        texts = [
            _Text(self._shortened(own, request, opts), opts)
            for own, request, opts in zip(tokens, requests, options, strict=True)
        ]
        return [
            self._as_encoded(request, text, len(text.tokens))
            for request, text in zip(requests, texts, strict=True)
        ]

    def run(self, batch: Sequence[Encoded]) -> list[Any]:
        """Score, or generate for, a batch of requests of one kind."""
        payloads = [encoded.payload for encoded in batch]
        kind = batch[0].kind
        if kind == ScoreRequest:
            return self._scorer.score(payloads, [payload.options for payload in payloads])
        assert isinstance(kind, GenerateRequest)
        return self._generate(payloads, kind)

    def free_memory_after(self, error: Exception) -> bool:
        """Whether the device (or the host) ran out of memory; its caches are empty then."""
        is_out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or (
            isinstance(error, RuntimeError)
            and any(
                sign in str(error).lower() for sign in ("out of memory", "can't allocate memory")
            )
        )
        if is_out_of_memory:
            # The traceback keeps the tensors of the failed pass alive.
            error.__traceback__ = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return is_out_of_memory

    def _as_encoded(self, request: Any, payload: Any, length: int) -> Encoded:
        if isinstance(request, ScoreRequest):
            return Encoded(ScoreRequest, length, payload)
        settings = GenerateRequest(**{**vars(request), "prompt": "", "is_chat": False, "nonce": 0})
        return Encoded(settings, length, payload)

    def _rendered(self, request: ScoreRequest | GenerateRequest) -> tuple[str, tuple[bytes, ...]]:
        """The prompt as one string, and its images in order."""
        if not request.is_chat:
            return request.prompt, ()
        messages, images = _split_images(json.loads(request.prompt))
        owner = self._loaded.processor or self._tokenizer
        if getattr(owner, "chat_template", None) is None:
            raise ValueError(
                f"{self._checkpoint.model_id} has no chat template, which a prompt of messages"
                " needs; give it a plain string, or use an instruction-tuned checkpoint"
            )
        if self._loaded.processor is None:
            if images:
                raise ValueError(
                    f"{self._checkpoint.model_id} is loaded as a text model and takes no images;"
                    " set is_vlm: true for a vision-language model"
                )
            messages = [{**m, "content": _text_of(m["content"])} for m in messages]
        text = owner.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return text, images

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Tokens of prompts, with the special tokens that the tokenizer adds, but none twice."""
        begin = self._tokenizer.bos_token
        found: list[list[int]] = self._tokenizer(texts, verbose=False)["input_ids"]
        if begin:
            for index, text in enumerate(texts):
                if text.startswith(begin):
                    found[index] = self._tokenizer.encode(text, add_special_tokens=False)
        for index, tokens in enumerate(found):
            if not tokens:
                found[index] = [self._prefix_token()]
        return found

    def _prefix_token(self) -> int:
        """What stands before a continuation that follows an empty prompt."""
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ValueError(f"{self._checkpoint.model_id} has no token to begin an empty prompt with")

    def _encode_options(
        self, requests: Sequence[ScoreRequest | GenerateRequest]
    ) -> list[tuple[list[int], ...]]:
        own = [getattr(request, "continuations", ()) for request in requests]
        distinct = list(dict.fromkeys(text for texts in own for text in texts))
        if not distinct:
            return [()] * len(requests)
        encoded = self._tokenizer(distinct, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = dict(zip(distinct, encoded, strict=True))
        for text, ids in tokens.items():
            if not ids:
                raise ValueError(f"the continuation {text!r} has no tokens, so nothing to score")
        return [tuple(tokens[text] for text in texts) for texts in own]

    def _shortened(
        self, tokens: list[int], request: Any, options: tuple[list[int], ...]
    ) -> list[int]:
        """The end of the prompt that leaves room for what follows it."""
        if self._max_length is None:
            return tokens
        # The last token of what follows is predicted, not read.
        follows = max(map(len, options)) - 1 if options else request.max_tokens - 1
        room = self._max_length - follows
        if room < 1:
            raise ValueError(
                f"{follows + 1} tokens to score or generate do not fit into the"
                f" {self._max_length} of {self._checkpoint.model_id}"
            )
        if len(tokens) <= room:
            return tokens
        self.statistics.truncated += 1
        if self.statistics.truncated == 1:
            logger.warning(
                f"a prompt of {len(tokens)} tokens is longer than the {room} that"
                f" {self._checkpoint.model_id} has room for; the beginnings of such prompts are"
                " left out"
            )
        return tokens[-room:]

    def _collate(self, payloads: Sequence[_Text | _Sight]) -> Prompts:
        device = self._loaded.model.device
        if isinstance(payloads[0], _Sight):
            return self._collate_images(payloads)  # type: ignore[arg-type]
        rows = [payload.tokens for payload in payloads]  # type: ignore[union-attr]
        width = max(map(len, rows))
        pad = self._tokenizer.pad_token_id
        inputs = {
            "input_ids": torch.tensor([[pad] * (width - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor(
                [[0] * (width - len(row)) + [1] * len(row) for row in rows]
            ),
        }
        lengths = [len(row) for row in rows]
        return Prompts({name: value.to(device) for name, value in inputs.items()}, lengths)

    def _collate_images(self, payloads: Sequence[_Sight]) -> Prompts:
        texts = [payload.text for payload in payloads]
        begin = self._tokenizer.bos_token
        images = [[_opened(image) for image in payload.images] for payload in payloads]
        inputs = self._loaded.processor(  # type: ignore[misc]
            text=texts,
            images=images if any(images) else None,
            padding=True,
            return_tensors="pt",
            add_special_tokens=not (begin and texts[0].startswith(begin)),
        )
        model = self._loaded.model
        ready = {
            name: value.to(model.device, model.dtype)
            if value.is_floating_point()
            else value.to(model.device)
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor)
        }
        return Prompts(ready, ready["attention_mask"].sum(-1).tolist())

    @torch.inference_mode()
    def _generate(self, payloads: Sequence[Any], settings: GenerateRequest) -> list[Generated]:
        batch = self._collate(payloads)
        self.statistics.count(batch.lengths)
        sampling: dict[str, Any] = {"do_sample": False}
        if settings.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "top_k": 0,
            }
            if settings.seed is not None:
                torch.manual_seed(settings.seed)
        output = self._loaded.model.generate(
            **batch.inputs,
            max_new_tokens=settings.max_tokens,
            pad_token_id=self._tokenizer.pad_token_id,
            **sampling,
        )
        replies = output[:, batch.inputs["input_ids"].shape[1] :].tolist()
        return [
            self._as_generated(tokens, length, settings)
            for tokens, length in zip(replies, batch.lengths, strict=True)
        ]

    def _as_generated(
        self, tokens: list[int], prompt_tokens: int, settings: GenerateRequest
    ) -> Generated:
        ends = self._loaded.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        kept = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        text = self._tokenizer.decode(tokens[:kept], skip_special_tokens=True)
        cut = min((at for stop in settings.stop if (at := text.find(stop)) >= 0), default=None)
        is_stopped = kept < len(tokens) or cut is not None
        return Generated(text[:cut], "stop" if is_stopped else "length", int(prompt_tokens), kept)


def _split_images(
    messages: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], tuple[bytes, ...]]:
    """Messages with their content as a list of parts, images taken out and left as marks."""
    images: list[bytes] = []
    split = []
    for message in messages:
        content = message.get("content") or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        own: list[dict[str, Any]] = []
        for part in parts:
            if part.get("type") == "image_url":
                images.append(_embedded(part["image_url"]))
                own.append({"type": "image"})
            elif part.get("type") == "text":
                own.append({"type": "text", "text": part["text"]})
            else:
                kind = part.get("type")
                raise ValueError(f"content of type {kind!r}; only text and image_url are known")
        split.append({**message, "content": own})
    return split, tuple(images)


def _embedded(image: Any) -> bytes:
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str) or not url.startswith("data:"):
        raise ValueError(f"an image must be embedded as a data: URL, not given as {url!r:.60}")
    try:
        return base64.b64decode(url.partition(",")[2], validate=True)
    except binascii.Error as error:
        raise ValueError(f"an image's data: URL is not base64: {error}") from error


def _opened(image: bytes) -> Any:
    from PIL import Image

    with Image.open(io.BytesIO(image)) as opened:
        return opened.convert("RGB")


def _text_of(parts: list[dict[str, Any]]) -> str:
    return "".join(part["text"] for part in parts)


def _estimated_length(sight: _Sight) -> int:
    return len(sight.text) // CHARACTERS_PER_TOKEN + TOKENS_PER_IMAGE * len(sight.images) + 1
