"""What a step changes in a request, noted before, so that it can be taken back.

A step can be broken off at any line: by Ctrl-C, by a lack of memory, by an exception in somebody's code. Then
nobody knows how far it got with page tables, queues and contents of memory. So these are given up and computed
again (`Scheduler.start_over`), and of a request only its tokens count, as they were before the step.
"""

import copy
from dataclasses import dataclass
from typing import Any

from minipaged.requests.request import Request, Search
from minipaged.requests.sequence import Sequence


@dataclass
class Note:
    """A request as it was. Restoring it twice does no harm."""

    request: Request
    sequences: list[Sequence]
    living: list[tuple[Sequence, int]]  # those that had not ended, and how many tokens their outputs had
    search: Search | None
    num_prompt_logprobs: int
    num_output_tokens: int
    metrics: dict[str, Any]

    @classmethod
    def of(cls, request: Request) -> "Note":
        return cls(
            request,
            list(request.sequences),
            [(seq, len(seq.output_token_ids)) for seq in request.live],
            request.search and copy.copy(request.search),  # a step replaces its lists, and changes none
            len(request.prompt_logprobs or ()),
            request.num_output_tokens,
            vars(request.metrics).copy(),
        )

    def restore(self) -> None:
        request = self.request
        for seq, length in self.living:
            del seq.output_token_ids[length:], seq.sampled[length:]
            seq.finish_reason = seq.stop_reason = None
        request.sequences, request.error = list(self.sequences), None
        request.search = self.search and copy.copy(self.search)
        vars(request.metrics).update(self.metrics)
        if request.prompt_logprobs is not None:
            del request.prompt_logprobs[self.num_prompt_logprobs :]
