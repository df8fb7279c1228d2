"""Chapter 10: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821

from heapq import heappop, heappush, heapreplace
from itertools import chain, takewhile
from math import gcd


def laid_out(sequences):
    positions, query_start, rows = [], [0], []
    for tokens, computed, now in sequences:
        positions.extend(range(computed, computed + now))
        query_start.append(len(positions))
        if computed + now == tokens:
            rows.append(len(positions) - 1)
    return positions, query_start, rows


def with_accumulate(sequences):
    starts = list(accumulate((now for _, _, now in sequences), initial=0))
    positions = [*chain.from_iterable(range(c, c + n) for _, c, n in sequences)]
    rows = [starts[i + 1] - 1 for i, (t, c, n) in enumerate(sequences) if t - c == n]
    return [positions, starts, rows]


def with_tensors(sequences):
    counts = torch.tensor([now for _, _, now in sequences], dtype=torch.int64)
    ends = counts.cumsum(0)
    done = torch.tensor([t == c + n for t, c, n in sequences], dtype=torch.bool)
    positions = [torch.arange(c, c + n) for _, c, n in sequences]
    flat = torch.cat(positions).tolist() if positions else []
    return flat, [0, *ends.tolist()], (ends[done] - 1).tolist()


def steps_needed(outputs, seats):
    static = sum(max(outputs[i : i + seats]) for i in range(0, len(outputs), seats))
    free_at = [0] * seats
    for output in outputs:
        heapreplace(free_at, free_at[0] + output)
    return static, max(free_at)


def with_a_list(outputs, seats):
    static, rest = 0, list(outputs)
    while rest:
        static += max(rest[:seats])
        rest = rest[seats:]
    ends = [0 for _ in range(seats)]
    for output in outputs:
        seat = ends.index(min(ends))
        ends[seat] += output
    return [static, sorted(ends)[-1]]


def by_events(outputs, seats):
    """From one end to the next."""
    now, left, queue = 0, [], deque(outputs)
    while queue or left:
        while queue and len(left) < seats:
            heappush(left, now + queue.popleft())
        now = heappop(left)
    batches = zip(*[iter([*outputs, *[0] * (-len(outputs) % seats)])] * seats, strict=True)
    return sum(map(max, batches)), now


def from_end_to_end(outputs, seats):
    """Both plays as they are, but for the steps in which nobody ends."""

    def play(static):
        wait, run, now = outputs[::-1], [], 0
        while wait or run:
            if not (static and run):
                while wait and len(run) < seats:
                    run.append(now + wait.pop())
            now = min(run)
            run = [end for end in run if end > now]
        return now

    return play(True), play(False)


def one_by_one(outputs, seats):
    """Right, but step by step: it never ends for a billion tokens."""
    both = []
    for static in (True, False):
        wait, run, steps = outputs[::-1], [], 0
        while wait or run:
            if not (static and run):
                while wait and len(run) < seats:
                    run.append(wait.pop())
            run, steps = [left - 1 for left in run if left > 1], steps + 1
        both.append(steps)
    return both


def in_large_steps(outputs, seats):
    """Step by step, in steps of as many tokens as divide all."""
    unit = max(gcd(*outputs), 1)
    return [unit * steps for steps in one_by_one([output // unit for output in outputs], seats)]


class PatientDoor:
    def __init__(self, patience):
        self.patience, self.queue = patience, []

    def add(self, name, blocks):
        self.queue.append([name, blocks, 0])

    def open(self, free):
        came, stay = [], []
        for i, entry in enumerate(self.queue):
            if entry[1] > free:
                stay.append(entry)
            elif any(other[2] >= self.patience for other in stay):
                stay += self.queue[i:]
                break
            else:
                free -= entry[1]
                came.append(entry[0])
                for other in stay:
                    other[2] += 1
        self.queue = stay
        return came

    def waiting(self):
        return [name for name, _, _ in self.queue]


@dataclass
class Guest:
    name: str
    blocks: int
    patience: int


class WithGuests:
    def __init__(self, patience):
        self._patience = patience
        self._guests = {}

    def add(self, name, blocks):
        self._guests[name] = Guest(name, blocks, self._patience)

    def open(self, free):
        let_in = []
        for guest in list(self._guests.values()):
            if guest.blocks > free:
                continue
            before = []
            for other in self._guests.values():
                if other is guest:
                    break
                before.append(other)
            if min((other.patience for other in before), default=1) == 0:
                return let_in
            for other in before:
                other.patience -= 1
            free -= guest.blocks
            let_in.append(guest.name)
            del self._guests[guest.name]
        return let_in

    def waiting(self):
        return list(self._guests)


class ByNumbers:
    """How often one was passed: by those who came in, and have larger numbers."""

    __slots__ = ("patience", "all", "inside")

    def __init__(self, patience):
        self.patience, self.all, self.inside = patience, [], []

    def add(self, name, blocks):
        self.all.append((name, blocks))

    def passed(self, i):
        return sum(j > i for j in self.inside)

    def open(self, free):
        first = len(self.inside)
        for i, (_, blocks) in enumerate(self.all):
            if i in self.inside or blocks > free:
                continue
            if any(self.passed(j) == self.patience for j in range(i) if j not in self.inside):
                break
            self.inside.append(i)
            free -= blocks
        return tuple(self.all[i][0] for i in self.inside[first:])

    def waiting(self):
        return [name for i, (name, _) in enumerate(self.all) if i not in self.inside]


class Slices:
    """A tuple of (name, blocks, patience left); no entry is changed, all are made anew."""

    def __init__(self, patience):
        self.patience, self.queue = patience, ()

    def add(self, name, blocks):
        self.queue += ((name, blocks, self.patience),)

    def open(self, free):
        came, i = [], 0
        while i < len(self.queue):
            name, blocks, _ = self.queue[i]
            before = self.queue[:i]
            if blocks > free:
                i += 1
            elif any(left == 0 for *_, left in before):
                break
            else:
                before = tuple((one, its, left - 1) for one, its, left in before)
                self.queue = before + self.queue[i + 1 :]
                free -= blocks
                came.append(name)
        return came

    def waiting(self):
        return [name for name, *_ in self.queue]


class Walks:
    """A generator, and a count of those who passed."""

    def __init__(self, patience):
        self.patience, self.blocks, self.passed = patience, {}, Counter()

    def add(self, name, blocks):
        self.blocks[name] = blocks

    def walk(self, free):
        for name, blocks in [*self.blocks.items()]:
            ahead = [*takewhile(lambda other, name=name: other != name, self.blocks)]
            if blocks <= free:
                if max((self.passed[other] for other in ahead), default=-1) >= self.patience:
                    return
                self.passed.update(ahead)
                free -= self.blocks.pop(name)
                yield name

    def open(self, free):
        return [*self.walk(free)]

    def waiting(self):
        return tuple(self.blocks)


class SharedPatience(Walks):
    """All doors have the patience of the last one."""

    def __init__(self, patience):
        super().__init__(patience)
        del self.patience
        SharedPatience.patience = patience


class SharedCounts(Walks):
    """Each door has its queue, and all have one list of who was passed."""

    counts = Counter()

    def __init__(self, patience):
        super().__init__(patience)
        self.passed = self.counts
        self.counts.clear()


class AsOfTheLastOpening(Walks):
    def open(self, free):
        came = super().open(free)
        self.seen = super().waiting()
        return came

    def waiting(self):
        return getattr(self, "seen", ())


class PassedByAll(Walks):
    """Counts as passed also those who came later."""

    def walk(self, free):
        for name in super().walk(free):
            self.passed.update(self.blocks.keys() - {name})
            yield name


class AsksTheOneBefore(Slices):
    """Looks only at the patience of the one right before."""

    def open(self, free):
        came, i = [], 0
        while i < len(self.queue):
            name, blocks, _ = self.queue[i]
            if blocks > free:
                i += 1
            elif i and self.queue[i - 1][2] <= 0:
                break
            else:
                before = tuple((one, its, left - 1) for one, its, left in self.queue[:i])
                self.queue = before + self.queue[i + 1 :]
                free -= blocks
                came.append(name)
        return came


class CountsOnce(PatientDoor):
    """One opening is one passing, however many come in."""

    def open(self, free):
        before = [entry[2] for entry in self.queue]
        came = super().open(free)
        for entry in self.queue:
            entry[2] = min(entry[2], before[0] + 1 if before else 0)
        return came


class Never(PatientDoor):
    def __init__(self, patience):
        super().__init__(0)


class Always(PatientDoor):
    def __init__(self, patience):
        super().__init__(10**9)


class OneMore(PatientDoor):
    def __init__(self, patience):
        super().__init__(patience + 1)


class OnlyTheFirst(PatientDoor):
    """Looks at the patience of the first alone: whoever passes a later one passes the first, too."""

    def open(self, free):
        came = []
        for entry in self.queue.copy():
            if entry[1] > free:
                continue
            if entry is not self.queue[0] and self.queue[0][2] >= self.patience:
                break
            place = self.queue.index(entry)
            for other in self.queue[:place]:
                other[2] += 1
            self.queue.pop(place)
            free -= entry[1]
            came.append(entry[0])
        return came


class PassesWithoutFitting(PatientDoor):
    """Ends the walk at anybody, even at one who doesn't fit; and forgets what the free blocks were used for."""

    def open(self, free):
        came = super().open(free)
        return came + [e[0] for e in self.queue if e[1] <= free and not came]


