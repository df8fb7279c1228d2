"""Where requests stand. Each is in exactly one of three lists, and each list is in the order of arrival:

    waiting --admit--> running --finish-->
       ^                |   ^
       +--- recompute --+   +-- swap in --+
                        +--- swap out --> swapped
"""

from bisect import insort
from dataclasses import dataclass, field

from minipaged.requests.request import Request


@dataclass
class Queues:
    """All requests that are not finished."""

    waiting: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    swapped: list[Request] = field(default_factory=list)

    def lists(self) -> tuple[list[Request], list[Request], list[Request]]:
        return self.waiting, self.running, self.swapped

    def remove(self, request: Request) -> None:
        for queue in self.lists():
            if request in queue:
                queue.remove(request)


def arrival(request: Request) -> int:
    """What queues are sorted by."""
    return request.arrival


def put(queue: list[Request], request: Request) -> None:
    """Let a request stand where its arrival says."""
    insort(queue, request, key=arrival)
