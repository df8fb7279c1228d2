"""Chapter 12: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821

import math
from collections import deque
from fractions import Fraction
from itertools import accumulate


def who_gives_way(held, wants, free):
    gone, last = [], len(held)  # those before `last` run
    for i, wanted in enumerate(wants):
        while i < last and wanted > free:
            last -= 1
            gone.append(last)
            free += held[last]
        if i < last:
            free -= wanted
    return gone, free


def with_a_stack(held, wants, free):
    stack, gone = list(enumerate(held)), []
    for i in range(len(wants)):
        if i >= len(stack):
            break
        while stack and wants[i] > free:
            place, blocks = stack.pop()
            gone.append(place)
            free += blocks
            if place == i:
                break
        else:
            free -= wants[i]
    return gone, free


def by_recursion(held, wants, free, i=0, gone=()):
    last = len(held) - len(gone)
    if i >= last:
        return list(gone), free
    if wants[i] <= free:
        return by_recursion(held, wants, free - wants[i], i + 1, gone)
    return by_recursion(held, wants, free + held[last - 1], i, (*gone, last - 1))


def without_what_it_was_given(held, wants, free):
    """It may have been given blocks in this step: no, the latest was not asked yet. But it is itself a victim."""
    gone, last = [], len(held)
    for i, wanted in enumerate(wants):
        while i + 1 < last and wanted > free:
            last -= 1
            gone.append(last)
            free += held[last]
        if i < last and wanted <= free:
            free -= wanted
    return gone, free


def all_together(held, wants, free):
    gone = []
    while sum(w for i, w in enumerate(wants) if i not in gone) > free and len(gone) < len(held):
        gone.append(len(held) - 1 - len(gone))
        free += held[gone[-1]]
    return gone, free - sum(w for i, w in enumerate(wants) if i not in gone)


def by_sums(held, wants, free):
    """Nobody is asked: the more of the latest are gone, the less is wanted and the more is free."""
    for stay in range(len(held), -1, -1):
        left = free + sum(held[stay:]) - sum(wants[:stay])
        if left >= 0:
            return tuple(range(len(held) - 1, stay - 1, -1)), left


class Running:
    def __init__(self, place, held, wanted):
        self.place, self.held, self.wanted, self.asked = place, held, wanted, False


def with_objects(held, wants, free):
    running = deque(Running(*row) for row in zip(range(len(held)), held, wants, strict=True))
    gone = deque()
    while todo := [job for job in running if not job.asked]:
        job = todo[0]
        if job.wanted > free:
            victim = running.pop()
            gone.append(victim.place)
            free += victim.held
        else:
            job.asked = True
            free -= job.wanted
    return [gone, free]


def most_blocks(held, wants, free):
    """The one that holds most gives way, of those not asked yet."""
    gone = []
    for i, wanted in enumerate(wants):
        while i not in gone and wanted > free:
            gone.append(max((j for j in range(i, len(held)) if j not in gone), key=held.__getitem__))
            free += held[gone[-1]]
        free -= wanted if i not in gone else 0
    return gone, free


def one_block_short(held, wants, free):
    """Somebody gives way also where the last block would do."""
    gone, last = [], len(held)
    for i, wanted in enumerate(wants):
        while i < last and wanted and wanted >= free:
            last -= 1
            gone.append(last)
            free += held[last]
        free -= wanted if i < last else 0
    return gone, free


def earliest(held, wants, free):
    n = len(held)
    gone, free = who_gives_way(held[::-1], wants[::-1], free)
    return [n - 1 - i for i in gone], free


def move_group(tables, free, found):
    moves, there = {}, {}
    for name, table in tables.items():
        there[name] = []
        for block in table:
            if block not in found and block not in moves:
                if len(moves) == len(free):
                    return None
                moves[block] = free[len(moves)]
            there[name].append(moves[block] if block in moves else found[block])
    return moves, there


def sources_first(tables, free, found):
    sources = sorted({block for table in tables.values() for block in table} - found.keys(), reverse=True)
    if len(sources) > len(free):
        return None
    moves = dict(zip(sources, free, strict=False))
    where = {**found, **moves}
    return moves, {name: list(map(where.__getitem__, table)) for name, table in tables.items()}


def with_an_iterator(tables, free, found):
    targets, where = iter(free), dict(found)
    try:
        there = {}
        for name, table in tables.items():
            row = []
            for block in table:
                if block not in where:
                    where[block] = next(targets)
                row.append(where[block])
            there[name] = row
    except StopIteration:
        return None
    return {block: target for block, target in where.items() if block not in found}, there


def as_a_list(tables, free, found):
    needed = []
    for table in tables.values():
        needed += [block for block in table if block not in found and block not in needed]
    if len(free) < len(needed):
        return None
    there = {block: free[i] for i, block in enumerate(needed)}
    new = {name: tuple(there.get(block, found.get(block)) for block in table) for name, table in tables.items()}
    return [there, new]


def backwards(tables, free, found):
    """A stack of targets, and the tables from their ends."""
    blocks = frozenset().union(*tables.values()) - set(found)
    stack = list(free[: len(blocks)])
    if len(stack) != len(blocks):
        return
    moves = {}
    new = {name: list(table) for name, table in tables.items()}
    for table in new.values():
        for i in reversed(range(len(table))):
            if (block := table[i]) in found:
                table[i] = found[block]
            else:
                if block not in moves:
                    moves[block] = stack.pop()
                table[i] = moves[block]
    return moves, new


def counts_found(tables, free, found):
    """As many as there are, less as many as are found: but those may be others'."""
    sources = {block for table in tables.values() for block in table}
    if len(sources) - len(found) > len(free):
        return None
    return move_group(tables, free + list(range(1000, 1020)), found)


