"""Tokenizer and chat templates. Oracle: transformers on the same GGUF file."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from small_tokenizers import metaspace_tokenizer
from tokenizers import pre_tokenizers

from minipaged.models.fetch import fetch_smollm2
from minipaged.models.gguf import GGUFCheckpoint
from minipaged.text.tokenizer import LONG, Tokenizer

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
    return metaspace_tokenizer()


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


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_a_long_text_has_the_same_tokens(smollm2, kind):
    """It takes another way, on which other threads may run."""
    tokenizer = smollm2 if kind == "byte level" else metaspace_tokenizer()
    text = "".join(TEXTS) * 60
    assert len(text) > LONG
    for special in (True, False):
        assert tokenizer.encode(text, special) == tokenizer.backend.encode(text, add_special_tokens=special).ids
