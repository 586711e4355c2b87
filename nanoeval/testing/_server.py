"""A real HTTP server on loopback that speaks the OpenAI API and replies what a script says."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any, Literal, Self, TypeVar

from aiohttp import web

from nanoeval.testing._checks import InvalidRequest, Rules
from nanoeval.testing._faults import Fault, FaultPlan, FaultRule
from nanoeval.testing._generation import count_usage, make_choices, split_prompts
from nanoeval.testing._openai_json import Envelope, LogProb, default_logprob
from nanoeval.testing._script import Reply, Request, Script, answer
from nanoeval.testing._wire import (
    error_response,
    json_response,
    send_fault,
    send_stream,
    send_whole,
)

T = TypeVar("T")

MODELS = "/v1/models"
REPLYING: Mapping[str, Literal["chat", "completions"]] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
}
# Bodies whose tries are counted; beyond it the oldest is forgotten, to bound the memory.
REMEMBERED_BODIES = 200_000
# Faults that leave nothing of the reply, beside the HTTP statuses.
REPLY_LESS = frozenset({"disconnect", "hang", "error_body"})

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerStats:
    """Counts since the start. `faults` counts by kind; `cpu_seconds` is the whole process's."""

    num_requests: int
    num_replies: int
    faults: dict[str, int]
    in_flight: int
    max_in_flight: int
    num_connections: int
    cpu_seconds: float


