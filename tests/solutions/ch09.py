"""Chapter 9: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821

import heapq
from bisect import insort
from math import inf
from os.path import commonprefix

import numpy as np


def survivors(scores, offers, W):
    every = []
    for beam, offered in enumerate(offers):
        for token, logprob in offered:
            every.append((scores[beam] + logprob, beam, token))
    every.sort(key=lambda one: one[0], reverse=True)
    return [(beam, token) for _, beam, token in every[:W]]


def one_by_one(scores, offers, W):
    """W times the best of what is left; a later one must be strictly better."""
    left = [(b, o) for b in range(len(scores)) for o in range(len(offers[b]))]
    chosen = []
    while left and len(chosen) < W:
        best = left[0]
        for b, o in left[1:]:
            if scores[b] + offers[b][o][1] > scores[best[0]] + offers[best[0]][best[1]][1]:
                best = b, o
        left.remove(best)
        chosen.append([best[0], offers[best[0]][best[1]][0]])
    return chosen


def with_a_heap(scores, offers, W):
    rows = ((-(scores[b] + p), b, o, t) for b, row in enumerate(offers) for o, (t, p) in enumerate(row))
    return tuple((b, t) for _, b, _, t in heapq.nsmallest(W, rows))


def stable_argsort(scores, offers, W):
    """numpy's scalars come out."""
    total = np.concatenate([score + np.array([p for _, p in row]) for score, row in zip(scores, offers, strict=True)])
    names = np.array([(beam, token) for beam, row in enumerate(offers) for token, _ in row])
    return [tuple(names[i]) for i in np.argsort(-total, kind="stable")[:W]]


def kept_in_order(scores, offers, W):
    top = []
    for beam, row in enumerate(offers):
        for token, p in row:
            insort(top, (scores[beam] + p, beam, token), key=lambda one: -one[0])
            del top[W:]
    return [(beam, token) for _, beam, token in top]


def ties_by_token(scores, offers, W):
    every = [(-(scores[b] + p), b, t) for b, row in enumerate(offers) for t, p in row]
    return [(b, t) for _, b, t in sorted(every)[:W]]


def later_beam_first(scores, offers, W):
    every = [(scores[b] + p, b, t) for b, row in enumerate(offers) for t, p in row]
    return [(b, t) for _, b, t in sorted(every, reverse=True)[:W]]


def own_score_forgotten(scores, offers, W):
    every = [(p, b, t) for b, row in enumerate(offers) for t, p in row]
    return [(b, t) for _, b, t in sorted(every, key=lambda one: -one[0])[:W]]


def the_first_offers(scores, offers, W):
    every = [(scores[b] + p, b, t) for b, row in enumerate(offers) for t, p in row[:W]]
    return [(b, t) for _, b, t in sorted(every, key=lambda one: -one[0])[:W]]


def one_for_each_beam(scores, offers, W):
    best = [max(row, key=lambda pair: pair[1]) for row in offers]
    order = sorted(range(len(scores)), key=lambda b: -(scores[b] + best[b][1]))
    return [(b, best[b][0]) for b in order[:W]]


def one_for_each_score(scores, offers, W):
    """A dict by score: of equals, only the first is left."""
    found = {}
    for b, row in enumerate(offers):
        for t, p in row:
            found.setdefault(scores[b] + p, (b, t))
    return [found[score] for score in sorted(found, reverse=True)[:W]]


def one_for_each_token(scores, offers, W):
    """A dict by token: two beams that offer the same are taken for one."""
    found = {}
    for b, row in enumerate(offers):
        for t, p in row:
            if t not in found or scores[b] + p > found[t][0]:
                found[t] = scores[b] + p, b
    return [(b, t) for t, (_, b) in sorted(found.items(), key=lambda item: -item[1][0])[:W]]


def sorts_the_callers(scores, offers, W):
    for row in offers:
        row.sort(key=lambda pair: -pair[1])
    return survivors(scores, offers, W)


def by_rank(scores, offers, W):
    ranked = rank([(score, ()) for score in scores], [dict(row) for row in offers])
    return [(b, t) for _, b, t in ranked[:W]]