class SharedQueue(PatientDoor):
    everyone = []

    def __init__(self, patience):
        self.patience, self.queue = patience, self.everyone
        self.everyone.clear()

    def open(self, free):
        came = super().open(free)
        self.everyone[:] = self.queue
        self.queue = self.everyone
        return came


class ForgetsTheRest(PatientDoor):
    """The free blocks are counted anew for each."""

    def open(self, free):
        came = [e[0] for e in self.queue if e[1] <= free]
        self.queue = [e for e in self.queue if e[1] > free]
        return came


class Scheduler10:
    def __init__(self, seats):
        self.seats, self.waiting, self.running = seats, [], []

    def add(self, name, prompt, max_tokens):
        self.waiting.append({"name": name, "tokens": list(prompt), "most": max_tokens, "computed": 0,
                             "end": len(prompt) + max_tokens})  # fmt: skip

    def schedule(self):
        while self.waiting and len(self.running) < self.seats:
            self.running.append(self.waiting.pop(0))
        return [(r["name"], r["computed"], r["tokens"][r["computed"] :]) for r in self.running]

    def update(self, drawn):
        ended = {}
        for request in self.running.copy():
            request["computed"] = len(request["tokens"])
            request["tokens"].append(drawn[request["name"]])
            if len(request["tokens"]) == request["end"]:
                self.running.remove(request)
                ended[request["name"]] = request["tokens"][-request["most"] :]
        return ended

    def abort(self, name):
        for queue in (self.running, self.waiting):
            for request in queue:
                if request["name"] == name:
                    queue.remove(request)
                    return
        raise KeyError(name)

    def start_over(self):
        self.waiting = self.running + self.waiting
        self.running = []
        for request in self.waiting:
            request["computed"] = 0


