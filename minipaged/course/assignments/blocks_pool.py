"""Assignment 2, the allocator: a judge that follows the student's choice of blocks, and pictures.

An operation names a block by when it was handed out, ["nth", 0] is the first one, or by its number, ["block", 5].
"""

from dataclasses import dataclass, field
from typing import Any

from minipaged.course.assignment import Case, Failure

Named = list[Any]
MISUSE = "MisuseError"
MOST_LINES = 200  # of Python, for one operation on one block, however large the pool is


def no_space(needed: int, free: int) -> dict[str, Any]:
    return {"is": "NoSpace", "needed": needed, "free": free}


@dataclass
class PoolModel:
    """What must be true of a pool. It has no free list: it says what is allowed, and goes on with what was chosen."""

    num_blocks: int
    order: list[int]  # of the first blocks to be handed out
    known: set[int] = field(default_factory=set)
    idle: list[int] = field(default_factory=list)
    freed: set[int] = field(default_factory=set)
    handed_out: list[int] = field(default_factory=list)
    peak_used: int = 0  # as it was after any `allocate`; some count what a `share` wakes, too:
    most_used: int = 0
    num_evicted: int = 0
    fresh: bool = True  # no block came back yet

    def __post_init__(self) -> None:
        self.counts = [0] * self.num_blocks

    def seen(self) -> dict[str, Any]:
        used = sum(count > 0 for count in self.counts)
        return {
            "ref_count": list(self.counts), "num_free": self.num_blocks - used, "num_idle": len(self.idle),
            "num_used": used, "num_shared": sum(count > 1 for count in self.counts), "peak_used": self.peak_used,
            "num_evicted": self.num_evicted, "idle": list(self.idle), "known": sorted(self.known),
        }  # fmt: skip

    def unused(self) -> set[int]:
        return {block for block, count in enumerate(self.counts) if not count} - set(self.idle)

    def block(self, named: Named) -> int | None:
        how, number = named
        if how == "block":
            return int(number)
        return self.handed_out[number] if number < len(self.handed_out) else None

    def has_contents(self, block: int) -> bool:
        return 0 <= block < self.num_blocks and (self.counts[block] > 0 or block in self.idle)

    def step(self, op: list[Any], got: Any) -> str | None:
        """What the answer should have been, if it was wrong. Otherwise the model has taken the step."""
        name, *arguments = op
        if name == "allocate":
            count, keep_free, found = arguments
            return self._allocate(count, keep_free, found, got)
        if name == "take_freed":
            expected, self.freed = sorted(self.freed), set()
            right = isinstance(got, list) and sorted(got) == expected
            return None if right else f"{expected} in any order"
        if name == "forget_all":
            self._drop(self.idle)
            self.idle, self.known = [], set()
            return None if got is None else "None"
        block = self.block(arguments[0])
        if block is None or name == "know":
            if block is not None and self.counts[block]:
                self.known.add(block)
            return None
        allowed = self.has_contents(block) if name == "share" else self.has_contents(block) and self.counts[block] > 0
        if not allowed:
            return None if raised(got) == MISUSE else MISUSE
        self._share(block) if name == "share" else self._release(block)
        return None if got is None else "None"

    def _share(self, block: int) -> None:
        if block in self.idle:
            self.idle.remove(block)
        self.counts[block] += 1
        self.most_used = max(self.most_used, sum(map(bool, self.counts)))

    def _release(self, block: int) -> None:
        self.counts[block] -= 1
        self.fresh = False
        if not self.counts[block] and block in self.known:
            self.idle.append(block)
        elif not self.counts[block]:
            self._drop([block])

    def _drop(self, blocks: list[int]) -> None:
        self.freed.update(blocks)

    def _allocate(self, count: int, keep_free: int, names: list[Named], got: Any) -> str | None:
        found = [block for name in names if (block := self.block(name)) is not None]
        if len(found) < len(names):
            return None
        if count < 0 or keep_free < 0 or not all(map(self.has_contents, found)):
            return None if raised(got) == MISUSE else MISUSE
        unused, taken = self.unused(), count + sum(block in self.idle for block in found)
        free = len(unused) + len(self.idle)
        if taken and taken + keep_free > free:
            refusal = no_space(taken + keep_free, free)
            return None if got == refusal else plainly(refusal)
        evicted = [block for block in self.idle if block not in found][: max(0, count - len(unused))]
        if wrong := self._wrong_choice(count, unused, evicted, got):
            return wrong
        for block in found:
            self._share(block)
        for block in got:
            self.counts[block] = 1
        self.idle = [block for block in self.idle if block not in evicted]
        self.known -= set(evicted)
        self._drop(evicted)
        self.num_evicted += len(evicted)
        self.handed_out += got
        self.order = [block for block in self.order if block not in got]
        self.peak_used = max(self.peak_used, sum(map(bool, self.counts)))
        self.most_used = max(self.most_used, self.peak_used)
        return None

    def _wrong_choice(self, count: int, unused: set[int], evicted: list[int], got: Any) -> str | None:
        if self.fresh and got != self.order[:count]:
            return f"{self.order[:count]}: until the first block comes back, they go in the order of the beginning"
        right = isinstance(got, list) and len(got) == len(set(got)) == count and set(got) <= unused | set(evicted)
        if right and set(evicted) <= set(got):
            return None
        rest = f", and the longest idle: {evicted}" if evicted else ""
        return f"different blocks, {count} in number, of the free ones {sorted(unused)}{rest}"


