"""Chapter 3: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821


def buddy_of(start, size):
    return start + size if start // size % 2 == 0 else start - size


def best_fit(holes, size):
    enough = [(room, start) for start, room in holes.items() if room >= size]
    return min(enough)[1] if enough else None


def mean_empty(n, B):
    full, rest = divmod(n, B)
    return (full * B * (B - 1) / 2 + rest * (2 * B - rest - 1) / 2) / n


class Compacting:
    def __init__(self, total):
        self.total, self.moved, self.pieces = total, 0, {}

    def allocate(self, name, size):
        if size > self.total - sum(size for _, size in self.pieces.values()):
            return False
        at = self.find(size)
        if at is None:
            at = 0
            for other, (start, width) in sorted(self.pieces.items(), key=lambda item: item[1]):
                self.moved += width if start != at else 0
                self.pieces[other] = at, width
                at += width
        self.pieces[name] = at, size
        return True

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


def last_best_fit(holes, size):
    enough = [(room, -start) for start, room in holes.items() if room >= size]
    return -min(enough)[1] if enough else None


def takes_it(holes, size):
    start = best_fit(holes, size)
    if start is not None:
        holes[start + size] = holes.pop(start) - size
    return start


WRONG = {
    "buddy_of": [lambda start, size: start + size, lambda start, size: start ^ 2 * size],
    "best_fit": [
        lambda holes, size: next((start for start in sorted(holes) if holes[start] >= size), None),  # first fit
        lambda holes, size: min((r, s) for s, r in holes.items() if r > size or not r)[1],  # never exact, no None
        last_best_fit,
        takes_it,
    ],
    "mean_empty": [
        lambda n, B: B / 2,
        lambda n, B: (B - 1) / 2,  # as if n were a multiple of B
        lambda n, B: -n % B,  # at the end only
    ],
    "Compacting": [NeverMoves, CountsPieces],
}
