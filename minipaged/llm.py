"""Whole jobs: many prompts in, all answers out. vLLM's `LLM`, by its names.

    from minipaged import LLM, SamplingParams
    with LLM("smollm2") as llm:
        for output in llm.generate(["The capital of France is"], SamplingParams(max_tokens=20)):
            print(output.outputs[0].text)

Each job has a mailbox of its own, so jobs may run side by side: whoever steps the engine, each gets its own answers.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Many
from typing import Any

from rich.progress import Progress

from minipaged.engine import LLMEngine
from minipaged.requests.beam_search_params import BeamSearchParams
from minipaged.text.inputs import Params, Prompt, as_list, one_for_each
from minipaged.text.mailbox import Mailbox
from minipaged.text.outputs import BeamSearchOutput, RequestOutput, as_beam_search_output

Outputs = Iterator[RequestOutput]


class LLM(LLMEngine):
    """A model that answers. Options: see `EngineArgs`. It can be stepped by hand too: see `LLMEngine`."""

    def generate(
        self,
        prompts: Prompt | Many[Prompt],
        sampling_params: Params | Many[Params] | None = None,
        *,
        use_tqdm: bool = False,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Answer all prompts, in their order. sampling_params: one for all, or one for each.

        use_tqdm: show a progress bar. cache_salt: see add_request.
        ValueError if a prompt or its parameters are bad, or RequestRefused if one can never fit; then none runs.
        """
        ids, answers = self._ask(as_list(prompts), sampling_params, cache_salt)
        finished: dict[str, RequestOutput] = {}
        for output in _with_progress(answers, len(ids)) if use_tqdm else answers:
            if output.finished:
                finished[output.request_id] = output
        return [finished[request_id] for request_id in ids]

    def stream(
        self,
        prompts: Prompt | Many[Prompt],
        sampling_params: Params | Many[Params] | None = None,
        cache_salt: str | None = None,
    ) -> Outputs:
        """Like generate, but yields the state of a request after each step that gave it new tokens."""
        return self._ask(as_list(prompts), sampling_params, cache_salt)[1]

    def chat(
        self,
        messages: Many[dict[str, Any]] | Many[Many[dict[str, Any]]],
        sampling_params: Params | Many[Params] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several. A message is {"role": "user", "content": "Hello"}."""
        conversations = as_list(messages)
        for one in conversations:
            if isinstance(one, str) or not all(isinstance(message, dict) for message in one):
                raise ValueError(f"a conversation must be a list of messages, not {one!r:.80}")
        return self.generate(conversations, sampling_params, **options)

    def beam_search(self, prompts: Prompt | Many[Prompt], params: BeamSearchParams) -> list[BeamSearchOutput]:
        """Search for the likeliest outputs of all prompts. `generate` takes the same parameters, and says more."""
        return [as_beam_search_output(output) for output in self.generate(prompts, params)]

    def _ask(
        self, prompts: list[Prompt], params: Params | Many[Params] | None, cache_salt: str | None
    ) -> tuple[list[str], Outputs]:
        """Add all requests, or none; the answers come as they are made."""
        mailbox, ids = Mailbox(), []
        try:
            for number, (prompt, one) in enumerate(zip(prompts, one_for_each(params, prompts), strict=True)):
                where = f"prompt {number}: " if len(prompts) > 1 else ""
                ids.append(self.add(self.prepare(prompt, one, None, cache_salt, where), mailbox))
            answers = self._answers(mailbox, len(ids))
            next(answers)  # from now on it cleans up after itself
        except BaseException:
            self._abort_all(mailbox)
            raise
        return ids, answers

    def _answers(self, mailbox: Mailbox, left: int) -> Outputs:
        try:
            yield None  # type: ignore[misc]
            while left:
                for output in self.step_for(mailbox):
                    if output.request_id not in mailbox:  # else it was aborted meanwhile, and there is a newer one
                        left -= output.finished
                        yield output
        finally:  # the caller went away, or something broke: leave nothing behind
            if left:
                self._abort_all(mailbox)


def _with_progress(answers: Outputs, total: int) -> Outputs:
    with Progress() as bar:
        task = bar.add_task("requests", total=total)
        for output in answers:
            bar.advance(task, output.finished)
            yield output
