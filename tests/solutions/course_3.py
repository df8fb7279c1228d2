"""Assignment 3, PagedAttention: solutions, right and wrong."""

from course_solutions import Wrong

REFERENCE, TORCH, TRITON = "kernels/reference.py", "kernels/torch_attention.py", "kernels/triton_attention.py"

VECTORISED = {
    REFERENCE: '''
def write_slots(part, x, slot_mapping):
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    blocks = torch.div(slots, part.shape[2], rounding_mode="floor")
    part[:, blocks, slots - blocks * part.shape[2]] = x[kept].transpose(0, 1).to(part.dtype)

def copy_blocks(cache, source, target):
    cache = raw(cache)
    cache[:, :, :, target] = cache.index_select(3, source)

def move_blocks(from_cache, to_cache, source, target):
    rows = raw(from_cache).movedim(3, 0)[source.to(from_cache.device)]
    raw(to_cache).movedim(3, 0)[target.to(to_cache.device)] = rows.to(to_cache.device)

def paged_attention(q, cache, query_start, context_lens, block_tables, scale):
    numbers = dequantize(cache)
    two, kv_heads, num_blocks, block_size, size = numbers.shape
    pieces = []
    for s in range(len(context_lens)):
        n = int(context_lens[s])
        rows = q[query_start[s]:query_start[s + 1]]
        t = len(rows)
        position = torch.arange(n)
        blocks = block_tables[s][torch.div(position, block_size, rounding_mode="floor")]
        k, v = numbers[:, :, blocks, position % block_size].float()
        grouped = rows.float().view(t, kv_heads, q.shape[1] // kv_heads, size)
        scores = torch.einsum("tgrd,gnd->grtn", grouped, k) * scale
        seen = torch.ones(t, n, dtype=torch.bool).tril(n - t)
        scores = torch.where(seen, scores, torch.tensor(float("-inf")))
        weights = torch.softmax(scores, dim=-1)
        pieces.append(torch.einsum("grtn,gnd->tgrd", weights, v).reshape(t, q.shape[1], size))
    return torch.cat(pieces).to(q.dtype)

def paged_attention_by_blocks(q, cache, query_start, context_lens, block_tables, scale):
    block_size, kv_heads = cache.shape[3], cache.shape[1]
    out = torch.zeros_like(q)
    for s, n in enumerate(context_lens.tolist()):
        rows = slice(int(query_start[s]), int(query_start[s + 1]))
        mine = q[rows]
        t = mine.shape[0]
        if not t:
            continue
        grouped = mine.float().reshape(t, kv_heads, -1, mine.shape[-1]).permute(1, 2, 0, 3)  # [G, R, t, D]
        where = torch.arange(n - t, n)
        top = total = answer = None
        for j, block in enumerate(block_tables[s, :-(-n // block_size)].tolist()):
            here = dequantize(cache.narrow(2, block, 1))[:, :, 0, :n - j * block_size].float()
            scores = torch.einsum("grtd,gbd->grtb", grouped, here[0]) * scale
            later = j * block_size + torch.arange(here.shape[2]) > where[:, None]
            scores = scores.masked_fill(later, float("-inf"))
            best = scores.amax(-1, keepdim=True)
            if top is None:  # every query sees the first token
                top = best
                e = torch.exp(scores - top)
                total, answer = e.sum(-1, keepdim=True), torch.einsum("grtb,gbd->grtd", e, here[1])
                continue
            best = torch.maximum(best, top)
            factor, e = torch.exp(top - best), torch.exp(scores - best)
            total = factor * total + e.sum(-1, keepdim=True)
            answer = factor * answer + torch.einsum("grtb,gbd->grtd", e, here[1])
            top = best
        out[rows] = (answer / total).permute(2, 0, 1, 3).reshape(mine.shape).to(q.dtype)
    return out
''',
    TORCH: '''
class AttentionPlan:
    def _bucket(self, members):
        contexts = self.context_lens[members]
        m = -(-int(contexts.max()) // self.block_size)
        tables = self.tables[members, :m]
        blocks = torch.stack([tables + g * self.num_blocks for g in range(self.kv_heads)])
        beyond = torch.arange(m * self.block_size) >= contexts[:, None]
        nothing = torch.tensor([])
        return Bucket(self.query_start[members], blocks.flatten(), nothing, nothing, beyond[:, None])

def _decode(q, pools, kind, plan, bucket, scale):
    n, heads, d = len(bucket.rows), q.shape[1], q.shape[2]
    shape = plan.kv_heads, n, -1, d
    keys, values = (_gather(pool, kind, bucket.key_blocks, plan, torch.float32).view(shape) for pool in pools)
    values = values.masked_fill(bucket.beyond.transpose(1, 2), 0)  # NaN times 0 is NaN
    mine = q[bucket.rows].float().view(n, plan.kv_heads, -1, d).transpose(0, 1)
    scores = (mine @ keys.transpose(2, 3) * scale).masked_fill(bucket.beyond, float("-inf"))
    return (scores.softmax(-1) @ values).transpose(0, 1).reshape(n, heads, d).to(q.dtype)
''',
    TRITON: '''
@triton.jit
def _attend(
    q, o, m, z, position, keys, values, key_scales, value_scales, table, begin, end, stride_n, stride_b, stride_scale_n,
    scale_log2, B: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, SCALED: tl.constexpr,
    MASKED: tl.constexpr,
):
    column = tl.arange(0, D_PAD)[None, :]
    for first in range(begin, end, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        real = j < end
        block = tl.load(table + j // B, mask=real, other=0).to(tl.int64)
        place = (block * stride_n + (j % B) * stride_b)[:, None] + column
        there = real[:, None] & (column < D)
        k = tl.load(keys + place, mask=there, other=0.0).to(tl.float32)
        v = tl.load(values + place, mask=there, other=0.0).to(tl.float32)
        if SCALED:
            at = block * stride_scale_n + j % B
            k = k * tl.load(key_scales + at, mask=real, other=0.0)[:, None]
            v = v * tl.load(value_scales + at, mask=real, other=0.0)[:, None]
        s = tl.sum(q.to(tl.float32)[:, None, :] * k[None, :, :], 2) * scale_log2
        s = tl.where((j[None, :] <= position[:, None]) & real[None, :], s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        less, p = tl.exp2(m - top), tl.exp2(s - top[:, None])
        o = o * less[:, None] + tl.sum(p[:, :, None] * v[None, :, :], 1)
        z = z * less + tl.sum(p, 1)
        m = top
    return o, m, z

@triton.jit(do_not_specialize=["num_seqs", "least", "num_splits"])
def _merge_kernel(
    out, partial_o, partial_mz, query_start, num_seqs, least, num_splits, stride_out_t, stride_out_h,
    D: tl.constexpr, D_PAD: tl.constexpr, TILE_Q: tl.constexpr, DECODE: tl.constexpr, SPLITS_PAD: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    s, start, count, first = _find_queries(row // TILE_Q, query_start, num_seqs, least, TILE_Q, DECODE)
    query = first + row % TILE_Q
    if query < count:
        d = tl.arange(0, D_PAD)
        base = (row.to(tl.int64) * tl.num_programs(1) + head) * num_splits
        m = NONE
        z = 0.0
        o = tl.zeros([D_PAD], tl.float32)
        for i in range(0, num_splits):
            m_i = tl.load(partial_mz + (base + i) * 2)
            z_i = tl.load(partial_mz + (base + i) * 2 + 1)
            if z_i > 0:
                top = tl.maximum(m, m_i)
                a, b = tl.exp2(m - top), tl.exp2(m_i - top)
                o = o * a + tl.load(partial_o + (base + i) * D + d, mask=d < D, other=0.0) * b
                z = z * a + z_i * b
                m = top
        if z > 0:
            o = o / z
        place = out + (start + query).to(tl.int64) * stride_out_t + head * stride_out_h + d
        tl.store(place, o.to(out.dtype.element_ty), mask=d < D)
''',
}

