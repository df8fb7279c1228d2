"""Which of many replicas gets a request: four policies, and what each knows of who lives and how much they have to do.

A request is a sequence of pieces, each of which means what it is and where it begins: pieces of a text, or a trace's
hashes of blocks. Nothing but the standard library, and no clock, no socket: a simulation uses the same code.

    policy = make_policy("prefix")
    policy.add("a"), policy.add("b")
    replica = policy.choose(pieces)             None: nobody lives
    policy.begin(replica, pieces)               it has so much more to do
    policy.end(replica)                         it has done it, or given up
"""

import hashlib
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence

Pieces = Sequence[Hashable]
PIECE = 64  # characters of a text: about a block of 16 tokens


def cut(text: str, size: int = PIECE) -> list[str]:
    """The whole pieces of a text: as in a prefix cache, an end that is no whole one can't be found.

    >>> cut("abcde", 2)
    ['ab', 'cd']
    """
    return [text[i : i + size] for i in range(0, len(text) - size + 1, size)]


class Policy:
    """What all have in common. live: who may be chosen, and when each was chosen last. load: what each has to do.

    Loads are requests, or tokens: whatever `begin` and `end` are told, in one unit.
    """

    def __init__(self) -> None:
        self.live: dict[str, int] = {}
        self.load: dict[str, float] = {}
        self._num_chosen = 0

    def add(self, replica: str) -> None:
        """It lives: it is new, or it has come back. Its memory is empty, as far as is known."""
        self.live.setdefault(replica, 0)
        self.load.setdefault(replica, 0)

    def remove(self, replica: str) -> None:
        """It lives no longer. What it has to do ends by itself."""
        self.live.pop(replica, None)
        self._forget(replica)

    def choose(self, pieces: Pieces, load: float = 1, without: Collection[str] = ()) -> str | None:
        """Who should get it. without: who was tried already. None: nobody is left."""
        raise NotImplementedError

    def begin(self, replica: str, pieces: Pieces, load: float = 1) -> None:
        """It was sent there. `end` must follow."""
        self.load[replica] = self.load.get(replica, 0) + load
        self._num_chosen += 1
        if replica in self.live:
            self.live[replica] = self._num_chosen

    def end(self, replica: str, load: float = 1) -> None:
        self.load[replica] -= load
        self._forget(replica)

    def _forget(self, replica: str) -> None:
        if replica not in self.live and self.load.get(replica, 0) <= 0:
            self.load.pop(replica, None)

    def _least(self, among: Iterable[str], without: Collection[str]) -> str | None:
        """Who has least to do; of equals, who was chosen least recently."""
        load, live = self.load, self.live
        left = (replica for replica in among if replica not in without) if without else among
        return min(left, key=lambda replica: (load[replica], live[replica]), default=None)


class RoundRobin(Policy):
    """One after the other, whatever they have to do."""

    def choose(self, pieces: Pieces, load: float = 1, without: Collection[str] = ()) -> str | None:
        left = (replica for replica in self.live if replica not in without)
        return min(left, key=self.live.__getitem__, default=None)


class LeastLoaded(Policy):
    def choose(self, pieces: Pieces, load: float = 1, without: Collection[str] = ()) -> str | None:
        return self._least(self.live, without)


