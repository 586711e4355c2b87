"""What is said of a server before the first sample."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from nanoeval.endpoint.config import APIConfig, EndpointError
from nanoeval.endpoint.server import Server, prepare

COMPLETION = {"choices": [{"index": 0, "message": {"content": "ready"}, "finish_reason": "stop"}]}


class Listing:
    """A server that completes everything, and lists its models as a test says."""

    url = ""
    models: Any = None

    async def list_models(self, request: web.Request) -> web.Response:
        return (
            self.models if isinstance(self.models, web.Response) else web.json_response(self.models)
        )

    async def complete(self, request: web.Request) -> web.Response:
        return web.json_response(COMPLETION)


@pytest.fixture
async def listing() -> AsyncIterator[Listing]:
    listing = Listing()
    app = web.Application()
    app.router.add_get("/v1/models", listing.list_models)
    app.router.add_post("/v1/chat/completions", listing.complete)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    listing.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    yield listing
    await runner.cleanup()


async def prepared(listing: Listing, **fields: Any) -> Server:
    return await prepare(APIConfig(listing.url, **fields), frozenset(), {"temperature": 0})


@pytest.mark.parametrize(
    ("models", "reason"),
    [
        (web.Response(status=404, text="nope"), "HTTP 404 Not Found: nope"),
        (web.Response(status=502, text="bad gateway"), "HTTP 502 Bad Gateway: bad gateway"),
        (web.Response(text="<html>Login"), "the reply is not JSON: <html>Login"),
    ],
)
async def test_reason_for_the_missing_list_is_told(
    listing: Listing, models: web.Response, reason: str
) -> None:
    """A gateway that is down reads like a server that has no list."""
    listing.models = models
    with pytest.raises(EndpointError, match=f"name one with --model; .*{re.escape(reason)}"):
        await prepared(listing)


@pytest.mark.parametrize(
    "models", [[{"id": "m"}], {"data": [{"id": "m"}, {"id": "m"}]}, {"data": [{"id": "m"}, 5]}]
)
async def test_one_model_is_found_in_every_form_of_list(listing: Listing, models: Any) -> None:
    """A model that is listed twice is no choice to be made."""
    listing.models = models
    assert (await prepared(listing)).model.name == "m"


async def test_list_of_another_form_names_no_model(listing: Listing) -> None:
    """A traceback says nothing to who has to add --model."""
    listing.models = {"data": 5}
    with pytest.raises(EndpointError, match="does not say which models it serves; name one with"):
        await prepared(listing)


async def test_parameter_that_would_replace_the_question_is_refused(listing: Listing) -> None:
    """`--gen_kwargs prompt=...` would end in a traceback, or change every question."""
    listing.models = [{"id": "m"}]
    with pytest.raises(EndpointError, match="the request parameter prompt='abc' would replace"):
        await prepared(listing, gen_kwargs={"prompt": "abc"})
