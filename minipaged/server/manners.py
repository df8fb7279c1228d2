"""What happens to every HTTP request before anybody works for it, and when it is over.

It gets an id. It needs a key, if there are keys; it must not come when too many wait or when the server is about to
end; its body must not be too long, nor take too long to come. When it is over, a line in the log says so.

This is ASGI without a framework's wrapping, since what is wrapped there no longer sees that a client went away.
"""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minipaged.async_llm import AsyncLLM
from minipaged.server.config import ServerConfig
from minipaged.server.errors import ApiError

log = logging.getLogger("minipaged.server")

GENERATING = ("/v1/completions", "/v1/chat/completions")
NEED_A_KEY = ("/v1/", "/tokenize", "/detokenize", "/abort", "/live")


@dataclass
class Visit:
    """One HTTP request. said: what its log line tells besides."""

    id: str
    said: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    status: int = 499  # until it is told: the client went away
    is_guest: bool = False  # it was let in, to have something generated
    in_line: bool = False  # it counts as waiting, and the engine does not know of it yet


@dataclass
class House:
    """What all requests have in common.

    num_guests: those under way. num_coming: those that the engine doesn't know of yet.
    closing: nobody is let in any more. under_way: of each id that a client knows, those of the engine's requests.
    """

    llm: AsyncLLM
    config: ServerConfig
    num_guests: int = 0
    num_coming: int = 0
    closing: bool = False
    under_way: dict[str, list[str]] = field(default_factory=dict)

    @property
    def num_queued(self) -> int:
        return len(self.llm.waiting) + self.num_coming

    def known(self, visit: Visit) -> None:
        """The engine knows of it now, or never will."""
        self.num_coming -= visit.in_line
        visit.in_line = False

    def check_room(self, num_requests: int, num_tokens: int) -> None:
        """ApiError 429 if so many more would be too many."""
        most, tokens = self.config.max_queued_requests, sum(self.llm.waiting.values())
        if self.num_queued + num_requests > most:
            raise ApiError(429, f"{self.num_queued} requests wait already, and {most} may: come again", retry_after=1)
        if self.llm.waiting and tokens + num_tokens > self.config.max_queued_tokens:
            raise ApiError(
                429, f"{tokens} tokens of prompts wait already, and {self.config.max_queued_tokens} may: come again",
                retry_after=1,
            )  # fmt: skip


class Manners:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp, house: House):
        self._app, self._house, self._config = app, house, house.config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = Visit(_header(scope, b"x-request-id")[:200] or uuid.uuid4().hex)
        scope.setdefault("state", {})["visit"] = visit
        generating = scope["path"] in GENERATING and scope["method"] == "POST"

        async def send_noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", visit.id.encode("latin-1", "replace"))]
            await send(message)

        try:
            self._check_key(scope)
            if generating:
                self._enter(visit)
            await self._app(scope, _Body(receive, scope, self._config).receive, send_noting)
        except ApiError as error:
            await error.response()(scope, receive, send_noting)
        except Exception as error:
            log.exception("%s", visit.id)
            if visit.status != 499:  # it began to answer: all that is left is to break off
                raise
            said = ApiError(500, f"a mistake in the server: {type(error).__name__}")
            await said.response()(scope, receive, send_noting)
        finally:
            if generating:
                self._house.known(visit)
                self._house.num_guests -= visit.is_guest
            _log(scope, visit)

    def _check_key(self, scope: Scope) -> None:
        if not self._config.api_keys or scope["method"] == "OPTIONS" or not scope["path"].startswith(NEED_A_KEY):
            return
        given = _header(scope, b"authorization").encode()
        keys = [hmac.compare_digest(given, f"Bearer {key}".encode()) for key in self._config.api_keys]
        if not any(keys):
            raise ApiError(401, "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'")

    def _enter(self, visit: Visit) -> None:
        if self._house.closing:
            raise ApiError(503, "the server is about to end", retry_after=self._config.drain_seconds)
        self._house.check_room(1, 0)
        self._house.num_guests, visit.is_guest = self._house.num_guests + 1, True
        self._house.num_coming += 1
        visit.in_line = True


class _Body:
    """Receives a body, as long as it keeps to the limits."""

    def __init__(self, receive: Receive, scope: Scope, config: ServerConfig):
        self._receive, self._config = receive, config
        self._left, self._complete = config.max_body_bytes, False
        told = _header(scope, b"content-length")
        if told.isdecimal() and int(told) > self._left:
            raise self._too_long()
        self._until = time.monotonic() + config.body_seconds

    async def receive(self) -> MutableMapping[str, Any]:
        if self._complete:  # from now on there is only the message that the client went away
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._until - time.monotonic())
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self._config.body_seconds:g} s") from None
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise self._too_long()
        self._complete = not message.get("more_body", False)
        return message

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the body is too long: at most {self._config.max_body_bytes} bytes are read")


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _log(scope: Scope, visit: Visit) -> None:
    quiet = scope["path"] in ("/health", "/metrics", "/live")
    seconds = time.monotonic() - visit.began
    told = "".join(f" {name}={value}" for name, value in visit.said.items())
    name, path = (json.dumps(text)[1:-1] for text in (visit.id, scope["path"]))  # no line breaks from outside
    line = f"{name} {scope['method']} {path} {visit.status} {seconds:.3f}s{told}"
    log.log(logging.DEBUG if quiet else logging.INFO, "%s", line)
