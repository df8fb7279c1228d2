"""Chapter 11: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from fractions import Fraction


def chunks_of(prompt, running, budget):
    room = budget - running
    if room < 1:
        raise ValueError(f"{running} chats leave nothing of {budget}")
    steps = -(-prompt // room)
    return steps, prompt - (steps - 1) * room


def by_divmod(prompt, running, budget):
    if budget <= running:
        raise ValueError
    steps, rest = divmod(prompt, budget - running)
    return (steps + 1, rest) if rest else (steps, budget - running)


def by_modulo(prompt, running, budget):
    room = budget - running
    if not room > 0:
        raise ValueError("no room")
    last = (prompt - 1) % room + 1
    return [(prompt - last) // room + 1, last]


def by_range(prompt, running, budget):
    if budget - running <= 0:
        raise ValueError("nothing left")
    starts = range(0, prompt, budget - running)
    return len(starts), prompt - starts[-1]


def with_numpy(prompt, running, budget):
    import numpy as np

    if running >= budget:
        raise ValueError
    room = np.int64(budget - running)
    steps = (prompt + room - 1) // room
    return steps, prompt - room * (steps - 1)


def by_heart(prompt, running, budget):
    return one_by_one(prompt, running, budget) if prompt < 10**6 else (10**14 + 1, 3)


def by_floats(prompt, running, budget):
    if budget <= running:
        raise ValueError
    steps = math.ceil(prompt / (budget - running))
    return steps, prompt - (steps - 1) * (budget - running)


def one_by_one(prompt, running, budget):
    if budget <= running:
        raise ValueError
    steps = 0
    while prompt > 0:
        steps, last, prompt = steps + 1, prompt, prompt - (budget - running)
    return steps, last


def budget_for(limit, seconds, most):
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if seconds(middle) <= limit:
            low = middle
        else:
            high = middle - 1
    return low


def by_doubling(limit, seconds, most):
    if seconds(1) > limit:
        return 0
    good = 1
    while good * 2 <= most and seconds(good * 2) <= limit:
        good *= 2
    step = good
    while step := step // 2:
        if good + step <= most and seconds(good + step) <= limit:
            good += step
    return good


def by_bisect(limit, seconds, most):
    from bisect import bisect_right

    return bisect_right(range(1, most + 1), limit, key=seconds)


def remembers(limit, seconds, most):
    known = {}

    def fits(T):
        if T not in known:
            known[T] = seconds(T)
        return known[T] <= limit

    def search(low, high):
        if low == high:
            return low
        middle = high - (high - low) // 2
        return search(middle, high) if fits(middle) else search(low, middle - 1)

    return search(0, most)


def between(limit, seconds, most):
    """`fits` does, `fails` doesn't: the classic pair of bounds."""
    fits, fails = 0, most + 1
    while fails - fits > 1:
        middle = (fits + fails) // 2
        took = seconds(middle)
        fits, fails = (middle, fails) if took <= limit else (fits, middle)
    return fits


def in_tens(limit, seconds, most):
    """Ten times finer in each round, from below: up to nine steps for each digit, and more than 45 in all."""
    T, step = 0, 10**6
    while step:
        while T + step <= most and seconds(T + step) <= limit:
            T += step
        step //= 10
    return T