def row_plan(parents):
    free = [row for row in range(len(parents)) if row not in parents]
    rows, copies, taken = [], [], set()
    for parent in parents:
        if parent in taken:
            row = free.pop()
            copies.append((parent, row))
        else:
            taken.add(parent)
            row = parent
        rows.append(row)
    return rows, copies


def last_child_keeps(parents):
    spare = iter(sorted(set(range(len(parents))) - set(parents)))
    rows, copies = {}, []
    for child in reversed(range(len(parents))):
        parent = parents[child]
        if parent in rows.values():
            target = next(spare)
            copies.append([parent, target])
            rows[child] = target
        else:
            rows[child] = parent
    return [rows[child] for child in range(len(parents))], copies


def by_parent(parents):
    W = len(parents)
    children = {row: [c for c in range(W) if parents[c] == row] for row in range(W)}
    dead = [row for row in range(W) if not children[row]]
    rows, copies = [None] * W, []
    for row, mine in children.items():
        for number, child in enumerate(mine):
            rows[child] = row if number == 0 else dead.pop(0)
            if number:
                copies.append((row, rows[child]))
    return tuple(rows), tuple(copies)


def in_a_chain(parents):
    """A copy may be copied again."""
    dead = [row for row in range(len(parents)) if row not in parents]
    newest, rows, copies = {}, [], []
    for parent in parents:
        row = dead.pop() if parent in newest else parent
        if parent in newest:
            copies.append((newest[parent], row))
        newest[parent] = row
        rows.append(row)
    return rows, copies


def with_arrays(parents):
    wanted, (_, first) = np.array(parents), np.unique(parents, return_index=True)
    rows = np.full(len(parents), -1)
    rows[first] = wanted[first]
    more, spare = np.flatnonzero(rows < 0), np.setdiff1d(np.arange(len(parents)), wanted)
    rows[more] = spare
    return rows, np.stack([wanted[more], spare], 1)


def in_order(parents):
    """As a gather would: new beam i in row i. Rows are overwritten before they are read."""
    return [*range(len(parents))], [(parent, row) for row, parent in enumerate(parents) if parent != row]


def in_order_backwards(parents):
    rows, copies = in_order(parents)
    return rows, copies[::-1]


def up_to_the_last_parent(parents):
    """As if no row behind the last parent's were there."""
    dead = [row for row in range(max(parents) + 1) if row not in parents]
    rows, copies = [], []
    for parent in parents:
        row = parent if parent not in rows else dead.pop() if dead else parent
        if parent in rows:
            copies.append((parent, row))
        rows.append(row)
    return rows, copies


def copies_all(parents):
    rows, copies = row_plan(parents)
    return rows, [(parent, row) for parent, row in zip(parents, rows, strict=True)]


def no_copies(parents):
    return row_plan(parents)[0], []


def turned_round(parents):
    rows, copies = row_plan(parents)
    return rows, [(target, source) for source, target in copies]


def shares_rows(parents):
    return parents[:], []


def in_row_order(parents):
    """Few copies, but the rows are given to the children in the order of rows."""
    _, copies = row_plan(parents)
    return [*range(len(parents))], copies


def spoils_the_list(parents):
    answer = row_plan(parents[:])
    parents.sort()
    return answer


def blocks_held(prompt, paths, B):
    """A trie of blocks."""
    end, count, trie = prompt + len(paths[0]), 0, {}
    for path in paths:
        node = trie
        for start in range(0, end, B):
            key = tuple(path[max(0, start - prompt) : max(0, start + B - prompt)])
            if key not in node:
                node[key] = {}
                count += 1
            node = node[key]
    return count