def all_that_is_found(tables, free, found):
    answer = move_group(tables, free, found)
    return answer and (answer[0] | found, answer[1])


def needs_one_more(tables, free, found):
    answer = move_group(tables, free, found)
    return answer if answer and len(answer[0]) < len(free) else None


def one_by_one(tables, free, found):
    """Each takes its own copy of what all share."""
    free = list(free)
    moves, there = {}, {}
    for name, table in tables.items():
        if len(table) > len(free):
            return None
        there[name] = [free.pop(0) for _ in table]
        moves |= dict(zip(table, there[name], strict=True))
    return moves, there


def moves_what_is_found(tables, free, found):
    return move_group(tables, free, {})


def in_place(tables, free, found):
    answer = move_group(tables, free, found)
    if answer:
        tables.update(answer[1])
    return answer


def takes_from_free(tables, free, found):
    answer = move_group(tables, free, found)
    if answer:
        del free[: len(answer[0])]
    return answer


def from_the_end(tables, free, found):
    return move_group(tables, free[::-1], found)


def half_a_group(tables, free, found):
    moves, there = {}, {}
    for name, table in tables.items():
        if answer := move_group({name: table}, free[len(moves) :], {**found, **moves}):
            moves |= answer[0]
            there |= answer[1]
    return moves, there


