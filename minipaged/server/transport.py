"""How an answer goes out: at once or as server-sent events, and only as long as somebody is there to read it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # made once: it is called for each token


class ClientGone(Exception):
    """The client closed its connection, or takes nothing any more."""


async def while_there(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives. It is cancelled, and ClientGone raised, when the client goes away. Its body has been read."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for one in (task, watch):
            one.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event(data: dict[str, Any]) -> bytes:
    """
    >>> event({"a": "é"})
    b'data: {"a":"\\xc3\\xa9"}\\n\\n'
    """
    return f"data: {_to_json(data)}\n\n".encode("utf-8", "replace")


class EventStream(Response):
    """first, events: each may be several events in one piece. Whatever happens, events is closed.

    send_seconds: how long a reader may take nothing. Then the connection is cut: what waits to be sent would stay.
    """

    def __init__(self, request: Request, first: bytes, events: AsyncGenerator[bytes, None], send_seconds: float):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._request, self._first, self._events, self._send_seconds = request, first, events, send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._events):
            with contextlib.suppress(ClientGone):
                await while_there(self._request, self._write(send))

    async def _write(self, send: Send) -> None:
        async def body(piece: bytes, more: bool = True) -> None:
            await self._send(send, {"type": "http.response.body", "body": piece, "more_body": more})

        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await self._send(send, start)
        await body(self._first)
        async for piece in self._events:
            await body(piece)
        await body(b"", more=False)

    async def _send(self, send: Send, message: Message) -> None:
        try:
            async with asyncio.timeout(self._send_seconds):
                await send(message)
        except TimeoutError:
            if drop := self._request.scope["state"].get("drop"):
                drop()
            raise ClientGone from None
