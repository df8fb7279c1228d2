"""The tokenizer of a folder in Hugging Face layout: its tokenizer.json, or built from the files of older times.

    vocab.json, merges.txt     byte-level BPE (GPT-2, Qwen2); the rule that cuts words is the model's
    tokenizer.model            SentencePiece (Llama 2, Mistral)

Beside them: tokenizer_config.json, special_tokens_map.json and added_tokens.json, where transformers keeps which
tokens are special and how they are called, and chat_template.jinja.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from minipaged.models.fields import ModelError
from minipaged.models.sentencepiece_file import read_sentencepiece
from minipaged.text.byte_level import byte_level
from minipaged.text.sentencepiece import merges_by_score, sentencepiece
from minipaged.text.tokenizer import Tokenizer, TokenizerError
from minipaged.text.vocabulary import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Vocabulary
from minipaged.text.word_rules import WORD_RULES

Settings = dict[str, Any]

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")  # that chat templates use by name
# The class of the tokenizer, or failing that the model's type -> the rule for its vocab.json.
RULES = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2", "gpt2": "gpt-2", "qwen2": "qwen2", "qwen3": "qwen2"}
END_OF_TEXT = "<|endoftext|>"  # GPT-2's and Qwen2's, where nothing else is said


def read_tokenizer(path: Path, model_type: Any) -> Tokenizer:
    """path: the folder. Raises ModelError that says what is missing, damaged or not supported."""
    settings = _settings(path)
    try:
        template = _chat_template(path, settings)
        if (path / "tokenizer.json").is_file():
            return Tokenizer(Backend.from_file(str(path / "tokenizer.json")), template, _named(settings))
        if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            return _from_vocabulary(path, settings, model_type, template)
        if (path / "tokenizer.model").is_file():
            return _from_sentencepiece(path, settings, template)
    except ModelError:
        raise
    except TokenizerError as error:
        raise ModelError(f"{path}: {error}") from error
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"{path}/tokenizer.json or what belongs to it is damaged: {error}") from error
    raise ModelError(
        f"{path} has no tokenizer.json, no vocab.json with merges.txt, and no tokenizer.model: one of them must be "
        "there; where the model has one of another kind, transformers (with sentencepiece or tiktoken installed) "
        "converts it: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    )


def read_json(file: Path, missing_ok: bool = False) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelError naming the file."""
    if missing_ok and not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_bytes()).items())
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise ModelError(f"{file} does not hold a JSON object: {error}") from error


def _settings(path: Path) -> Settings:
    files = ("special_tokens_map.json", "tokenizer_config.json")
    older, newer = (read_json(path / name, missing_ok=True) for name in files)
    return older | newer


def _named(settings: Settings) -> dict[str, str]:
    named = {name: settings[name] for name in SPECIAL_TOKENS if settings.get(name)}
    return {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}


def _chat_template(path: Path, settings: Settings) -> str | None:
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text("utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list) and all({"name", "template"} <= {*entry} for entry in template):  # several
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        what = "must be text, or a list of {'name': text, 'template': text}"
        raise ModelError(f"{path}/tokenizer_config.json: chat_template {what}, not {template!r:.60}")
    return template


def _from_vocabulary(path: Path, settings: Settings, model_type: Any, template: str | None) -> Tokenizer:
    made_by = str(settings.get("tokenizer_class") or model_type).removesuffix("Fast")
    if made_by not in RULES:
        raise ModelError(
            f"{path}: vocab.json and merges.txt don't say how text is cut into words, and {made_by} is none of "
            f"{', '.join(RULES)}; a tokenizer.json says it"
        )
    if settings.get("add_prefix_space"):
        raise ModelError(f"{path}/tokenizer_config.json: add_prefix_space is not supported without tokenizer.json")
    stored = read_json(path / "vocab.json")
    tokens = sorted(stored, key=stored.__getitem__)
    if [stored[token] for token in tokens] != list(range(len(stored))):
        raise ModelError(f"{path}/vocab.json: its ids must be 0 to {len(stored) - 1}, each once")
    tokens, kinds = _with_added(path, settings, tokens, [NORMAL] * len(tokens))
    names = ["eos_token", "unk_token"] + ["bos_token"] * (RULES[made_by] == "gpt-2")
    default = dict.fromkeys(names if END_OF_TEXT in tokens else [], END_OF_TEXT)
    ids = _special_ids(tokens, kinds, default | _named(settings))
    add_bos = bool(settings.get("add_bos_token"))
    vocabulary = Vocabulary(tokens, kinds, ids.get("bos_token"), ids.get("eos_token"), add_bos, chat_template=template)
    merges = (path / "merges.txt").read_text("utf-8").split("\n")
    return byte_level(vocabulary, [m for m in merges if m and not m.startswith("#version")], WORD_RULES[RULES[made_by]])


def _from_sentencepiece(path: Path, settings: Settings, template: str | None) -> Tokenizer:
    file = read_sentencepiece(path / "tokenizer.model")
    merges = merges_by_score(file.vocabulary, file.scores)
    tokens, kinds = _with_added(path, settings, file.vocabulary.tokens, file.vocabulary.kinds)
    own = {"bos_token": file.vocabulary.bos_id, "eos_token": file.vocabulary.eos_id}
    ids = own | _special_ids(tokens, kinds, _named(settings))
    bos, eos = ids["bos_token"], ids["eos_token"]
    add_bos, add_eos = settings.get("add_bos_token", bos is not None), settings.get("add_eos_token")
    vocabulary = Vocabulary(tokens, kinds, bos, eos, bool(add_bos), bool(add_eos), template)
    prefix = settings.get("add_prefix_space")
    space_prefix = file.space_prefix if prefix is None else bool(prefix)
    return sentencepiece(vocabulary, merges, space_prefix, prefix_once=settings.get("legacy") is False)


def _with_added(path: Path, settings: Settings, tokens: list[str], kinds: list[int]) -> tuple[list[str], list[int]]:
    """Tokens and kinds, with those that were added to the vocabulary later."""
    tokens, kinds = tokens.copy(), kinds.copy()
    added = {i: {"content": token} for token, i in read_json(path / "added_tokens.json", missing_ok=True).items()}
    added |= {int(i): token for i, token in (settings.get("added_tokens_decoder") or {}).items()}
    for i, token in sorted(added.items()):
        if any(token.get(option) for option in ("lstrip", "rstrip", "single_word")):
            raise TokenizerError(f"the added token {token['content']!r:.60} needs a tokenizer.json: it takes in spaces")
        if i == len(tokens):
            tokens, kinds = [*tokens, token["content"]], [*kinds, NORMAL]
        if not 0 <= i < len(tokens) or tokens[i] != token["content"]:
            raise TokenizerError(f"the added token {token['content']!r:.60} can't have the id {i}")
        if kinds[i] != UNKNOWN:
            kinds[i] = CONTROL if token.get("special") else USER_DEFINED
    return tokens, kinds


def _special_ids(tokens: list[str], kinds: list[int], named: dict[str, str]) -> dict[str, int]:
    """Name -> id. The tokens become control tokens in kinds; those of bos and eos must be there."""
    ids = {name: tokens.index(token) for name, token in named.items() if token in tokens}
    for name in ("bos_token", "eos_token"):
        if name in named and name not in ids:
            raise TokenizerError(f"{name} {named[name]!r:.60} is not in the vocabulary")
    for i in ids.values():
        kinds[i] = UNKNOWN if kinds[i] == UNKNOWN else CONTROL
    return ids
