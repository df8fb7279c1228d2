"""The folder: a model in Hugging Face layout whose matrices are packed as compressed-tensors has it.

vLLM and transformers read this format (`pack-quantized`) with one small package, whatever the method was. Instead of
`X.weight` there are

    X.weight_packed      int32 [out, in bits / 32]; codes along a row, the first in the lowest bits
    X.weight_scale       [out, groups]
    X.weight_zero_point  int32 [out bits / 32, groups], asymmetric only; codes along a column
    X.weight_shape       int64 [2]: out, in

Readers take 2^(bits - 1) from codes and from zero points before anything else; in the difference it cancels.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from kernels.packed import Packed, Weight
from minipaged.models import Checkpoint
from minipaged.models.checkpoint import FolderCheckpoint
from minipaged.models.config import ModelError
from minipaged.quantization.rtn import Grid

COPIED = (  # of a folder: its tokenizer, in any of its forms, and how it likes to be sampled
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model", "generation_config.json",
)  # fmt: skip
CLASSES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip


def sixteen_bits(config: dict[str, Any]) -> torch.dtype:
    """In what all that is not quantized is kept, and scales: bf16 if the model is, else fp16, which is finer."""
    named = str(config.get("dtype") or config.get("torch_dtype"))
    return torch.bfloat16 if named == "bfloat16" else torch.float16


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which gets its name at the end; if anything fails, nothing is left.

    FileExistsError if there is something of that name.
    """
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists already: nothing is overwritten")
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        folder.chmod(0o755)  # as any other new folder: mkdtemp's own can be entered by nobody else
        yield folder
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_model(
    folder: Path, checkpoint: Checkpoint, tensors: dict[str, Weight], method: str, grid: Grid
) -> None:
    """Everything into `folder`. ModelError if a tensor does not fit into sixteen bits."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Packed):
            stored |= packed_tensors(name.removesuffix(".weight"), tensor)
        else:
            stored[name] = tensor.to(grid.dtype).contiguous()
            if not stored[name].isfinite().all():
                raise ModelError(f"{checkpoint.path}: tensor {name} has numbers that {grid.dtype} does not have")
    file = folder / "model.safetensors"
    save_file(stored, file, {"format": "pt", "made by": f"minipaged.quantize, {method}"})
    file.chmod(0o644)  # as the others; safetensors lets only its owner read it
    _write_json(folder / "config.json", _config(checkpoint, grid))
    _write_tokenizer(folder, checkpoint)


def packed_tensors(name: str, packed: Packed) -> dict[str, Tensor]:
    """The tensors of one matrix, as the table above has them."""
    tensors = {
        f"{name}.weight_packed": pack_rows(packed.codes, packed.bits),
        f"{name}.weight_scale": packed.scale.contiguous(),
        f"{name}.weight_shape": torch.tensor(packed.codes.shape),
    }
    if isinstance(packed.zero, Tensor):
        tensors[f"{name}.weight_zero_point"] = pack_rows(packed.zero.T, packed.bits).T.contiguous()
    return tensors


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] -> int32 [rows, n bits / 32, rounded up]; the first code stands in the lowest bits.

    >>> [f"{word:08x}" for word in pack_rows(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]]), 4).tolist()[0]]
    ['07654321']
    """
    each = 32 // bits
    codes = F.pad(codes, (0, -codes.shape[1] % each)).view(len(codes), -1, each).long()
    words = (codes << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


def _config(checkpoint: Checkpoint, grid: Grid) -> dict[str, Any]:
    kept = {name: value for name, value in checkpoint.config.items() if value is not None and name != "torch_dtype"}
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size == -1 else "group",
        "group_size": None if grid.group_size == -1 else grid.group_size,
        "dynamic": False,
        "actorder": None,  # the order in which columns were rounded is nothing that a reader must know
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {"architectures": [CLASSES[kept["model_type"]]], "hidden_act": "silu"} | kept | {
        "dtype": str(grid.dtype).removeprefix("torch."),
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group | {"format": "pack-quantized"}},
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
        },
    }


def _write_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    if isinstance(checkpoint, FolderCheckpoint):
        for name in COPIED:
            if (checkpoint.path / name).is_file():
                shutil.copyfile(checkpoint.path / name, folder / name)
        return
    tokenizer = checkpoint.tokenizer()
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    template = {} if tokenizer.chat_template is None else {"chat_template": tokenizer.chat_template}
    _write_json(folder / "tokenizer_config.json", settings | tokenizer.special_tokens | template)
    ids = {name: checkpoint.config[name] for name in ("bos_token_id", "eos_token_id")}
    _write_json(folder / "generation_config.json", {name: i for name, i in ids.items() if i is not None})


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
