"""Solutions of assignment 1, right and wrong: see course_solutions.py."""

from course_solutions import Wrong

FORMULAS, ROPE, LLAMA = "kernels/formulas.py", "minipaged/models/rope.py", "minipaged/models/llama.py"
BACKEND = "kernels/torch_backend.py"

LIBRARY = {  # what PyTorch has for each; complex numbers; nothing is changed in place
    FORMULAS: """
import torch.nn.functional as F

def rms_norm(x, weight, eps):
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)

def silu_and_mul(x):
    half = x.shape[-1] // 2
    return F.silu(x[..., :half]) * x[..., half:]

def rope(x, cos, sin):
    half = x.shape[-1] // 2
    numbers = torch.complex(x[..., :half].float(), x[..., half:].float())
    turned = numbers * torch.complex(cos, sin)[:, None]
    return torch.cat([turned.real, turned.imag], -1).to(x.dtype)

def attention(q, keys, values, scale):
    t, context = len(q), keys.shape[1]
    mask = torch.ones(t, context, dtype=torch.bool, device=q.device).tril(context - t)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None].float(), keys[None].float(), values[None].float(), mask, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1).to(q.dtype)
""",
    ROPE: """
def inverse_frequencies(rope, head_size):
    exponents = -torch.arange(head_size // 2, dtype=torch.float32) * 2 / head_size
    frequencies = torch.pow(torch.tensor(rope.theta), exponents)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "yarn":
        frequencies = _yarn(rope, frequencies, head_size)
    elif rope.kind == "llama3":
        turns = frequencies * rope.original_max_len / (2 * math.pi)
        slow, fast = turns < rope.low_freq_factor, turns > rope.high_freq_factor
        share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blended = frequencies * (share + (1 - share) / rope.factor)
        frequencies = torch.where(slow, frequencies / rope.factor, torch.where(fast, frequencies, blended))
    return frequencies

class Rope:
    def __call__(self, positions):
        turned = torch.polar(torch.tensor(1.0), torch.outer(positions.float(), self.frequencies))
        return turned.real * self.attention_factor, turned.imag * self.attention_factor
""",
    BACKEND: """
class TorchBackend:
    def write_kv(self, k, v, layer_cache, batch, static=None):
        kept = batch.slot_mapping >= 0
        slots = batch.slot_mapping[kept]
        both = torch.stack((k[kept], v[kept]))
        if is_quantized(layer_cache):
            return self._write_codes(both, layer_cache, slots, static)
        size = layer_cache.shape[3]
        layer_cache[:, :, slots // size, slots % size] = both.transpose(1, 2).to(layer_cache.dtype)

    def rope_and_write(self, q, k, v, cos, sin, layer_cache, batch, static=None):
        both = formulas.rope(torch.cat((q, k), 1), cos, sin)
        q, k = both[:, : q.shape[1]], both[:, q.shape[1] :]
        self.write_kv(k, v, layer_cache, batch, static)
        return q
""",
    LLAMA: """
class LlamaLayer:
    def __call__(self, x, cos, sin, layer_cache, batch):
        normed = self.backend.rms_norm(x, self.attention_norm, self.config.norm_eps)
        x = x + self.out(self.attention(normed, cos, sin, layer_cache, batch).reshape(len(x), -1))
        normed = self.backend.rms_norm(x, self.mlp_norm, self.config.norm_eps)
        return x + self.down(self.backend.silu_and_mul(self.gate_up(normed)))

    def attention(self, x, cos, sin, layer_cache, batch):
        config, d = self.config, self.config.head_size
        qkv = self.qkv(x)
        ends = config.num_heads * d, (config.num_heads + config.num_kv_heads) * d
        q = qkv[:, : ends[0]].unflatten(1, (-1, d))
        k = qkv[:, ends[0] : ends[1]].unflatten(1, (-1, d))
        v = qkv[:, ends[1] :].unflatten(1, (-1, d))
        if config.qk_norm:
            q, k = (self.backend.rms_norm(one, weight, config.norm_eps)
                    for one, weight in ((q, self.q_norm), (k, self.k_norm)))
        q = self.backend.rope_and_write(q, k, v, cos, sin, layer_cache, batch, self.kv_scales)
        return self.backend.paged_attention(q, layer_cache, batch, self.scale)

class Llama:
    def __call__(self, input_ids, positions, cache, batch):
        x, turn = self.embedding[input_ids].to(self.dtype), self.rope(positions)
        for number in range(len(self.layers)):
            x = self.layers[number](x, *turn, cache[number], batch)
        return self.backend.rms_norm(x, self.norm, self.config.norm_eps)

    def logits(self, hidden):
        return self.head(hidden).to(torch.float32)
""",
}

