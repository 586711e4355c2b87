"""One HTTP client for all models: keep-alive, time-outs, retries. Knows no API's JSON."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar

import aiohttp
from yarl import URL

from nanoeval.eval import RolloutSystemError
from nanoeval.models._concurrency import Limiter
from nanoeval.setup import say

T = TypeVar("T")

RETRIED_STATUSES = frozenset({408, 429, 500, 502, 503, 504, 529})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
BODY_START = 300
# A key that is shorter is a placeholder; taking it out would garble every message.
SHORTEST_KEY = 4
# A server that asks for more patience than this gets it from the runner, which frees the slot.
LONGEST_WAIT = 60.0


class ServerFailure(RolloutSystemError):
    """The server or the way to it failed, and so did the retries.

    `kind` is one word for counting: `http_<status>`, `timeout`, `connection`, `cut`, or what the
    reader of the reply called it.
    """

    kind: str = "connection"
    url: str = ""
    status: int | None = None
    body: str = ""
    tries: int = 1


class RequestRefused(Exception):
    """The server understood the request and will not answer it (400, 401, 403, 404, ...)."""

    url: str = ""
    status: int = 0
    body: str = ""

    @property
    def kind(self) -> str:
        """One word for counting: `http_<status>`."""
        return f"http_{self.status}"


class BadReply(Exception):
    """A reply with a good status that cannot be read; the client tries again. Raised by readers.

    `body` is what the server sent, uncut: the client shows its start.
    """

    def __init__(self, kind: str, what: str, body: str = "") -> None:
        super().__init__(what)
        self.kind = kind
        self.body = body


@dataclass(frozen=True)
class HTTPSettings:
    """Seconds, and the number of tries of one request (1 = no retry)."""

    connect_timeout: float = 10.0
    timeout: float = 600.0
    max_tries: int = 5
    backoff: float = 0.5


@dataclass(frozen=True)
class Exchange(Generic[T]):
    """One answered request. `latency` (seconds) is that of the try that worked."""

    value: T
    status: int
    headers: Mapping[str, str]
    latency: float
    tries: int


# Gets the response and the moment (time.perf_counter) at which the request was sent.
Reader = Callable[[aiohttp.ClientResponse, float], Awaitable[T]]


class HTTPClient:
    """A session of the running event loop, until `close`.

    Concurrency is bounded by the caller, or by `limiter`.
    """

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str],
        settings: HTTPSettings,
        limiter: Limiter | None = None,
    ) -> None:
        self._base = check_base_url(base_url)
        self._settings = settings
        self._limiter = limiter
        self._urls: dict[str, URL] = {}
        key = headers.get("Authorization", "").removeprefix("Bearer ")
        self._key = key if len(key) >= SHORTEST_KEY else ""
        self._has_told_wait = False
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(
                total=settings.timeout, sock_connect=settings.connect_timeout
            ),
            # Looking up proxies costs CPU on every request, and none stands before this host.
            trust_env=self._base.host not in {"localhost", "127.0.0.1", "::1"},
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def send(
        self, method: str, path: str, body: bytes | None, read: Reader[T]
    ) -> Exchange[T]:
        """Send one request and read its reply, again where that can help.

        Raises ServerFailure when all tries failed, RequestRefused when another try would not help.
        """
        url = self._urls.get(path) or self._urls.setdefault(path, _join(self._base, path))
        for tries in itertools.count(1):
            if self._limiter is None:
                outcome = await self._try(method, url, body, read, tries)
            else:
                async with self._limiter.slot() as slot:
                    outcome = await self._try(method, url, body, read, tries)
                    slot.report(
                        throttled=isinstance(outcome, ServerFailure)
                        and outcome.kind in {"http_429", "http_503", "timeout"}
                    )
            if isinstance(outcome, Exchange):
                return outcome
            wait = self._wait_after(outcome, tries)
            if wait is None:
                raise outcome
            await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    async def _try(
        self, method: str, url: URL, body: bytes | None, read: Reader[T], tries: int
    ) -> Exchange[T] | ServerFailure:
        started = time.perf_counter()
        try:
            # A redirected POST would arrive as a GET (301, 302), or without its key.
            async with self._session.request(
                method, url, data=body, allow_redirects=method == "GET"
            ) as response:
                if response.status < 300:
                    value = await read(response, started)
                    latency = time.perf_counter() - started
                    return Exchange(value, response.status, response.headers, latency, tries)
                return await self._failed_status(response, url, tries)
        except BadReply as error:
            kind, text = error.kind, self._start_of(error.body)
            what = f"{error}: {text}" if text else str(error)
        except TimeoutError:
            text, kind = "", "timeout"
            what = f"no complete reply within {time.perf_counter() - started:.1f} s"
        except aiohttp.InvalidURL as error:
            raise ValueError(f"{shown(url)} is not a usable address") from error
        except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError) as error:
            text, kind, what = "", "cut", f"connection cut before the reply was complete ({error})"
        except aiohttp.TooManyRedirects:
            text, kind, what = "", "connection", "it redirects in circles"
        except (aiohttp.ClientError, OSError) as error:
            reason = self._start_of(str(error))
            text, kind, what = "", "connection", f"cannot reach the server ({reason})"
        return _failure(f"{shown(url)}: {what}", kind=kind, url=url, body=text, tries=tries)

    async def _failed_status(
        self, response: aiohttp.ClientResponse, url: URL, tries: int
    ) -> ServerFailure:
        content = await response.content.read(4 * BODY_START)
        text = self._start_of(content.decode("utf-8", "replace"))
        reason = self._start_of(response.reason or "")
        what = f"{shown(url)}: HTTP {response.status} {reason}".rstrip()
        if response.status in REDIRECTS and "Location" in response.headers:
            text = self._start_of(_redirection(url, response.headers["Location"]))
        what += f": {text}" if text else ""
        if response.status not in RETRIED_STATUSES:
            refused = RequestRefused(what)
            refused.url, refused.status, refused.body = shown(url), response.status, text
            raise refused
        failure = _failure(what, kind=f"http_{response.status}", url=url, body=text, tries=tries)
        failure.status = response.status
        failure.retry_after = parse_retry_after(response.headers.get("Retry-After"))
        return failure

    def _start_of(self, text: str) -> str:
        """What a server sent, cut, on one line, and without the key, which some servers echo."""
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:BODY_START]

    def _wait_after(self, failure: ServerFailure, tries: int) -> float | None:
        """Seconds until the next try, or None when this was the last."""
        self._tell_long_wait(failure.retry_after or 0.0)
        if tries >= self._settings.max_tries:
            return None
        wait = min(self._settings.backoff * 2.0 ** (tries - 1), LONGEST_WAIT)
        wait *= random.uniform(0.5, 1.0)
        if failure.retry_after is None:
            return wait
        if failure.retry_after > LONGEST_WAIT:
            return None
        # Jitter after the date, so that those who were refused together do not return together.
        return failure.retry_after + min(wait, 0.1 * failure.retry_after)

    def _tell_long_wait(self, seconds: float) -> None:
        """Say once that the server asks for more patience than a call has; the runner waits."""
        if seconds > LONGEST_WAIT and not self._has_told_wait:
            self._has_told_wait = True
            say(f"nanoeval: {shown(self._base)} asks to be left alone for {seconds:,.0f} s")


def check_base_url(base_url: str) -> URL:
    """`base_url` as a URL; ValueError when it is not an absolute http(s) address."""
    try:
        url = URL(base_url)
    except ValueError as error:
        raise ValueError(f"base_url={base_url!r} is not a URL: {error}") from error
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError(
            f"base_url={base_url!r} must be a full address such as http://localhost:8000/v1"
        )
    return url


def _failure(what: str, *, kind: str, url: URL, body: str, tries: int) -> ServerFailure:
    failure = ServerFailure(what + (f" (tried {tries} times)" if tries > 1 else ""))
    failure.kind, failure.url, failure.body, failure.tries = kind, shown(url), body, tries
    return failure


def parse_retry_after(value: str | None) -> float | None:
    """Seconds to wait according to a `Retry-After` header, or None (RFC 9110, section 10.2.3)."""
    if value is None:
        return None
    try:
        seconds = float(value)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def _redirection(url: URL, location: str) -> str:
    """Where requests for `url` are sent on to, and what to do."""
    try:
        target = shown(url.join(URL(location)))
    except ValueError:
        target = location
    return f"it redirects to {target}; use that address, up to and with /v1, as the base URL"


def _join(base: URL, path: str) -> URL:
    return (base / path).with_query(base.query)


def shown(url: URL) -> str:
    """`url` without a user name and password."""
    return str(url.with_user(None) if url.user else url)


async def read_json(response: aiohttp.ClientResponse, started: float = 0.0) -> Any:
    """The reply's body as JSON; BadReply("not_json") when it is not."""
    del started
    content = await response.read()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        text = content[: 4 * BODY_START].decode("utf-8", "replace")
        raise BadReply("not_json", "the reply is not JSON", text) from error
