"""What becomes of a checkpoint's tensors on their way to the model.

Small numbers stay what they are where the backend has products for them, and become floats where not; or, told to,
matrices are rounded to small numbers now.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

import kernels
from kernels.packed import Packed, Weight, floats, quantize
from minipaged.models.checkpoint import FolderCheckpoint
from minipaged.models.split import Split, cut

if TYPE_CHECKING:
    from minipaged.models.gguf import GGUFCheckpoint

Checkpoint: TypeAlias = "FolderCheckpoint | GGUFCheckpoint"
Progress = Callable[[int, int], None]  # called with: tensors read so far, tensors in all
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
BITS = {"int8": 8, "int4": 4}
CACHE_SCALES = re.compile(r"model\.layers\.\d+\.self_attn\.[kv]_scale")  # of an FP8 cache; always fp32


def read_weights(
    checkpoint: Checkpoint, names: dict[str, str], dtype: torch.dtype, device: torch.device, progress: Progress | None,
    backend: kernels.Backend, split: Split, quantization: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """The tensors of these names in the file, by the model's names: this rank's part of each.

    quantization: see `minipaged.models.load`. What isn't left as the file has it is said in one line.
    """
    weights: dict[str, Any] = {}
    whole: set[str] = set()  # why matrices became floats
    for stored, name in names.items():
        part = split.part(name)
        later = part if quantization in BITS and split.adds_up(name) else None  # a code depends on its whole row
        kept_as = torch.float32 if CACHE_SCALES.fullmatch(name) else dtype
        weight = checkpoint.tensor(stored, kept_as, None if later else part)
        if quantization in BITS and is_matrix(name, weight):
            weight = _quantized(name, weight, BITS[quantization])
            weight = cut(weight, later) if later else weight
        elif isinstance(weight, Packed) and (quantization == "none" or not backend.packs(weight)):
            weight = weight.dequantize(dtype)
            whole.add(f"kernels {backend.name!r} don't multiply from packed ones")
        elif not isinstance(weight, Packed) and stored in getattr(checkpoint, "layers", ()):
            whole.add("their groups are no equal pieces of a row")
        weights[name] = weight.to(device)
        if progress:
            progress(len(weights), len(names))
    method = getattr(getattr(checkpoint, "method", None), "name", None)
    if whole and method and quantization == "auto" and split.rank == 0:
        kernels.say(f"{method} weights are turned into {SHORT[dtype]}: {', '.join(sorted(whole))}")
    return weights


def is_matrix(name: str, weight: Weight) -> bool:
    """Whether products are made with it. Embeddings count, too: they may be tied to the projection to logits."""
    return len(weight.shape) == 2 and not name.endswith("wpe.weight")


def _quantized(name: str, weight: Weight, bits: int) -> Weight:
    """Embeddings keep 8 bits: all that is known of a token is its row. What is no multiple of 32 wide stays."""
    across = name.startswith("transformer.h.")  # GPT-2 has [in, out]
    matrix = floats(weight, torch.float32)
    matrix = matrix.t() if across else matrix
    if matrix.shape[1] % 32:
        return weight
    packed = quantize(matrix, bits if ".layers." in name or across else 8)
    return packed.t() if across else packed
