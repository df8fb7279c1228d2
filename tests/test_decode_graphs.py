"""Decode graphs on a CPU: recording is played by calling again. What CUDA adds is tested where there is a GPU."""

import pytest
import torch
from tiny_model import make_folder

from minipaged import LLM, SamplingParams
from minipaged.execution.decode_graphs import DecodeGraphs, record_cuda

PROMPTS = [[1 + (5 * i + 3 * k) % 90 for k in range(n)] for i, n in enumerate((1, 4, 9, 16, 17, 30))]
GREEDY = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (20, 3, 12, 9, 16, 7)]


def record_by_calling_again(compute):
    """Like a CUDA graph: the result stays where the recording left it, and is written anew by each replay."""
    result = compute().clone()

    def replay():
        result.copy_(compute())

    return replay, result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("kernels", ["torch", "cpp"])
@pytest.mark.parametrize("num_blocks", [200, 30])
def test_replayed_steps_give_the_same_tokens(folder, kernels, num_blocks):
    """Also when memory runs out, sequences fork, and blocks are copied and used again between replays."""
    settings = dict(kernels=kernels, block_size=4, num_blocks=num_blocks, max_num_seqs=6, debug=True)
    plain, replayed = LLM(folder, **settings), LLM(folder, **settings)
    runner = replayed.executor.runner
    graphs = DecodeGraphs(runner.model, runner.cache, 6, 1024, record_by_calling_again)
    runner.graphs = graphs
    samples = SamplingParams(n=3, seed=1, max_tokens=15, ignore_eos=True)
    for params in (GREEDY, samples):
        expected = [[o.token_ids for o in output.outputs] for output in plain.generate(PROMPTS, params)]
        assert [[o.token_ids for o in output.outputs] for output in replayed.generate(PROMPTS, params)] == expected
    assert graphs.sizes == [1, 2, 4, 6] and len(graphs.graphs) > 1


def test_what_does_not_fit_is_not_replayed(folder):
    llm = LLM(folder, block_size=4, num_blocks=100, max_num_seqs=6)
    graphs = DecodeGraphs(llm.executor.runner.model, llm.executor.runner.cache, 2, 5, record_by_calling_again)
    llm.executor.runner.graphs = graphs
    seen = []
    graphs.run = lambda ids, *rest: seen.append(len(ids)) or DecodeGraphs.run(graphs, ids, *rest)
    llm.generate(PROMPTS, GREEDY)
    assert seen and max(seen) <= 2  # only where two sequences or fewer were left, with five blocks at most


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(folder):
    expected = LLM(folder, device="cuda", dtype="fp32", cuda_graphs=False).generate(PROMPTS, GREEDY)
    llm = LLM(folder, device="cuda", dtype="fp32")
    assert llm.executor.runner.graphs is not None and llm.executor.runner.graphs.record is record_cuda
    outputs = llm.generate(PROMPTS, GREEDY)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]
    assert llm.executor.runner.graphs.graphs
