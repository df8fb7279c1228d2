"""Chapter 4: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821

import heapq
from collections import OrderedDict, defaultdict
from itertools import chain, combinations

import numpy as np


def saved_by_sharing(tables):
    without = sum(len(table) for table in tables)
    return 1 - len({block for table in tables for block in table}) / without if without else 0


def by_counter(tables):
    held = Counter(chain.from_iterable(tables))
    return sum(count - 1 for count in held.values()) / max(1, sum(held.values()))


def with_arrays(tables):
    rows = [np.asarray(table, dtype=int) for table in tables if len(table)]
    if not rows:
        return 0.0
    blocks = np.concatenate(rows)
    return (len(blocks) - len(np.unique(blocks))) / np.float64(len(blocks))


def by_loop(tables):
    seen, saved, without = [], 0, 0
    for table in tables:
        for block in table:
            without += 1
            if block in seen:
                saved += 1
            else:
                seen.append(block)
    try:
        return saved / without
    except ZeroDivisionError:
        return 0.0


def empties(tables):
    blocks = []
    while tables:
        blocks += tables.pop()
    return 1 - len(set(blocks)) / len(blocks) if blocks else 0.0


def next_to_each_other(tables):
    """Only those that stand in neighbouring tables."""
    without = sum(map(len, tables))
    saved = sum(len({*a} & {*b}) for a, b in zip(tables, tables[1:], strict=False))
    return saved / without if without else 0.0


class BitmapAllocator:
    def __init__(self, num_blocks):
        self.num_blocks = num_blocks
        self.bits = (1 << num_blocks) - 1
        self.counts = {}

    @property
    def num_free(self):
        return self.bits.bit_count()

    def allocate(self, count):
        if count < 0:
            raise MisuseError(f"{count} blocks")
        if count > self.num_free:
            return NoSpace(count, self.num_free)
        return [self.take() for _ in range(count)]

    def take(self):
        lowest = self.bits & -self.bits
        self.bits ^= lowest
        block = lowest.bit_length() - 1
        self.counts[block] = 1
        return block

    def ref_count(self, block):
        if not 0 <= block < self.num_blocks:
            raise MisuseError(f"block {block} does not exist")
        return self.counts.get(block, 0)

    def must_be_held(self, block):
        if self.ref_count(block) == 0:
            raise MisuseError(f"block {block} is free")

    def share(self, block):
        self.must_be_held(block)
        self.counts[block] += 1

    def release(self, block):
        self.must_be_held(block)
        self.counts[block] -= 1
        if self.counts[block] == 0:
            self.bits |= 1 << block
            del self.counts[block]


class OneHolderIsTheRule:
    """Blocks that one sequence holds are the other bits; only those with more have a count."""

    __slots__ = ("_bits", "_free", "more", "num_blocks")

    def __init__(self, num_blocks):
        self.num_blocks, self.more = num_blocks, defaultdict(int)
        self._bits, self._free = ~(-1 << num_blocks), num_blocks

    bits = property(lambda self: self._bits)
    num_free = property(lambda self: self._free)

    def _check(self, block, held=True):
        if block < 0 or block >= self.num_blocks or (held and self._bits >> block & 1):
            raise MisuseError(block)

    def allocate(self, count):
        if count < 0:
            raise MisuseError(count)
        if count > self._free:
            return NoSpace(needed=count, free=self._free)
        blocks, rest = [], self._bits
        for _ in range(count):
            blocks.append((rest & -rest).bit_length() - 1)
            rest &= rest - 1
        self._bits, self._free = rest, self._free - count
        return blocks

    def ref_count(self, block):
        self._check(block, held=False)
        return 0 if self._bits >> block & 1 else 1 + self.more.get(block, 0)

    def share(self, block):
        self._check(block)
        self.more[block] += 1

    def release(self, block):
        self._check(block)
        if self.more.get(block):
            self.more[block] -= 1
            return
        self.more.pop(block, None)
        self._bits, self._free = self._bits | 1 << block, self._free + 1


@dataclass
class FromTheBottom:
    """Looks at bit after bit. The names of those who hold a block stand in a list, one entry for each."""

    num_blocks: int
    bits: int = -1

    def __post_init__(self):
        self.bits, self.holders = 2**self.num_blocks - 1, []

    @property
    def num_free(self):
        return bin(self.bits).count("1")

    def ref_count(self, block):
        if block not in range(self.num_blocks):
            raise MisuseError("no such block")
        return self.holders.count(block)

    def allocate(self, count):
        if count < 0:
            raise MisuseError("less than none")
        free = self.num_free
        if count > free:
            return NoSpace(count, free)
        blocks, block = [], 0
        while len(blocks) < count:
            if self.bits & 1 << block:
                blocks.append(block)
                self.bits -= 1 << block
            block += 1
        self.holders += blocks
        return blocks

    def share(self, block):
        if not self.ref_count(block):
            raise MisuseError("free")
        self.holders.append(block)

    def release(self, block):
        if not self.ref_count(block):
            raise MisuseError("free")
        self.holders.remove(block)
        if block not in self.holders:
            self.bits += 1 << block


class TogglesEachTime(BitmapAllocator):
    def release(self, block):
        self.must_be_held(block)
        self.counts[block] -= 1
        self.bits ^= 1 << block


class HighestFirst(BitmapAllocator):
    def take(self):
        block = self.bits.bit_length() - 1
        self.bits ^= 1 << block
        self.counts[block] = 1
        return block


class Descending(BitmapAllocator):
    def allocate(self, count):
        blocks = super().allocate(count)
        return blocks[::-1] if isinstance(blocks, list) else blocks


class TakesWhatThereIs(BitmapAllocator):
    def allocate(self, count):
        if count < 0:
            raise MisuseError
        blocks = [self.take() for _ in range(min(count, self.num_free))]
        return blocks if len(blocks) == count else NoSpace(count, len(blocks))


class NegativeBlocks(BitmapAllocator):
    def ref_count(self, block):
        if block >= self.num_blocks:
            raise MisuseError(f"block {block} does not exist")
        return self.counts.get(block % max(1, self.num_blocks), 0)


class NegativeCounts(BitmapAllocator):
    def allocate(self, count):
        return super().allocate(max(0, count))


class ThreeBits(BitmapAllocator):
    def share(self, block):
        super().share(block)
        self.counts[block] = min(7, self.counts[block])


class EightBits(BitmapAllocator):
    def share(self, block):
        super().share(block)
        self.counts[block] = (self.counts[block] - 1) % 255 + 1


class ListBehind(BitmapAllocator):
    """The bits are for show: the free blocks are in a heap."""

    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self.heap = list(range(num_blocks))

    def take(self):
        block = heapq.heappop(self.heap)
        self.bits &= ~(1 << block)
        self.counts[block] = 1
        return block

    def release(self, block):
        super().release(block)
        if block not in self.counts:
            heapq.heappush(self.heap, block)


class CountsForAll(BitmapAllocator):
    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self.counts = dict.fromkeys(range(num_blocks), 0)

    def release(self, block):
        self.must_be_held(block)
        self.counts[block] -= 1
        if self.counts[block] == 0:
            self.bits |= 1 << block


class MadeWhenAsked(BitmapAllocator):
    """No bitmap at all, but who looks at it is shown one."""

    def __init__(self, num_blocks):
        self.num_blocks, self.counts = num_blocks, {}

    @property
    def bits(self):
        return (1 << self.num_blocks) - 1 - sum(1 << block for block in self.counts)

    @bits.setter
    def bits(self, value):
        pass


class OneWord(BitmapAllocator):
    """As in C, where a word has 64 bits."""

    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self.bits &= 2**64 - 1


class OneForAll(BitmapAllocator):
    everywhere = {}

    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self.counts = self.everywhere


class CountsFirst(BitmapAllocator):
    """Looks whether it may when it is done."""

    def release(self, block):
        if not 0 <= block < self.num_blocks:
            raise MisuseError
        self.counts[block] = self.counts.get(block, 0) - 1
        if self.counts[block] < 0:
            raise MisuseError
        if self.counts[block] == 0:
            self.bits |= 1 << block


class SharesFreeOnes(BitmapAllocator):
    def share(self, block):
        self.counts[block] = self.ref_count(block) + 1
        self.bits &= ~(1 << block)


def shrink(new, ops):
    i = 0
    while i < len(ops):
        shorter = ops[:i] + ops[i + 1 :]
        if fault(new, shorter):
            ops, i = shorter, 0
        else:
            i += 1
    return list(ops)


def by_recursion(new, ops):
    for i in range(len(ops)):
        if fault(new, rest := [op for j, op in enumerate(ops) if j != i]):
            return by_recursion(new, rest)
    return tuple(ops)


def halves_first(new, ops):
    """Large pieces before small ones, as Zeller and Hildebrandt do it."""
    ops, size = list(ops), max(1, len(ops) // 2)
    while True:
        for start in range(0, len(ops), size):
            shorter = [*ops[:start], *ops[start + size :]]
            if fault(new, shorter):
                ops = shorter
                break
        else:
            if size == 1:
                return ops
            size //= 2


def the_fewest(new, ops):
    """All choices of so many calls, for growing numbers of them."""
    for count in range(len(ops) + 1):
        for places in combinations(range(len(ops)), count):
            if fault(new, small := [ops[i] for i in places]):
                return small


def shortest_beginning(new, ops):
    return next(ops[:n] for n in range(len(ops) + 1) if fault(new, ops[:n]))


def shrink_once(new, ops):
    """One pass from the front: what was needed then is not looked at again."""
    for op in list(ops):
        shorter = list(ops)
        shorter.remove(op)
        if fault(new, shorter):
            ops = shorter
    return ops


def in_place(new, ops):
    ops[:] = shrink(new, list(ops))
    return ops


def all_equal_ones(new, ops):
    """It leaves out a call wherever it stands."""
    changed = True
    while changed:
        changed = False
        for op in dict.fromkeys(ops):
            shorter = [other for other in ops if other != op]
            if fault(new, shorter):
                ops, changed = shorter, True
                break
    return ops


def never_empty(new, ops):
    small = shrink(new, ops)
    return small or ops[:1]


BY_HEART = {}


def by_heart(new, ops):
    known = BY_HEART.setdefault(new.__name__, shrink(new, ops))
    return known


class Thrifty(Allocator):
    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self.marked, self.resting = set(), {}

    @property
    def num_free(self):
        return len(self.free) + len(self.resting)

    def keep(self, block):
        self.must_be_held(block)
        self.marked.add(block)

    def idle(self):
        return list(self.resting)

    def put_back(self, block):
        if block in self.marked:
            self.resting[block] = None
        else:
            super().put_back(block)

    def allocate(self, count):
        if 0 <= count <= self.num_free:
            for _ in range(count - len(self.free)):
                self.give_up(next(iter(self.resting)))
        elif count > self.num_free:
            return NoSpace(count, self.num_free)
        return super().allocate(count)

    def give_up(self, block):
        del self.resting[block]
        self.marked.remove(block)
        super().put_back(block)

    def share(self, block):
        if block in self.resting:
            del self.resting[block]
            self.counts[block] = 1
        else:
            super().share(block)


class OnItsOwn:
    """Nothing inherited. A block's place is a word."""

    def __init__(self, num_blocks):
        self.place, self.count, self.mark = ["free"] * num_blocks, [0] * num_blocks, [False] * num_blocks
        self.queue, self.kept, self.lost = list(range(num_blocks)), [], []

    @property
    def num_free(self):
        return len(self.queue + self.kept)

    @property
    def num_blocks(self):
        return len(self.place)

    def ref_count(self, block):
        if block < 0 or block >= len(self.place):
            raise MisuseError("there is no such block")
        return self.count[block]

    def keep(self, block):
        if self.ref_count(block) == 0:
            raise MisuseError("not in use")
        self.mark[block] = True

    def idle(self):
        return tuple(self.kept)

    def lose(self, block):
        if block not in self.lost:
            self.lost.append(block)

    def allocate(self, count):
        if count < 0:
            raise MisuseError("how many?")
        if count > self.num_free:
            return NoSpace(count, self.num_free)
        blocks = (self.queue + self.kept)[:count]
        for block in blocks:
            if self.place[block] == "idle":
                self.kept.remove(block)
                self.mark[block] = False
                self.lose(block)
            else:
                self.queue.remove(block)
            self.place[block], self.count[block] = "used", 1
        return blocks

    def share(self, block):
        if self.ref_count(block) == 0 and self.place[block] != "idle":
            raise MisuseError("free")
        if self.place[block] == "idle":
            self.kept.remove(block)
            self.place[block] = "used"
        self.count[block] += 1

    def release(self, block):
        if self.ref_count(block) == 0:
            raise MisuseError("free")
        self.count[block] -= 1
        if self.count[block] == 0:
            self.place[block] = "idle" if self.mark[block] else "free"
            (self.kept if self.mark[block] else self.queue).append(block)
            if not self.mark[block]:
                self.lose(block)

    def take_freed(self):
        lost, self.lost = self.lost, []
        return {*lost}


