"""Carries a plan out: tensors in the shape of the plan, the model, and what was drawn from its logits.

The runner owns the keys and values of all blocks. It decides nothing: which block, which token, who goes first
stands in the plan.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import kernels
from minipaged.execution.answers import answer, prompt_pieces, wanted_logits
from minipaged.execution.decode_graphs import DecodeGraphs
from minipaged.execution.flat_batch import FlatBatches
from minipaged.execution.masks import MaskMaker
from minipaged.execution.proposer import Guesses, Proposer, stack
from minipaged.execution.stats import Times
from minipaged.execution.timing import StepTimer
from minipaged.models import Model
from minipaged.models.config import ModelConfig
from minipaged.scheduling.plan import StepOutput, StepPlan

DTYPES = {
    "fp32": torch.float32, "float32": torch.float32,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16, "half": torch.float16,
}  # fmt: skip


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
    """Bytes of one token's keys and values: 2 L G D itemsize (paper, section 3: 800 KB for OPT-13B in fp16).

    In eight bits each of the 2 L G has a scale besides, of 4 bytes.
    """
    return 2 * config.num_layers * config.num_kv_heads * kernels.slot_size(config.head_size, dtype) * dtype.itemsize


class ModelRunner:
    """Runs `model` over a pool of N = num_blocks blocks of B = block_size slots, in all L layers.

    dtype: of keys and values: int8 and float8_e4m3fn too, see kernels/cache.py.
    debug: fill freed blocks with NaN, so that a stale read shows in the output, and check every table.
    replay: (sequences, blocks of a page table) at the most in decode steps that are replayed as CUDA graphs.
    proposer: who guesses where the plan leaves that to us.
    tell: is called with what is to be computed, guesses included, before it is: other ranks do the same.
    memory: what the pool is made of, see `kernels.new_cache`.
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
        proposer: Proposer | None = None,
        tell: Callable[[StepPlan], None] | None = None,
        memory: Callable[[int], Tensor | None] | None = None,
    ):
        self.model, self.backend = model, model.backend
        self.device = device
        self.debug = debug
        self.block_size = block_size
        self.times = Times()
        self.timer = StepTimer(self.times, device)
        config = model.config
        shape = (block_size, config.num_kv_heads, config.head_size, dtype)
        self.cache = kernels.new_cache(config.num_layers, num_blocks, *shape, device=device, memory=memory)
        self.cpu_cache = kernels.new_cache(config.num_layers, num_cpu_blocks, *shape, pinned=device == "cuda")
        self.proposer = proposer
        self.pools = [(self.cache, self.cpu_cache), *(proposer.caches if proposer else ())]  # they move together
        if debug:
            for pool, _ in self.pools:
                kernels.poison(pool)
        self.graphs = DecodeGraphs(model, self.cache, *replay) if replay else None
        if self.graphs:
            self.graphs.record_all()
        self.tell = tell or (lambda plan: None)
        self.masks = MaskMaker()
        self.batches = FlatBatches(num_blocks, block_size, device, debug)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepOutput:
        """Move memory as the plan says, compute its tokens, and draw from the logits where it says so."""
        self.timer.begin()
        self._move_memory(plan)
        if not plan.sequences:
            self.tell(plan)
            return StepOutput()
        self.timer.end("prepare")
        guesses = self.proposer.propose(plan.sequences) if self.proposer else Guesses()
        self.timer.end("draft")
        sequences = guesses.appended(plan.sequences)
        self.tell(replace(plan, sequences=sequences))
        masks = self.masks.start(sequences)
        input_ids, positions, batch = self.batches.of(sequences)
        self.timer.end("prepare")
        if self.graphs and self.graphs.fits(batch):
            hidden = self.graphs.run(input_ids, positions, batch)
        else:
            hidden = self.model(input_ids, positions, self.cache, batch)  # [T, E]
        logits = wanted_logits(self.model, sequences, hidden)
        self.timer.end("model")
        output = answer(self.model, sequences, hidden, logits, stack(guesses.chances), masks())
        self.timer.end("sample")
        if self.proposer:
            self.proposer.follow(sequences, (input_ids, positions, batch), hidden, output)
            self.timer.end("draft")
        return output

    @torch.inference_mode()
    def follow(self, plan: StepPlan) -> None:
        """Do what `execute` does, as far as rank 0 needs it: for ranks that are told a plan, and draw nothing."""
        self._move_memory(plan)
        if plan.sequences:
            input_ids, positions, batch = self.batches.of(plan.sequences)
            hidden = self.model(input_ids, positions, self.cache, batch)
            wanted_logits(self.model, plan.sequences, hidden)
            for piece in prompt_pieces(plan.sequences):
                self.model.logits(hidden[[row for _, row, _, _ in piece]])

    def _move_memory(self, plan: StepPlan) -> None:
        """The order matters: out before freed blocks are poisoned or reused, in and copies before new tokens."""
        for pool, cpu_pool in self.pools:
            if plan.swap_out:
                self.backend.move_blocks(pool, cpu_pool, *self._pairs(plan.swap_out))
            if self.debug and plan.freed:
                kernels.poison(pool, plan.freed)
            if plan.swap_in:
                self.backend.move_blocks(cpu_pool, pool, *self._pairs(plan.swap_in))
            if plan.copies:
                self.backend.copy_blocks(pool, *self._pairs(plan.copies))

    def _pairs(self, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        source, target = torch.tensor(pairs).T
        return source, target
