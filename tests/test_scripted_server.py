"""The scripted model server: what it promises to the tests that lean on it."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoeval.models.openai_api import OpenAIModel
from nanoeval.testing import Fault, Reply, Request, ScriptedServer, ScriptedServerProcess
from nanoeval.testing._openai_json import count_tokens, tokenize
from nanoeval.testing.server import main

REQUESTS_PER_CORE_SECOND = 2000


def chat(text: str = "hello", **params: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": [{"role": "user", "content": text}], **params}


async def post(
    server: ScriptedServer, body: Any, path: str = "chat/completions", **options: Any
) -> tuple[int, Any]:
    """Status and JSON of one request (text where it is not JSON)."""
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{server.base_url}/{path}", json=body, **options) as response:
            text = await response.text()
            try:
                return response.status, json.loads(text)
            except ValueError:
                return response.status, text


async def stream(server: ScriptedServer, body: Any, path: str = "chat/completions") -> list[Any]:
    """The events of a streamed reply, `[DONE]` as a string."""
    events = []
    async with aiohttp.ClientSession() as session:
        async with session.post(
            f"{server.base_url}/{path}", json={**body, "stream": True}
        ) as response:
            assert response.content_type == "text/event-stream"
            async for line in response.content:
                if line.startswith(b"data: "):
                    data = line[6:].strip()
                    events.append("[DONE]" if data == b"[DONE]" else json.loads(data))
    return events


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("fixed", "fixed"),
        ({"hello": "by prompt"}, "by prompt"),
        (lambda request: request.prompt.upper(), "HELLO"),
        (lambda request: Reply("of its own", finish_reason="length"), "of its own"),
        (lambda request: None, None),
    ],
)
async def test_every_kind_of_script_replies(script: Any, expected: str | None) -> None:
    """A test could not say what the model answers in the form that suits it."""
    async with ScriptedServer(script) as server:
        status, reply = await post(server, chat())
    assert status == 200
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": expected}


async def test_async_script_replies() -> None:
    """A reply function that awaits something would send a coroutine."""

    async def reply(request: Request) -> str:
        await asyncio.sleep(0)
        return "awaited"

    async with ScriptedServer(reply) as server:
        _, got = await post(server, chat())
    assert got["choices"][0]["message"]["content"] == "awaited"


async def test_request_shows_what_was_asked() -> None:
    """Reply functions and assertions could not tell requests apart."""
    parts = [
        {"type": "text", "text": "what is "},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}},
        {"type": "text", "text": "this?"},
    ]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
    async with ScriptedServer() as server:
        body = {"model": "scripted", "messages": messages, "temperature": 0.5}
        await post(server, body, headers={"X-Trace": "7"})
        await post(server, body)
    first, second = server.requests
    assert first.prompt == "what is this?"
    assert first.text == "be brief\nwhat is this?"
    assert first.images == ["data:image/png;base64,QUJD"]
    assert first.body["temperature"] == 0.5
    assert first.headers["x-trace"] == "7"
    assert (first.number, first.try_number) == (1, 1)
    assert (second.number, second.try_number) == (2, 2)


async def test_usage_counts_tokens_or_says_what_the_script_says() -> None:
    """Token statistics of an eval could not be checked."""
    async with ScriptedServer(lambda r: Reply("one two", prompt_tokens=100)) as server:
        _, reply = await post(server, chat("a b c"))
    assert reply["usage"] == {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}


async def test_generation_parameters_are_honoured() -> None:
    """A client that forgets stop, max_tokens or n would pass its tests."""
    async with ScriptedServer("one two three four") as server:
        _, short = await post(server, chat(max_tokens=2))
        _, stopped = await post(server, chat(stop=["nowhere", " three"]))
        _, several = await post(server, chat(n=3))
    assert short["choices"][0]["message"]["content"] == "one two"
    assert short["choices"][0]["finish_reason"] == "length"
    assert stopped["choices"][0]["message"]["content"] == "one two"
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2]
    assert several["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize("include_usage", [False, True])
async def test_stream_carries_the_same_reply(include_usage: bool) -> None:
    """Streaming clients would be tested against another protocol than the real one."""
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    async with ScriptedServer("one two") as server:
        *chunks, done = await stream(server, chat(**options))
    assert done == "[DONE]"
    usage = chunks.pop()["usage"] if include_usage else None
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert [delta.get("content", "") for delta in deltas] == ["", "one", " two", ""]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert include_usage == (usage is not None)
    assert usage is None or usage["completion_tokens"] == 2


async def test_stream_comes_token_by_token() -> None:
    """A time to the first token could not be told from the time of the whole reply."""
    async with ScriptedServer("a b c d", latency=0.05, time_per_token=0.05) as server:
        model = OpenAIModel(name="scripted", base_url=server.base_url, stream=True)
        reply = await model.complete("hello")
    assert reply.text == "a b c d"
    assert reply.time_to_first_token is not None
    assert 0.05 <= reply.time_to_first_token < reply.latency - 0.1


async def test_chat_logprobs_have_the_api_s_form() -> None:
    """Clients that read log-probabilities could not be tested."""
    async with ScriptedServer("one two", logprob=lambda before, token: -0.25) as server:
        _, reply = await post(server, chat(logprobs=True, top_logprobs=2))
        _, without = await post(server, chat())
    entries = reply["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == ["one", " two"]
    assert all(entry["logprob"] == -0.25 for entry in entries)
    assert bytes(entries[1]["bytes"]).decode() == " two"
    assert entries[0]["top_logprobs"][0]["token"] == "one"
    assert len(entries[0]["top_logprobs"]) == 2
    assert without["choices"][0]["logprobs"] is None


async def test_echo_gives_log_probabilities_of_the_prompt() -> None:
    """Log-likelihoods over HTTP could not be checked against known ones."""

    def logprob(before: str, token: str) -> float:
        return {" Paris": -0.1, " Rome": -3.0}.get(token, -1.0)

    async with ScriptedServer("next", logprob=logprob) as server:
        body = {"model": "scripted", "prompt": "in Paris", "max_tokens": 0, "echo": True}
        _, reply = await post(server, {**body, "logprobs": 1}, "completions")
        model = OpenAIModel(name="scripted", base_url=server.base_url, api="completions")
        paris, rome = await model.loglikelihood("It is in", [" Paris", " Rome now"])
    (choice,) = reply["choices"]
    assert choice["text"] == "in Paris"
    assert choice["logprobs"]["tokens"] == ["in", " Paris"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.1]
    assert choice["logprobs"]["text_offset"] == [0, 2]
    assert (paris.logprob, paris.n_tokens, paris.is_greedy) == (-0.1, 1, True)
    assert (rome.logprob, rome.n_tokens, rome.is_greedy) == (-4.0, 2, False)


async def test_several_prompts_get_a_choice_each() -> None:
    """Clients that batch plain completions would get one reply for all."""
    async with ScriptedServer(lambda request: request.prompt + "!") as server:
        body = {"model": "scripted", "prompt": ["a", "b"], "n": 2}
        _, reply = await post(server, body, "completions")
    assert [choice["text"] for choice in reply["choices"]] == ["a!", "a!", "b!", "b!"]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500, 502, 503, 504])
async def test_status_faults(status: int) -> None:
    """A client's rule for this status could not be tested."""
    fault = Fault(str(status), requests=[2], retry_after=0.5)
    async with ScriptedServer(faults=[fault]) as server:
        async with aiohttp.ClientSession() as session:
            seen = []
            for _ in range(3):
                url = f"{server.base_url}/chat/completions"
                async with session.post(url, json=chat()) as response:
                    seen.append((response.status, response.headers.get("Retry-After")))
                    body = await response.json()
                    assert ("error" in body) == (response.status != 200)
    retry_after = "0.5" if status in {429, 503} else None
    assert seen == [(200, None), (status, retry_after), (200, None)]
    assert server.faults == {str(status): 1}
    assert server.stats().num_replies == 2


