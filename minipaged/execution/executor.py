"""Who carries plans out. The engine asks an executor, and does not know how many processes or devices stand behind it.

It is one runner in this process; with tensor_parallel_size it is one in each of several, see ranks/.
"""

import math
import weakref

import torch

import kernels
from minipaged.decoding.ngram import NgramProposer
from minipaged.execution.draft_proposer import DraftProposer, check_draft
from minipaged.execution.engine_args import EngineArgs
from minipaged.execution.flat_batch import FlatBatches
from minipaged.execution.head_proposer import HeadProposer
from minipaged.execution.loading import open_model
from minipaged.execution.pool_size import Room, choose_num_blocks, choose_num_cpu_blocks
from minipaged.execution.proposer import Proposer
from minipaged.execution.ranks.rank_zero import start_ranks
from minipaged.execution.runner import ModelRunner, kv_bytes_per_token
from minipaged.execution.stats import Times
from minipaged.execution.transfer.connector import KVConnector
from minipaged.execution.transfer.shared_memory import SharedMemoryConnector
from minipaged.execution.transfer.torch_distributed import TorchDistributedConnector
from minipaged.models import Loaded, Model, ModelConfig, load, load_ends, open_checkpoint
from minipaged.models.fingerprint import fingerprint
from minipaged.models.head import Ends, Head, head_of, load_head
from minipaged.scheduling.plan import StepOutput, StepPlan
from minipaged.scheduling.speculation import Speculation
from minipaged.scheduling.transfer import Transfers

# How many tokens a step computes in the time that it takes to read the weights: where speculation is for nothing.
# Measured on two cores for smollm2; a GPU's is a guess from its data sheet.
FREE_ROWS = {("cpu", torch.float32): 16.0, ("cpu", torch.bfloat16): 40.0}
FREE_ROWS_PACKED = 8.0  # less is read, and floats are made of it for each further row once
FREE_ROWS_OF_A_GPU = 256.0
CONNECTORS = {kind.__name__: kind for kind in (SharedMemoryConnector, TorchDistributedConnector)}
PASS = 0.02  # of a step: what a proposer's pass costs besides reading its weights