LOOPS = {  # one token, one head, one number at a time, as the formulas say it
    FORMULAS: """
def rms_norm(x, weight, eps):
    out = torch.empty_like(x)
    rows, results = x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1])
    for row, result in zip(rows, results):
        row = row.float()
        root = (row.dot(row) / len(row) + eps).sqrt()
        result.copy_(row / root * weight.float())
    return out

def silu_and_mul(x):
    def silu(z):
        return z / (1 + torch.exp(-z))

    gate, up = x.float().split(x.shape[1] // 2, dim=1)
    return (silu(gate) * up).to(x.dtype)

def rope(x, cos, sin):
    out, half = torch.empty_like(x), x.shape[2] // 2
    for i in range(half):
        for head in range(x.shape[1]):
            a, b = x[:, head, i].float(), x[:, head, i + half].float()
            out[:, head, i] = a * cos[:, i] - b * sin[:, i]
            out[:, head, i + half] = a * sin[:, i] + b * cos[:, i]
    return out

def attention(q, keys, values, scale):
    out = torch.empty_like(q)
    (t, heads, _), (groups, context, _) = q.shape, keys.shape
    for i in range(t):
        seen = context - t + i + 1
        for head in range(heads):
            group = head // (heads // groups)
            scores = keys[group, :seen].float() @ q[i, head].float() * scale
            shares = (scores - scores.max()).exp()
            out[i, head] = (shares / shares.sum()) @ values[group, :seen].float()
    return out
""",
    ROPE: """
def stretched(frequency, rope):
    turns = rope.original_max_len * frequency / (2 * math.pi)
    if turns >= rope.high_freq_factor:
        return frequency
    if turns <= rope.low_freq_factor:
        return frequency / rope.factor
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return share * frequency + (1 - share) * frequency / rope.factor

def inverse_frequencies(rope, head_size):
    found = [rope.theta ** (-2 * i / head_size) for i in range(head_size // 2)]
    if rope.kind == "linear":
        found = [one / rope.factor for one in found]
    if rope.kind == "llama3":
        found = [stretched(one, rope) for one in found]
    frequencies = torch.tensor(found)
    return _yarn(rope, frequencies, head_size) if rope.kind == "yarn" else frequencies

class Rope:
    def __call__(self, positions):
        angles = torch.stack([float(p) * self.frequencies for p in positions])
        return torch.cos(angles) * self.attention_factor, torch.sin(angles) * self.attention_factor
""",
    BACKEND: """
class TorchBackend:
    def write_kv(self, k, v, layer_cache, batch, static=None):
        for token, slot in enumerate(batch.slot_mapping.tolist()):
            if slot < 0:
                continue
            block, offset = divmod(slot, layer_cache.shape[3])
            layer_cache[0, :, block, offset] = k[token]
            layer_cache[1, :, block, offset] = v[token]

    def rope_and_write(self, q, k, v, cos, sin, layer_cache, batch, static=None):
        q = formulas.rope(q, cos, sin)
        k = formulas.rope(k, cos, sin)
        self.write_kv(k, v, layer_cache, batch, static)
        return q
""",
    LLAMA: """
class LlamaLayer:
    def __call__(self, x, cos, sin, layer_cache, batch):
        for name in ("attend", "think"):
            x += getattr(self, name)(x, cos, sin, layer_cache, batch)
        return x

    def attend(self, x, cos, sin, layer_cache, batch):
        x = self.backend.rms_norm(x, self.attention_norm, self.config.norm_eps)
        return self.out(self.attention(x, cos, sin, layer_cache, batch).flatten(1))

    def think(self, x, *rest):
        x = self.backend.rms_norm(x, self.mlp_norm, self.config.norm_eps)
        return self.down(self.backend.silu_and_mul(self.gate_up(x)))

    def attention(self, x, cos, sin, layer_cache, batch):
        h, g, d = self.config.num_heads, self.config.num_kv_heads, self.config.head_size
        heads = list(self.qkv(x).reshape(len(x), h + 2 * g, d).unbind(1))
        q, k, v = (torch.stack(some, 1) for some in (heads[:h], heads[h : h + g], heads[h + g :]))
        if self.config.qk_norm:
            q = self.backend.rms_norm(q, self.q_norm, self.config.norm_eps)
            k = self.backend.rms_norm(k, self.k_norm, self.config.norm_eps)
        q = self.backend.rope_and_write(q, k, v, cos, sin, layer_cache, batch, static=self.kv_scales)
        return self.backend.paged_attention(q, layer_cache, batch, self.scale)

class Llama:
    def __call__(self, input_ids, positions, cache, batch):
        cos, sin = self.rope(positions)
        return self.through(0, self.embedding[input_ids].to(self.dtype), cos, sin, cache, batch)

    def through(self, number, x, cos, sin, cache, batch):
        if number == len(self.layers):
            return self.backend.rms_norm(x, self.norm, self.config.norm_eps)
        x = self.layers[number](x, cos, sin, cache[number], batch)
        return self.through(number + 1, x, cos, sin, cache, batch)

    def logits(self, hidden):
        return torch.cat([self.head(hidden[row : row + 1]) for row in range(len(hidden))]).float()
""",
}