@pytest.mark.parametrize("is_stream", [False, True])
async def test_cut_reply_breaks_off_in_the_middle(is_stream: bool) -> None:
    """A client that takes half a reply for a whole one would pass its tests."""
    async with ScriptedServer("a long reply " * 50, faults=["cut"]) as server:
        async with aiohttp.ClientSession() as session:
            url = f"{server.base_url}/chat/completions"
            async with session.post(url, json=chat(stream=is_stream)) as response:
                assert response.status == 200
                start = await response.content.readany()
                assert b"a long reply"[:6] in start or is_stream
                with pytest.raises(aiohttp.ClientPayloadError):
                    await response.read()


async def test_disconnect_sends_nothing() -> None:
    """A server that dies before its reply could not be simulated."""
    async with ScriptedServer(faults=["disconnect"]) as server:
        with pytest.raises((aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)):
            await post(server, chat())


async def test_hanging_reply_never_comes_and_does_not_delay_the_end() -> None:
    """A time-out could not be tested, or every such test would hang at its end."""
    async with ScriptedServer(faults=["hang"]) as server:
        timeout = aiohttp.ClientTimeout(total=0.2)
        with pytest.raises(TimeoutError):
            await post(server, chat(), timeout=timeout)
        await asyncio.sleep(0.1)
        assert server.in_flight == 0
        waiting = asyncio.ensure_future(post(server, chat()))
        await asyncio.sleep(0.1)
        started = time.perf_counter()
    assert time.perf_counter() - started < 2
    with pytest.raises(aiohttp.ClientError):
        await waiting


