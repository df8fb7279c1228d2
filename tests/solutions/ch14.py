"""Chapter 14: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821

from heapq import heapify, heappop, heappush

# --- part ---------------------------------------------------------------------------------------------------------


def part(run, new, B):
    new = new[: len(new) - len(new) % B]
    at = 0
    while at < len(run) and at < len(new) and run[at : at + B] == new[at : at + B]:
        at += B
    return run[:at], run[at:], new[at:]


def token_by_token(run, new, B):
    same = 0
    for a, b in zip(run, new, strict=False):
        if a != b:
            break
        same += 1
    same -= same % B
    return [run[:same], run[same:], new[same : len(new) // B * B]]


def with_blocks(run, new, B):
    a, b = cut(run, B), cut(new, B)
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return tuple([token for block in blocks for token in block] for blocks in (a[:n], a[n:], b[n:]))


def recursive_part(run, new, B):
    if len(new) < B or not run or run[:B] != new[:B]:
        return [], list(run), [*new[: len(new) // B * B]]
    shared, a, b = recursive_part(run[B:], new[B:], B)
    return run[:B] + shared, a, b


def between_tokens(run, new, B):
    return token_by_token(run, new[: len(new) // B * B], 1)


def keeps_the_odd_end(run, new, B):
    shared, rest, _ = part(run, new, B)
    return shared, rest, new[len(shared) :]


def any_block(run, new, B):
    """Agrees also behind a block that doesn't."""
    same = sum(a == b for a, b in zip(cut(run, B), cut(new, B), strict=False)) * B
    return run[:same], run[same:], new[same : len(new) // B * B]


def cuts_the_run(run, new, B):
    shared, rest, more = part(run, new, B)
    del run[len(shared) :]
    return run, rest, more


# --- to_evict -----------------------------------------------------------------------------------------------------


def to_evict(parents, used, ends, count):
    """A heap of leaves."""
    children = Counter(parents.values())
    heap = [(used[node], node) for node in parents if not children[node] and node not in ends]
    heapify(heap)
    found = []
    while heap and len(found) < count:
        _, node = heappop(heap)
        found.append(node)
        above = parents[node]
        children[above] -= 1
        if above is not None and not children[above] and above not in ends:
            heappush(heap, (used[above], above))
    return found


def sorted_once(parents, used, ends, count):
    """On every path the times rise to the root, so a sort is enough; on one path, the deeper one first."""
    held = set()
    for node in ends:
        while node is not None and node not in held:
            held.add(node)
            node = parents[node]
    depth = {}
    for node in parents:
        way = []
        while node is not None and node not in depth:
            way.append(node)
            node = parents[node]
        at = depth[node] if node is not None else 0
        for one in reversed(way):
            at += 1
            depth[one] = at
    return sorted(parents.keys() - held, key=lambda node: (used[node], -depth[node]))[:count]


def by_requests(parents, used, ends, count):
    """Nodes of one time are one path: from its end to its beginning, the times in order."""
    held = set()
    for node in ends:
        while node is not None:
            held.add(node)
            node = parents[node]
    groups = {}
    for node, when in used.items():
        if node not in held:
            groups.setdefault(int(when), set()).add(node)
    order = []
    for _, group in sorted(groups.items()):
        above = {parents[node] for node in group}
        (node,) = group - above
        while node in group:
            order.append(node)
            node = parents[node]
    return order[:count]


def searches(parents, used, ends, count):
    left, found = dict(parents), []
    children = Counter(parents.values())
    while len(found) < count:
        free = [node for node in left if not children[node] and node not in ends]
        if not free:
            break
        node = min(free, key=lambda one: used[one])
        children[left.pop(node)] -= 1
        found.append(node)
    return found


def leaves_of_today(parents, used, ends, count):
    """No node becomes a leaf."""
    above = {*parents.values()}
    return sorted((node for node in parents if node not in above and node not in ends), key=used.get)[:count]


def times_only(parents, used, ends, count):
    """Forgets who is below at equal times."""
    held = set()
    for node in ends:
        while node is not None:
            held.add(node)
            node = parents[node]
    return sorted((node for node in parents if node not in held), key=used.get)[:count]


def ends_only(parents, used, ends, count):
    """Holds the ends, and not what is above."""
    return [node for node in sorted_once(parents, used, (), len(parents)) if node not in ends][:count]


def never_held(parents, used, ends, count):
    return to_evict(parents, used, set(), count)


def newest_first(parents, used, ends, count):
    return to_evict(parents, {node: -when for node, when in used.items()}, ends, count)


def one_too_many(parents, used, ends, count):
    return to_evict(parents, used, ends, count + 1)


# --- in_depth -----------------------------------------------------------------------------------------------------


def in_depth(requests):
    """A tree of dicts, which keep the order of arrival; an end is a child, too."""
    root, order = {}, []
    for i, tokens in enumerate(requests):
        node = root
        for token in tokens:
            node = node.setdefault(("token", token), {})
        node["end", i] = i

    def walk(node):
        for child in node.values():
            if isinstance(child, int):
                order.append(child)
            else:
                walk(child)

    walk(root)
    return order


def by_first_arrivals(requests):
    """Each request's key: for each of its beginnings, who was the first with it."""
    first = {}
    keys = []
    for i, tokens in enumerate(requests):
        key, place = [], 0
        for token in tokens:
            place, arrived = first.setdefault((place, token), (len(first) + 1, i))
            key.append(arrived)
        keys.append((*key, i))
    return sorted(range(len(requests)), key=keys.__getitem__)


def by_groups(requests):
    def walk(members, depth):
        groups = {}
        for i in members:
            ended = len(requests[i]) == depth
            groups.setdefault(("end", i) if ended else ("token", requests[i][depth]), []).append(i)
        return [one for key, group in groups.items()
                for one in (group if key[0] == "end" else walk(group, depth + 1))]  # fmt: skip

    return walk(range(len(requests)), 0)


def with_a_stack(requests):
    root = {}
    for i, tokens in enumerate(requests):
        here = root
        for token in map(int, tokens):
            here = here.setdefault(token, {})
        here[f"#{i}"] = None
    stack, order = [("", root)], []
    while stack:
        name, node = stack.pop()
        if node is None:
            order.append(int(name[1:]))
        else:
            stack.extend(reversed(node.items()))
    return order


def greedy(requests):
    def common(one, other):
        return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))

    left, order = list(range(len(requests))), []
    while left:
        order.append(max(left, key=lambda i: common(requests[i], requests[order[-1]])) if order else 0)
        left.remove(order[-1])
    return order


