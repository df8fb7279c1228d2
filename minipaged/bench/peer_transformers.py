"""transformers as a contender, twice: padded static batches, and its own continuous batching.

Both get the settings that we found best for them on a CPU. What isn't the work itself is left out of their time:
loading, making caches, a warm-up run. For both: the same weights in the same dtype and the same number of
threads as this engine; greedy, no end-of-text, no gradients; attention by SDPA; no torch.compile, which this
engine doesn't use either.
"""

import os
import threading
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging

from minipaged.bench.contenders import Options
from minipaged.bench.loads import Load, Run
from minipaged.execution.runner import DTYPES


def load_model(options: Options):
    """The model in evaluation mode, from a .gguf file or a folder; never from a pickle."""
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    tqdm.set_lock(threading.RLock())  # its own is shared by processes, and complained about if one is killed
    path, dtype = Path(options.model), DTYPES[options.dtype]
    settings = {"dtype": dtype, "attn_implementation": "sdpa", "local_files_only": True}
    if path.is_file():
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **settings)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, **settings)
    model.generation_config = greedy()  # the checkpoint's own one may sample, and ends at end-of-text
    return model.eval().to(options.device)


def greedy(**more) -> GenerationConfig:
    """No sampling, and no end: the most tokens are told at each call."""
    return GenerationConfig(do_sample=False, pad_token_id=0, **more)


class Static:
    """`model.generate` in batches of the load's size, first come, each run until its longest output is done.

    Prompts are padded on the left and masked. With attention by SDPA and a DynamicCache. Its beam search has the same
    rules as ours, both by default.
    kv_bytes: the keys and values of a batch at its end, padding and all.
    """

    about = None

    def __init__(self, options: Options):
        self.model = load_model(options)
        self.kv_bytes_per_token = options.kv_bytes_per_token

    @torch.inference_mode()
    def run(self, load: Load) -> Run:
        tokens: list[list[int]] = []
        first_token: list[float] = []
        kv_bytes = 0
        began = time.perf_counter()
        for start in range(0, len(load.prompts), load.batch_size):
            prompts = load.prompts[start : start + load.batch_size]
            outputs = load.outputs[start : start + load.batch_size]
            ids, mask = (tensor.to(self.model.device) for tensor in pad(prompts))
            sent = time.perf_counter() if load.one_by_one else began
            clock = FirstToken()
            rows = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max(outputs),
                stopping_criteria=StoppingCriteriaList([clock]),
                num_beams=load.beam_width,
                num_return_sequences=load.beam_width,
            )
            new = rows[:, ids.shape[1] :].unflatten(0, (len(prompts), -1))  # [S, beams, tokens]
            tokens += [row[:, :wanted].flatten().tolist() for row, wanted in zip(new, outputs, strict=True)]
            first_token += [clock.at - sent] * len(prompts)
            kv_bytes = max(kv_bytes, rows.numel() * self.kv_bytes_per_token)
        return Run(tokens, time.perf_counter() - began, first_token, kv_bytes)


def pad(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Prompts [S, longest], padded on the left, and the mask of the same shape, 0 on the padding."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


class FirstToken(StoppingCriteria):
    """Stops nothing: it is asked after each token, and so knows when the first was there."""

    at = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        self.at = self.at or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Continuous:
    """transformers' continuous batching: what `model.generate_batch` does, with a length for each request.

    (`generate_batch` has one length for all; the manager under it takes one for each.) Its paged cache is made
    before the clock starts and holds all requests whole: nothing waits for memory. Block sharing is on for all loads,
    as it is by default: it halves the time where prompts begin alike, and we saw no cost where they don't; a new cache
    for each run begins empty. All requests stand in the queue when it starts, and all may run at once.

    Its SDPA path gathers the keys of all requests in the step into one row, lets every query look at all of
    them, and masks what isn't the query's own: the cost grows with the square of the batch. Yet fewer requests
    at a time gained nothing, nor did a MAX_BATCH_TOKENS of 128 to 1024. What gained some 15 % in fp32 is
    transformers' own switch that spares it from repeating keys and values for each query head.

    kv_bytes: its pool.
    """

    about = None
    PAGE_SIZE = 16
    MAX_BATCH_TOKENS = 512
    PATIENCE = 1.0  # seconds between looks at whether its thread still lives

    def __init__(self, options: Options):
        os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] = "1"
        self.model = load_model(options)
        self.kv_bytes_per_token = options.kv_bytes_per_token

    def run(self, load: Load) -> Run:
        blocks = load.blocks(self.PAGE_SIZE)
        manager = self.model.init_continuous_batching(
            generation_config=greedy(max_new_tokens=max(load.outputs), eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=self.PAGE_SIZE,
                num_blocks=blocks,
                max_batch_tokens=self.MAX_BATCH_TOKENS,
                max_requests_per_batch=len(load.prompts),
                allow_block_sharing=True,
                safety_margin=0.0,  # all fits: admit all
            ),
        )
        try:
            manager.warmup()  # makes the cache
            began = time.perf_counter()
            ids = [
                manager.add_request(prompt, max_new_tokens=wanted, record_timestamps=True)
                for prompt, wanted in zip(load.prompts, load.outputs, strict=True)
            ]
            manager.start()
            results = self._collect(manager, len(ids))
            seconds = time.perf_counter() - began
        finally:
            manager.stop(block=True)
            manager.destroy()
        tokens = [results[i].generated_tokens for i in ids]
        first_token = [results[i].timestamps[0] - began for i in ids]
        return Run(tokens, seconds, first_token, blocks * self.PAGE_SIZE * self.kv_bytes_per_token)

    def _collect(self, manager, count: int) -> dict:
        """Finished requests by id, as they come."""
        results: dict = {}
        while len(results) < count:
            result = manager.get_result(timeout=self.PATIENCE)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("the continuous batching thread ended early")
            elif result.error:
                raise RuntimeError(f"request {result.request_id}: {result.error}")
            elif result.is_finished():
                results[result.request_id] = result
        return results
