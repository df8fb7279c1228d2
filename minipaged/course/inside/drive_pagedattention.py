"""What assignment 3 is tried with, beside the student's code: random batches, read through page tables.

The numbers of a case are made from its seed, here and by the judge alike. They are whole eighths, so that scores are
exact in fp32, whatever the order of a sum.
"""

import contextlib
import importlib
import os
import sys
import types
import warnings

import torch
from torch.overrides import TorchFunctionMode

KEYS, QUERIES = 4, 8  # in a tile of the Triton kernel: few, so that small contexts have several
FOREIGN = ("torch_attention", "triton_attention", "triton_cache", "torch_backend", "reference")


def alone(name):
    """One file of the package's kernels, and of the others only those that it may use.

    The package's own door is left out: it opens all files, and one that is broken should not break the others.
    """
    if "driver" in sys.modules and not isinstance(sys.modules.get("kernels"), _Package):
        sys.modules["kernels"] = _Package("kernels")
    for other in FOREIGN:
        needed = other == name or (name, other) == ("torch_attention", "reference")
        full = f"kernels.{other}"
        if not needed:
            sys.modules[full] = None  # type: ignore[assignment]  # to import it is an error
        elif sys.modules.get(full, "") is None:
            del sys.modules[full]
    return importlib.import_module(f"kernels.{name}")


class _Package(types.ModuleType):
    def __init__(self, name):
        super().__init__(name)
        self.__path__ = [os.path.join(os.path.dirname(os.path.abspath(__file__)), name)]


def dtype(name):
    return getattr(torch, name)


def eighths(generator, *shape, most=16):
    """Random multiples of 1/8, of -most/8 to most/8."""
    return torch.randint(-most, most + 1, shape, generator=generator) / 8


def empty(case, layers, num_blocks):
    from kernels.cache import new_cache

    shape = layers, num_blocks, case["block_size"], case["kv_heads"], case["size"]
    return new_cache(*shape, dtype(case["kv"]))


def fill(cache, generator):
    """Random numbers everywhere; codes and scales, if it has them."""
    from kernels.cache import codes, is_quantized, scales

    part = codes(cache)
    part.copy_((eighths(generator, *part.shape) * (16 if is_quantized(cache) else 1)).to(cache.dtype))
    if is_quantized(cache):
        one = scales(cache)
        one.copy_(2.0 ** torch.randint(-5, -2, one.shape, generator=generator))
    return cache


