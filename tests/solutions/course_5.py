"""Assignment 5, solved: four times right, and wrong in ways that real engines were wrong."""

from course_solutions import Wrong

BEAMS, HASH = "minipaged/decoding/beam_search.py", "minipaged/memory/prefix_cache.py"
RADIX, PUBLISHING = "minipaged/memory/radix_cache.py", "minipaged/memory/publishing.py"

# --- right: plain loops over what the starter has --------------------------------------------------------------------

LOOPS = {
    BEAMS: '''
class BeamSearch:
    def advance(self, candidates):
        if len(candidates) != len(self.running):
            raise ValueError("a list for each beam, please")
        offers = []
        for parent in range(len(candidates)):
            for place, (token, logprob) in enumerate(candidates[parent]):
                if logprob != logprob:
                    raise ValueError("not a number")
                offers.append((-(self.running[parent].score + logprob), parent, place, token))
        offers.sort()
        width, penalty = self.params.beam_width, self.params.length_penalty
        last = bool(self.running) and len(self.running[0].token_ids) + 1 == self.max_tokens
        survivors, running = [], []
        for rank, (minus, parent, _, token) in enumerate(offers):
            tokens, stops = self.running[parent].token_ids + (token,), token in self.stop_ids
            if not stops and not last:
                if len(survivors) < width:
                    survivors.append(Continuation(parent, token, -minus))
                    running.append(Beam(tokens, -minus))
            elif rank < width:
                reason = "stop" if stops else "length"
                score = -minus / len(tokens) ** penalty
                self.finished.append(Hypothesis(tokens, score, -minus, reason, token if stops else None))
        self.finished.sort(key=lambda h: -h.score)
        del self.finished[width:]
        if not survivors or not self._can_improve(survivors[0].score, len(running[0].token_ids)):
            survivors, running, self.done = [], [], True
        self.running = running
        return survivors

    def _can_improve(self, best_score, length):
        if len(self.finished) == self.params.beam_width:
            if self.params.early_stopping is True:
                return False
            if self.params.early_stopping == "never" and self.params.length_penalty > 0:
                length = self.max_tokens
            return not best_score / length ** self.params.length_penalty <= self.finished[-1].score
        return True


def memory_moves(continuations, num_old):
    fork, keep, free = [], [], []
    for old in range(num_old):
        children = [new for new in range(len(continuations)) if continuations[new].parent == old]
        if not children:
            free.append(old)
        for child in children:
            (keep if child == children[0] else fork).append((old, child))
    return MemoryMoves(fork, keep, free)
''',
    HASH: '''
class HashCache:
    def find(self, tokens, salt=None):
        found, before = [], None
        for at in range(len(tokens) // self._block_size):
            own = tuple(tokens[at * self._block_size : (at + 1) * self._block_size])
            entry = self._by_key.get(self._hash((salt, own, before.key if before else -1)))
            if entry is None or (entry.tokens, entry.salt) != (own, salt) or entry.parent is not before:
                return found
            found.append(entry.block)
            before = entry
        return found

    def add(self, block, parent, tokens, salt=None):
        before = None
        if parent is not None:
            if parent not in self._by_block:
                return block
            before = self._by_block[parent]
        key = self._hash((salt, tuple(tokens), before.key if before else -1))
        entry = self._by_key.get(key)
        if entry is None:
            entry = _Entry(block, key, before, tuple(tokens), salt)
            self._by_key[key] = entry
            self._by_block[block] = entry
        elif entry.tokens == tuple(tokens) and entry.parent is before and entry.salt == salt:
            return entry.block
        return block

    def remove(self, block):
        entry = self._by_block[block]
        del self._by_block[block]
        del self._by_key[entry.key]
''',
    RADIX: '''
class RadixCache:
    def find(self, tokens, salt=None):
        size, found, node = self._block_size, [], self._roots.get(salt)
        keys = [tuple(tokens[at : at + size]) for at in range(0, len(tokens) - size + 1, size)]
        while node is not None and len(found) < len(keys):
            node = node.children.get(keys[len(found)])
            if node is None:
                break
            for own, block in zip(node.tokens, node.blocks):
                if len(found) == len(keys) or own != keys[len(found)]:
                    return found
                found.append(block)
        return found

    def add(self, block, parent, tokens, salt=None):
        own = tuple(tokens)
        if parent is None:
            if salt not in self._roots:
                self._roots[salt] = _Node(None, [], [], salt)
            node = self._roots[salt]
        else:
            node = self._nodes[parent]
            if node.blocks[-1] != parent:
                at = node.blocks.index(parent) + 1
                if node.tokens[at] == own:
                    return node.blocks[at]
                node = self._upper_half(node, at)
        if own in node.children:
            return node.children[own].blocks[0]
        if node.parent is None or node.children:
            child = node.children[own] = _Node(node, [own], [block])
            self._nodes[block] = child
        else:
            node.tokens += [own]
            node.blocks += [block]
            self._nodes[block] = node
        return block

    def _upper_half(self, node, at):
        """As SGLang does it: a new node takes the first half's place above the old one."""
        upper = _Node(node.parent, node.tokens[:at], node.blocks[:at])
        upper.parent.children[upper.tokens[0]] = upper
        node.parent, node.tokens, node.blocks = upper, node.tokens[at:], node.blocks[at:]
        upper.children[node.tokens[0]] = node
        for block in upper.blocks:
            self._nodes[block] = upper
        return upper

    def remove(self, block):
        node = self._nodes[block]
        if block != node.blocks[-1] or len(node.children) > 0:
            raise ValueError("something follows")
        if len(node.blocks) == 1:
            above = node.parent
            del above.children[node.tokens[0]]
            if above.parent is None and not above.children:
                del self._roots[above.salt]
        else:
            del node.blocks[-1], node.tokens[-1]
        del self._nodes[block]
''',
    PUBLISHING: '''
def publish(table, num_computed, tokens, pool, cache):
    size, logical = table.block_size, table.num_published
    while (logical + 1) * size <= num_computed:
        own = table.blocks[logical]
        parent = table.blocks[logical - 1] if logical > 0 else None
        known = cache.add(own, parent, tokens(logical * size, size), table.salt)
        if known != own:
            for other in pool.tables.values():
                if len(other.blocks) > logical and other.blocks[logical] == own:
                    blocks = list(other.blocks)
                    blocks[logical] = known
                    other.blocks = blocks
                    pool.allocator.share(known)
                    pool.allocator.release(own)
        logical += 1
        table.num_published = logical
''',
}

