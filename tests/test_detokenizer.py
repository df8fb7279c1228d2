"""The streaming detokenizer. Oracles: the tokenizers package's decode of all tokens at once; the tokens' bytes."""

import codecs
import random
from itertools import groupby
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_ids, byte_tokenizer, metaspace_tokenizer, token_bytes, whole_text

from minipaged.models.fetch import fetch_smollm2
from minipaged.models.gguf import GGUFCheckpoint
from minipaged.text.detokenizer import HALF, StreamDecoder
from minipaged.text.tokenizer import Tokenizer

CHARACTERS = [
    "a",
    " ",
    "\n",
    "é",
    "e\u0301",
    "北京",
    "まで",
    "हिन्दी",
    "ﷺ",
    "€",
    "🎉",
    "👩‍👩‍👧‍👦",
    "🇩🇪",
    "👍🏽",
    "𒐫",
    "hello",
    " world",
]


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return GGUFCheckpoint(fetch_smollm2()).tokenizer()


@pytest.fixture(scope="module")
def metaspace() -> Tokenizer:
    return metaspace_tokenizer()


@pytest.fixture(scope="module")
def all_kinds(smollm2, metaspace):
    return [smollm2, metaspace, byte_tokenizer()]


def stream(tokenizer, ids, **options):
    decoder = StreamDecoder(tokenizer, **options)
    return [decoder.add(i) for i in ids] + [decoder.flush()]


