"""Chapter 7: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821


def tile_numbers(table, first, context, B, D, BLOCK_N):
    j = torch.arange(first, first + BLOCK_N)
    inside = j < context
    j = j.where(inside, 0)
    slot = (table[j // B].long() * B + j % B).where(inside, 0)
    return slot[:, None] * D + torch.arange(D), inside


@triton.jit
def write_kernel(k, v, cache, slots, stride_kv, stride_g, G: tl.constexpr, B: tl.constexpr, D: tl.constexpr,
                 ALWAYS: tl.constexpr, STRIDE: tl.constexpr):  # fmt: skip
    t = tl.program_id(0)
    slot = tl.load(slots + t).to(tl.int64)
    if slot < 0 and not ALWAYS:
        return
    number = tl.arange(0, G * D)
    g, d = number // D, number % D
    place = g * (STRIDE if STRIDE else stride_g) + slot * D + d
    tl.store(cache + place, tl.load(k + t * G * D + number))
    tl.store(cache + stride_kv + place, tl.load(v + t * G * D + number))


def write_kv(k, v, cache, slots, always=False, stride=0):
    (T, G, D), B = k.shape, cache.shape[3]
    write_kernel[(T,)](k, v, cache, slots, *cache.stride()[:2], G=G, B=B, D=D, ALWAYS=always, STRIDE=stride)


@triton.jit
def copy_kernel(cache, source, target, pairs, stride, SIZE, PAIRS: tl.constexpr, PIECE: tl.constexpr):
    pair = tl.arange(0, PAIRS)
    number = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    real = (pair < pairs)[:, None] & (number < SIZE)[None, :]
    plane = cache + tl.program_id(0).to(tl.int64) * stride
    begin = tl.load(source + pair, mask=pair < pairs, other=0).to(tl.int64) * SIZE
    end = tl.load(target + pair, mask=pair < pairs, other=0).to(tl.int64) * SIZE
    held = tl.load(plane + begin[:, None] + number[None, :], mask=real)
    tl.debug_barrier()
    tl.store(plane + end[:, None] + number[None, :], held, mask=real)


def copy_blocks(cache, source, target):
    _, G, N, B, D = cache.shape
    grid = 2 * G, triton.cdiv(B * D, 16)
    copy_kernel[grid](cache, source, target, len(source), N * B * D, B * D, PAIRS=16, PIECE=16)


@triton.jit
def pair_kernel(cache, source, target, stride, SIZE, PADDED: tl.constexpr):
    number = tl.arange(0, PADDED)
    plane = cache + tl.program_id(0) * stride
    begin, end = tl.load(source + tl.program_id(1)) * SIZE, tl.load(target + tl.program_id(1)) * SIZE
    held = tl.load(plane + begin + number, mask=number < SIZE)
    tl.store(plane + end + number, held, mask=number < SIZE)


def one_program_a_pair(cache, source, target):
    _, G, N, B, D = cache.shape
    padded = triton.next_power_of_2(B * D)
    pair_kernel[(2 * G, len(source))](cache, source, target, N * B * D, B * D, PADDED=padded)


@triton.jit
def query_kernel(out, q, cache, owner, ends, tables, M, scale, stride_kv, stride_g, R: tl.constexpr,
                 B: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    t, g, G = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, d = tl.arange(0, ROWS), tl.arange(0, D)
    numbers = (t * G * R + g * R + row)[:, None] * D + d[None, :]
    real = (row < R)[:, None]
    queries = tl.load(q + numbers, mask=real, other=0.0)
    keys = cache + g.to(tl.int64) * stride_g
    table = tables + tl.load(owner + t) * M
    end = tl.load(ends + t)
    m, z, o = attend(queries, keys, keys + stride_kv, table, 0, end, scale, B, D, ROWS, BLOCK_N)
    tl.store(out + numbers, o / z[:, None], mask=real)


def mixed_attention(q, cache, query_start, contexts, tables, shift=1):
    (T, H, D), (_, G, _, B, _) = q.shape, cache.shape
    counts = torch.tensor(query_start).diff()
    owner = torch.arange(len(contexts)).repeat_interleave(counts)
    last = torch.tensor(contexts) - torch.tensor(query_start)[1:]  # position - number in the batch
    ends = (torch.arange(T) + last[owner] + shift).clamp(min=1)
    out = torch.empty_like(q)
    query_kernel[(T, G)](
        out, q, cache, owner, ends, tables, tables.shape[1], D**-0.5, *cache.stride()[:2],
        R=H // G, B=B, D=D, ROWS=16, BLOCK_N=16,
    )  # fmt: skip
    return out


def sees_the_future(q, cache, query_start, contexts, tables):
    out = torch.empty_like(q)
    for s, context in enumerate(contexts):
        for t in range(query_start[s], query_start[s + 1]):
            out[t] = paged_decode(q[t : t + 1], cache, tables[s : s + 1], [context])[0][0]
    return out


def narrow_numbers(table, first, context, B, D, BLOCK_N):
    j = torch.arange(first, first + BLOCK_N, dtype=torch.int32)
    inside = j < context
    j = j.where(inside, 0)
    slot = (table[j // B] * B + j % B).where(inside, 0)
    return (slot[:, None] * D + torch.arange(D, dtype=torch.int32)).long(), inside


WRONG = {
    "tile_numbers": [
        narrow_numbers,  # 32 bits overflow, and only then become 64
        lambda table, first, context, B, D, BLOCK_N: tile_numbers(
            torch.nn.functional.pad(table, (0, 99)), first, 10**6, B, D, BLOCK_N
        ),  # no position is outside
    ],
    "write_kv": [
        lambda k, v, cache, slots: write_kv(k, v, cache, slots, always=True),  # -1 is a slot like any other
        lambda k, v, cache, slots: write_kv(k, v, cache, slots, stride=cache[0, 0].numel()),  # as if in one piece
        lambda k, v, cache, slots: write_kv(v, k, cache, slots),
    ],
    "copy_blocks": [
        one_program_a_pair,
        lambda cache, source, target: one_program_a_pair(cache, source.flip(0), target.flip(0)),
    ],
    "mixed_attention": [
        sees_the_future,
        lambda q, cache, starts, contexts, tables: mixed_attention(q, cache, starts, contexts, tables, shift=0),
    ],
}
