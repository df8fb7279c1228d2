"""Chapter 2: solutions of its exercises, and wrong ones that their tests must find. Run in the chapter's namespace."""

# ruff: noqa: F821

from collections import deque
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


def largest_batch(memory, weights, per_token, max_len):
    return max(0, memory - weights) // (per_token * max_len)


def with_an_if(memory, weights, per_token, max_len):
    if memory <= weights:
        return 0
    sequences, _ = divmod(memory - weights, max_len * per_token)
    return sequences


def with_fractions(memory, weights, per_token, max_len):
    return max(int(Fraction(memory - weights, per_token * max_len)), 0)


def by_halving(memory, weights, per_token, max_len):
    low, high = 0, max(memory, 1)
    while low < high:
        middle = (low + high + 1) // 2
        if weights + middle * per_token * max_len <= memory:
            low = middle
        else:
            high = middle - 1
    return low


def step_seconds(work, weight_count, per_token, peak, bandwidth, itemsize=2):
    if not work:
        return 0.0
    computed = sum(count for count, _ in work)
    read = itemsize * weight_count + per_token * sum(context for _, context in work)
    return max(2 * computed * weight_count / peak, read / bandwidth)


def with_loops(work, weight_count, per_token, peak, bandwidth, itemsize=2):
    arithmetic = reading = 0
    for count, context in work:
        arithmetic += 2 * count * weight_count / peak
        reading += context * per_token / bandwidth
    if len(work) > 0:
        reading += weight_count * itemsize / bandwidth
    return arithmetic if arithmetic > reading else reading


def with_numpy(work, weight_count, per_token, peak, bandwidth, itemsize=2):
    computed, contexts = np.array(work, dtype=np.float64).reshape(-1, 2).sum(0)
    times = np.array([2 * computed * weight_count, itemsize * weight_count + contexts * per_token])
    return (times / [peak, bandwidth]).max() * bool(work)


def with_zip(work, weight_count, per_token, peak, bandwidth, itemsize=2):
    if len(work) == 0:
        return 0
    tokens, contexts = zip(*work, strict=True)
    flop, moved = 2 * weight_count * sum(tokens), weight_count * itemsize + per_token * sum(contexts)
    return flop / peak if flop / moved > peak / bandwidth else moved / bandwidth


def consuming(work, weight_count, per_token, peak, bandwidth, itemsize=2):
    computed = contexts = 0
    seconds = step_seconds(work, weight_count, per_token, peak, bandwidth, itemsize)
    while work:
        count, context = work.pop()
        computed, contexts = computed + count, contexts + context
    return seconds


def sorting(work, *rest, **more):
    work.sort(reverse=True)
    return step_seconds(work, *rest, **more)


def bytes_compute(work, weight_count, per_token, peak, bandwidth, itemsize=2):
    """Operations for each byte of a weight, instead of for each weight."""
    return step_seconds(work, weight_count, per_token, peak * 2 / itemsize, bandwidth, itemsize)


def one_after_the_other(work, weight_count, per_token, peak, bandwidth, itemsize=2):
    read = itemsize * weight_count + per_token * sum(context for _, context in work)
    return 2 * sum(count for count, _ in work) * weight_count / peak + bool(work) * read / bandwidth


def each_by_itself(work, weight_count, per_token, peak, bandwidth, itemsize=2):
    times = [2 * count * weight_count / peak for count, _ in work]
    weights = itemsize * weight_count / bandwidth if work else 0.0
    pairs = zip(times, work, strict=True)
    return max(weights, sum(max(time, per_token * context / bandwidth) for time, (_, context) in pairs))


def itemsize_of_the_cache_too(work, weight_count, per_token, peak, bandwidth, itemsize=2):
    return step_seconds(work, weight_count, per_token * itemsize / 2, peak, bandwidth, itemsize)


class KVCache:
    def __init__(self, L, G, max_len, D):
        self.memory = torch.empty(2, L, G, max_len, D)
        self.count = 0

    def __len__(self):
        return self.count

    def append(self, k, v):
        end = self.count + k.shape[2]
        if end > self.memory.shape[3]:
            raise ValueError(f"{end} tokens do not fit into {self.memory.shape[3]}")
        self.memory[0, :, :, self.count : end] = k
        self.memory[1, :, :, self.count : end] = v
        self.count = end

    def read(self, layer):
        return self.memory[0, layer, :, : self.count], self.memory[1, layer, :, : self.count]

    def truncate(self, n):
        if not 0 <= n <= self.count:
            raise ValueError(f"can't keep {n} of {self.count} tokens")
        self.count = n


