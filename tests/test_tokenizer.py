"""Tokenizer, chat templates and the streaming detokenizer.

Oracles: transformers on the same GGUF file; the tokenizers package's own decode of all tokens at once.
"""

from types import SimpleNamespace

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from minipaged.models.fetch import fetch_smollm2
from minipaged.models.gguf import GGUFCheckpoint
from minipaged.text.detokenizer import HALF, StreamDecoder
from minipaged.text.tokenizer import Tokenizer

TEXTS = [
    "",
    "Hello, world! It's 3 o'clock; don't panic, we'll see.",
    "  leading and trailing  \n\n\t tabs\r\n\r\n mixed   runs    of space\u00a0\u2003.",
    "naïve café, ﷺ, 北京大学, まで, привет, العربية, हिन्दी, e\u0301 and é",
    "🎉 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ½ ² Ⅷ ٣٤",
    "def f(x):\n    return x**2  # snake_case CamelCase [] {} <tag> \\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|im_start",
]
DIGITS = ["12 345 6.78", "x1y22  333   4444\n5", "a 1", "1,000,000 and ½²Ⅷ٣"]
CHAT = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be terse."}, {"role": "user", "content": 'x < y & "z"\n'}],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"},
    ],
]


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    return GGUFCheckpoint(fetch_smollm2()).tokenizer()


@pytest.fixture(scope="session")
def oracle():
    """transformers' tokenizer of the same file. It does not know the word rule "smollm" (every digit apart,
    then GPT-2's words, as llama.cpp and the model's own tokenizer.json have it), so it is told.
    """
    from transformers import AutoTokenizer

    path = fetch_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    digits = pre_tokenizers.Digits(individual_digits=True)
    rest = tokenizer.backend_tokenizer.pre_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    return tokenizer


@pytest.fixture(scope="session")
def metaspace() -> Tokenizer:
    """A tokenizer as Llama 2 has it: ▁ for spaces, one of them before the text; bytes for the unknown."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += list("▁abcdehlorw,.é") + ["▁h", "he", "▁he", "ll", "llo", "▁w", "or", "▁wor", "ld", "▁▁"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "h"), ("▁h", "e"), ("h", "e"), ("l", "l"), ("ll", "o"), ("▁", "w"), ("o", "r")]
    merges += [("▁w", "or"), ("l", "d"), ("▁", "▁")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    to_text = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    backend.decoder = decoders.Sequence(to_text)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in pieces[:3]])
    return Tokenizer(backend)


def byte_tokenizer() -> Tokenizer:
    """Byte-level, with one token for each byte and no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


@pytest.mark.parametrize("text", TEXTS + DIGITS)
def test_encodes_as_transformers_does(smollm2, oracle, text):
    assert smollm2.encode(text) == oracle(text)["input_ids"]
    ids = smollm2.encode(text)
    assert smollm2.decode(ids) == oracle.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert smollm2.decode(ids, skip_special_tokens=False) == text


@given(st.text())
def test_encodes_any_text_as_transformers_does(smollm2, oracle, text):
    assert smollm2.encode(text) == oracle(text)["input_ids"]


@pytest.mark.parametrize("messages", CHAT)
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_template_as_transformers_renders_it(smollm2, oracle, messages, prompt):
    expected = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert smollm2.apply_chat_template(messages, add_generation_prompt=prompt) == expected


def test_facts_about_the_tokenizer(smollm2):
    assert smollm2.vocab_size == 49152
    assert smollm2.has_chat_template
    assert smollm2.special_ids == set(range(17))
    assert smollm2.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def test_template_helpers_match_transformers(smollm2, oracle):
    template = (
        "{%- for m in messages %}\n    {% if loop.index > 2 %}{% break %}{% endif %}\n"
        "{{ {'text': m.content, 'n': [1, 2]} | tojson }} {{ m | tojson(indent=2) }}\n{%- endfor %}"
        "{{ bos_token }}{{ tools is none }}{{ strftime_now('%Y') }}"
    )
    ours = Tokenizer(smollm2.backend, template, smollm2.special_tokens)
    for messages in CHAT:
        expected = oracle.apply_chat_template(messages, chat_template=template, tokenize=False)
        assert ours.apply_chat_template(messages) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception.__globals__['os'] }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update(role='x') }}", "unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "[Rr]ange too big"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% if %}", "[Ee]xpected"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)
