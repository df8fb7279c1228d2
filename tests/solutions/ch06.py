"""Chapter 6: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821

import math
from dataclasses import dataclass

import numpy as np


def running_lse(pieces):
    m, z = -torch.inf, 0.0
    for piece in pieces:
        new = max(m, float(piece.max()))
        if new > -torch.inf:
            z = z * math.exp(m - new) + float(torch.exp(piece - new).sum())
            m = new
    return m + math.log(z)


def lse_by_logaddexp(pieces):
    total = torch.tensor(-torch.inf)
    for piece in pieces:
        total = torch.logaddexp(total, piece.logsumexp(0))
    return total


def lse_in_numpy(pieces):
    total = -np.inf
    for piece in pieces:
        for x in piece.numpy():
            total = np.logaddexp(total, np.float64(x))
    return total


def lse_by_states(pieces):
    """The chapter's own pieces, with no values."""
    state = start(D=1)
    for piece in pieces:
        if piece.isfinite().any():
            state = add_block(state, piece[piece.isfinite()], torch.zeros(int(piece.isfinite().sum()), 1))
    return (state.m + state.z.log()).item()


def lse_without_max(pieces):
    return float(sum(piece.exp().sum() for piece in pieces).log())


def lse_without_shrink(pieces):
    m, z = -torch.inf, 0.0
    for piece in pieces:
        m = max(m, float(piece.max()))
        z += float(torch.exp(piece - m).nansum())
    return m + float(torch.tensor(z).log())


def lse_all_at_once(pieces):
    return float(torch.cat(list(pieces)).logsumexp(-1))


def lse_keeps_numbers(pieces):
    numbers = []
    for piece in pieces:
        numbers += piece.tolist()
    return float(torch.tensor(numbers).logsumexp(-1))


def lse_grows(pieces):
    whole = torch.empty(0)
    for piece in pieces:
        whole = torch.cat([whole, piece])
    return whole.logsumexp(-1).item()


def lse_of_first_max(pieces):
    """The first piece's largest for all."""
    first = next(pieces)
    m = float(first.max())
    z = float(torch.exp(first - m).sum()) + sum(float(torch.exp(piece - m).sum()) for piece in pieces)
    return m + float(torch.tensor(z).log())


def lse_stops_at_inf(pieces):
    """-inf - -inf is NaN."""
    m, z = torch.tensor(-torch.inf), torch.tensor(0.0)
    for piece in pieces:
        new = torch.maximum(m, piece.max())
        z, m = z * torch.exp(m - new) + torch.exp(piece - new).sum(), new
    return float(m + z.log())


