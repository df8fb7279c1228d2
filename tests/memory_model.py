"""A model of the memory room that shares no code and no idea with it, and a small runner that moves contents.

The model knows no block numbers. It keeps a `Cell` where the manager keeps a block: a Python object, shared
by standing in several lists, copied by making a new one. After every operation the cells must map one to
one to the blocks of all page tables, and every sequence must read its own tokens back through its page table.
What a prefix cache knows is, here, a dictionary from whole prefixes to cells, and a list of idle cells.
test_memory_machine.py drives it.
"""

from collections import Counter

import pytest

from minipaged.memory import (
    PREFIX_CACHES,
    Allocated,
    Appended,
    KVCacheManager,
    MisuseError,
    NoSpace,
    PageTable,
    Prefix,
    Swapped,
)

POISON = "poison"
UNKNOWN = 10**6  # a sequence that never exists


def snapshot(thing):
    """Everything in `thing`, down to private attributes, as plain values that can be compared."""
    if isinstance(thing, dict):
        return [(key, snapshot(value)) for key, value in thing.items()]
    if isinstance(thing, PageTable):
        return snapshot({name: getattr(thing, name) for name in PageTable.__slots__})
    if type(thing).__name__ == "_Node":  # of the radix tree; its parent would lead round in a circle
        return (list(thing.tokens), list(thing.blocks), snapshot(thing.children))
    if hasattr(thing, "__dict__"):
        return snapshot(vars(thing))
    return list(thing) if hasattr(thing, "__iter__") else thing


class Cell:
    """One block of the model; its identity is all it has."""


class Stream:
    """One sequence of the model."""

    def __init__(self, tokens, cells, salt=None, published=0):
        self.tokens, self.cells, self.salt, self.published = tokens, cells, salt, published
        self.swapped, self.publishes = False, True