@dataclass(eq=False)
class Stream:
    prompt: tuple
    most: int
    output: list
    todo: list
    runs: bool = False


class OneDict:
    """Everyone in one dict, which keeps the order; what runs is a mark."""

    def __init__(self, seats):
        self.seats, self.streams = seats, {}

    def add(self, name, prompt, max_tokens):
        self.streams[name] = Stream(tuple(prompt), max_tokens, [], list(prompt))

    def schedule(self):
        free = self.seats - sum(stream.runs for stream in self.streams.values())
        for stream in self.streams.values():
            if not stream.runs and free > 0:
                stream.runs, free = True, free - 1
        return [(name, len(s.prompt) + len(s.output) - len(s.todo), tuple(s.todo))
                for name, s in self.streams.items() if s.runs]  # fmt: skip

    def update(self, drawn):
        for name, token in drawn.items():
            self.streams[name].output.append(token)
            self.streams[name].todo = [token]
        done = [name for name in drawn if len(self.streams[name].output) == self.streams[name].most]
        return {name: self.streams.pop(name).output for name in done}

    def abort(self, name):
        del self.streams[name]

    def start_over(self):
        for stream in self.streams.values():
            stream.runs = False
            stream.todo = [*stream.prompt, *stream.output]


class Parallel:
    """Lists side by side."""

    __slots__ = ("seats", "names", "tokens", "computed", "prompts", "limits", "inside")

    def __init__(self, seats):
        self.seats, self.inside = seats, 0  # the first so many of the lists run
        self.names, self.tokens, self.computed, self.prompts, self.limits = [], [], [], [], []

    def add(self, name, prompt, max_tokens):
        self.names += [name]
        self.tokens += [prompt + []]
        self.computed += [0]
        self.prompts += [len(prompt)]
        self.limits += [max_tokens]

    def schedule(self):
        self.inside = min(self.seats, len(self.names))
        rows = zip(self.names[: self.inside], self.computed, self.tokens, strict=False)
        return [(name, done, tokens[done:]) for name, done, tokens in rows]

    def _drop(self, i):
        for column in (self.names, self.tokens, self.computed, self.prompts, self.limits):
            del column[i]
        self.inside -= i < self.inside

    def update(self, drawn):
        ended = {}
        for i in reversed(range(self.inside)):
            self.computed[i] = len(self.tokens[i])
            self.tokens[i].append(drawn[self.names[i]])
            output = self.tokens[i][self.prompts[i] :]
            if len(output) >= self.limits[i]:
                ended[self.names[i]] = output
                self._drop(i)
        return ended

    def abort(self, name):
        if name not in self.names:
            raise KeyError
        self._drop(self.names.index(name))

    def start_over(self):
        self.inside = 0
        self.computed = [0] * len(self.names)


