"""Chapter 8: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821

from itertools import accumulate
from random import Random as AGenerator

# --- 1: kept


def kept(weights, top_k, percent):
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    order = order[:top_k] if top_k else order
    total, held, found = sum(weights[token] for token in order), 0, set()
    for token in order:
        found.add(token)
        held += weights[token]
        if 100 * held >= percent * total:
            break
    return found


def with_numpy(weights, top_k, percent):
    weights = np.array(weights)
    order = np.argsort(-weights, kind="stable")[: top_k or None]
    running = weights[order].cumsum()
    count = int((100 * running < percent * running[-1]).sum()) + 1
    return set(order[:count])


def one_after_the_other(weights, top_k, percent):
    """Takes the best that is left, again and again."""
    rest = dict(enumerate(weights))
    best = []
    while rest and (not top_k or len(best) < top_k):
        token = max(rest, key=lambda t: (rest[t], -t))
        best.append((token, rest.pop(token)))
    sums = [0, *accumulate(weight for _, weight in best)]
    return {token for (token, _), before in zip(best, sums, strict=False) if before * 100 < percent * sums[-1]}


def by_torch(weights, top_k, percent):
    w, ids = torch.tensor(weights).sort(descending=True, stable=True)
    if top_k:
        w, ids = w[:top_k], ids[:top_k]
    before = w.cumsum(0) - w
    return set(ids[100 * before < percent * w.sum()].tolist())


def higher_ids_first(weights, top_k, percent):
    n = len(weights)
    return {n - 1 - token for token in kept(weights[::-1], top_k, percent)}


def top_p_first(weights, top_k, percent):
    found = sorted(kept(weights, 0, percent), key=lambda token: (-weights[token], token))
    return set(found[: top_k or None])


def of_everything(weights, top_k, percent):
    """percent of all, not of what top-k has left."""
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))[: top_k or None]
    held, found = 0, set()
    for token in order:
        if 100 * held < percent * sum(weights):
            found.add(token)
            held += weights[token]
    return found


def one_too_many(weights, top_k, percent):
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))[: top_k or None]
    total, held, found = sum(weights[token] for token in order), 0, set()
    for token in order:
        if 100 * held <= percent * total:
            found.add(token)
            held += weights[token]
    return found


def all_that_equal_the_last(weights, top_k, percent):
    found = kept(weights, top_k, percent)
    least = min(weights[token] for token in found)
    return {token for token, weight in enumerate(weights) if weight >= least}


def sorts_the_callers_list(weights, top_k, percent):
    answer = kept(weights, top_k, percent)
    weights.sort(reverse=True)
    return answer


def without_the_last(weights, top_k, percent):
    """At least the best, and otherwise only those that stay below the limit."""
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))[: top_k or None]
    total, held, found = sum(weights[token] for token in order), 0, {order[0]}
    for token in order:
        held += weights[token]
        if 100 * held <= percent * total:
            found.add(token)
    return found


def by_floats(weights, top_k, percent):
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))[: top_k or None]
    total, held, found = sum(weights[token] for token in order), 0.0, set()
    for token in order:
        if held < percent / 100:
            found.add(token)
            held += weights[token] / total
    return found


# --- 2: number


def number(seed, sample, position):
    digest = hashlib.sha256(f"{seed},{sample},{position}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56 // 2**-53 * 2**-53


def own_generator(seed, sample, position):
    """Made for one number, and thrown away."""
    return AGenerator(repr((seed, sample, position))).random()


def mixed(seed, sample, position):
    """splitmix64, over all words of the arguments."""
    mask, state = 2**64 - 1, 0x9E3779B97F4A7C15
    for part in (seed, sample, position):
        sign, part = part < 0, abs(part)
        words = [int(sign), part & mask]
        while part := part >> 64:
            words.append(part & mask)
        for word in [len(words), *words]:
            state = (state ^ word) + 0x9E3779B97F4A7C15 & mask
            state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
            state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
            state ^= state >> 31
    return (state >> 11) / 2**53


def by_seed_sequence(seed, sample, position):
    words = [2 * abs(part) + (part < 0) for part in (seed, sample, position)]
    spread = [len(f"{word:x}") for word in words]
    return float(np.random.default_rng([*spread, *words]).random())


def moved_on(seed, sample, position):
    """The generator of a sample, made anew for each number and moved to the place."""
    generator = AGenerator(f"{seed}/{sample}")
    return [generator.random() for _ in range(position + 1)][-1]


ONE_FOR_ALL = AGenerator(1)
REMEMBERED = {}
BY_SEED = {}


def stateful(seed, sample, position):
    """A generator for each sample: right only if it is asked in order."""
    return BY_SEED.setdefault((seed, sample), AGenerator(f"{seed}/{sample}")).random()


def remembers(seed, sample, position):
    """The same number whenever it is asked again, but which one, the order of questions says."""
    key = seed, sample, position
    if key not in REMEMBERED:
        REMEMBERED[key] = ONE_FOR_ALL.random()
    return REMEMBERED[key]


def remembers_for_each(seed, sample, position, numbers={}):  # noqa: B006
    return numbers.setdefault((seed, sample, position), stateful(seed, sample, position))


def of_the_process(seed, sample, position):
    import os

    return own_generator(seed, sample, f"{position}/{os.getpid()}")


def reseeds_all(seed, sample, position):
    import random

    random.seed(f"{seed}/{sample}/{position}")
    return random.random()


def reseeds_torch(seed, sample, position):
    # as torch.manual_seed does it, which notes a traceback for a GPU each time: half a minute for all calls
    torch.default_generator.manual_seed(int(number(seed, sample, position) * 2**40))
    return torch.rand((), dtype=torch.float64).item()


def of_24_bits(seed, sample, position):
    generator = torch.Generator().manual_seed(int(number(seed, sample, position) * 2**53))
    return torch.rand((), generator=generator).item()


def golden(seed, sample, position):
    """Evenly spread indeed, but each tells the next."""
    return (seed * 0.7548776662466927 + sample * 0.5698402909980532 + position * 0.6180339887498949) % 1


def by_hash_of_a_text(seed, sample, position):
    return (hash(f"{seed}/{sample}/{position}") & (2**53 - 1)) / 2**53


def of_the_remainder(seed, sample, position):
    """Seeds that are equal in their last 32 bits."""
    return own_generator(seed % 2**32, sample, position)


# --- 3: plan_step


def plan_step(tables, lengths, writers, free, B):
    holders = Counter(block for table in tables.values() for block in table)
    new, left, copies = {name: [*table] for name, table in tables.items()}, [*free], []
    for name in writers:
        table = new[name]
        if lengths[name] % B == 0:
            if not left:
                return None
            table.append(left.pop(0))
        elif holders[table[-1]] > 1:
            if not left:
                return None
            holders[table[-1]] -= 1
            copies.append((table[-1], left[0]))
            table[-1] = left.pop(0)
    return copies, new


def first_stays(tables, lengths, writers, free, B):
    """Whoever writes last gets a copy, and the first stays, if nobody else reads."""
    copies, new = plan_step(tables, lengths, writers[::-1], [None] * len(tables), B)
    wanted = [name for name in new if new[name] != tables[name]]
    if len(wanted) > len(free):
        return None
    pairs = []
    for name, block in zip(wanted, free, strict=False):
        if len(new[name]) == len(tables[name]):
            pairs.append((tables[name][-1], block))
        new[name] = [block if b is None else b for b in new[name]]
    return pairs, new


def in_groups(tables, lengths, writers, free, B):
    """Who writes into which last block; of each group of all holders, one stays."""
    groups, new_ones = {}, []
    for name in writers:
        if lengths[name] % B:
            groups.setdefault(tables[name][-1], []).append(name)
        else:
            new_ones.append(name)
    movers = []
    for block, names in groups.items():
        others = [n for n, table in tables.items() if table[-1] == block and n not in names]
        movers += [(n, block) for n in (names if others else names[:-1])]
    if len(movers) + len(new_ones) > len(free):
        return None
    stock, result = iter(reversed(free)), dict(tables)
    copies = []
    for name, block in movers:
        target = next(stock)
        result[name] = (*tables[name][:-1], target)
        copies.append([block, target])
    for name in new_ones:
        result[name] = (*tables[name], next(stock))
    return copies, {name: list(table) for name, table in result.items()}


def all_copy(tables, lengths, writers, free, B):
    holders = Counter(table[-1] for table in tables.values())
    new, left, copies = {name: [*table] for name, table in tables.items()}, [*free], []
    for name in writers:
        border = lengths[name] % B == 0
        if border or holders[tables[name][-1]] > 1:
            if not left:
                return None
            block = left.pop(0)
            if border:
                new[name].append(block)
            else:
                copies.append((new[name][-1], block))
                new[name][-1] = block
    return copies, new


def none_copies(tables, lengths, writers, free, B):
    """A fork without copy-on-write."""
    left, new = [*free], {name: [*table] for name, table in tables.items()}
    for name in writers:
        if lengths[name] % B == 0:
            if not left:
                return None
            new[name].append(left.pop(0))
    return [], new


def forgets_readers(tables, lengths, writers, free, B):
    """Counts only those who write."""
    some = {name: tables[name] for name in writers}
    got = plan_step(some, lengths, writers, free, B)
    return got and (got[0], {**{name: [*table] for name, table in tables.items()}, **got[1]})


def by_lists(tables, lengths, writers, free, B):
    """Counts what is needed before it deals out; a list of two, copies as a set."""
    last, need = {name: table[-1] for name, table in tables.items()}, {}
    for at, name in enumerate(writers):
        stay = [n for n in tables if n not in writers[: at + 1] and last[n] == last[name]]
        if lengths[name] % B == 0 or stay:
            need[name] = lengths[name] % B > 0
    if len(need) > len(free):
        return None
    given = dict(zip(need, free, strict=False))
    new = {name: table[: len(table) - need.get(name, 0)] for name, table in tables.items()}
    for name, block in given.items():
        new[name] = [*new[name], block]
    return [{(last[name], given[name]) for name in need if need[name]}, new]


def copies_of_copies(tables, lengths, writers, free, B):
    got = plan_step(tables, lengths, writers, free, B)
    newest, chain = {}, []
    for source, target in got[0] if got else []:
        chain.append((newest.get(source, source), target))
        newest[source] = target
    return got and (chain, got[1])


def none_if_exactly_enough(tables, lengths, writers, free, B):
    return plan_step(tables, lengths, writers, free[:-1], B)


def changes_the_tables(tables, lengths, writers, free, B):
    got = plan_step(tables, lengths, writers, free, B)
    if got:
        for name, table in got[1].items():
            tables[name][:] = table
        return got[0], tables
    return None


def takes_from_free(tables, lengths, writers, free, B):
    got = plan_step(tables, lengths, writers, free, B)
    if got:
        taken = {block for table in got[1].values() for block in table}
        free[:] = [block for block in free if block not in taken]
    return got


def does_what_it_can(tables, lengths, writers, free, B):
    copies, new = plan_step(tables, lengths, writers, [*free, *[10**6] * len(tables)], B)
    return [pair for pair in copies if pair[1] != 10**6], new


def copies_full_blocks(tables, lengths, writers, free, B):
    """Also who stands at a border copies its last block, as if it were to be written."""
    got = plan_step(tables, lengths, writers, free, B)
    if got is None:
        return None
    more = [(tables[name][-1], got[1][name][-1]) for name in writers if lengths[name] % B == 0]
    return got[0] + more + more[:1], got[1]


def one_block_for_all(tables, lengths, writers, free, B):
    """Samples that stand at a border together share their new block, too."""
    new, left, copies, after = {n: [*t] for n, t in tables.items()}, [*free], [], {}
    holders = Counter(table[-1] for table in tables.values())
    for name in writers:
        last = new[name][-1]
        if lengths[name] % B == 0:
            if last not in after:
                if not left:
                    return None
                after[last] = left.pop(0)
            new[name].append(after[last])
        elif holders[last] > 1:
            if not left:
                return None
            holders[last] -= 1
            copies.append((last, left[0]))
            new[name][-1] = left.pop(0)
    return copies, new


# --- 4: least_blocks


def least_blocks(texts, B):
    """A tree of blocks: (number of the node before, its tokens) -> number."""
    nodes = {}
    for text in texts:
        node = 0
        for start in range(0, len(text), B):
            node = nodes.setdefault((node, tuple(text[start : start + B])), len(nodes) + 1)
    return len(nodes)


def in_order(texts, B):
    """Sorted, what is shared is shared with the one before."""
    total, before = 0, []
    for text in sorted(texts):
        same = 0
        while same < min(len(text), len(before)) and text[same] == before[same]:
            same += 1
        shared = -(-same // B) if same == len(text) == len(before) else same // B
        total += -(-len(text) // B) - shared
        before = text
    return total


def by_groups(texts, B):
    """All texts that were the same so far, block by block."""
    count, groups, start = 0, [list(texts)], 0
    while groups:
        parted = []
        for group in groups:
            by_block = {}
            for text in group:
                if len(text) > start:
                    by_block.setdefault(tuple(text[start : start + B]), []).append(text)
            count += len(by_block)
            parted += by_block.values()
        groups, start = parted, start + B
    return count


def by_recursion(texts, B):
    heads = {}
    for text in texts:
        if text:
            heads.setdefault(tuple(text[:B]), []).append(text[B:])
    return len(heads) + sum(by_recursion(rests, B) for rests in heads.values())


def against_all_before(texts, B):
    """What a text adds to the one before that is alike for longest."""
    total = 0
    for count, text in enumerate(texts):
        longest = 0
        for other in texts[:count]:
            start = 0
            while start < len(text) and text[start : start + B] == other[start : start + B]:
                start += B
            longest = max(longest, -(-min(start, len(text)) // B))
        total += -(-len(text) // B) - longest
    return total


def chained_hashes(texts, B):
    seen = set()
    for text in texts:
        name = b""
        for start in range(0, len(text), B):
            block = ",".join(str(int(token)) for token in text[start : start + B])
            name = hashlib.sha256(name + block.encode()).digest()
            seen.add(name)
    return len(seen)


def whole_beginnings(texts, B):
    return len({tuple(text[: start + B]) for text in texts for start in range(0, len(text), B)})


def full_only(texts, B):
    """Forgets that the last block may not be full."""
    return least_blocks([text[: len(text) // B * B] for text in texts], B)


def tails_never_shared(texts, B):
    return full_only(texts, B) + sum(len(text) % B > 0 for text in texts)


def by_contents_alone(texts, B):
    return len({tuple(text[start : start + B]) for text in texts for start in range(0, len(text), B)})


def by_place(texts, B):
    """The same tokens at the same place, whatever stands before."""
    return len({(start, *text[start : start + B]) for text in texts for start in range(0, len(text), B)})


def with_the_first(texts, B):
    """Each is compared with the first one only."""
    if not texts:
        return 0
    first = least_blocks(texts[:1], B)
    return first + sum(least_blocks([texts[0], text], B) - first for text in texts[1:])


def tokens_of_the_tree(texts, B):
    """Counts different tokens, and then divides."""
    return -(-least_blocks(texts, 1) // B)


def filled_up(texts, B):
    """3 and 3 0 are the same, then."""
    return least_blocks([[*text, *[0] * (-len(text) % B)] for text in texts], B)


RIGHT = {
    "kept": [kept, with_numpy, one_after_the_other, by_torch],
    "number": [number, own_generator, mixed, by_seed_sequence, moved_on],
    "plan_step": [plan_step, first_stays, in_groups, by_lists],
    "least_blocks": [least_blocks, in_order, by_groups, chained_hashes, by_recursion, against_all_before],
}
WRONG = {
    "kept": [
        higher_ids_first, top_p_first, of_everything, one_too_many, all_that_equal_the_last, sorts_the_callers_list,
        without_the_last, by_floats,
        lambda weights, top_k, percent: len(kept(weights, top_k, percent)),
        lambda weights, top_k, percent: cut_top_k(torch.tensor(weights).float(), top_k) and set(),
    ],
    "number": [
        stateful, remembers, remembers_for_each, of_the_process, reseeds_all, reseeds_torch, of_24_bits, golden,
        by_hash_of_a_text, of_the_remainder,
        lambda seed, sample, position: ONE_FOR_ALL.random(),
        lambda seed, sample, position: AGenerator(hash((seed, sample, position))).random(),  # hash(-1) == hash(-2)
        lambda seed, sample, position: AGenerator(seed + sample + position).random(),
        lambda seed, sample, position: AGenerator(f"{seed}{sample}{position}").random(),
        lambda seed, sample, position: own_generator(seed, 0, position),
        lambda seed, sample, position: own_generator(abs(seed), sample, position),
        lambda seed, sample, position: own_generator(seed, sample, position) ** 2,
        lambda seed, sample, position: uniform(seed, sample, position),
        lambda seed, sample, position: sampling.uniform(seed, sample, position),
    ],
    "plan_step": [
        all_copy, none_copies, forgets_readers, changes_the_tables, takes_from_free, does_what_it_can,
        copies_full_blocks, one_block_for_all, copies_of_copies, none_if_exactly_enough,
    ],
    "least_blocks": [
        whole_beginnings, full_only, tails_never_shared, by_contents_alone, by_place, with_the_first,
        tokens_of_the_tree, filled_up,
    ],
}  # fmt: skip
