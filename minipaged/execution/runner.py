"""Carries a plan out: tensors in the shape of the plan, the model, and what was drawn from its logits.

The runner owns the keys and values of all blocks. It decides nothing: which block, which token, who goes first
stands in the plan.
"""

from itertools import chain

import torch
from torch import Tensor

import kernels
from minipaged.decoding.logprobs import top_candidates, top_logprobs
from minipaged.decoding.sampling import sample
from minipaged.execution.decode_graphs import DecodeGraphs
from minipaged.execution.stats import Times
from minipaged.execution.timing import StepTimer
from minipaged.models import Model
from minipaged.models.config import ModelConfig
from minipaged.requests.sampling_params import BadLogits
from minipaged.scheduling.plan import ScheduledSequence, StepOutput, StepPlan

DTYPES = {
    "fp32": torch.float32, "float32": torch.float32,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16, "half": torch.float16,
}  # fmt: skip

PIECE = 128  # rows whose logits are held at a time for prompt_logprobs: 25 MB with a vocabulary of 49152


def resolve(dtype: str, device: str) -> tuple[torch.dtype, str]:
    """The real dtype and device behind the names, "auto" among them. ValueError if there is no such thing here."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device!r}: must be auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': PyTorch sees no GPU here; use cpu or auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bf16" if device == "cuda" else "fp32"
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be auto, fp32, bf16 or fp16")
    return DTYPES[dtype], device


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values: 2 L G D itemsize (paper, section 3: 800 KB for OPT-13B in fp16)."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_size * dtype.itemsize


class TableRows:
    """The page tables of a step as one tensor [S, M] on the device. A row is written only if its table has changed.

    At long contexts page tables are the largest thing that a step hands to the device: 64 sequences of 32,768
    tokens have 131,072 blocks, and most of them are where they were. What stands behind the end of a table is
    some block's number, and nobody reads it.
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
                self._written[row] = table
        return self._rows[: len(tables), :longest].contiguous()