def raised(got: Any) -> str | None:
    return got.get("raised") if isinstance(got, dict) else None


def plainly(answer: Any) -> str:
    """An answer as a student would see it."""
    if isinstance(answer, dict) and "raised" in answer:
        return f"{answer['raised']}: {answer.get('said', '')}"
    if isinstance(answer, dict) and "is" in answer:
        return f"{answer['is']}({', '.join(f'{key}={value}' for key, value in answer.items() if key != 'is')})"
    return str(answer)


def judge_pool(case: Case, answer: Any) -> Failure | None:
    if "cost" in case:
        return _judge_cost(case, answer)
    rest = [block for block in range(case["num_blocks"]) if block not in case["free_order"]]
    model = PoolModel(case["num_blocks"], case["free_order"] + rest)
    for op, after in zip(case["ops"], answer, strict=True):
        before, words = model.seen(), in_words(op, model)
        if wrong := model.step(op, after["answer"]):
            return Failure(f"`{words}` gave a wrong answer", wrong, plainly(after["answer"]), draw_pool(before))
        expected = model.seen()
        for name, value in expected.items():
            if name == "peak_used" and value <= after[name] <= model.most_used:
                continue
            if after[name] != value:
                what = "the cache knows" if name == "known" else name
                text = f"after `{words}`, {what} is wrong"
                return Failure(text, str(value), str(after[name]), draw_pool(expected))
    return None


def _judge_cost(case: Case, answer: Any) -> Failure | None:
    for name, lines in answer.items():
        if lines > MOST_LINES:
            what = f"{name} of one block runs {lines} lines of Python in a pool of {case['cost']} blocks"
            return Failure(what, f"O(1): no more than {MOST_LINES}, however many blocks there are", str(lines))
    return None


def draw_pool(seen: dict[str, Any]) -> str:
    """How the pool stands."""
    def state(block: int, count: int) -> str:
        return str(count) if count else "idle" if block in seen["idle"] else "."

    rows = [("block", range(len(seen["ref_count"])))]
    marks = [state(block, count) for block, count in enumerate(seen["ref_count"])]
    lines = [f"{name:6}" + "".join(f"{one:>5}" for one in list(row)[:14]) for name, row in (*rows, ("holds", marks))]
    return "\n".join([*lines, "holds: the reference count; . free; idle: free, but it can be found again"])


def in_words(op: list[Any], model: PoolModel | None = None) -> str:
    """The call as it would be written; with a model, with the numbers of the blocks."""
    def one(named: Named) -> str:
        number = model.block(named) if model else named[1] if named[0] == "block" else None
        return str(number) if number is not None else f"b{named[1] + 1}"

    name, *arguments = op
    if name == "allocate":
        count, keep_free, found = arguments
        extra = f", keep_free={keep_free}" if keep_free else ""
        extra += f", found=[{', '.join(map(one, found))}]" if found else ""
        return f"allocate({count}{extra})"
    if name == "know":
        return f"the cache learns block {one(arguments[0])}"
    return f"{name}({', '.join(map(one, arguments))})"


def show_pool(case: Case) -> str:
    if "cost" in case:
        return f"a pool of {case['cost']} blocks, all taken, and a third of them released; then single operations"
    order = f", free_order={case['free_order']}" if case["free_order"] else ""
    cache = "with" if case["cached"] else "without"
    names = "; b1, b2, ... are the blocks as they are handed out" if "nth" in str(case["ops"]) else ""
    first = f"pool = BlockAllocator({case['num_blocks']}{order}), {cache} a cache{names}"
    return "\n".join([first, *(f"  {in_words(op)}" for op in case["ops"])])
