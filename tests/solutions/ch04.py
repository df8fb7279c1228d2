"""Chapter 4: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821


def saved_by_sharing(tables):
    without = sum(len(table) for table in tables)
    return 1 - len({block for table in tables for block in table}) / without if without else 0


class BitmapAllocator:
    def __init__(self, num_blocks):
        self.num_blocks = num_blocks
        self.bits = (1 << num_blocks) - 1
        self.counts = [0] * num_blocks

    @property
    def num_free(self):
        return self.bits.bit_count()

    def allocate(self, count):
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
        return self.counts[block]

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


class TakesWhatThereIs(BitmapAllocator):
    def allocate(self, count):
        blocks = [self.take() for _ in range(min(count, self.num_free))]
        return blocks if len(blocks) == count else NoSpace(count, len(blocks))


class NegativeBlocks(BitmapAllocator):
    def ref_count(self, block):
        if block >= self.num_blocks:
            raise MisuseError(f"block {block} does not exist")
        return self.counts[block]


def shrink(new, ops):
    i = 0
    while i < len(ops):
        shorter = ops[:i] + ops[i + 1 :]
        if fault(new, shorter):
            ops, i = shorter, 0
        else:
            i += 1
    return list(ops)


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


WRONG = {
    "saved_by_sharing": [
        lambda tables: sum(map(len, tables)) / len({b for t in tables for b in t}) - 1 if any(tables) else 0,
        lambda tables: 1 - len({b for t in tables for b in t}) / sum(map(len, tables)),  # divides by zero
    ],
    "BitmapAllocator": [TogglesEachTime, HighestFirst, TakesWhatThereIs, NegativeBlocks],
    "shrink": [lambda new, ops: list(ops), shortest_beginning, shrink_once, in_place],
    "Thrifty": [ForgetsMarks, NewestFirst, NeverGivesUp, Allocator],
}
