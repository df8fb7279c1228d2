"""This engine as a contender."""

import time
from dataclasses import asdict

import torch

from minipaged.bench.contenders import BLOCK_SIZE, Options
from minipaged.bench.loads import Load, Run
from minipaged.engine import LLM
from minipaged.plan import StepOutput, StepPlan
from minipaged.sampling_params import SamplingParams


class Minipaged:
    """This engine, with its defaults but for the size of its pool.

    kv_bytes: the blocks in use at the moment when most were.
    """

    def __init__(self, options: Options):
        torch.set_num_threads(options.threads)
        blocks, free = options.num_blocks, options.num_blocks is None and options.kv_cache_memory is None
        self.llm = LLM(
            options.model,
            dtype=options.dtype,
            device=options.device,
            kernels=options.kernels,
            block_size=BLOCK_SIZE,
            num_blocks=int(1.02 * options.most_blocks) + 2 if free else blocks,  # with room for the watermark
            kv_cache_memory=options.kv_cache_memory,
            num_cpu_blocks=0 if free else None,  # all fits: nothing is swapped
        )
        self.about = f"kernels {self.llm.runner.backend.name}"
        self.llm.observers.append(self._observe)
        self._most_blocks = 0

    def run(self, load: Load) -> Run:
        params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in load.outputs]
        self._most_blocks = 0
        before = asdict(self.llm.stats().times)
        began = time.perf_counter()
        outputs = self.llm.generate(load.prompts, params)
        seconds = time.perf_counter() - began
        times = {name: spent - before[name] for name, spent in asdict(self.llm.stats().times).items()}
        return Run(
            tokens=[output.outputs[0].token_ids for output in outputs],
            seconds=seconds,
            first_token=[output.metrics.time_to_first_token or 0.0 for output in outputs],
            kv_bytes=self._most_blocks * self.llm.block_bytes,
            times=times,
        )

    def _observe(self, plan: StepPlan, output: StepOutput) -> None:
        self._most_blocks = max(self._most_blocks, sum(len(s.block_table) for s in plan.sequences))
