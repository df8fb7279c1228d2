"""Assignment 2: solutions of other styles than the reference's, and wrong ones."""

from course_solutions import Wrong

ALLOCATOR = "minipaged/memory/block_allocator.py"
TABLE = "minipaged/memory/page_table.py"
MANAGER = "minipaged/memory/kv_manager.py"
GROW = "minipaged/memory/copy_on_write.py"
SWAP = "minipaged/memory/swapping.py"

# --- plain loops, on what `__init__` has prepared; what came back last goes out first ---

LOOPS = {
    ALLOCATOR: '''
class BlockAllocator:
    def allocate(self, count, keep_free=0, found=()):
        if count < 0 or keep_free < 0:
            raise MisuseError("less than nothing")
        woken = 0
        for block in found:
            if self.ref_count(block) == 0:
                if block not in self._idle:
                    raise MisuseError(f"block {block} has no contents")
                woken += 1
        if count + woken > 0 and self.num_free < count + woken + keep_free:
            return NoSpace(count + woken + keep_free, self.num_free)
        for block in found:
            self.share(block)
        blocks = []
        while len(blocks) < count:
            blocks.append(self._take())
        if self.num_used > self.peak_used:
            self.peak_used = self.num_used
        return blocks

    def share(self, block):
        if self.ref_count(block) == 0:
            if block not in self._idle:
                raise MisuseError(f"block {block} is free")
            del self._idle[block]
            self._ref_counts[block] = 1
            return
        if self._ref_counts[block] == 1:
            self.num_shared += 1
        self._ref_counts[block] += 1

    def release(self, block):
        if self.ref_count(block) == 0:
            raise MisuseError(f"block {block} is free")
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 1:
            self.num_shared -= 1
        elif self._ref_counts[block] == 0:
            if self._cache is None or block not in self._cache:
                self._drop(block)
            else:
                self._idle[block] = None

    def _take(self):
        if len(self._free) > 0:
            block = self._free.popleft()
        else:
            block = next(iter(self._idle))
            del self._idle[block]
            self._cache.remove(block)
            self._freed[block] = None
            self.num_evicted += 1
        self._ref_counts[block] = 1
        return block

    def _drop(self, block):
        self._free.appendleft(block)
        self._freed[block] = None

    def take_freed(self):
        blocks = []
        for block in self._freed:
            blocks.append(block)
        self._freed = {}
        return blocks

    def forget_all(self):
        if self._cache is not None:
            self._cache.clear()
        for block in list(self._idle):
            self._drop(block)
        self._idle.clear()
''',
    TABLE: '''
def blocks_for(num_tokens, block_size):
    full = num_tokens // block_size
    if num_tokens > full * block_size:
        return full + 1
    return full

class PageTable:
    @property
    def room(self):
        if self.num_tokens % self.block_size == 0:
            return 0
        return self.block_size - self.num_tokens % self.block_size

    def locate(self, position):
        self._must_have(position, 1)
        return self.blocks[position // self.block_size], position % self.block_size

    def slot(self, position):
        block, offset = self.locate(position)
        return offset + self.block_size * block

    def slots(self, start, count):
        self._must_have(start, count)
        found = []
        for position in range(start, start + count):
            found.append(self.slot(position))
        return found
''',
    MANAGER: '''
class KVCacheManager:
    def allocate(self, seq_id, num_tokens, keep_free=0, prefix=None):
        self._must_be_new(seq_id)
        found, salt, publishes = [], None, False
        if prefix is not None:
            found, salt, publishes = prefix.blocks, prefix.salt, True
            if prefix.num_tokens > num_tokens:
                raise MisuseError("more was found than is wanted")
        missing = self.blocks_for(num_tokens) - len(found)
        new = self._gpu.allocator.allocate(missing, keep_free, found)
        if isinstance(new, NoSpace):
            return new
        table = PageTable(self.block_size)
        table.blocks = list(found) + new
        table.num_tokens = num_tokens
        table.num_published = len(found)
        table.salt = salt
        table.publishes = publishes
        self._gpu.tables[seq_id] = table
        return Allocated(list(table.blocks))

    def fork(self, parent, child):
        home = self._home(parent)
        self._must_be_new(child)
        old = home.tables[parent]
        new = PageTable(old.block_size, list(old.blocks), old.num_tokens, old.num_published, old.salt, old.publishes)
        for block in new.blocks:
            home.allocator.share(block)
        home.tables[child] = new

    def free(self, seq_id):
        home = self._home(seq_id)
        blocks = list(home.tables[seq_id].blocks)
        del home.tables[seq_id]
        while blocks:
            home.allocator.release(blocks.pop())
''',
    GROW: '''
def grow(growing, pool, keep_free):
    allocator = pool.allocator
    needed = 0
    left = {}
    copying = set()
    for seq_id, (table, count) in growing.items():
        if count < 0:
            raise MisuseError("less than nothing")
        if count == 0:
            continue
        if table.num_tokens % table.block_size != 0:
            last = table.blocks[-1]
            if last not in left:
                left[last] = allocator.ref_count(last)
            if left[last] > 1:
                left[last] -= 1
                copying.add(seq_id)
                needed += 1
        needed += blocks_for(table.num_tokens + count, table.block_size) - len(table.blocks)
    new = allocator.allocate(needed, keep_free)
    if isinstance(new, NoSpace):
        return new
    copies = []
    for seq_id, (table, count) in growing.items():
        blocks = list(table.blocks)
        if seq_id in copying:
            copies.append((blocks[-1], new[0]))
            allocator.release(blocks[-1])
            blocks[-1] = new.pop(0)
        while len(blocks) * table.block_size < table.num_tokens + count:
            blocks.append(new.pop(0))
        table.blocks = blocks
        table.num_tokens += count
    return Appended(copies)
''',
    SWAP: '''
def move(tables, old, new, keep_free, found):
    wanted = []
    for table in tables.values():
        for block in table.blocks:
            if block not in found and block not in wanted:
                wanted.append(block)
    already = []
    for target in found.values():
        if target not in already:
            already.append(target)
    targets = new.allocator.allocate(len(wanted), keep_free, already)
    if isinstance(targets, NoSpace):
        return targets
    place = dict(found)
    for source, target in zip(wanted, targets):
        place[source] = target
    for seq_id, table in tables.items():
        moved = [place[block] for block in table.blocks]
        for block in moved:
            new.allocator.share(block)
        for block in table.blocks[::-1]:
            old.allocator.release(block)
        table.blocks = moved
        table.num_published = len([block for block in moved if block in already])
        new.tables[seq_id] = table
        del old.tables[seq_id]
    for block in already + targets:
        new.allocator.release(block)
    return Swapped(list(zip(wanted, targets)))
''',
}