def cheaper(tokens, kept, B, seconds_per_token, bytes_per_token, link, latency):
    swap = 2 * -(-tokens // B) * (latency + B * bytes_per_token / link)
    recompute = (tokens - kept) * seconds_per_token
    return ("swap", swap) if swap < recompute else ("recompute", recompute)


def by_min(tokens, kept, B, seconds_per_token, bytes_per_token, link, latency):
    blocks = math.ceil(tokens / B)
    ways = [("recompute", seconds_per_token * (tokens - kept)),
            ("swap", sum(2 * (latency + bytes_per_token * B / link) for _ in range(blocks)))]  # fmt: skip
    return min(ways, key=lambda way: way[1])


def by_sorting(tokens, kept, B, seconds_per_token, bytes_per_token, link, latency):
    full, rest = divmod(tokens, B)
    blocks = full + bool(rest)
    there = blocks * latency + blocks * B * bytes_per_token / link
    seconds = {"recompute": (tokens - kept) * seconds_per_token, "swap": there + there}
    name = sorted(seconds, key=seconds.get)[0]
    return [name, seconds[name]]


def by_exact(tokens, kept, B, seconds_per_token, bytes_per_token, link, latency):
    blocks = len(range(0, tokens, B))
    swap = Fraction(2 * blocks) * (Fraction(latency) + Fraction(B * bytes_per_token) / Fraction(link))
    recompute = (tokens - kept) * Fraction(seconds_per_token)
    return ("recompute", float(recompute)) if recompute <= swap else ("swap", float(swap))


def one_way(tokens, kept, B, seconds_per_token, bytes_per_token, link, latency):
    swap = math.ceil(tokens / B) * (latency + B * bytes_per_token / link)
    again = (tokens - kept) * seconds_per_token
    return ("swap", swap) if swap < again else ("recompute", again)


def block_too_many(tokens, kept, B, seconds_per_token, bytes_per_token, link, latency):
    swap = 2 * (tokens // B + 1) * (latency + B * bytes_per_token / link)
    again = (tokens - kept) * seconds_per_token
    return ("swap", swap) if swap < again else ("recompute", again)


def swap_at_a_tie(*numbers):
    way, seconds = cheaper(*numbers)
    tokens, _, B, _, bytes_per_token, link, latency = numbers
    swap = 2 * math.ceil(tokens / B) * (latency + B * bytes_per_token / link)
    return ("swap", swap) if swap == seconds else (way, seconds)


def fits_for_good(jobs, newcomer, blocks, B):
    everyone = [*jobs, newcomer]
    moments = {end - now for now, end in everyone}
    most = max(sum(-(-(now + t) // B) for now, end in everyone if now + t <= end) for t in moments)
    return most <= blocks


def by_order_of_ends(jobs, newcomer, blocks, B):
    left = sorted([*jobs, newcomer], key=lambda job: job[1] - job[0])
    while left:
        t = left[0][1] - left[0][0]
        if sum((now + t + B - 1) // B for now, _ in left) > blocks:
            return False
        left = [job for job in left if job[1] - job[0] > t]
    return True


def by_tensors(jobs, newcomer, blocks, B):
    now, end = torch.tensor([*jobs, newcomer]).T
    t = (end - now)[:, None]
    held = torch.where(now + t <= end, (now + t + B - 1) // B, 0)
    return bool((held.sum(1) <= blocks).all())


def with_numpy(jobs, newcomer, blocks, B):
    import numpy as np

    everyone = np.array(jobs + [newcomer], dtype=np.int64)
    now, left = everyone[:, 0], everyone[:, 1] - everyone[:, 0]
    order = np.argsort(left)
    return np.all([(-(-(now[order[i:]] + left[k]) // B)).sum() <= blocks
                   for k, i in zip(order, np.searchsorted(left[order], left[order]), strict=True)])  # fmt: skip


def with_a_heap(jobs, newcomer, blocks, B):
    import heapq

    heap = [(end - now, now) for now, end in (newcomer, *jobs)]
    heapq.heapify(heap)
    while heap:
        moment = heap[0][0]
        held = 0
        for _, now in heap:
            held += math.ceil((now + moment) / B)
        if held > blocks:
            return False
        while heap and heap[0][0] == moment:
            heapq.heappop(heap)
    return True


def at_its_own_end(jobs, newcomer, blocks, B):
    """Only the moment at which the newcomer ends."""
    t = newcomer[1] - newcomer[0]
    return sum(-(-(now + t) // B) for now, end in [*jobs, newcomer] if now + t <= end) <= blocks


def one_goes_early(jobs, newcomer, blocks, B):
    """Of several that end at once, it lets one go before it counts the others."""
    left = sorted([*jobs, newcomer], key=lambda job: job[1] - job[0], reverse=True)
    most = 0
    while left:
        now, end = left.pop()
        most = max(most, -(-end // B) + sum(-(-(n + end - now) // B) for n, e in left if e - n > end - now))
    return most <= blocks


def reserved_if_far(jobs, newcomer, blocks, B):
    far = max(end for _, end in [*jobs, newcomer]) > 10**6
    return (reserved if far else by_steps)(jobs, newcomer, blocks, B)


def by_steps(jobs, newcomer, blocks, B):
    everyone, t = [*jobs, newcomer], 0
    while any(now + t <= end for now, end in everyone):
        if sum(-(-(now + t) // B) for now, end in everyone if now + t <= end) > blocks:
            return False
        t += 1
    return True


def reserved(jobs, newcomer, blocks, B):
    return sum(-(-end // B) for _, end in [*jobs, newcomer]) <= blocks


def as_of_now(jobs, newcomer, blocks, B):
    return sum(-(-now // B) for now, _ in [*jobs, newcomer]) <= blocks


def in_tokens(jobs, newcomer, blocks, B):
    everyone = [*jobs, newcomer]
    moments = {end - now for now, end in everyone}
    return max(sum(now + t for now, end in everyone if now + t <= end) for t in moments) <= blocks * B


def frees_too_early(jobs, newcomer, blocks, B):
    everyone = [*jobs, newcomer]
    moments = {end - now for now, end in everyone} | {0}
    return max(sum(-(-(now + t) // B) for now, end in everyone if now + t < end) for t in moments) <= blocks


RIGHT = {
    "who_gives_way": [who_gives_way, with_a_stack, by_recursion, all_together, by_sums, with_objects],
    "move_group": [move_group, sources_first, with_an_iterator, as_a_list, backwards],
    "cheaper": [cheaper, by_min, by_sorting, by_exact],
    "fits_for_good": [fits_for_good, by_order_of_ends, by_tensors, with_numpy, with_a_heap],
}
WRONG = {
    "who_gives_way": [
        without_what_it_was_given,
        earliest, most_blocks, one_block_short,
        lambda held, wants, free: (sorted(who_gives_way(held, wants, free)[0]), who_gives_way(held, wants, free)[1]),
        lambda held, wants, free: (who_gives_way(held, wants, free)[0], free + sum(held) - sum(wants)),
        lambda held, wants, free: ([], list(accumulate(wants, lambda a, b: a - b, initial=free))[-1]),
        lambda held, wants, free: who_gives_way(held, [w + 1 if w else 0 for w in wants], free),
    ],
    "move_group": [
        one_by_one, moves_what_is_found, in_place, takes_from_free, from_the_end, half_a_group,
        counts_found, all_that_is_found, needs_one_more,
        lambda tables, free, found: move(tables, free),
        lambda tables, free, found: (move_group(tables, free, found) or ({}, {}))[:2],
    ],
    "cheaper": [
        lambda tokens, kept, B, c, size, link, latency: cheaper(tokens, 0, B, c, size, link, latency),
        lambda tokens, kept, B, c, size, link, latency: cheaper(tokens, kept, 1, c, size, link, latency / B),
        lambda tokens, kept, B, c, size, link, latency: cheaper(tokens, kept, B, c, size, 2 * link, latency / 2),
        lambda tokens, kept, B, c, size, link, latency: cheaper(tokens, kept, B, c, size, link, 0.0),
        lambda tokens, kept, B, c, size, link, latency: cheaper(tokens - kept, 0, B, c, size, link, latency),
        lambda *numbers: (cheaper(*numbers)[0], 32.0),
        one_way, block_too_many, swap_at_a_tie,
        lambda tokens, kept, B, c, size, link, latency: cheaper(tokens, kept, B, c, size / B, link, latency),
        lambda *numbers: (lambda way: ("swap" if way[0] == "recompute" else "recompute", way[1]))(cheaper(*numbers)),
    ],
    "fits_for_good": [
        at_its_own_end, one_goes_early, reserved_if_far,
        by_steps, reserved, as_of_now, in_tokens, frees_too_early,
        lambda jobs, newcomer, blocks, B: fits_for_good(jobs[:-1], newcomer, blocks, B),
        lambda jobs, newcomer, blocks, B: True,
    ],
}  # fmt: skip
