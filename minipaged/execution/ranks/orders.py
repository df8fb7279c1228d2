"""What a rank is told of a step: only what it needs to compute its part, in as few bytes as is simple.

An order is a row of 32-bit numbers: four counts, of what memory moves; the moves; then for each sequence HEADER and its
tokens. Its page table follows only if it isn't the one that the sequence had in the step before. Slots are not told:
they follow from the table. Nor is what will be drawn, by which parameters, or for whom: rank 0 draws.
"""

from array import array
from collections.abc import Iterable

from minipaged.requests.sampling_params import PromptTargets
from minipaged.scheduling.plan import ScheduledSequence, StepPlan

HEADER = (
    "seq_id", "start", "tokens", "table",  # how many blocks; SAME: as before
    "wanted",  # whether the logits behind its last token, and behind its guesses, are
    "guesses", "first target", "targets",
)  # fmt: skip
SAME = -1


class OrderWriter:
    """Keeps the page tables of the last order, as does the reader: each is told once."""

    def __init__(self) -> None:
        self._tables: dict[int, list[int]] = {}

    def write(self, plan: StepPlan) -> bytes:
        """plan: with all guesses appended. Blocks that were freed are told, too; only debug mode needs them."""
        numbers = array("i", (len(plan.swap_out), len(plan.freed), len(plan.swap_in), len(plan.copies)))
        for pairs in (plan.swap_out, plan.swap_in, plan.copies):
            numbers.extend(number for pair in pairs for number in pair)
        numbers.extend(plan.freed)
        for s in plan.sequences:
            table: list[int] = [] if self._tables.get(s.seq_id) is s.block_table else s.block_table
            first, count = (s.targets.start, len(s.targets.token_ids)) if s.targets else (0, 0)
            wanted = bool(s.draw or s.num_candidates)
            size = len(table) if table else SAME
            numbers.extend((s.seq_id, s.start, len(s.token_ids), size, wanted, s.num_drafts, first, count))
            numbers.extend(s.token_ids)
            numbers.extend(table)
        self._tables = {s.seq_id: s.block_table for s in plan.sequences}
        return numbers.tobytes()


class OrderReader:
    """Makes plans of orders. block_size: of the page tables."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self._tables: dict[int, list[int]] = {}

    def read(self, order: bytes) -> StepPlan:
        """The plan, as far as it was told: whose logits are wanted has one candidate, and targets have no tokens."""
        numbers = array("i")
        numbers.frombytes(order)
        given, at = numbers.tolist(), 4

        def take(count: int) -> list[int]:
            nonlocal at
            at += count
            return given[at - count : at]

        out, freed, back, copies = given[:4]
        pairs = [_pairs(take(2 * count)) for count in (out, back, copies)]
        plan = StepPlan(0, pairs[0], take(freed), pairs[1], pairs[2])
        tables: dict[int, list[int]] = {}
        while at < len(given):
            seq_id, start, count, size, wanted, guesses, first, targets = take(len(HEADER))
            tokens = take(count)
            tables[seq_id] = table = self._tables[seq_id] if size == SAME else take(size)
            plan.sequences.append(ScheduledSequence(
                seq_id, "", tokens, start, self._slots(table, range(start, start + count)), table,
                num_candidates=wanted, num_drafts=guesses,
                targets=PromptTargets(first, [0] * targets, 0) if targets else None,
            ))  # fmt: skip
        self._tables = tables
        return plan

    def _slots(self, table: list[int], positions: Iterable[int]) -> list[int]:
        size = self.block_size
        return [table[position // size] * size + position % size for position in positions]


def _pairs(flat: list[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2], strict=True))
