"""What can only be seen on a GPU: kernels in every dtype, and the engine there against itself on a CPU, token by token.

Skipped without one. `make gpu` runs them all, together with the tests of decode graphs and of the Triton kernels.
"""

import pytest
import torch
from test_triton import Batch
from tiny_model import make_folder

import kernels
from kernels import reference
from minipaged import LLM, BeamSearchParams, SamplingParams
from minipaged.execution.decode_graphs import DecodeGraphs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

PROMPTS = [[1 + (5 * i + 3 * k) % 90 for k in range(n)] for i, n in enumerate((1, 4, 9, 16, 17, 30, 70, 25, 40, 33))]
GREEDY = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (20, 3, 12, 9, 16, 7, 25, 20, 20, 20)]
SAMPLES = SamplingParams(n=3, seed=1, max_tokens=15, ignore_eos=True)
BEAMS = BeamSearchParams(beam_width=3, max_tokens=12, ignore_eos=True)
HEADS = {"llama3-8b": ((32, 8), 128), "smollm2": ((9, 3), 64), "mha-7b": ((32, 32), 128)}
LENGTHS = {  # (context, queries) of each sequence
    "decode alone": [(3000, 1)],
    "decode": [(1, 1), (16, 1), (17, 1), (700, 1), (2049, 1)],
    "prefill": [(600, 600), (33, 33)],
    "mixed": [(500, 1), (300, 300), (800, 20), (40, 1), (129, 2)],
}
DTYPES = {"fp32": (torch.float32, 2e-5), "fp16": (torch.float16, 3e-3), "bf16": (torch.bfloat16, 2e-2)}


# --- kernels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_attention_is_the_references(name, heads, lengths, dtype):
    """Slots beyond a context are NaN: a kernel that reads one shows it. The reference computes on the CPU, in fp32."""
    kind, tolerance = DTYPES[dtype]
    made = Batch(lengths, *HEADS[heads], 16, kind)
    slots, scale = torch.full((len(made.q),), -1, device="cuda"), made.q.shape[2] ** -0.5
    batch = kernels.Batch(slots, made.query_start, made.context_lens, made.tables)
    out = kernels.load(name, "cuda", kind).paged_attention(made.q, made.cache, batch, scale)
    plain = (made.q.float(), made.cache.float(), made.query_start, made.context_lens, made.tables)
    right = reference.paged_attention(*(tensor.cpu() for tensor in plain), scale)
    error = (out.float().cpu() - right).norm(dim=-1) / right.norm(dim=-1)
    assert float(error.max()) <= tolerance  # not so for NaN


@pytest.mark.parametrize("block_size", [1, 8, 64])
def test_attention_in_other_blocks(block_size):
    Batch(LENGTHS["mixed"], (4, 2), 64, block_size, torch.bfloat16).check()


# --- the engine -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("model")))


def tokens(llm: LLM, params) -> list:
    return [[o.token_ids for o in output.outputs] for output in llm.generate(PROMPTS, params)]


def engine(folder: str, device: str = "cuda", **settings) -> LLM:
    settings = {"dtype": "fp32", "block_size": 4, "num_blocks": 400, "max_num_seqs": 8, "seed": 0} | settings
    return LLM(folder, device=device, **settings)


@pytest.fixture(scope="module")
def on_cpu(folder):
    """Greedy tokens, samples and beams, as the reference backend has them."""
    llm = engine(folder, "cpu", kernels="torch")
    return {name: tokens(llm, params) for name, params in (("greedy", GREEDY), ("samples", SAMPLES), ("beams", BEAMS))}


@pytest.mark.parametrize(
    "settings",
    [
        {"kernels": "torch"},
        {"kernels": "triton", "cuda_graphs": False},
        {"kernels": "triton", "debug": True},
        {"prefix_cache": "none"},
        {"prefix_cache": "radix", "block_size": 16},
        {"max_num_batched_tokens": 8},
        {"num_blocks": 36, "preemption": "recompute", "debug": True},
        {"num_blocks": 36, "preemption": "swap", "debug": True},
        {"num_blocks": 36, "preemption": "swap", "cuda_graphs": False},
    ],
    ids=str,
)
def test_the_tokens_of_a_cpu(folder, on_cpu, settings):
    llm = engine(folder, **settings)
    assert tokens(llm, GREEDY) == on_cpu["greedy"]
    assert tokens(llm, SAMPLES) == on_cpu["samples"]
    assert tokens(llm, BEAMS) == on_cpu["beams"]
    assert tokens(llm, GREEDY) == on_cpu["greedy"]  # once more, now with what the prefix cache has
    if settings.get("num_blocks") == 36:
        assert llm.stats().num_preemptions[settings["preemption"]] > 0
    if settings.get("prefix_cache") == "radix":
        assert llm.stats().prefixes.found > 0


def test_the_cpu_pool_is_pinned_if_it_is_needed(folder):
    assert engine(folder, preemption="swap").runner.cpu_cache.is_pinned()
    assert engine(folder, preemption="recompute").runner.cpu_cache.numel() == 0


def test_graphs_stand_before_the_first_request(folder):
    llm = engine(folder)
    graphs = llm.executor.runner.graphs
    assert sorted(graphs.graphs) == graphs.sizes == [1, 2, 4, 8]
    before = torch.cuda.memory_reserved()
    tokens(llm, GREEDY)
    assert sorted(graphs.graphs) == graphs.sizes and not graphs.broken
    assert torch.cuda.memory_reserved() - before < 64 << 20


def test_what_cannot_be_captured_runs_without_graphs(folder, on_cpu):
    """A model that waits for the GPU can't be recorded; afterwards the GPU must be of use all the same."""
    llm, said = engine(folder, cuda_graphs=False), []
    model = llm.executor.runner.model

    def waits(input_ids, positions, cache, batch):
        int(batch.context_lens.sum())
        return model(input_ids, positions, cache, batch)

    llm.executor.runner.graphs = DecodeGraphs(waits, llm.executor.runner.cache, 8, 1024, notice=said.append)
    llm.executor.runner.graphs.record_all()
    assert len(said) == 1 and llm.executor.runner.graphs.broken
    assert tokens(llm, GREEDY) == on_cpu["greedy"] and len(said) == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_freed_blocks_are_poison_on_a_gpu(folder):
    llm, seen = engine(folder, num_blocks=40, debug=True, prefix_cache="none"), []

    def look(plan, output):
        used = {block for s in plan.sequences for block in s.block_table}
        freed = [block for block in plan.freed if block not in used]
        seen.extend(freed)
        assert bool(llm.executor.runner.cache[:, :, :, freed].isnan().all())
        for s in plan.sequences:
            written = llm.executor.runner.cache.flatten(3, 4)[:, :, :, s.slots]
            assert not bool(written.isnan().any())

    llm.observers.append(look)
    tokens(llm, GREEDY)
    tokens(llm, SAMPLES)
    assert len(set(seen)) > 20


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_near(folder, dtype):
    """Logprobs of one long prompt, beside those in fp32."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    prompt = [[1 + (7 * k) % 90 for k in range(200)]]
    found = [engine(folder, dtype=kind).generate(prompt, params)[0].prompt_logprobs for kind in ("fp32", dtype)]
    values = [
        torch.tensor([getattr(next(iter(row.values())), "logprob", next(iter(row.values()))) for row in rows[1:]])
        for rows in found
    ]
    assert len(values[0]) == 199
    assert float((values[0] - values[1]).abs().median()) < 0.1
