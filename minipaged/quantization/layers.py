"""One layer in plain PyTorch, whose weights may change under it; and what its products read.

The engine's own layers have their weights packed and joined for speed. To quantize, a layer is run twice, a few
thousand tokens each time: with its weights as they were, to see what its products read, and with those that took
their place, for what the next layer will read. A layer's products read four things, and three of them twice or more:

    qkv       the normed input, read by q, k and v
    out       what attention found, read by o
    gate_up   the normed middle, read by gate and up
    down      silu(gate) * up, read by down
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import reference
from minipaged.models.config import ModelConfig

Weights = dict[str, Tensor]  # of one layer, by their names in it: "self_attn.q_proj.weight"
Look = Callable[[str, Tensor], None]  # is shown what is read: a name above, [T, in]

READERS = {
    "qkv": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "out": ("self_attn.o_proj.weight",),
    "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down": ("mlp.down_proj.weight",),
}
MATRICES = [reader for readers in READERS.values() for reader in readers]


@dataclass
class Seen:
    """What a product reads, over all tokens: moment [in, in], the mean of x x^T; magnitude [in], the mean of |x|."""

    moment: Tensor
    magnitude: Tensor

    def divided(self, scales: Tensor) -> "Seen":
        """The same of x / scales."""
        return Seen(self.moment / scales / scales[:, None], self.magnitude / scales)


class Recorder:
    """Sums up what it is shown. One for each layer."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, Tensor, int]] = {}

    def __call__(self, name: str, x: Tensor) -> None:
        moment, magnitude, tokens = self.sums.get(name, (torch.zeros(()), torch.zeros(()), 0))
        self.sums[name] = moment + x.T @ x, magnitude + x.abs().sum(0), tokens + len(x)

    def seen(self) -> dict[str, Seen]:
        return {name: Seen(moment / tokens, size / tokens) for name, (moment, size, tokens) in self.sums.items()}


def run_layer(
    x: Tensor, weights: Weights, config: ModelConfig, cos: Tensor, sin: Tensor, look: Look = lambda *_: None
) -> Tensor:
    """x [T, E], one sequence from its beginning; cos and sin [T, D/2]. Returns the layer's output [T, E]."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return reference.rms_norm(x, weights[f"{name}.weight"], config.norm_eps)

    def heads(name: str) -> Tensor:
        return linear(f"self_attn.{name}_proj", normed).view(len(x), -1, config.head_size)  # [T, heads, D]

    normed = norm("input_layernorm", x)
    look("qkv", normed)
    q, k, v = heads("q"), heads("k"), heads("v")
    if config.qk_norm:
        q, k = norm("self_attn.q_norm", q), norm("self_attn.k_norm", k)
    q, k, v = (t.transpose(0, 1) for t in (reference.rope(q, cos, sin), reference.rope(k, cos, sin), v))
    found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # [H, T, D]
    found = found.transpose(0, 1).flatten(1)
    look("out", found)
    x = x + linear("self_attn.o_proj", found)
    normed = norm("post_attention_layernorm", x)
    look("gate_up", normed)
    gated = F.silu(linear("mlp.gate_proj", normed)) * linear("mlp.up_proj", normed)
    look("down", gated)
    return x + linear("mlp.down_proj", gated)