def assert_streams_whole(tokenizer, ids, skip=True):
    pieces = stream(tokenizer, ids, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


codecs.register_error("each", lambda error: (HALF * (error.end - error.start), error.end))


def fallback_text(tokenizer, ids, skip=True):
    """What the pieces of byte fallback should be: in each run of bytes, one U+FFFD for each that is broken."""
    told = [i for i in ids if not tokenizer.is_silent(i, skip)]
    text = ""
    for is_bytes, run in groupby(told, lambda i: i in tokenizer.byte_values):
        data = b"".join(token_bytes(tokenizer, i) for i in run)
        text += data.decode("utf-8", "each") if is_bytes else data.decode()
    return text.removeprefix(" ")


# --- any tokens -------------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.lists(st.integers(0, 49151), max_size=40), st.booleans())
def test_stream_equals_decode_for_any_tokens_byte_level(smollm2, ids, skip):
    assert_streams_whole(smollm2, ids, skip)


@settings(max_examples=300)
@given(st.lists(st.integers(0, 282), max_size=40), st.booleans())
@example([3 + 0xE2, 3 + 0x82, 3 + 0xAC, 3 + 0x80, 260], True)
def test_stream_of_any_tokens_with_byte_fallback(metaspace, ids, skip):
    text = "".join(stream(metaspace, ids, skip_special_tokens=skip))
    assert text == fallback_text(metaspace, ids, skip)
    if HALF not in text:
        assert text == metaspace.decode(ids, skip)


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


@settings(max_examples=300)
@given(st.lists(st.sampled_from([b"\xe2\x82", b"\x82\xac\xe2", b"\xac", b"\xf0", b"\x9f\x98\x80", b"a"]), max_size=60))
def test_tokens_that_end_and_begin_within_characters(parts):
    tokenizer = byte_tokenizer(b"\xe2\x82", b"\x82\xac\xe2", b"\x9f\x98\x80")
    ids = {token_bytes(tokenizer, i): i for i in range(tokenizer.vocab_size)}
    assert_streams_whole(tokenizer, [ids[part] for part in parts])


# --- whole characters, and at once ------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.one_of(st.text(), st.lists(st.sampled_from(CHARACTERS)).map("".join)))
def test_each_character_comes_with_its_last_byte_and_whole(all_kinds, text):
    for tokenizer in all_kinds:
        ids = tokenizer.encode(text, add_special_tokens=False)
        decoder, said = StreamDecoder(tokenizer), ""
        if HALF in tokenizer.decode(ids) or tokenizer.special_ids & {*ids}:
            continue
        for count, i in enumerate(ids, 1):
            said += decoder.add(i)
            assert said == whole_text(tokenizer, ids[:count])
        assert said == tokenizer.decode(ids) and decoder.flush() == ""


def test_broken_bytes_byte_level():
    tokenizer = byte_tokenizer()
    pieces = ["a", "", "", "", "😀", "", "é", "!", ""]
    assert stream(tokenizer, byte_ids(tokenizer, "a😀é!".encode())) == pieces
    assert stream(tokenizer, byte_ids(tokenizer, b"a\xf0\x9f")) == ["a", "", "", HALF]
    assert stream(tokenizer, byte_ids(tokenizer, b"\xf0\x9fa\x80b")) == ["", "", HALF + "a", "", HALF + "b", ""]


def test_broken_bytes_with_byte_fallback(metaspace):
    def pieces(data, *more):
        return stream(metaspace, byte_ids(metaspace, data) + list(more))

    a, special, space_h = (metaspace.backend.token_to_id(name) for name in ("a", "<s>", "▁h"))
    assert pieces("\n😀é".encode()) == ["\n", "", "", "", "😀", "", "é", ""]
    assert pieces("€".encode() + b"\x80", a) == ["", "", "€", HALF, "a", ""]  # decode() has four U+FFFD
    assert pieces(b"\xe2\x82\xe2\x82\xac") == ["", "", HALF * 2, "", "€", ""]
    assert pieces(b"\xf0\x9f", a) == ["", "", HALF * 2 + "a", ""]
    assert pieces(b"\xf0\x9f") == ["", "", HALF * 2]
    assert pieces(b"\x80", space_h) == [HALF, " h", ""]  # the text's first space, and not its first character
    assert pieces("\ufffda".encode()) == ["", "", HALF, "a", ""]  # written out: a character like others
    assert pieces(b"  ") == ["", " ", ""]
    broken = byte_ids(metaspace, "€".encode())
    assert stream(metaspace, [*broken[:2], special, broken[2]]) == ["", "", "", "€", ""]
    assert stream(metaspace, [*broken[:2], special, broken[2]], skip_special_tokens=False) == [
        "", "", HALF * 2 + "<s>", HALF, ""
    ]  # fmt: skip


def test_what_was_flushed_may_still_become_whole(all_kinds):
    for tokenizer in all_kinds[1:]:
        decoder = StreamDecoder(tokenizer)
        first, second, third = byte_ids(tokenizer, "€".encode())
        assert decoder.add(first) == "" and decoder.flush() == HALF
        assert decoder.flush() == "" and decoder.add(second) == "" and decoder.add(third) == "€"


def test_what_was_flushed_and_stays_broken_comes_once():
    tokenizer = byte_tokenizer()
    for garbage in range(20):  # up to where the window is cut
        *ids, second, a = byte_ids(tokenizer, b"\x80" * garbage + b"\xf0\x9fa")
        decoder = StreamDecoder(tokenizer)
        pieces = [*map(decoder.add, ids), decoder.flush(), decoder.add(second), decoder.add(a)]
        assert "".join(pieces) == tokenizer.decode([*ids, second, a])


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_text_continues_its_prompt(metaspace):
    prompt, more = metaspace.encode("hello"), metaspace.encode("world")
    assert stream(metaspace, more) == ["wor", "ld", ""]  # alone, the space before the first word is dropped
    assert stream(metaspace, more, prompt_ids=[1, 2, 1]) == ["wor", "ld", ""]  # special tokens say nothing
    for special in ([], [1, 2], [1] * 40, [999] * 40):
        assert stream(metaspace, more, prompt_ids=prompt + special) == [" wor", "ld", ""]


def test_a_prompt_may_end_anywhere_in_a_character(all_kinds):
    """What the output completes is the output's, at every cut of 80 random texts; special tokens don't matter."""
    draw, inside = random.Random(0), 0
    for _ in range(80):
        text = "".join(draw.choices(CHARACTERS, k=8))
        for tokenizer in all_kinds:
            ids = tokenizer.encode(text, add_special_tokens=False)
            for cut in range(len(ids)):
                head, special = (
                    whole_text(tokenizer, ids[:cut]),
                    draw.choice([[], [1]] if tokenizer.special_ids else [[]]),
                )
                inside += HALF in tokenizer.decode(ids[:cut])
                pieces = stream(tokenizer, ids[cut:], prompt_ids=ids[:cut] + special)
                assert head + "".join(pieces) == tokenizer.decode(ids)
                assert head + pieces[0] == whole_text(tokenizer, ids[: cut + 1])
    assert inside > 500


def test_bytes_that_a_prompt_leaves_broken_are_the_prompts(all_kinds):
    for tokenizer in all_kinds[1:]:
        prompt, [a] = byte_ids(tokenizer, b"a\xf0\x9f"), byte_ids(tokenizer, b"a")
        assert stream(tokenizer, [], prompt_ids=prompt) == [""]
        assert stream(tokenizer, [a], prompt_ids=prompt) == ["a", ""]
        assert stream(tokenizer, byte_ids(tokenizer, b"\xe2\x82"), prompt_ids=[a])[-1] == HALF * (
            2 if tokenizer.byte_values else 1
        )


def beyond(prompt_text, text, most):
    """What text has beyond the prompt's; up to so many U+FFFD at the prompt's end may have become something."""
    for half in range(most + 1):
        start = len(prompt_text) - half
        if text.startswith(prompt_text[:start]) and prompt_text[start:] == HALF * half:
            return text[start:]
    raise AssertionError("the prompt's text has changed")


@settings(max_examples=500)
@given(st.binary(max_size=30), st.binary(max_size=30))
@example(b"\xf0" * 20, b"\x80" * 20)
@example(b"\x80" * 20 + b"\xf0\x9f", b"\x98\x80a")
@example(b"a\xf0", b"\x9fa")
def test_any_prompt_and_stream_are_the_decode_of_both(metaspace, prompt, output):
    if "\ufffd".encode() in prompt + output:
        return  # written out it can't be told from a broken byte
    for tokenizer, text, most in (
        (byte_tokenizer(), lambda data: data.decode("utf-8", "replace"), 1),
        (metaspace, lambda data: data.decode("utf-8", "each").removeprefix(" "), 3),
    ):
        ids, prompt_ids = byte_ids(tokenizer, output), byte_ids(tokenizer, prompt)
        expected = beyond(text(prompt), text(prompt + output), most)
        assert "".join(stream(tokenizer, ids, prompt_ids=prompt_ids)) == expected


@given(st.lists(st.integers(259, 282), min_size=1, max_size=30), st.lists(st.integers(259, 282), max_size=20))
def test_prompt_and_stream_are_the_decode_of_both(metaspace, prompt, ids):
    whole, head = metaspace.decode(prompt + ids), metaspace.decode(prompt)
    assert "".join(stream(metaspace, ids, prompt_ids=prompt)) == whole[len(head) :]


def test_special_and_unknown_tokens_are_passed_over(smollm2):
    word = smollm2.encode("hello")
    assert "".join(stream(smollm2, [2, *word, 2, 99999, *word, 2])) == "hellohello"
    assert "".join(stream(smollm2, [*word, 2], skip_special_tokens=False)) == "hello<|im_end|>"


# --- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"ab \x80\xf0", b"\x80", b"\xe2\x82", "é".encode(), b"\xe2", b"\x82\xac\xe2"])
def test_work_per_token_does_not_grow(data):
    """Counts the tokens decoded, also for endless garbage and for characters that all lie across tokens."""
    tokenizer = byte_tokenizer(b"\x82\xac\xe2")
    decoded = []
    counting = SimpleNamespace(
        decode=lambda ids, skip: decoded.append(len(ids)) or tokenizer.decode(ids, skip),
        is_silent=tokenizer.is_silent,
        byte_values={},
    )
    for ids in (byte_ids(tokenizer, data * 1000), [256] * 1000):
        decoded.clear()
        assert "".join(stream(counting, ids)) == tokenizer.decode(ids)
        assert sum(decoded) <= 40 * len(ids)
