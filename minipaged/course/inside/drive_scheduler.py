"""What assignment 4 is tried with, beside the student's code. Outside, the same is done with the reference.

The model is a memory: the keys and values of a token are the pair (token, position), and the next token is computed
from all pairs that are read back through the page table. One wrong position, slot or block, and the tokens are others.
"""

from minipaged.memory import PREFIX_CACHES, HashCache, KVCacheManager
from minipaged.requests.beam_search_params import BeamSearchParams
from minipaged.requests.request import Request, RequestRefused
from minipaged.requests.sampling_params import Logprob, SampledToken, SamplingParams
from minipaged.requests.sequence import Sequence
from minipaged.scheduling.growth import LiveSequences
from minipaged.scheduling.plan import Step, StepOutput, StepPlan
from minipaged.scheduling.scheduler import Scheduler
from minipaged.scheduling.transfer import Transfers

END, STOP, WORD = 0, 1, 2  # end of text, a stop token, the first of all others
UNREADABLE = -1


# --- a server --------------------------------------------------------------------------------------------------


def serve(case):
    """Requests arrive, and are computed step by step. Answers with what happened in each step, and what came of it."""
    server = Server(case)
    steps = []
    while server.pending or server.scheduler.has_unfinished:
        server.arrive()
        if server.scheduler.has_unfinished:
            steps.append(server.step())
            if len(steps) >= case["patience_of_driver"]:
                break
        server.clock += 1
    memory, usage = server.memory, server.memory.usage()
    return {
        "steps": steps,
        "refused": server.refused,
        "outputs": {
            r.request_id: [[seq.output_token_ids, seq.finish_reason, seq.stop_reason] for seq in r.sequences]
            for r in server.requests
        },
        "made_way": {r.request_id: r.metrics.num_preemptions for r in server.requests},
        "counted": dict(server.scheduler.num_preemptions),
        "left": [len(memory.sequences()), memory.num_blocks - memory.num_free, usage.cpu_used],
        "living": len(server.scheduler.sequences),
    }


class Server:
    """A scheduler with its memory, a model, and requests that come and go."""

    def __init__(self, case):
        index = PREFIX_CACHES[case["cache"]]
        size = case["block_size"]
        self.memory = KVCacheManager(case["blocks"], size, case["cpu_blocks"], cache=index(size) if index else None)
        self.scheduler = Scheduler(
            self.memory,
            max_num_seqs=case["seqs"],
            max_num_batched_tokens=case["budget"],
            preemption=case["preemption"],
            watermark=case["watermark"],
            schedule=case["schedule"],
            chunked_prefill=case["chunks"],
        )
        self.scheduler.admission.patience = case["patience"]
        self.model = Model(case["blocks"], size, case["cpu_blocks"])
        self.requests = [request_of(asked, arrival) for arrival, asked in enumerate(case["requests"])]
        both = list(zip(case["requests"], self.requests, strict=True))
        self.pending = sorted(((asked["at"], r) for asked, r in both), key=lambda pair: pair[0])
        self.aborts = [(asked["abort"], r) for asked, r in both if asked["abort"] is not None]
        self.refused, self.clock = [], 0

    def arrive(self):
        while self.pending and self.pending[0][0] <= self.clock:
            request = self.pending.pop(0)[1]
            try:
                self.scheduler.add(request)
            except RequestRefused:
                self.refused.append(request.request_id)
        for when, request in self.aborts:
            if when == self.clock and request.sequences:
                self.scheduler.abort(request)

    def step(self):
        scheduler = self.scheduler
        plan = scheduler.schedule()
        names = [[r.request_id for r in queue] for queue in (scheduler.waiting, scheduler.running, scheduler.swapped)]
        places = {seq.seq_id: place for r in scheduler.running for place, seq in enumerate(r.sequences)}
        told = {
            "sequences": [self.told(s, places) for s in plan.sequences],
            "admitted": plan.admitted,
            "preempted": [list(pair) for pair in plan.preempted],
            "resumed": plan.resumed,
            "queues": names,
            "moved": [len(plan.swap_out), len(plan.swap_in), len(plan.copies)],
            "free": self.memory.num_free,
        }
        changed = scheduler.update(plan, self.model.execute(plan))
        known = {
            r.request_id: [[seq.in_memory, seq.num_computed_tokens] for seq in r.live]
            for queue in scheduler.queues.lists() for r in queue
        }  # fmt: skip
        told |= {"changed": [r.request_id for r in changed], "known": known}
        return told | {"free_after": self.memory.num_free}

    def told(self, s, places):
        return {
            "request": s.request_id, "sample": places.get(s.seq_id), "start": s.start,
            "tokens": list(s.token_ids), "slots": list(s.slots), "table": list(s.block_table),
            "draws": s.draw.num_draws if s.draw else 0, "candidates": s.num_candidates,
            "targets": [s.targets.start, list(s.targets.token_ids)] if s.targets else None,
        }  # fmt: skip


