"""Every fast kernel against its plain reference, with poison wherever nothing may be read or left unwritten."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import reference

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


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
    cache = torch.full((2, kv_heads, num_blocks, block_size, head_size), torch.nan, dtype=dtype)
    for table, context in zip(batch.block_tables.tolist(), contexts, strict=True):
        for position in range(context):
            block, offset = table[position // block_size], position % block_size
            cache[:, :, block, offset] = torch.randn(2, kv_heads, head_size, generator=generator).to(dtype)
    return cache


@settings(max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=9),
    heads=st.sampled_from([(9, 3), (5, 1), (4, 4), (6, 2)]),
    head_size=st.sampled_from([4, 32, 48]),
    block_size=st.sampled_from([1, 2, 3, 4, 16, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**20),
)
def test_paged_attention_equals_the_reference(lengths, heads, head_size, block_size, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    contexts = [max(pair) for pair in lengths]
    counts = [1 if seed % 3 and s % 2 else min(pair) for s, pair in enumerate(lengths)]  # decode, prefill, mixed
    num_blocks = sum(-(-c // block_size) for c in contexts) + 3
    batch = make_batch(contexts, counts, block_size, num_blocks, generator)
    cache = make_cache(batch, contexts, heads[1], head_size, block_size, num_blocks, dtype, generator)
    q = torch.randn(sum(counts), heads[0], head_size, generator=generator)

    out = kernels.paged_attention(q, cache, batch, head_size**-0.5)
    expected = reference.paged_attention(
        q, cache, batch.query_start, batch.context_lens, batch.block_tables, head_size**-0.5
    )
    assert out.shape == q.shape and out.is_contiguous()
    torch.testing.assert_close(out, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_reference_attention_is_ordinary_attention():
    """One sequence, blocks in order: the textbook formula on contiguous tensors."""
    generator = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(11, heads, 8, generator=generator) for heads in (2, 2, 4))
    batch = make_batch([11], [11], 4, 5, generator)
    cache = torch.full((2, 2, 5, 4, 8), torch.nan)
    reference.write_kv(k, v, cache, batch.slot_mapping)
    out = kernels.paged_attention(q, cache, batch, 0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True, scale=0.5, enable_gqa=True
    )
    torch.testing.assert_close(out, expected.transpose(0, 1))


def test_many_sequences_fall_into_several_buckets():
    """Long and short contexts are not padded to one width, and a bucket does not outgrow the cache."""
    generator = torch.Generator().manual_seed(0)
    contexts = [600] * 4 + [5] * 60
    batch = make_batch(contexts, [1] * 64, 4, 730, generator)
    cache = make_cache(batch, contexts, 1, 4, 4, 730, torch.float32, generator)
    q = torch.randn(64, 2, 4, generator=generator)
    out = kernels.paged_attention(q, cache, batch, 0.5)
    assert batch.plan is not None and [len(b.rows) for b in batch.plan.buckets] == [4, 60]
    expected = reference.paged_attention(
        q, cache, batch.query_start, batch.context_lens, batch.block_tables, 0.5
    )
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("slots", [[5], [0, 7, 3], [-1, 6, -1], [-1]])
def test_write_kv_writes_its_slots_and_nothing_else(slots, dtype):
    k, v = torch.randn(2, len(slots), 3, 4)
    written, expected = torch.full((2, 2, 3, 2, 4, 4), torch.nan, dtype=dtype)
    kernels.write_kv(k, v, written, torch.tensor(slots))
    reference.write_kv(k, v, expected, torch.tensor(slots))
    torch.testing.assert_close(written, expected, equal_nan=True, atol=0, rtol=0)
    assert int((~written.isnan()).sum()) == 2 * 3 * 4 * sum(slot >= 0 for slot in slots)


def test_copy_blocks_reads_before_it_writes():
    cache = torch.arange(4.0).view(1, 1, 1, 4, 1, 1).expand(2, 2, 3, 4, 5, 6).clone()
    kernels.copy_blocks(cache, torch.tensor([1, 2]), torch.tensor([2, 3]))  # block 2 is a source and a target
    assert cache[1, 1, 2, :, 4, 5].tolist() == [0, 1, 1, 2]


def test_move_blocks_between_pools_of_different_sizes():
    from_cache, to_cache = torch.randn(2, 2, 3, 6, 4, 5), torch.zeros(2, 2, 3, 2, 4, 5)
    kernels.move_blocks(from_cache, to_cache, torch.tensor([5, 0]), torch.tensor([0, 1]))
    assert torch.equal(to_cache[:, :, :, 0], from_cache[:, :, :, 5])
    assert torch.equal(to_cache[:, :, :, 1], from_cache[:, :, :, 0])


@pytest.mark.parametrize("rows", [1, 2, 7, 33])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(rows, bias):
    weight, x = torch.randn(24, 40), torch.randn(rows, 40)
    b = torch.randn(24) if bias else None
    expected = x.double() @ weight.double().T + (b.double() if b is not None else 0)
    torch.testing.assert_close(kernels.Linear(weight, b)(x), expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_computes_where_the_machine_can(dtype):
    weight = torch.randn(24, 40).to(dtype)
    x = torch.randn(3, 40).to(kernels.compute_dtype(dtype, "cpu"))
    out = kernels.Linear(weight)(x)
    assert out.dtype == x.dtype
    torch.testing.assert_close(out.float(), x.float() @ weight.float().T, atol=0.1, rtol=2e-2)


def test_rope_turns_by_the_position():
    """Position 0 is left alone, lengths are kept, and q . k depends on the distance alone."""
    x = torch.randn(1, 2, 8)
    angles = torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
    turned = kernels.rope(x.expand(6, 2, 8), angles.cos(), angles.sin())
    torch.testing.assert_close(turned[0], x[0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1).expand(6, 2))
    products = torch.einsum("ihd,jhd->hij", turned, turned)
    torch.testing.assert_close(products[:, 0, 2], products[:, 3, 5])


def test_norm_and_gate():
    x, weight = torch.randn(5, 16), torch.randn(16)
    torch.testing.assert_close(
        kernels.rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (16,), weight, 1e-5)
    )
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(kernels.silu_and_mul(x), gate * gate.sigmoid() * up)
