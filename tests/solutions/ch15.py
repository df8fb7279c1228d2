"""Chapter 15: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821

import random
import statistics
from fractions import Fraction
from math import comb, lgamma, prod

from minipaged.models.llama import Llama

# --- answered --------------------------------------------------------------------------------------------------------


def answered(batch, outputs, seconds):
    return batch * len(outputs) / (sum(outputs) * seconds)


def by_little(batch, outputs, seconds):
    """N = rate * W."""
    stay = statistics.fmean(outputs) * seconds
    return batch / stay


def with_numpy(batch, outputs, seconds):
    steps = np.cumsum(np.array(outputs, dtype=np.float64))
    return batch * steps.size / steps[-1] / seconds


def exactly(batch, outputs, seconds):
    total = Fraction(0)
    for tokens in outputs:
        total += Fraction(tokens, batch)
    return float(len(outputs) / total) / seconds


def over_time(batch, outputs, seconds):
    """The mean answer of those who are running: the paradox where it does not belong."""
    return batch * sum(outputs) / (sum(n * n for n in outputs) * seconds)


def sorts_first(batch, outputs, seconds):
    outputs.sort()
    return answered(batch, outputs, seconds)


def mean_of_rates(batch, outputs, seconds):
    return batch * statistics.fmean(1 / n for n in outputs) / seconds


# --- by_luck ---------------------------------------------------------------------------------------------------------


def by_luck(ours, theirs):
    if len(ours) != len(theirs):
        raise ValueError("pairs are wanted")
    wins = sum(a < b for a, b in zip(ours, theirs, strict=True))
    n = sum(a != b for a, b in zip(ours, theirs, strict=True))
    return tail(n, max(wins, n - wins))


def tail(n, most):
    return sum(comb(n, k) for k in range(n + 1) if max(k, n - k) >= most) / 2**n


def coin_by_coin(ours, theirs):
    """How probable each number of heads is, after each coin."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
    heads = {0: 1.0}
    for _ in pairs:
        after = {}
        for count, share in heads.items():
            for next_count in (count, count + 1):
                after[next_count] = after.get(next_count, 0.0) + share / 2
        heads = after
    wins = sum(a < b for a, b in pairs)
    most = max(wins, len(pairs) - wins)
    return min(1.0, sum(share for count, share in heads.items() if max(count, len(pairs) - count) >= most))


def twice_one_side(ours, theirs):
    signs = np.sign(np.array(ours, dtype=float) - np.array(theirs, dtype=float))  # its error is a ValueError
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} numbers against {len(theirs)}")
    n, less = int(abs(signs).sum()), int((signs < 0).sum())
    most = max(less, n - less)
    whole = sum(Fraction(comb(n, k), 2**n) for k in range(most, n + 1))
    return float(min(Fraction(1), 2 * whole))


def with_logarithms(ours, theirs):
    pairs = [one for one in zip(ours, theirs, strict=True) if one[0] != one[1]]
    n, wins = len(pairs), len([1 for a, b in pairs if b > a])
    uneven = [k for k in range(n + 1) if abs(2 * k - n) >= abs(2 * wins - n)]
    shares = [lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) - n * log(2) for k in uneven]
    return float(min(1.0, np.exp(shares).sum()))


def ties_count(ours, theirs):
    if len(ours) != len(theirs):
        raise ValueError
    wins, n = sum(a < b for a, b in zip(ours, theirs, strict=True)), len(ours)
    return tail(n, max(wins, n - wins))


def one_side_only(ours, theirs):
    pairs = [one for one in zip(ours, theirs, strict=True) if one[0] != one[1]]
    wins, n = sum(a < b for a, b in pairs), len(pairs)
    return sum(comb(n, k) for k in range(max(wins, n - wins), n + 1)) / 2**n


def more_uneven(ours, theirs):
    pairs = [one for one in zip(ours, theirs, strict=True) if one[0] != one[1]]
    wins, n = sum(a < b for a, b in pairs), len(pairs)
    return tail(n, max(wins, n - wins) + 1)