class PrefixAffinity(Policy):
    """Who has the longest beginning in memory, unless it is too busy: then who has least to do.

    What they have is not asked: it is what was sent there, the latest `capacity` pieces of it, as a cache with that
    rule would have them. Too busy (SGLang's rule, cache-aware): it has more than `absolute` more to do than the least
    busy one, and more than `relative` times as much. Of several that have as much of it, the least busy one.

    capacity: pieces; of a text, blocks of the replica's pool are a good guess. absolute: in the unit of loads.
    found, queried: of all pieces sent, how many were expected to be in memory, and how many there were.
    """

    def __init__(self, capacity: int = 16384, absolute: float = 4, relative: float = 1.5):
        super().__init__()
        self.capacity, self.absolute, self.relative = capacity, absolute, relative
        self.found = self.queried = 0
        self._holders: dict[int, set[str]] = {}  # of a beginning, by its hash: who has it
        self._held: dict[str, OrderedDict[int, None]] = {}  # the same by replica: least recently used first

    def remove(self, replica: str) -> None:
        super().remove(replica)
        for key in self._held.pop(replica, ()):
            self._drop(key, replica)

    def choose(self, pieces: Pieces, load: float = 1, without: Collection[str] = ()) -> str | None:
        least = self._least(self.live, without)
        if least is None:
            return None
        best: Iterable[str] = ()
        for key in beginnings(pieces):
            holders: Collection[str] = self._holders.get(key, ())
            if without:
                holders = [replica for replica in holders if replica not in without]
            if not holders:
                break
            best = holders
        holder = self._least(best, ())
        if holder is None:
            return least
        busy, idle = self.load[holder], self.load[least]
        return least if busy - idle > self.absolute and busy > idle * self.relative else holder

    def begin(self, replica: str, pieces: Pieces, load: float = 1) -> None:
        super().begin(replica, pieces, load)
        if replica not in self.live:
            return
        held, keys = self._held.setdefault(replica, OrderedDict()), list(beginnings(pieces))
        self.queried += len(keys)
        self.found += next((i for i, key in enumerate(keys) if key not in held), len(keys))
        for key in reversed(keys):  # so that ends go before beginnings do
            if key not in held:
                self._holders.setdefault(key, set()).add(replica)
            held[key] = None
            held.move_to_end(key)
        while len(held) > self.capacity:
            self._drop(held.popitem(last=False)[0], replica)

    def _drop(self, key: int, replica: str) -> None:
        holders = self._holders[key]
        holders.discard(replica)
        if not holders:
            del self._holders[key]


class ConsistentHash(Policy):
    """The same beginning goes to the same replica, also by another router, and nobody has to remember anything.

    Each replica stands at `points` places of a ring, and a request goes to the next one from the place of its beginning
    on: who leaves or comes moves its own share only. Nobody gets more than `bound` times the mean load (Mirrokni et
    al., "Consistent hashing with bounded loads"): what is too much goes to the next one.

    beginning: so many pieces count; a request with fewer counts whole.
    """

    def __init__(self, beginning: int = 8, points: int = 64, bound: float = 1.25):
        super().__init__()
        self.beginning, self.points, self.bound = beginning, points, bound
        self._ring: list[tuple[int, str]] = []

    def add(self, replica: str) -> None:
        if replica not in self.live:
            for i in range(self.points):
                insort(self._ring, (_place(replica, i), replica))
        super().add(replica)

    def remove(self, replica: str) -> None:
        super().remove(replica)
        self._ring = [(place, name) for place, name in self._ring if name != replica]

    def choose(self, pieces: Pieces, load: float = 1, without: Collection[str] = ()) -> str | None:
        left = len(self.live) - len(set(without) & self.live.keys())
        if not left:
            return None
        total = sum(self.load[replica] for replica in self.live if replica not in without)
        most = self.bound * (total + load) / left
        start = bisect_left(self._ring, (_place(*pieces[: self.beginning]), ""))
        passed = set(without)
        for i in range(start, start + len(self._ring)):
            replica = self._ring[i % len(self._ring)][1]
            if replica not in passed:
                if self.load[replica] < most:
                    return replica
                passed.add(replica)
        return self._least(self.live, without)  # rounding: somebody has no more to do than the mean


def beginnings(pieces: Pieces) -> Iterable[int]:
    """A hash of each beginning: of the first piece, of the first two, and so on."""
    key = 0
    for piece in pieces:
        key = hash((key, piece))
        yield key


def _place(*what: Hashable) -> int:
    """On the ring: the same in every process, which Python's own hash of a text isn't."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode("utf-8", "replace"), digest_size=8).digest())


POLICIES: dict[str, Callable[[], Policy]] = {
    "round_robin": RoundRobin, "least_loaded": LeastLoaded, "prefix": PrefixAffinity,
    "consistent_hash": ConsistentHash,
}  # fmt: skip


def make_policy(name: str) -> Policy:
    """By its name. ValueError if there is no such policy."""
    if name not in POLICIES:
        raise ValueError(f"policy={name!r}: must be one of {', '.join(POLICIES)}")
    return POLICIES[name]()