LOOPS = {
    REFERENCE: '''
def write_slots(part, x, slot_mapping):
    B = part.shape[2]
    for row, slot in zip(x, slot_mapping):
        slot = int(slot)
        if slot == -1:
            continue
        for head in range(part.shape[0]):
            part[head, slot // B, slot % B] = row[head]

def copy_blocks(cache, source, target):
    read = [raw(cache)[:, :, :, block].clone() for block in source.tolist()]
    for block, content in zip(target.tolist(), read):
        raw(cache)[:, :, :, block] = content

def move_blocks(from_cache, to_cache, source, target):
    for a, b in zip(source.tolist(), target.tolist()):
        for layer in range(from_cache.shape[0]):
            raw(to_cache)[layer, :, :, b] = raw(from_cache)[layer, :, :, a].to(to_cache.device)

def _context(cache, table, n):
    """Keys and values of a context, a list of [2, G, D]."""
    B = cache.shape[3]
    found = []
    for position in range(n):
        block = int(table[position // B])
        found.append(dequantize(cache[:, :, block:block + 1])[:, :, 0, position % B].float())
    return found

def paged_attention(q, cache, query_start, context_lens, block_tables, scale):
    out = torch.zeros_like(q)
    share = q.shape[1] // cache.shape[1]
    for s in range(len(context_lens)):
        first, last, n = int(query_start[s]), int(query_start[s + 1]), int(context_lens[s])
        if first == last:
            continue
        kv = _context(cache, block_tables[s], n)
        for t in range(first, last):
            seen = torch.stack(kv[:n - (last - t) + 1])  # [c, 2, G, D]
            for h in range(q.shape[1]):
                scores = seen[:, 0, h // share] @ q[t, h].float() * scale
                weights = (scores - scores.max()).exp()
                out[t, h] = (weights / weights.sum()) @ seen[:, 1, h // share]
    return out

def paged_attention_by_blocks(q, cache, query_start, context_lens, block_tables, scale):
    out = torch.zeros_like(q)
    B, share = cache.shape[3], q.shape[1] // cache.shape[1]
    for s in range(len(context_lens)):
        first, last, n = int(query_start[s]), int(query_start[s + 1]), int(context_lens[s])
        for t in range(first, last):
            sees = n - (last - t) + 1
            for h in range(q.shape[1]):
                m, z, o = -math.inf, 0.0, 0.0
                for position in reversed(range(sees)):  # token by token, the newest first
                    block = int(block_tables[s, position // B])
                    k, v = dequantize(cache[:, h // share, block:block + 1])[:, 0, position % B].float()
                    score = scale * float(k @ q[t, h].float())
                    new = max(m, score)
                    z = z * math.exp(m - new) + math.exp(score - new)
                    o = o * math.exp(m - new) + math.exp(score - new) * v
                    m = new
                out[t, h] = o / z
    return out
''',
    TORCH: '''
class AttentionPlan:
    def _bucket(self, members):
        longest = int(self.context_lens[members].max())
        slots = torch.zeros(len(members), longest, dtype=torch.long)
        beyond = torch.zeros(len(members), 1, longest, dtype=torch.bool)
        for row, s in enumerate(members.tolist()):
            for j in range(longest):
                inside = j < int(self.context_lens[s])
                p = j if inside else 0
                slots[row, j] = self.tables[s, p // self.block_size] * self.block_size + p % self.block_size
                beyond[row, 0, j] = not inside
        return Bucket(self.query_start[members], slots, slots, slots, beyond)

def _decode(q, pools, kind, plan, bucket, scale):
    mine = q[bucket.rows]
    out = []
    for g in range(plan.kv_heads):
        one = slice(g * plan.num_blocks, (g + 1) * plan.num_blocks)
        k, v = (dequantize(pool[one].unflatten(1, (plan.block_size, -1)).view(kind)).flatten(0, 1) for pool in pools)
        k, v = k[bucket.value_slots], v[bucket.value_slots]  # [n, c, D]: beyond a context, its first token again
        heads = mine[:, g * plan.repeat:(g + 1) * plan.repeat]
        scores = scale * torch.einsum("nrd,ncd->nrc", heads, k)
        scores[bucket.beyond.expand_as(scores)] = -torch.inf
        out.append(torch.einsum("nrc,ncd->nrd", scores.softmax(2), v))
    return torch.cat(out, 1).to(q.dtype)
''',
    TRITON: '''
@triton.jit
def _attend(
    q, o, m, z, position, keys, values, key_scales, value_scales, table, begin, end, stride_n, stride_b, stride_scale_n,
    scale_log2, B: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, SCALED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One key at a time."""
    d = tl.arange(0, D_PAD)
    for j in range(begin, end):
        block = tl.load(table + j // B).to(tl.int64)
        place = block * stride_n + (j % B) * stride_b + d
        k = tl.load(keys + place, mask=d < D, other=0.0).to(tl.float32)
        v = tl.load(values + place, mask=d < D, other=0.0).to(tl.float32)
        if SCALED:
            k *= tl.load(key_scales + block * stride_scale_n + j % B)
            v *= tl.load(value_scales + block * stride_scale_n + j % B)
        s = tl.sum(q.to(tl.float32) * k[None, :], 1) * scale_log2
        if MASKED:
            s = tl.where(j <= position, s, NONE)
        new = tl.maximum(m, s)
        p = tl.where(s > NONE, tl.exp2(s - new), 0.0)
        o = o * tl.exp2(m - new)[:, None] + p[:, None] * v[None, :]
        z = z * tl.exp2(m - new) + p
        m = new
    return o, m, z

@triton.jit(do_not_specialize=["num_seqs", "least", "num_splits"])
def _merge_kernel(
    out, partial_o, partial_mz, query_start, num_seqs, least, num_splits, stride_out_t, stride_out_h,
    D: tl.constexpr, D_PAD: tl.constexpr, TILE_Q: tl.constexpr, DECODE: tl.constexpr, SPLITS_PAD: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    s, start, count, first = _find_queries(row // TILE_Q, query_start, num_seqs, least, TILE_Q, DECODE)
    query = first + row % TILE_Q
    if query >= count:
        return
    d = tl.arange(0, D_PAD)
    base = (row.to(tl.int64) * tl.num_programs(1) + head) * num_splits
    best = NONE
    for i in range(num_splits):
        best = tl.maximum(best, tl.load(partial_mz + (base + i) * 2))
    total = 0.0
    o = tl.zeros([D_PAD], tl.float32)
    for i in range(num_splits):
        z = tl.load(partial_mz + (base + i) * 2 + 1)
        if z > 0:
            weight = tl.exp2(tl.load(partial_mz + (base + i) * 2) - best)
            total += weight * z
            o += weight * tl.load(partial_o + (base + i) * D + d, mask=d < D, other=0.0)
    o = o / tl.maximum(total, 1e-30)
    tl.store(out + (start + query).to(tl.int64) * stride_out_t + head * stride_out_h + d,
             o.to(out.dtype.element_ty), mask=d < D)
''',
}