def by_alphabet(requests):
    return sorted(range(len(requests)), key=lambda i: requests[i])


def ends_first(requests):
    root, order = {}, []
    for i, tokens in enumerate(requests):
        node = root
        for token in tokens:
            node = node.setdefault(token, {})
        node.setdefault(None, []).append(i)

    def walk(node):
        order.extend(node.get(None, []))
        for key, child in node.items():
            if key is not None:
                walk(child)

    walk(root)
    return order


def by_first_token(requests):
    groups = {}
    for i, tokens in enumerate(requests):
        groups.setdefault(tuple(tokens[:1]), []).append(i)
    return [i for group in groups.values() for i in group]


def the_requests(requests):
    return [requests[i] for i in in_depth(requests)]


# --- PatientQueue -------------------------------------------------------------------------------------------------


class PatientQueue:
    def __init__(self, patience):
        self.patience, self.waiting = patience, []

    def add(self, name, found):
        self.waiting.append([name, found, 0])

    def choose(self):
        for i, (_, _, overtaken) in enumerate(self.waiting):
            if overtaken >= self.patience:
                return i
        return max(range(len(self.waiting)), key=lambda i: self.waiting[i][1])

    def next(self):
        if not self.waiting:
            raise IndexError("nobody waits")
        i = self.choose()
        for row in self.waiting[:i]:
            row[2] += 1
        return self.waiting.pop(i)[0]


@dataclass
class Waits:
    name: int
    found: int
    arrival: int
    left: float


class WithRecords:
    __slots__ = ("patience", "people", "count")

    def __init__(self, patience):
        self.patience, self.people, self.count = patience, {}, 0

    def add(self, name, found):
        self.people[name] = Waits(name, found, self.count, self.patience)
        self.count += 1

    def next(self):
        if not self.people:
            raise IndexError
        everyone = self.people.values()
        one = min(everyone, key=lambda w: (0, 0, w.arrival) if w.left <= 0 else (1, -w.found, w.arrival))
        del self.people[one.name]
        for other in self.people.values():
            other.left -= other.arrival < one.arrival
        return one.name


class InColumns:
    def __init__(self, patience):
        self.names, self.found, self.passed, self.patience = deque(), deque(), Counter(), patience

    def add(self, name, found):
        self.names.append(name)
        self.found.append(found)

    def next(self):
        names = list(self.names)
        tired = [name for name in names if self.passed[name] >= self.patience]
        best = max(self.found) if self.found else None
        at = names.index(tired[0]) if tired else self.found.index(best) if names else 0
        name = names[at]  # IndexError if nobody waits
        del self.names[at], self.found[at]
        self.passed.pop(name, None)
        self.passed.update(names[:at])
        return name


class NoPatience(PatientQueue):
    def choose(self):
        return max(range(len(self.waiting)), key=lambda i: self.waiting[i][1])


class OneMore(PatientQueue):
    def __init__(self, patience):
        super().__init__(patience + 1)


class CountsEverybody(PatientQueue):
    """Also those who came earlier and went earlier."""

    def next(self):
        if not self.waiting:
            raise IndexError
        name = self.waiting.pop(self.choose())[0]
        for row in self.waiting:
            row[2] += 1
        return name


class LatestOfEquals(PatientQueue):
    def choose(self):
        for i, (_, _, overtaken) in enumerate(self.waiting):
            if overtaken >= self.patience:
                return i
        return max(range(len(self.waiting)), key=lambda i: (self.waiting[i][1], i))


