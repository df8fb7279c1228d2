"""What does the model compute, and where do its weights come from?

Read fields.py and config.py, rope.py, llama.py, gpt2.py, head.py (which guesses what a model says); split.py and
ranks.py, how several ranks compute one together; then how they are loaded: checkpoint.py (a folder) with
folder_tokenizer.py and sentencepiece_file.py, gguf_header.py, gguf_blocks.py, gguf.py, fetch.py; quantized/, how other
people's tools keep weights in few bits; weights.py, what becomes of all of them on their way to the model; and
fingerprint.py, how two engines know that they have the same. Models go by name: ``load("smollm2")``, a folder in
Hugging Face layout, a .gguf file, or a hub id.

Owns: architectures, their configs and weights.
Does not own: keys and values (execution), or which tokens are computed together: a model sees one flat batch.
"""

import contextlib
import ctypes
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import kernels
from minipaged import cache_folder
from minipaged.models.checkpoint import FolderCheckpoint, check_tensors
from minipaged.models.config import ModelConfig, ModelError
from minipaged.models.fetch import INSTEAD, fetch_from_hub, fetch_smollm2
from minipaged.models.fields import Fields
from minipaged.models.gpt2 import GPT2
from minipaged.models.head import Ends
from minipaged.models.llama import Llama
from minipaged.models.ranks import ALONE, Ranks
from minipaged.models.split import Split
from minipaged.models.weights import CACHE_SCALES, Checkpoint, Progress, read_weights
from minipaged.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from minipaged.models.gguf import GGUFCheckpoint

__all__ = [
    "Loaded", "ModelConfig", "ModelError", "Ranks", "Tokenizer", "load", "load_ends", "load_model", "open_checkpoint",
]  # fmt: skip

Model = Llama | GPT2

ARCHITECTURES: dict[str, type[Model]] = {"llama": Llama, "gpt2": GPT2}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Loaded:
    """A model with all that it takes to run it."""

    config: ModelConfig  # of the whole model, also where this is one rank of several: see `load`
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
    ranks: Ranks = ALONE,
) -> Loaded:
    """Load a model and its tokenizer.

    name_or_path: "smollm2" (fetched once, then kept), a folder, a .gguf file, or a hub id such as "gpt2".
    dtype: float32, bfloat16 or float16; the weights are converted to it.
    backend: who computes; by default `kernels.load("auto", device, dtype)`.
    quantization: "auto": small numbers stay what they are in the file, where the backend has products for them; "none":
    all become floats; "int8", "int4": matrices are rounded to 8 or 4 bits now, see `kernels.packed.quantize`.
    ranks: those that compute it together, each with its part of the weights. `config` is that of the whole model,
    `model.config` this rank's own; its vocab_size is the whole one's.
    Raises ModelError for anything that is wrong with the name, the files or their contents.
    """
    checkpoint = open_checkpoint(name_or_path)
    tokenizer = checkpoint.tokenizer()
    _add_end_of_text(checkpoint.config, tokenizer)
    config, model = load_model(checkpoint, dtype, device, progress, backend, quantization, ranks)
    tokenizer.eos_token_ids = config.eos_token_ids
    _give_back_memory()
    return Loaded(config, model, tokenizer, checkpoint.generation_config)


def _give_back_memory() -> None:
    """What loading took, and freed, goes back to the system: glibc keeps it for later, more than the model takes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


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
    ranks: Ranks = ALONE,
) -> tuple[ModelConfig, Model]:
    """The model alone, and the config of all of it. Names and shapes are checked before the first tensor is read."""
    if dtype not in DTYPES:
        raise ModelError(f"dtype must be one of {', '.join(map(str, DTYPES))}, not {dtype}")
    config = ModelConfig.from_hf(checkpoint.config)
    split = Split(config, ranks.rank, ranks.size)
    wanted = {stored: name for stored, name in _find_tensors(checkpoint, config).items() if split.keeps(name)}
    backend = backend or kernels.load("auto", device, dtype, cache_folder())
    weights = read_weights(checkpoint, wanted, dtype, torch.device(device), progress, backend, split, quantization)
    packed = any(isinstance(weight, kernels.Packed) for weight in weights.values())
    model = ARCHITECTURES[config.architecture](split.local, weights, backend, ranks)
    model.packed = packed
    return config, model


def load_ends(
    name_or_path: str | Path, dtype: torch.dtype, device: str | torch.device, backend: kernels.Backend,
    quantization: str = "auto",
) -> Ends:  # fmt: skip
    """The embedding and the output projection of a model, both whole: what a head needs beside one rank of several,
    which has only a share of each. Arguments as of `load`.
    """
    checkpoint = open_checkpoint(name_or_path)
    config = ModelConfig.from_hf(checkpoint.config)
    found = {name: stored for stored, name in _find_tensors(checkpoint, config).items()}
    names = ["transformer.wte.weight" if config.architecture == "gpt2" else "model.embed_tokens.weight"]
    names += [] if config.tie_word_embeddings else ["lm_head.weight"]
    wanted = {found[name]: name for name in names}
    weights = read_weights(checkpoint, wanted, dtype, torch.device(device), None, backend, Split(config), quantization)
    head = backend.linear(weights[names[1]]) if names[1:] else None
    return Ends(config, backend.dtype, backend.embedding(weights[names[0]]), head)


def _find_tensors(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, str]:
    """The tensors that the model takes: their names in the file, and its own. ModelError if any doesn't fit."""
    expected = ARCHITECTURES[config.architecture].tensor_shapes(config)
    names = checkpoint.names(expected)
    stored_as: dict[str, str] = {}
    for stored, name in names.items():
        if (other := stored_as.setdefault(name, stored)) != stored:
            raise ModelError(f"{checkpoint.path} has one tensor twice, as {other} and as {stored}: which one counts?")
    found = {name: checkpoint.shapes[stored] for stored, name in names.items()}
    optional = {name: shape for name, shape in found.items() if CACHE_SCALES.fullmatch(name) and shape in ((), (1,))}
    check_tensors(known := expected | optional, found, checkpoint.path)
    return {stored: name for stored, name in names.items() if name in known}