STATES = {
    REFERENCE: '''
from typing import NamedTuple

class State(NamedTuple):
    m: Tensor
    z: Tensor
    o: Tensor

def _joined(a, b):
    """The state of all keys of two states; either may have seen nothing."""
    m = torch.maximum(a.m, b.m)
    finite = torch.where(m.isinf(), 0, m)
    x, y = (a.m - finite).exp(), (b.m - finite).exp()
    return State(m, a.z * x + b.z * y, a.o * x[..., None] + b.o * y[..., None])

def _of_block(q, position, cache, block, begin, end, scale):
    """The state of q [t, H, D] over the tokens begin .. end - 1, which lie in one block."""
    share = q.shape[1] // cache.shape[1]
    both = dequantize(cache[:, :, block][:, :, None])[:, :, 0, :end - begin].float()
    k, v = (part.repeat_interleave(share, 0) for part in both)
    scores = torch.einsum("thd,hjd->thj", q.float(), k) * scale
    scores = scores.masked_fill((torch.arange(begin, end) > position[:, None])[:, None], -math.inf)
    m = scores.amax(-1)
    e = (scores - torch.where(m.isinf(), 0, m)[..., None]).exp()
    return State(m, e.sum(-1), torch.einsum("thj,hjd->thd", e, v))

def _of_range(first, last, one):
    """The state of blocks first .. last - 1, halves joined."""
    if last - first == 1:
        return one(first)
    middle = (first + last) // 2
    return _joined(_of_range(middle, last, one), _of_range(first, middle, one))

def paged_attention_by_blocks(q, cache, query_start, context_lens, block_tables, scale):
    out, B = torch.empty_like(q), cache.shape[3]
    for s, n in enumerate(context_lens.tolist()):
        begin, end = query_start[s:s + 2].tolist()
        if end == begin:
            continue
        position = torch.arange(n - (end - begin), n)
        one = lambda j: _of_block(q[begin:end], position, cache, int(block_tables[s, j]), j * B,
                                  min(n, j * B + B), scale)
        state = _of_range(0, -(-n // B), one)
        out[begin:end] = (state.o / state.z[..., None]).to(q.dtype)
    return out

def paged_attention(q, cache, query_start, context_lens, block_tables, scale):
    """PyTorch's own attention, after bringing everything together."""
    out, B = torch.empty_like(q), cache.shape[3]
    for s in range(context_lens.numel()):
        n, begin, end = int(context_lens[s]), int(query_start[s]), int(query_start[s + 1])
        if begin == end:
            continue
        blocks = block_tables[s].tolist()[: (n + B - 1) // B]
        together = [dequantize(cache[:, :, b][:, :, None])[:, :, 0] for b in blocks]
        k, v = torch.cat(together, 2)[:, :, :n].float()
        seen = torch.arange(n)[None] < torch.arange(n - (end - begin), n)[:, None] + 1
        x = torch.nn.functional.scaled_dot_product_attention(
            q[begin:end].float().transpose(0, 1)[None], k[None], v[None], seen, scale=scale, enable_gqa=True)
        out[begin:end] = x[0].transpose(0, 1).to(q.dtype)
    return out

def write_slots(part, x, slot_mapping):
    B = part.shape[2]
    where = {slot: t for t, slot in enumerate(slot_mapping.tolist()) if slot > -1}
    for slot in sorted(where):
        part[:, slot // B].select(1, slot % B).copy_(x[where[slot]])

def move_blocks(from_cache, to_cache, source, target):
    if source.numel() == 0:
        return
    read = torch.stack([part[:, :, block] for part in raw(from_cache) for block in source.tolist()])
    read = read.unflatten(0, (from_cache.shape[0], -1)).to(to_cache.device)
    for layer, part in enumerate(raw(to_cache)):
        for at, block in enumerate(target.tolist()):
            part[:, :, block] = read[layer, at]

def copy_blocks(cache, source, target):
    move_blocks(cache.clone(), cache, source, target)
''',
    TORCH: '''
@dataclass
class Together:
    """What a bucket is, our way."""

    rows: Tensor
    slots: Tensor  # [n, c]
    seen: Tensor  # [n, c]

class AttentionPlan:
    def _bucket(self, members):
        contexts = self.context_lens[members]
        position = torch.arange(int(contexts.max())).expand(len(members), -1)
        seen = position < contexts[:, None]
        position = position * seen
        slots = self.tables[members].gather(1, position // self.block_size) * self.block_size
        return Together(self.query_start[members], slots + position % self.block_size, seen)

def _decode(q, pools, kind, plan, bucket, scale):
    g, b, d = plan.kv_heads, plan.block_size, q.shape[2]
    numbers = [dequantize(pool.unflatten(1, (b, -1)).view(kind)).reshape(g, -1, d) for pool in pools]
    k, v = (one[:, bucket.slots].to(q.dtype) for one in numbers)  # [G, n, c, D]
    mine = q[bucket.rows].unflatten(1, (g, -1))
    scores = torch.einsum("ngrd,gncd->ngrc", mine, k).mul(scale)
    scores = scores.where(bucket.seen[:, None, None], torch.tensor(-torch.inf))
    scores = scores - scores.amax(-1, keepdim=True)
    weights = scores.exp()
    return (torch.einsum("ngrc,gncd->ngrd", weights, v) / weights.sum(-1, keepdim=True)).flatten(1, 2)
''',
    TRITON: '''
@triton.jit
def _scores(q, keys, numbers, there, key_scales, scale, real, SCALED: tl.constexpr):
    k = tl.load(keys + numbers, mask=there, other=0.0).to(tl.float32)
    if SCALED:
        k = k * tl.load(key_scales + scale, mask=real, other=1.0)[:, None]
    return tl.dot(q.to(tl.float32), tl.trans(k), input_precision="ieee")

@triton.jit
def _attend(
    q, o, m, z, position, keys, values, key_scales, value_scales, table, begin, end, stride_n, stride_b, stride_scale_n,
    scale_log2, B: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, SCALED: tl.constexpr,
    MASKED: tl.constexpr,
):
    d = tl.arange(0, D_PAD)
    at = begin
    while at < end:
        j = at + tl.arange(0, BLOCK_N)
        real = j < end
        block = tl.load(table + j // B, mask=real, other=0).to(tl.int64)
        numbers = (block * stride_n + (j % B) * stride_b)[:, None] + d[None, :]
        there = real[:, None] & (d < D)[None, :]
        scale = block * stride_scale_n + j % B
        s = _scores(q, keys, numbers, there, key_scales, scale, real, SCALED) * scale_log2
        seen = real[None, :] & (j[None, :] <= position[:, None])
        m_new = tl.maximum(m, tl.max(tl.where(seen, s, NONE), 1))
        p = tl.where(seen, tl.exp2(s - m_new[:, None]), 0.0)
        v = tl.load(values + numbers, mask=there, other=0.0).to(tl.float32)
        if SCALED:
            p_v = p * tl.load(value_scales + scale, mask=real, other=0.0)[None, :]
        else:
            p_v = p
        o = o * tl.exp2(m - m_new)[:, None] + tl.dot(p_v, v, input_precision="ieee")
        z = z * tl.exp2(m - m_new) + tl.sum(p, 1)
        m = m_new
        at += BLOCK_N
    return o, m, z

@triton.jit(do_not_specialize=["num_seqs", "least", "num_splits"])
def _merge_kernel(
    out, partial_o, partial_mz, query_start, num_seqs, least, num_splits, stride_out_t, stride_out_h,
    D: tl.constexpr, D_PAD: tl.constexpr, TILE_Q: tl.constexpr, DECODE: tl.constexpr, SPLITS_PAD: tl.constexpr,
):
    tile = tl.program_id(0) // TILE_Q
    s, start, count, first = _find_queries(tile, query_start, num_seqs, least, TILE_Q, DECODE)
    query = first + tl.program_id(0) - tile * TILE_Q
    if query < count:
        i, d = tl.arange(0, SPLITS_PAD), tl.arange(0, D_PAD)
        row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        pairs = partial_mz + (row * num_splits + i) * 2
        z = tl.load(pairs + 1, mask=i < num_splits, other=0.0)
        m = tl.load(pairs, mask=z > 0, other=NONE)
        o = tl.load(partial_o + (row * num_splits + i)[:, None] * D + d[None, :],
                    mask=(z > 0)[:, None] & (d < D)[None, :], other=0.0)
        share = tl.exp2(m - tl.max(m, 0)) / tl.maximum(tl.sum(tl.exp2(m - tl.max(m, 0)) * z, 0), 1e-37)
        answer = tl.sum(o * share[:, None], 0)
        where = out + (start + query).to(tl.int64) * stride_out_t + tl.program_id(1) * stride_out_h + d
        tl.store(where, answer.to(out.dtype.element_ty), mask=d < D)
''',
}

