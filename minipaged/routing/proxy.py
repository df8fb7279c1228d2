"""One request forwarded: to whom, what if that one is lost, and how its answer comes back.

Until the client has a byte of the answer, the request may go elsewhere. From then on it can't: a stream whose replica
is lost ends with an error event that says so, and with [DONE].
"""

import contextlib
from collections.abc import AsyncGenerator

import aiohttp
from yarl import URL

from minipaged.routing.fleet import BROKEN, Fleet, Replica, reason
from minipaged.routing.forwarded import OF_A_CONNECTION, Asked
from minipaged.server.errors import ApiError
from minipaged.server.transport import DONE, event

MOST_LOST = 2  # replicas that a request is lost with, before it counts as its own fault: it must not end all of them
MOST_REFUSALS = 3  # replicas that say 429 or 503, before the client is told
REFUSALS = 429, 503
NOT_REACHED = aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError
ENDS = b"\n\n", b"\r\n\r\n"  # of an event
NOT_TOLD = OF_A_CONNECTION | {"content-length", "date", "server", "x-request-id"}  # we tell our own


class Lost(Exception):
    """A replica couldn't be reached, or its connection broke. sent: it may have begun to work."""

    def __init__(self, why: str, sent: bool):
        super().__init__(why)
        self.sent = sent


class Talk:
    """A request to one replica. status, headers: of its answer, once `pieces` gave the first."""

    def __init__(self, fleet: Fleet, url: str, asked: Asked):
        self.url, self._fleet, self._asked = url, fleet, asked
        self.status, self.headers, self.streams = 0, dict[str, str](), False

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The answer's bytes: all at once; or of a stream whole events as they come. Lost before the first only."""
        policy, asked, begun = self._fleet.policy, self._asked, False
        policy.begin(self.url, asked.pieces, asked.load)
        try:
            replica = self._replica()
            async with self._request(replica) as response, contextlib.aclosing(self._read(replica, response)) as read:
                async for piece in read:
                    begun = True
                    yield piece
        except BROKEN as error:
            why = reason(error)
            self._fleet.lost(self.url, why)
            if not begun:
                raise Lost(why, not isinstance(error, NOT_REACHED)) from None
            self._fleet.num_broken += 1
            yield broken_off(why)
        finally:
            policy.end(self.url, asked.load)

    def _replica(self) -> Replica:
        if self.url not in self._fleet.replicas:
            raise Lost("it has ended", sent=False)
        return self._fleet.replicas[self.url]

    def _request(self, replica: Replica) -> "aiohttp.client._RequestContextManager":
        asked = self._asked
        return replica.session.request(
            asked.method, URL(self.url + asked.target, encoded=True), headers=asked.headers_on(),
            data=asked.body or None, allow_redirects=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent", "Content-Type"),
        )  # fmt: skip

    async def _read(self, replica: Replica, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        self.status, self.streams = response.status, response.content_type == "text/event-stream"
        self.headers = {name: value for name, value in response.headers.items() if name.lower() not in NOT_TOLD}
        replica.answers.add(response)
        try:
            if self.streams:
                async for piece in whole_events(response.content):
                    yield piece
            else:
                yield await response.read()
        finally:
            replica.answers.remove(response)
            response.close()  # if it isn't read to its end, its connection can't be used again, and its server is told


async def whole_events(content: aiohttp.StreamReader) -> AsyncGenerator[bytes, None]:
    """The bytes as they come, up to the end of an event: half a one could not be taken back."""
    kept = b""
    async for piece in content.iter_any():
        kept += piece
        end = max((kept.rfind(mark) + len(mark) for mark in ENDS if mark in kept), default=0)
        if end:
            yield kept[:end]
            kept = kept[end:]
    if kept:
        yield kept


def broken_off(why: str) -> bytes:
    """The end of a stream whose replica is lost."""
    said = f"the replica was lost in the middle of the answer, which ends here: {why}"
    return event(ApiError(502, said).body()) + DONE


Answering = tuple[Talk, bytes, AsyncGenerator[bytes, None]]  # a talk, its first bytes, and the others


async def forward(fleet: Fleet, asked: Asked) -> Answering:
    """The talk that came about; whoever calls this closes it.

    ApiError 502 if it was lost with several replicas, 503 if there are none.
    """
    tried: set[str] = set()
    lost, why = 0, ""
    refused: list[Answering] = []
    while lost < MOST_LOST and len(refused) < MOST_REFUSALS:
        url = fleet.policy.choose(asked.pieces, asked.load, tried)
        if url is None:
            break
        fleet.num_retries += bool(tried)
        tried.add(url)
        talk = Talk(fleet, url, asked)
        pieces = talk.pieces()
        try:
            first = await anext(pieces, b"")
        except Lost as error:
            lost, why = lost + error.sent, str(error)
            asked = asked.again() if error.sent else asked
            continue
        if talk.status not in REFUSALS:
            return talk, first, pieces
        await pieces.aclose()
        refused.append((talk, first, pieces))
    if refused:
        return refused[-1]
    if lost:
        raise ApiError(502, f"{lost} replicas were lost before they answered: {why}")
    raise ApiError(503, f"none of {fleet.size} replicas can be reached: come again", retry_after=1)
