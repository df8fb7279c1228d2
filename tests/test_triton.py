"""The Triton kernels against the plain reference: on a GPU where there is one, else under Triton's interpreter.

The interpreter must be chosen before anything imports triton, so conftest.py does it. It runs programs one after
another, about 10 ms for an iteration of a loop: shapes are small here, and larger on a GPU. bf16 is for the GPU alone.
Poison everywhere: outputs are NaN before, and so is every slot that no sequence may read.
"""

import os
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import reference
from kernels.cache import codes, scales

pytest.importorskip("triton", reason="Triton is not installed")
GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

from kernels import triton_attention, triton_cache  # noqa: E402
from kernels.triton_tiles import Tiles, power_of_2  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])
BYTES = [torch.int8, torch.float8_e4m3fn]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2} | dict.fromkeys(BYTES, 2e-5)
LONGEST = 1500 if GPU else 64


class Batch:
    """A flat batch of random contents over random page tables.

    lengths: (context, queries) of each sequence. Tables take their blocks from a small pool, so blocks lie anywhere,
    come twice in a table and belong to several sequences. What lies beyond a context in a table is a block of NaN.
    """

    def __init__(self, lengths, heads, head_size, block_size, dtype, seed=0, cache_dtype=None, index=torch.int64):
        generator = torch.Generator().manual_seed(seed)
        contexts, counts = [context for context, _ in lengths], [count for _, count in lengths]
        width = max(-(-c // block_size) for c in contexts) + 1
        num_blocks = max(2, sum(-(-c // block_size) for c in contexts) * 3 // 4) + 1
        tables = torch.randint(num_blocks - 1, (len(lengths), width), generator=generator)
        cache = torch.full((2, heads[1], num_blocks, block_size, head_size), torch.nan)
        for table, context in zip(tables, contexts, strict=True):
            position = torch.arange(context)
            block, offset = table[position // block_size], position % block_size
            cache[:, :, block, offset] = torch.randn(2, heads[1], context, head_size, generator=generator)
            table[-(-context // block_size) :] = num_blocks - 1
        rows = sum(counts)
        qkv = torch.randn(rows, heads[0] + 2 * heads[1], head_size, generator=generator).to(DEVICE, dtype)
        self.q = qkv[:, : heads[0]]  # as a model hands it over: a view
        self.cache = in_bytes(cache, cache_dtype) if cache_dtype in BYTES else cache.to(DEVICE, cache_dtype or dtype)
        self.query_start = torch.tensor([0, *counts]).cumsum(0).to(DEVICE, index)
        self.context_lens = torch.tensor(contexts).to(DEVICE, index)
        self.tables = tables.to(DEVICE, index)
        self.maxima = max(counts), max(contexts)

    def check(self, num_splits=None, small=False):
        """The kernels' output, found equal to the reference's."""
        args = (self.q, self.cache, self.query_start, self.context_lens, self.tables, self.q.shape[2] ** -0.5)
        out = torch.full(self.q.shape, torch.nan, dtype=self.q.dtype, device=DEVICE)
        tiles = small_tiles if small else triton_attention.choose_tiles
        with mock.patch.object(triton_attention, "choose_tiles", tiles):
            result = triton_attention.paged_attention(*args, *self.maxima, num_splits, out)
        assert result is out
        tolerance = max(TOLERANCE[out.dtype], TOLERANCE[self.cache.dtype])
        torch.testing.assert_close(out, reference.paged_attention(*args), atol=tolerance, rtol=tolerance)
        return out


def in_bytes(cache, dtype):
    """The numbers of a cache [2, G, N, B, D] in one of eight bits."""
    _, heads, blocks, size, head_size = cache.shape
    written = kernels.new_cache(1, blocks, size, heads, head_size, dtype)[0]
    found = reference.quantize(cache, dtype)
    codes(written).view(torch.uint8)[...], scales(written)[...] = found[0].view(torch.uint8), found[1]
    return written.to(DEVICE)


def small_tiles(group_size, head_size, itemsize, decode, few):
    """Few queries and 16 keys at a time, so that short contexts take several iterations, and splits have work."""
    queries = 1 if decode else 5
    return Tiles(queries, power_of_2(max(queries * group_size, 16)), 16, 4, 2)


counts = st.one_of(st.integers(0, 1), st.integers(0, LONGEST // 4))


@settings(max_examples=200 if GPU else 25)
@given(
    lengths=st.lists(st.tuples(st.integers(1, LONGEST), counts), min_size=1, max_size=3),
    heads=st.sampled_from([(3, 1), (4, 2), (2, 2)]),
    head_size=st.sampled_from([8, 16, 20, 32]),
    block_size=st.sampled_from([1, 2, 3, 4, 7, 16, 64]),
    dtype=st.sampled_from(DTYPES),
    cache_dtype=st.sampled_from([None, *BYTES]),
    index=st.sampled_from([torch.int32, torch.int64]),
    splits=st.sampled_from([None, 1, 2, 3]),
    small=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_attention_equals_the_reference(
    lengths, heads, head_size, block_size, dtype, cache_dtype, index, splits, small, seed
):  # fmt: skip
    lengths = [(context, min(count, context)) for context, count in lengths]
    if not any(count for _, count in lengths):
        lengths[0] = (lengths[0][0], 1)
    Batch(lengths, heads, head_size, block_size, dtype, seed, cache_dtype, index).check(splits, small)


@pytest.mark.parametrize("block_size", [1, 3, 256])
@pytest.mark.parametrize("head_size", [64, 80, 96])
def test_real_head_sizes_and_extreme_blocks(head_size, block_size):
    Batch([(50, 1), (33, 20)], (3, 1), head_size, block_size, torch.float16).check()


@pytest.mark.parametrize("head_size", [128, 256])
def test_large_heads(head_size):
    Batch([(20, 1), (9, 9)], (2, 1), head_size, 16, torch.float32).check()


@pytest.mark.parametrize("heads", [(9, 3), (5, 1), (6, 6), (40, 1)])
def test_every_query_head_finds_its_keys(heads):
    """40 heads over one: a tile of a prefill holds no more than one query."""
    Batch([(17, 1), (6, 6)], heads, 16, 4, torch.float32).check()


@pytest.mark.parametrize("splits", [1, 2, 3, 4, 7])
def test_any_number_of_splits_gives_the_same(splits):
    """Of 64 keys in tiles of 16 no more than four splits get any; the rest of them leave nothing behind."""
    Batch([(64, 1), (17, 1)], (3, 1), 16, 4, torch.float32).check(splits, small=True)
    Batch([(64, 3), (9, 9), (40, 1)], (2, 1), 16, 4, torch.float32).check(splits, small=True)


def test_contexts_of_one_token():
    Batch([(1, 1), (1, 1), (1, 1)], (3, 1), 16, 16, torch.float32).check()


@pytest.mark.parametrize("splits", [1, 3])
def test_padding_gives_zeros_and_writes_nothing_else(splits):
    """As a CUDA graph pads its batch: queries over no context, sequences of no queries, rows of nobody."""
    batch = Batch([(9, 1), (0, 1), (5, 0), (0, 1)], (4, 2), 16, 4, torch.float32)
    out = batch.check(splits, small=True)
    assert out[0].abs().sum() > 0 and not out[1:].any()
    batch = Batch([(9, 4), (0, 0), (0, 1)], (4, 2), 16, 4, torch.float32)
    assert not batch.check(splits, small=True)[4:].any()

    # 7 rows, of which 5 are owned; then 6 of 4, which looks like two sequences of 3 queries.
    batch.q = torch.cat((batch.q, batch.q[:2]))
    out = torch.full_like(batch.q, torch.nan)
    tables = batch.query_start, batch.context_lens, batch.tables
    triton_attention.paged_attention(batch.q, batch.cache, *tables, 0.25, *batch.maxima, splits, out)
    assert out[:5].isfinite().all() and out[5:].isnan().all()
    batch = Batch([(9, 3), (6, 1)], (4, 2), 16, 4, torch.float32)
    expected, batch.q = batch.check(), torch.cat((batch.q, batch.q[:2]))
    tables = batch.query_start, batch.context_lens, batch.tables
    out = triton_attention.paged_attention(batch.q, batch.cache, *tables, 0.25, *batch.maxima, splits)
    torch.testing.assert_close(out[:4], expected)


def test_maxima_may_be_upper_bounds():
    batch = Batch([(9, 4), (13, 1)], (4, 2), 16, 4, torch.float32)
    batch.maxima = 7, 5000
    batch.check()


def test_out_is_made_where_none_is_given():
    batch = Batch([(9, 4)], (4, 2), 16, 4, torch.float16)
    tables = batch.query_start, batch.context_lens, batch.tables
    out = triton_attention.paged_attention(batch.q, batch.cache, *tables, 0.25, *batch.maxima)
    assert torch.equal(out, batch.check()) and out.is_contiguous()


def test_a_cache_of_another_dtype():
    Batch([(30, 1), (9, 9)], (4, 2), 16, 4, torch.float32, cache_dtype=torch.float16).check()


def huge_cache(dtype=torch.float16):
    """100,000 blocks, whose last numbers lie beyond 2^31. Only what is touched takes memory."""
    storage = torch.empty(100_000, 2, 11, 16, 64, dtype=dtype, device=DEVICE)  # [N, 2, G, B, D]: strides of its own
    assert storage.numel() > 2**31
    return storage.permute(1, 2, 0, 3, 4)


def test_addresses_have_64_bits():
    cache = huge_cache()
    tables = torch.tensor([[99_999, 3], [98_765, 99_998]], device=DEVICE)
    slots = [99_999 * 16 + 2, 3 * 16, 98_765 * 16 + 15, 99_998 * 16 + 1]
    k, v = torch.randn(2, 4, 11, 64, dtype=torch.float16, device=DEVICE)
    cache[:, :, tables.flatten()] = 0.5
    triton_cache.write_kv(k, v, cache, torch.tensor(slots, device=DEVICE))
    for t, slot in enumerate(slots):
        assert torch.equal(cache[0, :, slot // 16, slot % 16], k[t])
        assert torch.equal(cache[1, :, slot // 16, slot % 16], v[t])

    batch = Batch([(18, 1), (18, 1)], (22, 11), 64, 16, torch.float16)
    batch.cache, batch.tables = cache, tables
    batch.check()


@pytest.mark.parametrize("shape", [(1, 2, 11, 100_000, 16, 64), (1, 1, 1, 100_000, 32, 704)])
def test_copies_have_64_bits(shape):
    cache = huge_cache().permute(2, 0, 1, 3, 4).view(shape)  # in one piece
    cache[:, :, :, 99_998], cache[:, :, :, 99_999] = 1, 2
    triton_cache.copy_blocks(cache, torch.tensor([99_999]), torch.tensor([99_998]))
    assert (cache[:, :, :, 99_998:] == 2).all()


def distinct(slots):
    kept = [slot for slot in slots if slot >= 0]
    return len(kept) == len(set(kept))


@settings(max_examples=200 if GPU else 25)
@given(
    slots=st.lists(st.integers(-12, 17).map(lambda slot: max(slot, -1)), min_size=1, max_size=6).filter(distinct),
    shape=st.sampled_from([(3, 4), (1, 80), (5, 16), (2, 20)]),
    dtypes=st.sampled_from([(a, b) for a in DTYPES for b in DTYPES]),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_write_kv_writes_its_slots_and_nothing_else(slots, shape, dtypes, index):
    kv_heads, head_size = shape
    qkv = torch.randn(len(slots), 3 * kv_heads, head_size).to(DEVICE, dtypes[0])
    k, v = qkv[:, kv_heads : 2 * kv_heads], qkv[:, 2 * kv_heads :]
    written, expected = torch.full((2, 2, kv_heads, 6, 3, head_size), torch.nan, dtype=dtypes[1], device=DEVICE)
    triton_cache.write_kv(k, v, written, torch.tensor(slots, dtype=index, device=DEVICE))
    reference.write_kv(k, v, expected, torch.tensor(slots))
    torch.testing.assert_close(written, expected, equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize("static", [None, (0.01, 0.5)])
@pytest.mark.parametrize("dtype", BYTES)
def test_codes_and_scales_are_the_references_bit_for_bit(dtype, static):
    x = torch.randn(40, 5, 20) * torch.randn(40, 5, 1).exp()
    x[3], x[4, 0, 7], x[5, 2, 1], x[6], x[7, :, 1:] = 0, torch.nan, torch.inf, x[6] * 1e-9, x[7, :, 1:] / 5000
    x[8] = (torch.arange(20) / 2 - 5).where(torch.arange(20) > 0, 127)
    x, slots = x.to(DEVICE), torch.randperm(80)[:40].to(DEVICE)
    slots[9] = -1
    written, expected = kernels.new_cache(2, 20, 4, 2, 20, dtype, DEVICE)
    for cache in (written, expected):
        kernels.poison(cache[None])
    triton_cache.write_kv(x[:, :2], x[:, 2:4], written, slots, static)
    reference.write_kv(x[:, :2], x[:, 2:4], expected, slots, static)
    assert torch.equal(written.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", BYTES)
def test_blocks_of_bytes_move_whole(dtype):
    pool = kernels.new_cache(2, 9, 4, 3, 8, dtype, DEVICE)
    pool.view(torch.uint8).random_()
    other, expected = torch.zeros_like(pool[:, :, :, :4]), pool.clone()
    source, target = torch.tensor([1, 2, 8]), torch.tensor([2, 3, 0])
    triton_cache.copy_blocks(pool, source, target)
    reference.copy_blocks(expected, source, target)
    assert torch.equal(pool.view(torch.uint8), expected.view(torch.uint8))
    triton_cache.move_blocks(pool, other, source, target)
    assert torch.equal(other.view(torch.uint8)[:, :, :, [2, 3, 0]], pool.view(torch.uint8)[:, :, :, [1, 2, 8]])



def copied(num_blocks, source, target, shape=(3, 5)):
    """A pool after copy_blocks, and after the reference's."""
    cache = torch.randn(2, 2, 1, num_blocks, *shape, device=DEVICE)
    expected, source, target = cache.clone(), torch.tensor(source).long(), torch.tensor(target).long()
    triton_cache.copy_blocks(cache, source, target)
    reference.copy_blocks(expected, source, target)
    return cache, expected


@settings(max_examples=200 if GPU else 15)
@given(
    source=st.lists(st.integers(0, 11), min_size=0, max_size=8),
    target=st.permutations(range(12)),
    shape=st.sampled_from([(1, 4), (3, 5), (16, 33)]),
)
def test_copy_blocks(source, target, shape):
    assert torch.equal(*copied(12, source, target[: len(source)], shape))


@pytest.mark.parametrize("pairs", [2, 16, 17, 40, 512, 513])
def test_copy_blocks_reads_before_it_writes(pairs):
    """Every block but the ends is a source and a target, upwards, downwards and in a ring."""
    up = list(range(pairs))
    assert torch.equal(*copied(pairs + 1, up, [b + 1 for b in up]))
    assert torch.equal(*copied(pairs + 1, [b + 1 for b in up], up))
    assert torch.equal(*copied(pairs + 1, up, [(b + 1) % pairs for b in up]))


@settings(max_examples=200 if GPU else 15)
@given(
    pairs=st.dictionaries(st.integers(0, 4), st.integers(0, 8), max_size=5),
    shape=st.sampled_from([(3, 5), (16, 64), (256, 20)]),
)
def test_move_blocks_between_pools_of_different_sizes(pairs, shape):
    source, target = torch.tensor([*pairs.values()]).long(), torch.tensor([*pairs]).long()
    for from_device, to_device, pinned in [(DEVICE, DEVICE, False)] + GPU * [
        ("cuda", "cpu", True), ("cpu", "cuda", True), ("cuda", "cpu", False), ("cpu", "cuda", False)
    ]:  # fmt: skip
        pools = torch.randn(2, 2, 2, 9, *shape), torch.full((2, 2, 2, 5, *shape), torch.nan)
        from_cache, to_cache = (
            pool.pin_memory() if pinned and device == "cpu" else pool.to(device)
            for pool, device in zip(pools, (from_device, to_device), strict=True)
        )
        triton_cache.move_blocks(from_cache, to_cache, source, target)
        if GPU:
            torch.cuda.synchronize()
        reference.move_blocks(pools[0], pools[1], source, target)
        torch.testing.assert_close(to_cache.cpu(), pools[1], equal_nan=True, atol=0, rtol=0)


def test_wrong_input_is_named():
    batch = Batch([(9, 4)], (4, 2), 16, 4, torch.float32)
    tables = batch.query_start, batch.context_lens, batch.tables

    def attend(q, cache, scale=0.25):
        return triton_attention.paged_attention(q, cache, *tables, scale, *batch.maxima)

    with pytest.raises(ValueError, match="whole number of heads"):
        attend(batch.q[:, :3], batch.cache)
    with pytest.raises(ValueError, match="side by side"):
        attend(batch.q.mT.contiguous().mT, batch.cache)
    with pytest.raises(ValueError, match="scale"):
        attend(batch.q, batch.cache, -1.0)
    with pytest.raises(ValueError, match="side by side"):
        k = torch.zeros(4, 16, 2, device=DEVICE).mT
        triton_cache.write_kv(k, k, batch.cache, torch.zeros(4, device=DEVICE))
    if not GPU:
        with pytest.raises(ValueError, match="bf16"):
            attend(batch.q.bfloat16(), batch.cache.bfloat16())
