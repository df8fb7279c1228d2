"""The backend that needs nothing but PyTorch, on a CPU or a GPU. The others replace what they do faster.

Shapes as in reference.py; a `layer_cache` is one layer's [2, G, N, B, D], a `cache` all of them, [L, 2, G, N, B, D];
in eight bits, see cache.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import formulas, reference, torch_attention
from kernels.batch import Batch
from kernels.cache import codes, is_quantized, raw, scales
from kernels.linear import Linear, SideBySide, compute_dtype
from kernels.packed import Packed, Weight, stack


class TorchBackend:
    """What a model and its runner ask of the hardware.

    dtype: what activations are computed in when weights and cache are kept in the dtype that it was made with.
    """

    name = "torch"
    # Whether a row's numbers are the same, bit for bit, whoever else is in the batch, however its sequence was cut
    # into steps, and wherever its blocks lie. Not here: PyTorch's products and its attention choose the order of their
    # sums by the number of rows.
    same_bits = False

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.dtype = compute_dtype(dtype, device)

    def linear(self, weight: Weight | Sequence[Weight], bias: Tensor | None = None) -> Callable[..., Tensor]:
        """A function x [T, in] -> x weight^T + bias [T, out], or with add_to=y [T, out]: y plus that, in place.

        weight: [out, in], or several that stand one below the other.
        """
        weights = stack([weight] if isinstance(weight, Weight) else weight)
        biases = [None] * len(weights) if bias is None else bias.split([w.shape[0] for w in weights])
        linears = [self.product(w, b) for w, b in zip(weights, biases, strict=True)]
        return linears[0] if len(linears) == 1 else SideBySide(linears)

    def product(self, weight: Weight, bias: Tensor | None = None) -> Callable[..., Tensor]:
        """The same, of one matrix."""
        return Linear(weight.dequantize(self.dtype) if isinstance(weight, Packed) else weight, bias)

    def packs(self, weight: Packed) -> bool:
        """Whether products are made from these small numbers as they are; else better give floats to `linear`."""
        return False

    def embedding(self, weight: Weight, linear: Callable[..., Tensor] | None = None) -> Any:
        """What gives rows of weight [V, E] by their numbers: embedding[ids]. linear: a product with the same weight."""
        return weight

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / rms(x) * weight over the last dimension: see formulas.rms_norm."""
        return formulas.rms_norm(x, weight, eps)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """silu(gate) * up for x [T, 2F] = (gate, up). Returns [T, F]."""
        return formulas.silu_and_mul(x)

    def pointwise(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """function(x) for x [T, F], where function takes each number by itself: an activation."""
        return function(x)

    def rope_and_write(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, layer_cache: Tensor, batch: Batch,
        static: tuple[float, float] | None = None,
    ) -> Tensor:  # fmt: skip
        """Turn q [T, H, D] and k [T, G, D] by cos and sin [T, D/2]; write k and v into their slots. Returns q, turned.

        So keys stand in the cache turned already, and values as they came. Within a token, heads lie side by side; q
        may be changed in place. static: see `write_kv`.
        """
        self.write_kv(formulas.rope(k, cos, sin), v, layer_cache, batch, static)
        return formulas.rope(q, cos, sin)

    def why_no_cache(self, dtype: torch.dtype) -> str | None:
        """Why a cache can't be of this dtype, which is the weights' or one of eight bits; None if it can."""
        return None

    def write_kv(
        self, k: Tensor, v: Tensor, layer_cache: Tensor, batch: Batch, static: tuple[float, float] | None = None
    ) -> None:
        """Write k and v [T, G, D] into the batch's slots of layer_cache [2, G, N, B, D], in the cache's dtype.

        Token t goes to slot_mapping[t] = block * B + offset, keys to part 0 and values to part 1; a slot of -1 writes
        nothing. static: the scales of keys and values for a cache in fp8, instead of one for each token and head.
        """
        slots = batch.slot_mapping
        if slots.min() < 0:
            kept = slots >= 0
            k, v, slots = k[kept], v[kept], slots[kept]
        if is_quantized(layer_cache):
            return self._write_codes(torch.stack((k, v)), layer_cache, slots, static)
        keys, values = layer_cache.flatten(2, 3)  # [G, N B, D]
        keys.index_copy_(1, slots, k.transpose(0, 1).to(keys.dtype))
        values.index_copy_(1, slots, v.transpose(0, 1).to(values.dtype))

    def _write_codes(self, kv: Tensor, cache: Tensor, slots: Tensor, static: tuple[float, float] | None) -> None:
        """kv [2, T, G, D]."""
        where = torch.div(slots, cache.shape[3], rounding_mode="floor"), slots % cache.shape[3]
        if static and cache.dtype == torch.float8_e4m3fn:
            both = [reference.quantize(x, cache.dtype, one) for x, one in zip(kv, static, strict=True)]
            new_codes, new_scales = torch.stack([raw(x) for x, _ in both]), torch.stack([x for _, x in both])
        else:
            new_codes, new_scales = reference.quantize(kv, cache.dtype)
        codes(cache).view(torch.uint8)[:, :, *where] = new_codes.view(torch.uint8).transpose(1, 2)
        scales(cache)[:, :, *where] = new_scales.transpose(1, 2)

    def paged_attention(self, q: Tensor, layer_cache: Tensor, batch: Batch, scale: float) -> Tensor:
        """Causal attention of q [T, H, D] through the page tables: see reference.paged_attention. Returns [T, H, D]."""
        where = batch.query_start, batch.context_lens, batch.block_tables
        if q.device.type != "cpu":
            return self._one_by_one(q, layer_cache, batch, scale)
        if batch.plan is None:  # the first layer: the others share it
            batch.plan = torch_attention.AttentionPlan(*where, q.shape[1], layer_cache)
        return torch_attention.paged_attention(q, layer_cache, batch.plan, scale)

    def _one_by_one(self, q: Tensor, layer_cache: Tensor, batch: Batch, scale: float) -> Tensor:
        """The same, sequence by sequence: keys and values are copied into a row first."""
        out, starts = torch.empty_like(q), batch.query_start.tolist()
        for s, context in enumerate(batch.context_lens.tolist()):
            rows = slice(starts[s], starts[s + 1])
            blocks = batch.block_tables[s, : -(-context // layer_cache.shape[3])].long()
            read = reference.dequantize(raw(layer_cache)[:, :, blocks].view(layer_cache.dtype))
            keys, values = read.flatten(2, 3)[:, :, :context]  # [G, C, D]
            out[rows] = formulas.attention(q[rows], keys, values, scale)
        return out

    def copy_blocks(self, cache: Tensor, source: Tensor, target: Tensor) -> None:
        """Copy whole blocks inside the pool, in all layers at once: see reference.copy_blocks."""
        reference.copy_blocks(cache, source, target)

    def move_blocks(self, from_cache: Tensor, to_cache: Tensor, source: Tensor, target: Tensor) -> None:
        """Copy blocks from one pool to another, on whatever devices they are: swapping."""
        reference.move_blocks(from_cache, to_cache, source, target)
