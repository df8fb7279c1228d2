"""The router: an application in front of many servers, which its clients take for one.

Whatever is asked goes to one of them; an abort goes to all; /health, /metrics and / are the router's own.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from minipaged.routing.fleet import Fleet
from minipaged.routing.forwarded import asked_by
from minipaged.routing.handover import compute, go_on, release
from minipaged.routing.policies import PIECE
from minipaged.routing.proxy import Answering, Asked, Talk, forward
from minipaged.server.config import ServerConfig
from minipaged.server.errors import ApiError, error_object
from minipaged.server.manners import GENERATING, Manners, Visit
from minipaged.server.transport import ClientGone, EventStream, while_there

FORWARDED = "/v1/", "/tokenize", "/detokenize", "/version", "/openapi.json"


class Lobby:
    """What all requests to a router have in common: manners.Host.

    fleet: who answers. prefill: who computes prompts before that, if there are such servers.
    """

    def __init__(self, fleet: Fleet, prefill: Fleet | None, config: ServerConfig):
        self.fleet, self.prefill, self.config, self.num_guests, self.closing = fleet, prefill, config, 0, False
        self.fleets = {"decode": fleet, "prefill": prefill} if prefill else {"": fleet}
        self.loop: asyncio.AbstractEventLoop | None = None

    def enter(self, visit: Visit) -> None:
        if self.closing:
            raise ApiError(503, "the router is about to end", retry_after=self.config.drain_seconds)
        self.num_guests += 1
        visit.is_guest = True

    def leave(self, visit: Visit) -> None:
        self.num_guests -= visit.is_guest

    def shutdown(self) -> None:
        """Who is still under way is told that it ends: in the middle of a stream, too."""
        assert self.loop
        for fleet in self.fleets.values():
            asyncio.run_coroutine_threadsafe(fleet.cut(), self.loop).result()


def create_router(fleet: Fleet, config: ServerConfig, prefill: Fleet | None = None) -> Starlette:
    """The application. app.state.house: what its requests have in common. prefill: see Lobby."""
    lobby = Lobby(fleet, prefill, config)
    metrics = Metrics(lobby.fleets)
    door = Door(lobby, metrics)

    @contextlib.asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        lobby.loop = asyncio.get_running_loop()
        for one in lobby.fleets.values():
            await one.open()
        try:
            yield
        finally:
            for one in lobby.fleets.values():
                await one.close()

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
        self._releases: set[asyncio.Task[None]] = set()  # the event loop itself doesn't hold on to tasks

    async def forward(self, http: Request) -> Response:
        if not http.url.path.startswith(FORWARDED):
            raise HTTPException(404)
        asked = asked_by(http, await http.body())
        talk, first, rest = await while_there(http, self._answer(asked, http.url.path))
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

    async def _answer(self, asked: Asked, path: str) -> Answering:
        first = self._lobby.prefill
        if first is None or asked.method != "POST" or path not in GENERATING:
            return await forward(self._fleet, asked)
        kept = await compute(first, asked)
        if kept is None:
            return await forward(self._fleet, asked)
        taken = False
        try:
            answering = await forward(self._fleet, go_on(asked, kept))
            taken = answering[0].status == 200
            return answering
        finally:
            if not taken:  # in a task of its own: the client may have gone, and this one with it
                task = asyncio.create_task(release(first, asked, kept))
                self._releases.add(task)
                task.add_done_callback(self._releases.discard)

    async def abort(self, http: Request) -> Response:
        """By all: who has it is not known. The answer is that of one who takes it for a good question."""
        asked = asked_by(http, await http.body())
        talks = [Talk(fleet, url, asked) for fleet in self._lobby.fleets.values() for url in fleet.policy.live]
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
        replicas = [
            {"url": url, "lives": url in fleet.policy.live, "outstanding": fleet.policy.load.get(url, 0),
             "why": replica.why} | ({"role": role} if role else {})
            for role, fleet in self._lobby.fleets.items() for url, replica in fleet.replicas.items()
        ]  # fmt: skip
        size = sum(fleet.size for fleet in self._lobby.fleets.values())
        return {"live": sum(one["lives"] for one in replicas), "of": size, "replicas": replicas}

    async def page(self, http: Request) -> Response:
        """Where the replicas are."""
        state = self._state()
        lines = [f"{state['live']} of {state['of']} replicas live. Each has a page, at its address:", ""]
        for one in state["replicas"]:
            said = f"{one['outstanding']} under way" if one["lives"] else one["why"]
            lines.append(f"{one['url']}  {one.get('role', '')}  {said}")
        return PlainTextResponse("\n".join([*lines, ""]))


async def _whole(talk: Talk) -> bytes:
    return b"".join([piece async for piece in talk.pieces()])


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
    """registry: what /metrics writes. Of the replicas themselves: see theirs. fleets: by role."""

    def __init__(self, fleets: Mapping[str, Fleet]):
        self._fleets, self.registry = fleets, CollectorRegistry()
        about = "answers by replica and status"
        self.answered = Counter("minipaged_router_requests", about, ("replica", "status"), registry=self.registry)
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        lives = GaugeMetricFamily("minipaged_router_replica_lives", "1 if it does", labels=["role", "replica"])
        load = GaugeMetricFamily("minipaged_router_outstanding", "sequences under way", labels=["role", "replica"])
        for role, fleet in self._fleets.items():
            for url in fleet.replicas:
                lives.add_metric([role, url], url in fleet.policy.live)
                load.add_metric([role, url], fleet.policy.load.get(url, 0))
        yield from (lives, load)
        for name, (about, count) in COUNTERS.items():
            counter = CounterMetricFamily(f"minipaged_router_{name}", about, labels=["role"])
            for role, fleet in self._fleets.items():
                counter.add_metric([role], count(fleet))
            yield counter


COUNTERS: dict[str, tuple[str, Callable[[Fleet], float]]] = {
    "retries": ("requests sent elsewhere, since a replica was lost or refused them", lambda fleet: fleet.num_retries),
    "broken_streams": ("streams whose replica was lost in the middle", lambda fleet: fleet.num_broken),
    "pieces": (f"of prompts, of {PIECE} characters", lambda fleet: getattr(fleet.policy, "queried", 0)),
    "pieces_found": ("of them expected in a replica's memory", lambda fleet: getattr(fleet.policy, "found", 0)),
}
