"""The HTTP model against a real server on loopback."""

from __future__ import annotations

import asyncio
import json
import pickle
import time
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import chz
import pytest
from aiohttp import web

from nanoeval.eval import RolloutSystemError
from nanoeval.models._concurrency import AdaptiveLimit, Limiter
from nanoeval.models._http import parse_retry_after
from nanoeval.models._logprobs import ServerLacks, score_echo
from nanoeval.models._messages import hide_images, image_part
from nanoeval.models.openai_api import OpenAIModel, RequestRefused, ServerFailure
from nanoeval.models.probe import probe
from nanoeval.models.scripted import ScriptedModel
from nanoeval.recorder import set_default_recorder

KEY = "sk-very-secret"


def reply(text: str | None = "4", **extra: Any) -> web.Response:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 3, "completion_tokens": 1}
    return web.json_response(
        {"choices": [{**choice, "finish_reason": "stop"}], "usage": usage, **extra}
    )


STREAM = {"Content-Type": "text/event-stream"}


def events(chunks: list[Any], line_end: str = "\n") -> web.Response:
    lines = [f"data: {json.dumps(chunk)}" for chunk in chunks] + ["data: [DONE]"]
    text = "".join(line + 2 * line_end for line in lines)
    return web.Response(body=text.encode(), headers=STREAM)


def piece(content: Any, **extra: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content}, **extra}]}


class Server:
    """A server whose every answer a test decides; keeps what it was sent."""

    def __init__(self) -> None:
        self.answer: Callable[[web.Request], Any] = lambda request: reply()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.peers: set[Any] = set()
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json() if request.can_read_body else {})
        self.headers.append(request.headers)
        self.peers.add(request.transport.get_extra_info("peername"))
        answer = self.answer(request)
        return await answer if asyncio.iscoroutine(answer) else answer


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    app = web.Application()
    app.router.add_route("*", "/v1/{path:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    yield server
    await runner.cleanup()


def model_of(server: Server, **fields: Any) -> OpenAIModel:
    fields = {"name": "m", "retry_backoff": 0.01, **fields}
    return OpenAIModel(base_url=server.url, **fields)


class Notebook:
    """A recorder that keeps its samplings."""

    run_spec: Any = None

    def __init__(self) -> None:
        self.samplings: list[tuple[Any, Any, dict[str, Any]]] = []

    def as_default_recorder(self, sample_id: str, group_id: str) -> Any:
        return nullcontext()

    def record_sampling(self, prompt: Any, sampled: Any, **extra: Any) -> None:
        self.samplings.append((prompt, sampled, extra))


async def test_reply_comes_with_text_usage_and_latency(server: Server) -> None:
    """A missing field would make every eval's token and time report wrong."""
    completion = await model_of(server, params={"temperature": 0}).complete("2+2?", max_tokens=5)
    assert completion.text == "4"
    assert completion.finish_reason == "stop"
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (3, 1)
    assert 0 < completion.latency < 5
    assert (completion.tries, completion.status) == (1, 200)
    assert server.bodies == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "2+2?"}],
            "temperature": 0,
            "max_tokens": 5,
        }
    ]


async def test_entered_model_keeps_its_connection(server: Server) -> None:
    """A new connection per call would double the latency of every eval."""
    model = model_of(server)
    async with model:
        for _ in range(5):
            await model.complete("hi")
    assert len(server.peers) == 1
    assert pickle.loads(pickle.dumps(model)) == model


async def test_unentered_calls_in_flight_share_a_session(server: Server) -> None:
    """Evals that never enter their model must not open a session for each of 1,000 calls."""
    model = model_of(server)
    await asyncio.gather(*(model.complete("hi") for _ in range(20)))
    assert not model.__dict__["_clients"]  # closed behind the last


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_passing_failure_is_retried(server: Server, status: int) -> None:
    """A moment of overload would cost a sample."""
    answers = iter([web.Response(status=status), reply("late")])
    server.answer = lambda request: next(answers)
    completion = await model_of(server).complete("hi")
    assert (completion.text, completion.tries) == ("late", 2)


