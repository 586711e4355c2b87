"""Models behind an OpenAI-compatible HTTP API: vLLM, SGLang, llama.cpp, TGI, OpenAI, gateways."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
import chz

from nanoeval._jsonl import encode_messages
from nanoeval.models._concurrency import AdaptiveLimit, Limiter
from nanoeval.models._http import (
    BadReply,
    Exchange,
    HTTPClient,
    HTTPSettings,
    RequestRefused,
    ServerFailure,
    check_base_url,
    read_json,
)
from nanoeval.models._logprobs import ServerLacks, score_echo
from nanoeval.models._messages import hide_images, text_of
from nanoeval.models._stream import read_stream
from nanoeval.models.protocol import Completion, ContinuationScore, Model, Prompt, Usage
from nanoeval.recorder import get_recorder

__all__ = ["OpenAICompletion", "OpenAIModel", "RequestRefused", "ServerFailure", "ServerLacks"]

DEFAULT_BASE_URL = "https://api.openai.com/v1"
# What a request is about; `params` say how it is to be answered.
OWN_FIELDS = ("model", "messages", "prompt")


@dataclass(frozen=True)
class OpenAICompletion(Completion):
    """A reply with how it was got: `tries` (1 = at once) and the HTTP status of the last."""

    tries: int = 1
    status: int = 200


class _Secret:
    """Holds a key; shows, copies and pickles none of it. Pickled, it becomes None."""

    def __init__(self, value: str) -> None:
        self.reveal = lambda: value

    def __repr__(self) -> str:
        return "'***'"

    def __copy__(self) -> _Secret:
        return self

    def __deepcopy__(self, memo: Any) -> _Secret:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (_forgotten, ())


def _forgotten() -> None:
    return None


class _SharedClient:
    """The client of one event loop, for any number of blocks: the last one closes it.

    A class and not a generator: it is entered for every request, and costs a fraction this way.
    """

    def __init__(self, client: HTTPClient, clients: _Clients) -> None:
        self._client = client
        self._clients = clients
        self._num_users = 0

    async def __aenter__(self) -> HTTPClient:
        self._num_users += 1
        return self._client

    async def __aexit__(self, *exc_info: Any) -> None:
        self._num_users -= 1
        if self._num_users == 0:
            del self._clients[asyncio.get_running_loop()]
            await self._client.close()


_Clients = dict[asyncio.AbstractEventLoop, _SharedClient]


@chz.chz
class OpenAIModel(Model):
    """A model behind an OpenAI-compatible API.

    All calls in flight on one event loop share one session, which lives as long as somebody uses
    it: enter the model around many calls, so that connections are kept alive between them.
    """

    name: str = chz.field(doc="The model's name, as the server lists it.")
    base_url: str | None = chz.field(
        default=None, doc="Up to and with /v1; None = $OPENAI_BASE_URL, else OpenAI's own."
    )
    api_key: str | None = chz.field(
        default=None,
        doc="Never stored: worker processes and resumed runs read the variable api_key_env.",
    )
    api_key_env: str = chz.field(
        default="OPENAI_API_KEY", doc="The variable that holds the key when api_key is not given."
    )
    api: Literal["chat", "completions"] = chz.field(
        default="chat", doc="Which of the two endpoints; completions takes plain prompts."
    )
    params: dict[str, Any] = chz.field(
        default_factory=dict, doc="Sent with every request (temperature, max_tokens, ...)."
    )
    stream: bool = chz.field(
        default=False, doc="Stream replies, which gives the time to the first token."
    )
    stream_usage: bool = chz.field(
        default=True, doc="Ask streaming servers for token counts; some refuse the question."
    )
    connect_timeout: float = chz.field(default=10.0, doc="Seconds to connect.")
    timeout: float = chz.field(default=600.0, doc="Seconds for one try of a request, all in all.")
    max_tries: int = chz.field(
        default=5, doc="Tries of a request before it counts as a system error."
    )
    retry_backoff: float = chz.field(
        default=0.5, doc="Seconds before the second try; doubles each time, with jitter."
    )
    num_concurrent: int | Literal["auto"] | None = chz.field(
        default=None,
        doc="Requests in flight, per process; auto = as many as pay; None = the runner decides.",
    )

    @chz.validate
    def _check_values(self) -> None:
        if self.base_url is not None:
            check_base_url(self.base_url)
        if own := [name for name in OWN_FIELDS if name in self.params]:
            raise ValueError(
                f"the request parameter {own[0]}={self.params[own[0]]!r} would replace what is"
                " asked of the server; leave it out"
            )
        if self.max_tries < 1:
            raise ValueError(f"max_tries={self.max_tries} must be at least 1")
        for name in ("connect_timeout", "timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 seconds")
        if isinstance(self.num_concurrent, int) and self.num_concurrent < 1:
            raise ValueError(f"num_concurrent={self.num_concurrent} must be at least 1, or auto")
        if isinstance(self.api_key, str):
            # chz objects print, copy and pickle their fields; this one must do none of it.
            object.__setattr__(self, "X_api_key", _Secret(self.api_key))
            object.__setattr__(self, "api_key", self.__dict__["X_api_key"])

    def __getstate__(self) -> dict[str, Any]:
        # Sessions and limits belong to this process.
        return {name: value for name, value in self.__dict__.items() if name.startswith("X_")}

    def get_model_name(self) -> str:
        """The name for reports."""
        return self.name

    def get_base_url(self) -> str:
        """Where requests go, without a trailing slash."""
        return (self.base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL).rstrip("/")

    async def complete(self, prompt: Prompt, **params: Any) -> OpenAICompletion:
        """Answer `prompt`. `params` stand above the model's own and are passed on as they are.

        Raises ServerFailure (a RolloutSystemError) when retries did not help, RequestRefused when
        the server will not answer.
        """
        body = self._body(prompt, params)
        path = "chat/completions" if self.api == "chat" else "completions"
        started = time.perf_counter()
        async with self._client() as client:
            exchange = await client.send("POST", path, _encode(body), _read_reply)
        completion = _completion(exchange)
        try:
            recorder = get_recorder()
        except LookupError:
            return completion
        recorder.record_sampling(
            hide_images(prompt),
            completion.text,
            model=self.name,
            finish_reason=completion.finish_reason,
            usage={
                "prompt_tokens": completion.usage.prompt_tokens,
                "completion_tokens": completion.usage.completion_tokens,
            },
            latency=completion.latency,
            time_to_first_token=completion.time_to_first_token,
            tries=completion.tries,
            status=completion.status,
            elapsed=time.perf_counter() - started,
        )
        return completion

    async def loglikelihood(
        self, context: Prompt, continuations: Sequence[str]
    ) -> list[ContinuationScore]:
        """Score each of `continuations` after `context`, a string, by echoing it.

        Needs api="completions" and a server that gives log-probabilities of the prompt; raises
        ServerLacks for one that does not. A token that straddles the border counts as continuation.
        """
        if self.api != "completions" or not isinstance(context, str):
            raise TypeError(
                'log-likelihoods need OpenAIModel(api="completions") and a string as context:'
                " chat endpoints give no log-probabilities of their prompt"
            )
        async with self._client():
            scores = [self._score(context, continuation) for continuation in continuations]
            return list(await asyncio.gather(*scores))

    async def get_json(self, path: str) -> Exchange[Any]:
        """GET a document beneath the base URL, such as `models`."""
        async with self._client() as client:
            return await client.send("GET", path, None, read_json)

    async def list_models(self) -> list[str]:
        """The names that the server lists, in its order."""
        return model_names((await self.get_json("models")).value)

    async def _score(self, context: str, continuation: str) -> ContinuationScore:
        # One token is generated because some servers refuse to generate none; it is not looked at.
        reply = await self.complete(
            context + continuation,
            **{**self.params, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1},
        )
        return score_echo(reply.logprobs, context, continuation)

    def _body(self, prompt: Prompt, params: dict[str, Any]) -> dict[str, Any]:
        if self.api == "completions":
            if not isinstance(prompt, str):
                raise ValueError('api="completions" takes a string; use api="chat" for messages')
            asked: dict[str, Any] = {"model": self.name, "prompt": prompt}
        elif isinstance(prompt, str):
            asked = {"model": self.name, "messages": [{"role": "user", "content": prompt}]}
        else:
            asked = {"model": self.name, "messages": list(prompt)}
        if self.stream:
            asked["stream"] = True
            if self.stream_usage:
                asked["stream_options"] = {"include_usage": True}
        return {**asked, **self.params, **params}

    @asynccontextmanager
    async def _context(self) -> AsyncGenerator[None, None]:
        async with self._client():
            yield

    def _client(self) -> _SharedClient:
        """The client of the running loop; to be entered at once."""
        loop = asyncio.get_running_loop()
        clients: _Clients | None = self.__dict__.get("_clients")
        if clients is None:
            clients = {}
            object.__setattr__(self, "_clients", clients)
        shared = clients.get(loop)
        if shared is None:
            shared = clients[loop] = _SharedClient(self._new_client(), clients)
        return shared

    def _new_client(self) -> HTTPClient:
        headers = {"Content-Type": "application/json", "User-Agent": "nanoeval"}
        secret: Any = self.api_key
        key = secret.reveal() if secret is not None else os.environ.get(self.api_key_env)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        limit = AdaptiveLimit() if self.num_concurrent == "auto" else self.num_concurrent
        settings = HTTPSettings(
            self.connect_timeout, self.timeout, self.max_tries, self.retry_backoff
        )
        return HTTPClient(
            self.get_base_url(), headers, settings, None if limit is None else Limiter(limit)
        )


def model_names(reply: Any) -> list[str]:
    """The names in a reply of /models, each once; empty for one of another form."""
    data = reply.get("data") if isinstance(reply, dict) else reply
    entries = data if isinstance(data, list) else []
    names = (str(entry["id"]) for entry in entries if isinstance(entry, dict) and "id" in entry)
    return list(dict.fromkeys(names))


def _encode(body: dict[str, Any]) -> bytes:
    messages = encode_messages(body.get("messages"))
    if messages is not None and messages.isascii():
        others = {key: value for key, value in body.items() if key != "messages"}
        return f'{json.dumps(others)[:-1]}, "messages": {messages}}}'.encode()
    return json.dumps(body).encode()


@dataclass(frozen=True)
class _Reply:
    """A reply that holds at least one choice, the first of which is `choice`."""

    raw: dict[str, Any]
    choice: dict[str, Any]
    time_to_first_token: float | None


async def _read_reply(response: aiohttp.ClientResponse, started: float) -> _Reply:
    """Read a reply, streamed or not, whichever the server chose; BadReply when it is no use."""
    if response.content_type == "text/event-stream":
        raw, first_token = await read_stream(response, started)
    else:
        raw, first_token = await read_json(response), None
    choices = raw.get("choices") if isinstance(raw, dict) else None
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        return _Reply(raw, choices[0], first_token)
    if isinstance(raw, dict) and raw.get("error"):
        raise BadReply("error_reply", "the server reports an error", json.dumps(raw))
    raise BadReply("no_choices", "the reply holds no choices", json.dumps(raw))


def _completion(exchange: Exchange[_Reply]) -> OpenAICompletion:
    reply = exchange.value
    return OpenAICompletion(
        text=_text(reply.choice),
        finish_reason=reply.choice.get("finish_reason"),
        usage=_usage(reply.raw.get("usage")),
        logprobs=reply.choice.get("logprobs"),
        latency=exchange.latency,
        time_to_first_token=reply.time_to_first_token,
        raw=reply.raw,
        tries=exchange.tries,
        status=exchange.status,
    )


def _text(choice: dict[str, Any]) -> str:
    """The text of a choice; a null content (a tool call, a reply cut while thinking) is empty."""
    message = choice.get("message")
    return text_of(message.get("content") if isinstance(message, dict) else choice.get("text"))


def _usage(usage: Any) -> Usage:
    if not isinstance(usage, dict):
        return Usage()
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    return Usage(*(count if isinstance(count, int) else None for count in counts))
