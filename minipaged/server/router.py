"""The router: an application in front of many servers, which its clients take for one.

Whatever is asked goes to one of them; an abort goes to all; /health, /metrics and / are the router's own.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from minipaged.server.config import ServerConfig
from minipaged.server.errors import ApiError, error_object
from minipaged.server.fleet import Fleet
from minipaged.server.manners import Manners, Visit
from minipaged.server.proxy import Asked, Talk, forward
from minipaged.server.routing import PIECE, Pieces, PrefixAffinity, cut
from minipaged.server.transport import ClientGone, EventStream, while_there

FORWARDED = "/v1/", "/tokenize", "/detokenize", "/version", "/openapi.json"


class Lobby:
    """What all requests to a router have in common: manners.Host."""

    def __init__(self, fleet: Fleet, config: ServerConfig):
        self.fleet, self.config, self.num_guests, self.closing = fleet, config, 0, False
        self.loop: asyncio.AbstractEventLoop | None = None

    def enter(self, visit: Visit) -> None:
        if self.closing:
            raise ApiError(503, "the router is about to end", retry_after=self.config.drain_seconds)
        self.num_guests += 1
        visit.is_guest = True

    def leave(self, visit: Visit) -> None:
        self.num_guests -= visit.is_guest

    def shutdown(self) -> None:
        assert self.loop
        asyncio.run_coroutine_threadsafe(self.fleet.cut(), self.loop).result()


def create_router(fleet: Fleet, config: ServerConfig) -> Starlette:
    """The application. app.state.house: what its requests have in common."""
    lobby, metrics = Lobby(fleet, config), Metrics(fleet)
    door = Door(lobby, metrics)

    @contextlib.asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        lobby.loop = asyncio.get_running_loop()
        await fleet.open()
        try:
            yield
        finally:
            await fleet.close()

    async def told_metrics(http: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    routes = [
        Route("/health", door.health), Route("/metrics", told_metrics), Route("/", door.page),
        Route("/abort", door.abort, methods=["POST"]),
        Route("/{path:path}", door.forward, methods=["GET", "POST", "OPTIONS", "HEAD", "PUT", "DELETE", "PATCH"]),
    ]  # fmt: skip
    handlers: dict[Any, Any] = {ApiError: _refused, HTTPException: _no_route, ClientGone: _gone}
    app = Starlette(routes=routes, lifespan=life, exception_handlers=handlers)
    app.router.redirect_slashes = False
    app.state.house = lobby
    app.add_middleware(Manners, house=lobby)
    return app


class Door:
    """The routes."""

    def __init__(self, lobby: Lobby, metrics: "Metrics"):
        self._lobby, self._fleet, self._metrics = lobby, lobby.fleet, metrics

    async def forward(self, http: Request) -> Response:
        if not http.url.path.startswith(FORWARDED):
            raise HTTPException(404)
        asked = asked_by(http, await http.body())
        talk, first, rest = await while_there(http, forward(self._fleet, asked))
        self._metrics.answered.labels(talk.url, str(talk.status)).inc()
        http.state.visit.said["by"] = talk.url
        answer: Response
        if talk.streams:
            answer = EventStream(http, first, rest, self._lobby.config.send_seconds)
        else:
            await rest.aclose()
            answer = Response(first)
        answer.status_code = talk.status
        answer.headers.update(talk.headers)
        return answer

    async def abort(self, http: Request) -> Response:
        """By all: who has it is not known. The answer is that of one who takes it for a good question."""
        asked = asked_by(http, await http.body())
        talks = [Talk(self._fleet, url, asked) for url in self._fleet.policy.live]
        found = await asyncio.gather(*(_whole(talk) for talk in talks), return_exceptions=True)
        answers = [(talk, body) for talk, body in zip(talks, found, strict=True) if isinstance(body, bytes)]
        if not answers:
            raise ApiError(503, "no replica can be reached: come again", retry_after=1)
        talk, body = min(answers, key=lambda answer: answer[0].status)
        return Response(body, talk.status, talk.headers)

    async def health(self, http: Request) -> Response:
        """200 if at least one lives."""
        said = self._state()
        if self._lobby.closing:
            said |= {"error": error_object(503, "the router is about to end")}
        elif not self._fleet.policy.live:
            said |= {"error": error_object(503, "no replica can be reached")}
        return JSONResponse(said, 503 if "error" in said else 200)

    def _state(self) -> dict[str, Any]:
        policy = self._fleet.policy
        replicas = [
            {"url": url, "lives": url in policy.live, "outstanding": policy.load.get(url, 0), "why": replica.why}
            for url, replica in self._fleet.replicas.items()
        ]
        return {"live": len(policy.live), "replicas": replicas}

    async def page(self, http: Request) -> Response:
        """Where the replicas are."""
        state = self._state()
        lines = [f"{state['live']} of {len(state['replicas'])} replicas live. Each has a page, at its address:", ""]
        for one in state["replicas"]:
            lines.append(f"{one['url']}  " + (f"{one['outstanding']} under way" if one["lives"] else one["why"]))
        return PlainTextResponse("\n".join([*lines, ""]))


async def _whole(talk: Talk) -> bytes:
    return b"".join([piece async for piece in talk.pieces()])


# --- what is asked ----------------------------------------------------------------------------------------------------


def asked_by(http: Request, body: bytes) -> Asked:
    query = http.scope["query_string"].decode("latin-1")
    target = http.scope["raw_path"].decode("latin-1") + (f"?{query}" if query else "")
    headers = dict(http.headers) | {"x-request-id": http.state.visit.id}
    read = read_object(body)
    return Asked(http.method, target, headers, body, pieces_of(read), load_of(read))


def read_object(body: bytes) -> dict[str, Any]:
    """What it says, if it is a JSON object. What is wrong with it a replica says."""
    try:
        read = json.loads(body) if body else {}
    except (ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def pieces_of(body: dict[str, Any]) -> Pieces:
    """Of a prompt's beginning: texts, or tuples of token ids. Of several prompts the first one counts.

    >>> pieces_of({"prompt": [1, 2, 3] * 6})
    [(None, None, (1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1))]
    """
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        pieces: list[Any] = list(cut(prompt))
    elif isinstance(prompt, list):
        pieces = [tuple(piece) for piece in _blocks(prompt)]
    else:
        pieces = list(cut(_conversation(body)))
    if pieces:
        salt, model = body.get("cache_salt"), body.get("model")
        pieces[0] = (str(model) if model else None, str(salt) if salt else None, pieces[0])
    return pieces


def _blocks(tokens: list[Any], size: int = PIECE // 4) -> Iterator[list[Any]]:
    if all(isinstance(token, int) for token in tokens):
        for i in range(0, len(tokens) - size + 1, size):
            yield tokens[i : i + size]


def _conversation(body: dict[str, Any]) -> str:
    """The messages as a text: no template's, but the same for the same beginning."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        return ""
    tools = json.dumps(body["tools"]) if body.get("tools") else ""
    return tools + "".join(json.dumps(message, ensure_ascii=False) for message in messages)