class ModelRunner:
    """Runs `model` over a pool of N = num_blocks blocks of B = block_size slots, in all L layers.

    debug: fill freed blocks with NaN, so that a stale read shows in the output, and check every table.
    replay: (sequences, blocks of a page table) at the most in decode steps that are replayed as CUDA graphs.
    """

    def __init__(
        self,
        model: Model,
        num_blocks: int,
        block_size: int,
        num_cpu_blocks: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        debug: bool = False,
        replay: tuple[int, int] | None = None,
    ):
        self.model, self.backend = model, model.backend
        self.device = device
        self.debug = debug
        self.block_size = block_size
        self.times = Times()
        self.timer = StepTimer(self.times, device)
        config = model.config
        shape = (block_size, config.num_kv_heads, config.head_size, dtype)
        self.cache = kernels.new_cache(config.num_layers, num_blocks, *shape, device=device)  # [L, 2, G, N, B, D]
        self.cpu_cache = kernels.new_cache(config.num_layers, num_cpu_blocks, *shape, pinned=device == "cuda")
        if debug:
            self.cache.fill_(torch.nan)
        self.graphs = DecodeGraphs(model, self.cache, *replay) if replay else None
        if self.graphs:
            self.graphs.record_all()
        self.tables = TableRows(device)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepOutput:
        """Move memory as the plan says, compute its tokens, and draw from the logits where it says so."""
        self.timer.begin()
        self._move_memory(plan)
        if not plan.sequences:
            return StepOutput()
        input_ids, positions, batch = self._batch(plan.sequences)
        self.timer.end("prepare")
        if self.graphs and self.graphs.fits(batch):
            hidden = self.graphs.run(input_ids, positions, batch)
        else:
            hidden = self.model(input_ids, positions, self.cache, batch)  # [T, E]
        logits, wanted = self._logits(plan.sequences, batch, hidden)
        self.timer.end("model")
        output = self._draw(logits, wanted)
        self._add_prompt_logprobs(plan.sequences, hidden, output)
        self.timer.end("sample")
        return output

    def _move_memory(self, plan: StepPlan) -> None:
        """The order matters: out before freed blocks are poisoned or reused, in and copies before new tokens."""
        if plan.swap_out:
            self.backend.move_blocks(self.cache, self.cpu_cache, *self._pairs(plan.swap_out))
        if self.debug and plan.freed:
            self.cache[:, :, :, plan.freed] = torch.nan
        if plan.swap_in:
            self.backend.move_blocks(self.cpu_cache, self.cache, *self._pairs(plan.swap_in))
        if plan.copies:
            self.backend.copy_blocks(self.cache, *self._pairs(plan.copies))

    def _pairs(self, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        source, target = torch.tensor(pairs).T
        return source, target

    def _batch(self, sequences: list[ScheduledSequence]) -> tuple[Tensor, Tensor, kernels.Batch]:
        """All tokens of the step in one row: input_ids [T], positions [T], and where they live."""
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
        batch = kernels.Batch(slots, query_start, contexts, self.tables.of([s.block_table for s in sequences]))
        batch.max_query_len = max(len(s.token_ids) for s in sequences)
        batch.max_context_len = max(context_lens)
        return input_ids, positions, batch

    def _tensors(self, *lists: list[int]) -> tuple[Tensor, ...]:
        """All integers of a step go to the device in one transfer."""
        together = torch.tensor(list(chain.from_iterable(lists)), dtype=torch.int64)
        return together.to(self.device, non_blocking=True).split([len(values) for values in lists])

    def _check(self, sequences: list[ScheduledSequence]) -> None:
        """A wrong table reads somebody else's memory and says nothing: look before the kernels do."""
        num_blocks = self.cache.shape[3]
        for s in sequences:
            if not all(0 <= block < num_blocks for block in s.block_table):
                raise IndexError(f"sequence {s.seq_id}: table {s.block_table} leaves the pool of {num_blocks} blocks")
            own = [self.block_size * s.block_table[p // self.block_size] + p % self.block_size
                   for p in range(s.start, s.context_len)]  # fmt: skip
            if s.targets and s.targets.start <= s.start:
                raise IndexError(f"sequence {s.seq_id}: the logits for position {s.targets.start} are not computed now")
            if s.slots != own:
                raise IndexError(f"sequence {s.seq_id}: slots {s.slots} are not those of its table, {own}")

    def _logits(
        self, sequences: list[ScheduledSequence], batch: kernels.Batch, hidden: Tensor
    ) -> tuple[Tensor, list[ScheduledSequence]]:
        """Logits [R, V] after the last token of those sequences that draw from them."""
        rows = [i for i, s in enumerate(sequences) if s.draw or s.num_candidates]
        last = batch.query_start[1:][rows] - 1
        return self.model.logits(hidden[last]), [sequences[i] for i in rows]

    def _draw(self, logits: Tensor, wanted: list[ScheduledSequence]) -> StepOutput:
        output = StepOutput()
        draws = [(i, s.draw) for i, s in enumerate(wanted) if s.draw]
        if draws:
            rows = logits if len(draws) == len(wanted) else logits[[i for i, _ in draws]]
            for (i, _), drawn in zip(draws, sample(rows, [draw for _, draw in draws]), strict=True):
                if isinstance(drawn, BadLogits):
                    output.errors[wanted[i].seq_id] = drawn.message
                else:
                    output.tokens[wanted[i].seq_id] = [[token] for token in drawn]
        beams = [i for i, s in enumerate(wanted) if s.num_candidates]
        if beams:
            best = top_candidates(logits[beams], max(wanted[i].num_candidates for i in beams))
            for i, row in zip(beams, best, strict=True):
                if isinstance(row, BadLogits):
                    output.errors[wanted[i].seq_id] = row.message
                else:
                    output.candidates[wanted[i].seq_id] = row[: wanted[i].num_candidates]
        return output

    def _add_prompt_logprobs(self, sequences: list[ScheduledSequence], hidden: Tensor, output: StepOutput) -> None:
        """Logprobs of tokens of prompts, from the rows of hidden [T, E] before them, in pieces of bounded size."""
        wanted: list[tuple[int, int, int, int]] = []  # whose, row, how many best tokens, token
        begin = 0
        for s in sequences:
            if t := s.targets:
                row = begin + t.start - 1 - s.start
                wanted += [(s.seq_id, row + i, t.num_best, token) for i, token in enumerate(t.token_ids)]
            begin += len(s.token_ids)
        for at in range(0, len(wanted), PIECE):
            piece = wanted[at : at + PIECE]
            logits = self.model.logits(hidden[[row for _, row, _, _ in piece]])
            found = top_logprobs(logits, [(i, k, token) for i, (_, _, k, token) in enumerate(piece)])
            for (seq_id, *_), logprobs in zip(piece, found, strict=True):
                if isinstance(logprobs, BadLogits):
                    output.errors[seq_id] = logprobs.message
                else:
                    output.prompt_logprobs.setdefault(seq_id, []).append(logprobs)