class TwoTensors:
    """Keys and values apart, in slots; the count is a tensor."""

    __slots__ = ("k", "v", "n", "room")

    def __init__(self, L, G, max_len, D):
        self.k, self.v = torch.zeros(L, G, max_len, D), torch.zeros(L, G, max_len, D)
        self.n, self.room = torch.tensor(0), max_len

    def __len__(self):
        return self.n.item()

    def append(self, k, v):
        T = k.size(2)
        if len(self) + T > self.room:
            raise ValueError("full")
        self.k.narrow(2, len(self), T).copy_(k)
        self.v.narrow(2, len(self), T).copy_(v)
        self.n += T

    def read(self, layer):
        return self.k[layer].narrow(1, 0, len(self)), self.v[layer].narrow(1, 0, len(self))

    def truncate(self, n):
        if n < 0 or n > len(self):
            raise ValueError("no such length")
        self.n.fill_(n)


class ByLayer:
    """A dict of a pair for each layer, token by token; as it is in transformers."""

    def __init__(self, L, G, max_len, D):
        self.layers = {i: {"k": torch.full((G, max_len, D), torch.nan), "v": torch.full((G, max_len, D), torch.nan)}
                       for i in range(L)}  # fmt: skip
        self.positions, self.max_len = range(0), max_len

    def __len__(self):
        return len(self.positions)

    def append(self, k, v):
        new = range(len(self), len(self) + k.shape[2])
        if new.stop > self.max_len:
            raise ValueError(new)
        for layer, both in self.layers.items():
            for i, at in enumerate(new):
                both["k"][:, at], both["v"][:, at] = k[layer, :, i], v[layer, :, i]
        self.positions = range(new.stop)

    def read(self, layer):
        return tuple(self.layers[layer][name][:, : len(self)] for name in "kv")

    def truncate(self, n):
        if n not in range(len(self) + 1):
            raise ValueError(n)
        self.positions = range(n)


class AsAModule(torch.nn.Module):
    def __init__(self, L, G, max_len, D):
        super().__init__()
        self.register_buffer("kv", torch.zeros(L, max_len, 2, G, D))  # tokens before heads
        self.end = 0

    def __len__(self):
        return self.end

    def append(self, k, v):
        if k.shape[2] > self.kv.shape[1] - self.end:
            raise ValueError
        rows = torch.stack([k, v], 1)  # [L, 2, G, T, D]
        self.kv[:, self.end : self.end + k.shape[2]] = rearrange(rows, "l two g t d -> l t two g d")
        self.end += k.shape[2]

    def read(self, layer):
        return self.kv[layer, : self.end].permute(1, 2, 0, 3)

    def truncate(self, n):
        if not (0 <= n <= self.end):
            raise ValueError
        self.end = n


class OverNumPy(KVCache):
    """NumPy's memory, seen as tensors."""

    def __init__(self, L, G, max_len, D):
        self.array, self.count = np.zeros((2, L, G, max_len, D), np.float32), 0

    def append(self, k, v):
        if self.count + k.shape[2] > self.array.shape[3]:
            raise ValueError
        self.array[:, :, :, self.count : self.count + k.shape[2]] = np.stack([k.numpy(), v.numpy()])
        self.count += k.shape[2]

    def read(self, layer):
        return (torch.from_numpy(part[layer, :, : self.count]) for part in self.array)


@dataclass
class Sizes:
    L: int
    G: int
    max_len: int
    D: int


class WithARecord(KVCache):
    """Lists of tensors, beside a dataclass."""

    def __init__(self, L, G, max_len, D):
        self.sizes, self.count = Sizes(L, G, max_len, D), 0
        self.memory = [(torch.empty(G, max_len, D), torch.empty(G, max_len, D)) for _ in range(L)]

    def append(self, k, v):
        if self.count + k.shape[2] > self.sizes.max_len:
            raise ValueError
        for (keys, values), new_k, new_v in zip(self.memory, k, v, strict=True):
            keys[:, self.count : self.count + k.shape[2]] = new_k
            values[:, self.count : self.count + k.shape[2]] = new_v
        self.count += k.shape[2]

    def read(self, layer):
        return [part[:, : self.count] for part in self.memory[layer]]