def load_of(body: dict[str, Any]) -> int:
    """Sequences that are wanted."""
    prompt, count = body.get("prompt"), body.get("n")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else 1
    return prompts * (count if type(count) is int and count > 0 else 1)


# --- what is told -----------------------------------------------------------------------------------------------------


async def _refused(http: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _no_route(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = f"{http.method} {http.url.path}: {error.detail}"
    return JSONResponse({"error": error_object(error.status_code, said)}, error.status_code, error.headers)


async def _gone(http: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


class Metrics:
    """registry: what /metrics writes. Of the replicas themselves: see theirs."""

    def __init__(self, fleet: Fleet):
        self._fleet, self.registry = fleet, CollectorRegistry()
        self.answered = Counter(
            "minipaged_router_requests", "answers by replica and status", ("replica", "status"), registry=self.registry
        )
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        policy, fleet = self._fleet.policy, self._fleet
        lives = GaugeMetricFamily("minipaged_router_replica_lives", "1 if it does", labels=["replica"])
        load = GaugeMetricFamily("minipaged_router_outstanding", "sequences under way", labels=["replica"])
        for url in fleet.replicas:
            lives.add_metric([url], url in policy.live)
            load.add_metric([url], policy.load.get(url, 0))
        yield from (lives, load)
        counts = {"retries": ("requests sent elsewhere, since a replica was lost or refused them", fleet.num_retries),
                  "broken_streams": ("streams whose replica was lost in the middle", fleet.num_broken)}  # fmt: skip
        if isinstance(policy, PrefixAffinity):
            counts |= {"pieces": (f"of prompts, of {PIECE} characters", policy.queried),
                       "pieces_found": ("of them expected in the replica's memory", policy.found)}  # fmt: skip
        for name, (about, value) in counts.items():
            yield CounterMetricFamily(f"minipaged_router_{name}", about, value)
