"""What a caller may give as prompts and parameters: each form is meant, or refused by what it is."""

import array
import doctest
import re

import numpy as np
import pytest
import torch
from tiny_model import make_folder
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from minipaged import LLM, BeamSearchParams, SamplingParams
from minipaged.requests.sampling_params import Logprob
from minipaged.text import inputs
from minipaged.text.inputs import as_list, bad_word_ids, encode, kept_tokens, one_for_each
from minipaged.text.logprobs import with_text
from minipaged.text.tokenizer import Tokenizer

VOCAB = 96
CHAT = [{"role": "user", "content": "Hello"}]
IDS = [5, 0, 95]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(str(folder), num_blocks=64, block_size=4, debug=True)


@pytest.fixture(scope="module")
def tokenizer(folder):
    template = (folder / "chat_template.jinja").read_text()
    return Tokenizer(Backend.from_file(str(folder / "tokenizer.json")), template)


# ---- one or many -------------------------------------------------------------------------------------------------


DICTS = [{"prompt": "a"}, {"prompt_token_ids": [1]}, {"prompt": "b", "cache_salt": "s"}]
ONE = ["text", "", {"prompt": "a"}, {"role": "user"}, {}, b"bytes", 5, 5.5, None, {"a"}, np.int64(5)]
MANY = [[], ["a", "b"], [[5, 6], "a"], [CHAT, CHAT], DICTS, [{"prompt": "a"}, "b", [1], CHAT], [None, 5], [b"a"], [1.5]]


@pytest.mark.parametrize("one", ONE, ids=repr)
def test_one_prompt_that_is_no_list(one):
    [found] = as_list(one)
    assert found is one


@pytest.mark.parametrize("one", [IDS, tuple(IDS), np.array(IDS), torch.tensor(IDS), range(3), array.array("i", IDS)])
def test_one_prompt_of_token_ids(one):
    assert as_list(one) == [list(one)]
    assert [list(prompt) for prompt in as_list([one, one])] == [list(one)] * 2


@pytest.mark.parametrize("one", [CHAT, tuple(CHAT), [{"role": "x"}, "y"], [True, 2], [{}]], ids=repr)
def test_one_prompt_of_messages_or_nearly(one):
    assert as_list(one) == [list(one)]


@pytest.mark.parametrize("many", MANY, ids=repr)
def test_many_prompts(many):
    for given in (many, tuple(many), iter(many), (one for one in many), dict(enumerate(many)).values()):
        found = as_list(given)
        assert len(found) == len(many) and all(map(lambda one, other: one is other, found, many))


def test_arrays_of_two_dimensions_are_many_prompts():
    for given in (np.array([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 4]])):
        assert as_list(given) == [[1, 2], [3, 4]]


# ---- one prompt --------------------------------------------------------------------------------------------------


def test_every_form_of_a_prompt(tokenizer):
    hello = tokenizer.encode("Hello")
    rendered = tokenizer.apply_chat_template(CHAT)
    assert encode("Hello", tokenizer, VOCAB) == ("Hello", hello, None)
    for ids in (IDS, tuple(IDS), np.array(IDS), np.array(IDS, dtype=np.uint8), torch.tensor(IDS), array.array("q", IDS),
                [np.int64(5), torch.tensor(0), 95], iter(IDS)):  # fmt: skip
        found = encode(ids, tokenizer, VOCAB)
        assert found == (None, IDS, None) and found.token_ids is not ids
        assert [type(token) for token in found.token_ids] == [int] * 3
    chat = (rendered, tokenizer.encode(rendered, add_special_tokens=False), None)
    assert encode(CHAT, tokenizer, VOCAB) == encode(tuple(CHAT), tokenizer, VOCAB) == chat
    for prompt, want in (
        ({"prompt": "Hello"}, ("Hello", hello, None)),
        ({"prompt": "Hello", "cache_salt": "s"}, ("Hello", hello, "s")),
        ({"prompt": "Hello", "cache_salt": None}, ("Hello", hello, None)),
        ({"prompt_token_ids": IDS}, (None, IDS, None)),
        ({"prompt_token_ids": torch.tensor(IDS), "cache_salt": "t"}, (None, IDS, "t")),
        ({"prompt_token_ids": tuple(IDS), "prompt": "said to be"}, ("said to be", IDS, None)),
    ):
        assert encode(prompt, tokenizer, VOCAB) == want


