"""What assignment 5 is tried with, beside the student's code."""

import gc
import sys
import tracemalloc
import zlib
from itertools import count

from observe import outcome, plain

from minipaged.decoding.beam_search import BeamSearch, Continuation, memory_moves
from minipaged.memory.accounting import Pool, check_pool
from minipaged.memory.block_allocator import BlockAllocator
from minipaged.memory.page_table import PageTable, blocks_for
from minipaged.memory.prefix_cache import HashCache
from minipaged.memory.publishing import publish as publish_blocks
from minipaged.memory.radix_cache import RadixCache
from minipaged.requests.beam_search_params import BeamSearchParams

# --- beam search


def search(case):
    """Each call of `advance`, with what it returned and what is seen of the search after it."""
    params = BeamSearchParams(case["width"], length_penalty=case["penalty"], early_stopping=case["early"])
    search = BeamSearch(params, case["max_tokens"], case["stop"])
    seen: list = []
    for step in case["steps"]:
        if step["spoilt"] and not search.running:
            seen.append(None)  # nothing to be spoilt
            continue
        rows = [[(token, logprob) for token, logprob in row] for row in step["rows"]]
        count = len(search.running) + {"one more": 1, "one less": -1}.get(step["spoilt"], 0)
        rows = rows[:count]
        if step["spoilt"] == "nan":
            rows[-1][-1] = (rows[-1][-1][0], float("nan"))
        result = outcome(lambda rows=rows: [(c.parent, c.token_id, c.score) for c in search.advance(rows)])
        seen.append({"result": result, **_seen(search)})
    return seen


def _seen(search):
    return {
        "running": [(beam.token_ids, beam.score) for beam in search.running],
        "hypotheses": [
            (h.token_ids, h.score, h.cumulative_logprob, h.finish_reason, h.stop_token_id) for h in search.hypotheses()
        ],
        "done": bool(search.done),
    }


def moves(case):
    """The three lists, in any order."""
    children = [Continuation(parent, 7, -float(new)) for new, parent in enumerate(case["parents"])]
    answer = memory_moves(children, case["beams"])
    pairs = [[(old, new) for old, new in one] for one in (answer.fork, answer.keep)]
    return {"fork": sorted(pairs[0]), "keep": sorted(pairs[1]), "free": sorted(answer.free)}


# --- prefix caches


def chain(case):
    modulus = case.get("modulus")

    def new(block_size):
        if modulus is None:
            return HashCache(block_size)
        return HashCache(block_size, lambda what: zlib.crc32(repr(what).encode()) % modulus)

    return _prefixes(case, new, all_costs=True)


def tree(case):
    return _prefixes(case, RadixCache)


def _prefixes(case, new, all_costs=False):
    if case["kind"] == "cost":
        return [_cost(new(case["block_size"]), case, beside, all_costs) for beside in case["beside"]]
    if case["kind"] in ("come and go", "strangers"):
        return _left_behind(new(case["block_size"]), case)
    cache = new(case["block_size"])
    numbers = sorted({op[1] for op in case["ops"] if op[0] != "find"})
    steps = []
    for name, *rest in case["ops"]:
        gone = name == "remove" and rest[0] not in cache  # others have its key
        result = None if gone else outcome(getattr(cache, name), *rest)
        steps.append({
            "result": result, "known": [block for block in numbers if block in cache], "len": len(cache),
            "parents": sorted(cache.parents().items(), key=lambda pair: pair[0]),
        })  # fmt: skip
    return {"steps": steps, "drawn": cache.draw(str, 10_000) if case.get("draw") else ""}


class Token(int):
    """Counts how often it is compared or hashed."""

    looks = count()

    def __eq__(self, other):
        next(Token.looks)
        return int(self) == other

    def __hash__(self):
        next(Token.looks)
        return int.__hash__(self)