class WaitsForAll(Scheduler10):
    """Static batches."""

    def schedule(self):
        if self.running:
            return [(r["name"], r["computed"], r["tokens"][r["computed"] :]) for r in self.running]
        return super().schedule()


class BackOfTheQueue(Scheduler10):
    def start_over(self):
        super().start_over()
        self.waiting.sort(key=lambda request: len(request["tokens"]))


class Behind(Scheduler10):
    """Who ran waits behind those who didn't."""

    def start_over(self):
        running, self.running = self.running, []
        self.waiting += running
        for request in self.waiting:
            request["computed"] = 0


class LongerAnswers(Scheduler10):
    """What was said becomes the prompt, and max_tokens are counted anew."""

    def start_over(self):
        super().start_over()
        for request in self.waiting:
            request["end"] = len(request["tokens"]) + request["most"]


class OneAtATime(Scheduler10):
    def schedule(self):
        if self.waiting and len(self.running) < self.seats:
            self.running.append(self.waiting.pop(0))
        return [(r["name"], r["computed"], r["tokens"][r["computed"] :]) for r in self.running]


class ForgetsWhatWasSaid(Scheduler10):
    def start_over(self):
        super().start_over()
        for request in self.waiting:
            del request["tokens"][request["end"] - request["most"] :]


class KeepsComputed(Scheduler10):
    """Memory is lost, and it doesn't compute again."""

    def start_over(self):
        self.waiting, self.running = self.running + self.waiting, []


class BooksEarly(Scheduler10):
    """Counts as computed what is only planned. That is right, as long as everyone computes again after a start_over."""

    def schedule(self):
        plan = super().schedule()
        for request in self.running:
            request["computed"] = len(request["tokens"])
        return plan