async def test_retry_after_is_obeyed(server: Server) -> None:
    """A server that names the wait would be hammered before it is over."""
    answers = iter([web.Response(status=429, headers={"Retry-After": "0.3"}), reply()])
    server.answer = lambda request: next(answers)
    started = time.perf_counter()
    await model_of(server).complete("hi")
    assert time.perf_counter() - started >= 0.3


async def test_long_retry_after_is_handed_to_the_runner(server: Server) -> None:
    """Waiting an hour inside a call would hold its slot for an hour."""
    server.answer = lambda request: web.Response(status=429, headers={"Retry-After": "3600"})
    with pytest.raises(ServerFailure) as caught:
        await model_of(server).complete("hi")
    assert caught.value.retry_after == 3600


async def test_long_retry_after_is_told_once(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that waits an hour in silence looks like one that hangs."""
    server.answer = lambda request: web.Response(status=429, headers={"Retry-After": "3600"})
    async with model_of(server) as model:
        calls = [model.complete("hi") for _ in range(3)]
        await asyncio.gather(*calls, return_exceptions=True)
    assert capsys.readouterr().err == f"nanoeval: {server.url} asks to be left alone for 3,600 s\n"


def test_retry_after_reads_seconds_and_dates() -> None:
    """A date read as nothing would lose the server's wish."""
    assert parse_retry_after("7") == 7
    assert parse_retry_after("soon") is None
    assert parse_retry_after("inf") is parse_retry_after("nan") is None
    assert parse_retry_after(None) is None
    later = parse_retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=30), True))
    assert later is not None
    assert 27 < later <= 30
    assert parse_retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0


async def test_lasting_failure_says_where_and_what(server: Server) -> None:
    """Without URL, status and body nobody can tell what broke."""
    server.answer = lambda request: web.Response(status=503, text="no\n GPU   left")
    with pytest.raises(RolloutSystemError) as caught:
        await model_of(server, max_tries=3).complete("hi")
    failure = caught.value
    assert str(failure) == (
        f"{server.url}/chat/completions: HTTP 503 Service Unavailable: no GPU left (tried 3 times)"
    )
    assert isinstance(failure, ServerFailure)
    assert (failure.kind, failure.status, failure.tries) == ("http_503", 503, 3)
    again = pickle.loads(pickle.dumps(failure))
    assert (str(again), again.kind, again.body) == (str(failure), "http_503", "no GPU left")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_refusal_is_not_retried(server: Server, status: int) -> None:
    """Asking again for what is refused wastes minutes and hides the reason."""
    server.answer = lambda request: web.Response(status=status, text='{"error": "bad key"}')
    with pytest.raises(RequestRefused, match=f"HTTP {status}.*bad key") as caught:
        await model_of(server).complete("hi")
    assert not isinstance(caught.value, RolloutSystemError)
    assert (caught.value.status, caught.value.kind) == (status, f"http_{status}")
    assert len(server.bodies) == 1


async def test_cut_connection_and_silence_are_retried(server: Server) -> None:
    """A proxy that drops one connection, or a lost reply, would cost a sample."""

    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b'{"choices": [')
        request.transport.close()
        return response

    async def silence(request: web.Request) -> web.Response:
        await asyncio.sleep(2)
        return reply("too late")

    answers = iter([cut, silence])

    def answer(request: web.Request) -> Any:
        handler = next(answers, None)
        return handler(request) if handler else reply("ok")

    server.answer = answer
    completion = await model_of(server, timeout=0.2).complete("hi")
    assert (completion.text, completion.tries) == ("ok", 3)
    server.answer = silence
    with pytest.raises(ServerFailure, match="no complete reply within") as caught:
        await model_of(server, timeout=0.1, max_tries=1).complete("hi")
    assert caught.value.kind == "timeout"