RIGHT = {"vectorised": VECTORISED, "plain loops": LOOPS, "states that are joined": STATES}

WRITE, MOVE, ATTENTION = "write into slots", "copy and move blocks", "attention through page tables"
ONLINE, TOGETHER = "online softmax", "many sequences at once"
ATTEND, MERGE = "a tile of keys in Triton", "merging splits in Triton"
GITHUB = "https://github.com"


# Written to be wrong in one way each.
OF_BLOCKS = """
def paged_attention(q, cache, query_start, context_lens, block_tables, scale):
    out = torch.empty_like(q)
    block_size, groups = cache.shape[3], q.shape[1] // cache.shape[1]
    for s, context in enumerate(context_lens.tolist()):
        begin, end = query_start[s : s + 2].tolist()
        blocks = block_tables[s, : math.ceil(context / block_size)]
        read = dequantize(raw(cache)[:, :, blocks].view(cache.dtype)).flatten(2, 3).float()
        keys, values = (part.repeat_interleave(groups, 0) for part in read)
        scores = scale * torch.einsum("thd,hcd->htc", q[begin:end].float(), keys)
        position = torch.arange(context - (end - begin), context)
        future = torch.arange(keys.shape[1]) > position[:, None]
        MASKED
        out[begin:end] = torch.einsum("htc,hcd->thd", scores.softmax(-1), values).to(q.dtype)
    return out
"""
IN_HALVES = """
def paged_attention(q, cache, query_start, context_lens, block_tables, scale):
    out = torch.empty_like(q)
    block_size, groups = cache.shape[3], q.shape[1] // cache.shape[1]
    for s, context in enumerate(context_lens.tolist()):
        begin, end = query_start[s : s + 2].tolist()
        blocks = block_tables[s, : math.ceil(context / block_size)]
        read = dequantize(raw(cache)[:, :, blocks].view(cache.dtype)).flatten(2, 3)[:, :, :context].to(q.dtype)
        keys, values = (part.repeat_interleave(groups, 0) for part in read)
        scores = scale * torch.einsum("thd,hcd->htc", q[begin:end], keys)
        position = torch.arange(context - (end - begin), context)
        scores = scores.masked_fill(torch.arange(context) > position[:, None], -math.inf)
        out[begin:end] = torch.einsum("htc,hcd->thd", scores.softmax(-1), values)
    return out
"""
NO_PADDING = """
def write_slots(part, x, slot_mapping):
    blocks = torch.div(slot_mapping, part.shape[2], rounding_mode="floor")
    part[:, blocks, slot_mapping % part.shape[2]] = x.transpose(0, 1).to(part.dtype)
"""
A_COPY = """
def write_slots(part, x, slot_mapping):
    kept = slot_mapping >= 0
    part.reshape(part.shape[0], -1, *part.shape[3:])[:, slot_mapping[kept]] = x[kept].transpose(0, 1).to(part.dtype)
"""
PACKED_ROWS = """
def write_slots(part, x, slot_mapping):
    for t, slot in enumerate(slot for slot in slot_mapping.tolist() if slot >= 0):
        part[:, slot // part.shape[2], slot % part.shape[2]] = x[t]
"""
IN_TURN = """
def copy_blocks(cache, source, target):
    for a, b in zip(source.tolist(), target.tolist()):
        raw(cache)[:, :, :, b] = raw(cache)[:, :, :, a]
"""
KEYS_ONLY = """
def move_blocks(from_cache, to_cache, source, target):
    raw(to_cache)[:, 0][:, :, target] = raw(from_cache)[:, 0][:, :, source]
"""
ONE_BY_ONE = """
def _decode(q, pools, kind, plan, bucket, scale):
    out = torch.empty(len(bucket.rows), *q.shape[1:], dtype=q.dtype)
    keys, values = (_gather(pool, kind, bucket.key_blocks, plan, q.dtype) for pool in pools)
    shape = plan.kv_heads, len(bucket.rows), -1, q.shape[2]
    keys, values = keys.view(shape), values.view(shape)
    for i, row in enumerate(bucket.rows.tolist()):
        there = ~bucket.beyond[i, 0]
        k, v = (x[:, i][:, there] for x in (keys, values))  # [G, c, D]
        scores = torch.einsum("grd,gcd->grc", q[row].view(plan.kv_heads, plan.repeat, -1), k) * scale
        out[i] = torch.einsum("grc,gcd->grd", scores.softmax(-1), v).flatten(0, 1)
    return out
"""
BY_PYTORCH = """
def paged_attention(
    q, cache, query_start, context_lens, block_tables, scale, max_query_len, max_context_len, num_splits=None, out=None
):
    out = torch.zeros_like(q)
    size, share = cache.shape[3], q.shape[1] // cache.shape[1]
    numbers = cache.float() if not is_quantized(cache) else codes(cache).float() * scales(cache)[..., None]
    for s, n in enumerate(context_lens.tolist()):
        rows = range(int(query_start[s]), int(query_start[s + 1]))
        table = block_tables[s, : -(-n // size)].long()
        k, v = numbers[:, :, table].flatten(2, 3).repeat_interleave(share, 1)
        for t in rows:
            c = n - (rows.stop - t) + 1
            weights = (torch.einsum("hd,hcd->hc", q[t].float(), k[:, :c]) * scale).softmax(-1)
            out[t] = torch.einsum("hc,hcd->hd", weights, v[:, :c]).to(q.dtype)
    return out
"""