async def test_faults_that_spoil_the_reply() -> None:
    """Replies that are wrong in themselves could not be simulated."""
    kinds = ["malformed", "empty_choices", "null_content", "no_usage", "error_body"]
    faults = [Fault(kind, requests=[i]) for i, kind in enumerate(kinds, start=1)]
    async with ScriptedServer("text", faults=faults) as server:
        malformed, empty, null, no_usage, error = [(await post(server, chat()))[1] for _ in kinds]
        assert server.faults == Counter(kinds)
    assert isinstance(malformed, str)
    assert malformed.startswith("{")
    assert empty["choices"] == []
    assert null["choices"][0]["message"]["content"] is None
    assert no_usage["choices"][0]["message"]["content"] == "text"
    assert "usage" not in no_usage
    assert "error" in error


@pytest.mark.parametrize("kind", ["malformed", "empty_choices", "null_content", "no_usage"])
async def test_streams_are_spoilt_too(kind: str) -> None:
    """Faults would be met only by clients that do not stream."""
    body = chat(stream_options={"include_usage": True})
    async with ScriptedServer("some text", faults=[kind]) as server:
        if kind == "malformed":
            with pytest.raises(json.JSONDecodeError):
                await stream(server, body)
            return
        *chunks, done = await stream(server, body)
    assert done == "[DONE]"
    parts = [part for chunk in chunks for part in chunk["choices"]]
    assert (parts == []) == (kind == "empty_choices")
    assert any("usage" in chunk for chunk in chunks) == (kind != "no_usage")
    text = "".join(part["delta"].get("content") or "" for part in parts)
    assert text == ("some text" if kind == "no_usage" else "")


async def _kinds_met(server: ScriptedServer, texts: list[str]) -> list[int]:
    return [(await post(server, chat(text)))[0] for text in texts]


async def test_faults_by_rate_repeat_and_come_as_often_as_said() -> None:
    """A failing test could not be run again with the same failures."""
    texts = [f"question {i}" for i in range(200)]
    faults = ["429:0.1", "500:0.2"]
    async with ScriptedServer(faults=faults, seed=1) as server:
        first = await _kinds_met(server, texts)
    async with ScriptedServer(faults=faults, seed=1) as server:
        backwards = (await _kinds_met(server, texts[::-1]))[::-1]
    async with ScriptedServer(faults=faults, seed=2) as server:
        other_seed = await _kinds_met(server, texts)
    assert first == backwards
    assert first != other_seed
    counts = Counter(first)
    assert 8 <= counts[429] <= 34  # 20 expected, 99.9 % of all seeds
    assert 22 <= counts[500] <= 60  # 40 expected


async def test_a_retry_is_drawn_anew() -> None:
    """A request that met a fault would meet it for ever, or never again."""
    async with ScriptedServer(faults=["500:0.5"]) as server:
        statuses = await _kinds_met(server, ["same"] * 40)
    assert 5 < statuses.count(500) < 35


async def test_first_tries_spares_the_retries() -> None:
    """No test could have every request fail once and then work."""
    async with ScriptedServer(faults=[Fault("500", first_tries=1)]) as server:
        assert await _kinds_met(server, ["a", "a", "b", "b"]) == [500, 200, 500, 200]


async def test_a_function_decides_on_faults() -> None:
    """Faults could not depend on what was asked."""

    def rule(request: Request) -> Fault | None:
        return Fault("403") if "secret" in request.prompt else None

    def reply(request: Request) -> str | Fault:
        return Fault("empty_choices") if "nothing" in request.prompt else "something"

    async with ScriptedServer(reply, faults=[rule]) as server:
        assert (await post(server, chat("a secret")))[0] == 403
        assert (await post(server, chat("nothing")))[1]["choices"] == []
        assert len((await post(server, chat("a thing")))[1]["choices"]) == 1


