"""A model of the memory room that shares no code and no idea with it, and a small runner that moves contents.

The model knows no block numbers. It keeps a `Cell` where the manager keeps a block: a Python object, shared
by standing in several lists, copied by making a new one. After every operation the cells must map one to
one to the blocks of all page tables, and every sequence must read its own tokens back through its page table.
test_memory_machine.py drives it.
"""

from collections import Counter

import pytest

from minipaged.memory import Allocated, Appended, KVCacheManager, MisuseError, NoSpace, PageTable, Swapped

POISON = "poison"
UNKNOWN = 10**6  # a sequence that never exists


def snapshot(thing):
    """Everything in `thing`, down to private attributes, as plain values that can be compared."""
    if isinstance(thing, dict):
        return [(key, snapshot(value)) for key, value in thing.items()]
    if isinstance(thing, PageTable):
        return (thing.block_size, list(thing.blocks), thing.num_tokens)
    if hasattr(thing, "__dict__"):
        return snapshot(vars(thing))
    return list(thing) if hasattr(thing, "__iter__") else thing


class Cell:
    """One block of the model; its identity is all it has."""


class Stream:
    """One sequence of the model."""

    def __init__(self, tokens, cells, swapped=False):
        self.tokens, self.cells, self.swapped = tokens, cells, swapped


class CheckedMemory:
    """A KVCacheManager whose every operation is compared with the model. Operations take plain values."""

    def __init__(self, num_blocks, block_size, num_cpu_blocks, free_order=None):
        self.size, self.num_blocks, self.num_cpu_blocks = block_size, num_blocks, num_cpu_blocks
        self.memory = KVCacheManager(num_blocks, block_size, num_cpu_blocks, free_order)
        self.gpu = [POISON] * (num_blocks * block_size)  # what is in each slot
        self.cpu = [POISON] * (num_cpu_blocks * block_size)
        self.streams: dict[int, Stream] = {}
        self.next_id = self.next_token = 0
        self.copies = self.moved_out = self.moved_in = self.peak = 0
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

    def gpu_blocks_in_use(self):
        memory = self.memory
        return {b for s in memory.sequences() if not memory.is_swapped(s) for b in memory.block_table(s)}

    def ask(self, needed, keep_free, operation, swapped=False):
        """Carry out `operation`; returns its answer, or None where the model says that there is no space."""
        before, in_use = snapshot(self.memory), self.gpu_blocks_in_use()
        free = self.free_blocks(swapped)
        answer = operation()
        if needed and needed + keep_free > free:
            assert answer == NoSpace(needed + keep_free, free)
            assert snapshot(self.memory) == before
            return None
        assert not isinstance(answer, NoSpace)
        self.freed |= in_use - self.gpu_blocks_in_use()
        return answer

    # --- the runner: contents ---

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

    def write(self, seq_id, start, tokens):
        for slot, token in zip(self.memory.slots(seq_id, start, len(tokens)), tokens, strict=True):
            self.gpu[slot] = token

    # --- operations ---

    def allocate(self, count, keep_free=0):
        needed = -(-count // self.size)
        seq_id, self.next_id = self.next_id, self.next_id + 1
        answer = self.ask(needed, keep_free, lambda: self.memory.allocate(seq_id, count, keep_free))
        if answer is not None:
            assert answer == Allocated(self.memory.block_table(seq_id))
            self.streams[seq_id] = Stream(self.new_tokens(count), [Cell() for _ in range(needed)])
            self.poison_freed()
            self.write(seq_id, 0, self.streams[seq_id].tokens)

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
        assert self.memory.blocks_needed(counts) == needed
        answer = self.ask(needed, keep_free, lambda: self.memory.append(counts, keep_free))
        if answer is None:
            return
        assert isinstance(answer, Appended) and len(answer.copies) == copies
        self.copies += copies
        self.poison_freed()
        self.carry_out(answer.copies, self.gpu, self.gpu)
        for seq_id, count in counts.items():
            stream, new = self.streams[seq_id], self.new_tokens(count)
            self.write(seq_id, len(stream.tokens), new)
            stream.tokens, stream.cells = stream.tokens + new, grown[seq_id]

    def fork(self, parent):
        child, self.next_id = self.next_id, self.next_id + 1
        self.memory.fork(parent, child)
        stream = self.streams[parent]
        self.streams[child] = Stream(list(stream.tokens), list(stream.cells), stream.swapped)

    def free(self, seq_id):
        self.ask(0, 0, lambda: self.memory.free(seq_id))
        del self.streams[seq_id]

    def swap_out(self, group):
        answer = self.swap(group, 0, lambda: self.memory.swap_out(group), to_cpu=True)
        if answer is not None:
            self.carry_out(answer.moves, self.gpu, self.cpu)  # before the poison: the blocks are freed by now
            self.moved_out += len(answer.moves)
            self.poison_freed()

    def swap_in(self, group, keep_free=0):
        answer = self.swap(group, keep_free, lambda: self.memory.swap_in(group, keep_free), to_cpu=False)
        if answer is not None:
            self.poison_freed()
            self.carry_out(answer.moves, self.cpu, self.gpu)
            self.moved_in += len(answer.moves)

    def swap(self, group, keep_free, operation, to_cpu):
        """The model's side of both directions: each cell of the group becomes another one, once."""
        new = {cell: Cell() for seq_id in group for cell in self.streams[seq_id].cells}
        answer = self.ask(len(new), keep_free, operation, swapped=to_cpu)
        if answer is not None:
            assert isinstance(answer, Swapped) and len(answer.moves) == len(new)
            for stream in (self.streams[seq_id] for seq_id in group):
                stream.cells, stream.swapped = [new[cell] for cell in stream.cells], to_cpu
        return answer

    def misuse(self, seq_id, which):
        """One of the calls that no correct caller makes."""
        memory, stream = self.memory, self.streams[seq_id]
        group = [*self.ids(stream.swapped), UNKNOWN]
        misuses = [
            lambda: memory.allocate(seq_id, 1),
            lambda: memory.fork(UNKNOWN, UNKNOWN + 1),
            lambda: memory.fork(seq_id, seq_id),
            lambda: memory.free(UNKNOWN),
            lambda: memory.append(dict.fromkeys(group, 1)),
            lambda: memory.append({seq_id: -1}),
            lambda: (memory.swap_in if stream.swapped else memory.swap_out)(group),
            lambda: (memory.swap_out if stream.swapped else memory.swap_in)([seq_id]),
            lambda: memory.slots(seq_id, len(stream.tokens), 1),
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
            assert len(blocks) == len(stream.cells) == self.memory.blocks_for(len(stream.tokens))
            places = [(stream.swapped, block) for block in blocks]
            pairs |= set(zip(stream.cells, places, strict=True))
            pool = self.cpu if stream.swapped else self.gpu
            row = [pool[block * self.size + offset] for block in blocks for offset in range(self.size)]
            assert row[: len(stream.tokens)] == stream.tokens  # it reads back what it wrote
        assert len(pairs) == len({cell for cell, _ in pairs}) == len({place for _, place in pairs})
        self.verify_usage()

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
        assert (usage.copies, usage.peak_used) == (self.copies, self.peak)
        assert (usage.swapped_out_blocks, usage.swapped_in_blocks) == (self.moved_out, self.moved_in)

    def finish(self):
        """Everything is free at the end."""
        for seq_id in list(self.streams):
            self.free(seq_id)
        self.verify()
        usage = self.memory.usage()
        assert usage.free == self.num_blocks and usage.cpu_used == usage.used == usage.shared == 0
