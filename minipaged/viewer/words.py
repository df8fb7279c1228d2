"""The tokens of sequences as text, while they grow: for each step what is new.

A sequence only ever gets more tokens; but a beam's name may go to another beam, and a sample begins with what its
request has already. So what is new is told as: begin with what `from` had before this step (or this one itself), keep
so many tokens of it, and add these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from minipaged.terminal.snapshot import Observer

if TYPE_CHECKING:
    from minipaged.requests.sequence import Sequence
    from minipaged.scheduling.plan import StepPlan
    from minipaged.viewer.state import Watched


class Words:
    """What all sequences say. decode: one token's text."""

    def __init__(self, engine: Watched, decode: Callable[[int], str]):
        self._engine, self._decode = engine, decode
        self._texts: dict[int, str] = {}
        self._live: dict[int, Sequence] = {}
        self._told: dict[str, tuple[int, list[int]]] = {}  # by name: the sequence that has it, and its tokens
        self._blocks: set[int] = set()  # whose text is told

    def news(self, observer: Observer) -> dict[str, Any]:
        """By the names of `observer`, which has just followed a step. Sequences that ended in it are told of, too."""
        live = self._live_now()
        before, news = self._told, {}
        now = {i: seq for i, seq in {**self._live, **live}.items() if i in observer.names}
        self._told = {}
        for seq_id, seq in now.items():
            name, tokens = observer.names[seq_id], seq.tokens(0, len(seq))
            source, keep = _origin(name, seq_id, tokens, before)
            if seq_id in live:
                self._told[name] = seq_id, tokens
            if source != name or keep < max(len(tokens), len(before[source][1])):
                add = [self._text(token) for token in tokens[keep:]]
                news[name] = {**({"from": source} if source not in (name, None) else {}), "keep": keep, "add": add}
        self._tokens = {seq_id: seq.tokens(0, len(seq)) for seq_id, seq in now.items()}
        self._live = live
        return news

    def blocks(self, plan: StepPlan, known: dict[int, int | None]) -> dict[str, str]:
        """The texts of the blocks that can be found now, and could not before. To be asked after `news`."""
        new = known.keys() - self._blocks
        self._blocks = set(known)
        size, told = self._engine.memory.block_size, {}
        for seq_id, table in self._tables(plan) if new else ():
            tokens = self._tokens.get(seq_id, [])
            for place, block in enumerate(table[: len(tokens) // size]):
                if block in new:
                    new.discard(block)
                    told[str(block)] = "".join(map(self._text, tokens[place * size : (place + 1) * size]))
        return told

    def _live_now(self) -> dict[int, Sequence]:
        scheduler = self._engine.scheduler
        requests = [*scheduler.running, *scheduler.swapped, *scheduler.waiting]
        return {seq.seq_id: seq for request in requests for seq in request.live}

    def _tables(self, plan: StepPlan) -> Iterator[tuple[int, list[int]]]:
        memory = self._engine.memory
        for s in plan.sequences:
            yield (s.seq_id if s.branch_of is None else s.branch_of), s.block_table
        for seq_id in memory.sequences():
            if not memory.is_swapped(seq_id):
                yield seq_id, memory.block_table(seq_id)

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._decode(token)
        return self._texts[token]


def _origin(
    name: str, seq_id: int, tokens: list[int], before: dict[str, tuple[int, list[int]]]
) -> tuple[str | None, int]:
    """Whose tokens it begins with, and how many of them: those that it had; or, if it is new, a relative's."""
    known, had = before.get(name, (None, []))
    if known == seq_id and had == tokens[: len(had)]:
        return name, len(had)
    request = name.rstrip("0123456789")
    relatives = [(_alike(tokens, had), other == name, other) for other, (_, had) in before.items()
                 if other.rstrip("0123456789") == request]  # fmt: skip
    keep, _, source = max(relatives, default=(0, False, None))
    return source, keep


def _alike(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    return next(i for i in range(most) if one[i] != other[i])
