"""Who comes in next, of all that wait or are swapped out.

    fcfs     who arrived first
    prefix   who has the longest beginning in memory already; who arrived first among equals

Where many requests begin alike, `prefix` lets those that share follow each other while their prefix is still there;
for a cache as a tree it is the order of a walk in depth (RadixAttention, SGLang). But a request that shares nothing
would wait for ever if others keep coming. So nobody is overtaken more than PATIENCE times: then all wait for it.
"""

from collections.abc import Callable

from minipaged.sequence import Request

SCHEDULES = ("fcfs", "prefix")
PATIENCE = 16
WINDOW = 128  # so many of the earliest are looked at: a bound on the work of one step


def in_order(
    schedule: str, waiting: list[Request], swapped: list[Request], num_known: Callable[[Request], int]
) -> list[Request]:
    """Who is to come in, in this order, until one can't. waiting and swapped are in order of arrival.

    num_known: tokens of a waiting request that are in memory; all those of a swapped one are.
    """
    requests = sorted(waiting + swapped, key=arrival)
    if schedule == "fcfs":
        return requests
    away = {id(request) for request in swapped}

    def rank(request: Request) -> tuple[bool, int, int]:
        known = request.live[0].num_computed_tokens if id(request) in away else num_known(request)
        return request.num_overtaken < PATIENCE, -known, request.arrival

    return sorted(requests[:WINDOW], key=rank)


def may_overtake(request: Request, waiting: list[Request], swapped: list[Request]) -> bool:
    """Whether all that arrived earlier have patience left."""
    return all(other.num_overtaken < PATIENCE for other in waiting + swapped if other.arrival < request.arrival)


def overtake(request: Request, waiting: list[Request], swapped: list[Request]) -> None:
    """The request came in before all of these that arrived earlier."""
    for other in waiting + swapped:
        other.num_overtaken += other.arrival < request.arrival


def arrival(request: Request) -> int:
    return request.arrival
