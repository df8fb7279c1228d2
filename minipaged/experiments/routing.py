"""Which replica gets a request? The router's own policies (routing/policies.py), with 1 to 1,000 replicas, on a trace.

A trace says when prompts came, how long they were, and which blocks of 512 tokens they have in common with others. A
replica is simpler here than in serving.py, since a thousand of them are to be answered within minutes: it computes
prompts one after another, as they come, and what its prefix cache has of them is copied from host memory instead.
So all that is to be known of a request is known when it comes:

    begins   when the replica is through with the prompts before it
    first    then so many steps for what was not found, each slowed by the answers that are under way
    end      then so many tokens, each as long as a step with the answers of that moment

More replicas get more copies of the trace: see `scaled`.
"""

from __future__ import annotations

import json
import math
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush, merge
from itertools import takewhile
from pathlib import Path
from random import Random
from statistics import mean
from typing import NamedTuple

from minipaged.experiments.hardware import PCIE, SERVERS
from minipaged.experiments.loads import TraceError
from minipaged.experiments.machine import Machine
from minipaged.experiments.policies import POLICIES

PIECE = 512  # tokens of a block of the trace
TICK = 3.0  # seconds: the trace tells times no nearer, and its requests are spread over them
STEP = 2048  # tokens of a prompt that a replica computes in a step
POOLS = {"gpu": 56e9, "host": 56e9 + 256e9}  # bytes: of an H100, and with an eighth of the host's 2 TB
NO_END = 1 << 60


