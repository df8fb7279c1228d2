"""The model as an engine is told to have it; of several ranks, each its part."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

import kernels
from minipaged import cache_folder
from minipaged.execution.engine_args import EngineArgs
from minipaged.execution.runner import kv_bytes_per_token, resolve
from minipaged.models import Loaded, Ranks, load
from minipaged.models.ranks import ALONE

KV_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # the others are the model's


@dataclass(frozen=True)
class Opened:
    """kv_dtype: of keys and values. block_bytes: what a block takes here, of the model's own."""

    loaded: Loaded
    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: str
    block_bytes: int


def open_model(args: EngineArgs, ranks: Ranks = ALONE, notice: Callable[[str], None] = kernels.say) -> Opened:
    """Errors as of `resolve`, `kernels.load` and `models.load`."""
    dtype, device = resolve(args.dtype, args.device)
    backend = kernels.load(args.kernels, device, dtype, cache_folder(), notice, products=args.products)
    kv_dtype = KV_DTYPES.get(args.kv_cache_dtype, dtype)
    if reason := backend.why_no_cache(kv_dtype):
        raise ValueError(f"kv_cache_dtype={args.kv_cache_dtype!r}: {reason}")
    loaded = load(args.model, dtype, device, backend=backend, quantization=args.quantization, ranks=ranks)
    block_bytes = args.block_size * kv_bytes_per_token(loaded.model.config, kv_dtype)
    return Opened(loaded, dtype, kv_dtype, device, block_bytes)
