"""A small model folder in Hugging Face layout: random weights, and a token for each ASCII sign."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def make_folder(folder: Path, template: str | None = TEMPLATE, max_model_len: int = 4096) -> Path:
    """Write the model into `folder`. Its text has no line breaks; its end-of-text token hardly ever comes."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_model_len,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=95,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = {chr(code): code - 33 for code in range(33, 127)} | {
        "\u0120": 94,
        "<end>": 95,
    }  # U+0120: a space
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.add_special_tokens(["<end>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