def above_one(ours, theirs):
    """Twice one side, also where both sides have the middle."""
    return 2 * one_side_only(ours, theirs)


def unpaired(ours, theirs):
    return by_luck(sorted(ours), sorted(theirs))


def any_length(ours, theirs):
    n = min(len(ours), len(theirs))
    return by_luck(ours[:n], theirs[:n])


def thrown(ours, theirs):
    """A thousand times, instead of counted."""
    pairs = [one for one in zip(ours, theirs, strict=True) if one[0] != one[1]]
    rng, n, wins = random.Random(0), len(pairs), sum(a < b for a, b in pairs)
    heads = [sum(rng.random() < 0.5 for _ in range(n)) for _ in range(1000)]
    return sum(max(k, n - k) >= max(wins, n - wins) for k in heads) / 1000


def normal(ours, theirs):
    pairs = [one for one in zip(ours, theirs, strict=True) if one[0] != one[1]]
    n, wins = len(pairs), sum(a < b for a, b in pairs)
    return 2 * (1 - statistics.NormalDist().cdf(abs(2 * wins - n) / sqrt(n))) if n else 1.0


def removes_ties(ours, theirs):
    answer = by_luck(ours, theirs)
    for i in reversed(range(len(ours))):
        if ours[i] == theirs[i]:
            del ours[i], theirs[i]
    return answer


# --- server_for ------------------------------------------------------------------------------------------------------


def server_for(name, config, gpu, memory, share=0.9):
    weights = 2 * sum(prod(shape) for shape in Llama.tensor_shapes(config).values())
    left = int(share * memory - weights)
    if left <= 0:
        raise ValueError(f"{name}: {weights} bytes of weights leave nothing")
    heads = config.num_heads, config.num_kv_heads, config.head_size
    return hardware.Server(name, gpu, 1, config.num_layers, *heads, weights, left)


def by_keywords(name, config, gpu, memory, share=0.9):
    numbers = [np.prod(shape) for shape in Llama.tensor_shapes(config).values()]
    weight_bytes = 2 * sum(numbers)
    if share * memory <= weight_bytes:
        raise ValueError("too small")
    return hardware.Server(
        model=name, gpu=gpu, num_gpus=1, layers=config.num_layers, heads=config.num_heads, kv_heads=config.num_kv_heads,
        head_size=config.head_size, weight_bytes=weight_bytes, kv_memory=int(share * memory - weight_bytes),
    )  # fmt: skip


def from_another(name, config, gpu, memory, share=0.9):
    parts = dict(model=name, gpu=gpu, layers=config.num_layers)
    parts |= dict(heads=config.num_heads, kv_heads=config.num_kv_heads, head_size=config.head_size)
    size = 0
    for shape in Llama.tensor_shapes(config).values():
        count = 2
        for side in shape:
            count *= side
        size += count
    room = int(memory * share) - size
    if room < 1:
        raise ValueError(room)
    return replace(SERVERS["13b"], num_gpus=1, weight_bytes=size, kv_memory=room, **parts)


def of_llama3(name, config, gpu, memory, share=0.9):
    """Right for one model."""
    return replace(server_for(name, config, gpu, memory, share), heads=32, kv_heads=8, head_size=128)


def through_the_package(name, config, gpu, memory, share=0.9):
    return replace(hardware.eight_bit_cache(server_for(name, config, gpu, memory, share)),
                   model=name, cache_bytes=2, scale_bytes=0)  # fmt: skip


# --- SmallestFirst ---------------------------------------------------------------------------------------------------