def test_what_is_given_may_change_later(tokenizer):
    ids, inner = list(IDS), {"prompt_token_ids": list(IDS)}
    found = [encode(ids, tokenizer, VOCAB), encode(inner, tokenizer, VOCAB)]
    ids.append(7)
    inner["prompt_token_ids"].clear()
    assert [one.token_ids for one in found] == [IDS, IDS]


KINDS = "a prompt must be text, token ids or chat messages, not "
TOKEN = "in the prompt: must be an integer from 0 to 95"
BAD = [
    (b"abc", KINDS + "b'abc': decode it first"), (bytearray(b"a"), KINDS + "bytearray(b'a'): decode it first"),
    (memoryview(b"a"), KINDS + "<memory"), (5, KINDS + "5"), (5.5, KINDS + "5.5"), (None, KINDS + "None"),
    (np.float32(1), KINDS + "np.float32(1.0)"), ({"a"}, KINDS + "{'a'}: a set has no order"), (object, KINDS),
    ("", "the prompt is empty"), ([], "the prompt is empty"), ((), "the prompt is empty"),
    (np.array([], dtype=int), "the prompt is empty"), ({"prompt": ""}, "the prompt is empty"),
    ({"prompt_token_ids": []}, "the prompt is empty"),
    ([96], f"token id 96 {TOKEN}"), ([1, -1], f"token id -1 {TOKEN}"), ([True], f"token id True {TOKEN}"),
    ([1, 2.0], f"token id 2.0 {TOKEN}"), ([1, "a"], f"token id 'a' {TOKEN}"), (["a", "b"], f"token id 'a' {TOKEN}"),
    ([1, None], f"token id None {TOKEN}"), ([[1, 2]], f"token id [1, 2] {TOKEN}"), ([[CHAT]], "token id [[{"),
    (np.array([1.0]), f"token id 1.0 {TOKEN}"), (torch.tensor([True]), f"token id True {TOKEN}"),
    (np.array([[1, 2]]), f"token id [1, 2] {TOKEN}"), ([b"a"], f"token id b'a' {TOKEN}"),
    ([np.bool_(True)], "token id np.True_"), ([10**30], f"token id {10**30} {TOKEN}"),
    ("a\ud83d!", "character 1 of the text is half a surrogate pair: not valid Unicode"),
    ([{"role": "user", "content": "\ude00"}], "chat message 0 has a lone surrogate"),
    (CHAT[0], "a chat message stands in a list: give [{'role': ..., 'content': ...}]"),
    ({}, 'a dict must have "prompt" or "prompt_token_ids", not only []'),
    ({"cache_salt": "a"}, 'a dict must have "prompt" or "prompt_token_ids", not only [\'cache_salt\']'),
    ({"prompt": "a", "multi_modal_data": {}},
     "a prompt with 'multi_modal_data': a dict may have cache_salt, prompt, prompt_token_ids"),
    ({"prompt": b"a"}, '"prompt" must be text, not b\'a\''), ({"prompt": [1]}, '"prompt" must be text, not [1]'),
    ({"prompt_token_ids": "abc"}, '"prompt_token_ids" must be a list of integers, not \'abc\''),
    ({"prompt_token_ids": CHAT}, '"prompt_token_ids" must be a list of integers, not [{'),
    ({"prompt_token_ids": [96]}, f"token id 96 {TOKEN}"),
    ({"prompt": "a", "cache_salt": ""}, "cache_salt='': must be None or a string that is not empty"),
    ({"prompt": "a", "cache_salt": 5}, "cache_salt=5: must be"),
    ([{"role": "user"}], "chat message 0 must be"), ([*CHAT, "a"], "chat message 1 must be"),
    ([*CHAT, {"prompt": "a"}], "chat message 1 must be"),
    ([{"role": "user", "content": b"a"}], "chat message 0 must be"),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_prompt_is_refused_by_what_it_is(tokenizer, prompt, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        encode(prompt, tokenizer, VOCAB)


def test_a_long_mistake_is_not_shown_whole(tokenizer):
    with pytest.raises(ValueError) as error:
        encode([["a" * 10**6]], tokenizer, VOCAB)
    assert len(str(error.value)) < 200


# ---- messages of parts -------------------------------------------------------------------------------------------


def parts(*parts):
    return [{"role": "user", "content": list(parts), "name": "n"}]


def test_parts_of_text_are_joined(tokenizer):
    one, two = {"type": "text", "text": "one"}, {"type": "text", "text": "two"}
    assert encode(parts(one), tokenizer, VOCAB) == encode(parts("one"), tokenizer, VOCAB)
    assert encode(parts(one), tokenizer, VOCAB).text == "<user>one"
    given = parts(one, two)
    assert encode(given, tokenizer, VOCAB).text == "<user>one\ntwo" and given == parts(one, two)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "a part of type 'image_url': only text is read here"),
        ({"type": "input_audio"}, "a part of type 'input_audio': only text"),
        ({"type": "text"}, "{'type': 'text'}: only text"), ({"text": "a"}, "{'text': 'a'}: only text"),
        ({"type": "text", "text": None}, "{'type': 'text', 'text': None}: only text"), (5, "5: only text"),
    ],
)  # fmt: skip
def test_other_parts_are_refused(tokenizer, part, said):
    with pytest.raises(ValueError, match="^" + re.escape(f"chat message 1: {said}")):
        encode(CHAT + parts("fine", part), tokenizer, VOCAB)