# --- right: other data structures: streams that are merged, buckets, a trie, all lists replaced at the end -----------

STRUCTURES = {
    BEAMS: '''
import bisect
import heapq


class BeamSearch:
    def advance(self, candidates):
        streams = [self._stream(*one) for one in zip(range(len(self.running)), self.running, candidates, strict=True)]
        if any(c.score != c.score for stream in streams for c in stream):
            raise ValueError("NaN")
        ranked = list(heapq.merge(*streams, key=lambda c: -c.score))
        if not ranked:
            return []
        width, tokens = self.params.beam_width, len(self.running[0].token_ids) + 1
        running_on = [c for c in ranked if c.token_id not in self.stop_ids] if tokens < self.max_tokens else []
        for c in ranked[:width]:
            if tokens == self.max_tokens or c.token_id in self.stop_ids:
                stop = c.token_id if c.token_id in self.stop_ids else None
                hypothesis = Hypothesis(
                    (*self.running[c.parent].token_ids, c.token_id), c.score / tokens**self.params.length_penalty,
                    c.score, "length" if stop is None else "stop", stop,
                )
                bisect.insort(self.finished, hypothesis, key=lambda h: -h.score)
        self.finished = self.finished[:width]
        running_on = running_on[:width]
        if running_on == [] or not self._can_improve(running_on[0].score, tokens):
            self.done, self.running = True, []
            return []
        self.running = [Beam((*self.running[c.parent].token_ids, c.token_id), c.score) for c in running_on]
        return running_on

    def _stream(self, parent, beam, row):
        return [Continuation(parent, token, beam.score + logprob) for token, logprob in row]

    def _can_improve(self, best_score, length):
        early, penalty = self.params.early_stopping, self.params.length_penalty
        lengths = {True: None, False: length, "never": self.max_tokens if penalty > 0 else length}
        full = len(self.finished) >= self.params.beam_width
        if not full or lengths[early] is None:
            return not full
        return self.finished[-1].score < best_score / lengths[early] ** penalty


def memory_moves(continuations, num_old):
    first, fork = {}, []
    for new, (parent, _, _) in enumerate(continuations):
        if parent in first:
            fork.append((parent, new))
        else:
            first[parent] = new
    return MemoryMoves(fork=fork, keep=sorted(first.items()), free=sorted(set(range(num_old)) - first.keys()))
''',
    HASH: '''
class HashCache:
    """Contents of one hash stand in one bucket, so none is lost."""

    def __init__(self, block_size, hash_function=hash):
        self.size, self.hash = block_size, hash_function
        self.buckets, self.places = {}, {}

    def _bucket(self, parent, own, salt):
        above = self.places[parent][0] if parent is not None else 0
        return self.hash((above, own, salt))

    def _known(self, parent, own, salt):
        for what in self.buckets.get(self._bucket(parent, own, salt), ()):
            if what[1:] == (parent, own, salt):
                return what[0]
        return None

    def find(self, tokens, salt=None):
        found, rest = [], iter(tokens)
        while len(own := tuple(token for _, token in zip(range(self.size), rest))) == self.size:
            block = self._known(found[-1] if found else None, own, salt)
            if block is None:
                break
            found.append(block)
        return found

    def add(self, block, parent, tokens, salt=None):
        if parent is not None and parent not in self.places:
            return block
        own = tuple(tokens)
        known = self._known(parent, own, salt)
        if known is None:
            key = self._bucket(parent, own, salt)
            self.buckets.setdefault(key, []).append((block, parent, own, salt))
            self.places[block] = key, parent
            return block
        return known

    def remove(self, block):
        key, _ = self.places.pop(block)
        left = [what for what in self.buckets[key] if what[0] != block]
        if left:
            self.buckets[key] = left
        else:
            del self.buckets[key]

    def clear(self):
        self.buckets, self.places = {}, {}

    def parents(self):
        return {block: parent for block, (_, parent) in self.places.items()}

    def __contains__(self, block):
        return block in self.places

    def __len__(self):
        return len(self.places)
''',
    RADIX: '''
class Place:
    def __init__(self, block, above, own):
        self.block, self.above, self.own, self.below = block, above, own, {}


class RadixCache:
    """A trie with a place for each block. Runs are put together when it is drawn."""

    def __init__(self, block_size):
        self.size, self.tops, self.places = block_size, {}, {}

    def find(self, tokens, salt=None):
        return list(self._path(self.tops.get(salt), tokens, 0))

    def _path(self, place, tokens, at):
        while place and at + self.size <= len(tokens):
            place = place.below.get(tuple(tokens[at : at + self.size]))
            at += self.size
            if place:
                yield place.block

    def add(self, block, parent, tokens, salt=None):
        own = tuple(tokens)
        above = self.tops.setdefault(salt, Place(None, None, salt)) if parent is None else self.places[parent]
        if own not in above.below:
            above.below[own] = self.places[block] = Place(block, above, own)
        return above.below[own].block

    def remove(self, block):
        place = self.places[block]
        if place.below:
            raise ValueError(f"{len(place.below)} blocks follow")
        del self.places[block], place.above.below[place.own]
        if not place.above.below and place.above.above is None:
            del self.tops[place.above.own]

    def clear(self):
        self.tops, self.places = {}, {}

    def parents(self):
        return {block: place.above.block for block, place in self.places.items()}

    def __contains__(self, block):
        return block in self.places

    def __len__(self):
        return len(self.places)

    def _walk(self):
        def runs(places, before):
            for number, place in enumerate(places):
                last = number == len(places) - 1
                run = [place]
                while len(run[-1].below) == 1:
                    run.extend(run[-1].below.values())
                yield _Node(None, [one.own for one in run], [one.block for one in run]), before + "|`"[last] + "-- "
                yield from runs(list(run[-1].below.values()), before + "| "[last] + "   ")

        yield from runs([place for top in self.tops.values() for place in top.below.values()], "")
''',
    PUBLISHING: '''
def publish(table, num_computed, tokens, pool, cache):
    first, last, size = table.num_published, num_computed // table.block_size, table.block_size
    if last <= first:
        return
    text = list(tokens(first * size, (last - first) * size))
    path, swaps = list(table.blocks), {}
    for logical in range(first, last):
        place = (logical - first) * size
        known = cache.add(path[logical], path[logical - 1] if logical else None, text[place : place + size], table.salt)
        if known != path[logical]:
            swaps[logical, path[logical]] = known
        path[logical] = known
    table.num_published = last
    if swaps:
        for other in pool.tables.values():
            new = [swaps.get(one, one[1]) for one in enumerate(other.blocks)]
            for before, after in zip(other.blocks, new):
                if before != after:
                    pool.allocator.share(after)
                    pool.allocator.release(before)
            if new != other.blocks:
                other.blocks = new
''',
}

