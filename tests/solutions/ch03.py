"""Chapter 3: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821

from bisect import insort
from fractions import Fraction
from math import ceil

import numpy as np


def buddy_of(start, size):
    return start + size if start // size % 2 == 0 else start - size


def by_parent(start, size):
    parent = start - start % (2 * size)
    return parent + parent + size - start


def by_the_bit(start, size):
    if start & size:
        return start & ~size
    return start | size


def with_numpy(start, size):
    return np.int64(start) ^ np.int64(size)


def best_fit(holes, size):
    enough = [(room, start) for start, room in holes.items() if room >= size]
    return min(enough)[1] if enough else None


def best_by_loop(holes, size):
    best = None
    for start in sorted(holes):
        if holes[start] >= size and (best is None or holes[start] < holes[best]):
            best = start
    return best


def best_by_key(holes, size):
    enough = filter(lambda start: holes[start] >= size, holes)
    return min(enough, key=lambda start: (holes[start], start), default=None)


def last_best_fit(holes, size):
    enough = [(room, -start) for start, room in holes.items() if room >= size]
    return -min(enough)[1] if enough else None


def takes_it(holes, size):
    start = best_fit(holes, size)
    if start is not None:
        holes[start + size] = holes.pop(start) - size
    return start


def mean_empty(n, B):
    full, rest = divmod(n, B)
    return (full * B * (B - 1) / 2 + rest * (2 * B - rest - 1) / 2) / n


def slots_less_tokens(n, B):
    """Blocks are 1, 1, ..., 2, 2, ...: all slots, less all tokens."""
    last = ceil(n / B)
    blocks = B * (last - 1) * last // 2 + last * (n - (last - 1) * B)
    return B * blocks / n - (n + 1) / 2


def exactly(n, B):
    """A loop over one block."""
    rest = n % B
    whole = sum(range(B)) * ((n - rest) // B)
    return float(Fraction(whole + sum(B - i for i in range(1, rest + 1)), n))


def by_loop(n, B):
    return sum(-length % B for length in range(1, n + 1)) / n


def by_list(n, B):
    lengths = list(range(1, n + 1))
    return (B * sum([-(-length // B) for length in lengths]) - sum(lengths)) / n


def by_array(n, B):
    return float(np.mean(-np.arange(1, n + 1) % B))


def by_while(n, B):
    empty, length = 0, n
    while length > 0:
        empty, length = empty + -length % B, length - 1
    return empty / n


class Compacting:
    def __init__(self, total):
        self.total, self.moved, self.pieces = total, 0, {}

    def allocate(self, name, size):
        if size > self.total - sum(size for _, size in self.pieces.values()):
            return False
        at = self.find(size)
        if at is None:
            at = self.together()
        self.pieces[name] = at, size
        return True

    def together(self):
        """All to the left. -> where free slots begin."""
        at = 0
        for other, (start, width) in sorted(self.pieces.items(), key=lambda item: item[1]):
            self.moved += width if start != at else 0
            self.pieces[other] = at, width
            at += width
        return at

    def find(self, size):
        at = 0
        for start, width in [*sorted(self.pieces.values()), (self.total, 0)]:
            if start - at >= size:
                return at
            at = start + width
        return None

    def release(self, name):
        del self.pieces[name]

    def where(self):
        return dict(self.pieces)


@dataclass
class Piece:
    start: int
    size: int
    name: object


class InARow:
    """A list of pieces in their order; holes are closed from the left, as few as it takes."""

    def __init__(self, total):
        self.row, self.total, self.moved = [], total, 0

    def allocate(self, name, size):
        if size > self.total - sum(piece.size for piece in self.row):
            return False
        for _ in range(len(self.row) + 1):
            end = 0
            for i, piece in enumerate([*self.row, Piece(self.total, 0, None)]):
                if piece.start - end >= size:
                    self.row.insert(i, Piece(end, size, name))
                    return True
                end = piece.start + piece.size
            self.close_first_hole()
        raise AssertionError("there was room")

    def close_first_hole(self):
        end = 0
        for piece in self.row:
            if piece.start > end:
                piece.start, self.moved = end, self.moved + piece.size
                return
            end += piece.size

    def release(self, name):
        self.row = [piece for piece in self.row if piece.name != name]

    def where(self):
        return {piece.name: (piece.start, piece.size) for piece in self.row}


class Painted:
    """The row itself, a name in each slot; pieces go to the right end."""

    __slots__ = ("moved", "order", "places", "slots")

    def __init__(self, total):
        self.slots, self.order, self.moved, self.places = [None] * total, [], np.int64(0), {}

    def allocate(self, name, size):
        if self.slots.count(None) < size:
            return False
        start = self.run_of(size)
        if start is None:
            end = len(self.slots)
            for at, other in sorted(((self.places[o][0], o) for o in self.places), key=lambda pair: -pair[0]):
                width = self.places[other][1]
                if at + width != end:
                    self.moved += width
                    self.places[other][0] = end - width
                end -= width
            self.slots = [None] * len(self.slots)
            for other, (at, width) in self.places.items():
                self.slots[at : at + width] = [[other]] * width
            start = end - size
        self.slots[start : start + size] = [[name]] * size
        self.places[name] = [start, size]
        return True

    def run_of(self, size):
        run = 0
        for i, slot in enumerate(self.slots):
            run = run + 1 if slot is None else 0
            if run == size:
                return i + 1 - size
        return None

    def release(self, name):
        start, size = self.places.pop(name)
        self.slots[start : start + size] = [None] * size

    def where(self):
        return self.places


class Fewest(Compacting):
    """Joins those neighbouring holes whose pieces between are the least to copy."""

    def together(self):
        raise NotImplementedError

    def allocate(self, name, size):
        if size > self.total - sum(size for _, size in self.pieces.values()):
            return False
        row = []
        for other, (start, width) in self.pieces.items():
            insort(row, (start, width, other), key=lambda piece: piece[0])
        starts, ends = [start for start, _, _ in row] + [self.total], [0] + [s + w for s, w, _ in row]
        options = []
        for i in range(len(row) + 1):
            for j in range(i, len(row) + 1):
                width = sum(w for _, w, _ in row[i:j])
                if starts[j] - ends[i] - width >= size:
                    options.append((width if i < j else 0, i, j))
        _, i, j = min(options)
        at = ends[i]
        for start, width, other in row[i:j]:
            self.moved += width if start != at else 0
            self.pieces[other] = at, width
            at += width
        self.pieces[name] = at, size
        return True


class NeverMoves(Compacting):
    def allocate(self, name, size):
        at = self.find(size)
        if at is not None:
            self.pieces[name] = at, size
        return at is not None


class CountsPieces(Compacting):
    """How many pieces it moved, and not how many slots."""

    def allocate(self, name, size):
        before, moved = self.where(), self.moved
        fits = super().allocate(name, size)
        self.moved = moved + sum(self.pieces[other] != piece for other, piece in before.items())
        return fits


class CountsAll(Compacting):
    """Also those that stay where they are."""

    def together(self):
        moved = self.moved
        at = super().together()
        self.moved = moved + at
        return at


class CountsDistance(Compacting):
    def together(self):
        before, moved = self.where(), self.moved
        at = super().together()
        self.moved = moved + sum(piece[0] - self.pieces[other][0] for other, piece in before.items())
        return at


class MovesThenRefuses(Compacting):
    def allocate(self, name, size):
        if self.find(size) is None:
            self.together()
        return super().allocate(name, size)


class Reverses(Compacting):
    def together(self):
        at = 0
        for other, (start, width) in sorted(self.pieces.items(), key=lambda item: item[1], reverse=True):
            self.moved += width if start != at else 0
            self.pieces[other] = at, width
            at += width
        return at


class InOrderOfArrival(Compacting):
    def together(self):
        at = 0
        for other, (start, width) in self.pieces.items():
            self.moved += width if start != at else 0
            self.pieces[other] = at, width
            at += width
        return at


class AtEachRelease(Compacting):
    def release(self, name):
        super().release(name)
        self.together()


class AtEachAllocate(Compacting):
    def find(self, size):
        return None


class OneForAll(Compacting):
    everywhere = {}

    def __init__(self, total):
        super().__init__(total)
        self.pieces = self.everywhere


class RefusesExact(Compacting):
    def allocate(self, name, size):
        if size >= self.total - sum(size for _, size in self.pieces.values()):
            return False
        return super().allocate(name, size)


class ForgetsToRefuse(Compacting):
    def allocate(self, name, size):
        at = self.find(size)
        self.pieces[name] = self.together() if at is None else at, size
        return True


class LargestHoleOnly(Compacting):
    """It refuses if a hole must be put together from more than two."""

    def allocate(self, name, size):
        row = [(0, 0), *sorted(self.pieces.values()), (self.total, 0)]
        holes = [b[0] - a[0] - a[1] for a, b in zip(row, row[1:], strict=False)]
        if self.find(size) is None and max(map(sum, zip(holes, holes[1:], strict=False)), default=0) < size:
            return False
        return super().allocate(name, size)


class NamesAsTexts(Compacting):
    def where(self):
        return {str(name): piece for name, piece in self.pieces.items()}


KNOWN = {(0, 1): 1, (1, 1): 0, (0, 16): 16, (16, 16): 0, (32, 16): 48, (48, 16): 32, (0, 1024): 1024, (1024, 1024): 0}
RIGHT = {
    "buddy_of": [buddy_of, by_parent, by_the_bit, with_numpy],
    "best_fit": [best_fit, best_by_loop, best_by_key],
    "mean_empty": [mean_empty, slots_less_tokens, exactly],
    "Compacting": [Compacting, InARow, Painted, Fewest],
}
WRONG = {
    "buddy_of": [
        lambda start, size: start + size,
        lambda start, size: start ^ 2 * size,
        lambda start, size: abs(start - size),  # of those at the beginning
        lambda start, size: KNOWN[start, size],  # by heart
        lambda start, size: start ^ size if start < 4096 else start + size,  # small addresses
        lambda start, size: start ^ min(size, 1024),
        lambda start, size: buddy(start, size),
        lambda start, size: float(start ^ size),
        lambda start, size: (start ^ size, size),
    ],
    "best_fit": [
        lambda holes, size: next((start for start in sorted(holes) if holes[start] >= size), None),  # first fit
        lambda holes, size: min((r, s) for s, r in holes.items() if r >= size)[1],  # no None
        lambda holes, size: min(((r, s) for s, r in holes.items() if r > size), default=(0, None))[1],  # never exact
        lambda holes, size: min((s for s in holes if holes[s] >= size), key=holes.get, default=None),  # dict's order
        lambda holes, size: max(((r, s) for s, r in holes.items() if r >= size), default=(0, None))[1],  # worst fit
        lambda holes, size: best_fit(holes, size) or 0,
        lambda holes, size: best_fit(holes, size) or None,  # 0 is a place
        lambda holes, size: min(((r, s) for s, r in holes.items()), default=(0, None))[1],  # the smallest of all
        last_best_fit,
        takes_it,
    ],
    "mean_empty": [
        lambda n, B: B / 2,
        lambda n, B: (B - 1) / 2,  # as if n were a multiple of B
        lambda n, B: -n % B,  # at the end only
        lambda n, B: (n // B * B * (B - 1) / 2 + sum(range(n % B))) / n,  # the last block counted the wrong way round
        lambda n, B: round(mean_empty(n, B), 2),
        lambda n, B: sum(blocks_for(length, B) * B - length for length in range(1, n + 1)) / n,  # the package's
        by_loop, by_list, by_array, by_while,
    ],
    "Compacting": [
        NeverMoves, CountsPieces, CountsAll, CountsDistance, MovesThenRefuses, Reverses, InOrderOfArrival,
        AtEachRelease, AtEachAllocate, OneForAll, RefusesExact, ForgetsToRefuse, LargestHoleOnly, NamesAsTexts,
    ],
}  # fmt: skip
