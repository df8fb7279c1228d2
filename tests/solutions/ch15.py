"""Chapter 15: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821


def answered(batch, outputs, seconds):
    return batch * len(outputs) / (sum(outputs) * seconds)


def over_time(batch, outputs, seconds):
    """The mean answer of those who are running: the paradox where it does not belong."""
    return batch * sum(outputs) / (sum(n * n for n in outputs) * seconds)


def best_block_size(jobs, server, sizes):
    def latency(B):
        return simulate(Paged(server.num_slots, B), jobs, server).normalized_latency

    return min(sorted(sizes), key=latency)


def by_batch(jobs, server, sizes):
    return max(sorted(sizes), key=lambda B: simulate(Paged(server.num_slots, B), jobs, server).mean_batch)


def server_for(name, config, gpu, memory, share=0.9):
    from math import prod

    from minipaged.models.llama import Llama

    weights = 2 * sum(prod(shape) for shape in Llama.tensor_shapes(config).values())
    heads = config.num_heads, config.num_kv_heads, config.head_size
    return hardware.Server(name, gpu, 1, config.num_layers, *heads, weights, int(share * memory - weights))


class NoHoles:
    block_size = None

    def __init__(self, num_slots, reserve):
        self.num_free, self.reserve = num_slots, reserve
        self.waiting, self.running = deque(), []  # running: [job, slots, iterations done]

    def submit(self, job):
        self.waiting.append(job)

    num_waiting = property(lambda self: len(self.waiting))
    num_running = property(lambda self: len(self.running))

    def plan(self):
        old, prompts = len(self.running), 0
        context = sum(job.prompt + done for job, _, done in self.running)
        while (job := self.next()) is not None:
            self.waiting.remove(job)
            slots = self.reserve(job)
            self.num_free -= slots
            self.running.append([job, slots, 0])
            prompts += job.prompt
        size = len(self.running)
        return Work(1, size, old + prompts, context) if size else None

    def next(self):
        if self.waiting and self.reserve(self.waiting[0]) <= self.num_free:
            return self.waiting[0]
        return None

    def finish(self, iterations):
        for one in self.running:
            one[2] += iterations
        over = [one for one in self.running if one[2] == one[0].output]
        self.running = [one for one in self.running if one[2] < one[0].output]
        self.num_free += sum(slots for _, slots, _ in over)
        return [job for job, _, _ in over]

    def account(self):
        tokens = sum(job.prompt + done for job, _, done in self.running)
        kept = sum(job.prompt + job.output - 1 for job, _, _ in self.running)
        asked = sum(slots for _, slots, _ in self.running)
        return Account(tokens, kept - tokens, asked - kept, self.num_free)


class Overtakes(NoHoles):
    """Who fits goes first, whoever came before."""

    def next(self):
        return next((job for job in self.waiting if self.reserve(job) <= self.num_free), None)


class OneSlotMore(NoHoles):
    """As if the last token were stored too: the account does not say what the slots are."""

    def account(self):
        right = super().account()
        more = min(len(self.running), right.internal)
        return Account(right.tokens, right.reserved + more, right.internal - more, right.external)


class Rounds(NoHoles):
    """Room for powers of two, as the buddy allocator gives."""

    def __init__(self, num_slots, reserve):
        super().__init__(num_slots, lambda job: next_power(reserve(job)))


WRONG = {
    "answered": [
        over_time,
        lambda batch, outputs, seconds: batch / seconds,  # tokens, not requests
        lambda batch, outputs, seconds: answered(1, outputs, seconds),
    ],
    "best_block_size": [
        lambda jobs, server, sizes: 16 if 16 in sizes else min(sizes),
        lambda jobs, server, sizes: best_block_size(jobs, opt, sizes),  # blind to the server
        lambda jobs, server, sizes: -best_block_size(jobs, server, [*sizes]) if len(jobs) == 1 else min(sizes),
        by_batch,
    ],
    "server_for": [
        lambda name, config, *rest: server_for(name, replace(config, num_kv_heads=config.num_heads), *rest),
        lambda *given: replace(server_for(*given), kv_memory=int(0.9 * given[3])),  # the weights are nowhere
        lambda name, config, gpu, memory, share=0.9: server_for(name, config, gpu, memory),  # blind to the share
    ],
    "NoHoles": [Overtakes, OneSlotMore, Rounds],
}
