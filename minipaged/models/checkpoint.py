"""Reads a model folder in Hugging Face layout; checks any checkpoint's tensors against what the model needs.

Weights are read from ``*.safetensors`` only: a pickle (``*.bin``, ``*.pt``) can run code when it is opened.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kernels.packed import Packed
from minipaged.models.fields import Fields, ModelError
from minipaged.models.folder_tokenizer import read_json, read_tokenizer
from minipaged.models.quantized import Header, Layer, find_layers, read_method
from minipaged.models.split import Part, cut
from minipaged.text.tokenizer import Tokenizer

Shape = tuple[int, ...]

MERGE = "merge it into its base model first, with peft's merge_and_unload(), and save that"
# Tensors that old exporters wrote although they can be computed: rope's frequencies and GPT-2's causal masks.
HARMLESS = re.compile(r"rotary_emb\.inv_freq$|\bh\.\d+\.attn\.(bias|masked_bias)$")


class FolderCheckpoint:
    """A folder with config.json, model.safetensors (or several, with an index) and a tokenizer.

    config: config.json, with the end-of-text tokens of generation_config.json added, without quantization_config.
    generation_config: generation_config.json, or {}.
    method: how weights are quantized, if they are.
    layers: the quantized ones, by the name of their weight.
    files: those that hold the weights.
    shapes: the shape of every tensor, by the name it has in the file. The tensors that make up a quantized weight are
    one here, under the name that it would have if it were not.
    """

    def __init__(self, path: Path):
        self.path = path
        if not (path / "config.json").is_file():
            what = _what_it_is(path) or "; a model folder has one, and *.safetensors"
            raise ModelError(f"{path} has no config.json{what}")
        self.config = read_json(path / "config.json")
        self.method = read_method(self.config, path)
        self.generation_config = read_json(path / "generation_config.json", missing_ok=True)
        both = Fields(self.config), Fields(self.generation_config)
        eos = [i for fields in both for i in fields.token_ids("eos_token_id")]
        self.config["eos_token_id"] = list(dict.fromkeys(eos))
        self._files: dict[str, Any] = {}  # tensor name -> the open safetensors file that holds it
        self.files = _weight_files(path)
        for file in self.files:
            handle = _open_weights(file)
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                if name in self._files:
                    raise ModelError(f"{file}: tensor {name} is in another file of the folder, too")
                self._files[name] = handle
        headers = {name: _header(file, name) for name, file in self._files.items()}
        self.shapes = {name: header.shape for name, header in headers.items()}
        self._gather_layers(headers)
        if wrapped := next((name for name in self.shapes if name.startswith("base_model.model.")), None):
            raise ModelError(f"{path}: its tensors are named as PEFT's are ({wrapped}): it is a LoRA adapter, or a "
                             f"model with one around it; {MERGE}")  # fmt: skip
        if "lm_head.weight" in self.shapes:  # stored, so used, whatever the config says: as transformers does
            self.config["tie_word_embeddings"] = False

    def _gather_layers(self, headers: dict[str, Header]) -> None:
        """What makes up a quantized layer becomes one weight, once all that is known without reading is checked."""
        found = find_layers(self.method, headers, self._read) if self.method else {}
        self.layers = {f"{name}.weight": layer for name, layer in found.items()}
        for name, layer in self.layers.items():
            assert self.method is not None
            for part in layer.headers:
                del self.shapes[f"{layer.name}.{part}"]
            self.shapes[name] = self.method.shape(layer)

    def names(self, expected: dict[str, Shape]) -> dict[str, str]:
        """Each tensor's name in the file -> the model's name for it. GPT-2's may lack their prefix."""
        known = {name.removeprefix("transformer."): name for name in expected}
        return {name: known.get(name.removeprefix("transformer."), name) for name in self.shapes}

    def _read(self, name: str, part: Part | None = None) -> torch.Tensor:
        """Copied out of the file: another process may overwrite that while we run."""
        return _pieces(self._files[name], name, part) if part else self._files[name].get_tensor(name).clone()

    def _quantized(self, layer: Layer, part: Part | None) -> torch.Tensor | Packed:
        """Read only as far as it is wanted, where the format lets us; else read whole, then cut."""
        assert self.method is not None
        places = part and self.method.places(layer, part.axis)
        narrow = layer.cut(places, part.ranges) if part and places else None
        if narrow:
            return self.method.weight(narrow)
        weight = self.method.weight(layer)
        return cut(weight, part) if part else weight

    def tensor(self, name: str, dtype: torch.dtype, part: Part | None = None) -> torch.Tensor | Packed:
        """The tensor, or a part of it, a copy; a quantized one packed, or in floats if kernels.packed has no form."""
        if name in self.layers:
            weight = self._quantized(self.layers[name], part)
            return weight if isinstance(weight, Packed) else weight.to(dtype)
        tensor = _pieces(self._files[name], name, part) if part else self._files[name].get_tensor(name)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ModelError(f"{self.path}: tensor {name} is {tensor.dtype}: quantized, which its config does not say")
        return tensor.to(dtype, copy=not part)

    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.path, self.config.get("model_type"))