class Careless(KVCache):
    """Finds out that there is no room when the number is changed already."""

    def append(self, k, v):
        self.count += k.shape[2]
        if self.count > self.memory.shape[3]:
            raise ValueError
        self.memory[:, :, :, self.count - k.shape[2] : self.count] = torch.stack([k, v])


class Growing(KVCache):
    """A new tensor at each append."""

    def append(self, k, v):
        super().append(k, v)
        self.memory = self.memory.clone()


class ByConcatenation(KVCache):
    def __init__(self, L, G, max_len, D):
        self.k, self.v, self.max_len = torch.empty(L, G, 0, D), torch.empty(L, G, 0, D), max_len

    def __len__(self):
        return self.k.shape[2]

    def append(self, k, v):
        if len(self) + k.shape[2] > self.max_len:
            raise ValueError
        self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)

    def read(self, layer):
        return self.k[layer], self.v[layer]

    def truncate(self, n):
        if not 0 <= n <= len(self):
            raise ValueError
        self.k, self.v = self.k[:, :, :n], self.v[:, :, :n]


class Copying(KVCache):
    def read(self, layer):
        keys, values = super().read(layer)
        return keys.clone(), values.clone()


class Forgetful(KVCache):
    """truncate(n) forgets n tokens."""

    def truncate(self, n):
        super().truncate(self.count - n)


class TheClasss(KVCache):
    """Its memory belongs to the class: all caches share it."""

    shared = {}

    def __init__(self, L, G, max_len, D):
        self.memory = self.shared.setdefault((L, G, max_len, D), torch.empty(2, L, G, max_len, D))
        self.count = 0


class Roomy(KVCache):
    """Takes twice the room, in case."""

    def __init__(self, L, G, max_len, D):
        super().__init__(L, G, max_len, D)
        self.memory = torch.empty(2, L, G, 2 * max_len + 64, D)[:, :, :, :max_len]


class OneMorePlace(KVCache):
    def __init__(self, L, G, max_len, D):
        super().__init__(L, G, max_len + 1, D)
        self.max_len = max_len

    def append(self, k, v):
        if self.count + k.shape[2] > self.max_len:
            raise ValueError
        super().append(k, v)


class AtFirstUse(OneMorePlace):
    """Takes its memory when the first token comes."""

    def __init__(self, *sizes):
        self.sizes, self.count, self.max_len = sizes, 0, sizes[2]
        self.memory = torch.empty(2, sizes[0], sizes[1], 0, sizes[3])

    def append(self, k, v):
        if self.memory.shape[3] == 0:
            L, G, max_len, D = self.sizes
            self.memory = torch.empty(2, L, G, max_len, D)
        super().append(k, v)


