"""What happens to every HTTP request before anybody works for it, and when it is over.

It gets an id. It needs a key, if there are keys; it must not come when too many wait or when the server is about to
end; its body must not be too long, nor take too long to come. When it is over, a line in the log says so.

This is ASGI without a framework's wrapping, since what is wrapped there no longer sees that a client went away.
"""

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minipaged.server.config import ServerConfig
from minipaged.server.errors import ApiError
from minipaged.server.transport import ClientGone

if TYPE_CHECKING:  # a router has these manners too, and no engine: it needs no PyTorch
    from minipaged.async_llm import AsyncLLM

log = logging.getLogger("minipaged.server")

GENERATING = ("/v1/completions", "/v1/chat/completions")
UNFIT = re.compile(r"[^!-~]")  # of an id: it goes into the log and into a header
NEED_A_KEY = ("/v1/", "/tokenize", "/detokenize", "/abort", "/live")


@dataclass
class Visit:
    """One HTTP request. said: what its log line tells besides."""

    id: str
    has_own_name: bool = False  # the client gave it its id
    said: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    told: int | None = None  # the status that went out
    status: int | None = 499  # the same, once all went out; until then: the client went away
    is_guest: bool = False  # it was let in, to have something generated
    in_line: bool = False  # it counts as waiting, and the engine does not know of it yet


class Host(Protocol):
    """Whoever lets requests in. num_guests: those under way. closing: nobody is let in any more."""

    config: ServerConfig
    num_guests: int
    closing: bool

    def enter(self, visit: Visit) -> None: ...
    def leave(self, visit: Visit) -> None: ...
    def shutdown(self) -> None: ...


@dataclass
class House:
    """What all requests to an engine have in common.

    num_coming: those that the engine doesn't know of yet. under_way: of each id that a client knows, those of the
    engine's requests.
    """

    llm: "AsyncLLM"
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

    def enter(self, visit: Visit) -> None:
        """Before any work. ApiError if nobody is let in now."""
        if self.closing:
            raise ApiError(503, "the server is about to end", retry_after=self.config.drain_seconds)
        self.check_room(1, 0)
        self.num_guests, self.num_coming = self.num_guests + 1, self.num_coming + 1
        visit.is_guest = visit.in_line = True

    def leave(self, visit: Visit) -> None:
        self.known(visit)
        self.num_guests -= visit.is_guest

    def shutdown(self) -> None:
        """Who is still under way is told that it ends."""
        self.llm.shutdown()

    def check_room(self, num_requests: int, num_tokens: int) -> None:
        """ApiError 429 if so many more would be too many."""
        most, tokens = self.config.max_queued_requests, sum(self.llm.waiting.values())
        if self.num_queued and self.num_queued + num_requests > most:  # a long list comes in when nobody waits
            raise ApiError(429, f"{self.num_queued} requests wait already, and {most} may: come again", retry_after=1)
        if self.llm.waiting and tokens + num_tokens > self.config.max_queued_tokens:
            raise ApiError(
                429, f"{tokens} tokens of prompts wait already, and {self.config.max_queued_tokens} may: come again",
                retry_after=1,
            )  # fmt: skip


class Manners:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp, house: Host):
        self._app, self._house, self._config = app, house, house.config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = UNFIT.sub("", _header(scope, b"x-request-id").decode("latin-1"))[:200]
        visit = Visit(given or uuid.uuid4().hex, bool(given))
        scope.setdefault("state", {})["visit"] = visit

        async def send_noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.told = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", visit.id.encode())]
                if visit.told == 408:  # the rest of its body may come when it likes: nobody waits for it
                    message["headers"].append((b"connection", b"close"))
            try:
                await send(message)
            except RuntimeError as error:  # uvloop's, of a connection that was reset just now
                if "closed" not in str(error):
                    raise
                await asyncio.sleep(0)  # then uvicorn knows it, too
                return
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                visit.status = visit.told

        try:
            await self._receive_and_answer(visit, scope, receive, send_noting)
        except ClientGone:
            pass
        except Exception:  # a mistake of ours
            log.exception("%s", visit.id)
            if visit.told is None:
                await ApiError(500, "the server made a mistake; its log says which").response()(
                    scope, receive, send_noting
                )
            visit.status = 500
        finally:
            self._house.leave(visit)
            _log(scope, visit)

    async def _receive_and_answer(self, visit: Visit, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check_key(scope)
            if scope["path"] in GENERATING and scope["method"] == "POST":
                self._house.enter(visit)
            body = await self._body(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
        else:
            await self._app(scope, _Known(body, receive), send)

    def _check_key(self, scope: Scope) -> None:
        if not self._config.api_keys or scope["method"] == "OPTIONS" or not scope["path"].startswith(NEED_A_KEY):
            return
        scheme, _, given = _header(scope, b"authorization").partition(b" ")
        keys = [hmac.compare_digest(given.strip(), key.encode()) for key in self._config.api_keys]
        if scheme.lower() != b"bearer" or not any(keys):
            raise ApiError(401, "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """All of it, if it keeps to the limits. ClientGone if the client goes away meanwhile."""
        most, seconds = self._config.max_body_bytes, self._config.body_seconds
        told, body, more = _header(scope, b"content-length"), bytearray(), True
        size = int(told) if told.isdigit() else 0
        try:
            async with asyncio.timeout(seconds):
                while more and size <= most:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    body += message.get("body", b"")
                    size, more = max(size, len(body)), message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {seconds:g} s") from None
        if size > most:
            raise ApiError(413, f"the body is too long: at most {most} bytes are read")
        return bytes(body)


class _Known:
    """Gives the body that has been read; from then on there is only the message that the client went away."""

    def __init__(self, body: bytes, receive: Receive):
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> MutableMapping[str, Any]:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def _log(scope: Scope, visit: Visit) -> None:
    quiet = scope["path"] in ("/health", "/metrics", "/live")
    seconds = time.monotonic() - visit.began
    with_kind = visit.said.get("id", "").endswith(visit.id)  # cmpl-..., as the client knows it
    name = visit.said.pop("id") if with_kind else visit.id
    told = "".join(f" {key}={value}" for key, value in visit.said.items())
    line = f"{name} {scope['method']} {scope['path'].replace(' ', '%20')} {visit.status} {seconds:.3f}s{told}"
    printable = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in line)  # no line breaks from outside
    log.log(logging.DEBUG if quiet else logging.INFO, "%s", printable)
