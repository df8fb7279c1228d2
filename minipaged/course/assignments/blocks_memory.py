"""Assignment 2, sequences in memory: a judge with a memory of its own, in which every slot holds a token.

The student's answers are carried out: copies, moves, and then the new tokens are written. What a sequence reads
through its page table must be its own tokens from the beginning. How much memory is in use, and who shares what, must
be as in the reference; which blocks are taken is the student's choice.
"""

from collections import Counter
from typing import Any

from minipaged.course.assignment import Case, Failure
from minipaged.course.assignments.blocks_pool import plainly, raised
from minipaged.course.assignments.blocks_words import draw_memory, in_words
from minipaged.course.inside.observe import outcome, plain
from minipaged.memory import Allocated, Appended, HashCache, KVCacheManager, blocks_for

Contents = tuple[int, ...]  # of a slot: a token, and all before it, since its keys and values depend on them
JUNK: Contents = ()


class Reference:
    """The reference, doing what a case says."""

    def __init__(self, case: Case):
        cache = HashCache(case["block_size"]) if case["cached"] else None
        self.memory = KVCacheManager(case["num_blocks"], case["block_size"], case["num_cpu_blocks"], None, cache)
        self.tokens: dict[int, list[int]] = {}
        self.shadow = Shadow(case["block_size"])

    def do(self, op: list[Any]) -> dict[str, Any]:
        """What can be seen afterwards. num_found: blocks in which the tokens of a new sequence stand already."""
        name, *arguments = op
        finds = name == "allocate" and op[4] is not None
        num_found = len(self.memory.find(op[2], *op[4]).blocks) if finds else 0
        answer = outcome(getattr(self, f"_{name}"), *arguments)
        seen = {
            "answer": answer, "tables": self.tables(), "freed": self.memory.take_freed(),
            "idle": self.memory.idle_blocks(), "num_found": num_found, "usage": plain(self.memory.usage()),
        }  # fmt: skip
        self.shadow.carry_out(op, seen, self.tokens, num_found)
        return seen

    def _allocate(self, seq_id: int, tokens: list[int], keep_free: int, salt: list[str] | None) -> Any:
        prefix = self.memory.find(tokens, *salt) if salt is not None else None
        answer = self.memory.allocate(seq_id, len(tokens), keep_free, prefix)
        if isinstance(answer, Allocated):
            self.tokens[seq_id] = tokens
        return answer

    def _allocate_less(self, seq_id: int, tokens: list[int]) -> Any:
        prefix = self.memory.find(tokens)
        return self.memory.allocate(seq_id, prefix.num_tokens - 1, 0, prefix) if prefix.blocks else None

    def _shrink(self, growing: list[tuple[int, int]]) -> Any:
        return self.memory.append(dict(growing))

    def _append(self, growing: list[tuple[int, list[int]]], keep_free: int) -> Any:
        answer = self.memory.append({seq_id: len(tokens) for seq_id, tokens in growing}, keep_free)
        if isinstance(answer, Appended):
            for seq_id, tokens in growing:
                self.tokens[seq_id] = self.tokens[seq_id] + tokens
        return answer

    def _fork(self, parent: int, child: int) -> None:
        self.memory.fork(parent, child)
        self.tokens[child] = self.tokens[parent]

    def _free(self, seq_id: int) -> None:
        self.memory.free(seq_id)

    def _publish(self, seq_id: int) -> None:
        tokens = self.tokens.get(seq_id, [])
        self.memory.publish(seq_id, len(tokens), lambda start, count: tokens[start : start + count])

    def _swap_out(self, seq_ids: list[int]) -> Any:
        return self.memory.swap_out(seq_ids)

    def _swap_in(self, seq_ids: list[int], keep_free: int) -> Any:
        return self.memory.swap_in(seq_ids, keep_free, self.tokens)

    def tables(self) -> list[list[Any]]:
        memory = self.memory
        return [[seq_id, memory.is_swapped(seq_id), memory.block_table(seq_id)] for seq_id in memory.sequences()]


