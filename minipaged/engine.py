"""The engine: requests in, text out, step by step. llm.py does whole jobs with it.

One step is three lines (`LLMEngine._compute`): the scheduler plans, the executor executes, the scheduler learns what
came of it. Around them the engine turns prompts into tokens, tokens into text, and gives each answer to whoever asked.

Whatever breaks a step off, and wherever, nothing is lost. `_unfinished` is what has to be done before anything else
may be: it is set by one assignment, and what it does may be done twice.

    before the step              start over: memory is given up, and everybody is computed again from their tokens
    when tokens are appended     take back what was appended, and start over
    when all is known            give the answers to those who asked
"""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self

from kernels import say
from minipaged.execution.engine_args import EngineArgs
from minipaged.execution.executor import Executor
from minipaged.execution.stats import EngineStats, Peak, Totals
from minipaged.memory import PREFIX_CACHES, KVCacheManager
from minipaged.requests.beam_search_params import BeamSearchParams
from minipaged.requests.request import Request
from minipaged.scheduling.plan import StepOutput, StepPlan
from minipaged.scheduling.scheduler import Scheduler
from minipaged.scheduling.undo import Note
from minipaged.text.inputs import Params, Prompt, one_for_each
from minipaged.text.intake import Intake
from minipaged.text.mailbox import Mailbox
from minipaged.text.outputs import Answer, CompletionOutput, RequestOutput
from minipaged.text.texts import Texts
from minipaged.text.tokenizer import Tokenizer


