"""Chapter 5: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821

import math
from dataclasses import dataclass, field

import numpy as np


def residents(number, tables, lengths, B):
    block, offset = divmod(number, B)
    found = []
    for name, table in tables.items():
        for logical, physical in enumerate(table):
            position = logical * B + offset
            if physical == block and position < lengths[name]:
                found.append((name, position))
    return sorted(found)


def residents_by_all_positions(number, tables, lengths, B):
    return sorted([name, p] for name in tables for p in range(lengths[name]) if slot(tables[name], p, B) == number)


def residents_by_index(number, tables, lengths, B):
    """A sequence has a block once at most."""
    found = ()
    for name in sorted(tables):
        if number // B in tables[name]:
            position = tables[name].index(number // B) * B + number % B
            found += ((name, position),) if position < lengths[name] else ()
    return list(found)


def residents_by_array(number, tables, lengths, B):
    found = []
    for name in sorted(tables):
        (positions,) = np.nonzero(np.array(slots(tables[name], 0, lengths[name], B)) == number)
        found += [(name, position) for position in positions]
    return found


def residents_with_empty_slots(number, tables, lengths, B):
    return residents(number, tables, {name: len(table) * B for name, table in tables.items()}, B)


def residents_pads(number, tables, lengths, B):
    longest = max(map(len, tables.values()))
    for table in tables.values():
        table += [-1] * (longest - len(table))
    return residents(number, tables, lengths, B)


def residents_unsorted(number, tables, lengths, B):
    return [(name, p) for name in tables for p in range(lengths[name]) if slot(tables[name], p, B) == number]


def residents_pops(number, tables, lengths, B):
    found = []
    while tables:
        name, table = tables.popitem()
        found += residents(number, {name: table}, lengths, B)
    return sorted(found)


def flat_batch(tables, starts, counts, B):
    slot_mapping = [
        table[position // B] * B + position % B
        for table, start, count in zip(tables, starts, counts, strict=True)
        for position in range(start, start + count)
    ]
    longest = max(map(len, tables))
    padded = [table + [0] * (longest - len(table)) for table in tables]
    return torch.tensor(slot_mapping), torch.tensor(padded)


def flat_batch_into_zeros(tables, starts, counts, B):
    block_tables = torch.zeros(len(tables), max(len(table) for table in tables), dtype=torch.long)
    mapping = []
    for s, table in enumerate(tables):
        block_tables[s, : len(table)] = torch.tensor(table)
        mapping.extend(slots(table, starts[s], counts[s], B))
    return [torch.tensor(mapping, dtype=torch.int64), block_tables]


def flat_batch_by_tensors(tables, starts, counts, B):
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(table) for table in tables], batch_first=True)
    positions = torch.cat([torch.arange(a, a + n) for a, n in zip(starts, counts, strict=True)])
    of = torch.repeat_interleave(torch.arange(len(tables)), torch.tensor(counts))
    return rows[of, positions // B] * B + positions % B, rows


def pads_in_place(tables, starts, counts, B):
    longest = max(map(len, tables))
    for table in tables:
        table.extend([0] * (longest - len(table)))
    return flat_batch(tables, starts, counts, B)


def asks_the_runner(tables, starts, counts, B):
    from minipaged.execution.flat_batch import TableRows

    return flat_batch(tables, starts, counts, B)[0], TableRows("cpu").of(tables)


def only_what_is_used(tables, starts, counts, B):
    used = [t[: -(-(a + n) // B)] for t, a, n in zip(tables, starts, counts, strict=True)]
    return flat_batch(tables, starts, counts, B)[0], flat_batch(used, starts, counts, B)[1]


def blocks_saved(n, prompt, output, B):
    kept = prompt // B if output else -(-prompt // B)  # the last one is shared until somebody writes
    return (n - 1) * kept


def saved_by_difference(n, prompt, output, B):
    separate = n * math.ceil((prompt + output) / B)
    full = prompt // B
    if output == 0:
        return separate - math.ceil(prompt / B)
    each = math.ceil((prompt + output) / B) - full
    return separate - full - n * each


def saved_by_divmod(n, prompt, output, B):
    full, rest = divmod(prompt, B)
    partly = 1 if rest and not output else 0
    return np.int64((full + partly) * (n - 1))


def by_simulation(n, prompt, output, B):
    memory = SharingMemory(n * (prompt + output), B)
    memory.start(0, prompt)
    for sample in range(1, n):
        memory.fork(0, sample)
    for _ in range(output):
        for sample in range(n):
            memory.append(sample)
    return n * -(-(prompt + output) // B) - memory.pool.num_used


def by_own_simulation(n, prompt, output, B):
    return sum(blocks_saved(2, prompt, output, B) for _ in range(n - 1))


def block_by_block(n, prompt, output, B):
    saved = 0
    while (saved + 1) * B <= prompt:
        saved += 1
    return (n - 1) * (saved + (output == 0 and prompt % B > 0))


class TwoLevelTable:
    def __init__(self, width):
        self.width, self.leaves = width, []

    def append(self, block):
        if not self.leaves or len(self.leaves[-1]) == self.width:
            self.leaves.append([])
        self.leaves[-1].append(block)

    def block(self, logical):
        if logical < 0:
            raise IndexError(logical)
        leaf, place = divmod(logical, self.width)
        return self.leaves[leaf][place]

    def fork(self):
        child = type(self)(self.width)
        child.leaves = self.leaves.copy()
        if child.leaves and len(child.leaves[-1]) < self.width:
            child.leaves[-1] = child.leaves[-1].copy()
        return child


class FrozenLeaves:
    """Leaves can't be changed at all: growing makes a new one."""

    __slots__ = ("leaves", "width")

    def __init__(self, width, leaves=()):
        self.width, self.leaves = width, tuple(leaves)

    def append(self, block):
        if self.leaves and len(self.leaves[-1]) < self.width:
            self.leaves = (*self.leaves[:-1], (*self.leaves[-1], block))
        else:
            self.leaves = (*self.leaves, (block,))

    def block(self, logical):
        if not 0 <= logical // self.width < len(self.leaves):
            raise IndexError(f"there is no logical block {logical}")
        return self.leaves[logical // self.width][logical % self.width]

    def fork(self):
        return FrozenLeaves(self.width, self.leaves)


@dataclass
class CopyOnWrite:
    """The last leaf is shared as well, until one of both grows."""

    width: int
    leaves: list = field(default_factory=list)
    count: int = 0
    shared: bool = False

    def append(self, block):
        if self.count % self.width == 0:
            self.leaves.append([block])
        else:
            if self.shared:
                self.leaves[-1] = self.leaves[-1][:]
            self.leaves[-1].append(block)
        self.count, self.shared = self.count + 1, False

    def block(self, logical):
        if logical not in range(self.count):
            raise IndexError
        return self.leaves[logical // self.width][logical % self.width]

    def fork(self):
        self.shared = True
        return CopyOnWrite(self.width, self.leaves[:], self.count, True)


class InADict:
    """The directory is a dict; both sides get a new last leaf at a fork."""

    def __init__(self, width):
        self.directory, self.width, self.n = {}, width, 0

    @property
    def leaves(self):
        return list(self.directory.values())

    def append(self, block):
        self.directory.setdefault(self.n // self.width, []).append(block)
        self.n += 1

    def block(self, logical):
        if 0 <= logical < self.n:
            return self.directory[logical // self.width][logical % self.width]
        raise IndexError(logical)

    def fork(self):
        child = InADict(self.width)
        child.directory, child.n = dict(self.directory), self.n
        if self.n % self.width:
            child.directory[self.n // self.width] = list(self.directory[self.n // self.width])
        return child


class SharesTheLast(TwoLevelTable):
    def fork(self):
        child = type(self)(self.width)
        child.leaves = self.leaves.copy()
        return child


class CopiesAll(TwoLevelTable):
    def fork(self):
        return deepcopy(self)


class LooksBehind(TwoLevelTable):
    def block(self, logical):  # -1 is the last entry of a Python list
        leaf, place = divmod(logical, self.width)
        return self.leaves[leaf][place]


class OnlyTheChildCopies(CopyOnWrite):
    """When it grows; if the parent grows first, the child gets its entry."""

    def fork(self):
        return OnlyTheChildCopies(self.width, self.leaves[:], self.count, True)


class OneDirectory(TwoLevelTable):
    def fork(self):
        child = type(self)(self.width)
        child.leaves = self.leaves
        return child


class OfTheClass(TwoLevelTable):
    leaves = []

    def __init__(self, width):
        self.width = width
        if width != getattr(type(self), "last", width):
            self.leaves.clear()
        type(self).last = width


class WithAFlatList(TwoLevelTable):
    """Leaves for show: a fork copies all entries."""

    def __init__(self, width):
        super().__init__(width)
        self.flat = []

    def append(self, block):
        super().append(block)
        self.flat.append(block)

    def block(self, logical):
        if logical < 0:
            raise IndexError
        return self.flat[logical]

    def fork(self):
        child = super().fork()
        child.flat = self.flat.copy()
        return child


class Searches(TwoLevelTable):
    def block(self, logical):
        if logical < 0:
            raise IndexError
        return [block for leaf in self.leaves for block in leaf][logical]


class OneLeaf(TwoLevelTable):
    def append(self, block):
        self.leaves = self.leaves or [[]]
        self.leaves[0].append(block)

    def block(self, logical):
        if logical < 0:
            raise IndexError
        return self.leaves[0][logical]


class SaysNone(TwoLevelTable):
    def block(self, logical):
        try:
            return super().block(logical)
        except IndexError:
            return None


RIGHT = {
    "residents": [residents, residents_by_all_positions, residents_by_index, residents_by_array],
    "flat_batch": [flat_batch, flat_batch_into_zeros, flat_batch_by_tensors],
    "blocks_saved": [blocks_saved, saved_by_difference, saved_by_divmod],
    "TwoLevelTable": [TwoLevelTable, FrozenLeaves, CopyOnWrite, InADict],
}
WRONG = {
    "residents": [
        residents_with_empty_slots, residents_pads, residents_unsorted, residents_pops,
        lambda number, tables, lengths, B: residents(number, tables, lengths, B)[:1],  # one owner is enough?
        lambda number, tables, lengths, B: [(name, number) for name, _ in residents(number, tables, lengths, B)],
        lambda number, tables, lengths, B: residents(number, tables, lengths, 4),
        lambda number, tables, lengths, B: sorted(  # the logical block for the physical one
            (name, number) for name in tables if number < lengths[name]
        ),
        lambda number, tables, lengths, B: [name for name, _ in residents(number, tables, lengths, B)],
    ],
    "flat_batch": [
        pads_in_place, asks_the_runner, only_what_is_used,
        lambda tables, starts, counts, B: flat_batch(tables, [0] * len(tables), counts, B),  # from the beginning
        lambda tables, starts, counts, B: (  # the position for the slot
            torch.tensor([p for s, c in zip(starts, counts, strict=True) for p in range(s, s + c)]),
            flat_batch(tables, starts, counts, B)[1],
        ),
        lambda tables, starts, counts, B: (  # filled up in front
            flat_batch(tables, starts, counts, B)[0],
            torch.tensor([[0] * (max(map(len, tables)) - len(t)) + t for t in tables]),
        ),
        lambda tables, starts, counts, B: tuple(x.int() for x in flat_batch(tables, starts, counts, B)),
        lambda tables, starts, counts, B: tuple(x.tolist() for x in flat_batch(tables, starts, counts, B)),
        lambda tables, starts, counts, B: flat_batch([sorted(t) for t in tables], starts, counts, B),
        lambda tables, starts, counts, B: flat_batch(tables, starts, counts[:1] * len(tables), B),
    ],
    "blocks_saved": [
        by_simulation, by_own_simulation, block_by_block,
        lambda n, prompt, output, B: (n - 1) * (prompt // B),  # before anybody writes the last one is shared, too
        lambda n, prompt, output, B: (n - 1) * -(-prompt // B),  # as if the last were never copied
        lambda n, prompt, output, B: n * (prompt // B),  # one of them has to be kept
        lambda n, prompt, output, B: (n - 1) * (prompt / B if output else -(-prompt // B)),
        lambda n, prompt, output, B: (n - 1) * ((prompt - 1) // B if output else -(-prompt // B)),
        lambda n, prompt, output, B: (n - 1) * (prompt // B) + (not output and prompt % B > 0),
    ],
    "TwoLevelTable": [
        SharesTheLast, CopiesAll, LooksBehind, OnlyTheChildCopies, OneDirectory, OfTheClass, WithAFlatList,
        Searches, OneLeaf, SaysNone,
    ],
}  # fmt: skip