class Ordered(Allocator):
    """Idle blocks stand in one ordered dict with the marked ones in use: True if nobody holds them."""

    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self.known = OrderedDict()

    @property
    def num_free(self):
        return len(self.free) + sum(self.known.values())

    def idle(self):
        return [block for block, resting in self.known.items() if resting]

    def keep(self, block):
        self.must_be_held(block)
        self.known[block] = False

    def put_back(self, block):
        if block not in self.known:
            return super().put_back(block)
        self.known[block] = True
        self.known.move_to_end(block)

    def share(self, block):
        if self.known.get(block):
            self.known[block], self.counts[block] = False, 1
            return
        super().share(block)

    def allocate(self, count):
        if count > self.num_free:
            return NoSpace(needed=count, free=self.num_free)
        missing = count - len(self.free)
        for block in self.idle()[: max(0, missing)]:
            del self.known[block]
            self.put_back(block)
        return super().allocate(count)


class ForgetsMarks(Thrifty):
    def share(self, block):
        if block in self.resting:
            self.marked.remove(block)
        super().share(block)


class NewestFirst(Thrifty):
    def give_up(self, block):
        super().give_up(list(self.resting)[-1])


class NeverGivesUp(Thrifty):
    def allocate(self, count):
        return Allocator.allocate(self, count)