# ---- parameters for each prompt ----------------------------------------------------------------------------------


def test_parameters_are_none_or_one_or_one_for_each():
    one, two = SamplingParams(n=2), BeamSearchParams(2)
    prompts = ["a", "b"]
    assert one_for_each(None, prompts) == [SamplingParams()] * 2
    assert one_for_each(one, prompts) == [one] * 2 and one_for_each(two, prompts) == [two] * 2
    for each in ([one, two], (one, two), iter([one, two])):
        assert one_for_each(each, prompts) == [one, two]
    assert one_for_each([], []) == one_for_each(None, []) == []
    for wrong, count in (([], 0), ((), 0), ([one], 1), ([one] * 3, 3)):
        with pytest.raises(ValueError, match=f"^2 prompts but {count} params: give one for all or one for each$"):
            one_for_each(wrong, prompts)
    for wrong, shown in ((5, "5"), ("ab", "'ab'"), ({"n": 2}, "{'n': 2}"), ([one, None], "None"), ([one, {}], "{}")):
        with pytest.raises(ValueError, match=f"^params must be SamplingParams or BeamSearchParams, not {shown}"):
            one_for_each(wrong, prompts)


# ---- bad words, and prompts that are cut -------------------------------------------------------------------------


def word_tokenizer(template=None):
    """Here "the" and " the" are a token each; "xy" and " xy" are x y and ␠ x y, so the space is a token of its own.

    A text begins with token 0, as the tokenizer has it.
    """
    words = ["t", "h", "e", "x", "y", "\u0120", "th", "the", "\u0120the", "\u0120t", "\u0120th", "he"]
    merges = [("t", "h"), ("th", "e"), ("\u0120", "the"), ("h", "e")]
    backend = Backend(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="t $A", special_tokens=[("t", 0)])
    return Tokenizer(backend, template)


def test_templates_write_special_tokens_themselves_and_see_all_of_a_message():
    tokenizer = word_tokenizer("{{ messages[0]['name'] }}{{ messages[0]['content'] }}")
    assert encode("the", tokenizer, 12).token_ids == [0, 7]
    assert encode([{"role": "user", "name": "x", "content": ["the"]}], tokenizer, 12) == ("xthe", [3, 7], None)


def test_bad_words_with_and_without_a_space():
    tokenizer = word_tokenizer()

    def ids(*words):
        return bad_word_ids(SamplingParams(bad_words=words), tokenizer)

    assert ids("the") == ids(" the") == [[7], [8]]
    assert ids("xy") == ids("  xy") == [[3, 4]]  # with the space it is one longer, and found behind it
    assert ids("xy", "the", "x") == [[3, 4], [7], [8], [3]]
    assert bad_word_ids(SamplingParams(), tokenizer) == bad_word_ids(BeamSearchParams(2), tokenizer) == []
    for nothing in (" ", "Q"):
        with pytest.raises(ValueError, match=re.escape(f"bad_words=['x', {nothing!r}]: {nothing!r} has no tokens")):
            ids("x", nothing)
    with pytest.raises(ValueError, match="half a surrogate pair"):
        ids("\ud800")


def test_a_prompt_may_be_cut_to_its_end(tokenizer):
    def kept(k, length=50):
        return kept_tokens(SamplingParams(truncate_prompt_tokens=k), length)

    assert [kept(None), kept(3), kept(99), kept(-1), kept(-1, 1)] == [None, 3, 99, 49, 1]
    assert kept_tokens(BeamSearchParams(2), 50) is None
    ids = list(range(90))
    for k, want in ((None, ids), (3, ids[-3:]), (90, ids), (99, ids), (1, [89])):
        assert encode(ids, tokenizer, VOCAB, k).token_ids == want
    found = encode("Hello", tokenizer, VOCAB, 2)
    assert found == ("Hello", tokenizer.encode("lo"), None)


def test_the_text_of_each_token_in_logprobs(tokenizer):
    told = {72: Logprob(-0.5, 1), 95: Logprob(-2.0, 7), 94: Logprob(-3.0, 9, "kept")}
    found = with_text(told, tokenizer)
    assert found == {72: Logprob(-0.5, 1, "i"), 95: Logprob(-2.0, 7, "<end>"), 94: Logprob(-3.0, 9, "kept")}
    assert list(found) == list(told)


# ---- the whole engine --------------------------------------------------------------------------------------------


def generate(llm, prompts, **wish):
    wish = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, **wish}
    return [output.outputs[0].token_ids for output in llm.generate(prompts, SamplingParams(**wish))]


def test_the_wishes_reach_the_sampler(llm):
    prompt = list(range(10, 40))
    [free] = generate(llm, prompt)
    text = llm.tokenizer.decode(free)
    assert [free] == generate(llm, {"prompt_token_ids": torch.tensor(prompt)}) == generate(llm, [np.array(prompt)])
    [allowed] = generate(llm, prompt, allowed_token_ids=[3, 4])
    assert set(allowed) <= {3, 4}
    assert generate(llm, prompt, logit_bias={50: 100}) == [[50] * 6]
    [without] = generate(llm, prompt, bad_words=[text[1:3]])
    assert without[:2] == free[:2] and without[2] != free[2]
    [other] = generate(llm, prompt, bad_words=[text[0]])
    assert free[0] not in other
    assert generate(llm, [1, 2, *prompt], truncate_prompt_tokens=len(prompt)) == [free]
    assert generate(llm, [prompt, prompt[:1]], seed=np.int64(5)) == [free, generate(llm, prompt[:1])[0]]


def test_a_salt_of_its_own(llm):
    prompt = [*range(50, 90)]

    def cached(prompts, **options):
        outputs = llm.generate(prompts, SamplingParams(max_tokens=1), **options)
        return [output.num_cached_tokens > 0 for output in outputs]

    assert cached({"prompt_token_ids": prompt, "cache_salt": "mine"}) == [False]
    assert cached([{"prompt_token_ids": prompt}, {"prompt_token_ids": prompt, "cache_salt": "other"}]) == [False] * 2
    assert cached({"prompt_token_ids": prompt, "cache_salt": "mine"}, cache_salt="third") == [True]
    assert cached(prompt, cache_salt="mine") == [True]


def test_no_parameters_for_prompts_are_refused(llm):
    with pytest.raises(ValueError, match="^2 prompts but 0 params"):
        llm.generate(["a", "b"], [])
    for wrong in ([], 0, {}):
        with pytest.raises(ValueError, match="^params must be SamplingParams or|^1 prompts but 0"):
            llm.add_request("a", wrong)
    with pytest.raises(ValueError, match="^prompt 1: token id 96 in stop_token_ids: must be an integer from 0 to 95"):
        llm.generate(["a", "b"], [SamplingParams(), SamplingParams(stop_token_ids=[96])])
    assert not llm.has_unfinished_requests


def test_the_examples_in_the_docstrings():
    found = doctest.testmod(inputs)
    assert found.failed == 0 and found.attempted > 0
