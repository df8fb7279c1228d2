"""Beam search as a system of the simulation, and how much memory sharing saves (paper, Figure 15).

Beams fork and die at every token, so here is no shortcut as in paged.py: Scheduler, KVCacheManager and BeamSearch are
the package's, and each beam gets one token an iteration. Only what the model says is made up: see divergence.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from minipaged.experiments.divergence import MEASURED, Candidates, Divergence
from minipaged.experiments.hardware import SERVERS
from minipaged.experiments.loads import Job, jobs
from minipaged.experiments.paged import NO_LIMIT, Paged
from minipaged.experiments.simulation import simulate
from minipaged.experiments.systems import Account, Work, kept
from minipaged.memory import KVCacheManager, MemoryUsage, blocks_for
from minipaged.requests.beam_search_params import BeamSearchParams
from minipaged.requests.request import Request
from minipaged.scheduling.plan import ScheduledSequence, StepOutput, StepPlan
from minipaged.scheduling.scheduler import Scheduler


@dataclass
class Sharing:
    """Blocks saved by sharing, and blocks that there would be without it: both summed over all iterations.

    The sums are divided, not averaged quotients: so this is the share of all block-iterations, and a request counts
    by the memory that it has and by how long it has it, as it does for the room that others find.
    """

    saved: int = 0
    without: int = 0

    def add(self, usage: MemoryUsage, iterations: int = 1) -> None:
        self.saved += usage.blocks_saved_by_sharing * iterations
        self.without += (usage.used + usage.blocks_saved_by_sharing) * iterations

    @property
    def percent(self) -> float:
        return 100 * self.saved / self.without if self.without else 0.0


class BeamScheduler(Scheduler):
    """The package's scheduler. Its plans name no slots and no blocks, since there is no runner to read them."""

    def _scheduled(self, request: Request, counts: dict[int, int]) -> Iterable[ScheduledSequence]:
        assert request.search
        for seq_id, count in counts.items():
            seq = self.sequences[seq_id]
            start = seq.num_computed_tokens
            wanted = request.search.num_candidates if start + count == len(seq) else 0
            yield ScheduledSequence(seq_id, request.request_id, [0] * count, start, [], [], num_candidates=wanted)


@dataclass(slots=True, eq=False)
class Search:
    """A request, and what the model says to it."""

    job: Job
    request: Request
    candidates: Candidates


class PagedBeams:
    """Paging with copy-on-write for `width` beams a request; no search ends before the request's length.

    preemption: see minipaged/scheduling/preemption.py. seed, model: of what the model says.
    """

    def __init__(
        self,
        num_slots: int,
        block_size: int = 16,
        width: int = 4,
        preemption: str = "auto",
        seed: int = 0,
        model: Divergence = MEASURED,
    ):
        num_blocks = num_slots // block_size
        self.block_size, self._num_slots, self._width = block_size, num_slots, width
        self._seed, self._model = seed, model
        self.memory = KVCacheManager(num_blocks, block_size, 4 * num_blocks)
        self.scheduler = BeamScheduler(self.memory, NO_LIMIT, NO_LIMIT, preemption)
        self.sharing = Sharing()
        self._searches: dict[str, Search] = {}
        self._arrivals = 0
        self._plan = StepPlan(0)
        self._usage = self.memory.usage()  # when all tokens of the plan have their slots

    def submit(self, job: Job) -> None:
        number, name = self._arrivals, str(self._arrivals)
        self._arrivals += 1
        params = BeamSearchParams(self._width, job.output, ignore_eos=True)
        request = Request(name, number, [number] * job.prompt, params, job.output)
        self.scheduler.add(request)
        self._searches[name] = Search(job, request, Candidates(self._width, self._seed, number, self._model))

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting) + len(self.scheduler.swapped)

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    def plan(self) -> Work | None:
        if not self.scheduler.has_unfinished:
            return None
        self._plan = plan = self.scheduler.schedule()
        self._usage = self.memory.usage()
        context = sum(s.context_len for s in plan.sequences if s.request_id not in plan.admitted)
        moved = len(plan.swap_out) + len(plan.swap_in)
        return Work(1, len(plan.sequences), plan.num_tokens, context, moved_blocks=moved)

    def finish(self, iterations: int) -> list[Job]:
        self.sharing.add(self._usage, iterations)
        output = StepOutput()
        for name in dict.fromkeys(s.request_id for s in self._plan.sequences if s.num_candidates):
            search = self._searches[name]
            beams = search.request.sequences
            offered = search.candidates.at(len(beams[0].output_token_ids))
            for beam, candidates in zip(beams, offered, strict=False):  # after the prompt there is one beam
                output.candidates[beam.seq_id] = candidates
        changed = self.scheduler.update(self._plan, output)
        return [self._searches.pop(request.request_id).job for request in changed if request.finished]

    def account(self) -> Account:
        usage, size = self._usage, self.block_size
        tokens, internal = usage.tokens_stored, self._surplus()
        return Account(
            tokens,
            usage.used * size - tokens - internal,
            internal,
            usage.free * size + self._num_slots % size,
        )

    def _surplus(self) -> int:
        """Slots behind the last token that there will be: in last blocks, of those who are about to end."""
        surplus = 0
        for request in self.scheduler.running:
            beams = [beam for beam in request.live if beam.in_memory]  # equally long
            length = self.memory.num_tokens(beams[0].seq_id)
            end = blocks_for(length, self.block_size) * self.block_size
            behind = end - kept(self._searches[request.request_id].job)
            if behind > 0:  # each has a last block of its own, since it has just got a slot there
                surplus += behind * len(beams)
        return surplus


# --- Figure 15 ------------------------------------------------------------------------------------------------------


class CountedPaged(Paged):
    """Paged, which also counts what its samples share."""

    def __init__(self, num_slots: int, block_size: int = 16, samples: int = 1):
        super().__init__(num_slots, block_size, samples)
        self.sharing = Sharing()

    def finish(self, iterations: int) -> list[Job]:
        self.sharing.add(self.memory.usage(), iterations)  # a stride ends before anybody needs another block
        for group in self._groups.values():
            if group.came == self._clock:  # its prompt has just been forked, for the next iteration
                early = (self._samples - 1) * blocks_for(group.length, self.block_size)
                self.sharing.saved -= early
                self.sharing.without -= early
        return super().finish(iterations)


# Requests a second for OPT-13B. What is shared hardly depends on it: all that matters is who runs how long.
RATES = {"alpaca": 4.0, "sharegpt": 0.3}
# Beams cost the simulation much and samples little; and there must be many: a few long answers weigh as much as all
# the short ones.
REQUESTS = {
    ("alpaca", "samples"): 6000, ("alpaca", "beams"): 1500, ("sharegpt", "samples"): 1500, ("sharegpt", "beams"): 100,
}  # fmt: skip


def saving(
    load: str, method: str, width: int, num_requests: int | None = None, seed: int = 0, model: Divergence = MEASURED
) -> float:
    """Percent of blocks that sharing saves while so many requests (None: of REQUESTS) are served by OPT-13B."""
    server, rate = SERVERS["13b"], RATES[load]
    num_requests = num_requests or REQUESTS[load, method]
    some = jobs(load, rate, 10 + 2 * num_requests / rate, seed)[:num_requests]
    if method == "beams":
        beams = PagedBeams(server.num_slots, width=width, seed=seed, model=model)
        simulate(beams, some, server)
        return beams.sharing.percent
    samples = CountedPaged(server.num_slots, samples=width)
    simulate(samples, some, server)
    return samples.sharing.percent
