"""The same weights for a peer that reads Hugging Face's layout only: a .gguf file, written out as a folder."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from minipaged.execution.runner import DTYPES
from minipaged.models import ARCHITECTURES, ModelConfig, ModelError
from minipaged.models.gguf import GGUFCheckpoint

NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def write_folder(checkpoint: GGUFCheckpoint, dtype: str, folder: Path) -> None:
    """config.json and model.safetensors, with the weights dequantized and in the dtype; no tokenizer.

    ModelError if they can't be written.
    """
    config = ModelConfig.from_hf(checkpoint.config)
    expected = ARCHITECTURES[config.architecture].tensor_shapes(config)
    names = checkpoint.names(expected)
    weights = {name: checkpoint.tensor(stored, DTYPES[dtype]) for stored, name in names.items() if name in expected}
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    try:
        save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise ModelError(f"the weights for vLLM can't be written to {folder} (TMPDIR moves it): {error}") from error
    family = str(checkpoint.config["model_type"]).capitalize()  # Llama, Qwen2, Qwen3
    more = {"architectures": [f"{family}ForCausalLM"], "torch_dtype": NAMES[dtype]}
    (folder / "config.json").write_text(json.dumps(checkpoint.config | more))