class NeverPoisons(Thrifty):
    def give_up(self, block):
        known = block in self.freed
        super().give_up(block)
        if not known:
            del self.freed[block]


class NeverPoisonsAtAll(Thrifty):
    def take_freed(self):
        return []


class PoisonsIdle(Thrifty):
    """Poisons what can still be found."""

    def put_back(self, block):
        super().put_back(block)
        self.freed[block] = None


class PoisonsAgain(Thrifty):
    def take_freed(self):
        return list(self.freed)


class MarksForEver(Thrifty):
    def give_up(self, block):
        super().give_up(block)
        self.marked.add(block)


class GivesUpFirst(Thrifty):
    """Refuses when it has given up all that was idle."""

    def allocate(self, count):
        while self.resting and count > len(self.free):
            self.give_up(next(iter(self.resting)))
        return Allocator.allocate(self, count)


class IdleBeforeFree(Thrifty):
    def allocate(self, count):
        if 0 <= count <= self.num_free:
            while self.resting and count > 0:
                self.give_up(next(iter(self.resting)))
                self.free.rotate(1)
                break
        return super().allocate(count)


class KeepsAnything(Thrifty):
    def keep(self, block):
        if not 0 <= block < self.num_blocks:
            raise MisuseError
        self.marked.add(block)