ONLINE = {  # a softmax that meets its keys one by one; constructors that prepare other things; double precision
    FORMULAS: """
def rms_norm(x, weight, eps):
    y = x.double()
    return (y / (y.square().mean(-1, True) + eps) ** 0.5 * weight.double()).to(x.dtype)

def silu_and_mul(x):
    gate, up = x.unflatten(-1, (2, -1)).unbind(-2)
    return gate * torch.sigmoid(gate) * up

def rotate_half(x):
    a, b = x.tensor_split(2, -1)
    return torch.cat([-b, a], -1)

def rope(x, cos, sin):
    cos, sin = (torch.cat([one, one], -1).unsqueeze(1) for one in (cos, sin))
    y = x.to(torch.float32)
    return (y * cos + rotate_half(y) * sin).type_as(x)

def attention(q, keys, values, scale):
    t, heads, d = q.shape
    groups, context, _ = keys.shape
    queries = q.double().view(t, groups, heads // groups, d) * scale
    best = torch.full(queries.shape[:3], -math.inf, dtype=torch.float64)
    total, summed = torch.zeros_like(best), torch.zeros_like(queries)
    own = torch.arange(context - t, context)
    for j in range(context):
        score = torch.einsum("tgrd,gd->tgr", queries, keys[:, j].double())
        score = score.masked_fill((own < j)[:, None, None], -math.inf)
        new = torch.maximum(best, score)
        old, one = (best - new).nan_to_num(0).exp(), (score - new).nan_to_num(-math.inf).exp()
        total = total * old + one
        summed = summed * old[..., None] + one[..., None] * values[:, j].double()[None, :, None]
        best = new
    return (summed / total[..., None]).reshape(t, heads, d).to(q.dtype)
""",
    ROPE: """
def inverse_frequencies(rope, head_size):
    plain = torch.exp(torch.arange(0, head_size, 2).double() * (-math.log(rope.theta) / head_size)).float()
    kinds = {"linear": lambda: plain / rope.factor, "yarn": lambda: _yarn(rope, plain, head_size),
             "llama3": lambda: torch.lerp(plain / rope.factor, plain, share(rope, plain))}
    return kinds.get(rope.kind, lambda: plain)()

def share(rope, frequencies):
    wavelengths = 2 * math.pi / frequencies
    low, high = rope.low_freq_factor, rope.high_freq_factor
    return ((rope.original_max_len / wavelengths - low) / (high - low)).clip(0, 1)

class Rope:
    def __init__(self, config, head_size, device):
        self.by_pair = inverse_frequencies(config, head_size).double()[None].to(device)
        self.longer = config.attention_factor

    def __call__(self, positions):
        angles = positions.unsqueeze(-1).double() * self.by_pair
        return (angles.cos() * self.longer).float(), (angles.sin() * self.longer).float()
""",
    BACKEND: """
class TorchBackend:
    def write_kv(self, k, v, layer_cache, batch, static=None):
        slots = batch.slot_mapping
        tokens = (slots != -1).nonzero().flatten()
        blocks = torch.div(slots[tokens], layer_cache.shape[3], rounding_mode="floor")
        offsets = slots[tokens] - blocks * layer_cache.shape[3]
        for part, new in ((0, k), (1, v)):
            layer_cache[part].permute(1, 2, 0, 3)[blocks, offsets] = new[tokens].to(layer_cache.dtype)

    def rope_and_write(self, q, k, v, cos, sin, layer_cache, batch, static=None):
        self.write_kv(k=formulas.rope(k, cos, sin), v=v, layer_cache=layer_cache, batch=batch, static=static)
        q.copy_(formulas.rope(q, cos, sin))
        return q
""",
    LLAMA: """
def norm_of(backend, weight, eps):
    return lambda x: backend.rms_norm(x, weight, eps)

class LlamaLayer:
    def __call__(self, x, cos, sin, layer_cache, batch):
        first, second = (norm_of(self.backend, weight, self.config.norm_eps)
                         for weight in (self.attention_norm, self.mlp_norm))
        attended = self.attention(first(x), cos, sin, layer_cache, batch)
        x = self.out(attended.flatten(1), add_to=x)
        self.down(self.backend.silu_and_mul(self.gate_up(second(x))), add_to=x)
        return x

    def attention(self, x, cos, sin, layer_cache, batch):
        config = self.config
        h, g = config.num_heads, config.num_kv_heads
        qkv = self.qkv(x).unflatten(1, (h + 2 * g, config.head_size))
        q, k, v = qkv.tensor_split((h, h + g), 1)
        if config.qk_norm:
            q = norm_of(self.backend, self.q_norm, config.norm_eps)(q)
            k = norm_of(self.backend, self.k_norm, config.norm_eps)(k)
        q = self.backend.rope_and_write(q, k, v, cos, sin, layer_cache, batch, self.kv_scales)
        return self.backend.paged_attention(q, layer_cache, batch, self.scale)

class Llama:
    def __call__(self, input_ids, positions, cache, batch):
        last = norm_of(self.backend, self.norm, self.config.norm_eps)
        x = torch.empty(len(input_ids), self.config.hidden_size, dtype=self.dtype, device=positions.device)
        x.copy_(self.embedding[input_ids])
        cos, sin = self.rope(positions)
        for layer, layer_cache in enumerate(cache.unbind(0)):
            x = self.layers[layer](x, cos, sin, layer_cache, batch)
        return last(x)

    def logits(self, hidden):
        return self.head(hidden).type(torch.float)
""",
}

