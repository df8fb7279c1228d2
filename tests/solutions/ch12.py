"""Chapter 12: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821

import math
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


def by_steps(jobs, newcomer, blocks, B):
    everyone, t = [*jobs, newcomer], 0
    while any(now + t <= end for now, end in everyone):
        if sum(-(-(now + t) // B) for now, end in everyone if now + t <= end) > blocks:
            return False
        t += 1
        if t > 100_000:
            raise RuntimeError("too long")
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
    "who_gives_way": [who_gives_way, with_a_stack, by_recursion, all_together],
    "move_group": [move_group, sources_first, with_an_iterator],
    "cheaper": [cheaper, by_min, by_sorting],
    "fits_for_good": [fits_for_good, by_order_of_ends, by_tensors],
}
WRONG = {
    "who_gives_way": [
        without_what_it_was_given,
        earliest,
        lambda held, wants, free: (sorted(who_gives_way(held, wants, free)[0]), who_gives_way(held, wants, free)[1]),
        lambda held, wants, free: (who_gives_way(held, wants, free)[0], free + sum(held) - sum(wants)),
        lambda held, wants, free: ([], list(accumulate(wants, lambda a, b: a - b, initial=free))[-1]),
        lambda held, wants, free: who_gives_way(held, [w + 1 if w else 0 for w in wants], free),
    ],
    "move_group": [
        one_by_one, moves_what_is_found, in_place, takes_from_free, from_the_end, half_a_group,
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
        lambda *numbers: (lambda way: ("swap" if way[0] == "recompute" else "recompute", way[1]))(cheaper(*numbers)),
    ],
    "fits_for_good": [
        by_steps, reserved, as_of_now, in_tokens, frees_too_early,
        lambda jobs, newcomer, blocks, B: fits_for_good(jobs[:-1], newcomer, blocks, B),
        lambda jobs, newcomer, blocks, B: True,
    ],
}  # fmt: skip