async def test_unreachable_server_is_a_system_error() -> None:
    """A server that is restarting must be a retried failure, not the end of the run."""
    model = OpenAIModel(name="m", base_url="http://127.0.0.1:9/v1", max_tries=1)
    with pytest.raises(ServerFailure, match=r"127\.0\.0\.1:9.*cannot reach the server") as caught:
        await model.complete("hi")
    assert caught.value.kind == "connection"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda: web.Response(text="<html>oops"), "not_json"),
        (lambda: web.json_response({"choices": []}), "no_choices"),
        (lambda: web.json_response({"error": {"message": "x"}}), "error_reply"),
        (lambda: web.json_response(["no"]), "no_choices"),
        (lambda: web.Response(text="[" * 100_000), "not_json"),
        (lambda: events([{"choices": [None]}]), "bad_event"),
        (lambda: events([{"choices": 5}]), "bad_event"),
        (lambda: events([{"choices": [{"index": "first"}]}]), "bad_event"),
        (lambda: web.Response(text="data: " + "[" * 100_000, headers=STREAM), "not_json"),
    ],
)
async def test_useless_reply_is_a_system_error(server: Server, answer: Any, kind: str) -> None:
    """A reply that cannot be read must not be scored as the model's own."""
    server.answer = lambda request: answer()
    with pytest.raises(ServerFailure) as caught:
        await model_of(server, max_tries=2).complete("hi")
    assert caught.value.kind == kind
    assert len(server.bodies) == 2


async def test_null_content_and_missing_usage_are_met(server: Server) -> None:
    """Servers send both; neither may crash a run."""
    server.answer = lambda request: reply(None, usage=None)
    completion = await model_of(server).complete("hi")
    assert completion.text == ""
    assert completion.usage.completion_tokens is None


async def test_streamed_reply_equals_the_unstreamed_one(server: Server) -> None:
    """Streaming would change scores."""
    pieces = ["", "The answer", " is", " 4é", ""]
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": piece}}]}
        for piece in pieces
    ]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
    chunks.append({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}})
    ends = [b"data: [DONE]\n\n"]

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(0.05)
        events = b"".join(
            b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\r\n\r\n"
            for chunk in chunks
        )
        for start in range(0, len(events), 7):
            await response.write(events[start : start + 7])
        await response.write(b"".join(ends))
        return response

    server.answer = stream
    completion = await model_of(server, stream=True).complete("hi")
    assert (completion.text, completion.finish_reason) == ("The answer is 4é", "length")
    assert completion.usage.completion_tokens == 4
    assert completion.time_to_first_token is not None
    assert 0.04 < completion.time_to_first_token <= completion.latency
    assert completion.raw["choices"][0]["message"]["content"] == completion.text
    assert server.bodies[0]["stream_options"] == {"include_usage": True}
    chunks, ends = chunks[:3], []
    with pytest.raises(ServerFailure) as caught:
        await model_of(server, stream=True, max_tries=1).complete("hi")
    assert caught.value.kind == "cut"


async def test_stream_with_parts_of_content_is_read(server: Server) -> None:
    """Servers that stream content as a list, after an empty text, would end the run."""
    parts = [{"type": "text", "text": "4"}, {"type": "text", "text": None}]
    server.answer = lambda request: events([piece(""), piece(parts, index=None), piece("2")])
    completion = await model_of(server, stream=True).complete("hi")
    assert completion.text == "42"
    assert completion.time_to_first_token is not None


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
async def test_every_form_of_events_is_read(server: Server, line_end: str) -> None:
    """The standard allows an event of several data lines, and three ends of a line."""
    whole = json.dumps(piece("an answer", finish_reason="stop"), indent=1).splitlines()
    text = line_end.join([*(f"data: {line}" for line in whole), ": comment", "", ""])
    body = (text + f"data: [DONE]{line_end}{line_end}").encode()

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=STREAM)
        await response.prepare(request)
        for start in range(0, len(body), 3):
            await response.write(body[start : start + 3])
        return response

    server.answer = stream
    completion = await model_of(server, stream=True, max_tries=1).complete("hi")
    assert (completion.text, completion.finish_reason) == ("an answer", "stop")


async def test_server_that_ignores_stream_still_answers(server: Server) -> None:
    """Some servers answer a streaming request with plain JSON."""
    completion = await model_of(server, stream=True).complete("hi")
    assert (completion.text, completion.time_to_first_token) == ("4", None)