class WholeAnswers(Scheduler10):
    """The prompt is no part of an answer."""

    def update(self, drawn):
        whole = {request["name"]: request["tokens"] for request in self.running}
        return {name: whole[name] for name in super().update(drawn)}


class AllAgain(Scheduler10):
    def schedule(self):
        super().schedule()
        return [(request["name"], 0, request["tokens"].copy()) for request in self.running]


class LivePlans(Scheduler10):
    """A prompt's list goes into the plan itself, and grows there."""

    def schedule(self):
        plan = super().schedule()
        return [(name, start, r["tokens"] if start == 0 else tokens)
                for (name, start, tokens), r in zip(plan, self.running, strict=True)]  # fmt: skip


class ChangesPrompts(Scheduler10):
    def add(self, name, prompt, max_tokens):
        super().add(name, prompt, max_tokens)
        self.waiting[-1]["tokens"] = prompt


class KeepsSeats(Scheduler10):
    """Who was aborted while it ran leaves its seat empty."""

    def abort(self, name):
        if any(request["name"] == name for request in self.running):
            self.seats -= 1
        super().abort(name)


class QuietAbort(Scheduler10):
    def abort(self, name):
        self.waiting = [request for request in self.waiting if request["name"] != name]
        self.running = [request for request in self.running if request["name"] != name]


class AsAnArray:
    """No lists of who waits and who runs: the first in a dict run."""

    def __init__(self, seats):
        self.seats, self.tokens, self.numbers = seats, {}, {}

    def add(self, name, prompt, max_tokens):
        self.tokens[name] = torch.tensor(prompt)
        self.numbers[name] = (0, len(prompt), max_tokens)

    def schedule(self):
        names = [*self.tokens][: self.seats]
        return [(name, self.numbers[name][0], self.tokens[name][self.numbers[name][0] :].tolist()) for name in names]

    def update(self, drawn):
        ended = {}
        for name, token in drawn.items():
            tokens, (_, prompt, most) = self.tokens[name], self.numbers[name]
            self.numbers[name] = (len(tokens), prompt, most)
            self.tokens[name] = torch.cat((tokens, torch.tensor([token])))
            if len(tokens) + 1 == prompt + most:
                ended[name] = self.tokens[name][prompt:].tolist()
                self.abort(name)
        return ended

    def abort(self, name):
        del self.tokens[name], self.numbers[name]

    def start_over(self):
        self.numbers = {name: (0, *rest) for name, (_, *rest) in self.numbers.items()}


class SharedNumbers(AsAnArray):
    """Each has its own tokens, and all have one dict of what is computed."""

    everyone = {}

    def __init__(self, seats):
        super().__init__(seats)
        self.numbers = self.everyone
        self.everyone.clear()

    def start_over(self):
        self.everyone.update({name: (0, *rest) for name, (_, *rest) in self.everyone.items()})


class RemembersTheDead(AsAnArray):
    """Nobody learns that an abort came too late."""

    def __init__(self, seats):
        super().__init__(seats)
        self.known = set()

    def add(self, name, prompt, max_tokens):
        super().add(name, prompt, max_tokens)
        self.known.add(name)

    def abort(self, name):
        if name not in self.known:
            raise KeyError(name)
        self.tokens.pop(name, None)
        self.numbers.pop(name, None)


class TakesItsPlace(Scheduler10):
    """Who comes in for one who was aborted gets its place in the plan, too."""

    def abort(self, name):
        names = [request["name"] for request in self.running]
        super().abort(name)
        if name in names and self.waiting:
            self.running.insert(names.index(name), self.waiting.pop(0))


class OneTooMany(Scheduler10):
    def add(self, name, prompt, max_tokens):
        super().add(name, prompt, max_tokens + 1)


class SharedList(Scheduler10):
    everyone = []

    def __init__(self, seats):
        super().__init__(seats)
        self.waiting = self.everyone

    def start_over(self):
        self.everyone[:0] = self.running
        self.running = []
        for request in self.everyone:
            request["computed"] = 0