class Hoarding(KVCache):
    """Keeps what it was given, too."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.log = []

    def append(self, k, v):
        super().append(k, v)
        self.log.append((k, v))


class Zeroing(KVCache):
    """Cleans up after itself, which takes time."""

    def truncate(self, n):
        super().truncate(n)
        self.memory[:, :, :, n:] = 0


class Poisoning(KVCache):
    def truncate(self, n):
        super().truncate(n)
        self.memory[:, :, :, n:] = torch.nan


class ZeroingFirst(KVCache):
    """Everything behind the new tokens is made zero at each append."""

    def append(self, k, v):
        super().append(k, v)
        self.memory[:, :, :, self.count :] = 0


class Clamping(KVCache):
    def truncate(self, n):
        self.count = max(0, min(n, self.count))


class Cutting(KVCache):
    """Takes as many as fit, and then complains."""

    def append(self, k, v):
        room = self.memory.shape[3] - self.count
        super().append(k[:, :, :room], v[:, :, :room])
        if k.shape[2] > room:
            raise ValueError


class Asserting(KVCache):
    def append(self, k, v):
        assert self.count + k.shape[2] <= self.memory.shape[3]
        super().append(k, v)


class ValuesForKeys(KVCache):
    def read(self, layer):
        keys, values = super().read(layer)
        return values, keys


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


class ByPosition:
    """Remembers which position lies at each place, and masks what is too old or not there; in a dict."""

    def __init__(self, window, G, D):
        self.window, self.now = window, 0
        self.state = {"k": torch.zeros(window, G, D), "v": torch.zeros(window, G, D)}
        self.state["position"] = torch.full((window,), -(10**9))

    def step(self, q, k, v):
        at = self.now % self.window
        self.state["k"][at], self.state["v"][at], self.state["position"][at] = k, v, self.now
        r = len(q) // len(k)
        keys, values = (self.state[name].repeat_interleave(r, 1) for name in "kv")  # [window, H, D]
        scores = einsum(q, keys, "h d, w h d -> h w") / q.shape[-1] ** 0.5
        scores[:, self.state["position"] <= self.now - self.window] = -torch.inf
        self.now += 1
        return einsum(softmax(scores, -1), values, "h w, w h d -> h d")


class AQueue:
    """Keeps the tensors themselves, as pairs."""

    __slots__ = ("last",)

    def __init__(self, window, G, D):
        self.last = deque(maxlen=window)

    def step(self, q, k, v):
        self.last.append((k, v))
        keys, values = (torch.stack(part, 1) for part in zip(*self.last, strict=True))  # [G, n, D]
        return attention(q[None], keys, values).view(q.shape)


class RolledModule(torch.nn.Module):
    """The oldest goes out at the left; a module with buffers, head by head."""

    def __init__(self, window, G, D):
        super().__init__()
        self.register_buffer("keys", torch.zeros(window, G, D))
        self.register_buffer("values", torch.zeros(window, G, D))
        self.seen = 0

    def step(self, q, k, v):
        self.keys, self.values = self.keys.roll(-1, 0), self.values.roll(-1, 0)
        self.keys[-1], self.values[-1] = k, v
        self.seen = min(self.seen + 1, len(self.keys))
        answers = []
        for h in range(len(q)):
            g = h // (len(q) // len(k))
            weights = (self.keys[-self.seen :, g] @ q[h] / len(q[h]) ** 0.5).softmax(0)
            answers.append(weights @ self.values[-self.seen :, g])
        return torch.stack(answers)


class ATuple:
    """A new tuple of new tensors each time."""

    def __init__(self, window, G, D):
        self.kept, self.window = (torch.empty(G, 0, D),) * 2, window

    def step(self, q, k, v):
        self.kept = tuple(
            torch.cat([old[:, -self.window + 1 :] if self.window > 1 else old[:, :0], new[:, None]], 1)
            for old, new in zip(self.kept, (k, v), strict=True)
        )
        return attention(q[None], *self.kept)[0].view(q.shape)


class InNumPy:
    def __init__(self, window, G, D):
        self.k, self.v = np.zeros((window, G, D), np.float32), np.zeros((window, G, D), np.float32)
        self.t = 0

    def step(self, q, k, v):
        self.k[self.t % len(self.k)], self.v[self.t % len(self.k)] = k.numpy(), v.numpy()
        self.t += 1
        n, r = min(self.t, len(self.k)), len(q) // len(k)
        keys, values = np.repeat(self.k[:n], r, 1), np.repeat(self.v[:n], r, 1)
        scores = np.einsum("hd,nhd->hn", q.numpy(), keys) / np.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        return torch.from_numpy(np.einsum("hn,nhd->hd", weights, values)).float()


class Unwritten(WindowCache):
    """Reads the whole ring, also what was not written yet."""

    def __init__(self, window, G, D):
        self.kv, self.count = torch.zeros(2, G, window, D), window * 10**6


class OneShort(WindowCache):
    """Looks back at one token less."""

    def __init__(self, window, G, D):
        super().__init__(max(1, window - 1), G, D)


class OneMore(WindowCache):
    def __init__(self, window, G, D):
        super().__init__(window + 1, G, D)


class Hoarder:
    """Keeps everything, and looks at the window."""

    def __init__(self, window, G, D):
        self.window, self.k, self.v = window, torch.empty(G, 0, D), torch.empty(G, 0, D)

    def step(self, q, k, v):
        self.k, self.v = torch.cat([self.k, k[:, None]], 1), torch.cat([self.v, v[:, None]], 1)
        return attention(q[None], self.k[:, -self.window :], self.v[:, -self.window :]).view(q.shape)


class BehindASlice:
    """Grows for ever; only a slice of it is to be seen."""

    def __init__(self, window, G, D):
        self.window, self.kv = window, torch.empty(2, G, 0, D)

    def step(self, q, k, v):
        whole = self.kv if self.kv._base is None else self.kv._base
        whole = torch.cat([whole, torch.stack([k, v])[:, :, None]], 2)
        self.kv = whole[:, :, -self.window :]
        return attention(q[None], *self.kv).view(q.shape)


class InALog(AQueue):
    """The same, but nothing is ever dropped."""

    __slots__ = ("window",)

    def __init__(self, window, G, D):
        self.last, self.window = [], window

    def step(self, q, k, v):
        self.last.append((k, v))
        keys, values = (torch.stack(part, 1) for part in zip(*self.last[-self.window :], strict=True))
        return attention(q[None], keys, values).view(q.shape)


class Closed:
    """A log in a function's closure."""

    def __init__(self, window, G, D):
        log = []

        def step(q, k, v):
            log.append((k, v))
            keys, values = (torch.stack(part, 1) for part in zip(*log[-window:], strict=True))
            return attention(q[None], keys, values).view(q.shape)

        self.do = step

    def step(self, q, k, v):
        return self.do(q, k, v)


