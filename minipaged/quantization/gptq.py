"""GPTQ: what rounding one column lost, the columns that are still to come make good.

Frantar et al., arXiv:2210.17323. Rounding to nearest keeps weights close; but what should stay close is the product.
With inputs x and the mean H of x x^T over a calibration text, the loss of a row is

    E |(w - w') x|^2 = (w - w') H (w - w')^T

Take the columns one by one. Once column j is rounded, the loss is least if each later column k moves by

    w_k -= e_j U_jk,    e_j = (w_j - w'_j) / U_jj,    U = the upper Cholesky factor of H^-1   (U^T U = H^-1)

where inputs j and k go together, k can carry what j lost. Later columns are rounded anyway, so nothing is paid for it.
If inputs have nothing to do with each other, H and U are diagonal, nothing moves, and this is rounding to nearest.

- Columns that read the largest inputs come first (the paper's code calls it act-order), while there are still many
  others to carry their errors. The groups and their scales stay as they were, fitted before: files look as ever.
- H of few tokens or of dead inputs has no inverse: a little is added to its diagonal, DAMPING of the mean.
- Later columns are moved BLOCK columns at a time, in one product: the same sums, and much faster.
"""

import torch
from torch import Tensor

from kernels.packed import Packed
from minipaged.models.config import ModelConfig
from minipaged.quantization.layers import READERS, Seen, Weights
from minipaged.quantization.rtn import Grid, codes_of, fit, packed

DAMPING = 0.01
BLOCK = 128


def gptq(weight: Tensor, moment: Tensor, grid: Grid, damping: float = DAMPING) -> Packed:
    """weight [out, in] in fp32; moment [in, in]: the mean of x x^T. ValueError if it is not finite."""
    scale, zero = fit(weight, grid)
    order = moment.diagonal().argsort(descending=True, stable=True)
    upper = inverse_factor(moment[order][:, order], damping)
    columns = weight.shape[1] // scale.shape[1]
    scales, zeros = (each.repeat_interleave(columns, 1)[:, order] for each in (scale, zero))  # [out, in]
    left = weight[:, order]  # a copy: what each column should be by now
    codes = torch.empty_like(left)
    for begin in range(0, weight.shape[1], BLOCK):
        end = min(begin + BLOCK, weight.shape[1])
        errors = torch.empty(len(left), end - begin)
        for j in range(begin, end):
            codes[:, j] = codes_of(left[:, j], scales[:, j], zeros[:, j], grid)
            rounded = (codes[:, j] - zeros[:, j]) * scales[:, j]
            errors[:, j - begin] = (left[:, j] - rounded) / upper[j, j]
            left[:, j + 1 : end] -= errors[:, j - begin, None] * upper[j, j + 1 : end]
        left[:, end:] -= errors @ upper[begin:end, end:]
    in_place = torch.empty_like(codes).index_copy_(1, order, codes)
    return packed(in_place, scale, zero, grid)


def inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """U, upper triangular in fp32, with U^T U = (moment + damping)^-1. In fp64: moments are badly conditioned."""
    if not moment.isfinite().all():
        raise ValueError("what the layer reads is not finite: the model overflows on the calibration text")
    damped = moment.double()
    mean = damped.diagonal().mean()
    damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def loss(weight: Tensor, rounded: Tensor, moment: Tensor) -> Tensor:
    """The mean of |(w - w') x|^2 for each row, [out]: what all of this makes smaller."""
    error = weight - rounded
    return ((error @ moment) * error).sum(1)


def gptq_layer(weights: Weights, seen: dict[str, Seen], config: ModelConfig, grid: Grid) -> dict[str, Packed]:
    """The layer's matrices, rounded; those that read the same as one, for no row knows of another."""
    packs = {}
    for name, readers in READERS.items():
        together = gptq(torch.cat([weights[reader] for reader in readers]), seen[name].moment, grid)
        begin = 0
        for reader in readers:
            packs[reader] = together.rows(slice(begin, begin + len(weights[reader])))
            begin += len(weights[reader])
    return packs