# --- data structures of their own: a heap for the free blocks, and one state for each block; idle ones by number ---

OWN = {
    ALLOCATOR: '''
import heapq

class BlockAllocator:
    def __init__(self, num_blocks, free_order=None, cache=None):
        first = list(free_order or ())
        if num_blocks < 0:
            raise MisuseError("num_blocks")
        if len(set(first)) != len(first) or not set(first) <= set(range(num_blocks)):
            raise MisuseError("free_order")
        self.num_blocks = num_blocks
        self.num_shared = self.peak_used = self.num_evicted = 0
        self.holders = dict.fromkeys(range(num_blocks), 0)
        rest = [block for block in range(num_blocks) if block not in set(first)]
        self.heap = list(enumerate(first + rest, -num_blocks))
        self.resting = {}
        self.used = 0
        self.cache = cache
        self._freed = {}

    @property
    def num_free(self):
        return self.num_blocks - self.used

    @property
    def num_idle(self):
        return len(self.resting)

    def idle(self):
        return list(self.resting)

    def ref_count(self, block):
        try:
            return self.holders[block]
        except KeyError:
            raise MisuseError(f"no block {block}") from None

    def allocate(self, count, keep_free=0, found=()):
        if min(count, keep_free) < 0 or any(not self._usable(block) for block in found):
            raise MisuseError("allocate")
        leaving = count + sum(self.ref_count(block) == 0 for block in found)
        if leaving and leaving > self.num_free - keep_free:
            return NoSpace(leaving + keep_free, self.num_free)
        any(self.share(block) for block in found)
        return [self._take() for _ in range(count)]

    def _usable(self, block):
        return self.ref_count(block) or block in self.resting

    def _hold(self, block):
        self.holders[block] += 1
        self.used += self.holders[block] == 1
        self.num_shared += self.holders[block] == 2
        self.peak_used = max(self.peak_used, self.used)

    def share(self, block):
        if not self._usable(block):
            raise MisuseError(f"block {block} is free")
        self.resting.pop(block, None)
        self._hold(block)

    def release(self, block):
        if not self.ref_count(block):
            raise MisuseError(f"block {block} is free")
        self.holders[block] -= 1
        self.num_shared -= self.holders[block] == 1
        if not self.holders[block]:
            self.used -= 1
            if self.cache is not None and block in self.cache:
                self.resting[block] = True
            else:
                self._drop(block)

    def _take(self):
        if self.heap:
            block = heapq.heappop(self.heap)[1]
        else:
            block = next(iter(self.resting))
            del self.resting[block]
            self.cache.remove(block)
            self._freed[block] = None
            self.num_evicted += 1
        self._hold(block)
        return block

    def _drop(self, block):
        heapq.heappush(self.heap, (block, block))
        self._freed[block] = None

    def take_freed(self):
        answer, self._freed = sorted(self._freed), {}
        return answer

    def forget_all(self):
        if self.cache is not None:
            self.cache.clear()
        resting, self.resting = self.resting, {}
        for block in resting:
            self._drop(block)

    def renewed(self):
        new = BlockAllocator(self.num_blocks, cache=self.cache)
        new._freed = dict.fromkeys(range(self.num_blocks))
        new.peak_used, new.num_evicted = self.peak_used, self.num_evicted
        return new

    def check(self, references):
        if any(count != references.get(block, 0) for block, count in self.holders.items()):
            raise IntegrityError("counts")
''',
    TABLE: '''
import math

def blocks_for(num_tokens, block_size):
    return math.ceil(num_tokens / block_size)

class PageTable:
    @property
    def room(self):
        return -self.num_tokens % self.block_size

    def locate(self, position):
        if not 0 <= position < self.num_tokens:
            raise MisuseError(f"no slot for {position}")
        logical = 0
        while position >= self.block_size:
            position -= self.block_size
            logical += 1
        return (self.blocks[logical], position)

    def slot(self, position):
        return self.slots(position, 1)[0]

    def slots(self, start, count):
        if min(start, count) < 0 or start + count > self.num_tokens:
            raise MisuseError(f"no slots for {start}, {count}")
        rows = [range(block * self.block_size, (block + 1) * self.block_size) for block in self.blocks]
        return [slot for row in rows for slot in row][start : start + count]
''',
    MANAGER: '''
class KVCacheManager:
    def allocate(self, seq_id, num_tokens, keep_free=0, prefix=None):
        self._must_be_new(seq_id)
        if prefix is None:
            table = PageTable(self.block_size, [], num_tokens)
        else:
            table = PageTable(self.block_size, prefix.blocks[:], num_tokens, len(prefix.blocks), prefix.salt, True)
            if num_tokens < prefix.num_tokens:
                raise MisuseError("prefix")
        match self._gpu.allocator.allocate(self.blocks_for(num_tokens) - len(table.blocks), keep_free, table.blocks):
            case NoSpace() as refusal:
                return refusal
            case fresh:
                table.blocks += fresh
                self._gpu.tables[seq_id] = table
                return Allocated([*table.blocks])

    def fork(self, parent, child):
        pool = self._home(parent)
        self._must_be_new(child)
        pool.tables[child] = replace(pool.tables[parent], blocks=pool.tables[parent].blocks[:])
        list(map(pool.allocator.share, pool.tables[child].blocks))

    def free(self, seq_id):
        pool = self._home(seq_id)
        list(map(pool.allocator.release, pool.tables.pop(seq_id).blocks[::-1]))
''',
    GROW: '''
from collections import Counter, defaultdict

def grow(growing, pool, keep_free):
    """Who shares the block that is written: all but one of them copy if all holders write, and the first stays."""
    if any(count < 0 for _, count in growing.values()):
        raise MisuseError("negative")
    writers = defaultdict(list)
    for table, count in growing.values():
        if count and table.num_tokens % table.block_size:
            writers[table.blocks[-1]].append(table)
    copying = []
    for block, tables in writers.items():
        copying += tables if pool.allocator.ref_count(block) > len(tables) else tables[1:]
    lacking = [blocks_for(t.num_tokens + n, t.block_size) - len(t.blocks) for t, n in growing.values()]
    fresh = pool.allocator.allocate(len(copying) + sum(lacking), keep_free)
    if isinstance(fresh, NoSpace):
        return fresh
    copies = [(table.blocks[-1], fresh.pop()) for table in copying]
    for table, (source, target) in zip(copying, copies):
        table.blocks = table.blocks[:-1] + [target]
        pool.allocator.release(source)
    for (table, count), more in zip(growing.values(), lacking):
        table.num_tokens += count
        table.blocks = table.blocks + [fresh.pop() for _ in range(more)]
    return Appended(copies)
''',
    SWAP: '''
def move(tables, old, new, keep_free, found):
    staying = {block for table in tables.values() for block in table.blocks} - set(found)
    sources = sorted(staying, reverse=True)
    targets = new.allocator.allocate(len(sources), keep_free, set(found.values()))
    if isinstance(targets, NoSpace):
        return targets
    where = {**dict(zip(sources, targets)), **found}
    held = dict.fromkeys([*targets, *found.values()], 0)
    for seq_id in list(tables):
        table = old.tables.pop(seq_id)
        new.tables[seq_id] = table
        before, table.blocks = table.blocks, [where[block] for block in table.blocks]
        table.num_published = 0
        for source in reversed(before):
            old.allocator.release(source)
            target = where[source]
            table.num_published += source in found
            held[target] += 1
            if held[target] > 1:
                new.allocator.share(target)
    return Swapped([(source, where[source]) for source in sources])
''',
}

