"""A whole model, layer by layer: what it reads in fp32, and what comes out.

Each layer is quantized for what the quantized layers before it give it to read: what they lost, GPTQ can still make
good. Only one layer is in memory in fp32 at a time. The embedding, the norms, the biases and the head stay as they
are, as others leave them, too.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kernels.packed import Packed, Weight, floats
from minipaged.models import Checkpoint
from minipaged.models.checkpoint import FolderCheckpoint, check_tensors
from minipaged.models.config import ModelConfig, ModelError
from minipaged.models.folder_tokenizer import read_json
from minipaged.models.llama import Llama
from minipaged.models.rope import Rope, RopeConfig
from minipaged.quantization.awq import awq_layer
from minipaged.quantization.gptq import gptq_layer
from minipaged.quantization.layers import MATRICES, Recorder, Seen, Weights, run_layer
from minipaged.quantization.rtn import Grid, rtn_layer

Method = Callable[[Weights, dict[str, Seen], ModelConfig, Grid], dict[str, Packed]]
METHODS: dict[str, Method] = {"rtn": rtn_layer, "gptq": gptq_layer, "awq": awq_layer}
NEEDS_TEXT = ("gptq", "awq")
Tell = Callable[[int, int], None]  # layers done, layers in all


class Source:
    """The tensors of a checkpoint in fp32, by Hugging Face's names, each read when it is asked for.

    ModelError if it is no model of Llama's kind, is quantized already, or lacks tensors; ValueError if groups don't
    fit its matrices.
    """

    def __init__(self, checkpoint: Checkpoint, grid: Grid):
        if isinstance(checkpoint, FolderCheckpoint):
            _refuse_quantized(checkpoint.path)
        self.checkpoint, self.config = checkpoint, ModelConfig.from_hf(checkpoint.config)
        if self.config.architecture != "llama":
            what = self.config.architecture
            raise ModelError(f"{checkpoint.path}: only models of Llama's kind are quantized, not {what}")
        expected = Llama.tensor_shapes(self.config)
        self.stored_as = {name: stored for stored, name in checkpoint.names(expected).items()}
        check_tensors(expected, {n: checkpoint.shapes[s] for n, s in self.stored_as.items()}, checkpoint.path)
        self.names = [*expected]
        for name in MATRICES:
            columns = expected[f"model.layers.0.{name}"][1]
            if grid.group_size != -1 and columns % grid.group_size:
                fitting = [str(size) for size in (32, 64, 128) if columns % size == 0]
                raise ValueError(
                    f"group size {grid.group_size}: {name.removesuffix('.weight')} has {columns} columns, which "
                    f"can't be divided so; {', '.join([*fitting, '-1 (a whole row)'])} would fit it"
                )

    def tensor(self, name: str) -> Tensor:
        return floats(self.checkpoint.tensor(self.stored_as[name], torch.float32), torch.float32)

    def layer(self, number: int) -> Weights:
        prefix = f"model.layers.{number}."
        return {name.removeprefix(prefix): self.tensor(name) for name in self.names if name.startswith(prefix)}

    def others(self) -> Weights:
        """All that belongs to no layer: the embedding, the last norm, the head if it is one of its own."""
        return {name: self.tensor(name) for name in self.names if not name.startswith("model.layers.")}


def _refuse_quantized(folder: Path) -> None:
    """What is in a few bits already has lost what could be kept. (Of a GGUF file nobody has anything better.)"""
    for name in ("config.json", "quantize_config.json"):
        values = read_json(folder / name, missing_ok=True)
        found = values.get("quantization_config") if name == "config.json" else values
        if found:
            how = found.get("quant_method", name) if isinstance(found, dict) else found
            raise ModelError(f"{folder} is quantized already ({how}): name the model that it was made from")


@torch.no_grad()
def quantize(
    source: Source, method: str, grid: Grid, texts: list[list[int]], tell: Tell = lambda *_: None
) -> dict[str, Weight]:
    """All tensors of the model, by Hugging Face's names, its layers' matrices as Packed.

    method: rtn, gptq or awq. texts: token ids, to calibrate on; rtn needs none.
    """
    config, tensors = source.config, dict[str, Weight](source.others())
    rope = Rope(config.rope or RopeConfig(), config.head_size, torch.device("cpu"))
    embedding = tensors["model.embed_tokens.weight"]
    states = [embedding[torch.tensor(ids)] for ids in texts] if method in NEEDS_TEXT else []
    turns = [rope(torch.arange(len(x))) for x in states]
    for number in range(config.num_layers):
        tell(number, config.num_layers)
        weights, recorder = source.layer(number), Recorder()
        for x, turn in zip(states, turns, strict=True):
            run_layer(x, weights, config, *turn, recorder)
        packs = METHODS[method](weights, recorder.seen(), config, grid)
        rounded = weights | {name: packed.dequantize() for name, packed in packs.items()}
        states = [run_layer(x, rounded, config, *turn) for x, turn in zip(states, turns, strict=True)]
        tensors |= {f"model.layers.{number}.{name}": tensor for name, tensor in (weights | packs).items()}
    tell(config.num_layers, config.num_layers)
    return tensors