def build(case):
    """(q, cache, query_start, context_lens, block_tables, scale) of a case."""
    from kernels.cache import poison

    generator = torch.Generator().manual_seed(case["seed"])
    sequences, block_size = case["sequences"], case["block_size"]
    cache = fill(empty(case, 1, case["num_blocks"]), generator)
    q = eighths(generator, sum(one["new"] for one in sequences), case["heads"], case["size"]) * case["loud"]
    if case["shift"]:  # of all scores: by this much
        q[..., 0], cache[..., 0] = 16, case["shift"] / 16 / case["scale"]
    whole = cache.clone()
    poison(cache)
    width = max(len(one["blocks"]) for one in sequences) + len(case["behind"])
    tables = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, one in zip(tables, sequences, strict=True):
        behind = (case["behind"] or [0]) * width
        row[:] = torch.tensor((one["blocks"] + behind)[:width])
        position = torch.arange(one["context"])
        where = row[position // block_size], position % block_size
        for source, target in _slots(whole, cache):
            target[:, where[0], where[1]] = source[:, where[0], where[1]]
    starts = torch.tensor([0, *(one["new"] for one in sequences)]).cumsum(0)
    contexts = torch.tensor([one["context"] for one in sequences])
    return q.to(dtype(case["dtype"])), cache[0], starts, contexts, tables, case["scale"]


def _slots(whole, cache):
    """Pairs of views [G, N, B, ...] that share their places: numbers; or codes, and scales."""
    from kernels.cache import codes, is_quantized, raw, scales

    pairs = [(raw(codes(whole)), raw(codes(cache)))]
    pairs += [(scales(whole), scales(cache))] if is_quantized(cache) else []
    return [(source[0, part], target[0, part]) for source, target in pairs for part in (0, 1)]


class Watch(TorchFunctionMode):
    """Counts calls of PyTorch that make tensors or views, and the numbers of the largest tensor of floats made."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest, self.names = 0, 0, set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tensors = _tensors(made)
        if tensors and function.__name__ != "__get__":
            self.calls += 1
            self.names.add(function.__name__)
            given = {one.untyped_storage().data_ptr() for one in _tensors([args, kwargs])}
            for one in tensors:
                if one.is_floating_point() and one.untyped_storage().data_ptr() not in given:
                    self.largest = max(self.largest, one.numel())
        return made


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [one for part in value for one in _tensors(part)] if isinstance(value, (list, tuple)) else []


def numbers(tensor):
    """As lists, and what it is: shape and dtype."""
    return {"is": str(tensor.dtype).removeprefix("torch."), "numbers": tensor.float().tolist()}


def content(cache):
    from kernels.cache import raw

    return raw(cache).tolist()


def write(case):
    reference = alone("reference")
    k, v, cache, slots = to_write(case)
    reference.write_kv(k, v, cache, slots)
    return content(cache)


def to_write(case):
    generator = torch.Generator().manual_seed(case["seed"])
    cache = fill(empty(case, 1, case["num_blocks"]), generator)[0]
    k, v = eighths(generator, 2, len(case["slots"]), case["kv_heads"], case["size"], most=100)
    return k, v, cache, torch.tensor(case["slots"], dtype=torch.long)


def move(case):
    reference = alone("reference")
    caches, pairs = to_move(case)
    reference.move_blocks(*caches, *pairs) if len(caches) == 2 else reference.copy_blocks(*caches, *pairs)
    return [content(cache) for cache in caches]


def to_move(case):
    generator = torch.Generator().manual_seed(case["seed"])
    caches = [fill(empty(case, case["layers"], count), generator) for count in case["pools"]]
    return caches, torch.tensor(case["pairs"], dtype=torch.long).reshape(-1, 2).unbind(1)


def attention(case):
    return numbers(alone("reference").paged_attention(*build(case)))


def by_blocks(case):
    reference = alone("reference")
    given = build(case)
    with Watch() as watch:
        out = reference.paged_attention_by_blocks(*given)
    return numbers(out) | {"largest": watch.largest}


def together(case):
    """The answer for all sequences; and how many calls it takes, for the first two of them and for all."""
    attention = alone("torch_attention")
    calls = []
    for some in [case["sequences"][:2], case["sequences"]]:
        q, cache, *where, scale = build(case | {"sequences": some})
        plan = attention.AttentionPlan(*where, q.shape[1], cache)
        with Watch() as watch:
            out = attention.paged_attention(q, cache, plan, scale)
        calls.append(watch.calls)
    return numbers(out) | {"calls": calls}


def in_triton(case):
    alone("triton_attention")
    given = build(case)
    if case["far"]:
        given = (given[0], far(given[1]), *given[2:])
    with poisoned(), warnings.catch_warnings(), Watch() as watch:
        warnings.simplefilter("ignore")  # NumPy's, about NaN where it should be
        roomy = torch.full((*given[0].shape[:2], case["size"] + 2), torch.nan, dtype=given[0].dtype)
        try:
            out = run_triton(case, roomy[..., : case["size"]], *given)
        except Exception as error:
            raise innermost(error) from None
    kept = bool(roomy[..., case["size"] :].isnan().all())
    return numbers(out) | {"names": sorted(watch.names), "kept": kept}


def innermost(error):
    """What was raised inside a kernel: Triton's interpreter wraps it, once for each function that it leaves."""
    while type(error).__name__ == "InterpreterError" and error.__cause__ is not None:
        error = error.__cause__
    return error


def run_triton(case, out, q, cache, starts, contexts, tables, scale):
    module = alone("triton_attention")
    tiles = importlib.import_module("kernels.triton_tiles").Tiles
    rows = importlib.import_module("kernels.triton_tiles").power_of_2(QUERIES * case["heads"] // case["kv_heads"])
    module.choose_tiles = lambda *args: tiles(1 if args[3] else QUERIES, rows, KEYS, num_warps=4, num_stages=1)
    whole = [x.to(torch.int32) for x in (starts, contexts, tables)]
    most = [int(starts.diff().max()), int(contexts.max())]
    return module.paged_attention(q, cache, *whole, scale, *most, num_splits=case["splits"], out=out)


@contextlib.contextmanager
def poisoned():
    """New memory is full of NaN."""
    new = torch.empty

    def filled(*shape, **kwargs):
        made = new(*shape, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    torch.empty = filled
    try:
        yield
    finally:
        torch.empty = new


def far(cache):
    """The same cache of bytes with its blocks far apart: the last lies more than 2^31 numbers behind the first."""
    _, kv_heads, num_blocks, block_size, size = cache.shape
    apart = 2**31 // (num_blocks - 1) + 4096
    pool = torch.empty(apart * (num_blocks - 1) + cache.numel(), dtype=torch.int8)
    block = block_size * size
    strides = kv_heads * block, block, apart - apart % 4, size, 1
    return pool.as_strided(cache.shape, strides).copy_(cache)