def merge_answers(o_a, lse_a, o_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    return o_a * torch.exp(lse_a - lse)[..., None] + o_b * torch.exp(lse_b - lse)[..., None], lse


def merge_by_state(o_a, lse_a, o_b, lse_b):
    """An answer is a state with z = 1."""
    both = merge(State(lse_a, torch.ones_like(lse_a), o_a), State(lse_b, torch.ones_like(lse_b), o_b))
    return [both.o / both.z.unsqueeze(-1), both.m + both.z.log()]


def merge_by_sigmoid(o_a, lse_a, o_b, lse_b):
    share = torch.sigmoid(lse_a - lse_b).unsqueeze(-1)
    return share * o_a + (1 - share) * o_b, torch.stack([lse_a, lse_b]).logsumexp(0)


def merge_by_softmax(o_a, lse_a, o_b, lse_b):
    both = torch.stack([lse_a, lse_b], -1)
    weights = both.softmax(-1)
    return (torch.stack([o_a, o_b], -1) * weights.unsqueeze(-2)).sum(-1), both.logsumexp(-1)


def merge_with_exp(o_a, lse_a, o_b, lse_b):
    x, y = lse_a.exp(), lse_b.exp()
    z = x + y
    return (o_a * x[..., None] + o_b * y[..., None]) / z[..., None], z.log()


def merge_by_lse(o_a, lse_a, o_b, lse_b):
    total = lse_a + lse_b
    return (o_a * lse_a[..., None] + o_b * lse_b[..., None]) / total[..., None], torch.logaddexp(lse_a, lse_b)


def merge_of_one_row(o_a, lse_a, o_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    return o_a * torch.exp(lse_a - lse)[:, None] + o_b * torch.exp(lse_b - lse)[:, None], lse


def merge_in_place(o_a, lse_a, o_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    o_a *= torch.exp(lse_a - lse)[..., None]
    o_a += o_b * torch.exp(lse_b - lse)[..., None]
    return o_a, lse


def merge_takes_the_larger(o_a, lse_a, o_b, lse_b):
    return torch.where((lse_a > lse_b)[..., None], o_a, o_b), torch.logaddexp(lse_a, lse_b)


def merge_one_max(o_a, lse_a, o_b, lse_b):
    """One m for all queries: those that are much quieter get 0 / 0."""
    m = torch.maximum(lse_a, lse_b).max()
    x, y = torch.exp(lse_a - m), torch.exp(lse_b - m)
    return (o_a * x[..., None] + o_b * y[..., None]) / (x + y)[..., None], m + (x + y).log()


def blocks_to_mask(context, t, B):
    return list(range((context - t + 1) // B, -(-context // B)))


def mask_from_the_end(context, t, B):
    found, j = [], (context - 1) // B
    while j >= 0 and j * B + B - 1 > context - t:
        found.append(j)
        j -= 1
    return found[::-1]


def mask_as_range(context, t, B):
    last, whole = (context - 1) // B, (context - t + 1) // B  # so many blocks are seen by all
    return range(whole, last + 1)


def mask_by_array(context, t, B):
    return [*np.arange((context - t + 1) // B, math.ceil(context / B))]


def mask_by_search(context, t, B):
    return [j for j in range(-(-context // B)) if (j + 1) * B - 1 > context - t]


def windowed_attention(q, read, table, n, window, B):
    first, state = max(0, n - window), start(D=len(q))
    for j in range(first // B, -(-n // B)):
        K, V = read(table[j])
        mine = slice(max(0, first - j * B), min(B, n - j * B))
        state = add_block(state, K[mine] @ q / len(q) ** 0.5, V[mine])
    return state.o / state.z


def window_in_a_row(q, read, table, n, window, B):
    begin = max(0, n - window) // B
    k, v = (torch.cat(part) for part in zip(*[read(block) for block in table[begin:]], strict=True))
    seen = slice(max(0, n - window) - begin * B, n - begin * B)
    return torch.softmax(k[seen] @ q / math.sqrt(q.shape[0]), 0) @ v[seen]


def window_by_mask(q, read, table, n, window, B):
    scores, values = [], []
    for j, block in enumerate(table):
        position = torch.arange(j * B, j * B + B)
        seen = (position >= n - window) & (position < n)
        if not seen.any():
            continue
        K, V = read(block)
        scores.append(torch.where(seen, K @ q / len(q) ** 0.5, -torch.inf))
        values.append(torch.where(seen[:, None], V, 0.0))
    return torch.cat(scores).softmax(-1) @ torch.cat(values)


def window_slot_by_slot(q, read, table, n, window, B):
    kept = {}
    total, out, top = 0.0, torch.zeros_like(q), -math.inf
    for position in range(max(0, n - window), n):
        if position // B not in kept:
            kept[position // B] = read(table[position // B])
        K, V = kept[position // B]
        score = float(K[position % B].dot(q)) / len(q) ** 0.5
        new = max(top, score)
        total = total * math.exp(top - new) + math.exp(score - new)
        out = out * math.exp(top - new) + math.exp(score - new) * V[position % B]
        top = new
    return out / total


def window_by_weight(q, read, table, n, window, B):
    first, state = max(0, n - window), start(D=len(q))
    for j in range(first // B, -(-n // B)):
        K, V = read(table[j])
        position = j * B + torch.arange(B)
        unseen = (position < first) | (position >= n)
        state = add_block(state, (K @ q / len(q) ** 0.5).masked_fill(unseen, -torch.inf), V)  # 0 * NaN
    return state.o / state.z


def window_reads_all(q, read, table, n, window, B):
    blocks = [read(block) for block in table]
    k, v = (torch.cat([block[i] for block in blocks])[max(0, n - window) : n] for i in (0, 1))
    return torch.softmax(k @ q / len(q) ** 0.5, -1) @ v


def window_by_poison(q, read, table, n, window, B):
    """Whatever isn't NaN."""
    first, ks, vs = max(0, n - window), [], []
    for j in range(first // B, -(-n // B)):
        K, V = read(table[j])
        good = ~K.isnan().any(-1)
        ks.append(K[good])
        vs.append(V[good])
    return torch.softmax(torch.cat(ks) @ q / len(q) ** 0.5, -1) @ torch.cat(vs)


def window_of_blocks(q, read, table, n, window, B):
    """Whole blocks."""
    first, state = max(0, n - window), start(D=len(q))
    for j in range(first // B, -(-n // B)):
        K, V = (x[: n - j * B] for x in read(table[j]))
        state = add_block(state, K @ q / len(q) ** 0.5, V)
    return state.o / state.z


def window_by_the_table(q, read, table, n, window, B):
    """Whatever wasn't given away."""
    first, state = max(0, n - window), start(D=len(q))
    for j, block in enumerate(table):
        if block >= 0:
            K, V = read(block)
            mine = slice(max(0, first - j * B), max(0, min(B, n - j * B)))
            if K[mine].numel():
                state = add_block(state, K[mine] @ q / len(q) ** 0.5, V[mine])
    return state.o / state.z


def window_cleans_the_pool(q, read, table, n, window, B):
    first, state = max(0, n - window), start(D=len(q))
    for j in range(first // B, -(-n // B)):
        K, V = read(table[j])
        position = j * B + torch.arange(B)
        unseen = (position < first) | (position >= n)
        V[unseen] = 0.0
        state = add_block(state, (K @ q / len(q) ** 0.5).masked_fill(unseen, -torch.inf), V)
    return state.o / state.z


class Int8Pool:
    def __init__(self, k_pool, v_pool):
        pools = torch.stack([k_pool, v_pool])
        self.scale = pools.abs().amax((-2, -1), keepdim=True).clamp(min=1e-9) / 127  # [2, N, 1, 1]
        self.numbers = (pools / self.scale).round().to(torch.int8)

    def attention(self, q, table, n):
        B, state = self.numbers.shape[2], start(D=len(q))
        for j, block in enumerate(table):
            K, V = (self.numbers[:, block] * self.scale[:, block])[:, : n - j * B]
            state = add_block(state, K @ q / len(q) ** 0.5, V)
        return state.o / state.z


def small_block(x):
    scale = float(x.abs().max()) / 127 or 1.0
    return (x / scale).round().to(torch.int8), scale


class InPairs:
    """(int8, scale) for each block."""

    def __init__(self, k_pool, v_pool):
        self.blocks = [(small_block(k), small_block(v)) for k, v in zip(k_pool, v_pool, strict=True)]

    def attention(self, q, table, n):
        k, v = (torch.cat([self.blocks[b][i][0] * self.blocks[b][i][1] for b in table])[:n] for i in (0, 1))
        return torch.softmax(k @ q / len(q) ** 0.5, -1) @ v


class InADict:
    __slots__ = ("kept",)

    def __init__(self, k_pool, v_pool):
        self.kept = {}
        for name, pool in (("k", k_pool), ("v", v_pool)):
            scale = pool.abs().amax(dim=(1, 2)).clamp_min(1e-6) / 127
            self.kept[name] = {"scale": scale, "codes": torch.round(pool / scale[:, None, None]).char()}

    def attention(self, q, table, n):
        k, v = ((x["codes"][table] * x["scale"][table][:, None, None]).flatten(0, 1)[:n] for x in self.kept.values())
        return torch.softmax(k @ q / len(q) ** 0.5, -1) @ v


class AsAModule(torch.nn.Module):
    """A scale for each slot."""

    def __init__(self, k_pool, v_pool):
        super().__init__()
        pools = torch.stack((k_pool, v_pool))
        scales = (pools.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-8)
        self.register_buffer("scales", scales.half())
        self.register_buffer("codes", (pools / self.scales.float()).round().clamp(-127, 127).to(torch.int8))

    def attention(self, q, table, n):
        k, v = (self.codes[:, table] * self.scales[:, table].float()).flatten(1, 2)[:, :n]
        return torch.softmax(k @ q / len(q) ** 0.5, -1) @ v


@dataclass(init=False)
class InNumPy:
    codes: np.ndarray
    scales: list

    def __init__(self, k_pool, v_pool):
        pools = np.stack([k_pool.numpy(), v_pool.numpy()])
        tops = np.abs(pools).max((2, 3))
        self.scales = np.where(tops > 0, tops / 127, 1).tolist()
        self.codes = np.rint(pools / np.array(self.scales)[:, :, None, None]).astype(np.int8)

    def attention(self, q, table, n):
        k, v = (
            np.concatenate([self.codes[i, block] * self.scales[i][block] for block in table])[:n] for i in (0, 1)
        )
        k, v = (torch.from_numpy(x.astype(np.float32)) for x in (k, v))
        return torch.softmax(k @ q / len(q) ** 0.5, -1) @ v


class OneScale(Int8Pool):
    def __init__(self, k_pool, v_pool):
        super().__init__(k_pool, v_pool)
        pools = torch.stack([k_pool, v_pool])
        self.scale = (pools.abs().max() / 127).expand_as(self.scale)
        self.numbers = (pools / self.scale).round().to(torch.int8)


class StillFp32(Int8Pool):
    def __init__(self, k_pool, v_pool):
        self.scale = torch.ones(2, len(k_pool), 1, 1)
        self.numbers = torch.stack([k_pool, v_pool])


class HalfAsSmall(Int8Pool):
    def __init__(self, k_pool, v_pool):
        self.scale = torch.ones(2, len(k_pool), 1, 1)
        self.numbers = torch.stack([k_pool, v_pool]).half()


class EmptySlotsToo(Int8Pool):
    def attention(self, q, table, n):
        return super().attention(q, table, len(table) * self.numbers.shape[2])


class OriginalsInAList:
    def __init__(self, k_pool, v_pool):
        self.codes = torch.zeros(2, *k_pool.shape, dtype=torch.int8)
        self.originals = [k_pool.clone(), v_pool.clone()]

    def attention(self, q, table, n):
        k, v = (pool[table].flatten(0, 1)[:n] for pool in self.originals)
        return torch.softmax(k @ q / len(q) ** 0.5, -1) @ v


class KeepsWhatItGot(OriginalsInAList):
    def __init__(self, k_pool, v_pool):
        self.originals = [k_pool, v_pool]


class InAClosure(OriginalsInAList):
    def __init__(self, k_pool, v_pool):
        k, v = k_pool.tolist(), v_pool.tolist()
        self.get = lambda: [torch.tensor(k), torch.tensor(v)]

    @property
    def originals(self):
        return self.get()


ELSEWHERE = {}


class InAGlobal(OriginalsInAList):
    def __init__(self, k_pool, v_pool):
        ELSEWHERE[id(self)] = [k_pool.clone(), v_pool.clone()]

    @property
    def originals(self):
        return ELSEWHERE[id(self)]


class OfTheClass(Int8Pool):
    """All objects of the class share the last one's memory."""

    def __init__(self, k_pool, v_pool):
        pool = Int8Pool(k_pool, v_pool)
        OfTheClass.scale, OfTheClass.numbers = pool.scale, pool.numbers


class ScalesInPlace(Int8Pool):
    def __init__(self, k_pool, v_pool):
        scale = k_pool.abs().amax((1, 2), keepdim=True).clamp(min=1e-9) / 127
        k_pool /= scale
        super().__init__(k_pool * scale, v_pool)


class TableByNumber(Int8Pool):
    """Blocks in the order in which they lie."""

    def attention(self, q, table, n):
        return super().attention(q, sorted(table), n)


RIGHT = {
    "running_lse": [running_lse, lse_by_logaddexp, lse_in_numpy, lse_by_states],
    "merge_answers": [merge_answers, merge_by_state, merge_by_sigmoid, merge_by_softmax],
    "blocks_to_mask": [blocks_to_mask, mask_from_the_end, mask_as_range, mask_by_array],
    "windowed_attention": [windowed_attention, window_in_a_row, window_by_mask, window_slot_by_slot],
    "Int8Pool": [Int8Pool, InPairs, InADict, AsAModule, InNumPy],
}
WRONG = {
    "running_lse": [
        lse_without_max, lse_without_shrink, lse_all_at_once, lse_keeps_numbers, lse_grows, lse_of_first_max,
        lse_stops_at_inf,
        lambda pieces: max(float(piece.max()) for piece in pieces),  # nearly, when scores are far apart
        lambda pieces: torch.stack([piece.logsumexp(-1) for piece in pieces]).logsumexp(-1).item(),  # one for each
        lambda pieces: torch.tensor([piece.logsumexp(-1).item() for piece in pieces]).logsumexp(-1).item(),
    ],
    "merge_answers": [
        merge_with_exp,  # overflows
        merge_by_lse,  # lse is a logarithm, not a weight
        merge_of_one_row, merge_in_place, merge_takes_the_larger, merge_one_max,
        lambda o_a, lse_a, o_b, lse_b: ((o_a + o_b) / 2, torch.logaddexp(lse_a, lse_b)),
        lambda o_a, lse_a, o_b, lse_b: (merge_answers(o_a, lse_a, o_b, lse_b)[0], torch.maximum(lse_a, lse_b)),
        lambda o_a, lse_a, o_b, lse_b: (merge_answers(o_a, lse_a, o_b, lse_b)[0], lse_a + lse_b),
    ],
    "blocks_to_mask": [
        mask_by_search,
        lambda context, t, B: [(context - 1) // B],  # the last one only
        lambda context, t, B: list(range((context - t) // B, -(-context // B))),  # a query does see itself
        lambda context, t, B: [j for j in blocks_to_mask(context, t, B) if j * B + B <= context],  # empty slots
        lambda context, t, B: blocks_to_mask(context, t, B)[::-1],
        lambda context, t, B: set(blocks_to_mask(context, t, B)),
        lambda context, t, B: list(range((context - t + 1) // B, context // B + 1)),  # one too many
    ],
    "windowed_attention": [
        window_by_weight, window_reads_all, window_by_poison, window_of_blocks, window_by_the_table,
        window_cleans_the_pool,
        lambda q, read, table, n, window, B: windowed_attention(q, read, table, n, window + 1, B),
        lambda q, read, table, n, window, B: windowed_attention(8**-0.5 * len(q) ** 0.5 * q, read, table, n, window, B),
        lambda q, read, table, n, window, B: attend_one(q, *torch.stack([torch.stack(read(b)) for b in table], 1),
                                                        range(len(table)), n),
    ],
    "Int8Pool": [
        OneScale, StillFp32, HalfAsSmall, EmptySlotsToo, OriginalsInAList, KeepsWhatItGot, InAClosure, InAGlobal,
        OfTheClass, ScalesInPlace, TableByNumber,
    ],
}  # fmt: skip
