"""The replicas behind a router: a session of connections to each, and who of them lives.

Each is asked for /health once in a while. Who can't be reached or says no gets nothing until it says yes. Who says
nothing at all for long hangs: its connections are cut, so that whoever waits for it is helped elsewhere.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Sequence

import aiohttp

from minipaged.routing.policies import Policy

log = logging.getLogger("minipaged.router")

CONNECTING = 5.0  # seconds for a connection to stand
BROKEN = aiohttp.ClientError, OSError, RuntimeError  # the last: it was cut while somebody wanted to begin


class Replica:
    """A server. why: it doesn't live. answers: those that are being read.

    session: made when it is used, since that needs a running event loop.
    """

    def __init__(self, url: str):
        self.url, self.why = url, "it has not answered yet"
        self.heard = time.monotonic()  # when it said something last
        self.doubted = asyncio.Event()
        self.answers: set[aiohttp.ClientResponse] = set()
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # Idle ones are closed before uvicorn does it, after 5 s: a request could meet that half-way.
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECTING),
                auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False,
            )  # fmt: skip
        return self._session

    async def cut(self) -> None:
        """Whoever waits for it learns that it is lost."""
        for answer in self.answers:
            answer.close()  # who reads it gets an error, which closing the session does not see to
        session, self._session = self._session, None
        if session is not None:
            await session.close()


class Fleet:
    """Some replicas, among whom a policy chooses.

    size: how many there should be. pause: seconds between two questions. hang: see above, seconds.
    """

    def __init__(self, policy: Policy, urls: Sequence[str] = (), pause: float = 1.0, hang: float = 10.0):
        self.policy, self.size, self._pause, self._hang = policy, len(urls), pause, hang
        self.replicas: dict[str, Replica] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._urls = urls
        self.num_retries = self.num_broken = 0  # requests sent elsewhere; streams that broke off

    async def open(self) -> None:
        """Begins to ask. In the event loop."""
        for url in self._urls:
            self.add(url)

    async def close(self) -> None:
        for url in list(self.replicas):
            await self.remove(url)

    def add(self, url: str) -> None:
        """One more. It lives as soon as it says so."""
        self.replicas[url] = Replica(url)
        self._watches[url] = asyncio.create_task(self._watch(self.replicas[url]))

    async def remove(self, url: str) -> None:
        """It has ended, and won't come back: whoever waits for it learns that."""
        watch, replica = self._watches.pop(url), self.replicas.pop(url)
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
        self.policy.remove(url)
        await replica.cut()

    def lost(self, url: str, why: str) -> None:
        """A connection broke. It gets nothing more until it was asked again, which is now."""
        if replica := self.replicas.get(url):
            self._mark(replica, why)
            replica.doubted.set()

    async def cut(self) -> None:
        """Whoever waits for any of them learns that it is lost."""
        for replica in self.replicas.values():
            await replica.cut()

    async def _watch(self, replica: Replica) -> None:
        while True:
            await self._ask(replica)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(replica.doubted.wait(), self._pause)
                await asyncio.sleep(self._pause / 10)  # who doubts again and again doesn't make it more
            replica.doubted.clear()

    async def _ask(self, replica: Replica) -> None:
        try:
            async with asyncio.timeout(self._hang), replica.session.get(f"{replica.url}/health") as response:
                why = "" if response.status == 200 else f"/health says {response.status}"
                replica.heard = time.monotonic()
        except TimeoutError:
            why = f"it says nothing for {time.monotonic() - replica.heard:.0f} s"
            await replica.cut()
        except BROKEN as error:
            why = reason(error)
        self._mark(replica, why)

    def _mark(self, replica: Replica, why: str) -> None:
        """why: it doesn't live; "": it does."""
        lives = not why
        if lives != (replica.url in self.policy.live):
            log.info("%s %s", replica.url, "lives" if lives else f"is gone: {why}")
            (self.policy.add if lives else self.policy.remove)(replica.url)
        replica.why = why


def reason(error: BaseException) -> str:
    """What went wrong, in a few words."""
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError):
        return "its connection was closed"
    number = getattr(getattr(error, "os_error", error), "errno", None)
    return os.strerror(number) if number else str(error) or type(error).__name__