class CheckedMemory:
    """A KVCacheManager whose every operation is compared with the model. Operations take plain values."""

    def __init__(self, num_blocks, block_size, num_cpu_blocks, free_order=None, cache="none"):
        self.size, self.num_blocks, self.num_cpu_blocks = block_size, num_blocks, num_cpu_blocks
        self.caches = cache != "none"
        index = PREFIX_CACHES[cache](block_size) if self.caches else None
        self.memory = KVCacheManager(num_blocks, block_size, num_cpu_blocks, free_order, index)
        self.gpu = [POISON] * (num_blocks * block_size)  # of each slot: the salt, and all tokens up to its own
        self.cpu = [POISON] * (num_cpu_blocks * block_size)
        self.streams: dict[int, Stream] = {}
        self.known: dict[tuple, Cell] = {}  # (salt, tokens from the beginning to the end of the cell)
        self.idle: list[Cell] = []  # known, and in no stream; in the order in which they fell out of use
        self.next_id = self.next_token = 0
        self.seen: Counter[str] = Counter()
        self.peak = 0
        self.freed: set[int] = set()

    def ids(self, swapped):
        return [seq_id for seq_id, stream in self.streams.items() if stream.swapped == swapped]

    # --- the model ---

    def cells(self, swapped=False):
        """Every cell of one pool, and how many sequences hold it."""
        return Counter(cell for s in self.streams.values() if s.swapped == swapped for cell in s.cells)

    def free_blocks(self, swapped):
        return (self.num_cpu_blocks if swapped else self.num_blocks) - len(self.cells(swapped))

    def new_tokens(self, count):
        self.next_token += count
        return list(range(self.next_token - count, self.next_token))

    def look_up(self, tokens, salt):
        """The known cells of the beginning of `tokens`."""
        cells = []
        for end in range(self.size, len(tokens) + 1, self.size):
            cell = self.known.get((salt, tuple(tokens[:end])))
            if cell is None:
                break
            cells.append(cell)
        return cells

    def take(self, found, count):
        """New cells, while the `found` ones come into use. If nothing else is left, idle ones are evicted for them."""
        unused = self.free_blocks(swapped=False) - len(self.idle)
        kept = [cell for cell in self.idle if cell not in found]
        victims, self.idle = kept[: max(0, count - unused)], kept[max(0, count - unused) :]
        self.known = {key: cell for key, cell in self.known.items() if cell not in victims}
        self.seen["evicted"] += len(victims)
        return [Cell() for _ in range(count)]

    def let_go(self, stream, cells=()):
        """A stream leaves the GPU, or ends: its cells fall out of use from the last to the first."""
        old, stream.cells = stream.cells, list(cells)
        for cell in reversed(old):
            if cell not in self.cells() and cell in self.known.values():
                self.idle.append(cell)

    def ask(self, needed, keep_free, operation, swapped=False, found=()):
        """Carry out `operation`; returns its answer, or None where the model says that there is no space.

        needed: new blocks. found: cells to be shared; those of them that are idle count like new ones.
        """
        before, used, idle = snapshot(self.memory), *self.blocks_with_contents()
        needed += sum(cell in self.idle for cell in found)
        free = self.free_blocks(swapped)
        answer = operation()
        if needed and needed + keep_free > free:
            assert answer == NoSpace(needed + keep_free, free)
            assert snapshot(self.memory) == before
            return None
        assert not isinstance(answer, NoSpace)
        used_now, idle_now = self.blocks_with_contents()
        unused = free - len(idle)  # were free and are the first to be taken
        evicted = max(0, needed - sum(cell in self.idle for cell in found) - unused) if not swapped else 0
        kept = {block for block in idle if block in idle_now or self.memory.cache and block in self.memory.cache}
        assert len(idle) - len(kept) == evicted
        self.freed |= (used - used_now - idle_now) | (idle - kept)
        return answer

    # --- the runner: contents ---

    def blocks_with_contents(self):
        """Of the GPU: those in page tables, and the idle ones."""
        memory = self.memory
        used = {b for s in memory.sequences() if not memory.is_swapped(s) for b in memory.block_table(s)}
        return used, set(memory._gpu.allocator.idle())

    def poison_freed(self):
        freed = self.memory.take_freed()
        assert len(freed) == len(set(freed)) and set(freed) == self.freed
        self.freed = set()
        for block in freed:
            self.gpu[block * self.size : (block + 1) * self.size] = [POISON] * self.size

    def carry_out(self, pairs, source, target):
        """Copy blocks, all at once as a kernel would."""
        if source is target:
            assert not {a for a, _ in pairs} & {b for _, b in pairs}
        assert len({b for _, b in pairs}) == len(pairs)
        contents = [source[a * self.size : (a + 1) * self.size] for a, _ in pairs]
        for (_, b), content in zip(pairs, contents, strict=True):
            target[b * self.size : (b + 1) * self.size] = content

    def write(self, seq_id, start):
        stream = self.streams[seq_id]
        slots = self.memory.slots(seq_id, start, len(stream.tokens) - start)
        for end, slot in enumerate(slots, start + 1):
            self.gpu[slot] = (stream.salt, tuple(stream.tokens[:end]))

    # --- operations ---

    def allocate(self, count, keep_free=0, tokens=(), salt=None):
        """Start a stream with `tokens`, and `count` new ones after them."""
        tokens = [*tokens, *self.new_tokens(count)]
        found = self.look_up(tokens, salt)
        needed = -(-len(tokens) // self.size) - len(found)
        seq_id, self.next_id = self.next_id, self.next_id + 1
        prefix = self.memory.find(tokens, salt)
        assert len(prefix.blocks) == len(found) and prefix.num_tokens == len(found) * self.size

        def operation():
            return self.memory.allocate(seq_id, len(tokens), keep_free, prefix)

        answer = self.ask(needed, keep_free, operation, found=found)
        if answer is not None:
            assert answer == Allocated(self.memory.block_table(seq_id))
            assert answer.blocks[: len(found)] == prefix.blocks
            self.seen["found"] += len(found)
            new = self.take(found, needed)
            self.streams[seq_id] = Stream(tokens, found + new, salt, published=len(found))
            self.poison_freed()
            self.write(seq_id, prefix.num_tokens)

    def append(self, counts, keep_free=0):
        held, needed, grown, copies = self.cells(), 0, {}, 0
        for seq_id, count in counts.items():  # one after another, each as if alone
            stream = self.streams[seq_id]
            cells = list(stream.cells)
            if count and len(stream.tokens) % self.size and held[cells[-1]] > 1:
                held[cells[-1]] -= 1
                cells[-1] = Cell()
                copies += 1
            cells += [Cell() for _ in range(-(-(len(stream.tokens) + count) // self.size) - len(cells))]
            needed += len(set(cells) - set(stream.cells))
            grown[seq_id] = cells
        answer = self.ask(needed, keep_free, lambda: self.memory.append(counts, keep_free))
        if answer is None:
            return
        assert isinstance(answer, Appended) and len(answer.copies) == copies
        self.seen["copies"] += copies
        self.take((), needed)
        self.poison_freed()
        self.carry_out(answer.copies, self.gpu, self.gpu)
        for seq_id, count in counts.items():
            stream = self.streams[seq_id]
            start = len(stream.tokens)
            stream.tokens, stream.cells = stream.tokens + self.new_tokens(count), grown[seq_id]
            self.write(seq_id, start)

    def take_back(self, seq_id, count):
        """Or a refusal, where others could see what is taken back."""
        stream, left = self.streams[seq_id], len(self.streams[seq_id].tokens) - count
        touched = stream.cells[left // self.size :] if count else []
        held, before = self.cells(), snapshot(self.memory)
        if left < 0 or left < stream.published * self.size or any(held[cell] > 1 for cell in touched):
            with pytest.raises(MisuseError):
                self.memory.take_back(seq_id, count)
            assert snapshot(self.memory) == before
            return
        self.ask(0, 0, lambda: self.memory.take_back(seq_id, count))
        kept = self.memory.blocks_for(left)
        assert not any(cell in self.known.values() for cell in stream.cells[kept:])
        stream.tokens, stream.cells = stream.tokens[:left], stream.cells[:kept]
        self.seen["taken back"] += bool(count)

    def reset(self):
        self.memory.reset()
        self.freed = set(range(self.num_blocks))
        self.poison_freed()
        self.streams, self.known, self.idle = {}, {}, []

    def publish(self, seq_id, num_computed):
        stream = self.streams[seq_id]

        def tokens(start, count):
            return stream.tokens[start : start + count]

        if self.caches and stream.publishes:
            for index in range(stream.published, num_computed // self.size):
                key = (stream.salt, tuple(stream.tokens[: (index + 1) * self.size]))
                known = self.known.setdefault(key, stream.cells[index])
                self.seen["computed twice"] += known is not stream.cells[index]
                self.idle = [cell for cell in self.idle if cell is not known]
                own, stream.published = stream.cells[index], index + 1
                for other in self.streams.values():  # also those that share it, by fork
                    other.cells = [known if cell is own else cell for cell in other.cells]
        used, _ = self.blocks_with_contents()
        self.memory.publish(seq_id, num_computed, tokens)
        self.freed |= used - self.blocks_with_contents()[0]

    def forget_all(self):
        _, idle = self.blocks_with_contents()
        self.memory.reset_prefix_cache()
        self.freed |= idle
        self.known, self.idle = {}, []
        for stream in self.streams.values():
            stream.publishes = False

    def fork(self, parent):
        child, self.next_id = self.next_id, self.next_id + 1
        self.memory.fork(parent, child)
        old = self.streams[parent]
        new = self.streams[child] = Stream(list(old.tokens), list(old.cells), old.salt, old.published)
        new.swapped, new.publishes = old.swapped, old.publishes

    def branch(self, parent, start, count, keep_free=0):
        """A stream that goes its own way from `start` on, with `count` tokens."""
        old, shared = self.streams[parent], start // self.size
        needed = -(-(start + count) // self.size) - shared
        child, self.next_id = self.next_id, self.next_id + 1
        answer = self.ask(needed, keep_free, lambda: self.memory.branch(parent, child, start, count, keep_free))
        if answer is None:
            return
        assert isinstance(answer, Appended) and len(answer.copies) == bool(start % self.size)
        self.seen.update(copies=len(answer.copies), branches=1)
        new = self.take((), needed)
        tokens = old.tokens[:start] + self.new_tokens(count)
        published = min(old.published, shared)
        self.streams[child] = Stream(tokens, old.cells[:shared] + new, old.salt, published)
        self.streams[child].publishes = old.publishes
        self.poison_freed()
        self.carry_out(answer.copies, self.gpu, self.gpu)
        self.write(child, start)

    def adopt(self, seq_id, branch):
        self.ask(0, 0, lambda: self.memory.adopt(seq_id, branch))
        self.let_go(self.streams[seq_id])
        self.streams[seq_id] = self.streams.pop(branch)
        self.seen["adopted"] += 1

    def free(self, seq_id):
        self.ask(0, 0, lambda: self.memory.free(seq_id))
        self.let_go(self.streams.pop(seq_id))

    def swap_out(self, group):
        answer = self.swap(group, 0, lambda: self.memory.swap_out(group), True, {})
        if answer is not None:
            self.carry_out(answer.moves, self.gpu, self.cpu)  # before the poison: the blocks are freed by now
            self.seen["moved out"] += len(answer.moves)
            self.poison_freed()

    def swap_in(self, group, keep_free=0):
        found = {}  # cells that are known on the other side, and where
        for stream in (self.streams[seq_id] for seq_id in group):
            if stream.publishes:
                found |= zip(stream.cells, self.look_up(stream.tokens, stream.salt), strict=False)
        tokens = {seq_id: self.streams[seq_id].tokens for seq_id in group}
        answer = self.swap(group, keep_free, lambda: self.memory.swap_in(group, keep_free, tokens), False, found)
        if answer is not None:
            self.poison_freed()
            self.carry_out(answer.moves, self.cpu, self.gpu)
            self.seen.update({"moved in": len(answer.moves), "not moved": len(found)})

    def swap(self, group, keep_free, operation, to_cpu, found):
        """The model's side of both directions: each cell of the group becomes another one, once."""
        old = dict.fromkeys(cell for seq_id in group for cell in self.streams[seq_id].cells)
        kept, moved = set(found.values()), [cell for cell in old if cell not in found]
        answer = self.ask(len(moved), keep_free, operation, to_cpu, kept)
        if answer is not None:
            assert isinstance(answer, Swapped) and len(answer.moves) == len(moved)
            new = [Cell() for _ in moved] if to_cpu else self.take(kept, len(moved))
            places = found | dict(zip(moved, new, strict=True))
            for stream in (self.streams[seq_id] for seq_id in group):
                cells = [places[cell] for cell in stream.cells]
                stream.published = sum(cell in kept for cell in cells)
                if to_cpu:
                    self.let_go(stream)
                stream.cells, stream.swapped = cells, to_cpu
        return answer

    def misuse(self, seq_id, which):
        """One of the calls that no correct caller makes."""
        memory, stream = self.memory, self.streams[seq_id]
        group = [*self.ids(stream.swapped), UNKNOWN]
        misuses = [
            lambda: memory.allocate(seq_id, 1),
            lambda: memory.allocate(UNKNOWN, 0, prefix=Prefix([0], self.size)),
            lambda: memory.fork(UNKNOWN, UNKNOWN + 1),
            lambda: memory.fork(seq_id, seq_id),
            lambda: memory.free(UNKNOWN),
            lambda: memory.append(dict.fromkeys(group, 1)),
            lambda: memory.append({seq_id: -1}),
            lambda: (memory.swap_in if stream.swapped else memory.swap_out)(group),
            lambda: (memory.swap_out if stream.swapped else memory.swap_in)([seq_id]),
            lambda: memory.slots(seq_id, len(stream.tokens), 1),
            lambda: memory.branch(seq_id, UNKNOWN, len(stream.tokens) + 1, 1),
            lambda: memory.branch(seq_id, UNKNOWN, 0, 0),
            lambda: memory.branch(seq_id, UNKNOWN, -1, 1),
            lambda: memory.branch(seq_id, seq_id, 0, 1),
            lambda: memory.branch(UNKNOWN, UNKNOWN + 1, 0, 1),
            lambda: memory.adopt(seq_id, seq_id),
            lambda: memory.adopt(seq_id, UNKNOWN),
            lambda: memory.adopt(UNKNOWN, seq_id),
            lambda: memory.publish(UNKNOWN, 0, lambda start, count: []),
            lambda: memory.publish(seq_id, len(stream.tokens) + 1, lambda start, count: []),
        ]
        before = snapshot(memory)
        with pytest.raises(MisuseError):
            misuses[which % len(misuses)]()
        assert snapshot(memory) == before

    # --- what must hold after each operation ---

    def verify(self):
        self.memory.check()
        assert set(self.memory.sequences()) == set(self.streams)
        pairs = set()
        for seq_id, stream in self.streams.items():
            assert self.memory.is_swapped(seq_id) == stream.swapped
            assert self.memory.num_tokens(seq_id) == len(stream.tokens)
            blocks = self.memory.block_table(seq_id)
            assert stream.swapped or self.memory.current_table(seq_id) == blocks
            assert self.memory._home(seq_id).tables[seq_id].num_published == stream.published
            assert len(blocks) == len(stream.cells) == self.memory.blocks_for(len(stream.tokens))
            places = [(stream.swapped, block) for block in blocks]
            pairs |= set(zip(stream.cells, places, strict=True))
            pool = self.cpu if stream.swapped else self.gpu
            row = [pool[block * self.size + offset] for block in blocks for offset in range(self.size)]
            ends = range(1, len(stream.tokens) + 1)
            assert row[: len(stream.tokens)] == [(stream.salt, tuple(stream.tokens[:end])) for end in ends]
        idle = self.memory._gpu.allocator.idle()
        pairs |= set(zip(self.idle, [(False, block) for block in idle], strict=True))  # in the same order
        self.verify_known(pairs)
        assert len(pairs) == len({cell for cell, _ in pairs}) == len({place for _, place in pairs})
        self.verify_usage()

    def verify_known(self, pairs):
        """The cache finds just what the model knows, and there stands what it should."""
        for salt, tokens in self.known:
            blocks = self.memory.find(tokens, salt).blocks
            assert set(zip(self.look_up(tokens, salt), [(False, b) for b in blocks], strict=True)) <= pairs
            assert self.gpu[blocks[-1] * self.size + self.size - 1] == (salt, tokens)
        assert not self.caches or len(self.memory.cache) == len(self.known)

    def verify_usage(self):
        usage, cells = self.memory.usage(), self.cells()
        here = [stream for stream in self.streams.values() if not stream.swapped]
        stored = {(s.cells[i // self.size], i % self.size) for s in here for i in range(len(s.tokens))}
        self.peak = max(self.peak, len(cells))
        assert usage.free + usage.used == usage.num_blocks == self.num_blocks
        assert usage.used == len(cells) and usage.free == self.memory.num_free
        assert usage.shared == sum(count > 1 for count in cells.values())
        assert usage.tokens_stored == len(stored)
        assert usage.tokens_logical == sum(len(stream.tokens) for stream in here)
        filled = len(stored) / (len(cells) * self.size) if cells else 1
        assert usage.waste_percent == pytest.approx(100 * (1 - filled))
        assert usage.blocks_saved_by_sharing == sum(cells.values()) - len(cells)
        assert usage.cpu_used == len(self.cells(swapped=True)) and usage.cpu_total == self.num_cpu_blocks
        assert (usage.copies, usage.peak_used) == (self.seen["copies"], self.peak)
        assert (usage.cached, usage.evicted) == (len(self.idle), self.seen["evicted"])
        moves = (self.seen["moved out"], self.seen["moved in"])
        assert (usage.swapped_out_blocks, usage.swapped_in_blocks) == moves

    def finish(self):
        """Everything is free at the end, and everything can be taken."""
        for seq_id in list(self.streams):
            self.free(seq_id)
        self.verify()
        usage = self.memory.usage()
        assert usage.free == self.num_blocks and usage.cpu_used == usage.used == usage.shared == 0
        self.allocate(self.num_blocks * self.size)
        self.verify()
        assert not self.known and self.memory.usage().cached == 0
