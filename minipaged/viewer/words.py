"""The tokens of sequences as text, while they grow: for each step what is new.

A sequence only ever gets more tokens; but a beam's name may go to another beam, and a sample begins with what its
request has already. So what is new is told as: begin with what `from` had before this step (or this one itself), keep
so many tokens of it, and add these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from minipaged.terminal.snapshot import Observer, request_of

if TYPE_CHECKING:
    from minipaged.requests.sequence import Sequence
    from minipaged.scheduling.plan import StepOutput, StepPlan
    from minipaged.viewer.state import Watched

News = dict[str, Any]  # by name: {"from": ..., "keep": ..., "add": [...]}
MOST_PIECES = 4  # tokens, of one character: bytes at the least
NOTHING = "\ufffd"  # what decoders say of bytes that are no character


class Told(NamedTuple):
    """What is known of a name: whose it is, and how many of its tokens were told. Tokens that were told stay."""

    seq: Sequence
    length: int

    @property
    def output(self) -> list[int]:
        return self.seq.output_token_ids[: self.length - len(self.seq.prompt_token_ids)]


class Words:
    """What all sequences say. decode: the text of tokens."""

    def __init__(self, engine: Watched, decode: Callable[[list[int]], str]):
        self._engine, self._decode = engine, decode
        self._texts: dict[int, str] = {}
        self._told: dict[str, Told] = {}
        self._now: dict[int, Sequence] = {}  # those that lived before the last step, or after it
        self._before: dict[int, int] = {}  # how many tokens they had before it
        self._blocks: set[int] = set()  # whose text is told

    def news(self, observer: Observer) -> News:
        """By the names of `observer`, which has just followed a step. Sequences that ended in it are told of, too."""
        before, live = self._told, self._live_now()
        names = {told.seq: name for name, told in before.items()}
        self._before = {told.seq.seq_id: told.length for told in before.values()}
        self._told = {}
        news: News = {}
        self._now = {seq.seq_id: seq for seq in [*names, *observer.ended, *live]}
        for seq in live:
            self._told[observer.names[seq.seq_id]] = Told(seq, len(seq))
        for seq in observer.ended:
            self._tell(names.get(seq, observer.names[seq.seq_id]), seq, before, news)
        for seq in live:
            self._tell(observer.names[seq.seq_id], seq, before, news)
        return news

    def _tell(self, name: str, seq: Sequence, before: dict[str, Told], news: News) -> None:
        source, keep = _origin(name, seq, before)
        if source != name or keep < max(len(seq), before[name].length):
            context = min(keep, MOST_PIECES - 1)
            tokens = seq.tokens(keep - context, len(seq) - keep + context)
            add = [self._text(tokens, place) for place in range(context, len(tokens))]
            news[name] = {**({"from": source} if source not in (name, None) else {}), "keep": keep, "add": add}

    def blocks(self, plan: StepPlan, output: StepOutput, known: dict[int, int | None]) -> dict[str, str]:
        """The texts of the blocks that can be found now, and could not before, or hold something else than before.

        To be asked after `news`.
        """
        size, told = self._engine.memory.block_size, dict[str, str]()
        written = {slot // size for s in plan.sequences for slot in s.slots} | {block for _, block in plan.swap_in}
        written.update(*(load.blocks for load in plan.loads))
        new = known.keys() - (self._blocks - written)
        self._blocks = set(known)
        for seq_id, table in self._tables(plan) if new else ():
            tokens = self._computed(seq_id, output)
            for place, block in enumerate(table[: len(tokens) // size]):
                if block in new:
                    new.discard(block)
                    told[str(block)] = self._decode(tokens[place * size : (place + 1) * size])
        return told

    def _computed(self, seq_id: int, output: StepOutput) -> list[int]:
        """The tokens of a sequence. Subtle: of one that a stop string ended, also what was drawn behind its end."""
        seq = self._now.get(seq_id)
        if seq is None:
            return []
        tokens = seq.tokens(0, len(seq))
        if seq.finish_reason is None or seq_id not in self._before or seq_id not in output.tokens:
            return tokens
        return tokens + [token.token_id for token in output.tokens[seq_id][0][len(seq) - self._before[seq_id] :]]

    def _live_now(self) -> list[Sequence]:
        scheduler = self._engine.scheduler
        return [seq for queue in scheduler.queues.lists() for request in queue for seq in request.live]

    def _tables(self, plan: StepPlan) -> Iterator[tuple[int, list[int]]]:
        memory = self._engine.memory
        for s in plan.sequences:
            yield (s.seq_id if s.branch_of is None else s.branch_of), s.block_table
        for seq_id in memory.sequences():
            if not memory.is_swapped(seq_id):
                yield seq_id, memory.block_table(seq_id)

    def _text(self, tokens: list[int], place: int) -> str:
        """Of one token. Where tokens are pieces of a character, the last one says it, and the others are NOTHING."""
        token = tokens[place]
        if token not in self._texts:
            self._texts[token] = self._decode([token])
        for first in range(place - 1, max(-1, place - MOST_PIECES), -1) if NOTHING in self._texts[token] else ():
            if NOTHING not in (text := self._decode(tokens[first : place + 1])):
                return text
        return self._texts[token]


def _origin(name: str, seq: Sequence, before: dict[str, Told]) -> tuple[str | None, int]:
    """Whose tokens it begins with, and how many of them: those that it had; or, if it is new, a relative's."""
    if name in before and before[name].seq is seq:
        return name, min(before[name].length, len(seq))
    request, prompt = request_of(name), len(seq.prompt_token_ids)
    relatives = [(prompt + _alike(seq.output_token_ids, told.output), other == name, other)
                 for other, told in before.items() if request_of(other) == request]  # fmt: skip
    keep, _, source = max(relatives, default=(0, False, None))
    return source, keep


def _alike(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    return next(i for i in range(most) if one[i] != other[i])


def read_on(words: dict[str, list[str]], news: News) -> dict[str, list[str]]:
    """All words after a step, given those before it.

    >>> read_on({"A1": ["the", "sky"]}, {"A1": {"keep": 2, "add": ["is"]}, "A2": {"from": "A1", "keep": 1, "add": []}})
    {'A1': ['the', 'sky', 'is'], 'A2': ['the']}
    """
    return words | {
        name: [*words.get(new.get("from", name), [])[: new["keep"]], *new["add"]] for name, new in news.items()
    }


def news_of_both(first: News, second: News) -> News:
    """What is new after two steps.

    >>> news_of_both({"A": {"keep": 3, "add": ["x", "y"]}}, {"B": {"from": "A", "keep": 4, "add": ["z"]}})["B"]
    {'from': 'A', 'keep': 3, 'add': ['x', 'z']}
    """
    both = dict(first)
    for name, new in second.items():
        source = new.get("from", name)
        old = first.get(source, {"from": source, "keep": new["keep"], "add": []})
        keep, origin = min(new["keep"], old["keep"]), old.get("from", source)
        add = [*old["add"][: new["keep"] - keep], *new["add"]]
        both[name] = {**({"from": origin} if origin != name else {}), "keep": keep, "add": add}
    return both
