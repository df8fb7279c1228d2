"""Chapter 5: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821


def residents(slot, tables, lengths, B):
    block, offset = divmod(slot, B)
    found = []
    for name, table in tables.items():
        for logical, physical in enumerate(table):
            position = logical * B + offset
            if physical == block and position < lengths[name]:
                found.append((name, position))
    return sorted(found)


def residents_with_empty_slots(slot, tables, lengths, B):
    return residents(slot, tables, {name: len(table) * B for name, table in tables.items()}, B)


def flat_batch(tables, starts, counts, B):
    slot_mapping = [
        table[position // B] * B + position % B
        for table, start, count in zip(tables, starts, counts, strict=True)
        for position in range(start, start + count)
    ]
    longest = max(map(len, tables))
    padded = [table + [0] * (longest - len(table)) for table in tables]
    return torch.tensor(slot_mapping), torch.tensor(padded)


def blocks_saved(n, prompt, output, B):
    kept = prompt // B if output else -(-prompt // B)  # the last one is shared until somebody writes
    return (n - 1) * kept


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


WRONG = {
    "residents": [
        residents_with_empty_slots,
        lambda slot, tables, lengths, B: residents(slot, tables, lengths, B)[:1],  # one owner is enough?
        lambda slot, tables, lengths, B: [(name, slot) for name, _ in residents(slot, tables, lengths, B)],
    ],
    "flat_batch": [
        lambda tables, starts, counts, B: flat_batch(tables, [0] * len(tables), counts, B),  # from the beginning
        lambda tables, starts, counts, B: (  # the position for the slot
            torch.tensor([p for s, c in zip(starts, counts, strict=True) for p in range(s, s + c)]),
            flat_batch(tables, starts, counts, B)[1],
        ),
        lambda tables, starts, counts, B: (  # filled up in front
            flat_batch(tables, starts, counts, B)[0],
            torch.tensor([[0] * (max(map(len, tables)) - len(t)) + t for t in tables]),
        ),
    ],
    "blocks_saved": [
        lambda n, prompt, output, B: (n - 1) * (prompt // B),  # before anybody writes the last one is shared, too
        lambda n, prompt, output, B: (n - 1) * -(-prompt // B),  # as if the last were never copied
        lambda n, prompt, output, B: n * (prompt // B),  # one of them has to be kept
    ],
    "TwoLevelTable": [SharesTheLast, CopiesAll, LooksBehind],
}
