"""Reads a model folder in Hugging Face layout, and checks any checkpoint's tensors against what a model needs.

Only ``*.safetensors`` files are ever opened for weights: a pickle (``*.bin``, ``*.pt``) runs code when it is read.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from minipaged.models.config import ModelError
from minipaged.models.tokenizer import Tokenizer, parse_backend

Shape = tuple[int, ...]

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
            raise ModelError(f"{path} has no config.json: a model folder needs one, with *.safetensors beside it")
        self.config = read_json(path / "config.json")
        self.generation_config = read_json(path / "generation_config.json", missing_ok=True)
        eos = _as_list(self.config.get("eos_token_id")) + _as_list(self.generation_config.get("eos_token_id"))
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
        """Each tensor's name in the file -> the name the model has for it. GPT-2 goes with and without its prefix."""
        known = {name.removeprefix("transformer."): name for name in expected}
        return {name: known.get(name.removeprefix("transformer."), name) for name in self.shapes}

    def tensor(self, name: str) -> torch.Tensor:
        tensor = self._files[name].get_tensor(name)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ModelError(f"{self.path}: tensor {name} is {tensor.dtype}; quantized folders are not supported")
        return tensor

    def tokenizer(self) -> Tokenizer:
        file = self.path / "tokenizer.json"
        if not file.is_file():
            raise ModelError(
                f"{self.path} has no tokenizer.json; with transformers, "
                f"AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes one"
            )
        settings = read_json(self.path / "tokenizer_config.json", missing_ok=True)
        special = {name: settings.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        special = {name: token["content"] if isinstance(token, dict) else token for name, token in special.items()}
        return Tokenizer(
            parse_backend(_read_text(file), str(file)),
            self._chat_template(settings.get("chat_template")),
            {name: token for name, token in special.items() if token is not None},
        )

    def _chat_template(self, template: Any) -> str | None:
        """From chat_template.jinja, else tokenizer_config.json: a string, or several with names."""
        file = self.path / "chat_template.jinja"
        if file.is_file():
            return _read_text(file)
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return template


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelError(f"{index}: {name!r} is not the name of a .safetensors file in this folder")
    else:
        names = ["model.safetensors"] if (path / "model.safetensors").is_file() else []
    if not names:
        pickles = [file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth")]
        raise ModelError(
            f"{path} has no model.safetensors and no model.safetensors.index.json"
            + f"; {sorted(pickles)[0]} is a pickle, which can run code, and is never opened: with transformers, "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) converts it" * bool(pickles)
        )
    for name in names:
        if not (path / name).is_file():
            raise ModelError(f"{path}: {name} is missing, but the index needs it")
    return [path / name for name in names]


def _open_weights(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is broken: {_first_cut_tensor(file) or error}; fetch or copy it again") from error


def _first_cut_tensor(file: Path) -> str | None:
    """Names the first tensor beyond the end of a truncated file. Layout: u64 length, JSON header, bytes."""
    data = file.open("rb")
    with data:
        length = int.from_bytes(data.read(8), "little")
        header = data.read(min(length, file.stat().st_size))
    try:
        entries = [(e["data_offsets"][1], name) for name, e in json.loads(header).items() if name != "__metadata__"]
        cut = sorted((end, name) for end, name in entries if 8 + length + end > file.stat().st_size)
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return f"it ends before the end of tensor {cut[0][1]}" if cut else None


def read_json(file: Path, missing_ok: bool = False) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelError naming the file."""
    if missing_ok and not file.is_file():
        return {}
    try:
        value = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} must hold a JSON object, not a {type(value).__name__}")
    return value


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error


def check_tensors(expected: dict[str, Shape], found: dict[str, Shape], where: Path) -> None:
    """Raises a ModelError that names the missing, surplus and wrongly shaped tensors, if there are any.

    >>> check_tensors({"a": (2, 3), "b": (4,)}, {"a": (3, 2), "c": (1,)}, Path("model"))
    Traceback (most recent call last):
    minipaged.models.config.ModelError: model does not fit its config: 1 tensor missing: b; 1 tensor not known to \
the model: c; 1 tensor of the wrong shape: a is (3, 2) and should be (2, 3)
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