class Prompt(NamedTuple):
    """A request of a trace. blocks: its prompt's, the last one may not be full; equal ones are equal beginnings."""

    when: float  # seconds
    tokens: int
    output: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """What is tried. rate: requests a second for each replica. pool: of POOLS. beginning: pieces that are hashed.

    burst: in every minute all requests come within so much of it. fixed: the trace as it is, however many replicas.
    """

    policy: str
    replicas: int
    rate: float = 1.0
    pool: str = "host"
    beginning: int = 2
    burst: float = 1.0
    fixed: bool = False
    warm: float = 150.0  # seconds until what happens counts
    counted: float = 100.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What came of it, of the requests that count.

    found: share of the prompts' tokens that was in memory. balance: the busiest replica's seconds of computing prompts
    by the mean. p50, p99: seconds to the first token.
    """

    found: float
    balance: float
    p50: float
    p99: float
    busy: float  # share of the time in which a replica computes prompts, mean
    requests: int
    seconds: float  # that a processor needed for all this


# --- the trace ------------------------------------------------------------------------------------------------------


def read_blocks(path: Path) -> list[Prompt]:
    """A Mooncake trace: one JSON object a line with timestamp (ms), input_length, output_length and hash_ids."""
    found: list[Prompt] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise TraceError(f"{path} is no text; one JSON object a line is wanted, {EXAMPLE}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_read(json.loads(line)))
                if found[-1].when < found[max(0, len(found) - 2)].when:
                    raise ValueError("timestamps must not fall")
            except (ValueError, RecursionError) as error:
                raise TraceError(f"{path}, line {number}: {error}") from None
    if not found or found[-1].when <= 0:
        raise TraceError(f"{path}: no requests, or all at once; one JSON object a line is wanted, {EXAMPLE}")
    return found


EXAMPLE = '{"timestamp": 3000, "input_length": 700, "output_length": 20, "hash_ids": [0, 1]}'


def _read(line: object) -> Prompt:
    if not isinstance(line, dict) or not {"timestamp", "input_length", "output_length", "hash_ids"} <= line.keys():
        raise ValueError(f"an object such as {EXAMPLE} is wanted")
    when, tokens, output, blocks = (line[key] for key in ("timestamp", "input_length", "output_length", "hash_ids"))
    if type(when) not in (int, float) or not 0 <= when < math.inf:
        raise ValueError(f"timestamp must be a number of milliseconds, not {json.dumps(when)}")
    for name, value in (("input_length", tokens), ("output_length", output)):
        if type(value) is not int or not 1 <= value < NO_END:
            raise ValueError(f"{name} must be a number of tokens from 1 on, not {json.dumps(value)}")
    wanted = -(-tokens // PIECE)
    if not isinstance(blocks, list) or len(blocks) != wanted or any(type(block) is not int for block in blocks):
        raise ValueError(f"hash_ids must be {wanted} numbers, one for each {PIECE} tokens of {tokens}")
    return Prompt(when / 1e3, tokens, output, tuple(blocks))


def scaled(trace: Sequence[Prompt], case: Case) -> Iterator[Prompt]:
    """So many requests that each replica has its rate, whatever their number, in the order of arrival.

    Each copy of the trace is other people: it begins anywhere in it, and its blocks are its own, but for those that
    all requests have in common. Of the last copy only some conversations are there: requests with the same second
    block.
    """
    seconds, random = case.warm + case.counted, Random(case.seed)
    length = trace[-1].when + TICK
    copies = 1.0 if case.fixed else case.rate * case.replicas * length / len(trace)
    common = set.intersection(*(set(one.blocks) for one in trace))
    size = 1 + max(max(one.blocks) for one in trace)
    parts = []
    for number in range(math.ceil(copies)):
        start = random.uniform(0, max(0.0, length - seconds))
        part = _part(trace, start, seconds, min(1.0, copies - number), Random(f"{case.seed} {number}"))
        parts.append(_salted(part, number * size, common))
    for one in merge(*parts, key=lambda one: one.when):
        yield one._replace(when=60 * (one.when // 60) + one.when % 60 * case.burst)


def _part(trace: Sequence[Prompt], start: float, seconds: float, share: float, random: Random) -> list[Prompt]:
    """The requests of so many seconds, from 0 on, spread within their ticks."""
    chosen: dict[int, bool] = {}
    found = []
    for one in trace:
        when = one.when - start + random.random() * TICK
        block = one.blocks[min(1, len(one.blocks) - 1)]
        if 0 <= when < seconds and (share == 1 or chosen.setdefault(block, random.random() < share)):
            found.append(one._replace(when=when))
    return sorted(found, key=lambda one: one.when)


def _salted(part: Sequence[Prompt], salt: int, common: set[int]) -> Iterator[Prompt]:
    """One by one, so that only those on their way take memory."""
    for one in part:
        yield one._replace(blocks=tuple(block if block in common else block + salt for block in one.blocks))


# --- replicas -------------------------------------------------------------------------------------------------------


class Blocks:
    """The blocks in the memory of a replica; who was not used for longest goes first."""

    def __init__(self, capacity: int):
        self._capacity, self._blocks = capacity, OrderedDict[int, None]()

    def use(self, blocks: Sequence[int]) -> int:
        """How many of them, from the beginning on, are there; from now on all are."""
        held = self._blocks
        found = sum(1 for _ in takewhile(held.__contains__, blocks))
        for block in reversed(blocks):  # so that ends go before beginnings do
            held[block] = None
            held.move_to_end(block)
        while len(held) > self._capacity:
            held.popitem(last=False)
        return found


@dataclass
class Replica:
    """One engine. Times in seconds."""

    machine: Machine
    cache: Blocks
    free: float = 0.0  # when it is through with all prompts that it has
    context: int = 0  # tokens of the answers under way
    ends: list[tuple[float, int]] = field(default_factory=list)  # a heap: when they are over, and their tokens

    def answer(self, one: Prompt) -> tuple[int, float, float, float]:
        """Tokens found; when it begins, has its first token, and ends."""
        machine, begins = self.machine, max(one.when, self.free)
        while self.ends and self.ends[0][0] <= begins:
            self.context -= heappop(self.ends)[1]
        found = min(self.cache.use(one.blocks) * PIECE, one.tokens - 1)
        first = begins + self._prompt_seconds(one.tokens, found)
        self.free = first
        batch, tokens = len(self.ends) + 1, one.tokens + one.output
        self.context += tokens
        end = first + (one.output - 1) * machine.seconds(batch, batch, self.context, 0)
        heappush(self.ends, (end, tokens))
        return found, begins, first, end

    def _prompt_seconds(self, tokens: int, found: int) -> float:
        machine, batch, fresh = self.machine, len(self.ends), tokens - found
        steps = -(-fresh // STEP)
        copied = found * machine.server.kv_bytes / PCIE
        answers = batch * machine.per_token + self.context * machine.per_context
        beside = machine.step + (batch + 1) * machine.host + answers
        pairs = fresh * (found + tokens) / 2
        products = max(fresh * machine.per_token, steps * machine.reading)
        return copied + steps * beside + products + pairs * machine.per_pair


# --- many of them ---------------------------------------------------------------------------------------------------

MACHINE = Machine(SERVERS["llama"])


def run(case: Case, trace: Sequence[Prompt], machine: Machine = MACHINE) -> Answer:
    """Let all requests come. The load of a request, for the policies, is its prompt, in mean prompts."""
    started = time.process_time()
    capacity = int(POOLS[case.pool]) // (PIECE * machine.server.kv_bytes)
    policy = POLICIES[case.policy](capacity, case.beginning)
    everything = Blocks(NO_END)
    replicas = {}
    for number in range(case.replicas):
        cache = everything if case.policy == "shared" else Blocks(capacity)
        replicas[str(number)] = Replica(machine, cache)
        policy.add(str(number))
    under_way: list[tuple[float, str, float]] = []  # a heap: until when, where, how much
    usual = mean(one.tokens for one in trace)
    tally = Tally(case.warm)
    for one in scaled(trace, case):
        while under_way and under_way[0][0] <= one.when:
            _, name, load = heappop(under_way)
            policy.end(name, load)
        load = one.tokens / usual
        chosen = policy.choose(one.blocks, load)
        assert chosen is not None, "all of them live"
        policy.begin(chosen, one.blocks, load)
        found, begins, first, end = replicas[chosen].answer(one)
        heappush(under_way, (end, chosen, load))
        tally.add(one, chosen, found, begins, first)
    return tally.answer(case, time.process_time() - started)


class Tally:
    """What is counted of requests that come from second `warm` on."""

    def __init__(self, warm: float):
        self._warm, self._found, self._tokens = warm, 0, 0
        self._waits: list[float] = []
        self._busy: dict[str, float] = {}

    def add(self, one: Prompt, replica: str, found: int, begins: float, first: float) -> None:
        if one.when >= self._warm:
            self._found += found
            self._tokens += one.tokens
            self._waits.append(first - one.when)
            self._busy[replica] = self._busy.get(replica, 0.0) + first - begins

    def answer(self, case: Case, seconds: float) -> Answer:
        waits, count, busy = sorted(self._waits), len(self._waits), self._busy.values()
        if not count:
            raise ValueError(f"no request comes from second {case.warm:g} on")
        usual = sum(busy) / case.replicas
        return Answer(
            self._found / self._tokens, max(busy) / usual, waits[count // 2], waits[min(count - 1, count * 99 // 100)],
            usual / case.counted, count, seconds,
        )  # fmt: skip