def test_bad_templates_are_errors_and_nothing_else(smollm2, template, reason):
    with pytest.raises(ValueError, match=f"chat template failed: .*{reason}"):
        Tokenizer(smollm2.backend, template).apply_chat_template(CHAT[0])


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        None,
        ["hi"],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": 1, "content": ""}],
    ],
)
def test_malformed_messages_are_refused(smollm2, messages):
    with pytest.raises(ValueError, match="chat message"):
        smollm2.apply_chat_template(messages)


def test_the_template_is_compiled_once(smollm2, monkeypatch):
    compiled = []
    real = ImmutableSandboxedEnvironment.from_string
    monkeypatch.setattr(
        ImmutableSandboxedEnvironment, "from_string", lambda *a, **k: compiled.append(1) or real(*a, **k)
    )
    tokenizer = Tokenizer(smollm2.backend, smollm2.chat_template)
    assert len({tokenizer.apply_chat_template(CHAT[0]) for _ in range(3)}) == 1
    assert compiled == [1]


def test_generation_tags_are_rendered_as_transformers_does(smollm2, oracle):
    template = (
        "{% set n = 1 %}\n{%- for m in messages %}\n    {% generation %}\n{% set n = n + 1 %}{{ m.role }}{{ n }}"
        "{{ loop.index }}\n    {% endgeneration %}\n{{ n }}{%- generation -%} x {%- endgeneration %}{% endfor %}"
    )
    for messages in CHAT:
        expected = oracle.apply_chat_template(messages, chat_template=template, tokenize=False)
        assert Tokenizer(smollm2.backend, template).apply_chat_template(messages) == expected


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ude00\ud83d"])
def test_lone_surrogates_are_refused(smollm2, text):
    with pytest.raises(ValueError, match=r"the text has a lone surrogate, '\\ud...', at character \d: that is no text"):
        smollm2.encode(text)
    for message in ({"role": "user", "content": text}, {"role": text, "content": ""}):
        with pytest.raises(ValueError, match=r"chat message 1 has a lone surrogate, '\\ud...'"):
            smollm2.apply_chat_template([CHAT[0][0], message])
    assert smollm2.decode(smollm2.encode("😀")) == "😀"  # a whole pair is a character


def test_no_template_is_an_error_that_says_what_to_do(smollm2):
    with pytest.raises(ValueError, match="no chat template: give it plain text"):
        Tokenizer(smollm2.backend).apply_chat_template(CHAT[0])