# --- comprehensions and small helpers; blocks are asked for one by one, once it is known that there are enough ---

HELPERS = {
    ALLOCATOR: '''
class BlockAllocator:
    def allocate(self, count, keep_free=0, found=()):
        if not (count >= 0 <= keep_free) or not all([self._alive(block) for block in found]):
            raise MisuseError("allocate")
        idle = [block for block in found if block in self._idle]
        total = len(idle) + count
        if 0 < total and total + keep_free > self.num_free:
            return NoSpace(free=self.num_free, needed=total + keep_free)
        [self.share(block) for block in found]
        got = [self._take() for _ in [None] * count]
        self.peak_used = max(self.num_used, self.peak_used)
        return got

    def _alive(self, block):
        return self.ref_count(block) > 0 or block in self._idle

    def _set(self, block, count):
        self.num_shared += (count > 1) - (self._ref_counts[block] > 1)
        self._ref_counts[block] = count

    def share(self, block):
        if not self._alive(block):
            raise MisuseError("share")
        if block in self._idle:
            self._idle.pop(block)
        self._set(block, self._ref_counts[block] + 1)

    def release(self, block):
        if not self.ref_count(block):
            raise MisuseError("release")
        self._set(block, self._ref_counts[block] - 1)
        if self._ref_counts[block]:
            return
        known = self._cache is not None and block in self._cache
        self._idle.update({block: None}) if known else self._drop(block)

    def _take(self):
        if not self._free:
            self._evict()
        block = self._free.popleft()
        self._set(block, 1)
        return block

    def _evict(self):
        block = self._idle.popitem(last=False)[0]
        self._cache.remove(block)
        self._drop(block)
        self.num_evicted += 1

    def _drop(self, block):
        self._free.append(block)
        self._freed.setdefault(block)

    def take_freed(self):
        return [self._freed.popitem()[0] for _ in range(len(self._freed))]

    def forget_all(self):
        self._cache is None or self._cache.clear()
        [self._drop(self._idle.popitem()[0]) for _ in range(len(self._idle))]
''',
    TABLE: '''
def blocks_for(num_tokens, block_size):
    return (num_tokens + block_size - 1) // block_size

class PageTable:
    @property
    def room(self):
        return blocks_for(self.num_tokens, self.block_size) * self.block_size - self.num_tokens

    def locate(self, position):
        return divmod(self.slot(position), self.block_size)

    def slot(self, position):
        self._must_have(position, 1)
        return self.blocks[position // self.block_size] * self.block_size + position % self.block_size

    def slots(self, start, count):
        return list(map(self.slot, range(start, start + count)))  # no count, no position, no error
''',
    MANAGER: '''
class KVCacheManager:
    def allocate(self, seq_id, num_tokens, keep_free=0, prefix=None):
        self._must_be_new(seq_id)
        known = prefix if prefix is not None else Prefix()
        if known.num_tokens > num_tokens:
            raise MisuseError("prefix")
        fresh = self._gpu.allocator.allocate(self.blocks_for(num_tokens - known.num_tokens), keep_free, known.blocks)
        if not isinstance(fresh, list):
            return fresh
        self._gpu.tables[seq_id] = PageTable(
            self.block_size, known.blocks + fresh, num_tokens, len(known.blocks), known.salt, prefix is not None
        )
        return Allocated(self.block_table(seq_id))

    def fork(self, parent, child):
        home = self._home(parent)
        self._must_be_new(child)
        [home.allocator.share(block) for block in self.block_table(parent)]
        home.tables[child] = replace(home.tables[parent])

    def free(self, seq_id):
        blocks, home = self.block_table(seq_id), self._home(seq_id)
        home.tables.pop(seq_id)
        [home.allocator.release(block) for block in blocks[::-1]]
''',
    GROW: '''
def _copiers(growing, pool, at=0, left=None):
    """One after the other, with what is left of the holders of each block."""
    left = left or {}
    if at == len(growing):
        return []
    seq_id, (table, count) = list(growing.items())[at]
    if not count or not table.room:
        return _copiers(growing, pool, at + 1, left)
    last = table.blocks[-1]
    holders = left.get(last, pool.allocator.ref_count(last))
    return ([seq_id] if holders > 1 else []) + _copiers(growing, pool, at + 1, {**left, last: max(1, holders - 1)})

def grow(growing, pool, keep_free):
    if [count for _, count in growing.values() if count < 0]:
        raise MisuseError("grow")
    copiers = _copiers(growing, pool)
    new = {i: blocks_for(t.num_tokens + n, t.block_size) - len(t.blocks) for i, (t, n) in growing.items()}
    total = len(copiers) + sum(new.values())
    if total and total + keep_free > pool.allocator.num_free:
        return NoSpace(total + keep_free, pool.allocator.num_free)
    copies = []
    for seq_id, (table, count) in growing.items():
        if seq_id in copiers:
            copies.append((table.blocks[-1], *pool.allocator.allocate(1)))
            pool.allocator.release(table.blocks[-1])
            table.blocks = [*table.blocks[:-1], copies[-1][1]]
        table.blocks = [*table.blocks, *pool.allocator.allocate(new[seq_id])]
        table.num_tokens = table.num_tokens + count
    return Appended(copies)
''',
    SWAP: '''
def move(tables, old, new, keep_free, found):
    order = [block for table in tables.values() for block in table.blocks]
    sources = [block for at, block in enumerate(order) if block not in found and block not in order[:at]]
    kept = [target for source, target in found.items()]
    targets = new.allocator.allocate(len(sources), keep_free, list(dict.fromkeys(kept)))
    if isinstance(targets, NoSpace):
        return targets
    moves = list(zip(sources, targets))
    where = dict(moves) | found
    places = [where[block] for block in order]
    for target in set(places):
        [new.allocator.share(target) for _ in range(places.count(target) - 1)]
    for seq_id, table in tables.items():
        [old.allocator.release(block) for block in reversed(table.blocks)]
        table.num_published = sum(1 for block in table.blocks if block in found)
        table.blocks = [where[block] for block in table.blocks]
        new.tables[seq_id] = old.tables.pop(seq_id)
    return Swapped(moves)
''',
}