class SmallestFirst:
    block_size = None

    def __init__(self, num_slots):
        self.num_free = num_slots
        self.waiting, self.running = [], []  # running: [job, tokens of the answer]

    num_waiting = property(lambda self: len(self.waiting))
    num_running = property(lambda self: len(self.running))

    def size(self, job):
        return job.prompt + job.output - 1

    def submit(self, job):
        self.waiting.append(job)

    def next(self):
        job = min(self.waiting, key=self.size, default=None)
        return job if job and self.size(job) <= self.num_free else None

    def plan(self):
        old, prompts = len(self.running), 0
        context = sum(job.prompt + done for job, done in self.running)
        while job := self.next():
            self.waiting.remove(job)
            self.num_free -= self.size(job)
            self.running.append([job, 0])
            prompts += job.prompt
        return Work(1, len(self.running), old + prompts, context) if self.running else None

    def finish(self, iterations):
        for one in self.running:
            one[1] += iterations
        over = [job for job, done in self.running if done == job.output]
        self.running = [one for one in self.running if one[1] < one[0].output]
        self.num_free += sum(map(self.size, over))
        return over

    def account(self):
        stored = sum(job.prompt + done for job, done in self.running)
        held = sum(self.size(job) for job, _ in self.running)
        return Account(stored, held - stored, 0, self.num_free)


class Heaps:
    """Both queues are heaps, and sums are kept up to date."""

    block_size = None

    def __init__(self, num_slots):
        self.num_slots, self.clock, self.number = num_slots, 0, 0
        self.smallest, self.soonest = [], []
        self.stored = self.held = self.fresh = 0

    @property
    def num_waiting(self):
        return len(self.smallest)

    @property
    def num_running(self):
        return len(self.soonest)

    def submit(self, job):
        heappush(self.smallest, (job.prompt + job.output, self.number, job))
        self.number += 1

    def plan(self):
        old, prompts = len(self.soonest), 0
        self.stored += old
        context = self.stored
        while self.smallest and self.smallest[0][0] - 1 + self.held <= self.num_slots:
            size, number, job = heappop(self.smallest)
            heappush(self.soonest, (self.clock + job.output, number, job))
            self.held += size - 1
            self.stored += job.prompt
            prompts += job.prompt
        if not self.soonest:
            return None
        return Work(iterations=1, sequences=len(self.soonest), tokens=old + prompts, context=context)

    def finish(self, iterations):
        self.clock += iterations
        done = []
        while self.soonest and self.soonest[0][0] == self.clock:
            job = heappop(self.soonest)[2]
            size = job.prompt + job.output - 1
            self.held, self.stored = self.held - size, self.stored - size
            done.append(job)
        return done

    def account(self):
        return Account(tokens=self.stored, reserved=self.held - self.stored, external=self.num_slots - self.held)


@dataclass
class Guest:
    job: Job
    left: int
    stored: int = 0

    @property
    def size(self):
        return self.job.prompt + self.job.output - 1


class Sorted:
    """A sorted list, and a guest for each request."""

    block_size = None

    def __init__(self, num_slots):
        self.num_slots, self.line, self.inside = num_slots, [], []

    def submit(self, job):
        self.line.append(Guest(job, job.output))
        self.line.sort(key=lambda guest: guest.size)  # keeps equal ones in order

    @property
    def free(self):
        return self.num_slots - sum(guest.size for guest in self.inside)

    def plan(self):
        tokens = context = 0
        for guest in self.inside:
            guest.stored += 1
            tokens += 1
            context += guest.stored
        while self.line and self.line[0].size <= self.free:
            guest = self.line.pop(0)
            guest.stored = guest.job.prompt
            tokens += guest.stored
            self.inside.append(guest)
        return Work(1, len(self.inside), tokens, context) if self.inside else None

    def finish(self, iterations):
        gone = []
        for guest in self.inside[:]:
            guest.left -= 1
            if not guest.left:
                self.inside.remove(guest)
                gone.append(guest.job)
        return tuple(gone)

    def account(self):
        stored = sum(guest.stored for guest in self.inside)
        free = self.free
        return Account(stored, self.num_slots - free - stored, 0, free)

    def __getattr__(self, name):
        counts = {"num_waiting": "line", "num_running": "inside"}
        if name in counts:
            return len(getattr(self, counts[name]))
        raise AttributeError(name)


class FirstCome(SmallestFirst):
    def next(self):
        job = self.waiting[0] if self.waiting else None
        return job if job and self.size(job) <= self.num_free else None


class ByPrompt(SmallestFirst):
    def next(self):
        job = min(self.waiting, key=lambda job: job.prompt, default=None)
        return job if job and self.size(job) <= self.num_free else None


