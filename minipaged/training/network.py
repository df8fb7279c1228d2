"""The head's network as training sees it: PyTorch modules, whole sequences side by side, gradients.

models/head.py computes the same numbers over paged memory; a test holds the two together.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minipaged.models.config import ModelConfig
from minipaged.models.rope import Rope, RopeConfig


class Norm(nn.RMSNorm):
    """In the precision of what comes in: PyTorch has a fast way for that only."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class HeadNetwork(nn.Module):
    """One decoder layer over (hidden state before, token) pairs: EAGLE (arXiv:2401.15077), section 3.

    config: the head's own: see `head_config`. Parameters are named as in the file, see models/head.py.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        e, f, d = config.hidden_size, config.intermediate_size, config.head_size
        q, kv = config.num_heads * d, config.num_kv_heads * d
        self.config = config
        self.rope = Rope(config.rope or RopeConfig(), d, torch.device("cpu"))

        def linear(into: int, out: int) -> nn.Linear:
            return nn.Linear(into, out, bias=False)

        norm = [Norm(e, config.norm_eps) for _ in range(4)]
        self.token_norm, self.input_layernorm, self.post_attention_layernorm, self.norm = norm
        self.fuse = linear(2 * e, e)
        self.self_attn = nn.ModuleDict(
            {"q_proj": linear(e, q), "k_proj": linear(e, kv), "v_proj": linear(e, kv), "o_proj": linear(q, e)}
        )
        self.mlp = nn.ModuleDict({"gate_proj": linear(e, f), "up_proj": linear(e, f), "down_proj": linear(f, e)})

    def forward(self, hidden: Tensor, embedded: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        """One guess at every position of S sequences of C tokens, each as if the tokens so far were all there is.

        hidden [S, C, E]: the state before each token, true in the first call, guessed in the later ones.
        embedded [S, C, E]: the tokens. past: keys and values of the calls before; this call's are added.
        Returns the guessed states [S, C, E].
        """
        x = self.fuse(torch.cat((hidden, self.token_norm(embedded)), -1))
        x = x + self._attention(self.input_layernorm(x), past)
        y = self.post_attention_layernorm(x)
        x = x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))
        return self.norm(x)

    def _attention(self, x: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        (s, c, _), d = x.shape, self.config.head_size
        q, k, v = (self.self_attn[name](x).view(s, c, -1, d).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
        cos, sin = self.rope(torch.arange(c))
        past.append((_turned(k, cos, sin), v))
        keys, values = (torch.cat(parts, 2) for parts in zip(*past, strict=True))
        mask, groups = visible(c, len(past)), self.config.num_heads // self.config.num_kv_heads
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(_turned(q, cos, sin), keys, values, mask)
        return self.self_attn["o_proj"](out.transpose(1, 2).flatten(2))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rope on x [S, heads, C, D]."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def visible(length: int, calls: int) -> Tensor:
    """What the queries of call number `calls` may see of all calls' keys: bool [C, calls C].

    A guess k tokens ahead sees true keys up to k - 1 tokens before it, and then one guessed key of each call since.

    >>> visible(3, 2).int().tolist()
    [[0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 1, 0], [1, 1, 0, 0, 0, 1]]
    """
    back = torch.arange(length)[:, None] - torch.arange(length)  # how far a key lies behind a query
    return torch.cat([back >= calls - 1] + [back == calls - 1 - call for call in range(1, calls)], 1)
