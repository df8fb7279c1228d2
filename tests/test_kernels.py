"""Every fast kernel against its plain reference, with poison wherever nothing may be read or left unwritten."""

import math

import cpp_builds
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import cpp, reference
from kernels.cache import LARGEST, codes, is_quantized, scales

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
BYTES = [torch.int8, torch.float8_e4m3fn]
TOLERANCE |= dict.fromkeys(BYTES, 2e-5)  # of what the codes say: beyond that a cache of a byte is one of fp32
FACES = ("torch", "cpp", *cpp_builds.others())


@pytest.fixture(scope="session", params=FACES)
def backend(request):
    """A function dtype -> backend. With --sanitize, C++ is built with sanitizers."""
    sanitize = request.config.getoption("--sanitize")
    if sanitize and request.param != "cpp":
        pytest.skip("for the sanitizers one face is enough")
    if request.param == "torch":
        return lambda dtype: kernels.TorchBackend("cpu", dtype)
    built = cpp_builds.library(request.param, sanitize)
    return lambda dtype: cpp.CppBackend(dtype, built)


def make_batch(contexts, counts, block_size, num_blocks, generator):
    """Page tables over a pool, scrambled; blocks beyond the context are whatever comes, as in a padded table."""
    needed = [-(-c // block_size) for c in contexts]
    order = torch.randperm(num_blocks, generator=generator).tolist()
    tables, taken = [], 0
    for n in needed:
        tables.append(order[taken : taken + n] + [0] * (max(needed) - n))
        taken += n
    slots = [
        tables[s][p // block_size] * block_size + p % block_size
        for s, (context, count) in enumerate(zip(contexts, counts, strict=True))
        for p in range(context - count, context)
    ]
    starts = torch.tensor([0, *counts]).cumsum(0)
    return kernels.Batch(torch.tensor(slots), starts, torch.tensor(contexts), torch.tensor(tables))


def make_cache(batch, contexts, kv_heads, head_size, block_size, num_blocks, dtype, generator):
    """One layer's cache: random where a context lies, NaN everywhere else."""
    cache = kernels.new_cache(1, num_blocks, block_size, kv_heads, head_size, dtype)
    kernels.poison(cache)
    for table, context in zip(batch.block_tables, contexts, strict=True):
        position = torch.arange(context)
        slots = table[position // block_size] * block_size + position % block_size
        numbers = torch.randn(2, context, kv_heads, head_size, generator=generator)
        kernels.TorchBackend().write_kv(*numbers, cache[0], kernels.Batch(slots, *[torch.tensor(())] * 3))
    return cache[0]


LENGTHS = st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), min_size=1, max_size=9)


@settings(max_examples=60)
@given(
    lengths=LENGTHS,
    heads=st.sampled_from([(9, 3), (5, 1), (4, 4), (6, 2), (32, 2)]),
    head_size=st.sampled_from([4, 6, 32, 48, 64, 80, 128, 256]),
    block_size=st.sampled_from([1, 2, 3, 4, 16, 64, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, *BYTES]),
    compute=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)
def test_paged_attention_equals_the_reference(backend, lengths, heads, head_size, block_size, dtype, compute, seed):
    generator = torch.Generator().manual_seed(seed)
    contexts = [max(pair) for pair in lengths]
    counts = [1 if seed % 3 and s % 2 else min(pair) for s, pair in enumerate(lengths)]  # decode, prefill, mixed
    num_blocks = sum(-(-c // block_size) for c in contexts) + 3
    batch = make_batch(contexts, counts, block_size, num_blocks, generator)
    one = backend(torch.float32 if dtype in BYTES else dtype)
    if one.name == "cpp" and dtype == torch.float16:
        dtype = torch.float32
    if dtype in BYTES:
        head_size += -head_size % 4
    cache = make_cache(batch, contexts, heads[1], head_size, block_size, num_blocks, dtype, generator)
    rows = torch.randn(sum(counts), heads[0] + 2, head_size, generator=generator)  # as in the product for q, k and v
    q = rows.to(compute if one.name == "cpp" else torch.float32)[:, : heads[0]]

    out = one.paged_attention(q, cache, batch, head_size**-0.5)
    expected = reference.paged_attention(
        q, cache, batch.query_start, batch.context_lens, batch.block_tables, head_size**-0.5
    )
    assert out.shape == q.shape and out.is_contiguous()
    tolerance = max(TOLERANCE[dtype], TOLERANCE[q.dtype])
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


def test_attention_keeps_its_accuracy_where_scores_are_large(backend):
    """Scores far apart: e^x would overflow without the largest taken off, and underflow must be 0, not garbage."""
    generator = torch.Generator().manual_seed(1)
    batch = make_batch([130, 7], [3, 1], 4, 50, generator)
    cache = make_cache(batch, [130, 7], 2, 32, 4, 50, torch.float32, generator)
    q = 100 * torch.randn(4, 6, 32, generator=generator)
    out = backend(torch.float32).paged_attention(q, cache, batch, 1.0)
    expected = reference.paged_attention(q, cache, batch.query_start, batch.context_lens, batch.block_tables, 1.0)
    torch.testing.assert_close(out, expected, atol=2e-4, rtol=2e-4)


LONG = [([2500, 1100, 30], [1, 1, 1]), ([2500], [1]), ([1024, 1025, 2049], [1, 2, 70])]


@pytest.mark.parametrize("dtype", [torch.float32, *BYTES])
@pytest.mark.parametrize("contexts, counts", LONG)
def test_long_contexts_against_fp64(backend, contexts, counts, dtype):
    """On one thread or several, which cut a context into spans: near the exact answer, and all the same bits."""
    generator = torch.Generator().manual_seed(2)
    batch = make_batch(contexts, counts, 16, 400, generator)
    cache = make_cache(batch, contexts, 2, 64, 16, 400, dtype, generator)
    q = torch.randn(sum(counts), 6, 64, generator=generator)
    one, outs, threads = backend(torch.float32), [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            outs.append(one.paged_attention(q, cache, batch, 0.2))
    finally:
        torch.set_num_threads(threads)
    if one.same_bits:
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    exact = []
    for s, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        blocks = batch.block_tables[s, : -(-context // 16)]
        numbers = codes(cache)[:, :, blocks].double()
        if is_quantized(cache):
            numbers *= scales(cache)[:, :, blocks][..., None].double()
        keys, values = numbers.flatten(2, 3)[:, :, :context].repeat_interleave(3, 1)
        begin = int(batch.query_start[s])
        scores = 0.2 * q[begin : begin + count].double().transpose(0, 1) @ keys.transpose(1, 2)  # [H, count, context]
        mask = torch.ones(count, context, dtype=torch.bool).tril(context - count)
        exact.append((scores.masked_fill(~mask, -math.inf).softmax(-1) @ values).transpose(0, 1))
    assert (outs[0] - torch.cat(exact)).abs().max() < 5e-6


@pytest.mark.parametrize("dtype", BYTES)
def test_codes_of_bytes(backend, dtype):
    """Every face writes the codes and scales of the reference, bit for bit, whatever the numbers are."""
    one, generator = backend(torch.float32), torch.Generator().manual_seed(3)
    x = torch.randn(300, 15, 36, generator=generator) * torch.randn(300, 15, 1, generator=generator).exp()
    x[3], x[4, 9], x[5, 12, 7], x[6, 10, 2], x[7, 14, 3] = 0, 0, torch.nan, torch.inf, -torch.inf
    x[8] *= 1e-9  # below the smallest scale
    x[9], x[10, :, 1:], x[11] = 1e30, x[10, :, 1:] / 5000, torch.arange(36) - 18.5
    x[12] = (torch.arange(36) / 2 - 9).where(torch.arange(36) > 0, 127)  # halves
    x[13, :, 1:], x[13, :, 0] = torch.arange(35) / 1024 - 0.015, 448
    everything = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0)
    x[14:24, 9:] = torch.cat((everything, everything + 0.001))[: 360].view(10, 1, 36)
    q, k, v = x.split((9, 3, 3), 1)
    turns = torch.ones(300, 18), torch.zeros(300, 18)
    slots = torch.randperm(400, generator=generator)[:300]
    slots[20] = -1
    batch = kernels.Batch(slots, *[torch.tensor(())] * 3)
    for static in (None, (0.01, 0.5)):
        expected, written, turned = kernels.new_cache(3, 100, 4, 3, 36, dtype)
        for cache in (expected, written, turned):
            kernels.poison(cache[None])
        reference.write_kv(k, v, expected, slots, static)
        one.write_kv(k, v, written, batch, static)
        one.rope_and_write(q.clone(), k, v, *turns, turned, batch, static)
        bits = [codes(cache).view(torch.uint8) for cache in (expected, written, turned)]
        assert torch.equal(bits[1], bits[0])
        minus_0 = 0x80 if dtype == torch.float8_e4m3fn else 0  # turned by nothing, it is 0
        assert torch.equal(*(x.where(x != minus_0, 0) for x in (bits[2], bits[0])))
        for found in (written, turned):
            assert torch.equal(scales(found).view(torch.int32), scales(expected).view(torch.int32))
        assert int(scales(expected).isnan().sum()) == 3 + 2 * 3 * 101  # one row of each that isn't finite, and poison


@pytest.mark.parametrize("dtype", BYTES)
def test_what_eight_bits_lose(dtype):
    """Half a step: 1/254 of the largest number in int8, 1/16 of each in fp8, and half of 2^-9 codes near 0."""
    x = torch.randn(50, 4, 64) * torch.logspace(-3, 3, 50)[:, None, None]
    found, by = reference.quantize(x, dtype)
    lost = (found.float() * by[..., None] - x).abs()
    step = by[..., None].expand_as(x)
    half = step / 2 if dtype == torch.int8 else torch.maximum(x.abs() / 16, step * 2**-10)
    assert (lost <= half * 1.0001).all() and lost.max() > 0
    assert torch.equal(found.float().abs().amax(-1), torch.full((50, 4), LARGEST[dtype]))
    torch.testing.assert_close(by, x.abs().amax(-1) / LARGEST[dtype])
    fixed, same = reference.quantize(torch.tensor([[1.0, -1000.0, 3.0, 0.0]]), dtype, 0.5)
    assert (fixed.float() * same[..., None]).tolist() == [[1.0, -LARGEST[dtype] / 2, 3.0, 0.0]]


@pytest.mark.parametrize("dtype", BYTES)
def test_blocks_of_bytes_carry_their_scales(dtype):
    """Copied and moved whole, and their poison is NaN in what is read."""
    x = torch.randn(2, 32, 2, 8)
    cache, other = kernels.new_cache(1, 8, 4, 2, 8, dtype), kernels.new_cache(1, 3, 4, 2, 8, dtype)
    assert cache.nbytes == 2 * 32 * 2 * (8 + 4)
    reference.write_kv(*x, cache[0], torch.arange(32))
    before = reference.dequantize(cache)
    assert (before[0].flatten(2, 3).transpose(1, 2) - x).abs().max() < 0.2  # [2, G, N B, D] -> [2, T, G, D]
    reference.copy_blocks(cache, torch.tensor([1, 2]), torch.tensor([2, 3]))
    reference.move_blocks(cache, other, torch.tensor([7, 2]), torch.tensor([0, 1]))
    after, moved = reference.dequantize(cache), reference.dequantize(other)
    assert torch.equal(after[:, :, :, [2, 3, 0, 1]], before[:, :, :, [1, 2, 0, 1]])
    assert torch.equal(moved[:, :, :, [0, 1]], before[:, :, :, [7, 1]])
    kernels.poison(cache, [2, 5])
    gone = reference.dequantize(cache).isnan().all(-1).all(-1)[0, 0, 0]
    assert gone.tolist() == [block in (2, 5) for block in range(8)]
    with pytest.raises(ValueError, match="a multiple of 4, not 6"):
        kernels.new_cache(1, 8, 4, 2, 6, dtype)


@pytest.mark.parametrize("dtype", BYTES)
def test_a_stale_read_of_bytes_shows(backend, dtype):
    generator = torch.Generator().manual_seed(1)
    batch = make_batch([70], [1], 4, 20, generator)
    cache = make_cache(batch, [70], 1, 32, 4, 20, dtype, generator)
    q = torch.randn(1, 2, 32)
    assert backend(torch.float32).paged_attention(q, cache, batch, 0.2).isfinite().all()
    batch.plan = None
    for part in (0, 1):
        poisoned = cache.clone()
        kernels.poison(poisoned[None, part : part + 1], [int(batch.block_tables[0, 3])])
        assert backend(torch.float32).paged_attention(q, poisoned, batch, 0.2).isnan().any(-1).all()


def test_a_stale_read_shows(backend):
    """NaN in a slot of the context reaches the output: debug mode counts on it."""
    generator = torch.Generator().manual_seed(1)
    batch = make_batch([70], [1], 4, 20, generator)
    cache = make_cache(batch, [70], 1, 32, 4, 20, torch.float32, generator)
    for part in (0, 1):
        poisoned = cache.clone()
        poisoned[part, :, batch.block_tables[0, 3], 2] = torch.nan
        out = backend(torch.float32).paged_attention(torch.randn(1, 2, 32), poisoned, batch, 0.2)
        assert out.isnan().any(-1).all()


def test_reference_attention_is_ordinary_attention():
    """One sequence, blocks in order: the textbook formula on contiguous tensors."""
    generator = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(11, heads, 8, generator=generator) for heads in (2, 2, 4))
    batch = make_batch([11], [11], 4, 5, generator)
    cache = torch.full((2, 2, 5, 4, 8), torch.nan)
    reference.write_kv(k, v, cache, batch.slot_mapping)
    out = reference.paged_attention(q, cache, batch.query_start, batch.context_lens, batch.block_tables, 0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True, scale=0.5, enable_gqa=True
    )
    torch.testing.assert_close(out, expected.transpose(0, 1))


@settings(max_examples=40)
@given(
    lengths=LENGTHS,
    heads=st.sampled_from([(9, 3), (5, 1), (4, 4), (6, 2)]),
    block_size=st.sampled_from([1, 2, 3, 16, 64]),
    dtype=st.sampled_from([torch.float32, torch.float16, *BYTES]),
    loud=st.sampled_from([1, 100]),
    seed=st.integers(0, 2**20),
)
def test_online_softmax_is_ordinary_softmax(lengths, heads, block_size, dtype, loud, seed):
    generator = torch.Generator().manual_seed(seed)
    contexts = [max(pair) for pair in lengths]
    counts = [seed % 2 * min(pair) for pair in lengths[1:]] + [min(lengths[0])]  # some have no query at all
    contexts = contexts[1:] + contexts[:1]
    num_blocks = sum(-(-c // block_size) for c in contexts) + 3
    batch = make_batch(contexts, counts, block_size, num_blocks, generator)
    cache = make_cache(batch, contexts, heads[1], 8, block_size, num_blocks, dtype, generator)
    q = loud * torch.randn(sum(counts), heads[0], 8, generator=generator)
    given = q, cache, batch.query_start, batch.context_lens, batch.block_tables, 0.5
    expected, found = reference.paged_attention(*given), reference.paged_attention_by_blocks(*given)
    torch.testing.assert_close(found, expected, atol=1e-4 * loud, rtol=1e-4 * loud)


def test_many_sequences_fall_into_several_buckets():
    """Long and short contexts are not padded to one width, and a bucket does not outgrow the cache."""
    generator = torch.Generator().manual_seed(0)
    contexts = [600] * 4 + [5] * 60
    batch = make_batch(contexts, [1] * 64, 4, 730, generator)
    cache = make_cache(batch, contexts, 1, 4, 4, 730, torch.float32, generator)
    q = torch.randn(64, 2, 4, generator=generator)
    out = kernels.TorchBackend().paged_attention(q, cache, batch, 0.5)
    assert batch.plan is not None and [len(b.rows) for b in batch.plan.buckets] == [4, 60]
    expected = reference.paged_attention(
        q, cache, batch.query_start, batch.context_lens, batch.block_tables, 0.5
    )
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [[5], [0, 7, 3], [-1, 6, -1], [-1], [7, -1, 2, 0, 5, 6]])
def test_writes_go_to_their_slots_and_nowhere_else(backend, slots, dtype):
    one = backend(dtype)
    q, k, v = torch.randn(len(slots), 15, 6).split((9, 3, 3), 1)  # as in the product for all three: with gaps
    cos, sin = torch.randn(2, len(slots), 3)
    caches = torch.full((4, 2, 3, 2, 4, 6), torch.nan, dtype=dtype)
    batch = kernels.Batch(torch.tensor(slots), *[torch.tensor(())] * 3)
    one.write_kv(k, v, caches[0], batch)
    reference.write_kv(k, v, caches[1], batch.slot_mapping)
    torch.testing.assert_close(caches[0], caches[1], equal_nan=True, atol=0, rtol=0)
    expected = reference.rope(q, cos, sin)
    reference.write_kv(reference.rope(k, cos, sin), v, caches[3], batch.slot_mapping)
    turned = one.rope_and_write(q, k, v, cos, sin, caches[2], batch)
    torch.testing.assert_close(turned, expected)
    torch.testing.assert_close(caches[2], caches[3], equal_nan=True, atol=1e-5, rtol=1e-2 * (dtype != torch.float32))
    for cache in caches:
        assert int((~cache.isnan()).sum()) == 2 * 3 * 6 * sum(slot >= 0 for slot in slots)


def test_copy_blocks_reads_before_it_writes():
    cache = torch.arange(4.0).view(1, 1, 1, 4, 1, 1).expand(2, 2, 3, 4, 5, 6).clone()
    reference.copy_blocks(cache, torch.tensor([1, 2]), torch.tensor([2, 3]))  # block 2 is a source and a target
    assert cache[1, 1, 2, :, 4, 5].tolist() == [0, 1, 1, 2]


def test_move_blocks_between_pools_of_different_sizes():
    from_cache, to_cache = torch.randn(2, 2, 3, 6, 4, 5), torch.zeros(2, 2, 3, 2, 4, 5)
    reference.move_blocks(from_cache, to_cache, torch.tensor([5, 0]), torch.tensor([0, 1]))
    assert torch.equal(to_cache[:, :, :, 0], from_cache[:, :, :, 5])
    assert torch.equal(to_cache[:, :, :, 1], from_cache[:, :, :, 0])


@pytest.mark.parametrize("rows", [1, 2, 7, 33, 97])
@pytest.mark.parametrize("shape", [(1, 1), (24, 40), (33, 200), (64, 577)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(backend, rows, shape, bias):
    torch.manual_seed(rows)
    weight, x, y = torch.randn(shape), torch.randn(rows, shape[1]), torch.randn(rows, shape[0])
    b = torch.randn(shape[0]) if bias else None
    linear = backend(torch.float32).linear(weight, b)
    expected = x.double() @ weight.double().T + (b.double() if b is not None else 0)
    torch.testing.assert_close(linear(x), expected.float(), atol=5e-5, rtol=1e-5)
    total = (y + expected).float()
    assert linear(x, add_to=y) is y
    torch.testing.assert_close(y, total, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_computes_where_the_machine_can(backend, dtype, rows):
    one = backend(dtype)
    if one.name == "cpp" and dtype == torch.float16:
        pytest.skip("not in C++")
    weight = torch.randn(24, 400).to(dtype)
    x = torch.randn(rows, 400).to(one.dtype)
    out = one.linear(weight)(x)
    assert out.dtype == x.dtype
    torch.testing.assert_close(out.float(), x.float() @ weight.float().T, atol=0.1, rtol=2e-2)


def test_what_is_added_to_may_be_large(backend):
    """A residual stream holds numbers in the thousands: sums must not begin with them."""
    weight, x, y = torch.randn(16, 600), torch.randn(3, 600) / 100, torch.full((3, 16), 5000.0)
    expected = (y.double() + x.double() @ weight.double().T).float()
    backend(torch.float32).linear(weight)(x, add_to=y)
    torch.testing.assert_close(y, expected, atol=5e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 5, 16, 70])
def test_norm_and_gate(backend, dtype, width):
    one = backend(torch.float32)
    x, weight = torch.randn(9, 2 * width).to(dtype), torch.randn(2 * width).to(dtype)
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {}
    expected = torch.nn.functional.rms_norm(x, (2 * width,), weight, 1e-5)
    torch.testing.assert_close(one.rms_norm(x, weight, 1e-5), expected, **tolerance)
    torch.testing.assert_close(one.rms_norm(x[:, None], weight, 1e-5)[:, 0], expected, **tolerance)
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(one.silu_and_mul(x), gate * gate.sigmoid() * up, **tolerance)
    extreme = torch.tensor([[-200.0, 200.0, 0.0, torch.nan, -87.5, 30.0] * 2]).repeat(1, 5)
    torch.testing.assert_close(one.silu_and_mul(extreme), reference.silu_and_mul(extreme), equal_nan=True)


def test_rope_turns_by_the_position():
    """Position 0 is left alone, lengths are kept, and q . k depends on the distance alone."""
    x = torch.randn(1, 2, 8)
    angles = torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
    turned = reference.rope(x.expand(6, 2, 8), angles.cos(), angles.sin())
    torch.testing.assert_close(turned[0], x[0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1).expand(6, 2))
    products = torch.einsum("ihd,jhd->hij", turned, turned)
    torch.testing.assert_close(products[:, 0, 2], products[:, 3, 5])


def test_the_c_plus_plus_tests_under_sanitizers(request):
    cpp_builds.again_under_sanitizers(__file__, request)


# --- the same bits in any company, for those that promise them: see test_same_bits.py ---------------------------


def promising(backend, dtype):
    one = backend(dtype)
    if not one.same_bits:
        pytest.skip("not promised")
    return one


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(70, 577), (33, 192), (5, 7)])
def test_a_row_of_a_product_is_the_same_among_any_number(backend, shape, weights):
    one = promising(backend, torch.float32)
    linear = one.linear(torch.randn(shape).to(weights), torch.randn(shape[0]))
    x, y = torch.randn(200, shape[1]), torch.randn(200, shape[0])
    whole, added = linear(x), linear(x, add_to=y.clone())
    for rows in range(1, 201):
        first = 37 * rows % (201 - rows)
        part = slice(first, first + rows)
        assert torch.equal(linear(x[part].clone()), whole[part]), rows
        assert torch.equal(linear(x[part].clone(), add_to=y[part].clone()), added[part]), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 5, 16, 70, 192])
def test_small_operations_do_not_look_beside_them(backend, dtype, width):
    one = promising(backend, torch.float32)
    x, weight = 3 * torch.randn(300, 2 * width).to(dtype), torch.randn(2 * width).to(dtype)
    operations = {
        "norm": lambda x: one.rms_norm(x, weight, 1e-5),
        "norm of heads": lambda x: one.rms_norm(x[:, None].expand(-1, 3, -1), weight, 1e-5),
        "gate": one.silu_and_mul,
        "gelu": lambda x: one.pointwise(torch.nn.functional.gelu, x),
        "gelu_new": lambda x: one.pointwise(lambda x: torch.nn.functional.gelu(x, approximate="tanh"), x),
        "silu": lambda x: one.pointwise(torch.nn.functional.silu, x),
        "tanh": lambda x: one.pointwise(torch.tanh, x),
        "cos": lambda x: (50 * x.float()).cos(),
        "layer norm": lambda x: torch.nn.functional.layer_norm(x, (2 * width,)),
        "log_softmax": lambda x: x.float().log_softmax(-1),
    }
    for name, operation in operations.items():
        whole = operation(x)
        for rows in (1, 2, 3, 5, 7, 8, 11, 13, 16, 31, 33, 64, 97, 200):
            part = slice(53 * rows % (301 - rows), 53 * rows % (301 - rows) + rows)
            assert torch.equal(operation(x[part].clone()), whole[part]), (name, rows)


def test_pointwise_is_the_function_itself(backend):
    x = torch.randn(3, 7, 50)[:, :, ::2]
    out = backend(torch.float32).pointwise(torch.tanh, x.reshape(21, 25))
    torch.testing.assert_close(out, x.reshape(21, 25).tanh())


@settings(max_examples=25)
@given(
    contexts=st.lists(st.integers(1, 200), min_size=1, max_size=6),
    heads=st.sampled_from([(9, 3), (5, 1), (4, 4), (32, 2)]),
    head_size=st.sampled_from([8, 32, 64, 80]),
    block_size=st.sampled_from([1, 3, 4, 16, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, *BYTES]),
    seed=st.integers(0, 2**20),
)
def test_a_query_is_the_same_in_any_company(backend, contexts, heads, head_size, block_size, dtype, seed):
    """The last queries of each sequence, any number of them, beside others: as in the prefill of it alone."""
    one, generator = promising(backend, torch.float32), torch.Generator().manual_seed(seed)
    counts = [1 if seed % 3 == 0 else int(torch.randint(c, (), generator=generator)) + 1 for c in contexts]
    num_blocks = sum(-(-c // block_size) for c in contexts) + 3
    batch = make_batch(contexts, counts, block_size, num_blocks, generator)
    cache = make_cache(batch, contexts, heads[1], head_size, block_size, num_blocks, dtype, generator)
    q = [torch.randn(c, heads[0], head_size, generator=generator) for c in contexts]
    last = torch.cat([rows[-count:] for rows, count in zip(q, counts, strict=True)])
    out = one.paged_attention(last, cache, batch, 0.3).split(counts)
    for s, context in enumerate(contexts):
        slots = [int(batch.block_tables[s, p // block_size]) * block_size + p % block_size for p in range(context)]
        straight = kernels.new_cache(1, context, 1, heads[1], head_size, dtype)[0]  # blocks of one, side by side
        codes(straight)[...] = codes(cache).flatten(2, 3)[:, :, slots][:, :, :, None]
        if is_quantized(cache):
            scales(straight)[...] = scales(cache).flatten(2, 3)[:, :, slots][..., None]
        starts, table = torch.tensor([0, context]), torch.arange(context)[None]
        alone = kernels.Batch(torch.tensor(()), starts, torch.tensor([context]), table)
        assert torch.equal(out[s], one.paged_attention(q[s], straight, alone, 0.3)[-counts[s] :]), s
