"""A model in a GGUF file: weights (mostly quantized), config and tokenizer in one. See gguf_header.py.

The many block formats are left to the gguf package; what is here is the translation to Hugging Face's names.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from minipaged.models.checkpoint import Shape
from minipaged.models.config import ModelError
from minipaged.models.gguf_header import read_header
from minipaged.models.gguf_tokenizer import build_tokenizer
from minipaged.models.tokenizer import Tokenizer

# Metadata keys, after "<architecture>.", and the names that Hugging Face has for them.
LLAMA_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "rope.scaling.type": "rope_scaling.rope_type",
    "rope.scaling.factor": "rope_scaling.factor",
    "rope.scaling.original_context_length": "rope_scaling.original_max_position_embeddings",
}
GPT2_KEYS = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
ARCHITECTURES = {"llama": LLAMA_KEYS, "qwen2": LLAMA_KEYS, "qwen3": LLAMA_KEYS, "gpt2": GPT2_KEYS}
IGNORED = {"vocab_size", "rope.scaling.finetuned"}  # the embedding's shape says the first, nothing depends on the other


class GGUFCheckpoint:
    """A .gguf file, with the same attributes and methods as FolderCheckpoint.

    config: the metadata, as the dict that config.json would hold.
    shapes: the shape of every tensor, by the name it has in the file.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.stat().st_size == 0:
            raise ModelError(f"{path} is empty")
        self._bytes = np.asarray(np.memmap(path, np.uint8, mode="r"))
        self.metadata, self._tensors = read_header(self._bytes.data, path)
        self.shapes = {name: info.shape for name, info in self._tensors.items()}
        self.architecture = str(self.metadata.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ModelError(f"{path}: architecture {self.architecture!r} is not supported; known are {known}")
        self.config = self._read_config()
        self.generation_config: dict[str, Any] = {}

    def _read_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {"model_type": self.architecture}
        config["vocab_size"] = self.shapes.get("token_embd.weight", (0,))[0]
        config["tie_word_embeddings"] = "output.weight" not in self._tensors
        config["bos_token_id"] = self.metadata.get("tokenizer.ggml.bos_token_id")
        config["eos_token_id"] = self._end_tokens()
        for key, value in self.metadata.items():
            architecture, _, key = key.partition(".")
            if architecture != self.architecture or key in IGNORED:
                continue
            name = ARCHITECTURES[architecture].get(key, "")
            if not name or config.setdefault(name, value) != value:  # unknown, or two that must agree don't
                raise ModelError(f"{self.path}: {architecture}.{key}={value!r:.60} is not supported")
        scaling = {name: config.pop(name) for name in list(config) if name.startswith("rope_scaling.")}
        if scaling.get("rope_scaling.rope_type", "none") != "none":
            config["rope_scaling"] = {name.partition(".")[2]: value for name, value in scaling.items()}
        if "rope_freqs.weight" in self._tensors:
            config["rope_scaling"] = self._llama3_scaling(config.get("rope_theta", 10000.0))
        return config

    def _end_tokens(self) -> list[int]:
        ids = (self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        return list(dict.fromkeys(i for i in ids if i is not None))

    def _llama3_scaling(self, theta: float) -> dict[str, Any]:
        """Llama 3.1's rope scaling. GGUF holds only what comes out of it, a divisor for each frequency [D/2]."""
        divisors = self.tensor("rope_freqs.weight")
        factor, original = float(divisors.max()), 8192
        wavelength = 2 * torch.pi * theta ** (torch.arange(divisors.numel()) / divisors.numel())
        smooth = ((original / wavelength - 1) / (4 - 1)).clamp(0, 1)
        if not torch.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
            raise ModelError(f"{self.path}: tensor rope_freqs.weight is not llama3's scaling; no other is supported")
        scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        return scaling | {"original_max_position_embeddings": original}

    def names(self, expected: dict[str, Shape]) -> dict[str, str]:
        """Each tensor's name in the file -> the name the model has for it."""
        architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        table = gguf.get_tensor_name_map(architecture, self.metadata[f"{self.architecture}.block_count"])
        known = {table.get_name(name, (".weight", ".bias")): name for name in expected}
        return {name: known.get(name, name) for name in self.shapes if name != "rope_freqs.weight"}

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as Hugging Face has it, dequantized to float32."""
        info = self._tensors[name]
        rows = self._bytes[info.start : info.end].reshape(*info.shape[:-1], info.row_bytes)
        try:
            weights = gguf.dequantize(rows, info.kind)
        except NotImplementedError as error:
            raise ModelError(f"{self.path}: tensor {name} has type {info.kind.name}, which can't be read") from error
        tensor = torch.from_numpy(weights if weights.flags.writeable else weights.copy())
        if self.architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
            return self._undo_permutation(tensor, "head_count" if ".attn_q." in name else "head_count_kv")
        if self.architecture == "gpt2" and tensor.dim() == 2 and name.startswith("blk."):
            return tensor.T.contiguous()  # Hugging Face's GPT-2 has Conv1D: [in, out]
        return tensor

    def _undo_permutation(self, tensor: torch.Tensor, heads_key: str) -> torch.Tensor:
        """llama.cpp's rope turns the neighbours (0, 1), (2, 3), ...; Hugging Face's, and ours, (i, i + D/2).
        Its converter reordered the rows of each head accordingly; this orders them back.
        """
        heads = self.metadata.get(f"llama.attention.{heads_key}", self.metadata["llama.attention.head_count"])
        return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    def tokenizer(self) -> Tokenizer:
        return build_tokenizer(self.metadata, self.path)
