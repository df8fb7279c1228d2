"""The router's policies (routing/policies.py), made fast enough for a thousand replicas.

They look at every replica for who has least to do. Here a heap says it: each change puts the new load in, and what is
out of date is thrown away when it comes up. The choices are the same (tests/test_experiments_routing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from heapq import heappop, heappush

from minipaged.routing.policies import ConsistentHash, LeastLoaded, Pieces, Policy, PrefixAffinity, RoundRobin


class Heaped(Policy):
    """Goes before a policy."""

    def __init__(self, *options: int) -> None:
        super().__init__(*options)
        self._heap: list[tuple[float, int, int, str]] = []  # load, when it was chosen last, its place, who
        self._places: dict[str, int] = {}  # in the order in which they were added: of equals the first one

    def _note(self, replica: str) -> None:
        if replica in self.live:
            heappush(self._heap, (self.load[replica], self.live[replica], self._places[replica], replica))

    def add(self, replica: str) -> None:
        super().add(replica)
        self._places[replica] = len(self._places)
        self._note(replica)

    def begin(self, replica: str, pieces: Pieces, load: float = 1) -> None:
        super().begin(replica, pieces, load)
        self._note(replica)

    def end(self, replica: str, load: float = 1) -> None:
        super().end(replica, load)
        self._note(replica)

    def _least(self, among: Iterable[str], without: Collection[str]) -> str | None:
        if among is not self.live or without:
            return super()._least(among, without)
        while self._heap:
            load, last, _, replica = self._heap[0]
            if self.live.get(replica) == last and self.load[replica] == load:
                return replica
            heappop(self._heap)
        return None


class HeapedLeastLoaded(Heaped, LeastLoaded):
    pass


class HeapedPrefixAffinity(Heaped, PrefixAffinity):
    pass


# By name; they want the blocks in a replica's memory, and how many blocks are hashed.
POLICIES: dict[str, Callable[[int, int], Policy]] = {
    "round_robin": lambda capacity, beginning: RoundRobin(),
    "least_loaded": lambda capacity, beginning: HeapedLeastLoaded(),
    "prefix": lambda capacity, beginning: HeapedPrefixAffinity(capacity),
    "consistent_hash": lambda capacity, beginning: ConsistentHash(beginning),
    "shared": lambda capacity, beginning: HeapedLeastLoaded(),  # and one cache without end for all
}
