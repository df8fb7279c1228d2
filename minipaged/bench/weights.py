"""Checkpoints that are made here: a .gguf file's weights for a peer that reads Hugging Face's layout only, and random
weights in a real model's shape, for a machine without a network.

python -m minipaged.bench.weights llama3-1b FOLDER
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from kernels.packed import floats
from minipaged.execution.runner import DTYPES
from minipaged.models import ARCHITECTURES, Checkpoint, ModelConfig, ModelError

NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LLAMA3 = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
          "max_position_embeddings": 8192, "vocab_size": 128256, "num_attention_heads": 32,
          "num_key_value_heads": 8, "eos_token_id": 0}  # fmt: skip
# Llama 3.2 1B, Llama 3 8B (their config.json on the hub), and one to try things out.
SHAPES: dict[str, dict[str, Any]] = {
    "llama3-1b": LLAMA3 | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                           "tie_word_embeddings": True},
    "llama3-8b": LLAMA3 | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "tiny": LLAMA3 | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512,
                      "num_attention_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip


def write_folder(checkpoint: Checkpoint, dtype: str, folder: Path) -> None:
    """config.json and model.safetensors, with the weights dequantized and in the dtype; no tokenizer.

    ModelError if they can't be written.
    """
    config = ModelConfig.from_hf(checkpoint.config)
    expected = ARCHITECTURES[config.architecture].tensor_shapes(config)
    names = checkpoint.names(expected)
    kept = {stored: name for stored, name in names.items() if name in expected}
    weights = {name: floats(checkpoint.tensor(stored, DTYPES[dtype]), DTYPES[dtype]) for stored, name in kept.items()}
    _write(checkpoint.config, weights, dtype, folder)


def write_random(shape: str, folder: Path, dtype: str = "bf16", device: str = "cpu") -> None:
    """A checkpoint in a shape of SHAPES, the same at each call on one kind of device; its text means nothing.

    device: where the numbers are drawn; a GPU takes a second for what takes a CPU a minute.
    """
    config = SHAPES[shape]
    parsed = ModelConfig.from_hf(config)
    random = torch.Generator(device).manual_seed(0)

    def draw(size: tuple[int, ...]) -> Tensor:
        if len(size) == 1:  # a norm's
            return torch.ones(size, dtype=DTYPES[dtype])
        weight = torch.empty(size, dtype=DTYPES[dtype], device=device)
        return weight.normal_(0.0, 0.02, generator=random).cpu()

    shapes = ARCHITECTURES[parsed.architecture].tensor_shapes(parsed)
    folder.mkdir(parents=True, exist_ok=True)
    _write(config, {name: draw(tuple(size)) for name, size in shapes.items()}, dtype, folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def _write(config: dict[str, Any], weights: dict[str, Tensor], dtype: str, folder: Path) -> None:
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    try:
        save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise ModelError(f"the weights can't be written to {folder} (TMPDIR moves it): {error}") from error
    family = str(config["model_type"]).capitalize()  # Llama, Qwen2, Qwen3
    more = {"architectures": [f"{family}ForCausalLM"], "torch_dtype": NAMES[dtype]}
    (folder / "config.json").write_text(json.dumps(config | more))


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m minipaged.bench.weights", description=__doc__)
    flags.add_argument("shape", choices=SHAPES)
    flags.add_argument("folder", type=Path)
    flags.add_argument("--dtype", choices=NAMES, default="bf16")
    flags.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = flags.parse_args()
    write_random(args.shape, args.folder, args.dtype, args.device)


if __name__ == "__main__":
    main()