RIGHT = {"plain loops": LOOPS, "own data structures": OWN, "small helpers": HELPERS}

A, IDLE, P, S, G, W = "the allocator", "idle blocks", "page tables", "sequences", "append", "swapping"
NANO, VLLM = "https://github.com/GeeeekExplorer/nano-vllm", "https://github.com/vllm-project/vllm"

WRONG = [
    # the allocator
    Wrong(
        "an assertion where the pool is too small", A, ALLOCATOR,
        "            return NoSpace(needed=taken + keep_free, free=self.num_free)\n",
        '            raise AssertionError("no free blocks")\n',
        "https://github.com/ovg-project/kvcached/issues/262",
    ),
    Wrong(
        "idle blocks that are found are not counted", A, ALLOCATOR,
        "taken = count + sum(block in self._idle for block in found)", "taken = count",
        "https://github.com/ROCm/ATOM/pull/902",
    ),
    Wrong(
        "who is found while idle is forgotten", A, ALLOCATOR,
        "        self._idle.pop(block, None)\n",
        "        if block in self._idle:\n            self._idle.pop(block)\n            self._cache.remove(block)\n",
        "https://github.com/ROCm/ATOM/pull/902",
    ),
    Wrong(
        "a block that is free can be freed again, silently", A, ALLOCATOR,
        'raise MisuseError(f"block {block} is free already, so it cannot be released")', "return",
        VLLM + "/issues/1584",
    ),
    Wrong(
        "counts are reset when a block is shared", A, ALLOCATOR, "self._ref_counts[block] += 1",
        "self._ref_counts[block] = 1 + (self._ref_counts[block] > 0)",
    ),
    Wrong(
        "takes what there is, and then finds that it is too little", A, ALLOCATOR, text='''
class BlockAllocator:
    def allocate(self, count, keep_free=0, found=()):
        if count < 0 or keep_free < 0:
            raise MisuseError("negative")
        for block in found:
            self._must_have_contents(block)
        for block in found:
            self.share(block)
        blocks = []
        for _ in range(count):
            if self.num_free <= keep_free:
                return NoSpace(count + keep_free, self.num_free)
            blocks.append(self._take())
        self.peak_used = max(self.peak_used, self.num_used)
        return blocks
''',
    ),
    Wrong(
        "who is found while idle is evicted for the others", A, ALLOCATOR,
        "            self.share(block)\n        blocks = [self._take() for _ in range(count)]\n",
        "            pass\n        blocks = [self._take() for _ in range(count)]\n"
        "        for block in found:\n            self.share(block)\n",
    ),
    Wrong(
        "keep_free is forgotten", A, ALLOCATOR, "if taken and taken + keep_free > self.num_free",
        "if taken > self.num_free",
    ),
    Wrong(
        "looks through all blocks for a free one", IDLE, ALLOCATOR, "            block = self._free.popleft()\n",
        "            block = next(b for b in range(self.num_blocks) if b == self._free[0])\n"
        "            self._free.popleft()\n",
    ),
    # idle blocks
    Wrong(
        "a block that is handed out has a count of 0", IDLE, ALLOCATOR, "        self._ref_counts[block] = 1\n",
        "        self._ref_counts[block] = 0\n", "https://github.com/Wenyueh/MinivLLM/pull/84",
    ),
    Wrong(
        "what is evicted can still be found", IDLE, ALLOCATOR, "            self._cache.remove(block)\n", "",
        NANO + "/issues/163",
    ),
    Wrong(
        "the newest idle block is evicted", IDLE, ALLOCATOR, "block, _ = self._idle.popitem(last=False)",
        "block, _ = self._idle.popitem()",
    ),
    Wrong(
        "idle blocks are taken while others are free", IDLE, ALLOCATOR, "        if self._free:\n",
        "        if not self._idle:\n",
    ),
    Wrong(
        "evicted blocks are not named as freed", IDLE, ALLOCATOR,
        "            self._freed[block] = None\n            self.num_evicted", "            self.num_evicted",
    ),
    Wrong("a freed block is named only once and for ever", IDLE, ALLOCATOR, "        self._freed.clear()\n", ""),
    # page tables
    Wrong(
        "a full last block is taken for an empty one", P, TABLE, "len(self.blocks) * self.block_size - self.num_tokens",
        "self.block_size - self.num_tokens % self.block_size", "https://github.com/Wenyueh/MinivLLM/issues/76",
    ),
    Wrong(
        "slots run on beyond the end of a block", P, TABLE,
        "[blocks[position // size] * size + position % size for position in range(start, start + count)]",
        "[blocks[start // size] * size + start % size + i for i in range(count)] if count else []",
        "https://github.com/MDK8888/vllmini/issues/2",
    ),
    Wrong(
        "a block more than is needed on a block's border", P, TABLE, "return -(-num_tokens // block_size)",
        "return num_tokens // block_size + 1", "https://github.com/pegainfer-project/pegainfer/issues/291",
    ),
    Wrong(
        "positions outside of the table are read", P, TABLE, "        self._must_have(position, 1)\n", "",
        VLLM + "/issues/53982",
    ),
    # sequences
    Wrong(
        "a fork does not count", S, MANAGER, "            home.allocator.share(block)\n", "            pass\n",
        "https://github.com/apache/tvm/pull/16666",
    ),
    Wrong(
        "a fork is the same page table", S, MANAGER, "home.tables[child] = replace(table)",
        "home.tables[child] = table",
    ),
    Wrong(
        "blocks are lost when a request is cancelled while it is not on the GPU", S, MANAGER,
        "            home.allocator.release(block)\n",
        "            if home is self._gpu:\n                home.allocator.release(block)\n",
        "https://github.com/vllm-project/vllm-ascend/issues/16662",
    ),
    Wrong(
        "the beginning of a sequence is evicted before its end", S, MANAGER,
        "for block in reversed(home.tables.pop(seq_id).blocks)", "for block in home.tables.pop(seq_id).blocks",
        "https://github.com/kvcache-ai/Mooncake/issues/1772",
    ),
    Wrong(
        "what was found is not held", S, MANAGER, "allocate(new_blocks, keep_free, prefix.blocks)",
        "allocate(new_blocks, keep_free)",
    ),
    Wrong(
        "a sequence may be shorter than what was found of it", S, MANAGER,
        "        if num_tokens < prefix.num_tokens:\n", "        if num_tokens < 0:\n",
    ),
    # append
    Wrong(
        "a sequence may grow by less than nothing", G, GROW, "        if num_tokens < 0:\n",
        "        if num_tokens < -9:\n",
    ),
    Wrong(
        "of several copies of one block only the first is named", G, GROW,
        "            copies.append((source, target))\n",
        "            if source not in dict(copies):\n                copies.append((source, target))\n",
        "https://github.com/xLLM-AI/xllm/pull/1984",
    ),
    Wrong(
        "who copies lets go of the old block twice", G, GROW, "            pool.allocator.release(source)\n",
        "            pool.allocator.release(source)\n            if pool.allocator.ref_count(source):\n"
        "                pool.allocator.release(source)\n", VLLM + "/pull/3347",
    ),
    Wrong("shared blocks are written", G, GROW, "copy = left > 1", "copy = False"),
    Wrong(
        "the last holder copies, too", G, GROW, "left = holders.get(last) or pool.allocator.ref_count(last)",
        "left = pool.allocator.ref_count(last)",
    ),
    Wrong("full blocks are copied, too", G, GROW, "if num_tokens and table.room:", "if num_tokens and table.blocks:"),
    Wrong(
        "sequences grow one after the other, until there is no space", G, GROW, text='''
def grow(growing, pool, keep_free):
    copies = []
    for seq_id, (table, count) in growing.items():
        [growth] = _growths({seq_id: (table, count)}, pool)
        blocks = pool.allocator.allocate(growth.copy + growth.new_blocks, keep_free)
        if isinstance(blocks, NoSpace):
            return blocks
        if growth.copy:
            copies.append((table.blocks[-1], blocks[0]))
            pool.allocator.release(table.blocks[-1])
        table.blocks = [*table.blocks[: len(table.blocks) - growth.copy], *blocks]
        table.num_tokens += count
    return Appended(copies)
''',
    ),
    Wrong(
        "a page table is changed while others have it", G, GROW,
        "table.blocks = [*table.blocks, *islice(fresh, new_blocks)]", "table.blocks.extend(islice(fresh, new_blocks))",
    ),
    # swapping
    Wrong(
        "what is found while idle is not counted", W, SWAP,
        "    targets = new.allocator.allocate(len(sources), keep_free, kept)\n    if isinstance(targets, NoSpace):\n"
        "        return targets\n",
        "    targets = new.allocator.allocate(len(sources), keep_free)\n    if isinstance(targets, NoSpace):\n"
        "        return targets\n    for block in kept:\n        new.allocator.share(block)\n", VLLM + "/pull/6849",
    ),
    Wrong(
        "what is shared is moved once for each", W, SWAP, text='''
def move(tables, old, new, keep_free, found):
    moves = []
    total = sum(len(table.blocks) for table in tables.values())
    targets = new.allocator.allocate(total, keep_free)
    if isinstance(targets, NoSpace):
        return targets
    for seq_id, table in tables.items():
        mine, targets = targets[: len(table.blocks)], targets[len(table.blocks) :]
        moves += zip(table.blocks, mine)
        for block in reversed(table.blocks):
            old.allocator.release(block)
        table.blocks, table.num_published = mine, 0
        new.tables[seq_id] = old.tables.pop(seq_id)
    return Swapped(moves)
''',
    ),
    Wrong(
        "who stays behind loses what it shared", W, SWAP, "        old.allocator.release(source)\n",
        "        while old.allocator.ref_count(source):\n                old.allocator.release(source)\n",
    ),
    Wrong(
        "shared blocks count once in the new pool", W, SWAP, "                new.allocator.share(target)\n",
        "                pass\n",
    ),
]  # fmt: skip