class ScriptedServer:
    """An OpenAI-compatible server for tests: `async with ScriptedServer(reply) as server: ...`.

    `with` serves from a thread and an event loop of its own, `async with` from the running loop.
    Serves `/v1/models`, `/v1/chat/completions` and `/v1/completions` (also streamed, with `echo`,
    `logprobs`, `stop`, `n` and `max_tokens`), `/health`, and its counters under `/stats`.
    """

    def __init__(
        self,
        reply: Script = "This is a scripted reply.",
        *,
        models: Sequence[str] = ("scripted",),
        latency: float | Callable[[Request], float] = 0.0,
        time_per_token: float = 0.0,
        slots: int | None = None,
        faults: Sequence[Fault | str | FaultRule] = (),
        models_fault: Fault | str | None = None,
        seed: int = 0,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        ignores: Collection[str] = (),
        refuses: Collection[str] = (),
        logprob: LogProb = default_logprob,
        host: str = "127.0.0.1",
        port: int = 0,
        log_size: int = 1000,
    ) -> None:
        """Describe a server; entering it starts it.

        reply: a text, a mapping from prompts to texts, or a function of the `Request`, async or
            not, that gives a text, a `Reply`, a `Fault`, or None for a null content. What it
            raises is logged and answered with 501, which clients do not retry.
        models: the names it lists and answers to; any other gets 404.
        latency: seconds before the first byte of a reply. time_per_token: seconds for each token.
        slots: how many requests are worked on at once; more wait their turn. None = all.
        faults: each a `Fault`, its short form ("429:0.05", see `Fault.parse`), or a function of
            the request that gives a `Fault` or None. models_fault: what `/v1/models` meets.
        seed: chooses which requests the faults with a rate hit.
        api_key: asked for where it is set; without it a request gets 401.
        headers: added to every reply, in the place of "Server: nanoeval-scripted".
        ignores, refuses: request fields taken for absent, or answered with 400 ("logprobs",
            "echo", "stream", "stream_options", ...); "images" means the image parts of messages.
        logprob: the log-probability (natural) of a token, its second argument, after a text.
        port: 0 = any that is free. log_size: how many requests `requests` keeps, the last ones.
        """
        if not callable(latency) and latency < 0:
            raise ValueError(f"latency={latency} must be at least 0 seconds")
        if time_per_token < 0:
            raise ValueError(f"time_per_token={time_per_token} must be at least 0 seconds")
        if not 0 <= port <= 65_535:
            raise ValueError(f"port={port} must lie between 0 (any that is free) and 65535")
        if slots is not None and slots < 1:
            raise ValueError(f"slots={slots} must be at least 1, or None for no limit")
        self._script = reply
        self._latency = latency
        self._time_per_token = time_per_token
        self._slots = slots
        self._turn: AbstractAsyncContextManager[Any] = nullcontext()
        self._plan = FaultPlan(faults, seed)
        self._models_fault = (
            Fault.parse(models_fault) if isinstance(models_fault, str) else models_fault
        )
        self._rules = Rules(tuple(models), api_key, frozenset(ignores), frozenset(refuses))
        self._headers = {"Server": "nanoeval-scripted", **(headers or {})}
        self._logprob = logprob
        self._host = host
        self._wanted_port = port
        self._port: int | None = None
        self._runner: web.ServerRunner | None = None
        self._thread: _LoopThread | None = None
        self._tries: OrderedDict[bytes, int] = OrderedDict()
        # Client addresses; there are at most as many as ports.
        self._peers: set[Any] = set()
        # The last valid requests for a reply, oldest first, those that met a fault included.
        self.requests: deque[Request] = deque(maxlen=log_size)
        self.num_requests = 0
        self.num_replies = 0
        self.faults: Counter[str] = Counter()
        self.in_flight = 0
        self.max_in_flight = 0

    @property
    def port(self) -> int:
        """The port that it listens on. RuntimeError when it is not running."""
        if self._port is None:
            raise RuntimeError("the server is not running; enter it with `with` or `async with`")
        return self._port

    @property
    def base_url(self) -> str:
        """What clients call the base URL, such as http://127.0.0.1:8000/v1."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}/v1"

    def stats(self) -> ServerStats:
        """The counters as they stand."""
        return ServerStats(
            self.num_requests,
            self.num_replies,
            dict(self.faults),
            self.in_flight,
            self.max_in_flight,
            len(self._peers),
            time.process_time(),
        )

    async def __aenter__(self) -> Self:
        if self._runner is not None:
            raise RuntimeError(f"the server is already running, at {self.base_url}")
        # A semaphore belongs to one event loop; the next start may be in another.
        self._turn = nullcontext() if self._slots is None else asyncio.Semaphore(self._slots)
        # Cancellation ends a reply that never comes, once its client is gone or the server stops.
        # A bare server without an application's routing takes a third less time for a request.
        server = web.Server(self._serve, handler_cancellation=True, access_log=None)
        runner = web.ServerRunner(server, shutdown_timeout=0.05)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, self._wanted_port, backlog=4096).start()
        except OSError as error:
            await runner.cleanup()
            raise OSError(
                error.errno,
                f"cannot listen on {self._host} port {self._wanted_port} ({error.strerror});"
                " choose another port, or 0 for any that is free",
            ) from error
        self._runner, self._port = runner, int(runner.addresses[0][1])
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._runner is not None
        runner, self._runner, self._port = self._runner, None, None
        await runner.cleanup()

    def __enter__(self) -> Self:
        thread = _LoopThread()
        try:
            thread.run(self.__aenter__())
        except BaseException:
            thread.stop()
            raise
        self._thread = thread
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._thread is not None
        self._thread.run(self.__aexit__())
        self._thread.stop()

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one HTTP request, whatever it is."""
        try:
            if request.method == "POST" and request.path in REPLYING:
                return await self._serve_reply(request, REPLYING[request.path])
            if request.method == "GET" and request.path in {"/health", "/stats"}:
                found = {"status": "ok"} if request.path == "/health" else asdict(self.stats())
                return json_response(found, self._headers)
            if request.method == "GET" and request.path.startswith(MODELS):
                return await self._serve_models(request, request.path.removeprefix(MODELS))
            what = f"there is no {request.method} {request.path}"
            raise InvalidRequest(what, 404, "not_found")
        except InvalidRequest as error:
            return error_response(error.status, str(error), error.code, self._headers)

    async def _serve_models(self, request: web.BaseRequest, rest: str) -> web.StreamResponse:
        """The list of models, or one of them where `rest` is "/NAME"."""
        if self._models_fault is not None:
            return await self._send_fault(request, self._models_fault)
        self._rules.check_key(request.headers.get("Authorization"))
        if rest.strip("/"):
            self._rules.check_model(rest[1:])
            return json_response(_model_entry(rest[1:]), self._headers)
        entries = [_model_entry(name) for name in self._rules.models]
        return json_response({"object": "list", "data": entries}, self._headers)

    async def _serve_reply(
        self, request: web.BaseRequest, api: Literal["chat", "completions"]
    ) -> web.StreamResponse:
        if request.transport is not None:
            self._peers.add(request.transport.get_extra_info("peername"))
        self.num_requests += 1
        number = self.num_requests
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            self._rules.check_key(request.headers.get("Authorization"))
            raw = await request.content.read()
            digest = blake2b(raw, digest_size=16).digest()
            body = self._rules.read_body(raw, api)
            asked = Request(api, body, request.headers, number, self._count_try(digest))
            self.requests.append(asked)
            return await self._answer(request, asked, self._plan.choose(asked, digest))
        finally:
            self.in_flight -= 1

    async def _answer(
        self, request: web.BaseRequest, asked: Request, fault: Fault | None
    ) -> web.StreamResponse:
        """Reply to a valid request. A status comes at once, everything else after the latency."""
        if fault is not None and fault.status is not None:
            return await self._send_fault(request, fault)
        prompts = split_prompts(asked)
        said = [await self._ask_script(prompt) for prompt in prompts]
        fault = fault or next((one for one in said if isinstance(one, Fault)), None)
        if fault is not None and fault.status is not None:
            return await self._send_fault(request, fault)
        replies = [one if isinstance(one, Reply) else Reply() for one in said]
        async with self._turn:
            await self._wait(asked, replies)
            if fault is not None and fault.kind in REPLY_LESS:
                return await self._send_fault(request, fault)
            return await self._send(request, asked, prompts, replies, fault)

    async def _send(
        self,
        request: web.BaseRequest,
        asked: Request,
        prompts: Sequence[Request],
        replies: Sequence[Reply],
        fault: Fault | None,
    ) -> web.StreamResponse:
        choices = make_choices(prompts, replies, self._logprob)
        is_stream = bool(asked.body.get("stream"))
        options = asked.body.get("stream_options")
        counts = not is_stream or (isinstance(options, dict) and options.get("include_usage"))
        envelope = Envelope(
            asked.api,
            f"scripted-{asked.number}",
            asked.model,
            int(time.time()),
            count_usage(prompts, replies, choices) if counts else None,
        )
        if fault is None:
            self.num_replies += 1
        else:
            self.faults[fault.kind] += 1
        if is_stream:
            return await send_stream(
                request,
                envelope,
                choices,
                fault,
                self._headers,
                time_per_token=self._time_per_token,
            )
        if self._time_per_token:
            await asyncio.sleep(self._time_per_token * sum(c.n_generated for c in choices))
        return await send_whole(request, envelope, choices, fault, self._headers)

    async def _ask_script(self, asked: Request) -> Reply | Fault:
        try:
            return await answer(self._script, asked)
        except Exception as error:  # the script is the user's code and may raise anything
            logger.exception("the reply function failed on request %d", asked.number)
            what = f"the reply function failed: {type(error).__name__}: {error}"
            raise InvalidRequest(what, 501, "reply_function_failed") from error

    async def _wait(self, asked: Request, replies: Sequence[Reply]) -> None:
        own = [reply.latency for reply in replies if reply.latency is not None]
        if own:
            seconds = max(own)
        else:
            seconds = self._latency(asked) if callable(self._latency) else self._latency
        if seconds > 0:
            await asyncio.sleep(seconds)

    async def _send_fault(self, request: web.BaseRequest, fault: Fault) -> web.StreamResponse:
        self.faults[fault.kind] += 1
        return await send_fault(request, fault, self._headers)

    def _count_try(self, digest: bytes) -> int:
        tries = self._tries.get(digest, 0) + 1
        self._tries[digest] = tries
        if len(self._tries) > REMEMBERED_BODIES:
            self._tries.popitem(last=False)
        return tries


def _model_entry(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "nanoeval"}


class _LoopThread:
    """An event loop that runs in a thread of its own until `stop`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="scripted-server", daemon=True
        )
        self._thread.start()

    def run(self, coro: Coroutine[Any, Any, T]) -> T:
        """Run `coro` on the loop and give its result."""
        return asyncio.run_coroutine_threadsafe(coro, self._loop).result()

    def stop(self) -> None:
        """Stop the loop, wait for the thread and close what is left."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()
