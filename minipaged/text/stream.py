"""From the thread that makes outputs to those who read them, in their event loops.

Who reads slowly finds the newest state of each request, and no queue of all that was between.
"""

import asyncio
from collections.abc import Callable
from typing import Self

from minipaged.requests.request import Request
from minipaged.text.mailbox import Mailbox
from minipaged.text.outputs import RequestOutput

News = RequestOutput | BaseException | None  # a state, why there will be none, or that it has begun


class Stream:
    """The outputs of some requests as they grow: of each its newest state. In one event loop."""

    def __init__(self, requests: list[Request], abort: Callable[["Stream"], None]):
        self.requests, self.loop, self._begun = requests, asyncio.get_running_loop(), asyncio.Event()
        self._abort, self._left = abort, {request.request_id for request in requests}
        self._newest: dict[str, RequestOutput] = {}
        self._told: dict[str, RequestOutput] = {}  # of requests that are told only what is new
        self._error: BaseException | None = None
        self._news = asyncio.Event()

    def put(self, what: News) -> None:
        self._begun.set()
        if isinstance(what, BaseException):
            self._error = what
        elif what is not None:
            self._newest[what.request_id] = what
        self._news.set()

    async def begin(self) -> None:
        """Until the first of them is no longer waiting. ValueError if they were refused, EngineDeadError as ever."""
        await self._begun.wait()
        if self._error is not None and not self._newest:
            raise self._error

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._newest:
            if self._error is not None:
                raise self._error
            if not self._left:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        name = next(iter(self._newest))
        output = self._newest.pop(name)
        if output.finished:
            self._left.discard(name)
        if output.only_new:
            told, self._told[name] = self._told.get(name), output
            return output.since(told)
        return output

    def close(self) -> None:
        """Abort what is not finished. Twice does no harm."""
        if self._left and self._error is None:
            self._abort(self)
        self._left.clear()
        self._newest.clear()
        self._news.set()


class WholeStates(Mailbox):
    """Gives whole states: what is new in them, a stream knows, which may have been told less."""

    def take(self) -> list[RequestOutput]:
        self._taken, self._waiting = self._waiting, {}
        return list(self._taken.values())


def tell(news: list[tuple[Stream, News]]) -> list[Stream]:
    """Hand over what is new, to each event loop at once. Returns the streams whose loop is gone."""
    gone = []
    for loop in {stream.loop for stream, _ in news}:
        its = [(stream, what) for stream, what in news if stream.loop is loop]
        try:
            loop.call_soon_threadsafe(_put_all, its)
        except RuntimeError:  # closed
            gone += [stream for stream, _ in its]
    return gone


def _put_all(news: list[tuple[Stream, News]]) -> None:
    for stream, what in news:
        stream.put(what)
