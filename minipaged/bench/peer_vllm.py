"""vLLM as a contender: its offline `LLM`, all requests at once, on a CPU.

Runs in vLLM's own environment: of ours, it imports nothing that needs a package.

The settings that we found best for it on a CPU: torch.compile, its default; the engine in this process, where the
threads are told by OMP_NUM_THREADS, unbound; blocks of 32, the smallest that its CPU attention has. Prefix caching
is on for all loads, as it is by default, and emptied before each run: some loads need it, and to hash the blocks of
prompts that share nothing costs next to nothing; this engine does so too. No text is made, and its statistics are on,
since they tell when the first token of a request was there (of a beam search, they don't).
"""

import os
import time
import warnings
from typing import Any

from minipaged.bench.contenders import BLOCK_SIZE, Options
from minipaged.bench.loads import Load, Run

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
VLLM_BLOCK_SIZE = 32
# Of its n-gram speculation: the same numbers as this engine's.
GUESSES = {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_min": 2, "prompt_lookup_max": 5}
COUNTERS = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")
SETTINGS = {  # read when it is imported
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


class NoText:
    """Stands for a tokenizer: its beam search asks for one, though the tokens are all that we want."""

    eos_token_id = None

    def decode(self, tokens: list[int], **settings) -> str:
        return ""


class VLLM:
    """kv_bytes: its pool, which holds the largest load whole: nothing waits for memory. more: settings of its `LLM`."""

    more: dict[str, Any] = {}

    def __init__(self, options: Options):
        os.environ |= SETTINGS | {"OMP_NUM_THREADS": str(options.threads)}
        warnings.simplefilter("ignore")
        import vllm

        self.about = f"{vllm.__version__}, compiled, blocks of {VLLM_BLOCK_SIZE} tokens"
        self.params = vllm.SamplingParams
        tokens = options.most_blocks * BLOCK_SIZE + options.most_requests * VLLM_BLOCK_SIZE
        self.kv_bytes = (tokens + 8 * VLLM_BLOCK_SIZE) * options.kv_bytes_per_token
        self.llm = vllm.LLM(
            options.model,
            dtype=DTYPES[options.dtype],
            load_format="safetensors",  # never a pickle
            skip_tokenizer_init=True,
            block_size=VLLM_BLOCK_SIZE,
            kv_cache_memory_bytes=self.kv_bytes,
            max_num_seqs=options.most_requests,
            max_model_len=options.longest,
            enable_prefix_caching=True,
            disable_log_stats=False,
            use_tqdm_on_load=False,
            **self.more,
        )
        for count in (1, options.most_requests):  # what is compiled on first use, is compiled before the clock starts
            self.run(Load("", [[0] * (options.longest // 2)] * count, [4] * count, count))

    def run(self, load: Load) -> Run:
        params = [self.params(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in load.outputs]
        prompts = [{"prompt_token_ids": prompt} for prompt in load.prompts]
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("its prefix cache can't be emptied")
        if load.beam_width > 1:
            return self._search(load, prompts)
        began = time.perf_counter()
        if load.one_by_one:
            pairs = zip(prompts, params, strict=True)
            outputs = [self.llm.generate([one], [its], use_tqdm=False)[0] for one, its in pairs]
        else:
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        return Run(
            tokens=[list(output.outputs[0].token_ids) for output in outputs],
            seconds=seconds,
            first_token=[o.metrics.first_token_latency for o in outputs if o.metrics],
            kv_bytes=self.kv_bytes,
        )

    def _search(self, load: Load, prompts: list) -> Run:
        """Its beam search has one length for all requests."""
        from vllm.sampling_params import BeamSearchParams

        self.llm.renderer.get_tokenizer = NoText
        params = BeamSearchParams(load.beam_width, max(load.outputs), ignore_eos=True)
        began = time.perf_counter()
        outputs = self.llm.beam_search(prompts, params)
        seconds = time.perf_counter() - began
        tokens = [
            [token for beam in output.sequences for token in beam.tokens[len(prompt) :][:wanted]]
            for output, prompt, wanted in zip(outputs, load.prompts, load.outputs, strict=True)
        ]
        return Run(tokens, seconds, first_token=[], kv_bytes=self.kv_bytes)


class Guessing(VLLM):
    """With its n-gram speculation."""

    more = {"speculative_config": GUESSES}

    def run(self, load: Load) -> Run:
        before = self._counts()
        run = super().run(load)
        guessed, right = (now - then for now, then in zip(self._counts(), before, strict=True))
        run.guesses = guessed, right
        return run

    def _counts(self) -> list[int]:
        values = {metric.name: metric.value for metric in self.llm.get_metrics() if metric.name in COUNTERS}
        return [values.get(name, 0) for name in COUNTERS]
