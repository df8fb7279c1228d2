"""A small model whose norms make a few channels large, as those of trained ones do; and its files read back."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from tiny_model import make_folder

TEXT = "Call me Ishmael. Some years ago - never mind how long precisely - having little or no money in my purse. "


def make_outliers(folder: Path, **more) -> Path:
    """Two layers, 64 wide, MLP 128, three query heads for each key's; the text of tiny_model.make_folder."""
    make_folder(folder)
    torch.manual_seed(1)
    settings = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 6, "head_dim": 16}
    config = transformers.LlamaConfig(**(settings | sizes | {"initializer_range": 0.15} | more))
    model = transformers.LlamaForCausalLM(config)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[::17] *= 12
    model.save_pretrained(folder)
    return folder


def read_back(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in fp32, by the format's definition, one code at a time."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    bits = config["config_groups"]["group_0"]["weights"]["num_bits"]
    tensors = load_file(folder / "model.safetensors")
    weights = {name: t.float() for name, t in tensors.items() if not name.rpartition(".")[2].startswith("weight_")}
    for name in [name.removesuffix("_packed") for name in tensors if name.endswith("_packed")]:
        out, into = tensors[f"{name}_shape"].tolist()
        codes = unpack(tensors[f"{name}_packed"], bits)[:, :into]
        scale = tensors[f"{name}_scale"].float()
        zero = torch.full_like(scale, 2 ** (bits - 1))
        if f"{name}_zero_point" in tensors:
            zero = unpack(tensors[f"{name}_zero_point"].T, bits)[:, :out].T
        each = into // scale.shape[1]
        weights[name] = torch.stack(
            [(codes[:, i] - zero[:, i // each]) * scale[:, i // each] for i in range(into)], 1
        )
    return weights


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    fields = [(words.long() >> shift) % 2**bits for shift in range(0, 32, bits)]
    return torch.stack(fields, -1).flatten(1).float()
