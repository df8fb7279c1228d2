"""The engine: requests in, text out.

    from minipaged import LLM, SamplingParams
    llm = LLM("smollm2")
    for output in llm.generate(["The capital of France is"], SamplingParams(max_tokens=20)):
        print(output.outputs[0].text)

One step is three lines (`LLM.step`): the scheduler plans, the runner executes, the scheduler learns what came of
it. Around them the engine turns prompts into tokens, and tokens into text.
"""

import random
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import replace
from itertools import count

from kernels import load as load_kernels
from minipaged import cache_folder
from minipaged.execution.pool_size import choose_num_blocks, choose_num_cpu_blocks
from minipaged.execution.runner import ModelRunner, kv_bytes_per_token, resolve
from minipaged.execution.stats import EngineStats, Peak
from minipaged.memory import PREFIX_CACHES, KVCacheManager
from minipaged.models import load
from minipaged.requests.beam_search_params import BeamSearchParams
from minipaged.requests.request import Request
from minipaged.requests.sampling_params import SamplingParams
from minipaged.scheduling.plan import StepOutput, StepPlan
from minipaged.scheduling.scheduler import RequestRefused, Scheduler
from minipaged.text.inputs import Params, Prompt, as_list, encode, one_for_each
from minipaged.text.outputs import RequestOutput, Texts, beam_outputs

Outputs = Iterator[RequestOutput]
# Tokens in a step: enough to keep the processor busy, few enough that nobody waits long for somebody's prompt.
BUDGET = {"cpu": 512, "cuda": 2048}