def test_truncation_and_padding_of_the_file_are_switched_off(metaspace):
    backend = tokenizers.Tokenizer.from_str(metaspace.backend.to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    assert Tokenizer(backend).encode("he llo he llo") == metaspace.encode("he llo he llo")


def stream(tokenizer, ids, **options):
    decoder = StreamDecoder(tokenizer, **options)
    return [decoder.add(i) for i in ids] + [decoder.flush()]


def assert_streams_whole(tokenizer, ids, skip=True):
    pieces = stream(tokenizer, ids, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300)
@given(st.lists(st.integers(0, 49151), max_size=40), st.booleans())
def test_stream_equals_decode_for_any_tokens_byte_level(smollm2, ids, skip):
    assert_streams_whole(smollm2, ids, skip)


@settings(max_examples=300)
@given(st.lists(st.integers(0, 282), max_size=40), st.booleans())
@example([3 + 0xE2, 3 + 0x82, 3 + 0xAC, 3 + 0x80, 260], True)
def test_stream_equals_decode_for_any_tokens_metaspace(metaspace, ids, skip):
    assert_streams_whole(metaspace, ids, skip)


@settings(max_examples=300)
@given(st.binary(max_size=60))
@example(b"\x80" * 60)
@example("😀".encode())
@example(b"\xe2\x82" * 30)
@example(b"a" + b"\xf0\x9f\x98" * 20 + b"\x80z")
@example("\ufffd".encode() * 30)
def test_stream_equals_decode_for_broken_bytes(data):
    tokenizer = byte_tokenizer()
    for garbage in (b"", b"\x80" * 13, b"\x80" * 14, b"\x80" * 15):  # up to where the window is cut
        assert_streams_whole(tokenizer, byte_ids(tokenizer, garbage + data))


def byte_ids(tokenizer, data):
    """The tokens of single bytes; the letters that stand for bytes are GPT-2's."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    return [tokenizer.backend.token_to_id(letters[byte]) for byte in data]


@given(st.text())
def test_stream_of_text_has_whole_characters_only(smollm2, metaspace, text):
    for tokenizer in (smollm2, metaspace, byte_tokenizer()):
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces = stream(tokenizer, ids, skip_special_tokens=False)
        decoded = tokenizer.decode(ids, skip_special_tokens=False)
        assert "".join(pieces) == decoded
        if HALF not in decoded:
            assert not any(HALF in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte():
    tokenizer = byte_tokenizer()
    assert stream(tokenizer, byte_ids(tokenizer, "a😀é!".encode())) == [
        "a",
        "",
        "",
        "",
        "😀",
        "",
        "é",
        "!",
        "",
    ]
    assert stream(tokenizer, byte_ids(tokenizer, b"a\xf0\x9f")) == ["a", "", "", HALF]
    assert stream(tokenizer, byte_ids(tokenizer, b"\xf0\x9fa\x80b")) == [
        "",
        "",
        HALF + "a",
        "",
        HALF + "b",
        "",
    ]


def test_byte_fallback_waits_for_the_end_of_the_run(metaspace):
    ids = [3 + byte for byte in "😀".encode()] + [metaspace.backend.token_to_id("a")]
    assert stream(metaspace, ids) == ["", "", "", "", "😀a", ""]


def test_text_continues_its_prompt(metaspace):
    prompt, more = metaspace.encode("hello"), metaspace.encode("world")
    assert stream(metaspace, more) == ["wor", "ld", ""]  # alone, the space before the first word is dropped
    assert stream(metaspace, more, prompt_ids=prompt) == [" wor", "ld", ""]
    assert stream(metaspace, more, prompt_ids=[*prompt, 1, 2]) == [
        " wor",
        "ld",
        "",
    ]  # special tokens say nothing


@given(st.lists(st.integers(259, 282), min_size=1, max_size=30), st.lists(st.integers(259, 282), max_size=20))
def test_prompt_and_stream_are_the_decode_of_both(metaspace, prompt, ids):
    whole, head = metaspace.decode(prompt + ids), metaspace.decode(prompt)
    assert "".join(stream(metaspace, ids, prompt_ids=prompt)) == whole[len(head) :]


def test_special_and_unknown_tokens_are_passed_over(smollm2):
    word = smollm2.encode("hello")
    assert "".join(stream(smollm2, [2, *word, 2, 99999, *word, 2])) == "hellohello"
    assert "".join(stream(smollm2, [*word, 2], skip_special_tokens=False)) == "hello<|im_end|>"


@pytest.mark.parametrize("data", [b"ab \x80\xf0", b"\x80", b"\xe2\x82", "é".encode(), b"\xe2"])
def test_work_per_token_does_not_grow(data):
    """Counts the tokens decoded, also for endless garbage."""
    tokenizer = byte_tokenizer()
    decoded = []
    counting = SimpleNamespace(
        decode=lambda ids, skip: decoded.append(len(ids)) or tokenizer.decode(ids, skip),
        is_silent=tokenizer.is_silent,
        byte_ids=set(),
    )
    ids = byte_ids(tokenizer, data * 1000)
    assert "".join(stream(counting, ids)) == tokenizer.decode(ids)
    assert sum(decoded) <= 60 * len(ids)