class OfTheClass(WindowCache):
    """All rings are one."""

    rings = {}

    def __init__(self, window, G, D):
        self.kv, self.count = self.rings.setdefault((window, G, D), torch.empty(2, G, window, D)), 0


class TakesTurns(WindowCache):
    """Query head h reads key/value head h modulo G."""

    def step(self, q, k, v):
        r = len(q) // len(k)
        q = rearrange(q, "(r g) d -> (g r) d", r=r)
        return rearrange(super().step(q, k, v), "(g r) d -> (r g) d", r=r)


class Unscaled(WindowCache):
    def step(self, q, k, v):
        return super().step(q * q.shape[-1] ** 0.5, k, v)


class WritesIntoItsKeys(WindowCache):
    def step(self, q, k, v):
        return super().step(q, k.mul_(1), v.add_(1).sub_(1).zero_())


class BlindToItself(WindowCache):
    """Reads before it writes."""

    def step(self, q, k, v):
        answer = super().step(q, k, v)
        self.count -= 1
        if self.count:
            keys, values = self.kv[:, :, : min(self.count, self.kv.shape[2])]
            answer = attention(q[None], keys, values).view(q.shape)
        self.count += 1
        return answer


def wrong_step(**changes):
    return lambda work, *rest, **more: step_seconds(work, *rest, **more | changes)


RIGHT = {
    "largest_batch": [largest_batch, with_an_if, with_fractions, by_halving],
    "step_seconds": [step_seconds, with_loops, with_numpy, with_zip],
    "KVCache": [KVCache, TwoTensors, ByLayer, AsAModule, OverNumPy, WithARecord],
    "WindowCache": [WindowCache, ByPosition, AQueue, RolledModule, ATuple, InNumPy],
}
WRONG = {
    "largest_batch": [
        lambda memory, weights, per_token, max_len: (memory - weights) // (per_token * max_len),  # less than none
        lambda memory, weights, per_token, max_len: max(0, int((memory - weights) / (per_token * max_len))),
        lambda memory, weights, per_token, max_len: memory // (weights + per_token * max_len),  # weights for each
        lambda memory, weights, per_token, max_len: max(0, memory - weights) // per_token,  # tokens
        lambda memory, weights, per_token, max_len: max(0, -(-(memory - weights) // (per_token * max_len))),  # up
        lambda memory, weights, per_token, max_len: max(1, (memory - weights) // (per_token * max_len)),
        lambda memory, weights, per_token, max_len: float(largest_batch(memory, weights, per_token, max_len)),
        lambda memory, weights, per_token, max_len: 7,
    ],
    "step_seconds": [
        one_after_the_other, consuming, sorting, bytes_compute, each_by_itself, itemsize_of_the_cache_too,
        lambda work, *rest, **more: step_seconds(work or [(0, 0)], *rest, **more),
        lambda work, *rest, **more: step_seconds([(1, c) for n, c in work for _ in range(n)], *rest, **more),
        lambda work, *rest, **more: step_seconds([(1, c) for _, c in work], *rest, **more),  # decode only
        lambda work, *rest, **more: step_seconds([(n, c - n) for n, c in work], *rest, **more),
        wrong_step(itemsize=2),
        lambda work, *rest, **more: step_seconds(work, *rest, **more) / 2,
    ],
    "KVCache": [
        Careless, Growing, ByConcatenation, Copying, Forgetful, TheClasss, Roomy, Hoarding, Zeroing, Poisoning,
        ZeroingFirst, Clamping, Cutting, Asserting, ValuesForKeys, OneMorePlace, AtFirstUse,
    ],
    "WindowCache": [
        Unwritten, OneShort, OneMore, Hoarder, BehindASlice, InALog, Closed, OfTheClass, TakesTurns, Unscaled,
        WritesIntoItsKeys, BlindToItself,
    ],
}  # fmt: skip
