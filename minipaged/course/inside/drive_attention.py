"""What assignment 1 is tried with, beside the student's code; and, outside, beside the reference's.

Tensors travel as {"dtype", "shape", "numbers": fp32, base64}; what comes from a case may be lists of numbers, too.
"""

import base64

import numpy
import torch


def packed(tensor):
    """A tensor as plain data. TypeError if it is none."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"a {type(tensor).__name__} where a tensor should be")
    numbers = tensor.detach().float().contiguous().numpy().astype("<f4")
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "numbers": base64.b64encode(numbers.tobytes()).decode()}


def unpacked(value, dtype="float32"):
    """A tensor of what a case holds."""
    if isinstance(value, dict):
        array = numpy.frombuffer(base64.b64decode(value["numbers"]), "<f4").reshape(value["shape"])
        tensor = torch.from_numpy(array.copy())
    else:
        tensor = torch.tensor(value, dtype=torch.float32)
    return tensor.to(getattr(torch, dtype))


def and_after(result, **given):
    """A result, and what was given, as it stands now."""
    return {"result": packed(result)} | {name: packed(one) for name, one in given.items()}


def norm(case):
    from kernels import formulas

    x = unpacked(case["x"], case["dtype"])
    if case["function"] == "silu_and_mul":
        return and_after(formulas.silu_and_mul(x), x=x)
    weight = unpacked(case["weight"], case["dtype"])
    return and_after(formulas.rms_norm(x, weight, case["eps"]), x=x, weight=weight)


def frequencies(case):
    from minipaged.models.rope import Rope, RopeConfig, inverse_frequencies

    config = RopeConfig(**case["rope"])
    positions = torch.tensor(case["positions"])
    cos, sin = Rope(config, case["head_size"], torch.device("cpu"))(positions)
    return and_after(inverse_frequencies(config, case["head_size"]), cos=cos, sin=sin, positions=positions)


def turning(case):
    from kernels import formulas

    x, angles = unpacked(case["x"], case["dtype"]), unpacked(case["angles"])
    cos, sin = angles.cos(), angles.sin()
    return and_after(formulas.rope(x, cos, sin), x=x, cos=cos, sin=sin)


def attention(case):
    from kernels import formulas

    q, keys, values = (unpacked(case[name], case["dtype"]) for name in ("q", "keys", "values"))
    return and_after(formulas.attention(q, keys, values, case["scale"]), q=q, keys=keys, values=values)


def cache(case):
    """Every step writes its tokens; then we look at q, and in the end at all slots."""
    from kernels import Batch, TorchBackend

    backend, turned, given = TorchBackend(), [], []
    shape = (2, case["kv_heads"], case["num_blocks"], case["block_size"], case["head_size"])
    layer_cache = torch.full(shape, torch.nan, dtype=getattr(torch, case["dtype"]))
    for step in case["steps"]:
        q, k, v, angles = (unpacked(step[name]) for name in ("q", "k", "v", "angles"))
        count = len(step["slots"])
        batch = Batch(*map(torch.tensor, (step["slots"], [0, count], [count], [[0]])))
        cos, sin = angles.cos(), angles.sin()
        if case["turn"]:
            turned.append(packed(backend.rope_and_write(q, k, v, cos, sin, layer_cache, batch)))
        else:
            backend.write_kv(k, v, layer_cache, batch)
        given.append({"cos": packed(cos), "sin": packed(sin), "slot_mapping": packed(batch.slot_mapping)})
    return {"q": turned, "cache": packed(layer_cache), "given": given}


def batch_of(case, step):
    """positions [T], and the batch, of a step: a list of (sequence, first position, number of tokens)."""
    from kernels import Batch

    size, starts = case["block_size"], [0]
    positions: list[int] = []
    slots: list[int] = []
    contexts: list[int] = []
    for s, start, count in step:
        own = range(start, start + count)
        positions += own
        slots += [case["tables"][s][p // size] * size + p % size for p in own]
        starts.append(starts[-1] + count)
        contexts.append(start + count)
    tables = [case["tables"][s] for s, _, _ in step]
    width = max(map(len, tables))
    padded = [table + [0] * (width - len(table)) for table in tables]
    return torch.tensor(positions), Batch(*map(torch.tensor, (slots, starts, contexts, padded)))


def new_cache(config, case, backend, layers):
    from kernels import new_cache

    sizes = case["num_blocks"], case["block_size"], config.num_kv_heads, config.head_size
    return new_cache(layers, *sizes, backend.dtype).fill_(torch.nan)


def parts(case):
    from kernels import TorchBackend
    from minipaged.models.config import ModelConfig

    weights = {name: unpacked(value, case["dtype"]) for name, value in case["weights"].items()}
    return ModelConfig.from_hf(case["config"]), weights, TorchBackend("cpu", getattr(torch, case["dtype"]))


@torch.inference_mode()
def layer(case):
    """What the layer makes of its rows, and what attention alone does, with a cache of its own."""
    from minipaged.models.llama import LlamaLayer

    config, weights, backend = parts(case)
    one = LlamaLayer(config, 0, weights, backend)
    ours, alone = (new_cache(config, case, backend, 1)[0] for _ in range(2))
    answers: dict = {"rows": [], "attended": [], "given": []}
    for step in case["steps"]:
        positions, batch = batch_of(case, step)
        angles = positions[:, None] * unpacked(case["frequencies"])
        x = torch.cat([unpacked(case["rows"][s][start : start + count]) for s, start, count in step]).to(backend.dtype)
        cos, sin = angles.cos(), angles.sin()
        answers["rows"].append(packed(one(x.clone(), cos, sin, ours, batch)))
        answers["attended"].append(packed(one.attention(x.clone(), cos, sin, alone, batch)))
        answers["given"].append({"cos": packed(cos), "sin": packed(sin), "slot_mapping": packed(batch.slot_mapping)})
    return answers | {"cache": packed(alone)}


@torch.inference_mode()
def model(case):
    """Hidden rows of every step, and the logits of its sequences' last rows."""
    from minipaged.models.llama import Llama

    config, weights, backend = parts(case)
    llama = Llama(config, weights, backend)
    pool = new_cache(config, case, backend, config.num_layers)
    answers: dict = {"hidden": [], "logits": [], "given": []}
    for step in case["steps"]:
        positions, batch = batch_of(case, step)
        ids = [token for s, start, count in step for token in case["tokens"][s][start : start + count]]
        input_ids = torch.tensor(ids)
        hidden = llama(input_ids, positions, pool, batch)
        answers["hidden"].append(packed(hidden))
        answers["logits"].append(packed(llama.logits(hidden[batch.query_start[1:] - 1])))
        answers["given"].append({"input_ids": packed(input_ids), "positions": packed(positions)})
    return answers
