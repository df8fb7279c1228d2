"""A buddy allocator: what the paper assumes that Orca uses for its contiguous keys and values.

It gives out pieces of 1, 2, 4, 8, ... slots, each at an address that is a multiple of its size. A piece that is too
large is split into halves, which are each other's buddies: their addresses differ in one bit, that of their size.
When both are free, they become one again. Chapter 3 builds it step by step.
"""

from heapq import heapify, heappop, heappush


def next_power(n: int) -> int:
    """The smallest power of two that is at least n.

    >>> next_power(25), next_power(32)
    (32, 32)
    """
    return 1 << (n - 1).bit_length()


class Buddy:
    """A row of `total` slots. A total that is no power of two is cut into powers, the largest first.

    >>> memory = Buddy(128)
    >>> a, b = memory.allocate(25), memory.allocate(50)
    >>> a, b, memory.num_free
    ((0, 32), (64, 64), 32)
    >>> memory.allocate(33) is None
    True
    >>> memory.release(a); memory.release(b); memory.num_free
    128
    """

    def __init__(self, total: int):
        if total < 1:
            raise ValueError(f"total={total}: must be at least 1")
        self.total = self.num_free = total
        self._holes: list[set[int]] = [set() for _ in range(total.bit_length())]  # by the size's bit: where they start
        self._first: list[list[int]] = [[] for _ in self._holes]  # the same as heaps; may name holes that are gone
        start = 0
        for bit in reversed(range(total.bit_length())):
            if total >> bit & 1:
                self._add(bit, start)
                start += 1 << bit

    def allocate(self, size: int) -> tuple[int, int] | None:
        """A piece (start, slots) of the next power of two, the lowest; None if no hole is large enough."""
        want = (size - 1).bit_length()
        have = next((bit for bit in range(want, len(self._holes)) if self._holes[bit]), None)
        if have is None:
            return None
        start = self._pop(have)
        while have > want:  # split, and keep the left half
            have -= 1
            self._add(have, start + (1 << have))
        self.num_free -= 1 << want
        return start, 1 << want

    def release(self, piece: tuple[int, int]) -> None:
        """Give a piece back, as it was allocated. It joins its buddy if that is free, and so on."""
        start, size = piece
        self.num_free += size
        bit = size.bit_length() - 1
        while bit < len(self._holes) and (buddy := start ^ (1 << bit)) in self._holes[bit]:
            self._holes[bit].remove(buddy)
            start = min(start, buddy)
            bit += 1
        self._add(bit, start)

    def holes(self) -> dict[int, list[int]]:
        """{size: where holes of that size start}."""
        return {1 << bit: sorted(starts) for bit, starts in enumerate(self._holes) if starts}

    def _add(self, bit: int, start: int) -> None:
        holes, first = self._holes[bit], self._first[bit]
        holes.add(start)
        heappush(first, start)
        if len(first) > 4 * len(holes) + 64:  # mostly names of holes that were joined
            first[:] = holes
            heapify(first)

    def _pop(self, bit: int) -> int:
        holes, first = self._holes[bit], self._first[bit]
        while (start := heappop(first)) not in holes:
            pass
        holes.remove(start)
        return start
