"""From what the engine made to what a client is told: whole, or piece by piece.

An answer to one HTTP request may come of several requests to the engine, one for each prompt; output j of prompt i is
choice i * n + j.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minipaged.requests.request import Request
from minipaged.requests.sampling_params import SamplingParams
from minipaged.server import logprobs
from minipaged.server.errors import ApiError, error_object
from minipaged.server.protocol import ChatCompletionRequest, CompletionRequest
from minipaged.text.outputs import CompletionOutput, RequestOutput
from minipaged.text.tokenizer import Tokenizer

Body = CompletionRequest | ChatCompletionRequest


@dataclass
class Sent:
    """What a client has of a choice: characters, tokens. offsets: where tokens stand in the text, if that is told."""

    text: int = 0
    tokens: int = 0
    ended: bool = False
    failed: bool = False
    offsets: logprobs.Offsets | None = None


class Answer:
    """One HTTP request's answer. id: its id in the API. model: the name that it was asked for by.

    failed: why nothing came of any choice of a stream.
    """

    failed: str | None = None

    def __init__(self, body: Body, id: str, model: str, requests: list[Request], tokenizer: Tokenizer):
        self.id, self.body, self.chat = id, body, isinstance(body, ChatCompletionRequest)
        self.requests, self._tokenizer = requests, tokenizer
        self._place = {request.request_id: number for number, request in enumerate(requests)}
        self._width: int = getattr(requests[0].params, "n", 1) or getattr(requests[0].params, "beam_width", 1)
        self._num_choices = len(requests) * self._width
        self._head = {"id": id, "object": "", "created": int(time.time()), "model": model}
        self._sent: dict[int, Sent] = {}
        # By request: prompt, output, cached tokens.
        self._usage = {request.request_id: (len(request.prompt_token_ids), 0, 0) for request in requests}
        self.prompt_only = isinstance(body, CompletionRequest) and body.echo and body.max_tokens == 0

    # --- whole --------------------------------------------------------------------------------------------------

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """ApiError 500 if nothing came of it."""
        ends = [one.finish_reason for output in outputs for one in output.outputs]
        if ends and all(reason == "error" for reason in ends):
            raise ApiError(500, next(output.error for output in outputs if output.error) or "unknown")
        outputs = sorted(outputs, key=lambda output: self._place[output.request_id])
        choices = [self._choice(output, one) for output in outputs for one in output.outputs]
        for output in outputs:
            self._count(output)
        whole: dict[str, Any] = {"choices": choices, "usage": self.usage()}
        if self.body.kv_transfer_params:
            whole["kv_transfer_params"] = outputs[0].kv_transfer_params
        if self.chat and self.body.prompt_logprobs is not None:
            whole["prompt_logprobs"] = logprobs.of_prompt(outputs[0].prompt_logprobs)
        if self.chat and self.body.return_token_ids:
            whole["prompt_token_ids"] = outputs[0].prompt_token_ids
        return {**self._head, "object": "chat.completion" if self.chat else "text_completion"} | whole

    def _choice(self, output: RequestOutput, one: CompletionOutput) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": self._index(output, one)}
        told = self._logprobs(output, one, Sent())
        if self.chat:
            choice |= {"message": {"role": "assistant", "content": one.text}, "logprobs": told}
        else:
            choice |= {"text": self._echoed(output) + ("" if self.prompt_only else one.text), "logprobs": told}
            if self.body.prompt_logprobs is not None:
                choice["prompt_logprobs"] = logprobs.of_prompt(output.prompt_logprobs)
        choice |= self._end(output, one)
        if self.body.return_token_ids:
            choice["token_ids"] = [] if self.prompt_only else one.token_ids
            choice |= {} if self.chat else {"prompt_token_ids": output.prompt_token_ids}
        return choice

    def _end(self, output: RequestOutput, one: CompletionOutput) -> dict[str, Any]:
        reason = "length" if self.prompt_only else one.finish_reason
        end: dict[str, Any] = {"finish_reason": reason, "stop_reason": one.stop_reason}
        return end | {"error": error_object(500, output.error or "unknown")} if reason == "error" else end

    # --- piece by piece -----------------------------------------------------------------------------------------

    def begin(self) -> Iterator[dict[str, Any]]:
        """A chat's choices say first who speaks."""
        for index in range(self._width if self.chat else 0):
            delta = {"role": "assistant", "content": ""}
            chunk = self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
            prompt = {"prompt_token_ids": self.requests[0].prompt_token_ids} if self.body.return_token_ids else {}
            yield chunk | prompt

    def pieces(self, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """What is new in it. Beams, which change places while they run, are told at their end."""
        beams = not isinstance(self.requests[0].params, SamplingParams)
        self._count(output)
        for one in [] if beams and not output.finished else output.outputs:
            index = self._index(output, one)
            sent = self._sent.setdefault(index, Sent())
            if sent.ended or (one.num_tokens == sent.tokens and one.finish_reason is None):
                continue
            piece = self._piece(output, one.after(sent.text, sent.tokens), index, sent)
            sent.text, sent.tokens, sent.ended = one.num_chars, one.num_tokens, one.finish_reason is not None
            sent.failed = one.finish_reason == "error"
            if piece:
                yield self._chunk([piece])
        if output.error and len(self._sent) == self._num_choices and all(one.failed for one in self._sent.values()):
            self.failed = output.error

    def _piece(self, output: RequestOutput, new: CompletionOutput, index: int, sent: Sent) -> dict[str, Any] | None:
        first = sent.tokens == 0
        text = "" if self.prompt_only else new.text
        piece: dict[str, Any] = {"index": index, "logprobs": self._logprobs(output, new, sent)}
        if self.chat:
            piece["delta"] = {"content": text}
        else:
            piece["text"] = (self._echoed(output) if first else "") + text
        if self.body.return_token_ids:
            piece["token_ids"] = [] if self.prompt_only else new.token_ids
            piece |= {"prompt_token_ids": output.prompt_token_ids} if first and not self.chat else {}
        ended = new.finish_reason is not None
        if not (ended or text or piece.get("text") or piece["logprobs"] or self.body.return_token_ids):
            return None  # half a character, say
        return piece | (self._end(output, new) if ended else {"finish_reason": None})

    def end(self) -> Iterator[dict[str, Any]]:
        """The usage, if it is asked for; or that nothing came of the whole answer."""
        options = self.body.stream_options
        if self.failed:
            yield ApiError(500, self.failed).body()
        elif options and options.include_usage:
            yield self._chunk([]) | {"usage": self.usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        options = self.body.stream_options
        chunk = {**self._head, "object": "chat.completion.chunk" if self.chat else "text_completion"}
        chunk["choices"] = choices
        if options and options.include_usage:
            chunk["usage"] = self.usage() if options.continuous_usage_stats else None
        return chunk

    # --- what both have in common -------------------------------------------------------------------------------

    def _index(self, output: RequestOutput, one: CompletionOutput) -> int:
        return self._place[output.request_id] * self._width + one.index

    def _echoed(self, output: RequestOutput) -> str:
        """The prompt, if it is asked for; of one that was cut, what was kept."""
        if not (isinstance(self.body, CompletionRequest) and self.body.echo):
            return ""
        if output.prompt is not None and self.body.truncate_prompt_tokens is None:
            return output.prompt
        return self._tokenizer.decode(output.prompt_token_ids, self._skips)

    @property
    def _skips(self) -> bool:
        return self.body.skip_special_tokens is not False

    def _logprobs(self, output: RequestOutput, one: CompletionOutput, sent: Sent) -> dict[str, Any] | None:
        """Of all tokens of `one`, which come after those that were sent."""
        wanted = self.body.logprobs
        if wanted is None or wanted is False or one.logprobs is None:
            return None
        told: list[Any] = list(zip(one.token_ids, one.logprobs, strict=True))
        if isinstance(self.body, ChatCompletionRequest):
            return logprobs.of_chat(told, self.body.top_logprobs or 0)
        prompt, echo, tokenizer = output.prompt_token_ids, bool(self.body.echo), self._tokenizer
        told, before, first, offsets = [] if self.prompt_only else told, [], "", []
        if sent.offsets is None:
            sent.offsets = logprobs.Offsets(tokenizer, self._skips, len(self._echoed(output)), prompt)
            if echo:
                before = list(zip(prompt, output.prompt_logprobs or (), strict=True))
                of_prompt = logprobs.Offsets(tokenizer, self._skips)
                offsets, first = [of_prompt.next(token) for token in prompt], tokenizer.decode(prompt[:1], False)
        offsets += [sent.offsets.next(token) for token, _ in told]
        return logprobs.of_completion(before + told, int(wanted), offsets, first)

    def _count(self, output: RequestOutput) -> None:
        made = 0 if self.prompt_only else sum(one.num_tokens for one in output.outputs)
        prompt = len(self.requests[self._place[output.request_id]].prompt_token_ids)
        here_already = output.num_cached_tokens + output.metrics.num_transferred_tokens
        self._usage[output.request_id] = prompt, made, here_already

    def usage(self) -> dict[str, Any]:
        prompt, made, cached = map(sum, zip(*self._usage.values(), strict=True)) if self._usage else (0, 0, 0)
        return {
            "prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip
