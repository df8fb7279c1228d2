"""Where a text ends: stop strings, and what is held back for them. Oracle: brute force over the tokens' bytes."""

import random
import time

import pytest
from small_tokenizers import byte_ids, byte_tokenizer, metaspace_tokenizer, whole_text

from minipaged.models.fetch import fetch_smollm2
from minipaged.models.gguf import GGUFCheckpoint
from minipaged.requests.request import Request
from minipaged.requests.sampling_params import SamplingParams
from minipaged.requests.sequence import Sequence
from minipaged.text.detokenizer import HALF
from minipaged.text.sequence_text import SequenceText
from minipaged.text.texts import Texts

WORDS = ["hello", " hello", " world", "ll", "llo", "e", "\n", "\n\n", "é", "€", "🎉", "👍🏽", "北京", ".", "aaa", " "]


@pytest.fixture(scope="module")
def all_kinds():
    return [GGUFCheckpoint(fetch_smollm2()).tokenizer(), metaspace_tokenizer(), byte_tokenizer()]


def text_of(tokenizer, ids, stops, prompt=(), **options):
    """(the text, the stop string that ended it or None, how many tokens were read)."""
    params = SamplingParams(stop=stops, **options)
    text = SequenceText(tokenizer, list(prompt), params)
    for count, i in enumerate(ids, 1):
        stop = text.add(i, check_stops=count > params.min_tokens)
        if stop is not None:
            return text.shown(True), stop, count
    text.finish()
    return text.shown(True), None, len(ids)


def found_by_hand(tokenizer, ids, stops, min_tokens):
    """(start, end, stop, number of tokens) of the stop string that counts: whole texts are searched, all of them."""
    checked_to = len(whole_text(tokenizer, ids[:min_tokens]))
    for count in range(min_tokens + 1, len(ids) + 1):
        text = whole_text(tokenizer, ids[:count])
        ends = [(at + len(stop), at, stop) for stop in stops for at in range(len(text)) if text.startswith(stop, at)]
        if new := [found for found in ends if found[0] > checked_to]:
            end, start, stop = min(new)
            return start, end, stop, count
    return None


def held_by_hand(text, stops):
    """text without the longest ending that may begin a stop string."""
    for at in range(len(text)):
        if any(stop != text[at:] and stop.startswith(text[at:]) for stop in stops):
            return text[:at]
    return text


def draw_text(draw):
    """A text, and stop strings that are mostly in it, and mostly more than one."""
    text = "".join(draw.choices(WORDS, k=draw.randint(1, 12)))
    starts = [(draw.randrange(len(text)), draw.randint(1, 6)) for _ in range(draw.randint(1, 3))]
    stops = [text[at : at + length] + draw.choice(["", "", "#"]) for at, length in starts]
    return text, stops + draw.choice([[], ["\n"], ["never said"]])


def test_a_stop_string_counts_at_the_token_that_completes_it(all_kinds):
    draw, met = random.Random(1), 0
    for _ in range(500):
        text, stops = draw_text(draw)
        for tokenizer in all_kinds:
            ids = tokenizer.encode(text, add_special_tokens=False)
            least, keep = draw.choice([0, 0, draw.randint(0, len(ids))]), draw.random() < 0.5
            found = found_by_hand(tokenizer, ids, stops, least)
            start, end, stop, count = found or (None, None, None, len(ids))
            expected = tokenizer.decode(ids)[: end if keep else start], stop, count
            options = {"min_tokens": least, "max_tokens": 1000, "include_stop_str_in_output": keep}
            assert text_of(tokenizer, ids, stops, **options) == expected
            met += found is not None
    assert met > 700


def test_what_is_shown_is_never_taken_back_and_no_more_is_held_than_must_be(all_kinds):
    draw = random.Random(2)
    for _ in range(200):
        text, stops = draw_text(draw)
        for tokenizer in all_kinds:
            growing = SequenceText(tokenizer, [], SamplingParams(stop=stops))
            ids, lengths = tokenizer.encode(text, add_special_tokens=False), []
            for count, i in enumerate(ids, 1):
                stop = growing.add(i)
                if stop is not None:
                    break
                lengths.append(growing.shown_length(False))
                shown = held_by_hand(whole_text(tokenizer, ids[:count]), stops)
                assert growing.shown(False) == shown and lengths[-1] == len(shown)
            growing.finish()
            assert lengths == sorted(lengths) and all(n <= len(growing.shown(True)) for n in lengths)


def test_of_several_stop_strings_the_first_to_end_counts_and_then_the_longest(all_kinds):
    for tokenizer in all_kinds:
        ids = tokenizer.encode("hello")
        for stops, text, stop in (
            (["lo", "ell"], "h", "ell"),
            (["llo", "el", "hello"], "h", "el"),
            (["o", "lo", "llo", "xlo"], "he", "llo"),
            (["hello!", "o"], "hell", "o"),
        ):
            assert text_of(tokenizer, ids, stops)[:2] == (text, stop)
            assert text_of(tokenizer, ids, stops[::-1])[:2] == (text, stop)
    whole = byte_tokenizer(b"hello")  # all of it in one token, so that nothing else decides
    assert text_of(whole, [256], ["lo", "ell"])[:2] == text_of(whole, [256], ["ell", "lo"])[:2] == ("h", "ell")


def test_a_newline_in_bytes_stops_at_once(all_kinds):
    metaspace = all_kinds[1]
    a, *rest = byte_ids(metaspace, b"a\n\n\xe2\x82")
    assert text_of(metaspace, [a, *rest], ["\n"]) == ("a", "\n", 2)
    assert text_of(metaspace, [a, *rest], ["\n\n"]) == ("a", "\n\n", 3)
    assert text_of(metaspace, [a, *rest], ["\n\n\n"]) == ("a\n\n" + HALF * 2, None, 5)


def test_a_stop_string_on_the_last_of_min_tokens_does_not_count():
    """As in vLLM, which looks from the next token on; one that began before then counts."""
    tokenizer = byte_tokenizer()
    ids = byte_ids(tokenizer, b"ab..ab.")
    for least, expected in ((2, ("ab", ".", 3)), (3, ("ab.", ".", 4)), (4, ("ab..ab", ".", 7))):
        assert text_of(tokenizer, ids, ["."], min_tokens=least) == expected
    assert text_of(tokenizer, ids, ["b.."], min_tokens=3) == ("a", "b..", 4)

    text = SequenceText(tokenizer, [], SamplingParams(stop=[".", "never said"], min_tokens=3))
    assert [text.add(i, check_stops=False) for i in ids[:3]] == [None] * 3
    assert text.shown(False) == "ab."  # nor is it held back


@pytest.mark.parametrize("least", range(6))
def test_a_stop_string_behind_min_tokens_ends_the_sequence_there(least):
    """However many tokens come at once: those behind it were never there."""
    tokenizer, ended = byte_tokenizer(), []
    ids = byte_ids(tokenizer, b"......")
    seq = Sequence(ids[:1], seq_id=0, output_token_ids=ids.copy())
    params = SamplingParams(stop=".", min_tokens=least, max_tokens=9)
    texts = Texts(tokenizer, lambda request, seq, *why: ended.append(why))
    [output] = texts.answer(Request("0", 0, ids[:1], params, 9, sequences=[seq])).outputs
    assert (output.text, output.token_ids, ended) == ("." * least, ids[: least + 1], [("stop", ".")])


def test_a_character_that_a_prompt_began_may_be_a_stop_string(all_kinds):
    for tokenizer in all_kinds[1:]:
        *head, last = byte_ids(tokenizer, "a€".encode())
        assert text_of(tokenizer, [last], ["€"], prompt=head) == ("", "€", 1)


def test_bytes_held_back_are_given_out_at_the_end(all_kinds):
    for tokenizer in all_kinds[1:]:
        ids = byte_ids(tokenizer, b"a\xe2\x82")
        text = HALF * (2 if tokenizer.byte_values else 1)
        assert text_of(tokenizer, ids, None) == ("a" + text, None, 3)

        seq = Sequence([ids[0]], seq_id=0, output_token_ids=ids[:2])
        request = Request("0", 0, [ids[0]], SamplingParams(), 3, sequences=[seq])
        texts = Texts(tokenizer, lambda *stop: None)
        assert texts.answer(request).outputs[0].text == "a"
        seq.output_token_ids, seq.finish_reason = ids, "length"
        assert texts.answer(request).outputs[0].text == "a" + text


def test_a_silent_token_and_one_without_text_change_nothing(all_kinds):
    tokenizer = all_kinds[1]
    text = SequenceText(tokenizer, [], SamplingParams(stop=["b"]))
    assert [text.add(i, silent) for i, silent in zip(byte_ids(tokenizer, b"ab"), (False, True), strict=True)] == [
        None
    ] * 2
    assert text.add(1) is None and text.shown(True) == "a" and text.num_tokens == 3


def test_a_token_costs_what_it_adds_however_long_the_text_is():
    """Copying all of the text for each token would move 40 GB here."""
    tokenizer = byte_tokenizer(b"x" * 5000)
    text = SequenceText(tokenizer, [], SamplingParams(stop=["xy"]))
    started = time.process_time()
    for _ in range(4000):
        text.add(256)
        text.shown_length(False)
    assert time.process_time() - started < 3
    assert len(text.shown(False)) == 4000 * 5000 - 1