def request_of(asked, arrival):
    """A prompt begins with the first `same` tokens that all such prompts begin with; the others are its own."""
    own = [1000 * (arrival + 1) + place for place in range(asked["prompt"])]
    prompt = [500 + place for place in range(asked["same"])] + own[asked["same"] :]
    most = asked["most"]
    logprobs = 0 if asked["scored"] else None
    samples = SamplingParams(asked["n"], max_tokens=most, stop_token_ids=[STOP], prompt_logprobs=logprobs)
    params = BeamSearchParams(asked["beams"], max_tokens=most) if asked["beams"] else samples
    salt = asked.get("salt")
    return Request(
        asked["name"], arrival, prompt[: asked["prompt"]], params, most, frozenset({END}), cache_salt=salt
    )  # fmt: skip


class Model:
    """Does what a plan says, on (token, position) pairs."""

    def __init__(self, num_blocks, size, num_cpu_blocks):
        self.size = size
        self.gpu = [[None] * size for _ in range(num_blocks)]
        self.cpu = [[None] * size for _ in range(num_cpu_blocks)]

    def execute(self, plan):
        for source, target in plan.swap_out:
            self.cpu[target] = list(self.gpu[source])
        for block in plan.freed:
            self.gpu[block] = [None] * self.size
        for source, target in plan.swap_in:
            self.gpu[target] = list(self.cpu[source])
        olds = [list(self.gpu[source]) for source, _ in plan.copies]  # all copies are made at once
        for old, (_, target) in zip(olds, plan.copies, strict=False):
            self.gpu[target] = old
        for s in plan.sequences:
            for place, (token, slot) in enumerate(zip(s.token_ids, s.slots, strict=False), s.start):
                self.gpu[slot // self.size][slot % self.size] = (token, place)
        output = StepOutput()
        for s in plan.sequences:
            digest = self.read(s)
            if s.draw:
                drawn = [next_token(digest, s.draw.index + i) for i in range(s.draw.num_draws)]
                output.tokens[s.seq_id] = [[SampledToken(token)] for token in drawn]
            if s.num_candidates:
                output.candidates[s.seq_id] = best_tokens(digest, s.num_candidates)
            if s.targets:
                output.prompt_logprobs[s.seq_id] = [{token: Logprob(-1.0)} for token in s.targets.token_ids]
        return output

    def read(self, s):
        """Of all that is before the last token, and of it; None if something there was never written, or is gone."""
        digest = 17
        for place in range(s.start + len(s.token_ids)):
            block = s.block_table[place // self.size] if place // self.size < len(s.block_table) else None
            entry = self.gpu[block][place % self.size] if block is not None else None
            if entry is None:
                return None
            digest = (digest * 1_000_003 + entry[0] * 8191 + entry[1]) % (1 << 61)
        return digest


def next_token(digest, sample):
    if digest is None:
        return UNREADABLE
    number = (digest * 6_364_136 + sample * 104_729) % 1_000_003
    return number % 60 if number % 60 in (END, STOP) else WORD + number % 997


def best_tokens(digest, count):
    if digest is None:
        return [(UNREADABLE - rank, -1.0 - rank) for rank in range(count)]
    falling = [-rank - (digest >> 5 * rank) % 65_536 / 65_536 for rank in range(count)]  # no two sums are alike
    return [(10 * (digest // 7**rank % 9973) + 10 + rank, logprob) for rank, logprob in enumerate(falling)]


# --- a part alone ----------------------------------------------------------------------------------------------


def refuse(case):
    """Whether a request is refused."""
    memory = KVCacheManager(case["blocks"], case["block_size"])
    scheduler = Scheduler(memory, max_num_seqs=case["seqs"])
    try:
        scheduler.check(request_of(case["requests"][0], 0))
    except RequestRefused:
        return "refused"
    return "accepted"


def share(case):
    """A step is shared out: requests ask one after the other, and take what they get."""
    asked = []

    def wanted_by_short(step):
        asked.append(step.spare)
        return case["wanted"]

    step = Step(StepPlan(1), case["spare"], case["short"], wanted_by_short)
    happened = []
    for number, one in enumerate(case["takers"]):
        request = Request(str(number), number, [7] * one["prompt"], SamplingParams(max(1, len(one["outputs"]))), 99)
        request.sequences = [
            Sequence(
                request.prompt_token_ids, 10 * number + i, i, [8] * length, in_memory=i not in one["away"],
                num_computed_tokens=0 if i in one["away"] else one["computed"],
            ) for i, length in enumerate(one["outputs"])
        ]  # fmt: skip
        granted = [step.grant(todo) for todo in one["grants"]]
        counts = step.counts_of(request)
        set_aside = len(counts) if one["set_aside"] else 0
        step.take(request, counts, [tuple(pair) for pair in one["copies"]], set_aside)
        happened.append({
            "granted": granted, "counts": sorted([seq_id % 10, count] for seq_id, count in counts.items()),
            "spare": step.spare, "filled": step.filled, "copies": [list(pair) for pair in step.plan.copies],
            "noted": [[r.request_id, sorted(c.values())] for r, c in step.counts], "asked": len(asked),
        })  # fmt: skip
    return happened


def grow(case):
    """What a model has drawn for one request, step by step: rows of tokens for each of its sequences that live."""
    size = case["block_size"]
    memory = KVCacheManager(64, size, 64, cache=HashCache(size))
    living = LiveSequences(memory, Transfers())
    asked, ignore = case["most"] + 1, case["ignore_eos"]  # one more than the model's length allows
    params = SamplingParams(case["n"], max_tokens=asked, stop_token_ids=[STOP], ignore_eos=ignore)
    request = Request("r", 0, [100 + i for i in range(case["prompt"])], params, case["most"], frozenset({END}))
    request.sequences = [living.add(Sequence(request.prompt_token_ids))]
    [first] = request.sequences
    memory.allocate(first.seq_id, case["prompt"], prefix=memory.find([]))
    first.in_memory, first.num_computed_tokens = True, case["prompt"]
    happened = []
    for number, rows in enumerate(case["rounds"]):
        live, output = list(request.live), StepOutput()
        if number:
            memory.append({seq.seq_id: len(row) for seq, row in zip(live, rows, strict=False)})
            for seq, row in zip(live, rows, strict=False):
                output.tokens[seq.seq_id] = [[SampledToken(token) for token in row]]
        elif live:
            output.tokens[live[0].seq_id] = [[SampledToken(t) for t in row] for row in rows]
        changed = living.grow(request, output)
        happened.append({
            "sequences": [grown(seq, memory) for seq in request.sequences], "changed": changed,
            "free": memory.num_free, "living": len(living), "held": len(memory.sequences()),
        })  # fmt: skip
    if case["swapped"]:
        memory.swap_out([seq.seq_id for seq in request.live])
    for seq in list(request.live):
        living.end(request, seq, "abort")
    return [*happened, {
        "sequences": [grown(seq, memory) for seq in request.sequences], "changed": None,
        "free": memory.num_free, "living": len(living), "held": len(memory.sequences()),
    }]  # fmt: skip


def grown(seq, memory):
    tokens = [*seq.prompt_token_ids, *seq.output_token_ids]
    return {
        "sample": seq.index, "tokens": seq.output_token_ids, "again": [drawn.token_id for drawn in seq.sampled],
        "ended": [seq.finish_reason, seq.stop_reason],
        "computed": seq.num_computed_tokens if seq.finish_reason is None else None,  # of the dead nobody asks it
        "slots": memory.num_tokens(seq.seq_id) if seq.in_memory else None, "found": memory.find(tokens).num_tokens,
    }  # fmt: skip
