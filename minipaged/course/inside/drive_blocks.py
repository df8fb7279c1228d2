"""What assignment 2 is tried with, beside the student's code: lists of operations, and what can be seen after each."""

import sys

from observe import outcome, plain

from minipaged.memory.block_allocator import BlockAllocator
from minipaged.memory.kv_manager import KVCacheManager, Prefix
from minipaged.memory.page_table import PageTable, blocks_for
from minipaged.memory.prefix_cache import HashCache


class Known:
    """A prefix cache for an allocator alone: it knows blocks, and not by what they are found."""

    def __init__(self):
        self.blocks = set()

    def __contains__(self, block):
        return block in self.blocks

    def __len__(self):
        return len(self.blocks)

    def remove(self, block):
        self.blocks.remove(block)

    def clear(self):
        self.blocks.clear()

    def parents(self):
        return dict.fromkeys(self.blocks)

    def find(self, tokens, salt=None):
        return []

    def add(self, block, parent, tokens, salt=None):
        return block


class Pool:
    """An allocator. Cases name blocks by when they were handed out, since which ones are is the student's choice."""

    def __init__(self, case):
        self.cache = Known()
        self.allocator = BlockAllocator(case["num_blocks"], case["free_order"], self.cache if case["cached"] else None)
        self.handed_out = []

    def block(self, named):
        """["nth", 0] is the first that was handed out, ["block", 5] is block 5."""
        how, number = named
        if how == "block":
            return number
        return self.handed_out[number] if number < len(self.handed_out) else None

    def do(self, name, *arguments):
        if name == "allocate":
            count, keep_free, found = arguments
            return self.allocate(count, keep_free, [self.block(one) for one in found])
        if name in ("take_freed", "forget_all"):
            return outcome(getattr(self.allocator, name))
        block = self.block(arguments[0])
        if block is None:
            return None
        if name == "know":
            if self.allocator.ref_count(block):
                self.cache.blocks.add(block)
            return None
        return outcome(getattr(self.allocator, name), block)

    def allocate(self, count, keep_free, found):
        if None in found:
            return None
        answer = outcome(listed, self.allocator, count, keep_free, found)
        if isinstance(answer, list):
            self.handed_out += answer
        return answer

    def seen(self):
        names = ("num_free", "num_idle", "num_used", "num_shared", "peak_used", "num_evicted")
        return {name: getattr(self.allocator, name) for name in names} | {
            "ref_count": [self.allocator.ref_count(block) for block in range(self.allocator.num_blocks)],
            "idle": self.allocator.idle(),
            "known": sorted(self.cache.blocks),
        }


def listed(allocator, *arguments):
    answer = allocator.allocate(*arguments)
    if type(answer) is tuple:
        raise TypeError("allocate answered with a tuple: it should be a list")
    return answer


def pool(case):
    if "cost" in case:
        return cost(case)
    pool = Pool(case)
    return [{"answer": pool.do(*op), **pool.seen()} for op in case["ops"]]


def cost(case):
    """Lines of Python that are run for single operations in a large pool: at the most."""
    pool = Pool(case)
    blocks = listed(pool.allocator, case["cost"])
    assert isinstance(blocks, list), f"allocate({case['cost']}) of as many free blocks answered {blocks}"
    if case["cached"]:
        pool.cache.blocks.update(blocks[: case["known"]])
    third = case["cost"] // 3
    free = blocks[third : 2 * third]  # whoever looks from one end or the other has a long way
    for block in free:
        pool.allocator.release(block)
    asked = [("release", blocks[0]), ("allocate", 1)]
    asked += [("share", free[9]), ("release", free[9])] if case["cached"] else [("share", blocks[1])]
    return {name: lines(getattr(pool.allocator, name), number) for name, number in asked}


def lines(function, *arguments):
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        function(*arguments)
    finally:
        sys.settrace(None)
    return count


def table(case):
    table = PageTable(case["block_size"], list(case["blocks"]), case["num_tokens"])
    position, start, count = case["position"], case["start"], case["count"]
    return {
        "blocks_for": outcome(blocks_for, case["num_tokens"], case["block_size"]),
        "room": plain(table.room),
        "locate": outcome(table.locate, position),
        "slot": outcome(table.slot, position),
        "slots": outcome(table.slots, start, count),
    }


class Memory:
    """A manager, and what its sequences' tokens are: a prefix cache wants to know."""

    def __init__(self, case):
        cache = HashCache(case["block_size"]) if case["cached"] else None
        self.memory = KVCacheManager(case["num_blocks"], case["block_size"], case["num_cpu_blocks"], None, cache)
        self.tokens = {}
        self.handed_out = []  # page tables, each with a copy

    def do(self, name, *arguments):
        return outcome(getattr(self, name), *arguments)

    def allocate(self, seq_id, tokens, keep_free, salt):
        prefix = self.memory.find(tokens, *salt) if salt is not None else None
        prefix = prefix and Prefix(list(prefix.blocks), prefix.num_tokens, prefix.salt)
        answer = self.memory.allocate(seq_id, len(tokens), keep_free, prefix)
        if type(answer).__name__ == "Allocated":
            self.tokens[seq_id] = list(tokens)
        return answer

    def allocate_less(self, seq_id, tokens):
        """Than was found: misuse."""
        prefix = self.memory.find(tokens)
        return self.memory.allocate(seq_id, prefix.num_tokens - 1, 0, prefix) if prefix.blocks else None

    def shrink(self, growing):
        """Misuse, too."""
        return self.memory.append(dict(growing))

    def append(self, growing, keep_free):
        answer = self.memory.append({seq_id: len(tokens) for seq_id, tokens in growing}, keep_free)
        if type(answer).__name__ == "Appended":
            for seq_id, tokens in growing:
                self.tokens[seq_id] = self.tokens[seq_id] + tokens
        return answer

    def fork(self, parent, child):
        self.memory.fork(parent, child)
        self.tokens[child] = list(self.tokens[parent])

    def free(self, seq_id):
        return self.memory.free(seq_id)

    def publish(self, seq_id):
        tokens = self.tokens.get(seq_id, [])
        return self.memory.publish(seq_id, len(tokens), lambda start, count: tokens[start : start + count])

    def swap_out(self, seq_ids):
        return self.memory.swap_out(seq_ids)

    def swap_in(self, seq_ids, keep_free):
        return self.memory.swap_in(seq_ids, keep_free, self.tokens)

    def seen(self):
        memory, allocator = self.memory, self.memory._gpu.allocator
        tables = [(seq_id, memory.is_swapped(seq_id), memory.block_table(seq_id)) for seq_id in memory.sequences()]
        changed = any(table != copy for table, copy in self.handed_out)
        current = [memory.current_table(seq_id) for seq_id, swapped, _ in tables if not swapped]
        new = [table for table in current if not any(table is old for old, _ in self.handed_out)]
        self.handed_out += [(table, list(table)) for table in new]
        return {
            "tables": tables,
            "num_tokens": [memory.num_tokens(seq_id) for seq_id, *_ in tables],
            "ref_count": [allocator.ref_count(block) for block in range(allocator.num_blocks)],
            "idle": memory.idle_blocks(),
            "freed": memory.take_freed(),
            "usage": memory.usage(),
            "changed": changed,
        }


def memory(case):
    memory = Memory(case)
    return [{"answer": memory.do(*op), **memory.seen()} for op in case["ops"]]
