"""One HTTP request for tokens, from its body to its last byte: /v1/completions and /v1/chat/completions."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from minipaged.async_llm import EngineDeadError
from minipaged.requests.request import Request
from minipaged.server.answers import Answer, Body
from minipaged.server.asked import conversation_of, params_of, prompts_of, refusal
from minipaged.server.errors import ApiError
from minipaged.server.manners import House, Visit
from minipaged.server.metrics import Metrics
from minipaged.server.protocol import ChatCompletionRequest
from minipaged.server.transport import DONE, EventStream, event, while_there
from minipaged.text.outputs import RequestOutput
from minipaged.text.stream import Stream


async def generate(http: HttpRequest, body: Body, house: House, metrics: Metrics) -> Response:
    """ApiError if the request is refused, or if nothing comes of it. ClientGone if nobody is there any more."""
    visit: Visit = http.state.visit
    job = Job(body, visit, house, metrics)
    if body.stream:
        events = job.events()
        try:
            first = await while_there(http, anext(events))  # so what is wrong until then has a status of its own
        except BaseException:
            await events.aclose()
            raise
        return EventStream(http, first, events, house.config.send_seconds)
    return JSONResponse(await while_there(http, job.whole()))


class Job:
    """The work for one HTTP request."""

    def __init__(self, body: Body, visit: Visit, house: House, metrics: Metrics):
        self._body, self._visit, self._house, self._metrics = body, visit, house, metrics
        self._llm, self._tokenizer = house.llm, house.llm.engine.tokenizer
        self._ended: set[str] = set()
        kind = "chatcmpl" if isinstance(body, ChatCompletionRequest) else "cmpl"
        number = uuid.uuid4().hex if visit.has_own_name else visit.id  # two at a time may have come with the same id
        self._id = visit.said["id"] = body.request_id or f"{kind}-{number}"

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        outputs = []
        async with self._stream() as (stream, answer):
            async for output in stream:
                if output.finished:
                    self._finished(output)
                    outputs.append(output)
            return answer.whole(outputs)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events. ApiError, EngineDeadError until the first."""
        begun = False
        try:
            async with self._stream() as (stream, answer):
                opening = b"".join(map(event, answer.begin()))
                async for output in stream:
                    if output.finished:
                        self._finished(output)
                    piece = opening + b"".join(map(event, answer.pieces(output)))
                    opening = b""
                    if answer.failed and not begun:
                        raise ApiError(500, answer.failed)
                    if piece:
                        begun = True
                        yield piece
                yield b"".join(map(event, answer.end())) + DONE
        except EngineDeadError as error:
            if not begun:
                raise
            # The status can't say it any more.
            yield event(ApiError(500, str(error)).body()) + DONE

    @contextlib.asynccontextmanager
    async def _stream(self) -> AsyncIterator[tuple[Stream, Answer]]:
        """From the time when the first token is being computed. Whoever leaves early aborts what is not finished."""
        if self._id in self._house.under_way:
            raise ApiError(400, f"request_id {self._id!r} is in use", "request_id")
        self._house.under_way[self._id] = []
        try:
            async with self._computing() as computing:
                yield computing
        finally:
            del self._house.under_way[self._id]

    @contextlib.asynccontextmanager
    async def _computing(self) -> AsyncIterator[tuple[Stream, Answer]]:
        requests = await asyncio.to_thread(self._prepare)
        self._house.under_way[self._id] = [request.request_id for request in requests]
        self._house.known(self._visit)
        self._house.check_room(len(requests), sum(len(request.prompt_token_ids) for request in requests))
        with contextlib.closing(self._llm.submit(requests)) as stream, self._noting_who_leaves(requests):
            try:
                async with asyncio.timeout(self._house.config.max_queue_seconds):
                    await stream.begin()
            except TimeoutError:
                seconds = self._house.config.max_queue_seconds
                raise ApiError(503, f"it waited for {seconds:g} s: come again", retry_after=seconds) from None
            except ValueError as error:  # another one came first with its request_id
                raise refusal(error, self._body) from None
            model = self._body.model or self._house.config.model_names[0]
            yield stream, Answer(self._body, self._id, model, requests, self._tokenizer)

    @contextlib.contextmanager
    def _noting_who_leaves(self, requests: list[Request]) -> Iterator[None]:
        try:
            yield
        finally:
            left = [request for request in requests if request.request_id not in self._ended]
            if left:
                self._metrics.left(left)
                self._visit.said["end"] = "abort"

    def _prepare(self) -> list[Request]:
        """In a thread of its own: texts may be long, and grammars large."""
        try:
            params = params_of(self._body)
            if isinstance(self._body, ChatCompletionRequest):
                prompts = [conversation_of(self._body, self._tokenizer)]
            else:
                prompts = prompts_of(self._body, self._tokenizer)
            prepare, salt = self._llm.engine.prepare, self._body.cache_salt
            if len(prompts) == 1:
                return [prepare(prompts[0], params, self._id, salt)]
            return [prepare(one, params, f"{self._id}-{i}", salt, f"prompt {i}: ") for i, one in enumerate(prompts)]
        except ValueError as error:
            raise refusal(error, self._body) from None

    def _finished(self, output: RequestOutput) -> None:
        self._metrics.finished(output)
        self._ended.add(output.request_id)
        said = self._visit.said
        said["prompt"] = said.get("prompt", 0) + len(output.prompt_token_ids)
        said["output"] = said.get("output", 0) + sum(one.num_tokens for one in output.outputs)
        said["end"] = ",".join(sorted({one.finish_reason or "" for one in output.outputs}))
        if self._house.config.log_text:
            said["asked"] = repr(output.prompt if output.prompt is not None else output.prompt_token_ids)
            said["answered"] = repr([one.text for one in output.outputs])
