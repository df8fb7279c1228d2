"""The ways to run a model that `python -m minipaged.perplexity` compares: each a name and how its engine is made.

All are compared with the model's own floats. Those of a GGUF file have been rounded once already, so rounding them
again, on another grid, says which method loses least, and little of how much it would lose of full weights.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.packed import Weight, floats, quantize
from minipaged.llm import LLM
from minipaged.models import ARCHITECTURES, Checkpoint, ModelConfig, open_checkpoint
from minipaged.models.weights import BITS
from minipaged.quantization.rtn import Grid
from minipaged.quantization.texts import TO_CALIBRATE, cut, read_text
from minipaged.quantization.whole import Source, Tell
from minipaged.quantization.whole import quantize as quantize_model
from minipaged.quantization.writing import new_folder, sixteen_bits, write_model

CALIBRATION_TOKENS, CALIBRATION_CONTEXT = 8192, 512  # as little as does: H of 1,536 inputs wants a few times as many


@dataclass(frozen=True)
class Way:
    """options: of the engine. method: how the model is quantized before, if it is: see whole.METHODS."""

    options: dict[str, Any] = field(default_factory=dict)
    method: str | None = None


FLOATS = {"quantization": "none"}
WAYS = {
    "fp32": Way(FLOATS),
    "file": Way(),  # as it is: a GGUF's own small numbers
    "int8-products": Way({"products": "int8"}),  # as it is, with activations rounded, too
    "int8": Way({"quantization": "int8"}),  # rounded when it is loaded
    "int4": Way({"quantization": "int4"}),
    "rtn": Way(method="rtn"),
    "gptq": Way(method="gptq"),
    "awq": Way(method="awq"),
    "kv-int8": Way(FLOATS | {"kv_cache_dtype": "int8"}),
    "kv-fp8": Way(FLOATS | {"kv_cache_dtype": "fp8"}),
}


@contextmanager
def opened(model: str, way: Way, grid: Grid, context: int, tell: Tell) -> Iterator[tuple[LLM, float]]:
    """An engine for windows of `context` tokens, and the bits of a weight in it. tell: how far quantizing is."""
    room = {"num_blocks": -(-(context + 1) // 16) + 1, "max_num_seqs": 1, "prefix_cache": "none", "dtype": "fp32"}
    with tempfile.TemporaryDirectory(prefix="minipaged.") as folder:
        if way.method:
            out = Path(folder, way.method)
            quantize_to(out, open_checkpoint(model), way.method, grid, tell)
            model = str(out)
        with LLM(model, **room, **way.options) as llm:
            yield llm, bits_per_weight(open_checkpoint(model), way.options.get("quantization", "auto"))


def quantize_to(
    out: Path, checkpoint: Checkpoint, method: str, grid: Grid, tell: Tell, text: Path = TO_CALIBRATE,
    tokens: int = CALIBRATION_TOKENS,
) -> None:  # fmt: skip
    """Write the folder `out`, whole or not at all. Errors as of Source, read_text, new_folder and write_model."""
    source = Source(checkpoint, grid)
    token_ids = checkpoint.tokenizer().encode(read_text(text))[:tokens]
    texts = cut(token_ids, min(CALIBRATION_CONTEXT, source.config.max_model_len))
    with new_folder(out) as folder:
        write_model(folder, checkpoint, quantize_model(source, method, grid, texts, tell), method, grid)


def grid_for(checkpoint: Checkpoint, bits: int, group_size: int, symmetric: bool) -> Grid:
    """Scales are kept in the sixteen bits in which all that isn't quantized is kept."""
    return Grid(bits, group_size, symmetric, sixteen_bits(checkpoint.config))


def bits_per_weight(checkpoint: Checkpoint, quantization: str) -> float:
    """Of the layers' matrices, with scales and zero points: as the engine holds them, if it can multiply from them."""
    if quantization == "none":
        return 32.0
    config, bits, weights = ModelConfig.from_hf(checkpoint.config), 0.0, 0
    expected = ARCHITECTURES[config.architecture].tensor_shapes(config)
    for stored, name in checkpoint.names(expected).items():
        if name in expected and len(expected[name]) == 2 and re.search(r"\.(layers|h)\.\d+\.", name):
            weight: Weight = checkpoint.tensor(stored, torch.float32)
            if quantization in BITS and weight.shape[1] % 32 == 0:
                weight = quantize(floats(weight, torch.float32), BITS[quantization])
            weights += weight.shape[0] * weight.shape[1]
            bits += stored_bits(weight)
    return bits / weights


def stored_bits(weight: Weight) -> int:
    """What a matrix takes, packed as files pack it."""
    if isinstance(weight, Tensor):
        return 8 * weight.element_size() * weight.numel()
    zero = weight.bits * weight.zero.numel() if isinstance(weight.zero, Tensor) else 0
    parts = [weight.scale, weight.minimum, *(weight.outer or ())]
    return weight.bits * weight.codes.numel() + zero + sum(stored_bits(part) for part in parts if part is not None)
