"""Chapter 6: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821


def running_lse(pieces):
    m, z = -torch.inf, 0.0
    for piece in pieces:
        new = max(m, float(piece.max()))
        if new > -torch.inf:
            z = z * float(torch.exp(torch.tensor(m - new))) + float(torch.exp(piece - new).sum())
            m = new
    return m + float(torch.tensor(z).log())


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


def merge_answers(o_a, lse_a, o_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    return o_a * torch.exp(lse_a - lse)[..., None] + o_b * torch.exp(lse_b - lse)[..., None], lse


def merge_with_exp(o_a, lse_a, o_b, lse_b):
    x, y = lse_a.exp(), lse_b.exp()
    z = x + y
    return (o_a * x[..., None] + o_b * y[..., None]) / z[..., None], z.log()


def merge_by_lse(o_a, lse_a, o_b, lse_b):
    total = lse_a + lse_b
    return (o_a * lse_a[..., None] + o_b * lse_b[..., None]) / total[..., None], torch.logaddexp(lse_a, lse_b)


def blocks_to_mask(context, t, B):
    return list(range((context - t + 1) // B, -(-context // B)))


def windowed_attention(q, read, table, n, window, B):
    first, state = max(0, n - window), start(D=len(q))
    for j in range(first // B, -(-n // B)):
        K, V = read(table[j])
        mine = slice(max(0, first - j * B), min(B, n - j * B))
        state = add_block(state, K[mine] @ q / len(q) ** 0.5, V[mine])
    return state.o / state.z


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


class EmptySlotsToo(Int8Pool):
    def attention(self, q, table, n):
        return super().attention(q, table, len(table) * self.numbers.shape[2])


WRONG = {
    "running_lse": [lse_without_max, lse_without_shrink, lse_all_at_once],
    "merge_answers": [
        merge_with_exp,  # overflows
        merge_by_lse,  # lse is a logarithm, not a weight
        lambda o_a, lse_a, o_b, lse_b: ((o_a + o_b) / 2, torch.logaddexp(lse_a, lse_b)),
    ],
    "blocks_to_mask": [
        lambda context, t, B: [(context - 1) // B],  # the last one only
        lambda context, t, B: list(range((context - t) // B, -(-context // B))),  # a query does see itself
        lambda context, t, B: [j for j in blocks_to_mask(context, t, B) if j * B + B <= context],  # empty slots
    ],
    "windowed_attention": [
        window_by_weight,
        window_reads_all,
        lambda q, read, table, n, window, B: windowed_attention(q, read, table, n, window + 1, B),
    ],
    "Int8Pool": [OneScale, StillFp32, EmptySlotsToo],
}