class Shadow:
    """What stands in the slots of the student's blocks, if their answers are carried out."""

    def __init__(self, block_size: int):
        self.size = block_size
        self.pools: dict[bool, dict[int, list[Contents]]] = {False: {}, True: {}}  # swapped -> block -> slots
        self.tables: dict[int, tuple[bool, list[int]]] = {}
        self.length: dict[int, int] = {}  # tokens that were written by then

    def block(self, swapped: bool, number: int) -> list[Contents]:
        return self.pools[swapped].setdefault(number, [JUNK] * self.size)

    def carry_out(self, op: list[Any], seen: dict[str, Any], tokens: dict[int, list[int]], num_found: int) -> None:
        """Swap-outs, junk into freed blocks, swap-ins, copies, and then the new tokens.

        num_found: the first blocks of a new sequence of which it is said that they hold its tokens already.
        """
        answer = seen["answer"] if isinstance(seen["answer"], dict) else {}
        before = {number: list(slots) for number, slots in self.pools[False].items()}
        for number in seen["freed"]:
            self.pools[False][number] = [JUNK] * self.size
        for source, target in answer.get("moves", ()):
            out = op[0] == "swap_out"
            self.pools[out][target] = list(before.get(source, [JUNK] * self.size) if out else self.block(True, source))
        copied = [(target, list(self.block(False, source))) for source, target in answer.get("copies", ())]
        self.pools[False] |= dict(copied)
        self.tables = {seq_id: (swapped, blocks) for seq_id, swapped, blocks in seen["tables"]}
        self._write(op, answer, tokens, num_found)

    def _write(self, op: list[Any], answer: dict[str, Any], tokens: dict[int, list[int]], num_found: int) -> None:
        if op[0] == "allocate" and answer.get("is") == "Allocated":
            self.length[op[1]] = num_found * self.size
        if op[0] == "fork" and op[2] in self.tables:
            self.length.setdefault(op[2], self.length.get(op[1], 0))
        for seq_id, (swapped, blocks) in self.tables.items():
            own = tokens[seq_id]
            for position in range(self.length.get(seq_id, 0), len(own)):
                if position // self.size < len(blocks):
                    block = self.block(swapped, blocks[position // self.size])
                    block[position % self.size] = tuple(own[: position + 1])
            self.length[seq_id] = len(own)
        self.length = {seq_id: length for seq_id, length in self.length.items() if seq_id in self.tables}

    def read(self, seq_id: int, position: int) -> Contents:
        swapped, blocks = self.tables[seq_id]
        return self.block(swapped, blocks[position // self.size])[position % self.size]


def judge_memory(case: Case, answer: Any) -> Failure | None:
    reference, shadow = Reference(case), Shadow(case["block_size"])
    for op, seen in zip(case["ops"], answer, strict=True):
        expected = reference.do(op)
        picture = draw_memory(case, shadow)
        failure = _judge_answer(seen["answer"], expected["answer"])
        if not failure:
            shadow.carry_out(op, seen, reference.tokens, expected["num_found"])
            failure = _judge_state(case, seen, shadow, expected, reference)
            picture = draw_memory(case, shadow, seen["ref_count"])
        if failure:
            return Failure(f"`{in_words(op)}`: {failure.what}", failure.expected, failure.got, picture)
    return None


def _judge_answer(got: Any, expected: Any) -> Failure | None:
    """Its kind, the numbers of a refusal, how many copies and moves."""
    wrong = Failure("a wrong answer", plainly(expected), plainly(got))
    if raised(expected):
        same = raised(got) == raised(expected)
        return None if same else Failure("a wrong answer", expected["raised"], plainly(got))
    if not isinstance(expected, dict) or not isinstance(got, dict):
        return None if got == expected else wrong
    if got.get("is") != expected["is"] or (expected["is"] == "NoSpace" and got != expected):
        return wrong
    for name in ("copies", "moves"):
        pairs = got.get(name, [])
        if len(pairs) != len(expected.get(name, [])):
            return Failure(f"{len(pairs)} {name} instead of {len(expected[name])}", plainly(expected), plainly(got))
        if name == "copies" and {source for source, _ in pairs} & {target for _, target in pairs}:
            return Failure("a block is source and target of copies", "no block that is both", plainly(got))
    return None


def _judge_state(
    case: Case, seen: dict[str, Any], shadow: Shadow, expected: dict[str, Any], reference: Reference
) -> Failure | None:
    living, right = _living(seen["tables"]), _living(expected["tables"])
    if living != right:
        return Failure("there are other sequences", right, living)
    return (
        _judge_contents(case, seen, shadow, reference.tokens)
        or _judge_counts(seen)
        or _judge_sharing(seen, expected)
        or _judge_idle(seen, shadow, expected, reference.shadow)
        or _judge_account(seen, expected)
    )


def _living(tables: list[list[Any]]) -> str:
    return ", ".join(f"{seq_id}{' (swapped)' if swapped else ''}" for seq_id, swapped, _ in sorted(tables))


def _judge_contents(
    case: Case, seen: dict[str, Any], shadow: Shadow, tokens: dict[int, list[int]]
) -> Failure | None:
    """Every sequence reads its own tokens."""
    for (seq_id, _, blocks), num_tokens in zip(seen["tables"], seen["num_tokens"], strict=True):
        own = tokens[seq_id]
        if num_tokens != len(own):
            return Failure(f"sequence {seq_id} has a wrong number of tokens", str(len(own)), str(num_tokens))
        needed = blocks_for(len(own), case["block_size"])
        if len(blocks) != needed:
            what = f"sequence {seq_id} has {len(own)} tokens, and a page table of a wrong length"
            return Failure(what, f"{needed} blocks", str(blocks))
        for position in range(len(own)):
            if (got := shadow.read(seq_id, position)) != tuple(own[: position + 1]):
                what = f"sequence {seq_id} reads a wrong token at position {position}"
                return Failure(what, str(own[position]), _token(got, own[position]))
    return None


def _token(contents: Contents, own: int) -> str:
    if not contents:
        return "junk: nothing was written there, or it was freed since"
    return f"{contents[-1]}" + (", behind other tokens" if contents[-1] == own else "")


def _judge_counts(seen: dict[str, Any]) -> Failure | None:
    """A count is the number of page tables that name the block."""
    holders = Counter(block for _, swapped, blocks in seen["tables"] if not swapped for block in blocks)
    for block, count in enumerate(seen["ref_count"]):
        if count != holders[block]:
            what = f"block {block} has a reference count of {count}, and stands in {holders[block]} page tables"
            return Failure(what, str(holders[block]), str(count))
    return None


def _judge_sharing(seen: dict[str, Any], expected: dict[str, Any]) -> Failure | None:
    """The same blocks are shared, if those of one side are given the names of the other."""
    own = {seq_id: blocks for seq_id, _, blocks in seen["tables"]}
    pairs = {
        (swapped, ours, theirs)
        for seq_id, swapped, blocks in expected["tables"]
        for ours, theirs in zip(blocks, own[seq_id], strict=True)
    }
    if len(pairs) == len({pair[:2] for pair in pairs}) == len({pair[::2] for pair in pairs}):
        return None
    right = "; ".join(f"{seq_id}: {blocks}" for seq_id, _, blocks in sorted(expected["tables"]))
    got = "; ".join(f"{seq_id}: {blocks}" for seq_id, blocks in sorted(own.items()))
    return Failure("other blocks are shared than should be", f"as here, under any numbers: {right}", got)


def _judge_idle(
    seen: dict[str, Any], shadow: Shadow, expected: dict[str, Any], right: Shadow
) -> Failure | None:
    """What can be found again, in the order in which it will be evicted: each block by its last token."""
    holds = [shadow.block(False, block)[-1] for block in seen["idle"]]
    should = [right.block(False, block)[-1] for block in expected["idle"]]
    if holds == should:
        return None
    what = "the idle blocks are wrong. Here they are by the last token in each; the first is the next to be evicted"
    return Failure(what, str([one[-1] for one in should]), str([one[-1] if one else "junk" for one in holds]))


def _judge_account(seen: dict[str, Any], expected: dict[str, Any]) -> Failure | None:
    if len(set(seen["freed"])) != len(seen["freed"]) or len(expected["freed"]) != len(seen["freed"]):
        what = "take_freed doesn't name the blocks whose contents were lost, each once"
        return Failure(what, f"{len(expected['freed'])} blocks", str(seen["freed"]))
    if seen["changed"]:
        what = "a page table that was handed out earlier has been changed"
        return Failure(what, "a new list in table.blocks; the old one as it was", "the old list, with other numbers")
    for name, value in expected["usage"].items():
        if name != "peak_used" and seen["usage"][name] != value:  # that one is the allocator's
            return Failure(f"usage().{name} is wrong", str(value), str(seen["usage"][name]))
    return None