# --- right: many small functions, and recursion ----------------------------------------------------------------------

SMALL = {
    BEAMS: '''
from collections import defaultdict


def hypothesis(search, tokens, total):
    stop = tokens[-1] if tokens[-1] in search.stop_ids else None
    score = total * len(tokens) ** -search.params.length_penalty
    return Hypothesis(tokens, score, total, "stop" if stop is not None else "length", stop)


def worth_it(search, best, length):
    params = search.params
    if len(search.finished) < params.beam_width:
        return True
    if params.early_stopping is True:
        return False
    reach = search.max_tokens if params.early_stopping == "never" and params.length_penalty > 0 else length
    return best / reach**params.length_penalty > min(h.score for h in search.finished)


class BeamSearch:
    def advance(self, candidates):
        """All in one: `_can_improve` isn't asked."""
        if self.done:
            return []
        if len(candidates) != len(self.running) or any(lp != lp for row in candidates for _, lp in row):
            raise ValueError("these are no candidates")
        offers = [
            (beam.score + lp, -parent, (*beam.token_ids, token))
            for parent, beam in enumerate(self.running)
            for token, lp in candidates[parent]
        ]
        order = sorted(range(len(offers)), key=lambda at: (-offers[at][0], at))
        width, length = self.params.beam_width, len(offers[0][2])
        over = [at for at in order if length == self.max_tokens or offers[at][2][-1] in self.stop_ids]
        new = [hypothesis(self, offers[at][2], offers[at][0]) for at in order[:width] if at in over]
        self.finished = sorted(self.finished + new, key=lambda h: h.score, reverse=True)[:width]
        going = [at for at in order if at not in over][:width]
        if not going or not worth_it(self, offers[going[0]][0], length):
            going, self.done = [], True
        self.running = [Beam(offers[at][2], offers[at][0]) for at in going]
        return [Continuation(-offers[at][1], offers[at][2][-1], offers[at][0]) for at in going]

    def _can_improve(self, best_score, length):
        return worth_it(self, best_score, length)


def memory_moves(continuations, num_old):
    children = defaultdict(list)
    for new, one in enumerate(continuations):
        children[one.parent].append((one.parent, new))
    return MemoryMoves(
        [pair for pairs in children.values() for pair in pairs[1:]],
        [pairs[0] for pairs in children.values()],
        [old for old in range(num_old) if old not in children],
    )
''',
    HASH: '''
class HashCache:
    def find(self, tokens, salt=None):
        return self._after(None, list(tokens), 0, salt)

    def _after(self, before, tokens, at, salt):
        own = tuple(tokens[at : at + self._block_size])
        entry = self._look(before, own, salt) if len(own) == self._block_size else None
        return [entry.block, *self._after(entry, tokens, at + self._block_size, salt)] if entry else []

    def _name(self, before, own, salt):
        return self._hash((before and before.key, own, salt))

    def _look(self, before, own, salt):
        match self._by_key.get(self._name(before, own, salt)):
            case _Entry() as entry if (entry.tokens, entry.salt) == (own, salt) and entry.parent is before:
                return entry
        return None

    def add(self, block, parent, tokens, salt=None):
        try:
            before = parent if parent is None else self._by_block[parent]
        except KeyError:
            return block
        own = tuple(tokens)
        entry = self._look(before, own, salt)
        if not entry:
            entry = _Entry(block, self._name(before, own, salt), before, own, salt)
            if self._by_key.setdefault(entry.key, entry) is entry:
                self._by_block[block] = entry
        return entry.block

    def remove(self, block):
        self._by_key.pop(self._by_block.pop(block).key)
''',
    RADIX: '''
class RadixCache:
    def find(self, tokens, salt=None):
        size = self._block_size
        keys = [tuple(tokens[at * size :][:size]) for at in range(len(tokens) // size)] if len(tokens) < 100 else [
            tuple(tokens[at * size : at * size + size]) for at in range(len(tokens) // size)
        ]
        return self._below(self._roots[salt], keys, 0) if salt in self._roots else []

    def _below(self, node, keys, done):
        child = node.children.get(keys[done]) if done < len(keys) else None
        if child is None:
            return []
        same = 0
        while same < len(child.tokens) and keys[done + same : done + same + 1] == [child.tokens[same]]:
            same += 1
        more = self._below(child, keys, done + same) if same == len(child.tokens) else []
        return child.blocks[:same] + more

    def add(self, block, parent, tokens, salt=None):
        own = tuple(tokens)
        node = self._nodes[parent] if parent is not None else self._roots.setdefault(salt, _Node(None, [], [], salt))
        at = node.blocks.index(parent) + 1 if parent is not None else 0
        following = dict(zip(node.tokens[at : at + 1], node.blocks[at : at + 1]))
        following |= {key: child.blocks[0] for key, child in node.children.items()} if at == len(node.blocks) else {}
        if own in following:
            return following[own]
        if following:
            self._cut(node, at)
        if following or parent is None:
            self._nodes[block] = node.children[own] = _Node(node, [own], [block])
        else:
            self._nodes[block] = node
            node.tokens.append(own)
            node.blocks.append(block)
        return block

    def _cut(self, node, at):
        if at == len(node.blocks):
            return
        below = _Node(node, node.tokens[at:], node.blocks[at:])
        below.children, node.children = node.children, {node.tokens[at]: below}
        node.tokens, node.blocks = node.tokens[:at], node.blocks[:at]
        for child in below.children.values():
            child.parent = below
        self._nodes.update(dict.fromkeys(below.blocks, below))

    def remove(self, block):
        node = self._nodes[block]
        if node.children or node.blocks.index(block) + 1 < len(node.blocks):
            raise ValueError(block)
        self._nodes.pop(block)
        node.blocks.remove(block)
        own = node.tokens.pop()
        if not node.blocks:
            self._prune(node.parent, own)

    def _prune(self, node, own):
        node.children.pop(own)
        if not node.children and not node.blocks:
            self._roots.pop(node.salt)
''',
    PUBLISHING: '''
def publish(table, num_computed, tokens, pool, cache):
    for logical in range(table.num_published, num_computed // table.block_size):
        one(table, logical, tokens(logical * table.block_size, table.block_size), pool, cache)


def one(table, logical, text, pool, cache):
    mine = table.blocks[logical]
    theirs = cache.add(mine, *table.blocks[:logical][-1:] or [None], text, table.salt)
    table.num_published += 1
    holders = [t for t in pool.tables.values() if mine in t.blocks[logical : logical + 1]] if mine != theirs else []
    for holder in holders:
        holder.blocks = [theirs if at == logical else block for at, block in enumerate(holder.blocks)]
        pool.allocator.share(theirs)
    for _ in holders:
        pool.allocator.release(mine)
''',
}