async def test_failing_script_is_told_to_the_client() -> None:
    """A bug in a test's own reply function would look like a broken server and be retried."""
    async with ScriptedServer(lambda request: {"a": "b"}[request.prompt]) as server:
        status, reply = await post(server, chat("c"))
        unknown_status, unknown = await post(server, chat("c"))
    assert status == unknown_status == 501
    assert "KeyError" in reply["error"]["message"]
    assert unknown["error"]["code"] == "reply_function_failed"


async def test_server_that_lacks_features() -> None:
    """The probes for what a server cannot do could not be tested."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}
    picture = {
        "model": "scripted",
        "messages": [{"role": "user", "content": [image, {"type": "text", "text": "hm"}]}],
    }
    async with ScriptedServer(refuses=["images", "echo"], ignores=["logprobs"]) as server:
        status, reply = await post(server, picture)
        assert (status, "images" in reply["error"]["message"]) == (400, True)
        plain = {"model": "scripted", "prompt": "x"}
        assert (await post(server, {**plain, "echo": True}, "completions"))[0] == 400
        _, ignored = await post(server, {**plain, "logprobs": 1}, "completions")
        assert ignored["choices"][0]["logprobs"] is None
    async with ScriptedServer(ignores=["images", "stream"]) as blind:
        status, reply = await post(blind, {**picture, "stream": True})
        assert (status, reply["object"]) == (200, "chat.completion")
        assert blind.requests[0].images == []


async def test_key_models_and_headers() -> None:
    """Wrong keys, unknown models and a server's identity could not be tested."""
    async with ScriptedServer(
        models=["first", "org/second"], api_key="sesame", headers={"Server": "vllm", "X-V": "1"}
    ) as server:
        right = {"Authorization": "Bearer sesame"}
        assert (await post(server, chat()))[0] == 401
        assert (await post(server, chat(), headers={"Authorization": "Bearer no"}))[0] == 401
        status, reply = await post(server, chat(), headers=right)
        assert status == 404
        assert "first, org/second" in reply["error"]["message"]
        async with aiohttp.ClientSession(headers=right) as session:
            async with session.get(f"{server.base_url}/models") as response:
                listed = [entry["id"] for entry in (await response.json())["data"]]
                assert (response.headers["Server"], response.headers["X-V"]) == ("vllm", "1")
            async with session.get(f"{server.base_url}/models/org/second") as response:
                assert (await response.json())["id"] == "org/second"
            async with session.get(f"{server.base_url}/nowhere") as response:
                assert response.status == 404
        assert listed == ["first", "org/second"]


async def test_models_fault_hits_the_list_alone() -> None:
    """A server whose list of models fails could not be simulated."""
    async with ScriptedServer(models_fault="500") as server:
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{server.base_url}/models") as response:
                assert response.status == 500
        assert (await post(server, chat()))[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "names"),
    [
        ("chat/completions", [], "object"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "model"),
        ("chat/completions", {"model": "scripted", "messages": []}, "messages"),
        ("chat/completions", {"model": "scripted", "messages": ["hi"]}, "role"),
        ("completions", {"model": "scripted", "prompt": [1, 2]}, "prompt"),
    ],
)
async def test_invalid_requests_get_400(path: str, body: Any, names: str) -> None:
    """A client that sends nonsense would pass its tests."""
    async with ScriptedServer() as server:
        status, reply = await post(server, body, path)
    assert status == 400
    assert names in reply["error"]["message"]


async def test_body_that_is_not_json_gets_400() -> None:
    """The server would answer 500, which clients retry."""
    async with ScriptedServer() as server:
        async with aiohttp.ClientSession() as session:
            url = f"{server.base_url}/chat/completions"
            async with session.post(url, data=b"{") as response:
                assert response.status == 400


async def test_counts_what_is_in_flight() -> None:
    """A test could not assert that a client keeps to its concurrency."""
    async with ScriptedServer(latency=0.1) as server:
        async with aiohttp.ClientSession() as session:

            async def ask() -> None:
                url = f"{server.base_url}/chat/completions"
                async with session.post(url, json=chat()) as response:
                    await response.read()

            started = time.perf_counter()
            await asyncio.gather(*[ask() for _ in range(10)])
            assert 0.1 <= time.perf_counter() - started < 0.5
            await ask()
    stats = server.stats()
    assert (stats.max_in_flight, stats.in_flight, stats.num_requests) == (10, 0, 11)
    assert stats.num_connections == 10


