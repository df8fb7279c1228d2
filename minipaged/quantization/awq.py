"""AWQ: columns that read large inputs are made larger before they are rounded.

Lin et al., arXiv:2306.00978. A step of the grid is the same for all columns of a group, but an error in a column
that reads large inputs costs more. So multiply column j by s_j, and divide what it reads by s_j: the product is the
same, the column's error is divided by s_j, and the step grows only where s_j made a column the largest of its group.

    W x = (W diag(s)) (x / s)          s = (mean |x|)^alpha, alpha from 0 (nothing) to 1, by trying

The division costs nothing: it is folded into whatever makes x.

    q, k, v     read  input_layernorm            : its weight is divided
    o           reads v's heads, weighted         : v's rows are (query heads that share a head of v share its s)
    gate, up    read  post_attention_layernorm    : its weight is
    down        reads silu(gate) * up             : up's rows are

Then the range of each group is cut, if that costs less: the largest weight is seldom worth the step that it asks for.
Both searches take the loss that GPTQ takes, e H e^T, so that a text is read once and no layer is run again.
"""

import torch
from torch import Tensor

from kernels.packed import Packed
from minipaged.models.config import ModelConfig
from minipaged.quantization.gptq import loss
from minipaged.quantization.layers import READERS, Seen, Weights
from minipaged.quantization.rtn import Grid, codes_of, fit, rtn

ALPHAS = torch.linspace(0, 1, 11).tolist()
SHRINKS = torch.linspace(1, 0.6, 9).tolist()
MADE_BY = {  # which tensors are divided, so that a product may read less
    "qkv": ("input_layernorm.weight",),
    "out": ("self_attn.v_proj.weight", "self_attn.v_proj.bias"),
    "gate_up": ("post_attention_layernorm.weight",),
    "down": ("mlp.up_proj.weight", "mlp.up_proj.bias"),
}


def awq_layer(weights: Weights, seen: dict[str, Seen], config: ModelConfig, grid: Grid) -> dict[str, Packed]:
    """The layer's matrices, rounded. weights, of the one layer, and seen are changed: scales are folded into them."""
    packs = {}
    for name, readers in READERS.items():
        matrix = torch.cat([weights[reader] for reader in readers])
        scales = best_scales(matrix, _shared(name, seen[name], config), grid)
        fold(name, scales, weights, config)
        seen[name] = seen[name].divided(scales)
    for name, readers in READERS.items():
        for reader in readers:
            shrink = best_shrink(weights[reader], seen[name].moment, grid)
            packs[reader] = rtn(weights[reader], grid, shrink)
    return packs


def _shared(name: str, seen: Seen, config: ModelConfig) -> Seen:
    """What o reads is the same head of v several times: one scale for all of them."""
    if name != "out":
        return seen
    heads = seen.magnitude.view(config.num_kv_heads, -1, config.head_size)
    return Seen(seen.moment, heads.mean(1, keepdim=True).expand_as(heads).flatten())


def best_scales(weight: Tensor, seen: Seen, grid: Grid) -> Tensor:
    """s [in] of the alpha that loses least, for all of weight [out, in] together."""
    best, least = torch.ones(weight.shape[1]), float("inf")
    for alpha in ALPHAS:
        scales = seen.magnitude.clamp(min=1e-4) ** alpha
        scales /= (scales.max() * scales.min()).sqrt()  # around 1, for the sake of what they are folded into
        rounded = rtn(weight * scales, grid).dequantize() / scales
        if (lost := float(loss(weight, rounded, seen.moment).sum())) < least:
            best, least = scales, lost
    return best


def fold(name: str, scales: Tensor, weights: Weights, config: ModelConfig) -> None:
    """Multiply the columns that read `name` by scales [in], and divide what makes it. The layer computes the same."""
    for reader in READERS[name]:
        weights[reader] = weights[reader] * scales
    if name == "out":
        scales = scales.view(config.num_kv_heads, -1, config.head_size)[:, 0].flatten()
    for maker in MADE_BY[name]:
        if maker in weights:
            rows = scales if weights[maker].dim() == 1 else scales[:, None]
            weights[maker] = weights[maker] / rows


def best_shrink(weight: Tensor, moment: Tensor, grid: Grid) -> Tensor:
    """For each group the share of its range that loses least, [out, groups]; inputs of other groups left aside."""
    groups = grid.groups(weight)
    number, columns = groups.shape[1:]
    own = torch.stack([moment[g * columns : (g + 1) * columns, g * columns : (g + 1) * columns] for g in range(number)])
    best, least = torch.ones(groups.shape[:2]), torch.full(groups.shape[:2], float("inf"))
    for shrink in SHRINKS:
        scale, zero = (each[..., None] for each in fit(weight, grid, shrink))
        error = groups - (codes_of(groups, scale, zero, grid) - zero) * scale
        lost = (torch.einsum("ogi,gij->ogj", error, own) * error).sum(-1)
        best = torch.where(lost < least, shrink, best)
        least = torch.minimum(lost, least)
    return best