# --- right: hashes that aren't needed: a dictionary knows what its keys are ------------------------------------------

DICTIONARY = {
    **LOOPS,
    HASH: '''
class HashCache:
    def __init__(self, block_size, hash_function=hash):
        self._block_size = block_size
        self._block_of, self._key_of = {}, {}

    def find(self, tokens, salt=None):
        found = [None]
        for end in range(self._block_size, len(tokens) + 1, self._block_size):
            found.append(self._block_of.get((found[-1], salt, *tokens[end - self._block_size : end])))
            if found[-1] is None:
                return found[1:-1]
        return found[1:]

    def add(self, block, parent, tokens, salt=None):
        if not (parent is None or parent in self._key_of):
            return block
        key = (parent, salt, *tokens)
        known = self._block_of.setdefault(key, block)
        if known == block:
            self._key_of[block] = key
        return known

    def remove(self, block):
        del self._block_of[self._key_of.pop(block)]

    def clear(self):
        self._block_of, self._key_of = {}, {}

    def parents(self):
        return {block: key[0] for block, key in self._key_of.items()}

    def __contains__(self, block):
        return block in self._key_of

    def __len__(self):
        return len(self._key_of)
''',
}

RIGHT = {"plain loops": LOOPS, "other structures": STRUCTURES, "small functions": SMALL, "a dictionary": DICTIONARY}