async def test_call_records_itself_with_images_by_hash(server: Server) -> None:
    """Records would be empty, or swell by every image sent."""
    notebook = Notebook()
    prompt = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": [{"type": "text", "text": "?"}, image_part(b"png")]},
    ]
    with set_default_recorder(notebook, "q", "1.0"):  # type: ignore[arg-type]
        await model_of(server).complete(prompt)
    [(recorded, sampled, extra)] = notebook.samplings
    assert sampled == "4"
    assert extra["usage"] == {"prompt_tokens": 3, "completion_tokens": 1}
    assert extra["finish_reason"] == "stop"
    image = recorded[1]["content"][1]["image_url"]["url"]
    assert image.startswith("sha256:")
    assert len(image) == len("sha256:") + 64
    assert prompt[1]["content"][1] == image_part(b"png")
    assert server.bodies[0]["messages"] == prompt


def test_text_prompts_pass_through_image_hiding_unchanged() -> None:
    """A copy of every prompt would cost time on each call."""
    prompt = [{"role": "user", "content": "hi"}]
    assert hide_images(prompt) is prompt
    assert hide_images("hi") == "hi"
    linked = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}
    ]
    assert hide_images(linked) == linked


async def test_key_is_sent_but_never_shown_or_stored(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key in a log, a record or a database is a leaked key."""
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    model = model_of(server, api_key=KEY)
    await model.complete("hi")
    await chz.replace(model, name="other").complete("hi")
    for shown in (repr(model), str(chz.asdict(model)), str(model.__dict__)):
        assert KEY not in shown
    stored = pickle.dumps(model)
    assert KEY.encode() not in stored
    await pickle.loads(stored).complete("hi")
    monkeypatch.setenv("OTHER_KEY", "other")
    await model_of(server, api_key_env="OTHER_KEY").complete("hi")
    sent = [headers["Authorization"] for headers in server.headers]
    assert sent == [f"Bearer {KEY}"] * 2 + ["Bearer from-environment", "Bearer other"]


@pytest.mark.parametrize(
    "answer",
    [
        lambda text: web.Response(status=400, text=text),
        lambda text: web.Response(status=401, reason=text),
        lambda text: web.Response(status=500, text="x" * (300 - len(KEY)) + text),
        lambda text: web.Response(text=text),
        lambda text: web.json_response({"error": text}),
        lambda text: web.Response(text=f"data: {text}\n\n", headers=STREAM),
        lambda text: web.Response(status=307, headers={"Location": f"/?{text}"}),
    ],
)
async def test_key_that_a_server_echoes_is_not_shown(server: Server, answer: Any) -> None:
    """The key would stand on the terminal, in the results and in the database."""
    server.answer = lambda request: answer(request.headers["Authorization"])
    with pytest.raises((RequestRefused, ServerFailure)) as caught:
        await model_of(server, api_key=KEY, max_tries=1).complete("hi")
    assert "***" in str(caught.value)
    for start in range(len(KEY) - 4):
        assert KEY[start : start + 5] not in str(caught.value) + caught.value.body


@pytest.mark.parametrize("status", [301, 307, 308])
async def test_redirected_request_names_its_target(server: Server, status: int) -> None:
    """A 301 makes a GET of a POST, which servers refuse with a status that explains nothing."""
    target = f"{server.url}/elsewhere/chat/completions"
    server.answer = lambda request: web.Response(status=status, headers={"Location": target})
    with pytest.raises(RequestRefused, match=f"redirects to {target}; use that address") as caught:
        await model_of(server).complete("hi")
    assert caught.value.status == status
    assert len(server.bodies) == 1
    server.answer = lambda request: web.Response(status=status, headers={"Location": request.path})
    with pytest.raises(ServerFailure, match="models: it redirects in circles"):
        await model_of(server, max_tries=1).list_models()


async def test_base_url_comes_from_the_environment(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tool of the field honours OPENAI_BASE_URL."""
    monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
    assert (await OpenAIModel(name="m").complete("hi")).text == "4"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_url": "localhost:8000"}, "must be a full address"),
        ({"timeout": 0.0}, "timeout=0.0 must be above 0"),
        ({"max_tries": 0}, "max_tries=0"),
        ({"num_concurrent": 0}, "num_concurrent=0"),
        ({"params": {"prompt": "x"}}, "prompt='x' would replace what is asked of the server"),
    ],
)
def test_bad_field_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    """A bad value would surface as a strange failure of every request."""
    with pytest.raises(ValueError, match=message):
        OpenAIModel(name="m", **fields)


