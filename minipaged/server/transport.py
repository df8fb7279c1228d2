"""How an answer goes out: at once or as server-sent events, and only as long as somebody is there to read it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


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
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode("utf-8", "replace")


class EventStream(Response):
    """events: each may be several events in one piece. Whatever happens, it is closed.

    send_seconds: how long a reader may take nothing.
    """

    def __init__(self, request: Request, events: AsyncIterator[bytes], send_seconds: float):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._request, self._events, self._send_seconds = request, events, send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientGone):
            await while_there(self._request, self._write(send))

    async def _write(self, send: Send) -> None:
        async with contextlib.aclosing(self._events) as events:  # type: ignore[type-var]
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for piece in events:
                try:
                    async with asyncio.timeout(self._send_seconds):
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                except TimeoutError:
                    raise ClientGone from None
            await send({"type": "http.response.body", "body": b"", "more_body": False})