class TiredByFound(PatientQueue):
    def choose(self):
        rows = range(len(self.waiting))
        return max(rows, key=lambda i: (self.waiting[i][2] >= self.patience, self.waiting[i][1]))


class OneForAll(PatientQueue):
    everybody = []

    def __init__(self, patience):
        self.patience, self.waiting = patience, self.everybody


class SaysNone(PatientQueue):
    def next(self):
        return super().next() if self.waiting else None


class FirstCome(PatientQueue):
    def choose(self):
        return 0


# --- endless ------------------------------------------------------------------------------------------------------


def endless(requests, B):
    known, found, asked = set(), 0, 0
    for tokens, numbers in requests:
        for i in range((tokens - 1) // B):
            if numbers[i] not in known:
                break
            found += B
        known.update(numbers[: tokens // B])
        asked += tokens
    return found, asked


def in_a_tree(requests, B):
    root, found = {}, 0
    for tokens, numbers in requests:
        node = root
        for at, number in enumerate(numbers[: tokens // B], 1):
            if number in node and at * B < tokens:
                found += B
            node = node.setdefault(number, {})
    return [found, sum(tokens for tokens, _ in requests)]


def by_first_time(requests, B):
    """When a number was there first, and full."""
    first = {}
    for when, (tokens, numbers) in enumerate(requests):
        for number in numbers[: tokens // B]:
            first.setdefault(number, when)
    hits = [number for when, (tokens, numbers) in enumerate(requests)
            for number in numbers[: (tokens - 1) // B] if first.get(number, when) < when]  # fmt: skip
    return len(hits) * B, sum(length for length, _ in requests)


def with_partial_ones(requests, B):
    """A number for less than a block is never that of a full one, so it does no harm."""
    known, found = set(), 0
    for tokens, numbers in requests:
        found += B * sum(number in known for number in numbers[: (tokens - 1) // B])
        known.update(numbers)
    return found, sum(tokens for tokens, _ in requests)


def last_one_too(requests, B):
    known, found = set(), 0
    for tokens, numbers in requests:
        found += B * sum(number in known for number in numbers[: tokens // B])
        known.update(numbers[: tokens // B])
    return found, sum(tokens for tokens, _ in requests)


def all_but_one_token(requests, B):
    known, found = set(), 0
    for tokens, numbers in requests:
        found += min(tokens - 1, B * sum(number in known for number in numbers[: tokens // B]))
        known.update(numbers[: tokens // B])
    return found, sum(tokens for tokens, _ in requests)


def in_blocks(requests, B):
    found, asked = endless(requests, B)
    return found // B, asked // B


def its_own(requests, B):
    """A prompt finds what it has just added."""
    known, found = set(), 0
    for tokens, numbers in requests:
        known.update(numbers[: tokens // B])
        found += B * sum(number in known for number in numbers[: (tokens - 1) // B])
    return found, sum(tokens for tokens, _ in requests)


def in_lists(requests, B):
    known, found = [], 0
    for tokens, numbers in requests:
        found += B * sum(number in known for number in numbers[: (tokens - 1) // B])
        known += [number for number in numbers[: tokens // B] if number not in known]
    return found, sum(tokens for tokens, _ in requests)


def the_last_only(requests, B):
    """Forgets all but the request before."""
    found, before = 0, []
    for tokens, numbers in requests:
        found += B * sum(number in before for number in numbers[: (tokens - 1) // B])
        before = numbers[: tokens // B]
    return found, sum(tokens for tokens, _ in requests)


RIGHT = {
    "part": [part, token_by_token, with_blocks, recursive_part],
    "to_evict": [to_evict, sorted_once, by_requests],
    "in_depth": [in_depth, by_first_arrivals, by_groups, with_a_stack],
    "PatientQueue": [PatientQueue, WithRecords, InColumns],
    "endless": [endless, in_a_tree, by_first_time, with_partial_ones],
}
WRONG = {
    "part": [
        between_tokens, keeps_the_odd_end, any_block, cuts_the_run,
        lambda run, new, B: (run, [], new[len(run) :]),
        lambda run, new, B: (part(run, new, B)[0], part(run, new, B)[2], part(run, new, B)[1]),
    ],
    "to_evict": [searches, leaves_of_today, times_only, ends_only, never_held, newest_first, one_too_many],
    "in_depth": [
        greedy, by_alphabet, ends_first, by_first_token, the_requests,
        lambda requests: list(range(len(requests))),
        lambda requests: in_depth(requests)[::-1],
        lambda requests: sorted(range(len(requests)), key=lambda i: len(requests[i])),
    ],
    "PatientQueue": [
        NoPatience, OneMore, CountsEverybody, LatestOfEquals, TiredByFound, OneForAll, SaysNone, FirstCome,
    ],
    "endless": [
        last_one_too, all_but_one_token, in_blocks, its_own, in_lists, the_last_only,
        lambda requests, B: endless(requests, B)[0],
    ],
}  # fmt: skip
