"""Clients of a server with OpenAI's API: they send the requests of a load over sockets, and note what comes, and when.

In a closed loop there are N clients, and each sends its next request when its last one is answered: the server is as
busy as N people keep it. In an open loop requests come at given times, whatever has become of the others: that is how
queues grow. Either way each request has a connection of its own.

Nothing is hidden: a request that is refused, broken off, or answered with fewer tokens than asked for is a failure,
and keeps the reason.
"""

import asyncio
import json
import os
import time
from collections.abc import Callable
from typing import Any

import aiohttp

from minipaged.bench.loads import Load
from minipaged.bench.serve_answers import (
    BROKEN_OFF,
    CAN_NOT_CONNECT,
    NO_SENSE,
    NOT_SENT,
    TOO_SLOW,
    WRONG_LENGTH,
    Answer,
    Arrivals,
    Played,
    Target,
)

EXCERPT = 200  # characters of what a server says when it refuses


class Failed(Exception):
    """A request's. kind: one of the names of serve_answers.py, or an HTTP status."""

    def __init__(self, kind: str, said: str = ""):
        self.kind, self.said = kind, " ".join(said.split())[:EXCERPT]


def play(target: Target, load: Load, arrivals: Arrivals, salt: str, tell: Callable[[str], None]) -> Played:
    """Send a load. tell: is told every two seconds how far it is.

    salt: requests find in a prefix cache only what was computed under the same one, so each run begins with nothing.
    """
    return asyncio.run(Crowd(target, load, arrivals, salt).run(tell))


class Crowd:
    def __init__(self, target: Target, load: Load, arrivals: Arrivals, salt: str):
        self.target, self.load, self.arrivals, self.salt = target, load, arrivals, salt
        count = len(load.prompts)
        self.answers = [Answer() for _ in range(count)]
        self.open = self.most_open = 0
        self._prompts: list[list[int]] = [[] for _ in range(count)]
        self._over = [asyncio.Event() for _ in range(count)]
        self._late = {after: asyncio.Event() for after in load.late if after}
        self._free = asyncio.Semaphore(arrivals.clients or count)

    async def run(self, tell: Callable[[str], None]) -> Played:
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(self._opened)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.target.patience, sock_read=self.target.patience)
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=headers, trace_configs=[trace]
        ) as self.session:
            self.began, cpu = time.perf_counter(), time.process_time()
            ticker = asyncio.create_task(self._tick(tell))
            async with asyncio.TaskGroup() as group:
                for number in range(len(self.answers)):
                    group.create_task(self._life(number))
            seconds, cpu = time.perf_counter() - self.began, time.process_time() - cpu
            ticker.cancel()
        return Played(self.answers, seconds, cpu, self.most_open)

    async def _tick(self, tell: Callable[[str], None]) -> None:
        while True:
            await asyncio.sleep(2)
            over = sum(event.is_set() for event in self._over)
            tell(f"{over} of {len(self.answers)} answered, {self.open} connections open")

    # --- a request ------------------------------------------------------------------------------------------------

    async def _life(self, number: int) -> None:
        answer = self.answers[number]
        try:
            await self._due(number)
            async with self._free:
                await self._ask(number, answer)
        except Failed as failed:
            answer.failure, answer.said = failed.kind, failed.said
        finally:
            self._over[number].set()
            for event in self._late.values() if number == 0 else ():  # what waits for its tokens waits no longer
                event.set()

    async def _due(self, number: int) -> None:
        """Wait until a request may be sent, but for a free client; then its prompt is known."""
        load, source = self.load, self.load.sources[number]
        if self.arrivals.times:
            await asyncio.sleep(self.began + self.arrivals.times[number] - time.perf_counter())
        if load.late and load.late[number]:
            await self._late[load.late[number]].wait()
        said: list[int] = []
        if source is not None:
            await self._over[source].wait()
            former = self.answers[source]
            if former.failure or len(former.tokens) != former.num_tokens:
                raise Failed(NOT_SENT, "what it goes on from failed, or the server gives no token ids")
            said = self._prompts[source] + former.tokens
        self._prompts[number] = said + load.prompts[number]

    async def _ask(self, number: int, answer: Answer) -> None:
        body = json.dumps({
            "model": self.target.model, "prompt": self._prompts[number], "max_tokens": self.load.outputs[number],
            "temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
            "return_token_ids": True, "cache_salt": self.salt,
        })  # fmt: skip
        answer.prompt_tokens = len(self._prompts[number])  # what the server counts stands above it
        answer.sent = time.perf_counter()
        opened: list[bool] = []
        try:
            async with self.session.post(
                f"{self.target.url}/v1/completions", data=body, trace_request_ctx=opened
            ) as response:
                if response.status != 200:
                    raise Failed(f"HTTP {response.status}", await response.text(errors="replace"))
                await self._read(response, number, answer)
        except aiohttp.ClientConnectorError as error:
            raise Failed(CAN_NOT_CONNECT, str(error)) from None
        except TimeoutError:
            raise Failed(TOO_SLOW, f"nothing came in {self.target.patience:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Failed(BROKEN_OFF, str(error)) from None
        finally:
            self.open -= len(opened)
        wanted = self.load.outputs[number]
        if answer.num_tokens != wanted:
            raise Failed(WRONG_LENGTH, f"{answer.num_tokens} tokens instead of {wanted}")

    async def _opened(self, session: Any, context: Any, params: Any) -> None:
        context.trace_request_ctx.append(True)
        self.open += 1
        self.most_open = max(self.most_open, self.open)

    async def _read(self, response: aiohttp.ClientResponse, number: int, answer: Answer) -> None:
        """Server-sent events until [DONE]: what one read brings came at one time."""
        rest = b""
        async for piece in response.content.iter_any():
            now = time.perf_counter()
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                if line.startswith(b"data:"):
                    read_event(answer, data, now)
            for after, event in self._late.items() if number == 0 else ():
                if answer.num_tokens >= after:
                    event.set()
        raise Failed(BROKEN_OFF, "the stream ended before [DONE]")


def read_event(answer: Answer, data: bytes, now: float) -> None:
    """Note what an event says. Failed if it is an error, or makes no sense."""
    try:
        event = json.loads(data)
        if error := event.get("error"):
            raise Failed(f"error {error['code']}", str(error["message"]))
        for choice in event["choices"]:
            tokens = choice.get("token_ids") or []
            if tokens or choice.get("text"):
                answer.times.append(now)
                answer.tokens += tokens
                answer.num_tokens += len(tokens) or 1
        if usage := event.get("usage"):
            answer.num_tokens, answer.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
            answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Failed(NO_SENSE, data.decode(errors="replace")) from None