def sorted_neighbours(prompt, paths, B):
    """In order, each shares with the one before it as much as with anyone before."""
    ordered = sorted(paths)
    blocks = -(-(prompt + len(paths[0])) // B)
    count = blocks
    for a, b in zip(ordered, ordered[1:], strict=False):
        same = 0
        while a[same] == b[same]:
            same += 1
        count += blocks - (prompt + same) // B
    return count


def splitting_groups(prompt, paths, B):
    end, groups, count = prompt + len(paths[0]), [list(range(len(paths)))], 0
    for stop in range(B, end + B, B):
        news = {}
        for number, group in enumerate(groups):
            for i in group:
                piece = paths[i][max(0, stop - B - prompt) : max(0, stop - prompt)]
                news.setdefault((number, *piece), []).append(i)
        groups = list(news.values())
        count += len(groups)
    return count


def with_hashes(prompt, paths, B):
    seen = set()
    for path in paths:
        parent = None
        for start in range(0, prompt + len(path), B):
            parent = hash((parent, start, *path[max(0, start - prompt) : max(0, start + B - prompt)]))
            seen.add(parent)
    return len(seen)


def token_by_token(prompt, paths, B):
    """A trie of tokens; a new node at the end of a block is a new block."""
    root, count = {}, prompt // B
    for path in paths:
        node = root
        for i, token in enumerate(path, 1):
            if token not in node:
                node[token] = {}
                count += (prompt + i) % B == 0 or i == len(path)
            node = node[token]
    return count


def each_with_all_before(prompt, paths, B):
    table = np.array(paths)
    blocks = count = -(-(prompt + table.shape[1]) // B)
    for i in range(1, len(table)):
        same = (table[i] == table[:i]).cumprod(1).sum(1).max()
        count += blocks - (prompt + same) // B
    return count


def all_prefixes(prompt, paths, B):
    ends = range(B, prompt + len(paths[0]) + B, B)
    return sum(len({tuple(path[: max(0, end - prompt)]) for path in paths}) for end in ends)


def by_content_only(prompt, paths, B):
    """Two blocks with the same tokens behind different ones are not the same."""
    found = {(start, *path[max(0, start - prompt) : max(0, start + B - prompt)])
             for path in paths for start in range(0, prompt + len(path), B)}  # fmt: skip
    return len(found)


def neighbours_as_they_come(prompt, paths, B):
    """Not sorted: what it shares with one further up is forgotten."""
    blocks = count = -(-(prompt + len(paths[0])) // B)
    for a, b in zip(paths, paths[1:], strict=False):
        count += blocks - (prompt + len(commonprefix([a, b]))) // B
    return count


def nested_keys(prompt, paths, B):
    """A block is named by the whole name before it: each name is read again for the next."""
    seen = set()
    for path in paths:
        name = ()
        for start in range(0, prompt + len(path), B):
            name = name, start, tuple(path[max(0, start - prompt) : max(0, start + B - prompt)])
            seen.add(name)
    return len(seen)


def prompt_apart(prompt, paths, B):
    """As if the answer began in a block of its own."""
    return blocks_held(0, paths, B) + -(-prompt // B)


def full_ones_only(prompt, paths, B):
    end = (prompt + len(paths[0])) // B * B
    if end == 0:
        return 0
    return blocks_held(prompt, [path[: max(0, end - prompt)] for path in paths], B) if end > prompt else end // B


def trunk_or_own(prompt, paths, B):
    """All share, or nobody: branches are forgotten."""
    trunk = (prompt + len(commonprefix(paths))) // B
    blocks = -(-(prompt + len(paths[0])) // B)
    return blocks if len(paths) == 1 else trunk + len(paths) * (blocks - trunk)


def nobody_shares(prompt, paths, B):
    return len(paths) * -(-(prompt + len(paths[0])) // B)


def could_win(score, length, limit, alpha, worst):
    tokens = limit if alpha > 0 else length + 1
    return score / tokens**alpha > worst


def tries_all(score, length, limit, alpha, worst):
    return any(score / tokens**alpha > worst for tokens in range(length + 1, limit + 1))


def both_ends(score, length, limit, alpha, worst):
    best = -inf
    for tokens in (length + 1, limit):
        best = max(best, score * tokens ** (-alpha))
    return bool(best > worst + 1e-12)


def without_division(score, length, limit, alpha, worst):
    return score > worst * (limit if alpha > 0 else length + 1) ** alpha


def all_at_once(score, length, limit, alpha, worst):
    return (score / np.arange(length + 1, limit + 1, dtype=float) ** alpha).max() > worst


def as_it_is_now(score, length, limit, alpha, worst):
    return score / length**alpha > worst


def always_the_limit(score, length, limit, alpha, worst):
    return score / limit**alpha > worst


def penalty_without_a_sign(score, length, limit, alpha, worst):
    return score / limit ** abs(alpha) > worst


def one_short_of_the_limit(score, length, limit, alpha, worst):
    return any(score / tokens**alpha > worst for tokens in range(length + 1, limit))


def without_the_next_token(score, length, limit, alpha, worst):
    """transformers' "never"."""
    tokens = limit if alpha > 0 else length
    return score / tokens**alpha > worst


def a_tie_wins(score, length, limit, alpha, worst):
    return score / (limit if alpha > 0 else length + 1) ** alpha >= worst


def the_sum_alone(score, length, limit, alpha, worst):
    return score > worst


def next_token_only(score, length, limit, alpha, worst):
    return score / (length + 1) ** alpha > worst


def likeliest(model, limit):
    heap = [(0.0, ())]
    while True:
        fallen, tokens = heapq.heappop(heap)
        if len(tokens) == limit or tokens[-1:] == (END,):
            return -fallen, tokens
        for token, logprob in model(tokens).items():
            heapq.heappush(heap, (fallen - logprob, (*tokens, token)))


def sorted_frontier(model, limit):
    frontier = [(0.0, ())]
    while frontier:
        score, tokens = frontier.pop()
        if tokens and (tokens[-1] == END or len(tokens) == limit):
            return [score, list(tokens)]
        for token, logprob in model(tokens).items():
            insort(frontier, (score + logprob, (*tokens, token)))


def best_so_far(model, limit):
    """Ended texts stand beside open beginnings; it stops when no open one is better."""
    open_ones, best = {(): 0.0}, (-inf, None)
    while open_ones:
        tokens = max(open_ones, key=open_ones.get)
        score = open_ones.pop(tokens)
        if score <= best[0]:
            break
        for token, logprob in model(tokens).items():
            text, total = tokens + (token,), score + logprob
            if token == END or len(text) == limit:
                best = max(best, (total, text))
            else:
                open_ones[text] = total
    return best


def one_child_at_a_time(model, limit):
    """Into the heap come only the best child of a beginning, and the next one of its parent."""
    heap, families = [], []

    def push(number, place):
        if place < len(families[number]):
            heapq.heappush(heap, (families[number][place], number, place))

    def expand(fallen, tokens):
        families.append(sorted((fallen - x, (*tokens, token)) for token, x in model(tokens).items()))
        push(len(families) - 1, 0)

    expand(0.0, ())
    while True:
        (fallen, tokens), number, place = heapq.heappop(heap)
        if tokens[-1] == END or len(tokens) == limit:
            return -fallen, tokens
        push(number, place + 1)
        expand(fallen, tokens)


def lower_and_lower(model, limit):
    """All texts above a bound; if there is none, the bound falls to what was just below it."""
    answers, bound = {}, 0.0
    while True:
        below, best, stack = -inf, (-inf, ()), [(0.0, ())]
        while stack:
            score, tokens = stack.pop()
            if score < bound:
                below = max(below, score)
            elif tokens and (tokens[-1] == END or len(tokens) == limit):
                best = max(best, (score, tokens))
            else:
                if tokens not in answers:
                    answers[tokens] = model(tokens)
                stack += [(score + x, (*tokens, token)) for token, x in answers[tokens].items()]
        if best[1]:
            return best
        bound = below


def brute_force(model, limit):
    def walk(score, tokens):
        if tokens and (tokens[-1] == END or len(tokens) == limit):
            return score, tokens
        return max(walk(score + x, (*tokens, token)) for token, x in model(tokens).items())

    return walk(0.0, ())


def best_child_first(model, limit):
    """Depth first with a bound: right, but it asks about beginnings that can't win."""
    best = (-inf, ())

    def walk(score, tokens):
        nonlocal best
        if tokens and (tokens[-1] == END or len(tokens) == limit):
            best = max(best, (score, tokens))
            return
        for token, x in sorted(model(tokens).items(), key=lambda pair: -pair[1]):
            if score + x > best[0]:
                walk(score + x, (*tokens, token))

    walk(0.0, ())
    return best


def level_by_level(model, limit):
    """With a bound, but of what ended: before anything has, it asks about all."""
    open_ones, best = [(0.0, ())], (-inf, ())
    for length in range(1, limit + 1):
        every = [(score + x, (*tokens, token)) for score, tokens in open_ones for token, x in model(tokens).items()]
        best = max([best] + [one for one in every if one[1][-1] == END or length == limit])
        open_ones = [one for one in every if one[1][-1] != END and one > best]
    return best


def never_ends_early(model, limit):
    heap = [(0.0, ())]
    while True:
        fallen, tokens = heapq.heappop(heap)
        if len(tokens) == limit:
            return -fallen, tokens
        for token, x in model(tokens).items():
            heapq.heappush(heap, (fallen - x, (*tokens, token)))


def searches_twice(model, limit):
    score, _ = likeliest(model, limit)
    return score, likeliest(model, limit)[1]


def a_wide_beam(model, limit):
    beams, ended = [(0.0, ())], []
    for length in range(1, limit + 1):
        every = [(score + x, (*tokens, token)) for score, tokens in beams for token, x in model(tokens).items()]
        ended += [one for one in every if one[1][-1] == END or length == limit]
        beams = sorted((one for one in every if one[1][-1] != END), reverse=True)[:4]
    return max(ended)


def takes_the_best_word(model, limit):
    score, tokens = 0.0, ()
    while len(tokens) < limit and tokens[-1:] != (END,):
        token, x = max(model(tokens).items(), key=lambda pair: pair[1])
        score, tokens = score + x, (*tokens, token)
    return score, tokens


def first_end_found(model, limit):
    """It takes the first end that it sees, and not the first that it takes."""
    heap = [(0.0, ())]
    while heap:
        fallen, tokens = heapq.heappop(heap)
        for token, x in model(tokens).items():
            text = (*tokens, token)
            if token == END or len(text) == limit:
                return x - fallen, text
            heapq.heappush(heap, (fallen - x, text))


def by_the_mean(model, limit):
    heap = [(0.0, 0.0, ())]
    while heap:
        _, score, tokens = heapq.heappop(heap)
        if tokens and (tokens[-1] == END or len(tokens) == limit):
            return score, tokens
        for token, x in model(tokens).items():
            heapq.heappush(heap, (-(score + x) / (len(tokens) + 1), score + x, (*tokens, token)))


def knows_all_texts(model, limit):
    return max(all_texts(model, limit))


RIGHT = {
    "survivors": [survivors, one_by_one, with_a_heap, stable_argsort, kept_in_order],
    "row_plan": [row_plan, last_child_keeps, by_parent, in_a_chain, with_arrays],
    "blocks_held": [blocks_held, sorted_neighbours, splitting_groups, with_hashes, token_by_token,
                    each_with_all_before],
    "could_win": [could_win, tries_all, both_ends, without_division, all_at_once],
    "likeliest": [likeliest, sorted_frontier, best_so_far, one_child_at_a_time, lower_and_lower],
}  # fmt: skip
WRONG = {
    "survivors": [ties_by_token, later_beam_first, own_score_forgotten, the_first_offers, one_for_each_beam,
                  one_for_each_score, one_for_each_token, sorts_the_callers, by_rank],
    "row_plan": [in_order, copies_all, no_copies, turned_round, shares_rows, in_row_order, spoils_the_list,
                 in_order_backwards, up_to_the_last_parent],
    "blocks_held": [all_prefixes, by_content_only, prompt_apart, full_ones_only, trunk_or_own, nobody_shares,
                    neighbours_as_they_come, nested_keys],
    "could_win": [as_it_is_now, always_the_limit, without_the_next_token, a_tie_wins, the_sum_alone,
                  next_token_only, penalty_without_a_sign, one_short_of_the_limit],
    "likeliest": [brute_force, best_child_first, a_wide_beam, takes_the_best_word, first_end_found, by_the_mean,
                  knows_all_texts, level_by_level, never_ends_early, searches_twice],
}  # fmt: skip
CHANGES = {}