def _header(file: Any, name: str) -> Header:
    entry = file.get_slice(name)
    return Header(tuple(entry.get_shape()), entry.get_dtype())


def _pieces(file: Any, name: str, part: Part) -> torch.Tensor:
    """A part of a tensor, a copy: no more of the file is read."""
    entry = file.get_slice(name)
    pieces = [entry[(slice(None),) * part.axis + (slice(r.start, r.stop),)] for r in part.ranges]
    return torch.cat(pieces, part.axis)


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if not index.is_file():
        raise ModelError(
            f"{path} has no model.safetensors{_what_it_is(path)}. Pickles such as pytorch_model.bin can run code and "
            "are never opened; transformers' from_pretrained(folder), then save_pretrained(folder) converts them"
        )
    names = Fields(read_json(index).get("weight_map"), "weight_map").values.values()
    for name in names:
        if not isinstance(name, str) or not name.endswith(".safetensors") or not (path / name).is_file():
            raise ModelError(f"{index} names {name!r:.60}, which is no .safetensors file in this folder")
        if Path(name).name != name:
            raise ModelError(f"{index} names {name!r:.60}, and shards must lie in the folder itself: move them there")
    return sorted(path / name for name in set(names))


def _what_it_is(path: Path) -> str:
    """What a folder seems to be that is no model in Hugging Face layout, as the end of a sentence; or nothing."""
    if (path / "adapter_config.json").is_file():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        return f": it is a LoRA adapter for {base!r:.80}, not a model; {MERGE}"
    if (path / "params.json").is_file() or list(path.glob("consolidated*")):
        return ": it is in the layout of Mistral's or Meta's own code (consolidated.*); get it in Hugging Face's"
    if files := sorted(path.glob("*.gguf")):
        return f": it holds GGUF files; name one of them, such as {files[0]}"
    for pattern in ("*/config.json", "*/*.safetensors"):
        if files := sorted(path.glob(pattern)):
            return f", but {files[0].parent} has {files[0].name}: name that folder, or move its files here"
    return ""


def _open_weights(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is broken: {_first_cut_tensor(file) or error}; fetch it again") from error


def _first_cut_tensor(file: Path) -> str | None:
    """Names the first tensor beyond the end of a truncated file. Layout: u64 length, JSON header, bytes."""
    size = file.stat().st_size
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        header = data.read(min(length, size))
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        ends = sorted((8 + length + entry["data_offsets"][1], name) for name, entry in entries.items())
    except (ValueError, LookupError, TypeError, AttributeError):
        return None  # the header itself is broken
    return next((f"it ends before the end of tensor {name}" for end, name in ends if end > size), None)


def check_tensors(expected: dict[str, Shape], found: dict[str, Shape], where: Path) -> None:
    """Raises a ModelError that names the missing, surplus and wrongly shaped tensors, if there are any.

    >>> try:
    ...     check_tensors({"a": (2, 3), "b": (4,)}, {"a": (2, 3), "c": (5,)}, Path("model"))
    ... except ModelError as error:
    ...     print(error)
    model does not fit its config: 1 tensor missing: b; 1 tensor not known to the model: c
    """
    both = [name for name in expected if name in found]
    wrong = [f"{n} is {found[n]} and should be {expected[n]}" for n in both if found[n] != expected[n]]
    surplus = [name for name in found if name not in expected and not HARMLESS.search(name)]
    problems = [
        _listed("missing", [name for name in expected if name not in found]),
        _listed("not known to the model", surplus),
        _listed("of the wrong shape", wrong),
    ]
    if any(problems):
        raise ModelError(f"{where} does not fit its config: " + "; ".join(filter(None, problems)))


def _listed(what: str, entries: list[str], limit: int = 5) -> str:
    if not entries:
        return ""
    more = f" and {len(entries) - limit} more" if len(entries) > limit else ""
    return f"{len(entries)} tensor{'s' * (len(entries) > 1)} {what}: {', '.join(entries[:limit])}{more}"
