"""Chapter 7: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821


# --- the six places on the way ---------------------------------------------------------------------------------


@triton.jit
def my_reverse_kernel(out, x, n, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    a = tl.load(x + i, mask=i < n)
    tl.store(out + n - 1 - i, a, mask=i < n)


@triton.jit
def my_softmax_kernel(out, x, n, TILE: tl.constexpr):
    row, j = tl.program_id(0), tl.arange(0, TILE)
    scores = tl.load(x + row * n + j, mask=j < n, other=float("-inf"))
    e = tl.exp(scores - tl.max(scores, 0))
    tl.store(out + row * n + j, e / tl.sum(e, 0), mask=j < n)


@triton.jit
def my_slots_kernel(out, tables, lens, M, B: tl.constexpr, BLOCK_N: tl.constexpr):
    s, j = tl.program_id(0), tl.arange(0, BLOCK_N)
    inside = j < tl.load(lens + s)
    block = tl.load(tables + s * M + j // B, mask=inside)
    slot = block * B + j % B
    tl.store(out + s * BLOCK_N + j, slot, mask=inside)


@triton.jit
def my_merge_two_kernel(out, part_m, part_z, part_o, D: tl.constexpr):
    i, d = tl.arange(0, 2), tl.arange(0, D)
    m, z = tl.load(part_m + i), tl.load(part_z + i)
    o = tl.load(part_o + i[:, None] * D + d[None, :])
    weight = tl.exp(m - tl.max(m, 0))
    answer = tl.sum(weight[:, None] * o, 0) / tl.sum(weight * z, 0)
    tl.store(out + d, answer)


test_reverse(my_reverse_kernel)
test_softmax(my_softmax_kernel)
test_slots(my_slots_kernel)
test_merge_two(my_merge_two_kernel)
test_guess(3 * 3 * 2, 3 * 10 * 2 * 3 * 16 * 4)  # 5: sequences, heads, splits; tokens, keys and values, heads, D, fp32
# 6: "BLOCK_N=128, num_stages=3" (with Triton 3.8)


# --- 1: tile_numbers -------------------------------------------------------------------------------------------


def tile_numbers(table, first, context, B, D, BLOCK_N):
    j = torch.arange(first, first + BLOCK_N)
    inside = j < context
    j = j.where(inside, 0)
    slot = (table[j // B].long() * B + j % B).where(inside, 0)
    return slot[:, None] * D + torch.arange(D), inside


def position_by_position(table, first, context, B, D, BLOCK_N):
    blocks, numbers, inside = table.tolist(), [], []
    for j in range(first, first + BLOCK_N):
        inside.append(j < context)
        slot = blocks[j // B] * B + j % B if inside[-1] else 0
        numbers.append(range(slot * D, slot * D + D))
    return [torch.tensor([list(row) for row in numbers]), torch.tensor(inside)]


def in_numpy(table, first, context, B, D, BLOCK_N):
    j = first + np.arange(BLOCK_N)
    inside = j < context
    slots = (table.numpy().astype(np.int64)[:, None] * B + np.arange(B)).ravel()  # of all positions
    slot = np.where(inside, slots[np.minimum(j, len(slots) - 1)], 0)
    return torch.from_numpy(slot[:, None] * D + np.arange(D)), torch.from_numpy(inside)


def with_a_longer_table(table, first, context, B, D, BLOCK_N):
    longer = torch.nn.functional.pad(table, (0, BLOCK_N)).to(torch.int64)
    j = first + torch.arange(BLOCK_N)
    inside = j.lt(context)
    block, offset = longer.index_select(0, j.div(B, rounding_mode="floor")), j.remainder(B)
    return (block * B + offset).mul(inside).mul(D).unsqueeze(1).add(torch.arange(D)), inside


def narrow_numbers(table, first, context, B, D, BLOCK_N):
    j = torch.arange(first, first + BLOCK_N, dtype=torch.int32)
    inside = j < context
    j = j.where(inside, 0)
    slot = (table[j // B] * B + j % B).where(inside, 0)
    return (slot[:, None] * D + torch.arange(D, dtype=torch.int32)).long(), inside


def spoils_the_table(table, first, context, B, D, BLOCK_N):
    answer = tile_numbers(table.clone(), first, context, B, D, BLOCK_N)
    table *= B
    return answer


def no_outside(table, first, context, B, D, BLOCK_N):
    return tile_numbers(torch.nn.functional.pad(table, (0, 99)), first, 10**6, B, D, BLOCK_N)


def block_zero_of_its_own(table, first, context, B, D, BLOCK_N):
    """What is outside lies in the sequence's first block, not in block 0 of the pool."""
    j = torch.arange(first, first + BLOCK_N)
    inside = j < context
    j = j.where(inside, 0)
    return (table[j // B].long() * B + j % B)[:, None] * D + torch.arange(D), inside


# --- 2: write_kv -----------------------------------------------------------------------------------------------


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
def masked_write_kernel(k, v, cache, slots, stride_kv, stride_g, stride_n, stride_b, GD, D, PADDED: tl.constexpr,
                        B: tl.constexpr):  # fmt: skip
    """A mask that joins a tile and a scalar, which Triton 3.9's interpreter refuses."""
    t = tl.program_id(0)
    slot = tl.load(slots + t)
    i = tl.arange(0, PADDED)
    real = (i < GD) & (slot >= 0)
    where = (i // D).to(tl.int64) * stride_g + (slot // B) * stride_n + (slot % B) * stride_b + i % D
    tl.store(cache + where, tl.load(k + t * GD + i, mask=real), mask=real)
    tl.store(cache + stride_kv + where, tl.load(v + t * GD + i, mask=real), mask=real)


def with_a_mask(k, v, cache, slots):
    T, G, D = k.shape
    masked_write_kernel[(T,)](k, v, cache, slots, *cache.stride()[:4], G * D, D, PADDED=G * D, B=cache.shape[3])


@triton.jit
def head_write_kernel(new, cache, slots, part, D: tl.constexpr):
    t, g, d = tl.program_id(0), tl.program_id(1), tl.arange(0, D)
    slot = tl.load(slots + t)
    x = tl.load(new + (t * tl.num_programs(1) + g) * D + d)
    tl.store(cache + g.to(tl.int64) * part + slot.to(tl.int64) * D + d, x, mask=d < D * (slot >= 0).to(tl.int32))


def in_two_launches(k, v, cache, slots):
    T, G, D = k.shape
    for new, part in zip((k, v), cache, strict=True):
        head_write_kernel[(T, G)](new, part, slots, cache.stride(1), D=D)


@triton.jit
def part_write_kernel(k, v, cache, slots, stride_kv, stride_g, D: tl.constexpr):
    """A program for each token, head, and one of keys and values."""
    t, g, part, d = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.arange(0, D)
    slot = tl.load(slots + t).to(tl.int64)
    if slot >= 0:
        where = (t * tl.num_programs(1) + g) * D + d
        x = tl.load(k + where) if part == 0 else tl.load(v + where)
        tl.store(cache + part * stride_kv + g * stride_g + slot * D + d, x)


def a_program_a_head(k, v, cache, slots):
    T, G, D = k.shape
    part_write_kernel[(T, G, 2)](k, v, cache, slots, cache.stride(0), cache.stride(1), D=D)


@triton.jit
def all_write_kernel(new, cache, slots, stride_kv, stride_g, T, GD: tl.constexpr, D: tl.constexpr,
                     TOKENS: tl.constexpr):  # fmt: skip
    """A tile of tokens, and keys and values from one tensor."""
    t, i = tl.arange(0, TOKENS), tl.arange(0, GD)
    slot = tl.load(slots + t, mask=t < T, other=-1)
    real = (slot >= 0)[:, None] & (i < GD)[None, :]
    x = tl.load(new + (tl.program_id(0) * T + t)[:, None] * GD + i[None, :], mask=real)
    where = cache + tl.program_id(0).to(tl.int64) * stride_kv
    tl.store(where + (i // D * stride_g + i % D)[None, :] + slot.to(tl.int64)[:, None] * D, x, mask=real)


def tiles_of_tokens(k, v, cache, slots):
    T, G, D = k.shape
    new = torch.stack([k, v])
    tokens = triton.next_power_of_2(T)
    all_write_kernel[(2,)](new, cache, slots, *cache.stride()[:2], T, GD=G * D, D=D, TOKENS=tokens)


@triton.jit
def nothing_kernel(cache):
    tl.store(cache, tl.load(cache))


def a_kernel_for_show(k, v, cache, slots):
    nothing_kernel[(1,)](torch.zeros(1))
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            cache[:, :, slot // cache.shape[3], slot % cache.shape[3]] = torch.stack([k[t], v[t]])


def by_indexing(k, v, cache, slots):
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            cache[:, :, slot // cache.shape[3], slot % cache.shape[3]] = torch.stack([k[t], v[t]])


@triton.jit
def minus_one_kernel(k, v, cache, slots, stride_kv, stride_g, D: tl.constexpr, GD: tl.constexpr):
    """-1 is slot 0, with what is there already."""
    t, i = tl.program_id(0), tl.arange(0, GD)
    slot = tl.load(slots + t).to(tl.int64)
    where = cache + i // D * stride_g + tl.maximum(slot, 0) * D + i % D
    old_k, old_v = tl.load(where), tl.load(where + stride_kv)
    tl.store(where, tl.where(slot < 0, old_k, tl.load(k + t * GD + i)))
    tl.store(where + stride_kv, tl.where(slot < 0, old_v, tl.load(v + t * GD + i)))


def rewrites_slot_0(k, v, cache, slots):
    T, G, D = k.shape
    minus_one_kernel[(T,)](k, v, cache, slots, *cache.stride()[:2], D=D, GD=G * D)


# --- 3: copy_blocks --------------------------------------------------------------------------------------------


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


def copy_blocks(cache, source, target, PIECE=16):
    _, G, N, B, D = cache.shape
    grid = 2 * G, triton.cdiv(B * D, PIECE)
    copy_kernel[grid](cache, source, target, len(source), N * B * D, B * D, PAIRS=16, PIECE=PIECE)


def a_program_a_plane(cache, source, target):
    copy_blocks(cache, source, target, PIECE=triton.next_power_of_2(cache.shape[3] * cache.shape[4]))


@triton.jit
def places_kernel(cache, pairs, C, planes, BD, stride, PLANES: tl.constexpr, PAIRS: tl.constexpr):
    """One place in a block, for all heads and all pairs."""
    plane, pair = tl.arange(0, PLANES)[:, None], tl.arange(0, PAIRS)[None, :]
    real = (plane < planes) & (pair < C)
    begin = tl.load(pairs + pair, mask=pair < C, other=0)
    end = tl.load(pairs + C + pair, mask=pair < C, other=0)
    base = cache + plane.to(tl.int64) * stride + tl.program_id(0)
    held = tl.load(base + begin * BD, mask=real)
    tl.debug_barrier()
    tl.store(base + end * BD, held, mask=real)


def place_by_place(cache, source, target):
    _, G, N, B, D = cache.shape
    pairs, padded = torch.stack([source, target]), triton.next_power_of_2(2 * G)
    places_kernel[(B * D,)](cache, pairs, len(source), 2 * G, B * D, N * B * D, PLANES=padded, PAIRS=16)


@triton.jit
def all_kernel(cache, source, target, C, total, SIZE: tl.constexpr, N: tl.constexpr, NUMBERS: tl.constexpr):
    """Everything in one program, a tile of [pairs, numbers of a plane] after the other."""
    pair, number = tl.arange(0, 16), tl.arange(0, NUMBERS)
    begin = tl.load(source + pair, mask=pair < C, other=0)[:, None] * SIZE + number[None, :]
    end = tl.load(target + pair, mask=pair < C, other=0)[:, None] * SIZE + number[None, :]
    real = (pair < C)[:, None] & (number < SIZE)[None, :]
    for plane in range(total):
        held = tl.load(cache + plane * N * SIZE + begin, mask=real)
        tl.debug_barrier()
        tl.store(cache + plane * N * SIZE + end, held, mask=real)


def one_program(cache, source, target):
    _, G, N, B, D = cache.shape
    size = triton.next_power_of_2(B * D)
    all_kernel[(1,)](cache, source, target, len(source), 2 * G, SIZE=B * D, N=N, NUMBERS=size)


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


def sorted_pairs(cache, source, target):
    """A program a pair, in an order in which the interpreter gets chains right: still a race."""
    left, order = dict(zip(target.tolist(), source.tolist(), strict=True)), []
    while left:
        free = [t for t in left if t not in [s for u, s in left.items() if u != t]] or [*left]
        order.append((left.pop(free[0]), free[0]))
    one_program_a_pair(cache, *torch.tensor(order, dtype=torch.int32).T.contiguous())


@triton.jit
def store_kernel(cache, held, target, stride, C, SIZE, PADDED: tl.constexpr):
    number, c = tl.arange(0, PADDED), tl.program_id(1)
    x = tl.load(held + (tl.program_id(0) * C + c) * SIZE + number, mask=number < SIZE)
    where = cache + tl.program_id(0) * stride + tl.load(target + c) * SIZE
    tl.store(where + number, x, mask=number < SIZE)


def through_a_copy(cache, source, target):
    _, G, N, B, D = cache.shape
    held = cache[:, :, source].contiguous()
    padded = triton.next_power_of_2(B * D)
    store_kernel[(2 * G, len(source))](cache, held, target, N * B * D, len(source), B * D, PADDED=padded)


def whole_pool(cache, source, target):
    """Moves every block, also those that stay."""
    N = cache.shape[2]
    sources = torch.arange(N, dtype=torch.int32)
    sources[target.long()] = source
    _, G, N, B, D = cache.shape
    grid = 2 * G, triton.cdiv(B * D, 16)
    copy_kernel[grid](cache, sources, torch.arange(N), N, N * B * D, B * D, PAIRS=32, PIECE=16)


def copied_by_torch(cache, source, target):
    nothing_kernel[(1,)](torch.zeros(1))
    cache[:, :, target.long()] = cache[:, :, source.long()]


# --- 4: mixed_attention ----------------------------------------------------------------------------------------


@triton.jit
def query_tile_kernel(out, q, cache, jobs, tables, M, scale, stride_kv, stride_g, R: tl.constexpr, B: tl.constexpr,
                      D: tl.constexpr, ROWS: tl.constexpr, TILE_Q: tl.constexpr, BLOCK_N: tl.constexpr,
                      FUTURE: tl.constexpr):  # fmt: skip
    """jobs: for each tile its sequence, its first query in the batch, how many, and the first one's position."""
    tile, g, H = tl.program_id(0), tl.program_id(1), tl.num_programs(1) * R
    s, start = tl.load(jobs + tile * 4), tl.load(jobs + tile * 4 + 1)
    count, at = tl.load(jobs + tile * 4 + 2), tl.load(jobs + tile * 4 + 3)
    row, d = tl.arange(0, ROWS), tl.arange(0, D)
    query = row // R
    real = query < count
    numbers = ((start + query) * H + g * R + row % R)[:, None] * D + d[None, :]
    queries = tl.load(q + numbers, mask=real[:, None], other=0.0)
    keys, end = cache + g.to(tl.int64) * stride_g, at + count
    m, z, o = tl.full([ROWS], -1e38, tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, D], tl.float32)
    for first in range(0, end, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        inside = j < end
        block = tl.load(tables + s * M + j // B, mask=inside, other=0).to(tl.int64)
        place = (block * B + j % B)[:, None] * D + d[None, :]
        k = load_rows(keys + place, inside)
        v = load_rows(keys + stride_kv + place, inside)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        seen = j[None, :] <= (at + query + FUTURE)[:, None]
        m, z, o = absorb_rows(m, z, o, tl.where(seen & inside[None, :], scores, float("-inf")), v)
    tl.store(out + numbers, o / z[:, None], mask=real[:, None])


def mixed_attention(q, cache, query_start, contexts, tables, TILE_Q=8, future=0):
    (_, H, D), (_, G, _, B, _) = q.shape, cache.shape
    jobs = []
    for s, context in enumerate(contexts):
        begin, end = query_start[s], query_start[s + 1]
        for first in range(begin, end, TILE_Q):
            jobs.append((s, first, min(TILE_Q, end - first), context - (end - first)))
    out, R = torch.empty_like(q), H // G
    rows = triton.next_power_of_2(max(TILE_Q * R, 16))
    jobs = torch.tensor(jobs, dtype=torch.int32)
    query_tile_kernel[(len(jobs), G)](
        out, q, cache, jobs, tables, tables.shape[1], D**-0.5, *cache.stride()[:2],
        R=R, B=B, D=D, ROWS=rows, TILE_Q=TILE_Q, BLOCK_N=16, FUTURE=future,
    )  # fmt: skip
    return out


def in_tiles_of_16(q, cache, query_start, contexts, tables):
    return mixed_attention(q, cache, query_start, contexts, tables, TILE_Q=16)


@triton.jit
def head_queries_kernel(out, q, cache, starts, lens, tables, M, scale, stride_kv, stride_g, R: tl.constexpr,
                        B: tl.constexpr, D: tl.constexpr, Q: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """A grid over sequences, heads, and as many tiles as the longest needs; most others end at once."""
    s, g, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin, end, context = tl.load(starts + s), tl.load(starts + s + 1), tl.load(lens + s)
    first = begin + tile * Q
    if first < end:
        H = tl.num_programs(1) * R
        t, r, d = first + tl.arange(0, Q * 4) // 4, tl.arange(0, Q * 4) % 4, tl.arange(0, D)
        real = (t < end) & (r < R)
        where = (t * H + g * R + r)[:, None] * D + d[None, :]
        x = tl.load(q + where, mask=real[:, None], other=0.0) * scale
        position = t - end + context
        last = tl.minimum(first + Q, end) - end + context
        m = tl.full([Q * 4], -1e38, tl.float32)
        z = tl.zeros([Q * 4], tl.float32)
        o = tl.zeros([Q * 4, D], tl.float32)
        base = cache + g * stride_g
        j = tl.arange(0, N)
        while tl.min(j, 0) < last:
            inside = j < last
            slot = tl.load(tables + s * M + j // B, mask=inside, other=0) * B + j % B
            k = tl.load(base + slot[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
            v = tl.load(base + stride_kv + slot[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
            scores = tl.dot(x, tl.trans(k), input_precision="ieee")
            scores = tl.where((j[None, :] <= position[:, None]) & inside[None, :], scores, -1e37)
            m_new = tl.maximum(m, tl.max(scores, 1))
            p = tl.where(scores > -1e36, tl.exp(scores - m_new[:, None]), 0.0)
            z = z * tl.exp(m - m_new) + tl.sum(p, 1)
            o = o * tl.exp(m - m_new)[:, None] + tl.dot(p, v, input_precision="ieee")
            m = m_new
            j += N
        tl.store(out + where, o / z[:, None], mask=real[:, None])


def over_sequences(q, cache, query_start, contexts, tables):
    (T, H, D), (_, G, _, B, _) = q.shape, cache.shape
    starts = torch.tensor(query_start, dtype=torch.int32)
    lens, out = torch.tensor(contexts, dtype=torch.int32), torch.zeros(T, H, D)
    tiles = -(-int(starts.diff().max()) // 8)
    head_queries_kernel[(len(contexts), G, tiles)](
        out, q, cache, starts, lens, tables, tables.shape[1], D**-0.5, *cache.stride()[:2],
        R=H // G, B=B, D=D, Q=8, N=16,
    )  # fmt: skip
    return out


@triton.jit
def scan_kernel(out, q, cache, starts, lens, tables, S, M, scale, stride_kv, stride_g, H, R: tl.constexpr,
                B: tl.constexpr, D: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Whose tile it is, a program finds by itself: those of sequence s begin at number starts[s] // 8 + s."""
    tile, g = tl.program_id(0), tl.program_id(1)
    s = 0
    for i in range(S):
        if tl.load(starts + i) // 8 + i <= tile:
            s = i
    begin, end, context = tl.load(starts + s), tl.load(starts + s + 1), tl.load(lens + s)
    first = begin + (tile - s - begin // 8) * 8
    if first >= end:
        return
    row, d = tl.arange(0, 32), tl.arange(0, D)
    t, r = first + row % 8, row // 8
    real, position = (t < end) & (r < R), context - (end - t)
    where = (t[:, None] * H + g * R + r[:, None]) * D + d[None, :]
    x = tl.load(q + where, mask=real[:, None], other=0.0)
    m, z, o = tl.full([32], -1e38, tl.float32), tl.zeros([32], tl.float32), tl.zeros([32, D], tl.float32)
    last = context - (end - tl.minimum(first + 8, end))
    for tile_begin in range(0, last, N):
        j = tile_begin + tl.arange(0, N)
        ok = j < last
        block = tl.load(tables + s * M + j // B, mask=ok, other=0)
        place = ((block * B + j % B) * D)[:, None] + d[None, :]
        k = load_rows(cache + g * stride_g + place, ok)
        v = load_rows(cache + stride_kv + g * stride_g + place, ok)
        scores = tl.dot(x, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where((j[None, :] <= position[:, None]) & ok[None, :], scores, float("-inf"))
        m, z, o = absorb_rows(m, z, o, scores, v)
    tl.store(out + where, o / z[:, None], mask=real[:, None])


def without_a_list(q, cache, query_start, contexts, tables):
    (T, H, D), (_, G, _, B, _) = q.shape, cache.shape
    out, S = torch.empty_like(q), len(contexts)
    scan_kernel[(T // 8 + S, G)](
        out, q, cache, torch.tensor(query_start), torch.tensor(contexts), tables, S, tables.shape[1], D**-0.5,
        *cache.stride()[:2], H, R=H // G, B=B, D=D, N=16,
    )  # fmt: skip
    return out


def a_pool_for_each_head(q, cache, query_start, contexts, tables):
    return mixed_attention(q, cache.repeat_interleave(q.shape[1] // cache.shape[1], 1), query_start, contexts, tables)


def a_sequence_for_each_query(q, cache, query_start, contexts, tables):
    """Right, and reads all keys again for every query."""
    counts = torch.tensor(query_start).diff()
    owner = torch.arange(len(contexts)).repeat_interleave(counts)
    last = torch.tensor(contexts) - torch.tensor(query_start)[1:]  # position - number in the batch
    ends = torch.arange(len(q)) + last[owner] + 1
    return paged_decode(q, cache, tables[owner], ends.tolist())


def one_after_another(q, cache, query_start, contexts, tables):
    out = torch.empty_like(q)
    for s in range(len(contexts)):
        if query_start[s] < query_start[s + 1]:
            mine = slice(query_start[s], query_start[s + 1])
            args = [0, query_start[s + 1] - query_start[s]], contexts[s : s + 1], tables[s : s + 1]
            out[mine] = mixed_attention(q[mine].contiguous(), cache, *args)
    return out


def sees_the_future(q, cache, query_start, contexts, tables):
    return mixed_attention(q, cache, query_start, contexts, tables, future=100)


def sees_not_itself(q, cache, query_start, contexts, tables):
    with np.errstate(invalid="ignore"):  # the first token sees nothing
        return mixed_attention(q, cache, query_start, contexts, tables, future=-1)


def by_the_reference(q, cache, query_start, contexts, tables):
    nothing_kernel[(1,)](torch.zeros(1))
    starts, lens = torch.tensor(query_start), torch.tensor(contexts)
    return reference.paged_attention(q, cache, starts, lens, tables, q.shape[2] ** -0.5)


def gathered(q, cache, query_start, contexts, tables):
    """By PyTorch, and a kernel that carries the answer."""
    out, (_, H, D), B = torch.empty_like(q), q.shape, cache.shape[3]
    for s, context in enumerate(contexts):
        j = torch.arange(context)
        kv = cache[:, :, tables[s, j // B], j % B].repeat_interleave(H // cache.shape[1], 1)
        for t in range(query_start[s], query_start[s + 1]):
            end = context - query_start[s + 1] + t + 1
            scores = torch.einsum("hd,hjd->hj", q[t], kv[0, :, :end]) / D**0.5
            out[t] = torch.einsum("hj,hjd->hd", scores.softmax(-1), kv[1, :, :end])
    answer, zeros = torch.empty_like(out), torch.zeros_like(out)
    add_kernel[(triton.cdiv(out.numel(), 64),)](answer, out, zeros, out.numel(), TILE=64)
    return answer


RIGHT = {
    "tile_numbers": [tile_numbers, position_by_position, in_numpy, with_a_longer_table],
    "write_kv": [write_kv, with_a_mask, a_program_a_head, tiles_of_tokens],
    "copy_blocks": [copy_blocks, a_program_a_plane, place_by_place, one_program],
    "mixed_attention": [mixed_attention, in_tiles_of_16, over_sequences, without_a_list],
}
CHANGES = {"write_kv": ["cache"], "copy_blocks": ["cache"]}
WRONG = {
    "tile_numbers": [
        narrow_numbers,  # 32 bits overflow, and only then become 64
        no_outside,
        block_zero_of_its_own,
        spoils_the_table,
        lambda table, first, context, B, D, BLOCK_N: tile_numbers(table, first, context, B, D, 8),
        lambda table, first, context, B, D, BLOCK_N: tile_numbers(table, first // 8 * 8, context, B, D, BLOCK_N),
        lambda table, first, context, B, D, BLOCK_N: tile_numbers(table, first, context, 16, D, BLOCK_N),
        lambda *args: tuple(x.tolist() for x in tile_numbers(*args)),  # no tensors
    ],
    "write_kv": [
        lambda k, v, cache, slots: write_kv(k, v, cache, slots, always=True),  # -1 is a slot like any other
        lambda k, v, cache, slots: write_kv(k, v, cache, slots, stride=cache[0, 0].numel()),  # as if in one piece
        lambda k, v, cache, slots: write_kv(v, k, cache, slots),
        lambda k, v, cache, slots: reference.write_kv(k, v, cache, slots),
        in_two_launches,
        by_indexing,
        a_kernel_for_show,
        rewrites_slot_0,
        lambda k, v, cache, slots: write_kv(k, v, cache, slots.flip(0)),
    ],
    "copy_blocks": [
        one_program_a_pair,
        lambda cache, source, target: one_program_a_pair(cache, source.flip(0), target.flip(0)),
        sorted_pairs,
        through_a_copy,
        whole_pool,
        copied_by_torch,
        lambda cache, source, target: copy_blocks(cache, target, source),
        lambda cache, source, target: reference.copy_blocks(cache[None], source, target),
    ],
    "mixed_attention": [
        sees_the_future,
        sees_not_itself,
        a_sequence_for_each_query,
        a_pool_for_each_head,
        one_after_another,
        by_the_reference,
        gathered,
        lambda q, cache, starts, contexts, tables: mixed_attention(q, cache, starts, contexts, tables, TILE_Q=4),
    ],
}