RIGHT = {"PyTorch's own functions": LIBRARY, "plain loops": LOOPS, "one key at a time, in double precision": ONLINE}

NORM_IN_HALF = """
def rms_norm(x, weight, eps):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))
"""
IN_PAIRS = """
def rope(x, cos, sin):
    a, b = x.float()[..., 0::2], x.float()[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)
"""
NO_MAXIMUM = """
def attention(q, keys, values, scale):
    context, group = keys.shape[1], q.shape[1] // len(keys)
    keys, values = (part.float().repeat_interleave(group, 0) for part in (keys, values))
    weights = (scale * torch.einsum("thd,hcd->htc", q.float(), keys)).exp().tril(context - len(q))
    return torch.einsum("htc,hcd->thd", weights / weights.sum(-1, keepdim=True), values).to(q.dtype)
"""
SDPA = """
def attention(q, keys, values, scale):
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None].float(), keys[None].float(), values[None].float(), is_causal={causal}, scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1).to(q.dtype)
"""
BESIDE = """
class LlamaLayer:
    def __call__(self, x, cos, sin, layer_cache, batch):
        backend, eps = self.backend, self.config.norm_eps
        attended = self.attention(backend.rms_norm(x, self.attention_norm, eps), cos, sin, layer_cache, batch)
        gate_up = self.gate_up(backend.rms_norm(x, self.mlp_norm, eps))
        self.out(attended.flatten(1), add_to=x)
        return self.down(backend.silu_and_mul(gate_up), add_to=x)
"""
WRITE = """
class TorchBackend:
    def write_kv(self, k, v, layer_cache, batch, static=None):
        {slots}
        size = layer_cache.shape[3]
        for part, new in zip(layer_cache, (k, v)):
            {write}
"""
SLOTS = "kept = batch.slot_mapping >= 0; k, v, slots = k[kept], v[kept], batch.slot_mapping[kept]"
ADD = "part.flatten(1, 2).index_add_(1, slots, new.transpose(0, 1).to(part.dtype))"
PUT = "part[:, slots // size, slots % size] = new.transpose(0, 1).to(part.dtype)"

