"""What the engine does, for those who look: GET /live, server-sent events.

The state is one JSON object, the same that a trace keeps (viewer/TRACE.md): who runs, waits and is swapped out, the
page tables, the account of the memory. It has no text in it and no token; of request ids only what the page made up to
know its own again (see PAGE_ID). `did` is what all steps did that were computed since the state before. The first event
is all of it, and each later one a merge patch (RFC 7386): what changed, and null for what is gone.

While nobody looks it costs nothing. Else one task looks for all of them, now and then, and only if something happened.
Who reads slowly finds the newest state, and no queue of all that was between.
"""

import asyncio
import contextlib
import logging
import re
import time
from collections import deque
from collections.abc import AsyncGenerator

from fastapi import FastAPI, Request, Response

from minipaged.async_llm import EngineDeadError
from minipaged.engine import LLMEngine
from minipaged.scheduling.plan import StepOutput, StepPlan
from minipaged.server.errors import ApiError
from minipaged.server.manners import House
from minipaged.server.transport import EventStream, event
from minipaged.viewer.state import MOST_BLOCKS, Eye, State, merge_patch
from minipaged.viewer.thinning import did_of_both
from minipaged.viewer.trace import header_of

log = logging.getLogger("minipaged.server")

PAUSE = 1 / 8  # seconds between two looks
QUIET = 15.0  # seconds of silence before a comment is sent, which finds out who is gone
NUM_EVENTS = 8  # sentences on what happened last
PAGE_ID = re.compile(r"page-([0-9a-f]{8}-[0-9]{1,6})-[0-9a-f]{16}")  # its end is secret: who knows an id can abort it


def add_live(app: FastAPI, house: House) -> None:
    """GET /live."""
    live = Live(house)

    @app.get("/live", include_in_schema=False)  # it doesn't end: nothing for who tries all that a schema has
    async def look(http: Request) -> Response:
        if house.closing:
            raise ApiError(503, "the server is about to end")
        return EventStream(http, b": live\n\n", live.look(), house.config.send_seconds)


class Live:
    """All who look at an engine."""

    def __init__(self, house: House):
        self._house, self._engine = house, house.llm.engine
        self.num_lookers = 0
        self._state: State = {}
        self._number = 0  # of the state
        self._written: dict[int, bytes] = {}  # what is new in it, for those who know the state of a number
        self._news = asyncio.Event()  # another one for each state
        self._watch: asyncio.Task[None] | None = None

    async def look(self) -> AsyncGenerator[bytes, None]:
        """The events for one who looks, until the server is about to end."""
        self.num_lookers += 1
        try:
            if self._watch is None:
                self._state, self._watch = {}, asyncio.create_task(self._watching())
            known: tuple[int, State] = (0, {})
            while self._watch is not None:
                news = self._news
                if self._state and known[0] != self._number:
                    piece = self._since(*known)
                    known = self._number, self._state
                    yield piece
                    continue
                try:
                    async with asyncio.timeout(QUIET):
                        await news.wait()
                except TimeoutError:
                    yield b": nothing new\n\n"
        finally:
            self.num_lookers -= 1

    def _since(self, number: int, state: State) -> bytes:
        if number not in self._written:
            self._written[number] = event(merge_patch(state, self._state))
        return self._written[number]

    async def _watching(self) -> None:
        """Look, as long as anybody wants to know."""
        call, eye, seen = self._house.llm.call, None, None
        try:
            eye = await call(lambda: LiveEye(self._engine, self._house.config.model_names[0]))
            while self.num_lookers and not (self._house.closing and not self._house.num_guests):
                before, seen = seen, self._mark()
                if seen != before:
                    self._publish(await call(eye.state))
                await asyncio.sleep(PAUSE)
        except EngineDeadError:
            pass
        except Exception:
            log.exception("the live view failed")
        finally:
            self._watch = None  # who comes now gets another one
            self._wake()
            if eye is not None:
                with contextlib.suppress(EngineDeadError):
                    await call(eye.close)

    def _mark(self) -> tuple[int, ...]:
        """Another one, if something happened. The engine isn't asked to stand still for it."""
        scheduler, memory = self._engine.scheduler, self._engine.memory
        queues = scheduler.waiting, scheduler.running, scheduler.swapped
        return self._engine.totals.num_steps, memory.num_free, *map(len, queues)

    def _publish(self, state: State) -> None:
        if state != self._state:
            self._state, self._number, self._written = state, self._number + 1, {}
            self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class LiveEye:
    """What may be told of what an Eye sees. It hears of every step until it is closed. In the engine's thread.

    Of pools of more than MOST_BLOCKS blocks it isn't told which block is whose.
    """

    def __init__(self, engine: LLMEngine, model: str):
        self._engine, self._eye = engine, Eye(engine, engine.totals.num_steps)
        self._shows_blocks = engine.memory.num_blocks <= MOST_BLOCKS
        self._head = {
            "model": model, "max_model_len": engine.max_model_len, "settings": header_of(engine)["settings"],
            "shows_blocks": self._shows_blocks,
        }  # fmt: skip
        self._events: deque[str] = deque(maxlen=NUM_EVENTS)
        self._did: State = {}
        self._seconds = 0.0
        engine.observers.append(self._follow)

    def close(self) -> None:
        self._engine.observers.remove(self._follow)

    def _follow(self, plan: StepPlan, output: StepOutput) -> None:
        self._eye.follow(plan, output)
        self._did = did_of_both(self._did, self._eye.did(plan, output))
        self._events.extend(f"step {plan.step}: {told}" for told in self._eye.events)
        self._seconds = round(time.monotonic(), 3)

    def state(self) -> State:
        """Of this moment. step.seconds: when the last step was over; two of them tell how much time passed."""
        stats = self._engine.stats()  # first: it puts right what a step that failed may have left
        state: State = {**self._head, **self._eye.state()}
        did, self._did = self._did, {}
        did.pop("errors", None)  # why, may have words of somebody's text in it
        state["step"] = state["step"] | {"seconds": self._seconds}
        state |= {"num_finished": stats.num_finished, "did": did, "events": list(self._events)}
        for request in state["requests"].values():
            own = PAGE_ID.fullmatch(request.pop("id"))
            request["page"] = own[1] if own else ""
        return state if self._shows_blocks else _without_blocks(state)


def _without_blocks(state: State) -> State:
    """How many there are, and not which."""
    counts = {
        name: {"tokens": table["tokens"], "num_blocks": len(table["blocks"]), "swapped": table["swapped"]}
        for name, table in state["tables"].items()
    }
    of_blocks = ("copies", "swap_out", "swap_in", "freed", "evicted", "loading")
    did = {name: value for name, value in state["did"].items() if name not in of_blocks}
    return state | {"tables": counts, "cached": {}, "index": {}, "did": did}
