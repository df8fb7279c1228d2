"""The same bits in any company: a row's logits don't depend on who else is in the batch, how its sequence was cut into
steps, where its blocks lie, or whether they were swapped or found. Everything here is compared by equality.

For backends that promise it (`same_bits`). SAME_BITS_TRIES=200 looks longer.
"""

import os
import random
from dataclasses import replace

import pytest
import torch
from tiny_model import make_folder

import kernels
from minipaged import LLM, SamplingParams
from minipaged.models import load_model, open_checkpoint
from minipaged.models.config import ModelConfig
from minipaged.models.gpt2 import GPT2
from minipaged.models.llama import Llama

TRIES = int(os.environ.get("SAME_BITS_TRIES", 4))
LLAMA = {
    "model_type": "llama", "vocab_size": 101, "hidden_size": 60, "intermediate_size": 210, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 512,
}  # fmt: skip
MODELS = {
    "llama": LLAMA,
    "wide llama": LLAMA | {"head_dim": 64, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 333},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 12},
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 101, "n_embd": 60, "n_layer": 2, "n_head": 5, "n_inner": 211, "n_ctx": 512,
        "n_positions": 512,
    },
}  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16]
KV_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def backend_for(dtype, name="cpp"):
    try:
        return kernels.load(name, dtype=dtype, same_bits=True)
    except kernels.Unavailable as error:
        pytest.skip(str(error))


def make_model(name, dtype):
    config = ModelConfig.from_hf(MODELS[name])
    architecture = GPT2 if name == "gpt2" else Llama
    generator = torch.Generator().manual_seed(1)
    weights = {
        key: (0.3 * torch.randn(shape, generator=generator) + (len(shape) == 1)).to(dtype)
        for key, shape in architecture.tensor_shapes(config).items()
    }
    return architecture(config, weights, backend_for(dtype))