WRONG = [
    Wrong("squares are summed in half precision", "norm", FORMULAS, text=NORM_IN_HALF,
          source="https://github.com/pytorch/pytorch/pull/133085"),
    Wrong("eps is a fixed number, whatever the config says", "norm", FORMULAS, "keepdim=True) + eps)",
          "keepdim=True) + 1e-6)", "https://github.com/apache/tvm/pull/15856"),
    Wrong("eps is added outside the root", "norm", FORMULAS, "y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)",
          "y / (y.pow(2).mean(-1, keepdim=True).sqrt() + eps)"),
    Wrong("the norm takes off the mean, as LayerNorm does", "norm", FORMULAS, "    y = x.float()\n",
          "    y = x.float() - x.float().mean(-1, keepdim=True)\n"),
    Wrong("the norm gives fp32, whatever came in", "norm", FORMULAS, "return weight * y.to(x.dtype)",
          "return weight.float() * y"),
    Wrong("x.float() of fp32 is x itself, and is written to", "norm", FORMULAS, "    y = y * torch.rsqrt(",
          "    y *= torch.rsqrt("),
    Wrong("a large gate gives inf / inf", "norm", FORMULAS, "torch.nn.functional.silu(gate) * up",
          "(gate.float() * gate.float().exp() / (1 + gate.float().exp())).to(x.dtype) * up"),
    Wrong("gate and up are exchanged", "norm", FORMULAS, "gate, up = x.chunk(2, -1)", "up, gate = x.chunk(2, -1)"),
    Wrong("theta is 10,000, whatever the config says", "frequencies", ROPE, "1.0 / rope.theta **", "1.0 / 10000.0 **",
          "https://github.com/karpathy/llama2.c/issues/356"),
    Wrong("Llama 3.1's stretching is read and not applied", "frequencies", ROPE, "return _llama3(rope, frequencies)",
          "return frequencies", "https://github.com/ggml-org/llama.cpp/pull/8676"),
    Wrong("angles are computed in bf16", "frequencies", ROPE, "angles = positions[:, None] * self.frequencies",
          "angles = (positions[:, None].bfloat16() * self.frequencies.bfloat16()).float()",
          "https://github.com/huggingface/transformers/pull/29285"),
    Wrong("frequencies are divided by D/2", "frequencies", ROPE, "2).float() / head_size)",
          "2).float() / (head_size // 2))"),
    Wrong("the length of YaRN's vectors is forgotten", "frequencies", ROPE, "angles.sin() * self.attention_factor",
          "angles.sin()"),
    Wrong("neighbours are paired, as in Meta's own layout", "turning", FORMULAS, text=IN_PAIRS,
          source="https://github.com/vllm-project/vllm/pull/49323"),
    Wrong("it turns the other way round", "turning", FORMULAS, "(a * cos - b * sin, b * cos + a * sin)",
          "(a * cos + b * sin, b * cos - a * sin)"),
    Wrong("heads are repeated as a whole, not each", "attention", FORMULAS, "part.float().repeat_interleave(group, 0)",
          "part.float().repeat(group, 1, 1)", "https://github.com/onnx/onnx/pull/7274"),
    Wrong("the causal mask begins at the first key", "attention", FORMULAS, text=SDPA.format(causal=True),
          source="https://github.com/pytorch/pytorch/issues/144858"),
    Wrong("chunks behind the first have no mask", "attention", FORMULAS,
          text=SDPA.format(causal="len(q) == keys.shape[1]"), source="https://github.com/mlx-node/mlx-node/pull/24"),
    Wrong("exp of scores, with no largest taken off", "attention", FORMULAS, text=NO_MAXIMUM,
          source="https://github.com/pytorch/executorch/pull/18407"),
    Wrong("scores are summed in half precision", "attention", FORMULAS, "q.float(), keys)",
          "q, keys.to(q.dtype)).float()",
          "https://github.com/huggingface/transformers/pull/17437"),
    Wrong("queries are scaled where they stand", "attention", FORMULAS,
          'scale * torch.einsum("thd,hcd->htc", q.float(), keys)',
          'torch.einsum("thd,hcd->htc", q.mul_(scale).float(), keys)'),
    Wrong("a query doesn't see its own key", "attention", FORMULAS, "> positions[:, None]", ">= positions[:, None]"),
    Wrong("the given scale is not looked at", "attention", FORMULAS, "scores = scale * ",
          "scores = q.shape[2] ** -0.5 * "),
    Wrong("weights are not normed over what is seen, but over all", "attention", FORMULAS,
          "scores.masked_fill(future, -math.inf).softmax(-1)", "scores.softmax(-1).masked_fill(future, 0)"),
    Wrong("slot -1 is the last one", "cache", BACKEND,
          text=WRITE.format(slots="slots = batch.slot_mapping", write=PUT),
          source="https://github.com/vllm-project/vllm/issues/43810"),
    Wrong("what stood in a slot is added to", "cache", BACKEND, text=WRITE.format(slots=SLOTS, write=ADD),
          source="https://github.com/llmmanorg/llmman/pull/118"),
    Wrong("keys are cached before they are turned", "cache", BACKEND,
          "self.write_kv(formulas.rope(k, cos, sin), v, layer_cache", "self.write_kv(k, v, layer_cache"),
    Wrong("values are turned, too", "cache", BACKEND, "formulas.rope(k, cos, sin), v, layer_cache",
          "formulas.rope(k, cos, sin), formulas.rope(v, cos, sin), layer_cache"),
    Wrong("slots of -1 are made 0, for all layers to come", "cache", BACKEND,
          text=WRITE.format(slots="slots = batch.slot_mapping.clamp_(min=0)", write=PUT)),
    Wrong("tokens are written one behind the other from the first slot on", "cache", BACKEND,
          text=WRITE.format(slots=SLOTS + "; slots = slots[0] + torch.arange(len(slots)) if len(slots) else slots",
                            write=PUT)),
    Wrong("the norms of q and k are skipped", "layer", LLAMA, "        if config.qk_norm:\n            q = backend",
          "        if False:\n            q = backend", "https://github.com/vllm-project/vllm-metal/pull/659"),
    Wrong("heads are as large as E / H says", "layer", LLAMA, "view(len(x), -1, config.head_size)",
          "view(len(x), -1, config.hidden_size // config.num_heads)", "https://github.com/vllm-project/vllm/pull/2622"),
    Wrong("scores are scaled by E, not D", "layer", LLAMA, "layer_cache, batch, self.scale)",
          "layer_cache, batch, config.hidden_size**-0.5)", "https://github.com/karpathy/ng-video-lecture/pull/6"),
    Wrong("the MLP reads what came in, not what attention made of it", "layer", LLAMA, text=BESIDE),
    Wrong("the second norm is the first one again", "layer", LLAMA, "backend.rms_norm(x, self.mlp_norm, eps)",
          "backend.rms_norm(x, self.attention_norm, eps)"),
    Wrong("positions begin anew with every chunk", "model", LLAMA, "cos, sin = self.rope(positions)",
          "cos, sin = self.rope(torch.arange(len(positions)))",
          "https://github.com/huggingface/transformers/issues/43082"),
    Wrong("all layers share the first one's cache", "model", LLAMA, "x = layer(x, cos, sin, layer_cache, batch)",
          "x = layer(x, cos, sin, cache[0], batch)"),
    Wrong("the last norm is left out", "model", LLAMA,
          "        return self.backend.rms_norm(x, self.norm, self.config.norm_eps)\n\n    def logits",
          "        return x\n\n    def logits"),
]  # fmt: skip
