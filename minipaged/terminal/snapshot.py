"""One moment of the memory as plain data: what draw.py draws and watch.py shows (viewer/ keeps it in a file).

Sequences get short names, since their numbers say nothing to a reader: A, B, C are the requests in the order
of their arrival, and A1, A2, A3 the sequences of a request that has several. What is kept for another engine is
kept1, kept2, ...
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from minipaged.memory import KVCacheManager, MemoryUsage

if TYPE_CHECKING:  # only to name the types: a trace can be drawn without loading PyTorch
    from minipaged.engine import LLMEngine
    from minipaged.requests.request import Request
    from minipaged.requests.sequence import Sequence
    from minipaged.scheduling.plan import StepOutput, StepPlan


@dataclass(frozen=True)
class Table:
    """The page table of one sequence. blocks: logical -> physical; in the CPU pool if it is swapped out."""

    name: str
    num_tokens: int
    blocks: list[int]
    swapped: bool = False


@dataclass(frozen=True)
class Snapshot:
    """All page tables, the account, and who is where; requests and sequences by name.

    >>> memory = KVCacheManager(num_blocks=8, block_size=4, free_order=[7, 1, 3])
    >>> _ = memory.allocate(0, num_tokens=7)
    >>> memory.fork(0, 1)
    >>> snapshot = Snapshot.of(memory)
    >>> snapshot.tables[1]
    Table(name='B', num_tokens=7, blocks=[7, 1], swapped=False)
    >>> snapshot.holders()
    {7: ['A', 'B'], 1: ['A', 'B']}
    """

    usage: MemoryUsage
    tables: list[Table]
    running: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    swapped: list[str] = field(default_factory=list)
    num_preemptions: int = 0
    cached: list[int] = field(default_factory=list)  # free blocks that the prefix cache still finds

    @classmethod
    def of(cls, memory: KVCacheManager, names: dict[int, str] | None = None, **queues: Any) -> Snapshot:
        """What is in `memory` now. names: by sequence id; without them the sequences are A, B, C, ..."""
        sequences = memory.sequences()
        names = {i: letters(i) for i in sequences} if names is None else names
        kept = {i: f"kept{number}" for number, i in enumerate((i for i in sequences if i not in names), 1)}
        tables = [
            Table((names | kept)[i], memory.num_tokens(i), memory.block_table(i), memory.is_swapped(i))
            for i in sequences
        ]
        tables.sort(key=lambda table: _order(table.name))
        return cls(memory.usage(), tables, **queues, cached=memory.idle_blocks())

    def holders(self, swapped: bool = False) -> dict[int, list[str]]:
        """For each block in use, the names of the sequences that hold it: as many as its reference count.

        swapped: of the CPU pool instead.
        """
        holders: dict[int, list[str]] = {}
        for table in self.tables:
            for block in table.blocks if table.swapped == swapped else ():
                holders.setdefault(block, []).append(table.name)
        return holders


class Observer:
    """Follows an engine: keeps the names of its sequences, and tells in words what a step did.

    Call `follow` once after each step, and `snapshot` when a picture is wanted.

    names, requests: of sequences by their number, and of requests by their id: those that are there, and those that
        were there before the last step, or came and went in it.
    came, gone: the requests that came before the last step, and those that ended in it, or were aborted before it.
    finished: the names of these. ended: sequences that did so, those of other requests and beams among them.
    """

    def __init__(self, llm: LLMEngine):
        self._llm = llm
        self._numbers: dict[int, int] = {}  # of the sequences of requests that have several
        self._names: dict[int, str] = {}
        self._kept: dict[int, str] = {}  # what is kept for other engines
        self._kept_numbers = count(1)
        self._ended: list[tuple[Request, Sequence]] = []  # since the last step
        llm.scheduler.transfers.watchers.add(self)
        self._name_all()
        self._live = self._live_now()
        self.names, self.requests = self._names, _by_id(self._live)
        self.came, self.finished = [*self._live], list[str]()
        self.gone: list[Request] = []
        self.ended: list[Sequence] = []

    def note_end(self, request: Request, seq: Sequence) -> None:
        self._ended.append((request, seq))

    def snapshot(self) -> Snapshot:
        scheduler = self._llm.scheduler
        lists = {"running": scheduler.running, "waiting": scheduler.waiting, "swapped": scheduler.swapped}
        return Snapshot.of(
            self._llm.memory,
            self._names | self._names_of_kept(),
            num_preemptions=sum(scheduler.num_preemptions.values()),
            **{key: [letters(request.arrival) for request in requests] for key, requests in lists.items()},
        )

    def follow(self, plan: StepPlan, output: StepOutput) -> list[str]:
        """Learn of a step that is over. Returns what it did to the memory, a sentence for each thing."""
        before, names = self._live, self._names
        self._name_all()
        self._live = self._live_now()
        ended = {seq: request for request, seq in self._ended if seq.finish_reason  # others: of steps that failed
                 and (request.search or seq in request.sequences)}  # fmt: skip
        late = dict.fromkeys(r for r in ended.values() if r not in before and r.finished)
        last_names, self.ended, self._ended = self._last_names(ended), [*ended], []
        self.names = {**last_names, **names, **self._names}
        self.requests = {**_by_id(before), **_by_id(late), **_by_id(self._live)}
        self.came = [request for request in (*self._live, *late) if request not in before]
        self.gone = [request for request in (*before, *late) if request not in self._live]
        self.finished = [letters(request.arrival) for request in self.gone]
        told = [f"{name} {count}, {right} right, {back} slot{'s' * (back != 1)} taken back"
                for name, (count, right, back) in guesses(plan, output, self.names).items()]  # fmt: skip
        guessed = [f"guessed for {'; '.join(told)}"] if told else []
        return [*_tell(plan, self.requests, self.names, self.finished), *guessed]

    def _live_now(self) -> dict[Request, None]:
        """All requests that are not finished."""
        scheduler = self._llm.scheduler
        return dict.fromkeys([*scheduler.running, *scheduler.swapped, *scheduler.waiting])

    def _name_all(self) -> None:
        requests = self._live_now()
        numbers: dict[int, int] = {}
        for request in requests:
            numbers.update(self._number(request))
        self._numbers = numbers
        self._names = {
            seq.seq_id: letters(request.arrival) + str(numbers.get(seq.seq_id, ""))
            for request in requests
            for seq in request.live
        }

    def _names_of_kept(self) -> dict[int, str]:
        others = [seq_id for seq_id in self._llm.memory.sequences() if seq_id not in self._names]
        self._kept = {i: self._kept.get(i) or f"kept{next(self._kept_numbers)}" for i in others}
        return self._kept

    def _last_names(self, ended: dict[Sequence, Request]) -> dict[int, str]:
        """Of the sequences that ended, for those that ended in the step in which they came."""
        names: dict[int, str] = {}
        for seq, request in ended.items():
            name = letters(request.arrival)
            if max(len(request.sequences), request.width) > 1:
                taken = {*names.values(), *self._names.values()}
                name = next(one for number in count(seq.index + 1) if (one := f"{name}{number}") not in taken)
            names[seq.seq_id] = name
        return names

    def _number(self, request: Request) -> dict[int, int]:
        """Samples are numbered by their index. Beams come and go: each keeps its number while it lives."""
        if max(len(request.sequences), request.width) == 1:
            return {}
        if request.search is None:
            return {seq.seq_id: seq.index + 1 for seq in request.live}
        known = {seq.seq_id: self._numbers[seq.seq_id] for seq in request.live if seq.seq_id in self._numbers}
        unused = (number for number in count(1) if number not in known.values())
        return known | {seq.seq_id: next(unused) for seq in request.live if seq.seq_id not in known}


def _by_id(requests: Iterable[Request]) -> dict[str, str]:
    return {request.request_id: letters(request.arrival) for request in requests}


def _tell(plan: StepPlan, requests: dict[str, str], names: dict[int, str], finished: list[str]) -> Iterator[str]:
    def listed(ids: list[str]) -> str:
        return " ".join(requests.get(i, i) for i in ids)

    if ids := [i for i, how in plan.preempted if how == "swap"]:
        yield f"{listed(ids)} swapped out to make room: {_moved(plan.swap_out)}"
    if ids := [i for i, how in plan.preempted if how == "recompute"]:
        yield f"{listed(ids)} dropped to make room, to be computed again later"
    if plan.resumed:
        what = _moved(plan.swap_in) if plan.swap_in else "all blocks were still there"
        yield f"{listed(plan.resumed)} swapped in again: {what}"
    if plan.admitted:
        found = {s.request_id: f" ({s.start} tokens found)" for s in plan.sequences if s.start}
        yield " ".join(requests.get(i, i) + found.get(i, "") for i in plan.admitted) + " admitted"
    if plan.copies:
        writers = {block: names.get(s.seq_id, "branch") for s in plan.sequences for block in s.block_table}
        copies = [f"{writers.get(new, '?')} {old}->{new}" for old, new in plan.copies]
        yield f"{len(copies)} copied on write: {', '.join(copies)}"
    if finished:
        yield f"{' '.join(finished)} finished"


def guesses(plan: StepPlan, output: StepOutput, names: dict[int, str]) -> dict[str, tuple[int, int, int]]:
    """By sequence: tokens that were guessed, by all its branches; how many were right; slots that were taken back."""
    guessed: dict[int, int] = {}
    booked: dict[int, int] = {}
    for s in plan.sequences:
        seq_id = s.seq_id if s.branch_of is None else s.branch_of
        guessed[seq_id] = guessed.get(seq_id, 0) + len(output.drafts.get(s.seq_id, ()))
        booked[seq_id] = booked.get(seq_id, 0) + len(s.slots)
    told = {}
    for seq_id in [i for i, number in guessed.items() if number and i in output.tokens]:
        right = len(output.tokens[seq_id][0]) - 1
        told[names.get(seq_id, "?")] = guessed[seq_id], right, booked[seq_id] - right - 1
    return told


def _moved(pairs: list[tuple[int, int]]) -> str:
    return f"{len(pairs)} blocks, " + " ".join(f"{old}->{new}" for old, new in pairs)


def letters(number: int) -> str:
    """Names for 0, 1, 2, ... like the columns of a spreadsheet.

    >>> letters(0), letters(25), letters(26), letters(702)
    ('A', 'Z', 'AA', 'AAA')
    """
    name = ""
    while number >= 0:
        number, letter = divmod(number, 26)
        name = chr(ord("A") + letter) + name
        number -= 1
    return name


def request_of(name: str) -> str:
    """The request that a sequence belongs to: A of A1.

    >>> request_of("AB12")
    'AB'
    """
    return name.rstrip("0123456789")


def _order(name: str) -> tuple[int, str, int]:
    request = request_of(name)
    return len(request), request, int(name[len(request) :] or 0)