class Executor:
    """The model and the memory for its keys and values.

    config, tokenizer: the model's. num_blocks, num_cpu_blocks: the sizes of both pools, in blocks of block_bytes bytes,
    what a proposer keeps of each token included. max_model_len: the longest prompt and output together.
    times: seconds, by what they were spent on. free_rows, guess_cost: see `Speculation`.
    """

    def __init__(self, args: EngineArgs):
        self._args = args
        self.connector: KVConnector | None = None
        self._ranks = start_ranks(args)
        if self._ranks:
            weakref.finalize(self, self._ranks.close)  # whoever forgets to
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        args = self._args
        opened = open_model(args, self._ranks.ranks) if self._ranks else open_model(args)
        loaded, self._dtype, self.device = opened.loaded, opened.dtype, opened.device
        self.config, self.tokenizer = loaded.config, loaded.tokenizer
        self.max_model_len = min(args.max_model_len or self.config.max_model_len, self.config.max_model_len)
        guesser = self._load_guesser(loaded)
        own = opened.block_bytes + args.block_size * _bytes_per_token(guesser, self.config, self._dtype)
        self.guess_cost = PASS + _num_weights(guesser) / _num_weights(loaded) if guesser else 0.0
        self.free_rows = FREE_ROWS.get((self.device, loaded.model.backend.dtype), FREE_ROWS_OF_A_GPU)
        if self.device == "cpu" and loaded.model.packed:
            self.free_rows = FREE_ROWS_PACKED
        longest = -(-self.max_model_len // args.block_size)  # blocks of a page table
        self._choose_sizes(own, longest * args.max_num_seqs)
        self.connector = self._connector()
        replays = args.cuda_graphs and self.device == "cuda" and loaded.model.backend.name == "triton"
        self.runner = ModelRunner(
            loaded.model, self.num_blocks, args.block_size, self.num_cpu_blocks, opened.kv_dtype, self.device,
            args.debug, (args.max_num_seqs, longest) if replays and not self._ranks else None,
            self._proposer(guesser), self._ranks.tell if self._ranks else None,
            self.connector.new_pool if self.connector else None,
        )  # fmt: skip
        if self._ranks:
            self._ranks.wait_until_ready()
        if self.connector:
            self.connector.register_kv_caches(self.runner.cache)

    def _choose_sizes(self, own: int, most: int) -> None:
        """Of both pools. own: bytes that a block takes in this process. most: blocks that can ever be used."""
        args = self._args
        rooms = self._ranks.rooms(self.device, own) if self._ranks else [Room(own)]
        self.block_bytes = sum(room.block_bytes for room in rooms)
        self.num_blocks = min(
            choose_num_blocks(
                args.num_blocks, room.share_of(args.kv_cache_memory, self.block_bytes), room.block_bytes, most,
                self.device, args.gpu_memory_utilization, room.free,
            ) for room in rooms
        )  # fmt: skip
        self.num_cpu_blocks = choose_num_cpu_blocks(
            args.num_cpu_blocks, self.num_blocks, self.block_bytes, self.device, args.preemption
        )
        if self._ranks:
            self._ranks.make_pools(self.num_blocks, self.num_cpu_blocks)

    def speculation(self) -> Speculation | None:
        """How many tokens are guessed, for the scheduler, which also asks those who need no tensors for it."""
        config = self._args.speculative_config
        if config is None:
            return None
        ngram = NgramProposer(config.prompt_lookup_min, config.prompt_lookup_max) if config.method == "ngram" else None
        counts = config.num_speculative_tokens, config.num_branches
        return Speculation(*counts, ngram, self.free_rows, self.guess_cost, config.adaptive)

    def transfers(self) -> Transfers | None:
        """What the scheduler may give to other engines, and take from them."""
        return self.connector.transfers() if self.connector else None

    def _connector(self) -> KVConnector | None:
        config, args = self._args.kv_transfer_config, self._args
        if config is None:
            return None
        if config.kv_connector == "SharedMemoryConnector" and config.produces and self.device != "cpu":
            raise ValueError("SharedMemoryConnector: a GPU's pool is in no memory to share: TorchDistributedConnector")
        weights = fingerprint(open_checkpoint(args.model).files)
        how = {"quantization": args.quantization, "products": args.products, "config": str(self.config)}
        return CONNECTORS[config.kv_connector](config, {"weights": weights, **how})

    def _load_guesser(self, loaded: Loaded) -> Loaded | Head | None:
        """The draft model, or the head, that the engine was told of."""
        config = self._args.speculative_config
        if config is None or config.method == "ngram":
            return None
        if config.method == "head":
            return load_head(config.model or head_of(self._args.model), self._ends(loaded), loaded.model.backend)
        assert config.model is not None
        draft = load(config.model, self._dtype, self.device, backend=loaded.model.backend)
        check_draft(config.model, draft, self.tokenizer, self.max_model_len)
        return draft

    def _ends(self, loaded: Loaded) -> Model | Ends:
        """What a head guesses with: rank 0 guesses alone, so it has both ends of the model whole."""
        if self._ranks is None:
            return loaded.model
        args = self._args
        return load_ends(args.model, self._dtype, self.device, loaded.model.backend, args.quantization)

    def _proposer(self, guesser: Loaded | Head | None) -> Proposer | None:
        config = self._args.speculative_config
        if guesser is None or config is None:
            return None
        batches = FlatBatches(self.num_blocks, self._args.block_size, self.device, self._args.debug)
        vocab_size = self.config.vocab_size
        if isinstance(guesser, Head):
            states = self._caches(1, 1, self.config.hidden_size // 2)
            own = self._caches(1, guesser.kv_heads, guesser.head_size)
            return HeadProposer(guesser, states, own, batches, vocab_size, config)
        theirs = guesser.config
        own = self._caches(theirs.num_layers, theirs.num_kv_heads, theirs.head_size)
        return DraftProposer(guesser, own, batches, vocab_size, config)

    def _caches(self, layers: int, kv_heads: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For a proposer, under the page tables of both pools; in the model's dtype."""
        shape = self._args.block_size, kv_heads, head_size, self._dtype
        here = kernels.new_cache(layers, self.num_blocks, *shape, device=self.device)
        return here, kernels.new_cache(layers, self.num_cpu_blocks, *shape, pinned=self.device == "cuda")

    @property
    def times(self) -> Times:
        """Of all steps that are over."""
        self.runner.timer.settle()
        return self.runner.times

    def execute(self, plan: StepPlan) -> StepOutput:
        """Compute a step. Whatever it raises, nobody may rely on the contents of memory afterwards."""
        output = self._ranks.execute(plan, self.runner.execute) if self._ranks else self.runner.execute(plan)
        return self.connector.carry_on(plan, output) if self.connector else output

    def end_loads(self, transfers: Transfers) -> None:
        """All blocks that were to come are unwanted, and no step will tell it: whoever keeps them need not."""
        if self.connector:
            plan = StepPlan(0)
            transfers.build_connector_meta(plan, [])
            self.connector.start_load_kv(plan)

    def check_health(self) -> None:
        """RuntimeError if nothing can be executed any more."""
        if self._ranks:
            self._ranks.check()

    def close(self) -> None:
        """Give the memory of weights, keys and values back. Doing it twice does no harm."""
        if self._ranks:
            self._ranks.close()
        if self.connector:
            self.connector.close()
        self.__dict__.pop("runner", None)


def _bytes_per_token(guesser: Loaded | Head | None, config: ModelConfig, dtype: torch.dtype) -> int:
    """What a proposer keeps of each token."""
    if isinstance(guesser, Head):
        return (config.hidden_size + 2 * guesser.kv_heads * guesser.head_size) * dtype.itemsize
    return kv_bytes_per_token(guesser.config, dtype) if guesser else 0


def _num_weights(what: Loaded | Head) -> int:
    """All numbers that it reads to compute a token."""
    if isinstance(what, Head):
        return what.num_weights
    shapes = type(what.model).tensor_shapes(what.config)
    return sum(math.prod(shape) for shape in shapes.values())