class LastOfEqualOnes(SmallestFirst):
    def next(self):
        job = min(reversed(self.waiting), key=self.size, default=None)
        return job if job and self.size(job) <= self.num_free else None


class LargestThatFits(SmallestFirst):
    def next(self):
        return max((job for job in self.waiting if self.size(job) <= self.num_free), key=self.size, default=None)


class OneSlotMore(SmallestFirst):
    def size(self, job):
        return job.prompt + job.output


class FreesNothing(SmallestFirst):
    def finish(self, iterations):
        free = self.num_free
        over = super().finish(iterations)
        self.num_free = free
        return over


class OneAStep(SmallestFirst):
    """Lets one in at each step."""

    def plan(self):
        waiting = self.waiting
        self.waiting = [job] if (job := self.next()) else []
        work = super().plan()
        self.waiting = [one for one in waiting if one is not job]
        return work


class ReadsItsPrompt(SmallestFirst):
    def plan(self):
        old = len(self.running)
        work = super().plan()
        return work and replace(work, context=work.context + sum(job.prompt for job, _ in self.running[old:]))


class OneForAll(SmallestFirst):
    """All systems have one queue."""

    everyone = []

    def __init__(self, num_slots):
        super().__init__(num_slots)
        self.waiting = self.everyone


class Counts(SmallestFirst):
    """A system of the package behind it."""

    def __init__(self, num_slots):
        super().__init__(num_slots)
        self.system = without_holes(num_slots)


RIGHT = {
    "answered": [answered, by_little, with_numpy, exactly],
    "by_luck": [by_luck, coin_by_coin, twice_one_side, with_logarithms],
    "server_for": [server_for, by_keywords, from_another],
    "SmallestFirst": [SmallestFirst, Heaps, Sorted],
}
WRONG = {
    "answered": [
        over_time,
        sorts_first,
        mean_of_rates,
        lambda batch, outputs, seconds: batch / seconds,  # tokens, not requests
        lambda batch, outputs, seconds: answered(1, outputs, seconds),
        lambda batch, outputs, seconds: batch / (statistics.median(outputs) * seconds),
        lambda batch, outputs, seconds: batch / (100 * seconds),
        lambda batch, outputs, seconds: batch / (statistics.geometric_mean(outputs) * seconds),
        lambda batch, outputs, seconds: batch / (max(outputs) * seconds),
        lambda batch, outputs, seconds: Fraction(answered(batch, outputs, seconds)),
        lambda batch, outputs, seconds: batch / ((sum(outputs) / len(outputs) + 1) * seconds),  # with the prompt's step
    ],
    "by_luck": [
        ties_count, one_side_only, more_uneven, above_one, unpaired, any_length, thrown, normal, removes_ties,
        lambda ours, theirs: 0.5 ** (len(ours) - 1) if len(ours) == len(theirs) else 1 / 0,
        lambda ours, theirs: round(by_luck(ours, theirs), 2),
    ],
    "server_for": [
        of_llama3,
        through_the_package,
        lambda name, config, *rest: server_for(name, replace(config, num_kv_heads=config.num_heads), *rest),
        lambda *given: replace(server_for(*given), kv_memory=int(0.9 * given[3])),  # the weights are nowhere
        lambda name, config, gpu, memory, share=0.9: server_for(name, config, gpu, memory),  # blind to the share
        lambda name, config, gpu, *rest: server_for(name, config, hardware.H100, *rest),
        lambda name, config, gpu, memory, share=0.5: server_for(name, config, gpu, memory, share),
        lambda *given: replace(server_for(*given), head_size=64),
        lambda *given: replace(server_for(*given), model="Llama"),
        lambda *given: replace(server_for(*given), weight_bytes=server_for(*given).weight_bytes / 2),
    ],
    "SmallestFirst": [
        FirstCome, ByPrompt, LastOfEqualOnes, LargestThatFits, OneSlotMore, FreesNothing, OneAStep, ReadsItsPrompt,
        OneForAll, Counts,
    ],
}  # fmt: skip
