"""Several processes compute one model: the same tokens as one, whatever happens, and nobody is left behind.

--rank-examples 300 kills, stops and breaks off more often (6 by default).
"""

import gc

import pytest
import torch
from rank_processes import children
from tiny_model import make_folder

from minipaged import LLM, BeamSearchParams, SamplingParams

ROOM = {"block_size": 4, "num_blocks": 60, "max_num_seqs": 16}
PROMPTS = [[5, 6, 7, 8, 9], [1, 2, 3], list(range(30)), [5, 6, 7, 8, 9, 10, 11, 12] * 3]
GREEDY = SamplingParams(temperature=0, max_tokens=16)
WISHES = [
    SamplingParams(temperature=0, max_tokens=16, logprobs=2, prompt_logprobs=2),
    SamplingParams(seed=1, n=3, max_tokens=12, frequency_penalty=0.5),
    SamplingParams(seed=2, max_tokens=9, structured_outputs={"regex": "[a-e]{3,9}(x|12)"}),
    BeamSearchParams(3, max_tokens=8),
]
DRAFT = {"method": "draft", "num_speculative_tokens": 3, "num_branches": 2, "adaptive": False}
NGRAM = {"method": "ngram", "prompt_lookup_min": 1, "num_branches": 2, "num_speculative_tokens": 3}
SMALL = {"num_blocks": 26, "watermark": 0.0, "max_num_batched_tokens": 16}
MECHANISMS = {
    "hash, swap": (2, SMALL | {"prefix_cache": "hash", "preemption": "swap", "debug": True}),
    "radix, recompute, ngram": (3, SMALL | {"prefix_cache": "radix", "preemption": "recompute", "debug": True,
                                            "speculative_config": NGRAM}),
    "draft, int8 cache": (2, {"kv_cache_dtype": "int8", "preemption": "swap", "speculative_config": DRAFT}),
    "int8 weights, fp8 cache": (2, {"quantization": "int8", "kv_cache_dtype": "fp8"}),
    "PyTorch's kernels": (3, {"kernels": "torch", "chunked_prefill": False}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("ranks")))


@pytest.fixture(autouse=True)
def nobody_is_left_behind():
    yield
    gc.collect()
    assert children() == {}, "ranks are left"


@pytest.fixture
def pair(folder):
    """Two ranks, each a process."""
    with LLM(folder, tensor_parallel_size=2, **ROOM) as llm:
        yield llm


def pids(llm):
    return [member.pid for member in llm.executor._ranks.team.members]


def told(output):
    outputs = [(o.index, o.text, o.token_ids, o.finish_reason) for o in output.outputs]
    return outputs, [sorted(best) for best in (output.prompt_logprobs or []) if best]


def numbers(output):
    """All logprobs of an answer."""
    places = [o.logprobs for o in output.outputs if o.logprobs] + [output.prompt_logprobs or []]
    return torch.tensor([one.logprob for place in places for best in place if best for one in best.values()])


def ask_all(llm):
    return [output for wish in WISHES for output in llm.generate(PROMPTS, wish)]


# ---- the same as one process ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_same_tokens_as_one_process(folder, name):
    size, options = MECHANISMS[name]
    guesses = options.get("speculative_config")
    if guesses is DRAFT:
        options = options | {"speculative_config": DRAFT | {"model": folder}}
    options = ROOM | options
    with LLM(folder, **options) as alone, LLM(folder, tensor_parallel_size=size, **options) as llm:
        assert len(pids(llm)) == size - 1
        assert llm.block_bytes >= alone.block_bytes
        for one, many in zip(ask_all(alone), ask_all(llm), strict=True):
            assert told(many) == told(one)
            torch.testing.assert_close(numbers(many), numbers(one), rtol=0, atol=0.05 if "cache" in name else 1e-4)
        stats = llm.stats()
        assert "num_blocks" not in options or not guesses or stats.speculation.num_accepted_tokens > 0
        assert stats.memory.used == 0
        if options.get("watermark") == 0.0:
            assert sum(stats.num_preemptions.values()) > 0