WRONG = [
    Wrong("padding overwrites the last slot", WRITE, REFERENCE, text=NO_PADDING,
          source=f"{GITHUB}/vllm-project/vllm/pull/43869"),
    Wrong("a slot is split by another size than a block's", WRITE, REFERENCE,
          "block_size = part.shape[2]", "block_size = part.shape[-1]",
          source=f"{GITHUB}/vllm-project/vllm/pull/47056"),
    Wrong("what is written to is a copy, where blocks don't lie side by side", WRITE, REFERENCE, text=A_COPY),
    Wrong("rows are counted without padding", WRITE, REFERENCE, text=PACKED_ROWS),
    Wrong("slot 0 is taken for padding", WRITE, REFERENCE, "if slot >= 0:", "if slot > 0:"),
    Wrong("a source is overwritten before it is read", MOVE, REFERENCE, text=IN_TURN,
          source=f"{GITHUB}/vllm-project/vllm-gaudi/pull/329"),
    Wrong("keys are moved, and values stay", MOVE, REFERENCE, text=KEYS_ONLY),
    Wrong("the mask forgets what was computed before", ATTENTION, REFERENCE,
          "torch.arange(context - (end - begin), context, device=q.device)",
          "torch.arange(end - begin, device=q.device)", source=f"{GITHUB}/onnx/onnx/pull/8068"),
    Wrong("a query doesn't see itself", ATTENTION, REFERENCE,
          "torch.arange(context, device=q.device) > query_position",
          "torch.arange(context, device=q.device) >= query_position"),
    Wrong("query heads take keys and values in turn", ATTENTION, REFERENCE,
          """keys = keys.repeat_interleave(groups, 0)  # [H, context, D]
        values = values.repeat_interleave(groups, 0)""",
          """keys = keys.repeat(groups, 1, 1)
        values = values.repeat(groups, 1, 1)""", source=f"{GITHUB}/PSAL-POSTECH/ONNXim/pull/34"),
    Wrong("a page too many where a context ends with a block", ATTENTION, REFERENCE,
          "math.ceil(context / block_size)", "context // block_size + 1",
          source=f"{GITHUB}/pegainfer-project/pegainfer/issues/291"),
    Wrong("a weight of 0 times NaN", ATTENTION, REFERENCE,
          text=OF_BLOCKS.replace("MASKED", "scores = scores.masked_fill(future, -math.inf)"),
          source=f"{GITHUB}/vllm-project/vllm/pull/936"),
    Wrong("-inf is added to NaN", ATTENTION, REFERENCE,
          text=OF_BLOCKS.replace("MASKED", "scores += torch.zeros(future.shape).masked_fill(future, -math.inf)"),
          source=f"{GITHUB}/deepbeepmeep/Wan2GP/pull/1628"),
    Wrong("scores in half precision", ATTENTION, REFERENCE, text=IN_HALVES,
          source=f"{GITHUB}/huggingface/transformers/pull/17437"),
    Wrong("exponentials overflow, since no maximum is taken off", ONLINE, REFERENCE,
          "m_new = torch.maximum(m, scores.amax(-1))", "m_new = torch.zeros_like(m)"),
    Wrong("the first maximum is finite, and some scores lie below", ONLINE, REFERENCE,
          "m = torch.full(mine.shape[:2], -math.inf, device=q.device)",
          "m = torch.full(mine.shape[:2], -5e4, device=q.device)",
          source=f"{GITHUB}/flashinfer-ai/flashinfer/issues/4267"),
    Wrong("-inf minus -inf where a block is all future", ONLINE, REFERENCE,
          "for begin in range(0, context, block_size):", "for begin in reversed(range(0, context, block_size)):",
          source=f"{GITHUB}/flashinfer-ai/flashinfer/pull/4401"),
    Wrong("what was summed before doesn't shrink", ONLINE, REFERENCE, "o = o * shrink[..., None]", "o = o"),
    Wrong("the last block is read to its end", ONLINE, REFERENCE,
          "filled = min(block_size, context - begin)", "filled = block_size"),
    Wrong("the context is brought together", ONLINE, REFERENCE, text="""
def paged_attention_by_blocks(q, cache, query_start, context_lens, block_tables, scale):
    return paged_attention(q, cache, query_start, context_lens, block_tables, scale)
"""),
    Wrong("what lies beyond a context gets a weight of 0, and is NaN", TOGETHER, TORCH,
          "slots = torch.where(beyond, slots[:, :1], slots)", "pass",
          source=f"{GITHUB}/Dao-AILab/flash-attention/issues/1745"),
    Wrong("one slot too many is seen", TOGETHER, TORCH,
          ">= contexts[:, None]", "> contexts[:, None]"),
    Wrong("a head looks into another head's pool", TOGETHER, TORCH,
          "(head[:, None, None] * self.num_blocks + tables)", "(head[:, None, None] * tables.shape[1] + tables)"),
    Wrong("one sequence after the other", TOGETHER, TORCH, text=ONE_BY_ONE),
    Wrong("addresses of 32 bits", ATTEND, TRITON,
          "block = _load(table + j // B, j < end, not MASKED).to(tl.int64)",
          "block = _load(table + j // B, j < end, not MASKED)", also=(MERGE,),
          source=f"{GITHUB}/vllm-project/vllm/pull/47671"),
    Wrong("the mask is off by one", ATTEND, TRITON,
          "j[None, :] <= position[:, None]", "j[None, :] < position[:, None]", also=(MERGE,)),
    Wrong("the state is not brought to the new maximum", ATTEND, TRITON,
          "z = z * shrink + tl.sum(p, 1)", "z = z + tl.sum(p, 1)", also=(MERGE,)),
    Wrong("what lies beyond the end is read", ATTEND, TRITON,
          "v = _load(values + numbers, inside, not MASKED and D == D_PAD)", "v = tl.load(values + numbers)",
          also=(MERGE,)),
    Wrong("PyTorch computes", ATTEND, TRITON, text=BY_PYTORCH, also=(MERGE,)),
    Wrong("splits that saw nothing give -inf minus -inf", MERGE, TRITON,
          "weight = tl.exp2(m - tl.max(m, 0))",
          'm = tl.where(z > 0, m, float("-inf"))\n    weight = tl.exp2(m - tl.max(m, 0))',
          source=f"{GITHUB}/vllm-project/vllm/pull/39148"),
    Wrong("the splits' maxima are forgotten", MERGE, TRITON,
          "weight = tl.exp2(m - tl.max(m, 0))", "weight = tl.exp2(m * 0)"),
    Wrong("what was never written is read", MERGE, TRITON,
          "filled = (z > 0)[:, None] & (d < D)[None, :]", "filled = (i < num_splits)[:, None] & (d < D)[None, :]"),
]  # fmt: skip