def _cost(cache, case, beside, all_costs):
    """A path, with `beside` others from the beginning, and as many from the middle of it: what does `find` cost?"""
    size, length, number = case["block_size"], case["blocks"], count()

    def block_of(first):
        return [Token(first)] + [Token(1)] * (size - 1)

    path = [cache.add(next(number), None, block_of(0))]
    for at in range(1, length):
        path.append(cache.add(next(number), path[-1], block_of(at)))
    for parent in (None, path[length // 2]):
        for at in range(beside):
            cache.add(next(number), parent, block_of(1000 + at))
    tokens = [token for at in range(length) for token in block_of(at)]
    answer = {"path": path}
    answer["found"], answer["looks"], answer["steps"] = _counted(cache.find, tokens)
    if all_costs:
        new = next(number)
        _, *answer["add"] = _counted(cache.add, new, path[-1], block_of(5))
        _, *answer["remove"] = _counted(cache.remove, new)
    return answer


def _counted(function, *args):
    """(what it returns, looks at tokens, steps of the interpreter)"""
    steps = 0

    def trace(frame, event, argument):
        nonlocal steps
        frame.f_trace_opcodes = True
        steps += event == "opcode"
        return trace

    Token.looks = count()
    sys.settrace(trace)
    try:
        result = function(*args)
    finally:
        sys.settrace(None)
    return plain(result), next(Token.looks), steps


def _left_behind(cache, case):
    """Bytes that are held after so many have come and gone, beyond those after a tenth of them."""
    tracemalloc.start()
    try:
        for at in range(case["times"]):
            salt = f"{at}"
            if case["kind"] == "strangers":
                cache.find([at] * case["block_size"] * 2, salt)
            else:
                cache.add(0, None, [at] * case["block_size"], salt)
                cache.add(1, 0, [at + 1] * case["block_size"], salt)
                cache.remove(1)
                cache.remove(0)
            if at == case["times"] // 10:
                before = _held()
        return {"bytes": _held() - before, "len": len(cache)}
    finally:
        tracemalloc.stop()


def _held():
    """Bytes, without the empty tuples and lists that Python keeps to use again."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


# --- publishing


class Known:
    """A prefix cache that knows whole prefixes. taken: what it doesn't take, as a hash cache after a collision."""

    def __init__(self, size, taken):
        self.size, self.taken = size, {(salt, tuple(tokens)) for salt, tokens in taken}
        self.clear()

    def clear(self):
        self.blocks, self.prefixes = {}, {}

    def remove(self, block):
        del self.blocks[self.prefixes.pop(block)]

    def find(self, tokens, salt=None):
        ends = range(self.size, len(tokens) + 1, self.size)
        found = [self.blocks.get((salt, tuple(tokens[:end]))) for end in ends]
        return found[: found.index(None)] if None in found else found

    def add(self, block, parent, tokens, salt=None):
        if parent is not None and parent not in self.prefixes:
            return block
        before = () if parent is None else self.prefixes[parent][1]
        prefix = (salt, before + tuple(tokens))
        if prefix not in self.blocks and prefix not in self.taken:
            self.blocks[prefix], self.prefixes[block] = block, prefix
        return self.blocks.get(prefix, block)

    def parents(self):
        return {block: self.blocks.get((salt, own[: -self.size])) for block, (salt, own) in self.prefixes.items()}

    def __contains__(self, block):
        return block in self.prefixes

    def __len__(self):
        return len(self.prefixes)


def publish(case):
    """Sequences come, are computed and published, forked, and go: how all stands after each."""
    size, cache = case["block_size"], Known(case["block_size"], case["taken"])
    pool, texts, seen = Pool(BlockAllocator(48, cache=cache)), {}, []
    for name, seq, *rest in case["ops"]:
        lists = [(table.blocks, table.blocks.copy()) for table in pool.tables.values()]
        asked: list = []
        raised = None
        if name == "start":
            tokens, salt = rest
            found = cache.find(tokens, salt)
            blocks = pool.allocator.allocate(blocks_for(len(tokens), size) - len(found), found=found)
            pool.tables[seq], texts[seq] = PageTable(size, found + blocks, len(tokens), len(found), salt, True), tokens
        elif name == "fork":
            table, texts[rest[0]] = pool.tables[seq], texts[seq]
            for block in table.blocks:
                pool.allocator.share(block)
            pool.tables[rest[0]] = PageTable(
                size, table.blocks, table.num_tokens, table.num_published, table.salt, True
            )
        elif name == "free":
            for block in reversed(pool.tables.pop(seq).blocks):
                pool.allocator.release(block)
        else:
            asking = _asking(texts[seq], asked)
            raised = outcome(publish_blocks, pool.tables[seq], rest[0], asking, pool, cache)
        seen.append({
            "tables": [[seq, list(table.blocks), table.num_published] for seq, table in sorted(pool.tables.items())],
            "known": [[salt or "", tokens, block] for (salt, tokens), block in cache.blocks.items()],
            "counts": [pool.allocator.ref_count(block) for block in range(48)], "asked": asked, "raised": raised,
            "lists kept": all(one == copy for one, copy in lists), "check": _check(pool, size),
        })  # fmt: skip
    return seen


def _asking(text, asked):
    def tokens(start, count):
        asked.append([start, count])
        return text[start : start + count]

    return tokens


def _check(pool, size):
    try:
        check_pool(pool, size)
    except AssertionError as error:
        return str(error)
    return ""
