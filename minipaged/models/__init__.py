"""What does the model compute, and where do its weights come from?

Read fields.py and config.py, rope.py, llama.py, gpt2.py, head.py (which guesses what a model says); then how they
are loaded: checkpoint.py (a folder) with folder_tokenizer.py and sentencepiece_file.py, gguf_header.py,
gguf_blocks.py, gguf.py, fetch.py. Models go by name:
``load("smollm2")``, a folder in Hugging Face layout, a .gguf file, or a hub id.

Owns: architectures, their configs and weights.
Does not own: keys and values (execution), or which tokens are computed together: a model sees one flat batch.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

import kernels
from kernels.packed import floats, quantize
from minipaged import cache_folder
from minipaged.models.checkpoint import FolderCheckpoint, check_tensors
from minipaged.models.config import ModelConfig, ModelError
from minipaged.models.fetch import INSTEAD, fetch_from_hub, fetch_smollm2
from minipaged.models.fields import Fields
from minipaged.models.gpt2 import GPT2
from minipaged.models.llama import Llama
from minipaged.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from minipaged.models.gguf import GGUFCheckpoint

__all__ = ["Loaded", "ModelConfig", "ModelError", "Tokenizer", "load", "load_model", "open_checkpoint"]

Checkpoint: TypeAlias = "FolderCheckpoint | GGUFCheckpoint"
Model = Llama | GPT2
Progress = Callable[[int, int], None]  # called with: tensors read so far, tensors in all

ARCHITECTURES: dict[str, type[Model]] = {"llama": Llama, "gpt2": GPT2}
BITS = {"int8": 8, "int4": 4}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Loaded:
    """A model with all that it takes to run it."""

    config: ModelConfig
    model: Model
    tokenizer: Tokenizer
    generation_defaults: dict[str, Any]  # generation_config.json; only its end-of-text tokens are applied


def load(
    name_or_path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    backend: kernels.Backend | None = None,
    quantization: str = "auto",
) -> Loaded:
    """Load a model and its tokenizer.

    name_or_path: "smollm2" (fetched once, then kept), a folder, a .gguf file, or a hub id such as "gpt2".
    dtype: float32, bfloat16 or float16; the weights are converted to it.
    backend: who computes; by default `kernels.load("auto", device, dtype)`.
    quantization: "auto": small numbers stay what they are in the file, where the backend has products for them; "none":
    all become floats; "int8", "int4": matrices are rounded to 8 or 4 bits now, see `kernels.packed.quantize`.
    Raises ModelError for anything that is wrong with the name, the files or their contents.
    """
    checkpoint = open_checkpoint(name_or_path)
    tokenizer = checkpoint.tokenizer()
    _add_end_of_text(checkpoint.config, tokenizer)
    config, model = load_model(checkpoint, dtype, device, progress, backend, quantization)
    tokenizer.eos_token_ids = config.eos_token_ids
    return Loaded(config, model, tokenizer, checkpoint.generation_config)


def _add_end_of_text(config: dict[str, Any], tokenizer: Tokenizer) -> None:
    """What the tokenizer calls its end of text ends text, too, though the config may not say so."""
    end = tokenizer.backend.token_to_id(tokenizer.special_tokens.get("eos_token", ""))
    known = Fields(config).token_ids("eos_token_id")
    if end is not None and end not in known:
        config["eos_token_id"] = [*known, end]


def open_checkpoint(name_or_path: str | Path) -> Checkpoint:
    """Find a model's files, fetching them if need be, and read everything but the weights."""
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if name == "smollm2":
        return _open_gguf(fetch_smollm2())
    if path.is_dir():
        return FolderCheckpoint(path)
    if path.suffix == ".gguf" and path.is_file():
        return _open_gguf(path)
    if path.exists() or path.suffix == ".gguf" or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        what = "is neither a folder nor a .gguf file" if path.exists() else "does not exist"
        raise ModelError(f"{path} {what}: {INSTEAD}, or smollm2")
    return FolderCheckpoint(fetch_from_hub(name))


def _open_gguf(path: Path) -> "GGUFCheckpoint":
    try:
        from minipaged.models.gguf import GGUFCheckpoint  # only such files need the package
    except ModuleNotFoundError as error:
        raise ModelError(f"{path}: .gguf files need the package {error.name} (pip install {error.name})") from None
    return GGUFCheckpoint(path)


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    backend: kernels.Backend | None = None,
    quantization: str = "auto",
) -> tuple[ModelConfig, Model]:
    """The model alone. All names and shapes are checked before the first tensor is read."""
    if dtype not in DTYPES:
        raise ModelError(f"dtype must be one of {', '.join(map(str, DTYPES))}, not {dtype}")
    config = ModelConfig.from_hf(checkpoint.config)
    expected = ARCHITECTURES[config.architecture].tensor_shapes(config)
    names = checkpoint.names(expected)
    stored_as: dict[str, str] = {}
    for stored, name in names.items():
        if (other := stored_as.setdefault(name, stored)) != stored:
            raise ModelError(f"{checkpoint.path} has one tensor twice, as {other} and as {stored}: which one counts?")
    found = {name: checkpoint.shapes[stored] for stored, name in names.items()}
    check_tensors(expected, found, checkpoint.path)
    backend = backend or kernels.load("auto", device, dtype, cache_folder())
    weights: dict[str, kernels.Weight] = {}
    for stored, name in names.items():
        if name in expected:
            weight = checkpoint.tensor(stored, dtype)
            if quantization in BITS and is_matrix(name, expected[name]):
                weight = _quantize(name, weight, BITS[quantization])
            elif quantization == "none" or isinstance(weight, kernels.Packed) and not backend.packs(weight):
                weight = floats(weight, dtype)
            weights[name] = weight.to(device)
            if progress:
                progress(len(weights), len(expected))
    return config, ARCHITECTURES[config.architecture](config, weights, backend)


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is multiplied by: embeddings are, too, where they are tied to the projection to logits."""
    return len(shape) == 2 and not name.endswith("wpe.weight")


def _quantize(name: str, weight: kernels.Weight, bits: int) -> kernels.Weight:
    """Embeddings keep 8 bits: each token depends on its row alone."""
    across = name.startswith("transformer.h.")  # GPT-2 has [in, out]
    matrix = floats(weight, torch.float32)
    matrix = matrix.t() if across else matrix
    if matrix.shape[1] % 32:
        return weight
    packed = quantize(matrix, bits if "layers" in name or across else 8)
    return packed.t() if across else packed