async def test_fields_can_be_set_on_a_command_line() -> None:
    """`model.params.temperature=0` is how evals are called."""
    argv = ["name=m", "params.temperature=0.5", "params.stop=END", "num_concurrent=auto"]
    model = chz.entrypoint(OpenAIModel, argv=argv)
    assert model.params == {"temperature": 0.5, "stop": "END"}
    assert model.num_concurrent == "auto"


async def test_models_are_listed(server: Server) -> None:
    """The one served model is found by this list."""
    server.answer = lambda request: web.json_response({"data": [{"id": "a"}, {"id": "b"}]})
    assert await model_of(server).list_models() == ["a", "b"]
    server.answer = lambda request: web.json_response([{"id": "a"}, {"id": "a"}])
    assert await model_of(server).list_models() == ["a"]
    server.answer = lambda request: web.json_response({"data": 5})
    assert await model_of(server).list_models() == []


@pytest.mark.parametrize("limit", [None, "many", 4])
async def test_probe_leaves_a_limit_that_it_need_not_cut(server: Server, limit: Any) -> None:
    """A run with a limit of another form would end in a traceback before its first sample."""
    found = await probe(model_of(server), params={"max_tokens": limit})
    assert found.completion is not None
    assert [body["max_tokens"] for body in server.bodies] == [limit]


async def test_probe_that_is_refused_asks_once_more_as_the_run_will(server: Server) -> None:
    """min_tokens=64 goes with max_tokens=512, but not with what the probe makes of it."""

    async def answer(request: web.Request) -> web.Response:
        body = await request.json()
        is_bad = body["min_tokens"] > body["max_tokens"]
        return web.Response(status=400, text="min_tokens") if is_bad else reply()

    server.answer = answer
    model = model_of(server, params={"min_tokens": 64, "max_tokens": 512})
    assert (await probe(model)).model == model
    assert [body["max_tokens"] for body in server.bodies] == [16, 512]
    server.answer = lambda request: web.Response(status=400, text="no")
    with pytest.raises(RequestRefused):
        await probe(model)
    assert len(server.bodies) == 4


ECHO = {
    "tokens": ["<s>", "The", " sky is", " bl", "ue", "!"],
    "token_logprobs": [None, -3.0, -2.0, -0.5, -0.25, -9.0],
    "top_logprobs": [None, {"A": -1.0}, {" sky is": -2.0}, {" bl": -0.5}, {"ue": -0.25}, {".": 0}],
}


async def test_loglikelihood_sums_the_continuation(server: Server) -> None:
    """Multiple-choice scores by likelihood rest on these sums."""
    choice = {"text": "", "logprobs": ECHO}
    server.answer = lambda request: web.json_response({"choices": [choice]})
    model = model_of(server, api="completions")
    [score] = await model.loglikelihood("The sky is", [" blue"])
    assert (score.logprob, score.n_tokens, score.is_greedy) == (-0.75, 2, True)
    assert server.bodies[0]["prompt"] == "The sky is blue"
    assert server.bodies[0]["echo"] is True


def test_border_token_counts_as_continuation() -> None:
    """Dropping a token that straddles the border would favour long merges."""
    score = score_echo(ECHO, "The sky", " is blue")
    assert (score.logprob, score.n_tokens, score.is_greedy) == (-2.75, 3, True)
    other = {**ECHO, "top_logprobs": [{"x": -0.1}] * 6}
    assert not score_echo(other, "The sky is", " blue").is_greedy