# --- wrong -----------------------------------------------------------------------------------------------------------

STEP, END, MOVES = "a step of the search", "the end of the search", "moves in memory"
CHAIN, TREE, SHED, PUBLISH = "hash chain", "radix tree", "shedding leaves", "publishing"
GITHUB = "https://github.com/"

WRONG = [
    Wrong("a finished beam runs on behind its stop token", STEP, BEAMS,
          "if not (at_limit or c.token_id in self.stop_ids)][:width]", "if not at_limit][:width]",
          GITHUB + "awslabs/sockeye/pull/233"),
    Wrong("the first finished are kept, not the best", STEP, BEAMS,
          "sorted(finished, key=lambda h: h.score, reverse=True)[:width]",
          "sorted(finished[:width], key=lambda h: h.score, reverse=True)", GITHUB + "neulab/xnmt/pull/572"),
    Wrong("a hypothesis has the tokens of the beam that its rank names", STEP, BEAMS,
          "[self._finish(c) for c in finishing]",
          "[self._finish(c._replace(parent=rank % len(self.running))) for rank, c in enumerate(finishing)]",
          GITHUB + "NVIDIA/TensorRT-LLM/pull/15621"),
    Wrong("the length in a score counts a token that isn't of the output", STEP, BEAMS,
          "last.score / len(token_ids) **", "last.score / (1 + len(token_ids)) **",
          GITHUB + "huggingface/transformers/issues/25455", also=(END,)),
    Wrong("stop tokens finish at any rank", STEP, BEAMS, "for c in ranked[:width] if", "for c in ranked if"),
    Wrong("what runs at the limit is dropped", STEP, BEAMS,
          "ranked[:width] if at_limit or c.token_id in self.stop_ids]",
          "ranked[:width] if c.token_id in self.stop_ids]"),
    Wrong("a step's log-probability alone", STEP, BEAMS, "beam.score + logprob", "logprob"),
    Wrong("NaN is nobody's concern", STEP, BEAMS,
          "if any(math.isnan(c.score) for c in ranked):", "if not ranked and 0:"),
    Wrong("the search ends as soon as enough are finished", END, BEAMS,
          "if self.params.early_stopping is True:", "if self.params.early_stopping is not None:",
          GITHUB + "OpenNMT/OpenNMT-py/issues/1320"),
    Wrong("never: what a beam may become is scored at its present length", END, BEAMS,
          "            length = self.max_tokens", "            pass", GITHUB + "huggingface/transformers/pull/20901"),
    Wrong("never: below a penalty of 0, too, a beam is scored as if it were long", END, BEAMS,
          'self.params.early_stopping == "never" and penalty > 0', 'self.params.early_stopping == "never"'),
    Wrong("the best finished one is to be beaten, not the worst", END, BEAMS,
          "> self.finished[-1].score", "> self.finished[0].score"),
    Wrong("all children go on in one memory", MOVES, BEAMS, "if heir[c.parent] != new]", "if new < 0]",
          GITHUB + "ggml-org/llama.cpp/issues/3802"),
    Wrong("beams without children are never freed once all are over", MOVES, BEAMS,
          "if old not in heir])", "if heir and old not in heir])"),
    Wrong("a hash is believed", CHAIN, HASH,
          "if entry and entry.tokens == tokens and entry.parent is before and entry.salt == salt:", "if entry:",
          GITHUB + "vllm-project/vllm/security/advisories/GHSA-rm76-4mrf-v9r8"),
    Wrong("only the last block's tokens are compared", CHAIN, HASH,
          "entry.tokens == tokens and entry.parent is before and entry.salt == salt", "entry.tokens == tokens",
          GITHUB + "vllm-project/aibrix/issues/2329"),
    Wrong("a salt has no effect", CHAIN, HASH, text='''
class HashCache:
    def _key(self, before, tokens, salt):
        return self._hash((before.key if before else None, tokens))

    def _get(self, before, tokens, salt):
        entry = self._by_key.get(self._key(before, tokens, salt))
        return entry if entry and entry.tokens == tokens and entry.parent is before else None
''', source=GITHUB + "llm-d/llm-d-router/pull/1494"),
    Wrong("a removed block's hash stays", CHAIN, HASH,
          "del self._by_key[self._by_block.pop(block).key]", "del self._by_block[block]",
          GITHUB + "ovg-project/kvcached/issues/362"),
    Wrong("a prefix that ends on a block's border lacks its last block", CHAIN, HASH,
          "range(self._block_size, len(tokens) + 1, self._block_size)",
          "range(self._block_size, len(tokens), self._block_size)", GITHUB + "Wenyueh/MinivLLM/pull/87"),
    Wrong("the walk goes on behind an unknown block", CHAIN, HASH,
          "                break\n", "                continue\n", GITHUB + "llm-d/llm-d-inference-sim/issues/705"),
    Wrong("each block is known by all tokens up to it", CHAIN, HASH, text='''
class HashCache:
    def find(self, tokens, salt=None):
        found, entry = [], None
        for end in range(self._block_size, len(tokens) + 1, self._block_size):
            whole = hash(tuple(tokens[:end]))
            entry = self._get(entry, tuple(tokens[end - self._block_size : end]), salt)
            if entry is None or whole is None:
                break
            found.append(entry.block)
        return found
''', source=GITHUB + "vllm-project/vllm/pull/2762"),
    Wrong("who comes later takes the key", CHAIN, HASH, "if key not in self._by_key:", "if key is not None:"),
    Wrong("all blocks are searched", CHAIN, HASH, text='''
class HashCache:
    def _get(self, before, tokens, salt):
        for entry in self._by_block.values():
            if entry.parent is before and entry.tokens == tokens and entry.salt == salt:
                return entry
        return None
'''),
    Wrong("after a split the lower half stands under another key", TREE, RADIX,
          "node.children = {lower.tokens[0]: lower}", "node.children = {node.tokens[0]: lower}",
          GITHUB + "sgl-project/sglang/pull/36696", also=(SHED,)),
    Wrong("a split loses what followed", TREE, RADIX, "        lower.children = node.children\n", "", also=(SHED,)),
    Wrong("after a split the lower half's blocks are held to stand in the upper", TREE, RADIX,
          "            self._nodes[block] = lower\n", "            pass\n", also=(SHED,)),
    Wrong("all salts have one tree", TREE, RADIX, text='''
class RadixCache:
    def find(self, tokens, salt=None):
        found, node, at = [], self._roots.get(None), 0
        for end in range(self._block_size, len(tokens) + 1, self._block_size):
            own = tuple(tokens[end - self._block_size : end])
            if node and at == len(node.blocks):
                node, at = node.children.get(own), 0
            if node is None or node.tokens[at] != own:
                break
            found.append(node.blocks[at])
            at += 1
        return found
''', source=GITHUB + "xLLM-AI/xllm/pull/2047"),
    Wrong("who looks for an unknown salt leaves an empty tree", TREE, RADIX, "self._roots.get(salt)",
          "self._roots.setdefault(salt, _Node(None, [], [], salt))"),
    Wrong("the last block, partly filled, is known by its beginning", TREE, RADIX, text='''
class RadixCache:
    def find(self, tokens, salt=None):
        found, node, at = [], self._roots.get(salt), 0
        for start in range(0, len(tokens), self._block_size):
            own = tuple(tokens[start : start + self._block_size])
            if node and at == len(node.blocks):
                below = [one for key, one in node.children.items() if key[: len(own)] == own]
                node, at = (below[0] if below else None), 0
            if node is None or node.tokens[at][: len(own)] != own:
                break
            found.append(node.blocks[at])
            at += 1
        return found
'''),
    Wrong("a block goes before those that follow it", SHED, RADIX,
          "if node.children or node.blocks[-1] != block:", "if node.blocks[-1] != block:",
          GITHUB + "kvcache-ai/Mooncake/issues/1998"),
    Wrong("the parent still names a child that is gone", SHED, RADIX,
          "            del node.parent.children[first]\n",
          "            node.parent.children[first].tokens.append(first)\n"),
    Wrong("blocks can be found before they are written", PUBLISH, PUBLISHING,
          "num_computed // size", "table.num_tokens // size", GITHUB + "GeeeekExplorer/nano-vllm/issues/208"),
    Wrong("a block is given back, and a page table still has it", PUBLISH, PUBLISHING,
          "            table.blocks = [*table.blocks[:logical], known, *table.blocks[logical + 1 :]]\n", "",
          GITHUB + "sgl-project/mini-sglang/pull/142"),
    Wrong("only the table that publishes goes on with the known block", PUBLISH, PUBLISHING,
          "    for table in pool.tables.values():\n        if table.blocks[logical : logical + 1] == [own]:",
          "    holders = [t for t in pool.tables.values() if t.blocks[logical : logical + 1] == [own]]\n"
          "    for table in holders[-1:]:\n        if True:"),
    Wrong("parents are taken from the list as it was", PUBLISH, PUBLISHING, text='''
def publish(table, num_computed, tokens, pool, cache):
    size, blocks = table.block_size, table.blocks
    for logical in range(table.num_published, num_computed // size):
        own, parent = blocks[logical], blocks[logical - 1] if logical else None
        known = cache.add(own, parent, tokens(logical * size, size), table.salt)
        if known != own:
            _replace(pool, logical, own, known)
        table.num_published = logical + 1
'''),
    Wrong("lists that others have are changed", PUBLISH, PUBLISHING,
          "table.blocks = [*table.blocks[:logical], known, *table.blocks[logical + 1 :]]",
          "table.blocks[logical] = known"),
]  # fmt: skip