class LLM:
    """A model, its memory and its scheduler. Names and meanings follow vLLM's `LLM`.

    model: "smollm2", a folder in Hugging Face layout, a .gguf file, or a hub id.
    dtype: "auto" (fp32 on a CPU, bf16 on a GPU), "fp32", "bf16" or "fp16": of weights, keys and values.
    device: "auto" (a GPU if there is one), "cpu" or "cuda".
    kernels: "auto", "torch", "triton" or "cpp": see `kernels.load`.
    cuda_graphs: on a GPU with Triton, replay decode steps: see decode_graphs.py.
    block_size: token slots in a block.
    num_blocks, kv_cache_memory: the size of the pool, in blocks or in bytes; by default a share of what's free.
    num_cpu_blocks: blocks of CPU memory to swap to; by default as many as the pool has, if they fit.
    max_model_len: the longest prompt and output together, if less than the model's own.
    prefix_cache: "none", "hash" or "radix": how blocks are found again, see memory/prefix_cache.py.
    max_num_batched_tokens: see `Scheduler`; by default BUDGET, and a token for each sequence at the least.
    max_num_seqs, chunked_prefill, schedule, preemption, watermark: see `Scheduler`.
    seed: for requests that have none of their own; None draws a new one each time.
    debug: fill freed blocks with NaN and check every table and count at every step.
    """

    def __init__(
        self,
        model: str = "smollm2",
        *,
        dtype: str = "auto",
        device: str = "auto",
        kernels: str = "auto",
        cuda_graphs: bool = True,
        block_size: int = 16,
        num_blocks: int | None = None,
        kv_cache_memory: int | None = None,
        num_cpu_blocks: int | None = None,
        max_model_len: int | None = None,
        prefix_cache: str = "hash",
        max_num_seqs: int = 64,
        max_num_batched_tokens: int | None = None,
        chunked_prefill: bool = True,
        schedule: str = "fcfs",
        preemption: str = "auto",
        watermark: float = 0.01,
        seed: int | None = None,
        debug: bool = False,
    ):
        for name, value, least in (
            ("block_size", block_size, 1), ("num_blocks", num_blocks, 1), ("num_cpu_blocks", num_cpu_blocks, 0),
            ("max_model_len", max_model_len, 1),
        ):  # fmt: skip
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value!r}: must be an integer of at least {least}")
        if prefix_cache not in PREFIX_CACHES:
            raise ValueError(f"prefix_cache={prefix_cache!r}: must be one of {', '.join(PREFIX_CACHES)}")
        kind, device = resolve(dtype, device)
        backend = load_kernels(kernels, device, kind, cache_folder())
        loaded = load(model, kind, device, backend=backend)
        self.model_name = model
        self.config, self.tokenizer = loaded.config, loaded.tokenizer
        self.max_model_len = min(max_model_len or loaded.config.max_model_len, loaded.config.max_model_len)
        self.block_bytes = block_size * kv_bytes_per_token(self.config, kind)
        longest = -(-self.max_model_len // block_size)
        blocks = choose_num_blocks(num_blocks, kv_cache_memory, self.block_bytes, longest * max_num_seqs, device)
        cpu_blocks = choose_num_cpu_blocks(num_cpu_blocks, blocks, self.block_bytes, device, preemption)
        self.prefix_cache = prefix_cache
        new_cache = PREFIX_CACHES[prefix_cache]
        self.memory = KVCacheManager(blocks, block_size, cpu_blocks, cache=new_cache(block_size) if new_cache else None)
        budget = max(BUDGET[device], max_num_seqs) if max_num_batched_tokens is None else max_num_batched_tokens
        self.scheduler = Scheduler(self.memory, max_num_seqs, budget, preemption, watermark, schedule, chunked_prefill)
        replay = (max_num_seqs, longest) if cuda_graphs and device == "cuda" and backend.name == "triton" else None
        self.runner = ModelRunner(loaded.model, blocks, block_size, cpu_blocks, kind, device, debug, replay)
        self.debug = debug
        self.observers: list[Callable[[StepPlan, StepOutput], None]] = []  # called after each step: watch, trace
        self._random = random.Random(seed)
        self._requests: dict[str, Request] = {}  # the unfinished ones
        self._texts = Texts(self.tokenizer)
        self._arrivals = 0
        self._num_finished = self._num_prompt_tokens = self._num_output_tokens = self._num_steps = 0
        self._peak = Peak()
        self._times = self.runner.times

    # --- whole jobs ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Many[Prompt],
        params: Params | Many[Params] | None = None,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Answer all prompts, in their order. params: one for all, or one for each. cache_salt: see add_request.

        ValueError if a prompt or its parameters are bad, or RequestRefused if one can never fit; then none runs.
        """
        ids = self._add_all(as_list(prompts), params or SamplingParams(), cache_salt)
        finished = {output.request_id: output for output in self._run(ids) if output.finished}
        return [finished[request_id] for request_id in ids if request_id in finished]  # not those aborted meanwhile

    def stream(
        self,
        prompts: Prompt | Many[Prompt],
        params: Params | Many[Params] | None = None,
        cache_salt: str | None = None,
    ) -> Outputs:
        """Like generate, but yields the state of a request after each step that gave it new tokens."""
        yield from self._run(self._add_all(as_list(prompts), params or SamplingParams(), cache_salt))

    def _run(self, request_ids: list[str]) -> Outputs:
        mine = set(request_ids)
        try:
            while mine:
                for output in self.step():
                    if output.request_id in mine:
                        if output.finished:
                            mine.remove(output.request_id)
                        yield output
                mine &= self._requests.keys()  # some may have been aborted
        finally:  # the caller went away, or something broke: leave nothing behind
            for request_id in mine:
                self.abort(request_id)

    # --- step by step -------------------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        params: Params | None = None,
        request_id: str | None = None,
        cache_salt: str | None = None,
    ) -> str:
        """Let a request wait, and return its id. Errors as in generate.

        cache_salt: it finds only what was computed for requests with the same salt, so tenants can't learn by
        tokens or by timing what another one asked.
        """
        request = self._request(prompt, params or SamplingParams(), request_id, cache_salt)
        self.scheduler.add(request)
        self._requests[request.request_id] = request
        return request.request_id

    def step(self) -> list[RequestOutput]:
        """Compute one step. Returns the state of the requests that got new tokens, or ended."""
        t0 = time.perf_counter()
        plan = self.scheduler.schedule()
        t1 = time.perf_counter()
        for s in plan.sequences:
            metrics = self._requests[s.request_id].metrics
            metrics.first_scheduled_time = metrics.first_scheduled_time or time.monotonic()
        if not plan.sequences and self.scheduler.has_unfinished:
            raise RuntimeError("the scheduler has work and found nothing to do: a mistake in minipaged")
        try:
            output = self.runner.execute(plan)
        except BaseException:  # out of memory, Ctrl-C: whoever steps on finds a scheduler that knows what is true
            self.scheduler.abandon(plan)
            raise
        self._peak.record(self.memory.usage(), self._contiguous_blocks())
        t2 = time.perf_counter()
        changed = self.scheduler.update(plan, output)
        t3 = time.perf_counter()
        results = [self._after_step(request) for request in changed]
        self._times.schedule += t1 - t0
        self._times.update += t3 - t2
        self._times.text += time.perf_counter() - t3
        self._num_steps += 1
        if self.debug:
            self.memory.check()
        for observer in self.observers:
            observer(plan, output)
        return results

    def abort(self, request_id: str) -> None:
        """End a request at once and free all it holds, whatever it is doing. Unknown and ended ones are ignored."""
        if request := self._requests.pop(request_id, None):
            self.scheduler.abort(request)
            self._texts.forget(request)

    def reset_prefix_cache(self) -> None:
        """Nothing that was computed until now is found again. Requests under way go on, and publish nothing more."""
        self.memory.reset_prefix_cache()

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def stats(self) -> EngineStats:
        """The account of this moment, and the sums since the beginning."""
        scheduler = self.scheduler
        return EngineStats(
            memory=self.memory.usage(),
            peak=replace(self._peak),
            block_bytes=self.block_bytes,
            contiguous_blocks=self._contiguous_blocks(),
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            num_swapped=len(scheduler.swapped),
            num_finished=self._num_finished,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            num_preemptions=dict(scheduler.num_preemptions),
            prefix_cache=self.prefix_cache,
            prefixes=replace(scheduler.admission.prefixes),
            times=replace(self._times),
        )

    # --- prompts in ---------------------------------------------------------------------------------------------

    def _add_all(self, prompts: list[Prompt], params: Params | Many[Params], cache_salt: str | None) -> list[str]:
        ids: list[str] = []
        each = one_for_each(params, prompts)
        try:
            for prompt, one in zip(prompts, each, strict=True):
                ids.append(self.add_request(prompt, one, cache_salt=cache_salt))
        except Exception as error:
            for request_id in ids:
                self.abort(request_id)
            if len(prompts) > 1:
                error.args = (f"prompt {len(ids)}: {error}",)
            raise
        return ids

    def _request(
        self, prompt: Prompt, params: Params, request_id: str | None, cache_salt: str | None
    ) -> Request:
        if not isinstance(params, (SamplingParams, BeamSearchParams)):
            raise ValueError(f"params must be SamplingParams or BeamSearchParams, not {params!r}")
        if cache_salt is not None and (not isinstance(cache_salt, str) or not cache_salt):
            raise ValueError(f"cache_salt={cache_salt!r}: must be None or a string that is not empty")
        text, token_ids = encode(prompt, self.tokenizer, self.config.vocab_size)
        if request_id in self._requests:
            raise ValueError(f"request_id {request_id!r} is in use")
        free_names = (name for n in count(self._arrivals) if (name := str(n)) not in self._requests)
        name = next(free_names) if request_id is None else request_id
        room = self.max_model_len - len(token_ids)
        if room < 1:
            raise RequestRefused(
                f"the prompt has {len(token_ids)} tokens, and with at least one output token "
                f"the most is {self.max_model_len} (max_model_len)"
            )
        seed = getattr(params, "seed", None)
        request = Request(
            request_id=name,
            arrival=self._arrivals,
            prompt_token_ids=token_ids,
            params=params,
            max_tokens=min(params.max_tokens or room, room),
            eos_token_ids=frozenset(self.config.eos_token_ids),
            seed=self._random.getrandbits(63) if seed is None else seed,
            prompt=text,
            cache_salt=cache_salt,
        )
        self._arrivals += 1
        return request

    # --- text out -----------------------------------------------------------------------------------------------

    def _after_step(self, request: Request) -> RequestOutput:
        now = time.monotonic()
        metrics = request.metrics
        if metrics.first_token_time is None:
            metrics.first_token_time = now
            self._num_prompt_tokens += len(request.prompt_token_ids)
        if request.search:
            outputs = beam_outputs(request, self.tokenizer)
            self._num_output_tokens += sum(len(o.token_ids) for o in outputs) if request.finished else 0
        else:
            self._num_output_tokens += self._texts.read(request, self.scheduler.finish)
            outputs = self._texts.outputs(request)
        if request.finished:
            metrics.finished_time = now
            self._num_finished += 1
            del self._requests[request.request_id]
            self._texts.forget(request)
        name, ids = request.request_id, request.prompt_token_ids
        return RequestOutput(
            name, request.prompt, ids, outputs, request.finished, metrics, request.prompt_logprobs
        )

    def _contiguous_blocks(self) -> int:
        """Blocks that would be taken if each running sequence had reserved memory for the longest it may become."""
        width = sum(request.width for request in self.scheduler.running)
        return width * self.memory.blocks_for(self.max_model_len)

