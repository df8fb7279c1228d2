"""A model in a GGUF file: weights (mostly quantized), config and tokenizer in one. See gguf_header.py.

The many block formats are left to the gguf package; what is here is the translation to Hugging Face's names.
"""

from pathlib import Path
from typing import Any

import gguf
import torch

from kernels import Packed, Weight
from minipaged.models.checkpoint import Shape
from minipaged.models.config import ModelError
from minipaged.models.gguf_blocks import take_apart
from minipaged.models.gguf_header import RawTensor, read_gguf
from minipaged.models.split import Part, cut
from minipaged.text.gguf_tokenizer import build_tokenizer
from minipaged.text.tokenizer import Tokenizer, TokenizerError

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
}
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
    "rope.dimension_count": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}
GPT2_KEYS = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
SCALING_KEYS = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
IGNORED = {"vocab_size", "rope.scaling.finetuned"}  # the embedding says the first; the other changes nothing
GPT2_POSITIONS = "position_embd.weight"  # is added, not multiplied
LLAMA3_FACTORS = "rope_freqs.weight"  # not a weight: the outcome of llama3's rope scaling


class GGUFCheckpoint:
    """A .gguf file, with the same attributes and methods as FolderCheckpoint.

    config: the metadata, as the dict that config.json would hold.
    shapes: the shape of every tensor, by the name it has in the file.
    """

    def __init__(self, path: Path):
        self.path, self.files = path, [path]
        self.metadata, self._tensors = read_gguf(path)
        self.architecture = str(self.metadata.get("general.architecture"))
        self.shapes = {n: raw.shape[::-1] if self._lies_across(n) else raw.shape for n, raw in self._tensors.items()}
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ModelError(f"{path}: architecture {self.architecture!r:.60} is not supported; {known} are")
        self.config = self._read_config()
        self.generation_config: dict[str, Any] = {}

    def _read_config(self) -> dict[str, Any]:
        ends = (self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        config: dict[str, Any] = {
            "model_type": self.architecture,
            "vocab_size": self.shapes.get("token_embd.weight", (None,))[0],
            "tie_word_embeddings": "output.weight" not in self.shapes,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": list(dict.fromkeys(i for i in ends if i is not None)),
        }
        keys = GPT2_KEYS if self.architecture == "gpt2" else LLAMA_KEYS
        scaling: dict[str, Any] = {}
        for key, value in self.metadata.items():
            architecture, _, key = key.partition(".")
            if architecture != self.architecture or key in IGNORED:
                continue
            target, name = (scaling, SCALING_KEYS[key]) if key in SCALING_KEYS else (config, keys.get(key))
            # Unknown, or one of those that must agree (such as the sizes of keys and values) and don't.
            if name is None or target.setdefault(name, value) != value:
                raise ModelError(f"{self.path}: {architecture}.{key}={value!r:.60} is not supported")
        if keys is LLAMA_KEYS:  # llama.cpp's defaults are not always transformers'
            config = {"num_key_value_heads": None, "head_dim": None, "sliding_window": None} | config
        if LLAMA3_FACTORS in self.shapes:
            scaling = self._llama3_scaling(config.get("rope_theta", 10000.0))
        return config | ({"rope_scaling": scaling} if scaling.get("rope_type", "none") != "none" else {})

    def _llama3_scaling(self, theta: float) -> dict[str, Any]:
        """Llama 3.1's rope scaling. GGUF holds what comes out of it: a divisor for each frequency [D/2]."""
        divisors = self._floats(LLAMA3_FACTORS, self._tensors[LLAMA3_FACTORS], torch.float32)
        factor, original = float(divisors.max()), 8192
        wavelength = 2 * torch.pi * theta ** (torch.arange(divisors.numel()) / divisors.numel())
        smooth = ((original / wavelength - 1) / (4 - 1)).clamp(0, 1)
        if not torch.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
            raise ModelError(f"{self.path}: {LLAMA3_FACTORS} is not llama3's scaling, the only one supported")
        scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        return scaling | {"original_max_position_embeddings": original}

    def names(self, expected: dict[str, Shape]) -> dict[str, str]:
        """Each tensor's name in the file -> the model's name for it."""
        layers = self.config[(GPT2_KEYS if self.architecture == "gpt2" else LLAMA_KEYS)["block_count"]]
        table = gguf.get_tensor_name_map(ARCHITECTURES[self.architecture], layers)
        known = {table.get_name(name, (".weight", ".bias")): name for name in expected}
        return {name: known.get(name, name) for name in self.shapes if name != LLAMA3_FACTORS}

    def tensor(self, name: str, dtype: torch.dtype, part: Part | None = None) -> Weight:
        """The tensor, or a part of it, its rows in the order that Hugging Face has: packed if kernels may know its
        type, else floats.
        """
        raw, rest = self._tensors[name], None
        if part is not None:
            raw, rest = raw.part(Part(1 - part.axis, part.ranges) if self._lies_across(name) else part)
        packed = take_apart(raw.kind.name, raw.rows) if name != GPT2_POSITIONS else None
        weight: Weight = self._floats(name, raw, dtype) if packed is None else packed
        weight = cut(weight, rest) if rest else weight
        if packed is not None and not packed.is_finite():
            raise ModelError(f"{self.path}: tensor {name} has a scale that is infinite or no number")
        if self._lies_across(name):
            return weight.t()
        if self.architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
            order = self._undo_permutation(torch.arange(weight.shape[0]), name)
            return weight.rows(order) if isinstance(weight, Packed) else weight[order]
        return weight

    def _floats(self, name: str, raw: RawTensor, dtype: torch.dtype) -> torch.Tensor:
        try:
            weights = gguf.dequantize(raw.rows, raw.kind)
        except NotImplementedError as error:
            raise ModelError(f"{self.path}: tensor {name} has type {raw.kind.name}: can't be read") from error
        return torch.from_numpy(weights if weights.flags.writeable else weights.copy()).to(dtype)

    def _lies_across(self, name: str) -> bool:
        """Whether Hugging Face has this matrix as [in, out]: the four of each of GPT-2's layers."""
        return self.architecture == "gpt2" and name.startswith("blk.") and len(self._tensors[name].shape) == 2

    def _undo_permutation(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        """llama.cpp's rope turns the neighbours (0, 1), (2, 3), ...; Hugging Face's, and ours, (i, i + D/2).
        Its converter reordered the rows of each head accordingly; this orders them back, of whole heads.
        """
        heads = self.config["num_attention_heads"]
        heads = heads if ".attn_q." in name else self.config["num_key_value_heads"] or heads
        half = self.shapes[name][0] // heads // 2
        return rows.view(-1, half, 2).transpose(1, 2).flatten()

    def tokenizer(self) -> Tokenizer:
        try:
            return build_tokenizer(self.metadata)
        except TokenizerError as error:
            raise ModelError(f"{self.path}: {error}") from error
