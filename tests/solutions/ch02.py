"""Chapter 2: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821


def largest_batch(memory, weights, per_token, max_len):
    return max(0, memory - weights) // (per_token * max_len)


def step_seconds(work, weight_count, per_token, peak, bandwidth, itemsize=2):
    if not work:
        return 0.0
    computed = sum(count for count, _ in work)
    read = itemsize * weight_count + per_token * sum(context for _, context in work)
    return max(2 * computed * weight_count / peak, read / bandwidth)


class KVCache:
    def __init__(self, L, G, max_len, D):
        self.memory = torch.empty(L, 2, G, max_len, D)
        self.count = 0

    def __len__(self):
        return self.count

    def append(self, kv):
        end = self.count + kv.shape[3]
        if end > self.memory.shape[3]:
            raise ValueError(f"{end} tokens do not fit into {self.memory.shape[3]}")
        self.memory[:, :, :, self.count : end] = kv
        self.count = end

    def read(self):
        return self.memory[:, :, :, : self.count]

    def truncate(self, n):
        if not 0 <= n <= self.count:
            raise ValueError(f"can't keep {n} of {self.count} tokens")
        self.count = n


class WindowCache:
    def __init__(self, window, G, D):
        self.kv, self.count = torch.empty(2, G, window, D), 0

    def step(self, q, k, v):
        window = self.kv.shape[2]
        self.kv[:, :, self.count % window] = torch.stack([k, v])
        self.count += 1
        keys, values = self.kv[:, :, : min(self.count, window)]  # their order does not matter: a sum is a sum
        q = rearrange(q, "(g r) d -> g r d", g=len(keys))
        weights = softmax(q @ keys.transpose(1, 2) / q.shape[-1] ** 0.5, -1)
        return (weights @ values).flatten(0, 1)


class Careless(KVCache):
    """Finds out that there is no room when the number is changed already."""

    def append(self, kv):
        self.count += kv.shape[3]
        if self.count > self.memory.shape[3]:
            raise ValueError
        self.memory[:, :, :, self.count - kv.shape[3] : self.count] = kv


class Growing(KVCache):
    """A new tensor at each append."""

    def append(self, kv):
        super().append(kv)
        self.memory = self.memory.clone()


class Forgetful(KVCache):
    """truncate(n) forgets n tokens."""

    def truncate(self, n):
        super().truncate(self.count - n)


class Unwritten(WindowCache):
    """Reads the whole ring, also what was not written yet."""

    def __init__(self, window, G, D):
        self.kv, self.count = torch.zeros(2, G, window, D), window * 10**6


class OneShort(WindowCache):
    """Looks back at one token less."""

    def __init__(self, window, G, D):
        super().__init__(max(1, window - 1), G, D)


class Hoarder:
    """Keeps everything, and looks at the window."""

    def __init__(self, window, G, D):
        self.window, self.k, self.v = window, torch.empty(G, 0, D), torch.empty(G, 0, D)

    def step(self, q, k, v):
        self.k, self.v = torch.cat([self.k, k[:, None]], 1), torch.cat([self.v, v[:, None]], 1)
        return attention(q[None], self.k[:, -self.window :], self.v[:, -self.window :]).view(q.shape)


def one_after_the_other(work, weight_count, per_token, peak, bandwidth, itemsize=2):
    read = itemsize * weight_count + per_token * sum(context for _, context in work)
    return 2 * sum(count for count, _ in work) * weight_count / peak + bool(work) * read / bandwidth


WRONG = {
    "largest_batch": [
        lambda memory, weights, per_token, max_len: (memory - weights) // (per_token * max_len),  # less than none
        lambda memory, weights, per_token, max_len: max(0, int((memory - weights) / (per_token * max_len))),
        lambda memory, weights, per_token, max_len: memory // (weights + per_token * max_len),  # weights for each
    ],
    "step_seconds": [
        one_after_the_other,
        lambda work, *rest, **more: step_seconds(work or [(0, 0)], *rest, **more),
        lambda work, *rest, **more: step_seconds([(1, c) for n, c in work for _ in range(n)], *rest, **more),
    ],
    "KVCache": [Careless, Growing, Forgetful],
    "WindowCache": [Unwritten, OneShort, Hoarder],
}