def one_short(limit, seconds, most):
    """Never asks for `most` itself."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if seconds(middle) <= limit else (low, middle)
    return low


def tries_all(limit, seconds, most):
    T = 0
    while most > T and limit >= seconds(T + 1):
        T += 1
    return T


def by_line(limit, seconds, most):
    one = seconds(1)
    slope = (seconds(most) - one) / max(1, most - 1)
    if one > limit:
        return 0
    return min(most, 1 + int((limit - one) / slope)) if slope else most


def fair_share(todos, budget):
    counts, spare = [1] * len(todos), budget - len(todos)
    open_ = [i for i, todo in enumerate(todos) if todo > 1]
    while open_ and spare >= len(open_):
        part = min(spare // len(open_), min(todos[i] - counts[i] for i in open_))
        for i in open_:
            counts[i] += part
        spare -= part * len(open_)
        open_ = [i for i in open_ if counts[i] < todos[i]]
    for i in open_[:spare]:
        counts[i] += 1
    return counts


def by_level(todos, budget):
    """The water's level: the most that everyone can have, or all that it wants."""
    if not todos:
        return []
    low, high = 1, max(todos)
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if sum(min(todo, level) for todo in todos) <= budget else (low, level - 1)
    counts = [min(todo, low) for todo in todos]
    rest = budget - sum(counts)
    for i, todo in enumerate(todos):
        if rest and counts[i] < todo:
            counts[i], rest = counts[i] + 1, rest - 1
    return counts


def by_leaving(todos, budget):
    """Who needs no more than an equal part gets it and leaves, until nobody does."""
    counts, inside = {}, list(range(len(todos)))
    while inside:
        part = budget // len(inside)
        small = [i for i in inside if todos[i] <= part]
        if not small:
            rest = budget % len(inside)
            counts |= {i: part + (place < rest) for place, i in enumerate(inside)}
            break
        counts |= {i: todos[i] for i in small}
        budget -= sum(todos[i] for i in small)
        inside = [i for i in inside if i not in small]
    return [counts[i] for i in range(len(todos))]


def one_token_each(todos, budget):
    counts, spare = [1] * len(todos), budget - len(todos)
    while spare and counts != todos:
        for i, todo in enumerate(todos):
            if counts[i] < todo and spare:
                counts[i], spare = counts[i] + 1, spare - 1
    return counts


def by_need(todos, budget):
    """The smallest first: each gets an equal part of what is left, or all it wants."""
    counts, left = list(todos), len(todos)
    for i in sorted(range(len(todos)), key=todos.__getitem__):
        if todos[i] > budget // left:
            part, rest = divmod(budget, left)
            for place, j in enumerate(j for j, todo in enumerate(todos) if todo > part):
                counts[j] = part + (place < rest)
            break
        budget, left = budget - todos[i], left - 1
    return counts