@pytest.mark.parametrize("logprobs", [None, {"tokens": ["4"], "token_logprobs": [-1.0]}])
async def test_server_without_prompt_logprobs_is_named_so(server: Server, logprobs: Any) -> None:
    """A server that ignores echo in silence would give scores that are chance."""
    choice = {"text": "4", "logprobs": logprobs}
    server.answer = lambda request: web.json_response({"choices": [choice]})
    with pytest.raises(ServerLacks, match="ignores"):
        await model_of(server, api="completions").loglikelihood("2+2=", ["4"])
    with pytest.raises(TypeError, match="completions"):
        await model_of(server).loglikelihood("2+2=", ["4"])


async def test_num_concurrent_bounds_requests_in_flight(server: Server) -> None:
    """A server that is sized for 3 would be swamped."""
    in_flight = most = 0

    async def slow(request: web.Request) -> web.Response:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0.02)
        in_flight -= 1
        return reply()

    server.answer = slow
    async with model_of(server, num_concurrent=3) as model:
        calls = [asyncio.ensure_future(model.complete("hi")) for _ in range(12)]
        await asyncio.sleep(0.01)
        calls[5].cancel()
        calls[7].cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    assert most == 3


async def simulate(
    limit: AdaptiveLimit, capacity: int, seconds: float = 4.0, refused: int | None = None
) -> float:
    """Drive a limiter against a server that does `capacity` requests at once, 10 ms each.

    Of `refused` requests it refuses one, at any load. Returns answers per second.
    """
    limiter = Limiter(limit)
    desk = asyncio.Semaphore(capacity)
    done = num_sent = 0
    stop = time.perf_counter() + seconds

    async def client() -> None:
        nonlocal done, num_sent
        while time.perf_counter() < stop:
            async with limiter.slot() as slot:
                num_sent += 1
                if refused is not None and num_sent % refused == 0:
                    slot.report(throttled=True)
                    continue
                async with desk:
                    await asyncio.sleep(0.01)
                done += 1

    await asyncio.gather(*(client() for _ in range(400)))
    return done / seconds


async def test_auto_finds_what_pays() -> None:
    """Too few in flight wastes the server, too many only queue there."""
    limit = AdaptiveLimit()
    rate = await simulate(limit, capacity=40)
    assert 30 <= limit.limit <= 160
    assert rate > 0.6 * 40 / 0.011


async def test_auto_bears_with_refusals_at_any_load() -> None:
    """A gateway that refuses one request in ten would be asked one at a time."""
    limit = AdaptiveLimit()
    rate = await simulate(limit, capacity=40, seconds=2.0, refused=10)
    assert limit.limit >= 16
    assert rate > 0.5 * 40 / 0.011


def test_auto_backs_off_when_throttled_and_when_latency_rises() -> None:
    """A server that says 429 would be asked even more."""
    limit = AdaptiveLimit(start=100)
    limit.learn(50.0, 0.1, throttled=True)
    assert limit.limit == 70
    limit = AdaptiveLimit(start=10)
    limit.learn(100.0, 0.1, throttled=False)
    assert limit.limit == 20
    limit.learn(101.0, 0.15, throttled=False)
    assert limit.limit == 10
    limit.learn(30.0, 0.35, throttled=False)
    assert limit.limit == 7


async def test_scripted_model_replies_from_text_mapping_and_function() -> None:
    """Every eval's own tests rest on it."""
    assert (await ScriptedModel(reply="yes").complete("?")).text == "yes"
    mapped = ScriptedModel(reply={"2+2?": "4"})
    assert (await mapped.complete([{"role": "user", "content": "2+2?"}])).text == "4"
    with pytest.raises(KeyError, match="the nearest is '2\\+2\\?'"):
        await mapped.complete("2+3?")

    async def shout(prompt: Any) -> str:
        return prompt.upper()

    notebook = Notebook()
    with set_default_recorder(notebook, "q", "1.0"):  # type: ignore[arg-type]
        assert (await ScriptedModel(reply=shout).complete("abc")).text == "ABC"
    assert notebook.samplings[0][:2] == ("abc", "ABC")
    scored = ScriptedModel(reply="", score=lambda context, text: -float(len(text)))
    scores = await scored.loglikelihood("c", ["aa", "b"])
    assert [score.is_greedy for score in scores] == [False, True]
    with pytest.raises(TypeError):
        await mapped.loglikelihood("c", ["a"])
