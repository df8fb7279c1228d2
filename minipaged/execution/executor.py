"""Who carries plans out. The engine asks an executor, and does not know how many processes or devices stand behind it.

Today it is one runner in this process.
"""

from kernels import load as load_kernels
from minipaged import cache_folder
from minipaged.execution.engine_args import EngineArgs
from minipaged.execution.pool_size import choose_num_blocks, choose_num_cpu_blocks
from minipaged.execution.runner import ModelRunner, kv_bytes_per_token, resolve
from minipaged.execution.stats import Times
from minipaged.models import load
from minipaged.scheduling.plan import StepOutput, StepPlan


class Executor:
    """The model and the memory for its keys and values.

    config, tokenizer: the model's. num_blocks, num_cpu_blocks: the sizes of both pools, in blocks of block_bytes bytes.
    max_model_len: the longest prompt and output together. times: seconds, by what they were spent on.
    """

    def __init__(self, args: EngineArgs):
        dtype, self.device = resolve(args.dtype, args.device)
        backend = load_kernels(args.kernels, self.device, dtype, cache_folder())
        loaded = load(args.model, dtype, self.device, backend=backend)
        self.config, self.tokenizer = loaded.config, loaded.tokenizer
        self.max_model_len = min(args.max_model_len or self.config.max_model_len, self.config.max_model_len)
        self.block_bytes = args.block_size * kv_bytes_per_token(self.config, dtype)
        longest = -(-self.max_model_len // args.block_size)  # blocks of a page table
        self.num_blocks = choose_num_blocks(
            args.num_blocks, args.kv_cache_memory, self.block_bytes, longest * args.max_num_seqs, self.device,
            args.gpu_memory_utilization,
        )  # fmt: skip
        self.num_cpu_blocks = choose_num_cpu_blocks(
            args.num_cpu_blocks, self.num_blocks, self.block_bytes, self.device, args.preemption
        )
        replays = args.cuda_graphs and self.device == "cuda" and backend.name == "triton"
        self.runner = ModelRunner(
            loaded.model, self.num_blocks, args.block_size, self.num_cpu_blocks, dtype, self.device, args.debug,
            (args.max_num_seqs, longest) if replays else None,
        )  # fmt: skip

    free_rows, guess_cost = 24.0, 0.0

    @property
    def times(self) -> Times:
        """Of all steps that are over."""
        self.runner.timer.settle()
        return self.runner.times

    def execute(self, plan: StepPlan) -> StepOutput:
        """Compute a step. Whatever it raises, nobody may rely on the contents of memory afterwards."""
        return self.runner.execute(plan)

    def close(self) -> None:
        """Give the memory of weights, keys and values back. Doing it twice does no harm."""
        self.__dict__.pop("runner", None)