async def test_slots_make_requests_wait_their_turn() -> None:
    """A client that looks for the best concurrency could not be tested against a full server."""
    async with ScriptedServer(latency=0.1, slots=2) as server:
        started = time.perf_counter()
        await asyncio.gather(*[post(server, chat()) for _ in range(6)])
        seconds = time.perf_counter() - started
    assert 0.3 <= seconds < 0.6
    assert server.max_in_flight == 6


async def test_log_of_requests_is_bounded() -> None:
    """A long benchmark would fill the memory with its own requests."""
    async with ScriptedServer(log_size=3) as server:
        await _kinds_met(server, ["a", "b", "c", "d", "e"])
    assert [request.prompt for request in server.requests] == ["c", "d", "e"]
    assert server.num_requests == 5


async def test_latency_by_request() -> None:
    """Slow and fast questions could not be mixed."""

    def latency(request: Request) -> float:
        return 0.2 if request.prompt == "slow" else 0.0

    async with ScriptedServer(latency=latency) as server:
        seconds = {}
        for text in ("slow", "fast"):
            started = time.perf_counter()
            await post(server, chat(text))
            seconds[text] = time.perf_counter() - started
    assert seconds["fast"] < 0.15
    assert seconds["slow"] >= 0.2


def test_plain_context_manager_serves_from_a_thread() -> None:
    """Tests without an event loop could not use the server, or it would leave a thread behind."""
    with ScriptedServer("from a thread") as server:
        url = f"{server.base_url}/chat/completions"
        request = urllib.request.Request(url, json.dumps(chat()).encode())
        with urllib.request.urlopen(request) as response:
            reply = json.load(response)
        assert reply["choices"][0]["message"]["content"] == "from a thread"
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(request, timeout=2)
    with pytest.raises(RuntimeError, match="not running"):
        _ = server.base_url


