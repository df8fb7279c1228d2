"""Reads a model folder in Hugging Face layout; checks any checkpoint's tensors against what the model needs.

Weights are read from ``*.safetensors`` only: a pickle (``*.bin``, ``*.pt``) can run code when it is opened.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer as Backend

from minipaged.models.config import ModelError
from minipaged.models.fields import Fields
from minipaged.text.tokenizer import Tokenizer

Shape = tuple[int, ...]

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")  # that chat templates use by name
# Tensors that old exporters wrote although they can be computed: rope's frequencies and GPT-2's causal masks.
HARMLESS = re.compile(r"rotary_emb\.inv_freq$|\bh\.\d+\.attn\.(bias|masked_bias)$")


class FolderCheckpoint:
    """A folder with config.json, model.safetensors (or several, with an index), tokenizer.json and the like.

    config: config.json, with the end-of-text tokens of generation_config.json added.
    generation_config: generation_config.json, or {}.
    shapes: the shape of every tensor, by the name it has in the file.
    """

    def __init__(self, path: Path):
        self.path = path
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} has no config.json; a model folder has one, and *.safetensors")
        self.config = read_json(path / "config.json")
        self.generation_config = read_json(path / "generation_config.json", missing_ok=True)
        both = Fields(self.config), Fields(self.generation_config)
        eos = [i for fields in both for i in fields.token_ids("eos_token_id")]
        self.config["eos_token_id"] = list(dict.fromkeys(eos))
        self._files: dict[str, Any] = {}  # tensor name -> the open safetensors file that holds it
        for file in _weight_files(path):
            handle = _open_weights(file)
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                if name in self._files:
                    raise ModelError(f"{file}: tensor {name} is in another file of the folder, too")
                self._files[name] = handle
        self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}
        if "lm_head.weight" in self.shapes:  # stored, so used, whatever the config says: as transformers does
            self.config["tie_word_embeddings"] = False

    def names(self, expected: dict[str, Shape]) -> dict[str, str]:
        """Each tensor's name in the file -> the model's name for it. GPT-2's may lack their prefix."""
        known = {name.removeprefix("transformer."): name for name in expected}
        return {name: known.get(name.removeprefix("transformer."), name) for name in self.shapes}

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor, copied out of the file: another process may overwrite that while we run."""
        tensor = self._files[name].get_tensor(name)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ModelError(f"{self.path}: tensor {name} is {tensor.dtype}: quantized, not supported")
        return tensor.to(dtype, copy=True)

    def tokenizer(self) -> Tokenizer:
        file = self.path / "tokenizer.json"
        if not file.is_file():
            how = "transformers' AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes one"
            raise ModelError(f"{self.path} has no tokenizer.json; {how}")
        settings = read_json(self.path / "tokenizer_config.json", missing_ok=True)
        try:
            named = {name: settings[name] for name in SPECIAL_TOKENS if settings.get(name)}
            named = {name: t["content"] if isinstance(t, dict) else t for name, t in named.items()}
            template = settings.get("chat_template")
            if isinstance(template, list):  # several, with names
                template = {entry["name"]: entry["template"] for entry in template}.get("default")
            if (self.path / "chat_template.jinja").is_file():
                template = (self.path / "chat_template.jinja").read_text("utf-8")
            return Tokenizer(Backend.from_file(str(file)), template, named)
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(f"{file} or what belongs to it is damaged: {error}") from error


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if not index.is_file():
        raise ModelError(
            f"{path} has no model.safetensors. Pickles such as pytorch_model.bin can run code and are never "
            "opened; transformers' from_pretrained(folder), then save_pretrained(folder) converts them"
        )
    names = set(Fields(read_json(index).get("weight_map"), "weight_map").values.values())
    for name in names:
        if Path(str(name)).name != name or not (path / name).is_file() or not name.endswith(".safetensors"):
            raise ModelError(f"{index} names {name!r:.60}, which is no .safetensors file in this folder")
    return sorted(path / name for name in names)


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


def read_json(file: Path, missing_ok: bool = False) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelError naming the file."""
    if missing_ok and not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_bytes()).items())
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise ModelError(f"{file} does not hold a JSON object: {error}") from error


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
