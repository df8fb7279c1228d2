"""This engine as a contender, and who sends it a load's requests."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from minipaged.bench.contenders import BLOCK_SIZE, Options
from minipaged.bench.loads import Load, Run
from minipaged.execution.engine_args import BUDGET
from minipaged.execution.stats import EngineStats
from minipaged.llm import LLM
from minipaged.requests.beam_search_params import BeamSearchParams
from minipaged.requests.sampling_params import SamplingParams
from minipaged.scheduling.plan import StepOutput, StepPlan
from minipaged.text.outputs import RequestOutput


class Minipaged:
    """This engine, with its defaults but for the size of its pool and `options.engine`.

    Nothing is in its prefix cache when a run begins: what a load finds, it computed itself.
    kv_bytes: the blocks in use at the moment when most were; a shared one counts once.
    """

    def __init__(self, options: Options):
        torch.set_num_threads(options.threads)
        blocks, free = options.num_blocks, options.num_blocks is None and options.kv_cache_memory is None
        self.llm = LLM(
            options.model,
            dtype=options.dtype,
            device=options.device,
            kernels=options.kernels,
            block_size=BLOCK_SIZE,
            num_blocks=int(1.02 * options.most_blocks) + 2 if free else blocks,  # with room for the watermark
            kv_cache_memory=options.kv_cache_memory,
            num_cpu_blocks=0 if free else None,  # all fits: nothing is swapped
            **settings(options),
        )
        self.about = (
            f"kernels {self.llm.executor.runner.backend.name}, prefix cache {self.llm.prefix_cache}, at most "
            f"{self.llm.scheduler.max_num_batched_tokens} tokens a step"
        )
        if speculation := self.llm.scheduler.speculation:
            self.about += f", at most {speculation.num_speculative_tokens} guesses in a row"
        self.llm.observers.append(self._observe)
        self._most_blocks = 0

    def run(self, load: Load) -> Run:
        self.llm.reset_prefix_cache()
        self._most_blocks = 0
        before = self.llm.stats()
        client = Client(self.llm, load)
        began = time.perf_counter()
        client.run()
        seconds = time.perf_counter() - began
        after = self.llm.stats()
        then, now = asdict(before.times), asdict(after.times)
        queried = after.prefixes.queried - before.prefixes.queried
        return Run(
            tokens=client.tokens,
            seconds=seconds,
            first_token=client.first_token,
            kv_bytes=self._most_blocks * self.llm.block_bytes,
            times={name: now[name] - then[name] for name in now},
            found=(after.prefixes.found - before.prefixes.found) / queried,
            longest_gap=client.longest_gap,
            guesses=_guesses(before, after),
        )

    def _observe(self, plan: StepPlan, output: StepOutput) -> None:
        tables = [s.block_table for s in plan.sequences]
        if sum(map(len, tables)) > self._most_blocks:  # perhaps, but for what they share
            self._most_blocks = max(self._most_blocks, len(set().union(*tables)))


def _guesses(before: EngineStats, after: EngineStats) -> tuple[int, int] | None:
    """Tokens that were guessed between two moments, and how many of them were right."""
    then, now = before.speculation, after.speculation
    if then is None or now is None:
        return None
    return now.num_draft_tokens - then.num_draft_tokens, now.num_accepted_tokens - then.num_accepted_tokens


def settings(options: Options) -> dict[str, Any]:
    """`options.engine`; but prompts that are never cut need steps which any of them fits into, beside the others."""
    told = dict(options.engine)
    if not told.get("chunked_prefill", True):
        whole = options.longest + options.most_requests
        name = "max_num_batched_tokens"
        told[name] = max(whole, told.get(name, max(BUDGET.values())))
    return told


class Client:
    """Sends each request of a load when it is due, and notes what comes back, and when.

    After each step that is a few operations for each running request, as `LLM.generate` has them.
    """

    def __init__(self, llm: LLM, load: Load, clock: Callable[[], float] = time.perf_counter):
        self.llm, self.load, self._clock = llm, load, clock
        count = len(load.prompts)
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.first_token = [0.0] * count
        self.longest_gap: float | None = None
        self._latest: dict[str, float] = {}  # when a request got its latest token
        self._followers: list[list[int]] = [[] for _ in range(count)]
        for number, before in enumerate(load.sources):
            if before is not None:
                self._followers[before].append(number)
        self._late = sorted((after, number) for number, after in enumerate(load.late) if after)

    def run(self) -> None:
        late = {number for _, number in self._late}
        for number, before in enumerate(self.load.sources):
            if before is None and number not in late:
                self._send(number, self.load.prompts[number])
                if self.load.one_by_one:
                    self._work()
        self._work()

    def _work(self) -> None:
        while self.llm.has_unfinished_requests:
            outputs = self.llm.step()
            now = self._clock()
            for output in outputs:
                self._receive(output, now)

    def _send(self, number: int, prompt: list[int]) -> None:
        params: SamplingParams | BeamSearchParams
        wanted, width = self.load.outputs[number], self.load.beam_width
        if width > 1:
            params = BeamSearchParams(width, wanted, ignore_eos=True)
        else:
            params = SamplingParams(temperature=0.0, max_tokens=wanted, ignore_eos=True)
        self.llm.add_request(prompt, params, request_id=str(number))

    def _receive(self, output: RequestOutput, now: float) -> None:
        name, tokens = output.request_id, [token for one in output.outputs for token in one.token_ids]
        if name in self._latest:
            self.longest_gap = max(self.longest_gap or 0.0, now - self._latest[name])
        self._latest[name] = now
        while self._late and name == "0" and len(tokens) >= self._late[0][0]:
            number = self._late.pop(0)[1]
            self._send(number, self.load.prompts[number])
        if output.finished:
            number = int(name)
            self.tokens[number] = tokens
            self.first_token[number] = output.metrics.time_to_first_token or 0.0
            for follower in self._followers[number]:
                self._send(follower, output.prompt_token_ids + tokens + self.load.prompts[follower])