def test_taken_port_is_told() -> None:
    """A person would see a traceback of asyncio and not know what to change."""
    with ScriptedServer() as server:
        with pytest.raises(OSError, match=f"port {server.port}.*choose another"):
            with ScriptedServer(port=server.port):
                pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"faults": ["hangs"]}, "did you mean 'hang'"),
        ({"faults": ["200:0.1"]}, "400 to 599"),
        ({"faults": ["429:much"]}, "KIND:RATE"),
        ({"faults": ["429:1.5"]}, "rate=1.5"),
        ({"faults": ["429:0.6", "500:0.6"]}, "add up to 1.2"),
        ({"latency": -1.0}, "latency=-1.0"),
        ({"time_per_token": -1.0}, "time_per_token=-1.0"),
        ({"slots": 0}, "slots=0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    """A misspelt fault would silently never happen."""
    with pytest.raises(ValueError, match=message):
        ScriptedServer(**options)


def test_own_process_takes_local_functions_and_counts() -> None:
    """Benchmarks would share a core with the server that they measure against."""
    offset = 3
    with ScriptedServerProcess(
        reply=lambda request: str(len(request.prompt) + offset), faults=[Fault("500", requests=[2])]
    ) as server:
        assert server.pid != os.getpid()

        async def ask() -> str:
            model = OpenAIModel(name="scripted", base_url=server.base_url, retry_backoff=0.01)
            async with model:
                first = await model.complete("12345")
                second = await model.complete("1234567")
            assert (first.tries, second.tries) == (1, 2)
            return first.text + second.text

        assert asyncio.run(ask()) == "810"
        stats = server.stats()
        assert (stats.num_requests, stats.faults, stats.num_connections) == (3, {"500": 1}, 1)
        pid = server.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_own_process_reports_a_failed_start() -> None:
    """A server that cannot start would be waited for without an end."""
    with ScriptedServer() as server:
        with pytest.raises(RuntimeError, match="ended at once"):
            with ScriptedServerProcess(port=server.port):
                pass


def test_own_process_ends_with_its_parent() -> None:
    """A killed test run would leave servers behind."""
    code = (
        "import time\n"
        "from nanoeval.testing import ScriptedServerProcess\n"
        "with ScriptedServerProcess() as server:\n"
        "    print(server.port, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        address = ("127.0.0.1", int(parent.stdout.readline()))
        socket.create_connection(address).close()
        parent.kill()
    for _ in range(100):
        try:
            socket.create_connection(address).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.05)
    pytest.fail("the server outlives its killed parent by 5 s")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "nanoeval.testing.server", *arguments]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_serves_until_it_is_stopped(number: signal.Signals, tmp_path: Path) -> None:
    """`python -m nanoeval.testing.server` would not start, not say where, or not stop."""
    (tmp_path / "my_replies.py").write_text(
        "def answer(request):\n    return request.prompt[::-1]\n"
    )
    arguments = command(
        *("--port", "0", "--reply-function", "my_replies:answer", "--fault", "429@1"),
        *("--retry-after", "0.05", "--model", "llama", "--header", "X-A=b", "--api-key", "k"),
    )
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        base_url = process.stdout.readline().strip()
        model = OpenAIModel(name="llama", base_url=base_url, api_key="k", retry_backoff=0.01)
        reply = asyncio.run(model.complete("abc"))
        process.send_signal(number)
        _, errors = process.communicate(timeout=10)
    assert (reply.text, reply.tries) == ("cba", 2)
    assert process.returncode == 0
    assert "2 requests, 1 replies, faults: 1 x 429" in errors
    assert "Traceback" not in errors
    assert "Warning" not in errors


def test_command_reads_replies_from_a_file(tmp_path: Path) -> None:
    """Replies could not be scripted without writing Python."""
    path = tmp_path / "replies.jsonl"
    path.write_text('{"prompt": "2+2", "reply": "4\\u2028é"}\n', encoding="utf-8")
    with subprocess.Popen(
        command("--port", "0", "--reply-file", str(path)), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        model = OpenAIModel(name="scripted", base_url=process.stdout.readline().strip())
        reply = asyncio.run(model.complete("2+2"))
        process.terminate()
    assert reply.text == "4\u2028é"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fault", "teapot"], "teapot"),
        (["--reply-function", "no_such_module:f"], "no_such_module"),
        (["--reply-function", "json"], "MODULE:FUNCTION"),
        (["--reply-file", "missing.jsonl"], "missing.jsonl"),
        (["--header", "novalue"], "NAME=VALUE"),
        (["--latency", "-1"], "latency=-1.0"),
        (["--port", "99999"], "port=99999 must lie between 0"),
    ],
)
def test_command_explains_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A person would get a traceback for a typing error."""
    with pytest.raises(SystemExit) as exit_info:
        main(["--port", "0", *arguments])
    assert exit_info.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.splitlines()) == 1


@given(st.text(alphabet=st.sampled_from(" \n\tab.,é字\u00a0\u2003\x1c"), max_size=40))
def test_tokens_join_to_the_text(text: str) -> None:
    """Echoed prompts would differ from what was sent, and usage from the tokens listed."""
    assert "".join(tokenize(text)) == text
    assert len(tokenize(text)) == count_tokens(text)


def test_default_logprobs_are_probabilities() -> None:
    """Sums of log-probabilities would be no log-probabilities."""
    from nanoeval.testing._openai_json import default_logprob

    values = [default_logprob("before", f" token{i}") for i in range(500)]
    assert all(math.log(0.05) <= value <= math.log(0.95) for value in values)
    assert len(set(values)) > 490


async def _ask_repeatedly(port: int, times: int) -> None:
    """A client so light that the server is the slower side: one connection, no parsing."""
    body = json.dumps(chat("What is 12 + 30? Answer with the number alone.")).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(times):
        writer.write(request % len(body) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        await reader.readexactly(int(length))
    writer.close()
    await writer.wait_closed()


@pytest.mark.slow
def test_one_core_carries_two_thousand_requests_a_second() -> None:
    """The server would be the bottleneck of the benchmarks that use it."""

    async def load(port: int) -> None:
        await asyncio.gather(*[_ask_repeatedly(port, 50) for _ in range(64)])

    rates = []
    with ScriptedServerProcess(reply=lambda request: "Answer: 42") as server:
        # CPU time of the server's single thread, and the best of three rounds: what else the
        # machine does then hardly counts.
        for _ in range(3):
            before = server.stats()
            asyncio.run(load(server.port))
            after = server.stats()
            cpu_seconds = after.cpu_seconds - before.cpu_seconds
            rates.append((after.num_requests - before.num_requests) / cpu_seconds)
    assert max(rates) >= REQUESTS_PER_CORE_SECOND
