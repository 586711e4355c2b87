"""Finds the server and the model to check, and what identifies them. Sends no sample."""

from __future__ import annotations

import asyncio
import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import chz
from yarl import URL

from nanoeval.endpoint.config import APIConfig, EndpointError
from nanoeval.models._http import shown
from nanoeval.models.openai_api import (
    OpenAIModel,
    RequestRefused,
    ServerFailure,
    ServerLacks,
    model_names,
)
from nanoeval.models.probe import probe

# vLLM and MAX, llama.cpp, SGLang, Ollama.
USUAL_PORTS = (8000, 8080, 30000, 11434)
# Headers that tell servers apart; those of single requests (ids, limits, dates) do not.
IDENTIFYING = (
    "server",
    "via",
    "x-powered-by",
    "x-served-by",
    "openai-version",
    "x-inference-engine",
)
UNNAMED = "unnamed"


@dataclass(frozen=True)
class Server:
    """A server that answered, ready for a run. `facts` is kept with the results."""

    model: OpenAIModel
    facts: dict[str, Any]
    notes: list[str] = field(default_factory=list)


async def find_url(ports: Sequence[int] = USUAL_PORTS) -> str:
    """$OPENAI_BASE_URL, else the first of `ports` on this host where such a server listens."""
    if url := os.environ.get("OPENAI_BASE_URL"):
        return url
    urls = [f"http://localhost:{port}/v1" for port in ports]
    for url, is_there in zip(urls, await asyncio.gather(*map(_listens, urls)), strict=True):
        if is_there:
            return url
    raise EndpointError(
        "no server is named and none answers on this host at port"
        f" {', '.join(map(str, ports))}; give --base_url=http://HOST:PORT/v1 or set OPENAI_BASE_URL"
    )


async def _listens(url: str) -> bool:
    # Without the key: who listens there is not known yet.
    model = OpenAIModel(
        name=UNNAMED, base_url=url, api_key="", max_tries=1, timeout=2.0, connect_timeout=1.0
    )
    try:
        return isinstance((await model.get_json("models")).value, dict | list)
    except RequestRefused as error:
        return error.status in {401, 403}
    except ServerFailure as error:
        # It is there, but has no list to give.
        return error.status is not None


async def prepare(
    config: APIConfig,
    needs: frozenset[str],
    params: dict[str, Any],
    preferred: str | None = None,
) -> Server:
    """Choose the model and send one probe request, with the run's `params`.

    Raises EndpointError, one line, for a server or a model that cannot be had or that lacks what is
    needed.
    """
    listed: list[str] = []
    try:
        listed, facts, notes = await _list_models(config)
        model = model_of(config, config.model or _choose(listed, preferred, config.url, notes))
        found = await probe(model, needs or {"text"}, params)
    except RequestRefused as error:
        raise EndpointError(_explain(error, config, listed)) from error
    except (ServerFailure, ServerLacks, ValueError) as error:
        raise EndpointError(str(error)) from error
    if listed and config.model is not None and config.model not in listed:
        notes.append(
            f"the server does not list the model {config.model!r} but answers to it; listed:"
            f" {_shown(listed)}"
        )
    if found.completion is not None:
        facts["reported_model"] = (found.completion.raw or {}).get("model")
    notes += found.notes
    return Server(found.model, {**facts, "notes": notes}, notes)


def model_of(config: APIConfig, name: str) -> OpenAIModel:
    """The model object of a check; it bounds the requests in flight."""
    try:
        return OpenAIModel(
            name=name,
            base_url=config.url,
            api_key=config.api_key,
            api_key_env=config.api_key_env,
            api=config.api,
            params=dict(config.gen_kwargs),
            stream=config.stream,
            timeout=config.timeout,
            connect_timeout=config.connect_timeout,
            max_tries=config.max_tries,
            num_concurrent=config.num_concurrent,
        )
    except ValueError as error:
        raise EndpointError(str(error)) from error


async def _list_models(config: APIConfig) -> tuple[list[str], dict[str, Any], list[str]]:
    """The models listed, the facts and the notes; a server without a list is met with a note."""
    model = chz.replace(model_of(config, UNNAMED), max_tries=1, timeout=min(config.timeout, 10.0))
    facts: dict[str, Any] = {
        "base_url": shown(URL(model.get_base_url())),
        "models": [],
        "headers": {},
    }
    try:
        exchange = await model.get_json("models")
    except ServerFailure as error:
        if error.kind == "connection":
            raise EndpointError(f"{error}; is the server up, and is --base_url right?") from error
        return [], facts, [f"the server does not list its models ({error})"]
    except RequestRefused as error:
        if error.status in {401, 403}:
            raise
        return [], facts, [f"the server does not list its models ({error})"]
    listed = model_names(exchange.value)
    headers = {name.lower(): value for name, value in exchange.headers.items()}
    facts["models"] = listed
    facts["headers"] = {name: headers[name] for name in IDENTIFYING if name in headers}
    return listed, facts, []


def _choose(listed: list[str], preferred: str | None, url: str, notes: list[str]) -> str:
    if preferred is not None and preferred in listed:
        return preferred
    if len(listed) == 1:
        return listed[0]
    if listed:
        raise EndpointError(
            f"{url} serves {len(listed)} models: {_shown(listed)}; choose with --model"
        )
    what = f"{url} does not say which models it serves; name one with --model"
    raise EndpointError("; ".join([what, *notes]))


def _explain(error: RequestRefused, config: APIConfig, listed: list[str]) -> str:
    if error.status in {401, 403}:
        return f"{error}; set OPENAI_API_KEY to a key that this server accepts"
    if config.model is not None and listed and config.model not in listed:
        near = difflib.get_close_matches(config.model, listed, n=1)
        hint = f" (the nearest: {near[0]})" if near else ""
        return f"{error}; the server lists {_shown(listed)}{hint}, not {config.model!r}"
    if error.status == 404:
        return f"{error}; does --base_url end where the API begins, as a rule in /v1?"
    return str(error)


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
