"""What a layer computes beside its products, in the plainest PyTorch that is right: no cache, no page tables, no batch.

Symbols as in the whole project: T tokens in a row, E hidden size, F width of the MLP, H query heads, G key/value heads,
D head size. Results are of the dtype of what comes in; what is in between is in fp32. Nothing that comes in is changed.
"""

import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, the others are any; the norm is taken in fp32.

    >>> rms_norm(torch.tensor([[3.0, -3.0]]), torch.tensor([1.0, 2.0]), eps=0.0)
    tensor([[ 1., -2.]])
    """
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up for x [T, 2F] = (gate, up), where silu(z) = z / (1 + exp(-z)). Returns [T, F].

    >>> silu_and_mul(torch.tensor([[0.0, 100.0, 7.0, 0.5]]))
    tensor([[ 0., 50.]])
    """
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [T, heads, D] by its positions; cos and sin [T, D/2], fp32, the same for all heads.

    Dimension i is paired with i + D/2 (the layout of Hugging Face's Llama), and (a, b) becomes
    (a cos - b sin, b cos + a sin).

    >>> rope(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    tensor([[[-3.,  2.,  1.,  4.]]])
    """
    a, b = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def attention(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention of one sequence, whose keys and values lie in a row.

        A_ij = exp(scale q_i . K_j) / sum_t exp(scale q_i . K_t),   o_i = sum_j A_ij V_j

    q [T, H, D]: of the last T of C positions; keys and values [G, C, D]: of all of them. A query sees the keys of its
    own position and of those before. Query head h reads key/value head h // (H / G). Returns [T, H, D] in q's dtype.

    >>> keys = torch.zeros(1, 3, 1)  # all alike: a query takes the mean of what it sees
    >>> attention(torch.ones(2, 1, 1), keys, torch.tensor([[[0.0], [1.0], [5.0]]]), 1.0).flatten()
    tensor([0.5000, 2.0000])
    """
    context, group = keys.shape[1], q.shape[1] // len(keys)
    keys, values = (part.float().repeat_interleave(group, 0) for part in (keys, values))  # [H, C, D]
    scores = scale * torch.einsum("thd,hcd->htc", q.float(), keys)
    positions = torch.arange(context - len(q), context, device=q.device)
    future = torch.arange(context, device=q.device) > positions[:, None]
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    return torch.einsum("htc,hcd->thd", weights, values).to(q.dtype)