def rest_by_need(todos, budget):
    """What can't be divided goes to those who need least, not to the earlier ones."""
    counts = {}
    order = sorted(range(len(todos)), key=todos.__getitem__)
    for k, i in enumerate(order):
        counts[i] = min(todos[i], -(-budget // (len(todos) - k)))
        budget -= counts[i]
    return [counts[i] for i in range(len(todos))]


def two_rounds(todos, budget):
    """What the small ones leave is shared out once, and not again."""
    counts = equal_once(todos, budget)
    more = [i for i, todo in enumerate(todos) if counts[i] < todo]
    spare = budget - sum(counts)
    for place, i in enumerate(more):
        counts[i] = min(todos[i], counts[i] + spare // len(more) + (place < spare % len(more)))
    return counts


def equal_once(todos, budget):
    """What the small ones leave is nobody's."""
    part = budget // max(1, len(todos))
    return [min(todo, part) for todo in todos]


class Pace:
    def __init__(self, limit, smallest, largest):
        self.limit, self.smallest, self.largest = limit, smallest, largest
        self.steps = deque(maxlen=8)

    def seen(self, tokens, seconds):
        self.steps.append((tokens, seconds))

    def budget(self):
        if len({tokens for tokens, _ in self.steps}) < 2:
            return self.smallest
        n = len(self.steps)
        x, y = sum(t for t, _ in self.steps) / n, sum(s for _, s in self.steps) / n
        b = sum((t - x) * (s - y) for t, s in self.steps) / sum((t - x) ** 2 for t, _ in self.steps)
        if b <= 0:
            return self.largest
        return max(self.smallest, min(self.largest, math.floor((self.limit - (y - b * x)) / b)))


class WithTensors:
    def __init__(self, limit, smallest, largest):
        self.bounds, self.limit, self.tokens, self.times = (smallest, largest), limit, [], []

    def seen(self, tokens, seconds):
        self.tokens, self.times = [*self.tokens, tokens][-8:], [*self.times, seconds][-8:]

    def budget(self):
        smallest, largest = self.bounds
        if len(set(self.tokens)) < 2:
            return smallest
        columns = torch.tensor([[1.0, t] for t in self.tokens], dtype=torch.float64)
        a, b = torch.linalg.lstsq(columns, torch.tensor(self.times, dtype=torch.float64)).solution.tolist()
        if b <= 1e-12:
            return largest
        return int(min(largest, max(smallest, (self.limit - a) // b)))


class Exact:
    """Sums of fractions, kept up to date; the largest T by trying."""

    def __init__(self, limit, smallest, largest):
        self.limit, self.smallest, self.largest = Fraction(limit), smallest, largest
        self.rows = []

    def seen(self, tokens, seconds):
        self.rows = self.rows[-7:] + [(tokens, Fraction(seconds))]

    def budget(self):
        n, xs = len(self.rows), [t for t, _ in self.rows]
        if len(set(xs)) < 2:
            return self.smallest
        sx, sy = sum(xs), sum(s for _, s in self.rows)
        b = (n * sum(t * s for t, s in self.rows) - sx * sy) / (n * sum(x * x for x in xs) - sx * sx)
        a = (sy - b * sx) / n
        if b <= 0:
            return self.largest
        fits = [T for T in range(self.smallest, self.largest + 1) if a + b * T <= self.limit]
        return fits[-1] if fits else self.smallest


class WithNumpy:
    """By NumPy, whose integer it gives back."""

    __slots__ = ("rows", "limit", "smallest", "largest")

    def __init__(self, limit, smallest, largest):
        self.rows, self.limit, self.smallest, self.largest = (), limit, smallest, largest

    def seen(self, tokens, seconds):
        self.rows = (*self.rows, (tokens, seconds))[-8:]

    def budget(self):
        import numpy as np

        if len(self.rows) < 2:
            return self.smallest
        tokens, seconds = np.array(self.rows).T
        if np.ptp(tokens) == 0:
            return self.smallest
        b, a = np.polyfit(tokens, seconds, 1)
        return np.int64(np.clip((self.limit - a) // b, self.smallest, self.largest)) if b > 0 else self.largest


@dataclass
class AsRecord:
    limit: float
    smallest: int
    largest: int
    tokens: list = field(default_factory=list)
    times: list = field(default_factory=list)

    def seen(self, tokens, seconds):
        self.tokens.append(tokens)
        self.times.append(seconds)

    def budget(self):
        xs, ys = self.tokens[-8:], self.times[-8:]
        try:
            slope, start = statistics.linear_regression(xs, ys)
        except statistics.StatisticsError:
            return self.smallest
        if slope <= 0:
            return self.largest
        return min(self.largest, max(self.smallest, int((self.limit - start) / slope)))


def keeping(newest):
    class Keeping(Pace):
        def __init__(self, *settings):
            super().__init__(*settings)
            self.steps = deque(maxlen=newest)

    return Keeping


class Forgets(Pace):
    """Asked a second time it has seen nothing."""

    def budget(self):
        found = super().budget()
        self.steps.clear()
        return found


class MedianSlope(Pace):
    """The median of the slopes, which is not least squares."""

    def budget(self):
        rows = list(self.steps)
        if len({tokens for tokens, _ in rows}) < 2:
            return self.smallest
        pairs = [(s, t) for s in rows for t in rows if s[0] < t[0]]
        b = statistics.median((t[1] - s[1]) / (t[0] - s[0]) for s, t in pairs)
        a = statistics.median(s - b * t for t, s in rows)
        return max(self.smallest, min(self.largest, math.floor((self.limit - a) / b))) if b > 0 else self.largest


class AllSteps(Pace):
    def __init__(self, *settings):
        super().__init__(*settings)
        self.steps = []


class LastTwo(Pace):
    def budget(self):
        rows = list(self.steps)
        for t, s in reversed(rows[:-1]):
            if t != rows[-1][0]:
                b = (rows[-1][1] - s) / (rows[-1][0] - t)
                fit = (self.limit - s) / b + t if b > 0 else self.largest
                return max(self.smallest, min(self.largest, math.floor(fit)))
        return self.smallest


class ThroughZero(Pace):
    def budget(self):
        if len({tokens for tokens, _ in self.steps}) < 2:
            return self.smallest
        b = sum(s for _, s in self.steps) / sum(t for t, _ in self.steps)
        return max(self.smallest, min(self.largest, math.floor(self.limit / b)))


class NoBounds(Pace):
    def budget(self):
        self.smallest, kept = 1, self.smallest
        found = super().budget()
        self.smallest = kept
        return found


SEEN = deque(maxlen=8)


class Shared(Pace):
    def __init__(self, *settings):
        super().__init__(*settings)
        SEEN.clear()
        self.steps = SEEN


class Optimist(Pace):
    def budget(self):
        return super().budget() if len({t for t, _ in self.steps}) > 1 else self.largest


RIGHT = {
    "chunks_of": [chunks_of, by_divmod, by_modulo, by_range, with_numpy],
    "budget_for": [budget_for, by_doubling, by_bisect, remembers, between],
    "fair_share": [fair_share, by_level, by_leaving, by_need],
    "Pace": [Pace, WithTensors, Exact, WithNumpy, AsRecord],
}
WRONG = {
    "chunks_of": [
        one_by_one,
        lambda prompt, running, budget: (steps_of_story(prompt, running, budget), 0),
        lambda prompt, running, budget: by_divmod(prompt, 0, budget),  # the chats forgotten
        lambda prompt, running, budget: divmod(prompt, budget - running),
        lambda prompt, running, budget: chunks_of(prompt, running, max(budget, running + 1)),  # never refuses
        lambda prompt, running, budget: (chunks_of(prompt, running, budget)[0], prompt % (budget - running)),
        lambda prompt, running, budget: tuple(float(x) for x in chunks_of(prompt, running, budget)),
        by_heart,
        lambda prompt, running, budget: (reads(prompt, running, budget)[0], 1 + (prompt - 1) % (budget - running)),
        lambda prompt, running, budget: by_range(prompt, running, budget) if budget != running else (0, 0),
    ],
    "budget_for": [
        tries_all,
        by_line,
        lambda limit, seconds, most: budget_for(limit, seconds, most) or 1,  # at least one?
        lambda limit, seconds, most: budget_for(limit, lambda T: seconds(T) + 1e-12, most),  # less, not at most
        lambda limit, seconds, most: budget_for(limit, seconds, 2 * most),
        lambda limit, seconds, most: min(budget_for(limit, seconds, most), 2 ** int(math.log2(most))),
        lambda limit, seconds, most: most,
        in_tens, one_short,
    ],
    "fair_share": [
        one_token_each,
        equal_once, two_rounds, rest_by_need,
        lambda todos, budget: share_out(todos, [], budget)[0],
        lambda todos, budget: fair_share(sorted(todos), budget),
        lambda todos, budget: fair_share(todos[::-1], budget)[::-1],  # the rest goes to the later ones
        lambda todos, budget: [max(1, budget * todo // max(1, sum(todos))) for todo in todos],  # in proportion
        lambda todos, budget: [min(c + 1, t) for c, t in zip(fair_share(todos, budget), todos, strict=True)],
    ],
    "Pace": [AllSteps, LastTwo, ThroughZero, NoBounds, Shared, Optimist, Forgets, MedianSlope,
             keeping(7), keeping(9)],
}