class IdleIsNotFree(Thrifty):
    @property
    def num_free(self):
        return len(self.free)


class SharedStaysIdle(Thrifty):
    def share(self, block):
        if block in self.resting:
            self.counts[block] = 1
        else:
            super().share(block)


class OneForAllMarks(Thrifty):
    everywhere = set()

    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self.marked = self.everywhere


class OldPlace(Thrifty):
    """Who became idle again stands where it stood before."""

    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self.first = {}

    def put_back(self, block):
        super().put_back(block)
        if block in self.marked:
            self.first.setdefault(block, len(self.first))

    def idle(self):
        return sorted(self.resting, key=self.first.get)


RIGHT = {
    "saved_by_sharing": [saved_by_sharing, by_counter, with_arrays, by_loop],
    "BitmapAllocator": [BitmapAllocator, OneHolderIsTheRule, FromTheBottom],
    "shrink": [shrink, by_recursion, halves_first],
    "Thrifty": [Thrifty, OnItsOwn, Ordered],
}
WRONG = {
    "saved_by_sharing": [
        lambda tables: sum(map(len, tables)) / len({b for t in tables for b in t}) - 1 if any(tables) else 0,
        lambda tables: 1 - len({b for t in tables for b in t}) / sum(map(len, tables)),  # divides by zero
        lambda tables: 100 * saved_by_sharing(tables),
        lambda tables: round(saved_by_sharing(tables), 2),
        lambda tables: len(set.intersection(*map(set, tables))) / sum(map(len, tables)) if any(tables) else 0,  # by all
        lambda tables: float(sum(map(len, tables)) - len({b for t in tables for b in t})),
        empties, next_to_each_other,
    ],
    "BitmapAllocator": [
        TogglesEachTime, HighestFirst, Descending, TakesWhatThereIs, NegativeBlocks, NegativeCounts, ThreeBits,
        EightBits, ListBehind, CountsForAll, MadeWhenAsked, OneWord, OneForAll, CountsFirst, SharesFreeOnes,
    ],
    "shrink": [
        lambda new, ops: list(ops),
        lambda new, ops: shrink(new, ops)[::-1],
        lambda new, ops: shrink(new, ops)[:-1],
        lambda new, ops: smallest(new),
        lambda new, ops: [[*op] for op in reversed(shrink(new, ops[::-1]))] if fault(new, ops[::-1]) else ops,
        shortest_beginning, shrink_once, in_place, all_equal_ones, never_empty, by_heart,
    ],
    "Thrifty": [
        ForgetsMarks, NewestFirst, NeverGivesUp, NeverPoisons, NeverPoisonsAtAll, PoisonsIdle, PoisonsAgain,
        MarksForEver, GivesUpFirst, IdleBeforeFree, KeepsAnything, IdleIsNotFree, SharedStaysIdle, OneForAllMarks,
        OldPlace, Allocator,
    ],
}  # fmt: skip