class Company:
    """Sequences over one pool. `step` computes some tokens of some of them, in any order, and keeps their logits."""

    def __init__(self, model, dtype, sequences, block_size, spare, seed):
        """dtype: of keys and values."""
        self.model, self.sequences, self.block_size = model, sequences, block_size
        needed = [-(-len(tokens) // block_size) for tokens in sequences]
        self.num_blocks = sum(needed) + spare
        order = iter(random.Random(seed).sample(range(self.num_blocks), sum(needed)))
        self.tables = [[next(order) for _ in range(n)] for n in needed]
        config = model.config
        shape = (self.num_blocks, block_size, config.num_kv_heads, config.head_size, dtype)
        self.cache = kernels.new_cache(config.num_layers, *shape)
        kernels.poison(self.cache)
        self.computed = [0] * len(sequences)
        self.logits = [[] for _ in sequences]

    def step(self, counts, padding=0):
        """counts: {sequence: tokens}. padding: columns of other people's blocks behind the page tables."""
        ids, positions, slots, starts = [], [], [], [0]
        for s, count in counts.items():
            span = range(self.computed[s], self.computed[s] + count)
            ids += self.sequences[s][span.start : span.stop]
            positions += span
            slots += [self.tables[s][p // self.block_size] * self.block_size + p % self.block_size for p in span]
            starts.append(starts[-1] + count)
            self.computed[s] = span.stop
        width = max(len(self.tables[s]) for s in counts) + padding
        tables = [self.tables[s] + [0] * (width - len(self.tables[s])) for s in counts]
        contexts = [self.computed[s] for s in counts]
        batch = kernels.Batch(*(torch.tensor(x) for x in (slots, starts, contexts, tables)))
        with torch.inference_mode():
            hidden = self.model(torch.tensor(ids), torch.tensor(positions), self.cache, batch)
            rows = self.model.logits(hidden).split([counts[s] for s in counts])
        for s, one in zip(counts, rows, strict=True):
            self.logits[s].append(one)

    def left(self):
        return [s for s, tokens in enumerate(self.sequences) if self.computed[s] < len(tokens)]

    def swap(self):
        """All blocks go to another pool, and come back to other places."""
        backend, everywhere = self.model.backend, torch.arange(self.num_blocks)
        places = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(sum(self.computed)))
        other = torch.empty_like(self.cache)
        kernels.poison(other)
        backend.move_blocks(self.cache, other, everywhere, places.flip(0))
        kernels.poison(self.cache)
        backend.move_blocks(other, self.cache, places.flip(0), places)
        self.tables = [[int(places[block]) for block in table] for table in self.tables]


def alone(model, dtype, sequence):
    company = Company(model, dtype, [sequence], 16, 0, 0)
    company.step({0: len(sequence)})
    return company.logits[0][0]


def wander(company, rng):
    """Compute everything in steps of every kind: decodes, whole prompts, chunks, and all of it mixed."""
    while left := company.left():
        chosen = rng.sample(left, rng.randint(1, len(left)))
        kind = rng.choice((1, 1, 16, 48, 7, 500, None))
        counts = {}
        for s in chosen:
            rest = len(company.sequences[s]) - company.computed[s]
            counts[s] = min(kind or rng.randint(1, 90), rest)
        company.step(counts, padding=rng.choice((0, 0, 1, 9)))
        if rng.random() < 0.1:
            company.swap()


def random_sequences(rng, count, vocab, longest=140):
    lengths = [rng.choice((1, 2, rng.randint(3, 30), rng.randint(30, longest))) for _ in range(count)]
    return [[rng.randrange(vocab) for _ in range(n)] for n in lengths]


def assert_same(found, expected, what):
    """All bits, but for the sign of a zero."""
    assert torch.isfinite(expected).all(), what
    assert torch.equal(found, expected), f"{what}: {int((found != expected).sum())} of {found.numel()} differ"


CASES = [(name, dtype, dtype) for name in MODELS for dtype in DTYPES]
CASES += [(name, dtype, kv) for name in ("wide llama", "qwen3") for dtype in DTYPES for kv in KV_DTYPES.values()]


@pytest.mark.parametrize("name, weights, dtype", CASES, ids=str)
def test_logits_in_any_company_are_those_alone(name, weights, dtype):
    model, rng = make_model(name, weights), random.Random(f"{name} {dtype}")
    for attempt in range(TRIES):
        sequences = random_sequences(rng, rng.choice((2, 3, 9, 17, 33)), model.config.vocab_size)
        expected = [alone(model, dtype, sequence) for sequence in sequences]
        block_size, spare = rng.choice((1, 4, 16, 32, 64)), rng.choice((0, 5, 100))
        company = Company(model, dtype, sequences, block_size, spare, attempt)
        wander(company, rng)
        for s, rows in enumerate(expected):
            assert_same(torch.cat(company.logits[s]), rows, f"try {attempt}, blocks of {block_size}, sequence {s}")


@pytest.mark.parametrize("dtype", [torch.float32, *KV_DTYPES.values()], ids=str)
def test_a_long_context_in_any_company_is_the_one_alone(dtype):
    """Long enough for several spans of attention, alone or beside others, and on two threads, which share them out."""
    model, rng = make_model("wide llama", torch.float32), random.Random(6)
    sequences = [[rng.randrange(101) for _ in range(n)] for n in (2200, 1100, 9)]
    expected = [alone(model, dtype, sequence) for sequence in sequences]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            company = Company(model, dtype, sequences, 16, 3, 0)
            for step in ({0: 700, 2: 9}, {0: 1400, 1: 1000}, {0: 1, 1: 1}, {1: 50}, {0: 1}, {0: 98, 1: 49}):
                company.step(step)
            for s, rows in enumerate(expected):
                assert_same(torch.cat(company.logits[s]), rows, f"sequence {s}")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_token_by_token_is_the_whole_prompt(name):
    """Every position at which a prompt can be cut, by every size of piece that divides work elsewhere."""
    model, rng = make_model(name, torch.float32), random.Random(3)
    sequence = [rng.randrange(101) for _ in range(150)]
    expected = alone(model, torch.float32, sequence)
    for size in (1, 2, 5, 16, 48, 63, 64, 65, 149):
        company = Company(model, torch.float32, [sequence], 16, 3, size)
        while company.left():
            company.step({0: min(size, len(sequence) - company.computed[0])})
        assert_same(torch.cat(company.logits[0]), expected, f"in pieces of {size}")


@pytest.mark.parametrize("into", [45, 576, 1536])
def test_a_row_of_a_native_bf16_product_is_the_same_among_any_number(into):
    one = backend_for(torch.bfloat16)
    linear = one.linear(torch.randn(576, into).bfloat16())
    x = torch.randn(200, into).to(one.dtype)
    whole = linear(x)
    for rows in (*range(1, 20), 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 199):
        part = slice(37 * rows % (201 - rows), 37 * rows % (201 - rows) + rows)
        assert_same(linear(x[part].clone()), whole[part], f"{rows} rows")


@pytest.mark.parametrize("name", MODELS)
def test_two_threads_give_what_one_gives(name):
    model, rng = make_model(name, torch.float32), random.Random(4)
    sequences = random_sequences(rng, 20, 101)
    expected = [alone(model, torch.float32, sequence) for sequence in sequences]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        company = Company(model, torch.float32, sequences, 4, 3, 0)
        company.step({s: len(sequence) for s, sequence in enumerate(sequences)})
    finally:
        torch.set_num_threads(threads)
    for s, rows in enumerate(expected):
        assert_same(company.logits[s][0], rows, f"sequence {s}")


# --- the whole engine -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    backend_for(torch.float32)
    return str(make_folder(tmp_path_factory.mktemp("model")))


def answers(outputs):
    return [
        [(one.token_ids, one.logprobs, one.cumulative_logprob) for one in output.outputs] + [output.prompt_logprobs]
        for output in outputs
    ]


ENGINES = [("fp32", "auto"), ("bf16", "auto"), ("fp32", "int8"), ("fp32", "fp8")]  # dtype, kv_cache_dtype
ROOMY = dict(kernels="cpp", num_blocks=400, prefix_cache="none")
CROWDED = {
    "one batch": dict(num_blocks=400),
    "blocks of 4, swapped": dict(block_size=4, num_blocks=70, preemption="swap", watermark=0.0),
    "blocks of 1, recomputed": dict(block_size=1, num_blocks=240, preemption="recompute", watermark=0.0),
    "small chunks": dict(block_size=32, num_blocks=60, max_num_seqs=9, max_num_batched_tokens=11),
    "found in a tree": dict(block_size=16, num_blocks=60, prefix_cache="radix", max_num_batched_tokens=64),
    "found by hash": dict(block_size=2, num_blocks=200, prefix_cache="hash", max_num_seqs=5),
}


def requests(count):
    rng = random.Random(9)
    start = [rng.randrange(95) for _ in range(40)]
    prompts = [start[: rng.choice((0, 17, 40))] + [rng.randrange(95) for _ in range(rng.randint(1, 30))]
               for _ in range(count)]  # fmt: skip
    base = SamplingParams(max_tokens=9, ignore_eos=True, logprobs=3)
    kinds = [
        dict(temperature=0), dict(temperature=1.3), dict(top_p=0.9, top_k=20), dict(n=3), dict(min_p=0.05),
        dict(repetition_penalty=1.2, frequency_penalty=0.3), dict(prompt_logprobs=2),
    ]  # fmt: skip
    return prompts, [replace(base, seed=i, **kinds[i % len(kinds)]) for i in range(count)]


@pytest.fixture(scope="module")
def each_alone(folder):
    """The answers of an engine that never has more than one request, a new one for each of ENGINES."""
    found = {}
    for dtype, kv in ENGINES:
        os.environ["MINIPAGED_SAME_BITS"] = "1"
        try:
            llm = LLM(folder, dtype=dtype, kv_cache_dtype=kv, **ROOMY)
        finally:
            del os.environ["MINIPAGED_SAME_BITS"]
        found[dtype, kv] = [answers(llm.generate([p], [one]))[0] for p, one in zip(*requests(28), strict=True)]
    return found


@pytest.mark.parametrize("dtype, kv", ENGINES)
@pytest.mark.parametrize("how", CROWDED)
def test_a_crowded_engine_draws_what_each_would_alone(folder, each_alone, monkeypatch, how, dtype, kv):
    """Tokens and logprobs, with prefixes found, forks copied on write, preemption by either way, and chunks."""
    monkeypatch.setenv("MINIPAGED_SAME_BITS", "1")
    llm = LLM(folder, dtype=dtype, kv_cache_dtype=kv, kernels="cpp", debug=True, **CROWDED[how])
    assert llm.executor.runner.backend.same_bits
    outputs = llm.generate(*requests(28))
    for i, (found, expected) in enumerate(zip(answers(outputs), each_alone[dtype, kv], strict=True)):
        assert found == expected, f"request {i}"
    stats = llm.stats()
    if "swapped" in how or "recomputed" in how:
        assert sum(stats.num_preemptions.values()) > 0
    if "swapped" in how:
        assert stats.memory.swapped_in_blocks > 0
    if how != "blocks of 1, recomputed":  # where no block is ever half full
        assert stats.memory.copies > 0


def test_a_real_model():
    """SmolLM2's sizes, at the heights at which work is cut elsewhere: 12 and 96 rows, 48 queries."""
    try:
        checkpoint = open_checkpoint("smollm2")
    except (ValueError, OSError) as error:
        pytest.skip(str(error))
    _, model = load_model(checkpoint, backend=backend_for(torch.float32))
    rng = random.Random(5)
    sequences = [[rng.randrange(49152) for _ in range(n)] for n in (1, 2, 5, 20, 70)]
    expected = [alone(model, torch.float32, sequence) for sequence in sequences]
    company = Company(model, torch.float32, sequences, 16, 3, 0)
    company.step({s: len(tokens) - 1 for s, tokens in enumerate(sequences) if len(tokens) > 1})
    company.step(dict.fromkeys(reversed(company.left()), 1), padding=2)
    for s, rows in enumerate(expected):
        assert_same(torch.cat(company.logits[s]), rows, f"sequence {s}")


# --- what is promised -------------------------------------------------------------------------------------------


def test_who_promises_it():
    assert backend_for(torch.float32).same_bits and backend_for(torch.bfloat16).same_bits
    assert not kernels.TorchBackend().same_bits
    native = kernels.TorchBackend("cpu", torch.bfloat16).dtype == torch.bfloat16
    assert kernels.load("cpp", dtype=torch.bfloat16).same_bits is not native  # oneDNN's order depends on the rows
    assert kernels.load("cpp").same_bits


def test_who_cannot_says_so(monkeypatch):
    with pytest.raises(kernels.Unavailable, match="kernels 'torch' can't give the same bits in any company"):
        kernels.load("torch", same_bits=True)
    monkeypatch.setenv("MINIPAGED_SAME_BITS", "1")
    with pytest.raises(kernels.Unavailable, match="MINIPAGED_SAME_BITS=1.*only 'cpp' can"):
        kernels.load("auto", dtype=torch.float16, notice=lambda line: None)
    assert kernels.load("torch", same_bits=False).name == "torch"