class LatestFirst(Scheduler10):
    def schedule(self):
        while self.waiting and len(self.running) < self.seats:
            self.running.append(self.waiting.pop())
        return super().schedule()


def flat_of_rows(sequences):
    rows = [Row(str(i), [0] * n, c, [0] * n, [0]) for i, (_, c, n) in enumerate(sequences)]
    if not rows:
        return [], [0], []
    flat = flatten(rows)
    return flat["positions"].tolist(), flat["query_start"].tolist(), laid_out(sequences)[2]


RIGHT = {
    "laid_out": [laid_out, with_accumulate, with_tensors],
    "steps_needed": [steps_needed, with_a_list, by_events, from_end_to_end],
    "PatientDoor": [PatientDoor, WithGuests, ByNumbers, OnlyTheFirst, Slices, Walks],
    "Scheduler10": [Scheduler10, OneDict, Parallel, BooksEarly, AsAnArray],
}
WRONG = {
    "laid_out": [
        flat_of_rows,
        lambda sequences: (*laid_out(sequences)[:2], [end - 1 for end in laid_out(sequences)[1][1:]]),
        lambda sequences: ([*range(len(laid_out(sequences)[0]))], *laid_out(sequences)[1:]),
        lambda sequences: (laid_out(sequences)[0], laid_out(sequences)[1][:-1], laid_out(sequences)[2]),
        lambda sequences: laid_out([(t, 0, n) for t, c, n in sequences]),
        lambda sequences: (*laid_out(sequences)[:2], [row + 1 for row in laid_out(sequences)[2]]),
        lambda sequences: laid_out([(t, c, t - c) for t, c, n in sequences]),
        lambda sequences: laid_out(sequences or [(1, 0, 1)]),
        lambda sequences: (sequences.reverse(), laid_out(sequences))[1],
    ],
    "steps_needed": [
        one_by_one,
        in_large_steps,
        lambda outputs, seats: (steps_needed(outputs, seats)[0], -(-sum(outputs) // seats)),  # seats can't share one
        lambda outputs, seats: (steps_needed(outputs, seats)[0],
                                max(max(outputs, default=0), -(-sum(outputs) // seats))),
        lambda outputs, seats: (steps_needed(outputs, seats)[0],
                                steps_needed(sorted(outputs, reverse=True), seats)[1]),
        lambda outputs, seats: (steps_needed(sorted(outputs), seats)[0], steps_needed(outputs, seats)[1]),
        lambda outputs, seats: (steps_needed(outputs, seats)[0],
                                max((sum(outputs[i::seats]) for i in range(seats)), default=0)),
        lambda outputs, seats: steps_needed(outputs, seats)[::-1],
        lambda outputs, seats: (max(outputs) * -(-len(outputs) // seats), steps_needed(outputs, seats)[1]),
        lambda outputs, seats: (outputs.sort(), steps_needed(outputs, seats))[1],
        lambda outputs, seats: (round(sum(outputs) / share_used(outputs, seats, True) / seats),
                                steps_needed(outputs, seats)[1]) if sum(outputs) else (0, 0),
        lambda outputs, seats: steps_needed(outputs, seats) if sum(outputs) < 10**6 else (10**9, 10**9),
    ],
    "PatientDoor": [Never, Always, OneMore, PassesWithoutFitting, SharedQueue, ForgetsTheRest,
                    CountsOnce, SharedPatience, SharedCounts, AsOfTheLastOpening, PassedByAll, AsksTheOneBefore],
    "Scheduler10": [
        WaitsForAll, BackOfTheQueue, Behind, LongerAnswers, OneAtATime, ForgetsWhatWasSaid, KeepsComputed, WholeAnswers,
        AllAgain, LivePlans, ChangesPrompts, KeepsSeats, QuietAbort, OneTooMany, SharedList, LatestFirst,
        SharedNumbers, RemembersTheDead, TakesItsPlace,
    ],
}  # fmt: skip
