"""Many who ask, one engine, in asyncio. vLLM's `AsyncLLM`, by its names.

    from minipaged import AsyncLLM, SamplingParams
    async with AsyncLLM("smollm2") as llm:
        async for output in llm.generate("The capital of France is", SamplingParams(max_tokens=20)):
            print(output.outputs[0].text)

One thread steps the engine, and nobody else does. What is asked goes into an inbox that it empties between two steps;
what a step made goes back to the event loop in one piece (text/stream.py). So the loop never waits for a step, nor a
step for a reader.
"""

import asyncio
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future
from dataclasses import fields
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from minipaged.engine import LLMEngine
from minipaged.execution.engine_args import EngineArgs
from minipaged.execution.stats import EngineStats
from minipaged.requests.request import Request
from minipaged.scheduling.plan import StepOutput, StepPlan
from minipaged.text.inputs import Params, Prompt, one_for_each
from minipaged.text.outputs import RequestOutput
from minipaged.text.stream import News, Stream, WholeStates, tell
from minipaged.text.tokenizer import Tokenizer

T = TypeVar("T")
PATIENCE = 3  # so many steps may fail one after the other before those who wait are told


class EngineDeadError(RuntimeError):
    """The engine was shut down, or step after step failed."""


class AsyncLLM:
    """An engine with a thread of its own. Options: see `EngineArgs`."""

    def __init__(self, model: str = "smollm2", **options: Any):
        self.engine = LLMEngine(model, **options)
        self.waiting: dict[Request, int] = {}  # prompt tokens of those that nothing was computed for yet
        self._readers: dict[str, tuple[Request, Stream]] = {}  # of those that are not finished; the thread's own
        self._admitted: deque[str] = deque()  # in the step that is being computed
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._open, self._stopped = threading.Lock(), False  # nothing comes in once it is stopped
        self._mailbox = WholeStates()
        self._failures = 0  # steps, one after the other
        self._error: BaseException | None = None  # of the last of them
        self.engine.observers.append(self._note_admitted)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> Self:
        options = {field.name: getattr(args, field.name) for field in fields(args) if field.name != "model"}
        return cls(args.model, **options)

    # --- asking -------------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: Params | None = None,
        request_id: str | None = None,
        *,
        cache_salt: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """The state of the request as it grows, until it is finished. Who leaves before that aborts it.

        Errors as in `LLM.generate`, when the first state is asked for; EngineDeadError if there is no engine any more.
        """
        [params] = one_for_each(sampling_params, [prompt])
        request = await asyncio.to_thread(self.engine.prepare, prompt, params, request_id, cache_salt)
        with contextlib.closing(self.submit([request])) as stream:
            async for output in stream:
                yield output

    def submit(self, requests: list[Request]) -> Stream:
        """Let prepared requests (`LLMEngine.prepare`) wait, all or none. Who stops reading has to close the stream."""
        self._must_compute()
        stream = Stream(requests, self._abort)
        self.waiting.update({request: len(request.prompt_token_ids) for request in requests})
        try:
            self._ask(partial(self._add, stream))
        except EngineDeadError:
            self._forget(stream)
            raise
        return stream

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests within a step. Who waits for one gets its output, with finish_reason "abort"."""
        names = [request_id] if isinstance(request_id, str) else list(request_id)

        def end() -> None:
            for name in names:
                self.engine.abort(name)

        await self.call(end)

    async def call(self, what: Callable[[], T]) -> T:
        """What `what` returns, or raises, between two steps: the engine stands still, and may be looked at."""
        answer: Future[T] = Future()

        def do() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(what())
            except BaseException as error:
                answer.set_exception(error)

        self._ask(do)
        return await asyncio.wrap_future(answer)

    async def stats(self) -> EngineStats:
        return await self.call(self.engine.stats)

    async def reset_prefix_cache(self) -> None:
        await self.call(self.engine.reset_prefix_cache)

    async def get_tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    # --- whether it lives ---------------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        return not self._stopped and not self._failures

    @property
    def errored(self) -> bool:
        return not self.is_running

    def must_live(self) -> None:
        """EngineDeadError if the engine was shut down."""
        if self._stopped:
            raise EngineDeadError("the engine was shut down")

    async def check_health(self) -> None:
        """EngineDeadError if the last step failed, or the next one must fail, or if the engine was shut down."""
        self._must_compute()
        if self._failures:
            raise EngineDeadError(f"the last step failed: {self._error!r}")

    def _must_compute(self) -> None:
        self.must_live()
        try:
            self.engine.check_health()
        except RuntimeError as error:
            raise EngineDeadError(str(error)) from error

    def shutdown(self) -> None:
        """End all requests and the thread, and give the memory back. Who waits gets EngineDeadError."""
        with contextlib.suppress(EngineDeadError):
            self._ask(self._stop)
        self._thread.join()
        self.engine.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        await asyncio.to_thread(self.shutdown)

    # --- the thread ---------------------------------------------------------------------------------------------

    def _ask(self, what: Callable[[], None]) -> None:
        with self._open:
            self.must_live()
            self._inbox.put(what)

    def _run(self) -> None:
        while not self._stopped:
            try:
                self._do_what_was_asked()
                if not self._stopped:
                    self._deliver(self.engine.step_for(self._mailbox))
            except BaseException as error:  # whatever it is: without this thread all would wait for ever
                self._failures, self._error = self._failures + 1, error
                if self._failures >= PATIENCE:
                    self._give_up(f"{self._failures} steps failed, the last one with {error!r}")
                    time.sleep(0.01)  # if nothing helps, not at full speed
        while not self._inbox.empty():
            with contextlib.suppress(BaseException):
                self._inbox.get()()
        self._give_up("the engine was shut down")

    def _do_what_was_asked(self) -> None:
        """All that is in the inbox; if there is nothing else to do, wait for something."""
        with contextlib.suppress(queue.Empty):
            while not self._stopped:
                busy = self.engine.has_unfinished_requests or bool(self._mailbox)
                what = self._inbox.get(block=not busy)
                what()

    def _stop(self) -> None:
        with self._open:
            self._stopped = True

    def _add(self, stream: Stream) -> None:
        try:
            for request in stream.requests:
                if request.request_id in self._readers:  # it may have ended, and its last state is on the way
                    raise ValueError(f"request_id {request.request_id!r} is in use")
                self.engine.add(request, self._mailbox)
                self._readers[request.request_id] = request, stream
        except BaseException as error:
            self._end(stream)
            tell([(stream, error)])

    def _abort(self, stream: Stream) -> None:
        """Nobody reads it any more. From any thread."""
        for request in stream.requests:  # who comes now need not wait for the thread to see that there is room
            self.waiting.pop(request, None)
        with contextlib.suppress(EngineDeadError):
            self._ask(partial(self._end, stream))

    def _end(self, stream: Stream) -> None:
        """What is not finished of it. Others may have come since, whose requests have the same names."""
        for request in self._forget(stream):
            self.engine.abort(request.request_id)
            self._mailbox.drop(request.request_id)

    def _forget(self, stream: Stream) -> list[Request]:
        """Those that were not finished."""
        its = [request for request in stream.requests if self._readers.get(request.request_id) == (request, stream)]
        for request in stream.requests:
            self.waiting.pop(request, None)
        for request in its:
            del self._readers[request.request_id]
        return its

    def _note_admitted(self, plan: StepPlan, output: StepOutput) -> None:
        """The first observer: a step has succeeded, whatever the others make of it."""
        self._failures = 0
        self._admitted.extend(plan.admitted)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        news: list[tuple[Stream, News]] = []
        while self._admitted:
            request, stream = self._readers.get(self._admitted.popleft(), (None, None))
            if request is not None and stream is not None and self.waiting.pop(request, None) is not None:
                news.append((stream, None))
        for output in outputs:
            request, stream = self._readers.get(output.request_id, (None, None))
            if request is not None and stream is not None:
                self.waiting.pop(request, None)
                news.append((stream, output))
                if output.finished:
                    del self._readers[output.request_id]
        for stream in tell(news):
            self._end(stream)

    def _give_up(self, why: str) -> None:
        """Tell all who wait; the engine is empty then, and goes on with the next one who asks."""
        streams = {stream for _, stream in self._readers.values()}
        for stream in streams:
            with contextlib.suppress(BaseException):
                self._end(stream)
        tell([(stream, EngineDeadError(why)) for stream in streams])
