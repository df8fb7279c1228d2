"""All tokens of a step in one row, as tensors (rule 3 of the design): no padding anywhere."""

from itertools import chain

import torch
from torch import Tensor

import kernels
from minipaged.scheduling.plan import ScheduledSequence


class TableRows:
    """The page tables of a step as one tensor [S, M] on the device. A row is written only if its table has changed.

    At long contexts page tables are the largest thing that a step hands to the device: 64 sequences of 32,768
    tokens have 131,072 blocks, and most of them are where they were. Behind the end of a table stand zeros.
    """

    def __init__(self, device: str):
        self._rows = torch.zeros(0, 0, dtype=torch.int64, device=device)
        self._written: list[list[int]] = []  # which table each row holds: while it is the same list, it is up to date

    def of(self, tables: list[list[int]]) -> Tensor:
        longest = max(map(len, tables))
        if len(tables) > self._rows.shape[0] or longest > self._rows.shape[1]:
            rows, width = max(len(tables), self._rows.shape[0]), max(2 * longest, self._rows.shape[1])
            self._rows, self._written = self._rows.new_zeros(rows, width), []
        self._written += [[]] * (len(tables) - len(self._written))
        for row, table in enumerate(tables):
            if self._written[row] is not table:
                self._rows[row, : len(table)] = torch.tensor(table)
                self._rows[row, len(table) :] = 0
                self._written[row] = table
        return self._rows[: len(tables), :longest].contiguous()


class FlatBatches:
    """Makes them, for one model. debug: look at every table before the kernels do, which would read anything."""

    def __init__(self, num_blocks: int, block_size: int, device: str, debug: bool = False):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.device, self.debug = device, debug
        self._tables = TableRows(device)

    def of(self, sequences: list[ScheduledSequence]) -> tuple[Tensor, Tensor, kernels.Batch]:
        """input_ids [T], positions [T], and where they live."""
        if self.debug:
            self._check(sequences)
        starts = [0]
        for s in sequences:
            starts.append(starts[-1] + len(s.token_ids))
        context_lens = [s.context_len for s in sequences]
        input_ids, positions, slots, query_start, contexts = self._tensors(
            [token for s in sequences for token in s.token_ids],
            [p for s in sequences for p in range(s.start, s.context_len)],
            [slot for s in sequences for slot in s.slots],
            starts,
            context_lens,
        )
        batch = kernels.Batch(slots, query_start, contexts, self._tables.of([s.block_table for s in sequences]))
        batch.max_query_len = max(len(s.token_ids) for s in sequences)
        batch.max_context_len = max(context_lens)
        return input_ids, positions, batch

    def _tensors(self, *lists: list[int]) -> tuple[Tensor, ...]:
        """All integers of a step go to the device in one transfer."""
        together = torch.tensor(list(chain.from_iterable(lists)), dtype=torch.int64)
        return together.to(self.device, non_blocking=True).split([len(values) for values in lists])

    def _check(self, sequences: list[ScheduledSequence]) -> None:
        for s in sequences:
            if not all(0 <= block < self.num_blocks for block in s.block_table):
                raise IndexError(
                    f"sequence {s.seq_id}: table {s.block_table} leaves the pool of {self.num_blocks} blocks"
                )
            own = [self.block_size * s.block_table[p // self.block_size] + p % self.block_size
                   for p in range(s.start, s.context_len)]  # fmt: skip
            if s.targets and s.targets.start <= s.start:
                raise IndexError(f"sequence {s.seq_id}: the logits for position {s.targets.start} are not computed now")
            if s.slots != own:
                raise IndexError(f"sequence {s.seq_id}: slots {s.slots} are not those of its table, {own}")
