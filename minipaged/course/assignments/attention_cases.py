"""What assignment 1 is tried with: cases from small to large, simpler ones of each, and what they are in words.

All numbers of small cases are eighths, so that every dtype holds them exactly.
"""

import math
import random
from collections.abc import Iterator
from typing import Any

import torch

from minipaged.course.assignment import Case
from minipaged.course.checking import without
from minipaged.course.inside.drive_attention import packed
from minipaged.models.config import ModelConfig
from minipaged.models.llama import Llama

HALVES = ("float16", "bfloat16")


def numbers(rng: random.Random, *shape: int, factor: float = 1.0) -> Any:
    """Nested lists of eighths from -2 to 2, times factor."""
    if not shape:
        return rng.randrange(-16, 17) / 8 * factor
    return [numbers(rng, *shape[1:], factor=factor) for _ in range(shape[0])]


def norm_cases(rng: random.Random) -> Iterator[Case]:
    for size in range(1, 200):
        rows, width = rng.randrange(1, 2 + size // 4), rng.choice([1, 2, 4, 6])
        dtype = rng.choice(HALVES) if size > 12 and size % 3 == 0 else "float32"
        if size % 3 == 2:
            factor = (1.0, 16.0, 100.0)[min(size // 9, 2)]
            yield {"function": "silu_and_mul", "x": numbers(rng, rows, 2 * width, factor=factor), "dtype": dtype}
            continue
        factor = rng.choice([400.0, 1 / 512]) if dtype == "float16" else rng.choice([1.0, 1.0, 1 / 64])
        shape = (rows, 2, width) if size % 5 == 0 else (rows, width)
        x, weight = numbers(rng, *shape, factor=factor), numbers(rng, width)
        eps = rng.choice([1e-6, 1e-5, 0.01, 0.5])
        yield {"function": "rms_norm", "x": x, "weight": weight, "eps": eps, "dtype": dtype}


def smaller_norm(case: Case) -> Iterator[Case]:
    yield from (one for one in without(case, "x") if one["x"])
    if case["function"] == "rms_norm" and not isinstance(case["x"][0][0], list) and len(case["weight"]) > 1:
        for at in range(len(case["weight"])):
            yield _columns(case, [at])
    if case["function"] == "silu_and_mul" and (half := len(case["x"][0]) // 2) > 1:
        for at in range(half):
            yield case | {"x": [[row[at], row[half + at]] for row in case["x"]]}
    if case["dtype"] != "float32":
        yield case | {"dtype": "float32"}


def _columns(case: Case, left_out: list[int]) -> Case:
    def cut(row: list[float]) -> list[float]:
        return [number for at, number in enumerate(row) if at not in left_out]

    return case | {"x": [cut(row) for row in case["x"]], "weight": cut(case["weight"])}


def frequency_cases(rng: random.Random) -> Iterator[Case]:
    for size in range(1, 200):
        kind = ("default", "default", "linear", "llama3", "llama3", "yarn", "dynamic")[size % 7]
        rope: dict[str, Any] = {"kind": kind, "theta": rng.choice([100.0, 10000.0, 500000.0])}
        if kind != "default":
            rope["factor"] = rng.choice([2.0, 8.0, 32.0])
        if kind == "llama3":
            low = rng.choice([1.0, 1.0, 2.0])
            rope |= {"low_freq_factor": low, "high_freq_factor": low * rng.choice([2.0, 4.0])}
        if kind in ("llama3", "yarn"):
            rope["original_max_len"] = rng.choice([64, 1024, 8192])
        if kind == "yarn":
            rope["attention_factor"] = 1.25
        head_size = rng.choice([2, 4, 8]) if size < 10 else rng.choice([8, 16, 64])
        positions = [rng.choice([0, 1, 2, 7, 300, 2049, 4001][: 2 + size // 2]) for _ in range(1 + size // 4)]
        yield {"rope": rope, "head_size": head_size, "positions": positions}


def smaller_frequencies(case: Case) -> Iterator[Case]:
    yield from (one for one in without(case, "positions") if one["positions"])
    if case["head_size"] > 2:
        yield case | {"head_size": case["head_size"] // 2}


def turning_cases(rng: random.Random) -> Iterator[Case]:
    for size in range(1, 200):
        rows, heads, half = rng.randrange(1, 2 + size // 3), rng.randrange(1, 4), rng.choice([1, 2, 4])
        dtype = rng.choice(HALVES) if size % 4 == 0 else "float32"
        yield {"x": numbers(rng, rows, heads, 2 * half), "angles": numbers(rng, rows, half), "dtype": dtype}


def smaller_turning(case: Case) -> Iterator[Case]:
    x, angles = case["x"], case["angles"]
    if len(x) > 1:
        for at in range(len(x)):
            yield case | {"x": x[:at] + x[at + 1 :], "angles": angles[:at] + angles[at + 1 :]}
    if len(x[0]) > 1:
        for at in range(len(x[0])):
            yield case | {"x": [heads[:at] + heads[at + 1 :] for heads in x]}
    if (half := len(angles[0])) > 2:
        kept = [*range(half // 2), *range(half, half + half // 2)]
        shorter = [[[head[i] for i in kept] for head in heads] for heads in x]
        yield case | {"x": shorter, "angles": [row[: half // 2] for row in angles]}


def attention_cases(rng: random.Random) -> Iterator[Case]:
    for size in range(1, 200):
        context = rng.randrange(1, 2 + size // 2)
        count = rng.choice([1, context, rng.randrange(1, context + 1)])
        kv_heads = rng.choice([1, 2, 3]) if size > 3 else 1
        heads, width = kv_heads * rng.choice([1, 2, 3]) if size > 6 else kv_heads, rng.choice([1, 2, 4])
        dtype, factor, scale = "float32", 1.0, rng.choice([1.0, 0.5, width**-0.5])
        if size % 6 == 0:  # exp of such scores is no number of fp32
            scale = 64.0
        elif size % 6 == 3:
            dtype = rng.choice(HALVES)
            factor, scale = (128.0, 2**-12) if dtype == "float16" else (1.0, scale)  # a sum in fp16 is none
        yield {
            "q": numbers(rng, count, heads, width, factor=factor), "keys": numbers(rng, kv_heads, context, width,
            factor=factor), "values": numbers(rng, kv_heads, context, width), "scale": scale, "dtype": dtype,
        }  # fmt: skip


def smaller_attention(case: Case) -> Iterator[Case]:
    q, keys, values = case["q"], case["keys"], case["values"]
    count, context, group = len(q), len(keys[0]), len(q[0]) // len(keys)

    def kept(positions: slice, rows: slice) -> Case:
        rest = {name: [head[positions] for head in case[name]] for name in ("keys", "values")}
        return case | rest | {"q": q[rows]}

    if context > count:
        yield kept(slice(1, None), slice(None))
    if count > 1:
        yield kept(slice(None), slice(1, None))
        yield kept(slice(None, -1), slice(None, -1))
    if len(keys) > 1:
        for g in range(len(keys)):
            rest = {"keys": keys[:g] + keys[g + 1 :], "values": values[:g] + values[g + 1 :]}
            yield case | rest | {"q": [row[: g * group] + row[(g + 1) * group :] for row in q]}
    if group > 1:
        yield case | {"q": [[head for h, head in enumerate(row) if (h + 1) % group] for row in q]}
    if len(keys[0][0]) > 1:
        halved = {name: [[head[: len(head) // 2] for head in row] for row in case[name]]
                  for name in ("q", "keys", "values")}  # fmt: skip
        yield case | halved


def cache_cases(rng: random.Random) -> Iterator[Case]:
    for size in range(1, 200):
        block_size, num_blocks = rng.choice([1, 2, 3, 4]), rng.randrange(1, 3 + size // 4)
        kv_heads, half = rng.choice([1, 2]), rng.choice([1, 2])
        heads = kv_heads * rng.choice([1, 2])
        steps = []
        for _ in range(rng.randrange(1, 2 + size // 6)):
            slots = rng.sample(range(block_size * num_blocks), rng.randrange(1, 1 + block_size * num_blocks))
            if size > 4:
                slots = [slot if rng.random() > 0.2 else -1 for slot in slots]
            count, width = len(slots), 2 * half
            q, k, v = (numbers(rng, count, n, width) for n in (heads, kv_heads, kv_heads))
            steps.append({"slots": slots, "q": q, "k": k, "v": v, "angles": numbers(rng, count, half)})
        yield {"turn": size % 3 != 0, "dtype": "float32" if size % 5 else "bfloat16", "block_size": block_size,
               "num_blocks": num_blocks, "kv_heads": kv_heads, "head_size": 2 * half, "steps": steps}  # fmt: skip


def smaller_cache(case: Case) -> Iterator[Case]:
    yield from (one for one in without(case, "steps") if one["steps"])
    for at, step in enumerate(case["steps"]):
        if len(step["slots"]) > 1:
            for token in range(len(step["slots"])):
                less = {name: rows[:token] + rows[token + 1 :] for name, rows in step.items()}
                yield case | {"steps": [*case["steps"][:at], less, *case["steps"][at + 1 :]]}


def _config(rng: random.Random, layers: int) -> dict[str, Any]:
    kind = rng.choice(["llama", "llama", "qwen2", "qwen3"])
    kv_heads = rng.choice([1, 2])
    return {
        "model_type": kind, "vocab_size": 11, "hidden_size": rng.choice([4, 12]), "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads, "num_attention_heads": kv_heads * rng.choice([1, 2]),
        "head_dim": rng.choice([2, 4, 8]), "intermediate_size": 6, "max_position_embeddings": 64,
        "rms_norm_eps": rng.choice([1e-5, 0.1]), "rope_theta": 100.0, "sliding_window": None,
        "tie_word_embeddings": rng.random() < 0.5, "attention_bias": kind == "llama" and rng.random() < 0.5,
    }  # fmt: skip


def _weights(rng: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    shapes = Llama.tensor_shapes(ModelConfig.from_hf(config))
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: packed(one / math.sqrt(one.shape[-1]) if one.dim() > 1 else one) for name, one in found.items()}


def _script(rng: random.Random, sequences: int, longest: int) -> Case:
    """Steps in which sequences compute some of their tokens each, wherever their blocks lie."""
    block_size = rng.choice([1, 2, 4, 16])
    lengths = [rng.randrange(1, longest + 1) for _ in range(sequences)]
    each = [-(-length // block_size) for length in lengths]
    blocks = rng.sample(range(sum(each) + 2), sum(each))
    done, tables, steps = [0] * sequences, [[blocks.pop() for _ in range(n)] for n in each], []
    while any(a < b for a, b in zip(done, lengths, strict=True)):
        step = []
        for s in rng.sample(range(sequences), sequences):
            if (left := lengths[s] - done[s]) and rng.random() < 0.8:
                count = rng.choice([1, left, rng.randrange(1, left + 1)])
                step.append([s, done[s], count])
                done[s] += count
        steps += [step] if step else []
    return {"block_size": block_size, "num_blocks": sum(each) + 2, "tables": tables, "steps": steps}


def layer_cases(rng: random.Random) -> Iterator[Case]:
    for size in range(1, 200):
        config = _config(rng, 1)
        script = _script(rng, min(size, 1 + size // 3, 4), 1 + size // 2)
        rows = [numbers(rng, script["block_size"] * len(table), config["hidden_size"]) for table in script["tables"]]
        turns = [100.0 ** (-2 * i / config["head_dim"]) for i in range(config["head_dim"] // 2)]
        yield {"config": config, "weights": _weights(rng, config), "dtype": "float32", "frequencies": turns,
               "rows": rows, **script}  # fmt: skip


def model_cases(rng: random.Random) -> Iterator[Case]:
    for size in range(1, 200):
        dtype = "bfloat16" if size % 5 == 0 else "float32"
        config = _config(rng, min(1 + size // 2, 3) if dtype == "float32" else 1)
        script = _script(rng, min(size, 1 + size // 3, 4), 1 + size)
        tokens = [[rng.randrange(11) for _ in range(script["block_size"] * len(one))] for one in script["tables"]]
        yield {"config": config, "weights": _weights(rng, config), "dtype": dtype, "tokens": tokens, **script}


def smaller_steps(case: Case) -> Iterator[Case]:
    """One layer less, one sequence less, one step less, one token less."""
    layers = case["config"]["num_hidden_layers"]
    if layers > 1:
        kept = {name: w for name, w in case["weights"].items() if f".layers.{layers - 1}." not in name}
        yield case | {"weights": kept, "config": case["config"] | {"num_hidden_layers": layers - 1}}
    steps = case["steps"]
    sequences = {s for step in steps for s, _, _ in step}
    if len(sequences) > 1:
        for one in sequences:
            less = [[part for part in step if part[0] != one] for step in steps]
            yield case | {"steps": [step for step in less if step]}
    if len(steps) > 1:
        yield case | {"steps": steps[:-1]}
    for at, (s, start, count) in enumerate(steps[-1]):
        if count > 1:
            shorter = [*steps[-1][:at], [s, start, count - 1], *steps[-1][at + 1 :]]
            yield case | {"steps": [*steps[:-1], shorter]}