class LLMEngine:
    """A model, its memory and its scheduler. Names and meanings follow vLLM's `LLM`; options: see `EngineArgs`.

    It may be used from several threads at once: they take turns, step by step.
    """

    def __init__(self, model: str = "smollm2", **options: Any):
        args = EngineArgs.of(model, options)
        self.executor = Executor(args)
        self.model_name, self.prefix_cache, self.debug = args.model, args.prefix_cache, args.debug
        self.config, self.tokenizer = self.executor.config, self.executor.tokenizer
        self.max_model_len, self.block_bytes = self.executor.max_model_len, self.executor.block_bytes
        new_cache = PREFIX_CACHES[args.prefix_cache]
        cache = new_cache(args.block_size) if new_cache else None
        sizes = self.executor.num_blocks, args.block_size, self.executor.num_cpu_blocks
        self.memory = KVCacheManager(*sizes, cache=cache)
        self._intake = Intake(
            self.tokenizer, self.config.vocab_size, self.config.eos_token_ids, self.max_model_len, *sizes[:2],
            args.max_logprobs, args.seed,
        )  # fmt: skip
        self.scheduler = Scheduler(
            self.memory, args.max_num_seqs, args.budget(self.executor.device), args.preemption, args.watermark,
            args.schedule, args.chunked_prefill, self.executor.speculation(), self.executor.transfers(),
        )  # fmt: skip
        self.observers: list[Callable[[StepPlan, StepOutput], None]] = []  # called after each step: watch, trace
        self._lock = threading.RLock()
        self._requests: dict[str, tuple[Request, Mailbox]] = {}  # the unfinished ones, and who asked
        self._mail = Mailbox()  # of those who ask with add_request and step
        self._texts = Texts(self.tokenizer, self.scheduler.finish)
        self._unfinished: Callable[[], None] | None = None
        self._closed = False
        self._told_of_beams = False
        self._computing: int | None = None  # in which thread
        self._orphans: list[Mailbox] = []  # whose owner went away in the middle of a step
        self._totals, self._peak, self._times = Totals(), Peak(), self.executor.times

    def _say_what_beams_do_without(self, request: Request) -> None:
        if isinstance(request.params, BeamSearchParams) and self.scheduler.speculation and not self._told_of_beams:
            self._told_of_beams = True
            say("beam search runs without speculation: each step ranks all beams, so none can be ahead")

    # --- step by step -------------------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: Params | None = None,
        request_id: str | None = None,
        cache_salt: str | None = None,
    ) -> str:
        """Let a request wait, and return its id. Errors as in generate.

        cache_salt: it finds only what was computed for requests with the same salt, so tenants can't learn by
        tokens or by timing what another one asked.
        """
        [params] = one_for_each(sampling_params, [prompt])
        return self.add(self.prepare(prompt, params, request_id, cache_salt), self._mail)

    def prepare(
        self, prompt: Prompt, params: Params, request_id: str | None = None, cache_salt: str | None = None,
        where: str = "",
    ) -> Request:  # fmt: skip
        """Read and check what was asked, and change nothing: it waits for no step, in whatever thread it is called.

        where: what errors begin with.
        """
        try:
            request = self._intake.request(prompt, params, request_id, cache_salt, self._requests)
            self.scheduler.check(request)
            return request
        except ValueError as error:
            error.args = (f"{where}{error}",)
            raise

    def step(self) -> list[RequestOutput]:
        """Compute one step. Returns the state of the requests of add_request that got new tokens, or ended.

        Also what others made for them meanwhile, in `generate` or in another thread; then nothing is computed.
        """
        return self.step_for(self._mail)

    def abort(self, request_id: str) -> None:
        """End a request at once and free all it holds, whatever it is doing; of an ended one, what is kept for others.

        A `generate` or `stream` that waits for it gets its output, with finish_reason "abort".
        """
        with self._lock:
            self._make_whole()
            if request_id in self._requests:
                self._abort(*self._requests[request_id])
            self.scheduler.transfers.abort(request_id)
            self._mail.drop(request_id)  # it may have ended, and not been handed over yet

    def reset_prefix_cache(self) -> None:
        """Nothing that was computed until now is found again. Requests under way go on, and publish nothing more."""
        with self._lock:
            self._make_whole()
            self._unfinished = self._start_over
            self.memory.reset_prefix_cache()
            self._unfinished = None

    def _free_ended(self) -> None:
        """Of what is kept for other engines, what need not be any more; steps do it, too."""
        self._unfinished = self._start_over
        self.scheduler.transfers.free_ended(self.memory)
        self._unfinished = None

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to compute, or to hand over."""
        return bool(self._requests or self._mail)

    def get_tokenizer(self) -> Tokenizer:
        return self.tokenizer

    def stats(self) -> EngineStats:
        """The account of this moment, and the sums since the beginning."""
        with self._lock:
            self._make_whole()
            scheduler = self.scheduler
            self._free_ended()
            return EngineStats(
                memory=self.memory.usage(),
                peak=replace(self._peak),
                block_bytes=self.block_bytes,
                contiguous_blocks=self._contiguous_blocks(),
                num_waiting=len(scheduler.waiting),
                num_running=len(scheduler.running),
                num_swapped=len(scheduler.swapped),
                **vars(self._totals),
                num_preemptions=dict(scheduler.num_preemptions),
                prefix_cache=self.prefix_cache,
                prefixes=replace(scheduler.admission.prefixes),
                times=replace(self.executor.times),
                speculation=scheduler.speculation.counts.copy() if scheduler.speculation else None,
                transfers=replace(scheduler.transfers.counts),
            )

    @property
    def totals(self) -> Totals:
        """The sums since the beginning, as of the last step. Whoever asks, in whatever thread, waits for none."""
        return self._totals

    def check_health(self) -> None:
        """RuntimeError if nothing can be computed any more. Whoever asks, in whatever thread, waits for nothing."""
        self.executor.check_health()

    def close(self) -> None:
        """End all requests, and give the memory back. Nothing can be asked afterwards."""
        with self._lock:
            for request_id in [] if self._closed else list(self._requests):
                self.abort(request_id)
            self._closed = True
            self.executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()

    # --- a step -------------------------------------------------------------------------------------------------

    def step_for(self, mailbox: Mailbox) -> list[RequestOutput]:
        """What waits in a mailbox; if there is nothing, a step is computed first."""
        self._must_not_compute()
        mailbox.arrived()
        try:
            with self._lock:
                self._make_whole()
                if not mailbox and self._requests:
                    self._computing = threading.get_ident()
                    plan, output = self._compute()
                    self._computing = None
                    for observer in self.observers:
                        observer(plan, output)
                return mailbox.take()
        except BaseException:
            self._computing = None
            mailbox.not_taken()
            raise

    def _make_whole(self) -> None:
        """Finish what was broken off."""
        if self._closed:
            raise RuntimeError("this LLM was closed: make a new one")
        self._must_not_compute()
        self._finish_up()
        while self._orphans:
            self._abort_of(self._orphans[-1])
            self._orphans.pop()

    def _must_not_compute(self) -> None:
        if self._computing == threading.get_ident():
            raise RuntimeError("an LLM can't be asked in the middle of its own step, by a signal's handler for example")

    def _finish_up(self) -> None:
        if self._unfinished is not None:
            self._unfinished()
            self._unfinished = None

    def _compute(self) -> tuple[StepPlan, StepOutput]:
        times = [time.perf_counter()]
        self._unfinished = self._start_over
        plan = self.scheduler.schedule()
        times.append(time.perf_counter())
        names = dict.fromkeys([*(s.request_id for s in plan.sequences), *(load.request_id for load in plan.loads)])
        requests = [self._requests[name][0] for name in names]
        if not (requests or self.scheduler.transfers.exports):
            raise RuntimeError("the scheduler has work and found nothing to do: a mistake in minipaged")
        for request in requests:
            request.metrics.first_scheduled_time = request.metrics.first_scheduled_time or time.monotonic()
        output = self.executor.execute(plan)
        self._peak.record(self.memory.usage(), self._contiguous_blocks())
        times.append(time.perf_counter())
        notes = {request.request_id: Note.of(request) for request in requests}
        self._unfinished = partial(self._take_back, notes.values())
        changed = self.scheduler.update(plan, output)
        times.append(time.perf_counter())
        totals = replace(self._totals, num_steps=self._totals.num_steps + 1)
        answers = [self._answer(request, notes[request.request_id], totals) for request in changed]
        self._unfinished = partial(self._deliver, answers, totals)
        self._finish_up()
        times.append(time.perf_counter())
        self._times.schedule += times[1] - times[0]
        self._times.update += times[3] - times[2]
        self._times.text += times[4] - times[3]
        if self.debug:
            self.memory.check()
        return plan, output

    def _answer(self, request: Request, before: Note, totals: Totals) -> tuple[Request, Answer]:
        now, metrics = time.monotonic(), request.metrics
        if metrics.first_token_time is None:
            metrics.first_token_time = now
            totals.num_prompt_tokens += len(request.prompt_token_ids)
        answer = self._say(request)
        if not request.search:
            totals.num_output_tokens += request.num_output_tokens - before.num_output_tokens
        if request.finished:
            metrics.finished_time = now
            totals.num_finished += 1
            totals.num_output_tokens += sum(len(o.token_ids) for o in answer.outputs) if request.search else 0
        return request, answer

    def _say(self, request: Request) -> Answer:
        """The request as it is. A text that can't be made ends its own request, and no other."""
        try:
            return self._texts.answer(request)
        except Exception as error:
            request.error = f"its text can't be made: {error!r}"
            self.scheduler.fail(request, "error")
            outputs = [(seq.index, "", seq.output_token_ids.copy()) for seq in request.sequences]
            failed = [CompletionOutput(*output, finish_reason="error") for output in outputs]
            return Answer(request, failed, self.tokenizer)

    def _deliver(self, answers: list[tuple[Request, Answer]], totals: Totals) -> None:
        for request, answer in answers:
            name = request.request_id
            if name in self._requests:
                if answer.finished or not request.only_the_end:
                    self._requests[name][1].put(answer)
                if answer.finished:
                    self._texts.forget(request)
                    del self._requests[name]
        self._totals = totals

    def _take_back(self, notes: Iterable[Note]) -> None:
        for note in notes:
            note.restore()
        self._start_over()

    def _start_over(self) -> None:
        self._texts = Texts(self.tokenizer, self.scheduler.finish)
        self.scheduler.start_over(request for request, _ in self._requests.values())

    # --- requests come and go -----------------------------------------------------------------------------------

    def add(self, request: Request, mailbox: Mailbox) -> str:
        name = request.request_id
        adding = False
        try:
            with self._lock:
                self._make_whole()
                if name in self._requests:
                    raise ValueError(f"request_id {name!r} is in use")
                self.check_health()
                adding = True
                self._say_what_beams_do_without(request)
                self._unfinished = self._start_over
                self.scheduler.add(request)
                self._requests[name] = request, mailbox
                self._unfinished = None
                return name
        except BaseException:
            if adding:  # nobody knows of it: it is gone
                self._requests.pop(name, None)
                self._unfinished = self._start_over
            raise

    def _abort(self, request: Request, mailbox: Mailbox) -> None:
        self._unfinished = partial(self._give_up, request, mailbox, broken_off=True)
        self.scheduler.abort(request)
        self._give_up(request, mailbox)
        self._unfinished = None
        if not self._requests:
            self.executor.end_loads(self.scheduler.transfers)

    def _give_up(self, request: Request, mailbox: Mailbox, broken_off: bool = False) -> None:
        """Whoever waits for it is told; who steps by hand knows."""
        self._requests.pop(request.request_id, None)
        if broken_off:
            self._start_over()
            for seq in request.live:
                seq.finish_reason = "abort"
        if mailbox is not self._mail:
            mailbox.put(self._say(request))
        self._texts.forget(request)

    def _abort_all(self, mailbox: Mailbox) -> None:
        """Whoever asked went away. A generator may be found to be garbage at any moment: then it waits for its turn."""
        self._orphans.append(mailbox)
        with self._lock:
            if self._computing is None:
                self._make_whole()

    def _abort_of(self, mailbox: Mailbox) -> None:
        for request, its in list(self._requests.values()):
            if its is mailbox:
                self._abort(request, its)

    def _contiguous_blocks(self) -> int:
        """Blocks that would be taken if each running sequence had reserved memory for the longest it may become."""
        return self.scheduler.num_promised_seqs() * self.memory.blocks_for(self.max_model_len)
