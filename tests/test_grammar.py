"""What a form allows next, against brute force over all tokens; and what is refused."""

import itertools
import os
import random
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from small_tokenizers import byte_ids, byte_tokenizer, metaspace_tokenizer, token_bytes

from minipaged.decoding import grammar as grammars
from minipaged.decoding.adjust import adjust
from minipaged.decoding.grammar import Grammars, Matcher, is_allowed
from minipaged.decoding.rejection import probabilities
from minipaged.decoding.sampling import sample
from minipaged.execution.masks import MaskMaker
from minipaged.requests.beam_search_params import BeamSearchParams
from minipaged.requests.sampling_params import BadLogits, Draw, SamplingParams
from minipaged.requests.structured_outputs import Mask, StructuredOutputsParams
from minipaged.scheduling.plan import ScheduledSequence

TOKENIZERS = {
    "byte-level": lambda: byte_tokenizer(b"ab", b"he", b"abc", b"a\xc3", b"\xa9l", b"lo w", b'{"', b"<s>"),
    "byte fallback": metaspace_tokenizer,
}


def texts(*parts):
    """All texts made of one of each part, as bytes."""
    return {"".join(chosen).encode() for chosen in itertools.product(*parts)}


def brackets(depth):
    return {"a"} | {f"({inner})b" for inner in brackets(depth - 1)} if depth else {"a"}


DEPTH = 12
# The form, and all texts of the language: of the infinite one, all that an output of DEPTH tokens can begin.
FORMS = {
    "regex": ({"regex": "(ab|he)?[a-c]{2}(é|l)?"}, texts(["", "ab", "he"], "abc", "abc", ["", "é", "l"])),
    "anchored": ({"regex": r"^\d?\w$"}, texts(["", *"0123456789"], "0123456789abcdefghijklmnopqrstuvwxyz"
                                                 "ABCDEFGHIJKLMNOPQRSTUVWXYZ_")),
    "choice": ({"choice": ["hello world", "hello", 'a "é"\n', "<s>", "ab", "/"]},
               {b"hello world", b"hello", 'a "é"\n'.encode(), b"<s>", b"ab", b"/"}),
    "gbnf": ({"grammar": 'root ::= "a" | "(" root ")b"'}, {text.encode() for text in brackets(DEPTH + 1)}),
    "lark": ({"grammar": 'start: "he" (x | y)\nx: /l{1,2}/\ny: "é" x?'},
             texts(["he"], ["l", "ll", "é", "él", "éll"])),
    "json": ({"json": {"type": "object", "properties": {"a": {"enum": ["b", 1]}}, "required": ["a"],
                       "additionalProperties": False}, "disable_any_whitespace": True},
             {b'{"a":"b"}', b'{"a":1}'}),
}  # fmt: skip


def check(mask, tokenizer, said, language, ends):
    """Every token is tried, with the bytes so far and its own: may a text begin so?"""
    allowed, going = ids_of(mask), [text for text in language if text.startswith(said)]
    if said in language:
        assert ends <= {*allowed}
    else:
        ends = ends & {2}
        assert 2 not in allowed
    ours = {token: token_bytes(tokenizer, token) for token in allowed if token not in ends}
    assert all(any(text.startswith(said + data) for text in going) for data in ours.values())
    tokens = [token for token in range(tokenizer.vocab_size) if token not in ends | tokenizer.special_ids]
    theirs = {data for token in tokens for data in [token_bytes(tokenizer, token)]
              if any(text.startswith(said + data) for text in going)}  # fmt: skip
    certain = os.path.commonprefix(going)[len(said) :]
    if certain:
        assert {*ours.values()} <= theirs and bool(ours) == bool(theirs)
    else:
        assert {*ours.values()} == theirs
    return bool(certain)


def ids_of(mask):
    assert mask.error is None
    return [token for token in range(8 * len(mask.bits)) if is_allowed(mask, token)]


@pytest.mark.parametrize("has_eos", [False, True])
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("form", FORMS)
def test_masks_are_what_brute_force_says(kind, form, has_eos):
    tokenizer, (asked, language), rng = TOKENIZERS[kind](), FORMS[form], random.Random(form)
    ends = frozenset([2, *byte_ids(tokenizer, b"w")])  # one is text
    compiler = Grammars(tokenizer.backend, tokenizer.vocab_size + 5, [2, 3] if has_eos else [])
    compiled = compiler.compile(StructuredOutputsParams(**asked))
    followed, whole, known, open_ones = Matcher(compiled), 0, [], 0
    while whole < 12:
        output: list[int] = []
        while len(output) < DEPTH:
            said = b"".join(token_bytes(tokenizer, token) for token in output)
            mask = followed.mask(output, ends)
            open_ones += not check(mask, tokenizer, said, language, ends)
            known.append((output.copy(), mask))
            other, its = rng.choice(known)  # it is asked for another output in between
            assert followed.mask(other, ends) == its == Matcher(compiled).mask(other, ends)
            going = [token for token in ids_of(mask) if token not in ends]
            if not going:
                assert ids_of(mask)  # only what ends it
                break
            output.append(rng.choice(going))
        whole += 1
    assert open_ones > 5


def test_behind_guesses_there_are_masks_as_far_as_they_are_allowed():
    tokenizer = byte_tokenizer()
    compiled = Grammars(tokenizer.backend, tokenizer.vocab_size).compile(StructuredOutputsParams(regex="abc*"))
    matcher, ids = Matcher(compiled), dict(zip("abcx", byte_ids(tokenizer, b"abcx"), strict=True))
    end = 3
    for guesses, count in (("", 1), ("bcc", 4), ("bxc", 2), ("xbc", 1), ("bcEc", 3), ("cb", 1)):
        tokens = [end if letter == "E" else ids[letter] for letter in guesses]
        masks = matcher.masks([ids["a"]], tokens, {end})
        assert len(masks) == count
        for place, mask in enumerate(masks):
            assert mask == Matcher(compiled).mask([ids["a"], *tokens[:place]], {end})


def test_an_output_that_the_grammar_can_not_have_has_an_error_and_the_next_one_has_none():
    tokenizer = byte_tokenizer()
    compiled = Grammars(tokenizer.backend, tokenizer.vocab_size).compile(StructuredOutputsParams(regex="ab"))
    matcher, (a, b) = Matcher(compiled), byte_ids(tokenizer, b"ab")
    good = matcher.mask([a], {0})
    assert matcher.mask([b], {0}).error and matcher.mask([b], {0}).error and matcher.mask([b, a], {0}).error
    assert matcher.mask([a], {0}) == good and ids_of(good) == [b]
    logits = torch.zeros(2, 256)
    draw = Draw(SamplingParams(), 0, 0, 1, [], [b], frozenset(), mask=matcher.mask([b], {0}))
    bad, fine = sample(logits, [draw, Draw(SamplingParams(), 0, 0, 1, [], [b], frozenset())])
    assert isinstance(bad, BadLogits) and bad.message.startswith("structured_outputs: ") and "\n" not in bad.message
    assert not isinstance(fine, BadLogits)


@pytest.mark.parametrize("rows", [[0], [1, 3], [0, 1, 2, 3]])
def test_a_mask_lies_over_its_own_row(rows):
    vocab, rng = 77, random.Random(len(rows))
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(0))
    chosen = {r: sorted(rng.sample(range(vocab), 9)) for r in rows}
    draws = []
    for r in range(4):
        bits = sum(1 << token for token in chosen.get(r, ())).to_bytes(12, "little")
        mask = Mask(bits) if r in chosen else None
        draws.append(Draw(SamplingParams(), r, 0, 50, [], [], frozenset(), mask=mask))
    before, adjusted = logits.clone(), adjust(logits, draws)
    for r in range(4):
        allowed = chosen.get(r, range(vocab))
        assert [t for t in range(vocab) if adjusted[r, t] == logits[r, t]] == [*allowed]
        assert adjusted[r].isneginf().sum() == vocab - len(allowed)
    assert torch.equal(before, logits)
    chances = probabilities(logits, draws)
    assert all((chances[r] > 0).nonzero().flatten().tolist() == chosen[r] for r in rows)
    by_ids = [replace(d, mask=None, params=SamplingParams(allowed_token_ids=chosen.get(d.seed))) for d in draws]
    assert sample(logits, draws) == sample(logits, by_ids)
    for r, drawn in enumerate(sample(logits, draws)):
        assert {token.token_id for token in drawn} <= set(chosen.get(r, range(vocab)))


def test_the_grammar_knows_no_token_that_the_tokenizer_has_not():
    tokenizer = byte_tokenizer()
    for vocab in (tokenizer.vocab_size - 9, tokenizer.vocab_size, tokenizer.vocab_size + 100):
        compiled = Grammars(tokenizer.backend, vocab).compile(StructuredOutputsParams(regex="(.|\n)*"))
        allowed = ids_of(Matcher(compiled).mask([], {1}))
        assert 1 in allowed and 100 < len(allowed) <= tokenizer.vocab_size and allowed[-1] < tokenizer.vocab_size
    assert grammars.END not in tokenizer.backend.get_vocab()


def test_matchers_are_kept_from_step_to_step_and_forgotten_with_their_sequences():
    tokenizer, maker = byte_tokenizer(), MaskMaker()
    compiler = Grammars(tokenizer.backend, tokenizer.vocab_size)
    one, other = (compiler.compile(StructuredOutputsParams(regex=form)) for form in ("ab", "ba"))
    a, b = byte_ids(tokenizer, b"ab")

    def step(*rows):
        """rows: (sequence, grammar, output, branch of)."""
        sequences = []
        for seq_id, compiled, output, branch_of in rows:
            draw = Draw(SamplingParams(), 0, 0, 1, [], output, frozenset([0]), grammar=compiled)
            sequences.append(ScheduledSequence(seq_id, "r", [1], 0, [0], [0], draw=draw, branch_of=branch_of))
        return {seq_id: ids_of(mask) for seq_id, [mask] in maker.start(sequences)().items()}

    assert step((1, one, [], None), (2, other, [], None), (3, None, [], None)) == {1: [a], 2: [b]}
    kept = maker._matchers[1]
    assert step((1, one, [a], None), (4, one, [a, b], 1)) == {1: [b], 4: [0]}
    assert maker._matchers == {1: kept}
    assert step((1, other, [], None)) == {1: [b]}  # a number may come again
    assert step((1, None, [], None)) == {} == maker._matchers


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "structured_outputs: nothing is given"),
        ({"json_object": False}, "structured_outputs: nothing is given"),
        ({"regex": "a", "choice": ["b"]}, "structured_outputs: regex and choice are given"),
        ({"json": {}, "json_object": True}, "structured_outputs: json and json_object are given"),
        ({"json": "{"}, r"structured_outputs.json='\{': must be a JSON schema"),
        ({"json": "[1]"}, "structured_outputs.json='.1.': must be"),
        ({"json": 5}, "structured_outputs.json=5: must be"),
        ({"json": {"a": {1}}}, "structured_outputs.json=.*not JSON serializable"),
        ({"json": {"a": float("nan")}}, "structured_outputs.json="),
        ({"json_object": "yes"}, "structured_outputs.json_object='yes': must be None, True or False"),
        ({"regex": ""}, "structured_outputs.regex='': must be"),
        ({"regex": 5}, "structured_outputs.regex=5: must be"),
        ({"regex": "\ud800"}, "structured_outputs.regex=.*half a surrogate"),
        ({"choice": []}, r"structured_outputs.choice=\[\]: must be"),
        ({"choice": [""]}, "structured_outputs.choice="),
        ({"choice": ["a", 5]}, "structured_outputs.choice="),
        ({"choice": {"a": 1}}, "structured_outputs.choice="),
        ({"grammar": b"root"}, "structured_outputs.grammar=b'root': must be"),
        ({"regex": "a", "disable_any_whitespace": True}, "structured_outputs: whitespace is JSON's"),
        ({"json_object": True, "disable_any_whitespace": 1}, "structured_outputs.disable_any_whitespace=1"),
        ({"rexeg": "a"}, "structured_outputs.rexeg: unknown; there are json,"),
        ({"structural_tag": "a"}, "structured_outputs.structural_tag: unknown"),
        ("a+", r"structured_outputs='a\+': must be None, StructuredOutputsParams or a dict"),
        (5, "structured_outputs=5: must be"),
    ],
)
def test_wrong_wishes_are_refused_by_name(asked, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        SamplingParams(structured_outputs=asked)


def test_wishes_are_kept_as_plain_data():
    schema = {"type": "object"}
    wish = SamplingParams(structured_outputs={"json": schema}).structured_outputs
    schema["type"] = "array"
    assert wish == StructuredOutputsParams(json='{"type": "object"}') and hash(wish) and wish.kind == "json"
    assert StructuredOutputsParams(choice=["b", "a"]).choice == ("b", "a")
    with pytest.raises(ValueError, match="^ignore_eos=True: not with structured_outputs"):
        SamplingParams(ignore_eos=True, structured_outputs=wish)
    with pytest.raises(TypeError, match="structured_outputs"):
        BeamSearchParams(2, structured_outputs=wish)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"json": {"type": "array", "uniqueItems": True}}, "structured_outputs.json: .*uniqueItems"),
        ({"json": {"x-guidance": {"lenient": True}, "not": {}}}, "structured_outputs.json: .*not"),
        ({"json": {"type": "colour"}}, "structured_outputs.json: .*colour"),
        ({"json": {"$ref": "file:///etc/passwd"}}, "structured_outputs.json: .*file:///etc/passwd"),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 2}}, "structured_outputs.json: Unsatisfiable"),
        ({"regex": "(?=a)b"}, "structured_outputs.regex: .*look-around"),
        ({"regex": "("}, "structured_outputs.regex: .*unclosed group"),
        ({"grammar": "start: nobody"}, "structured_outputs.grammar: .*unknown name: .nobody"),
        ({"grammar": 'root ::= "a'}, "structured_outputs.grammar: .*Unexpected end"),
        ({"grammar": "nothing of the kind"}, "structured_outputs.grammar: "),
        ({"json_object": True, "whitespace_pattern": "("}, "structured_outputs.json_object: "),
    ],
)
def test_what_can_not_be_compiled_is_refused_in_one_line(asked, said):
    compiler = Grammars(byte_tokenizer().backend, 256)
    with pytest.raises(ValueError, match=f"^{said}") as error:
        compiler.compile(StructuredOutputsParams(**asked))
    assert "\n" not in str(error.value) and len(str(error.value)) < 350


# ---- the compiler ---------------------------------------------------------------------------------------------------


def test_the_same_wish_is_compiled_once_and_the_oldest_is_forgotten(monkeypatch):
    monkeypatch.setattr(grammars, "MOST_COMPILED", 3)
    compiler = Grammars(byte_tokenizer().backend, 256)
    first, *others = [StructuredOutputsParams(regex=f"a{{{count}}}") for count in range(1, 6)]
    kept = compiler.compile(first)
    for other in others:
        compiler.compile(other)
        assert compiler.compile(StructuredOutputsParams(regex="a{1}")) is kept
    assert len(compiler._compiled) == 3 and compiler.compile(others[-1]) is compiler.compile(others[-1])
    forgotten = compiler.compile(others[0])
    assert ids_of(Matcher(forgotten).mask([], ())) == byte_ids(byte_tokenizer(), b"a")


def test_many_threads_may_compile():
    compiler, found, wrong = Grammars(byte_tokenizer().backend, 256), [], []

    def work(seed):
        try:
            for count in random.Random(seed).sample(range(1, 9), 8):
                found.append((count, compiler.compile(StructuredOutputsParams(regex=f"b{{{count}}}"))))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [b] = byte_ids(byte_tokenizer(), b"b")
    assert not wrong and len(found) == 64
    for count, compiled in found:
        assert ids_of(Matcher(compiled).mask([b] * count, {0})) == [0]


def test_llguidance_is_imported_by_who_needs_it():
    script = "import sys, minipaged.decoding.grammar, minipaged.text.intake\nprint('llguidance' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- what would cost others something -------------------------------------------------------------------------------

DEEP = {  # in a thread as they are by default, each of them ends the process
    "rules": {"grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(9000)) + 'r9000: "a"'},
    "schemas": {"json": {"$ref": "#/$defs/0", "$defs": {"5000": {"const": 1}} | {
        str(i): {"type": "array", "items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(4000)}}},
}  # fmt: skip
COMPILE = """
import sys; sys.path.insert(0, "tests")
from test_grammar import DEEP, Grammars, StructuredOutputsParams, byte_tokenizer
tokenizer = byte_tokenizer(b"<s>")
try:
    Grammars(tokenizer.backend, tokenizer.vocab_size, [0]).compile(StructuredOutputsParams(**DEEP[sys.argv[1]]))
except ValueError as error:
    print(error)
print("alive")
"""


@pytest.mark.parametrize("name", DEEP)
def test_a_grammar_in_a_grammar_in_a_grammar_does_not_end_the_process(name):
    done = subprocess.run([sys.executable, "-c", COMPILE, name], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("alive\n"), done.stderr


def test_a_grammar_that_is_too_long():
    tokenizer = byte_tokenizer(b"<s>")
    for asked in ({"regex": "a" * 300_000}, {"choice": ["a" * 1000 + str(i) for i in range(300)]}):
        with pytest.raises(ValueError, match=r"structured_outputs\.\w+: it has 30\d+ characters, and may have 262144"):
            Grammars(tokenizer.backend, tokenizer.vocab_size, [0]).compile(StructuredOutputsParams(**asked))


def test_nobody_waits_for_ever_for_one_that_is_not_done(monkeypatch):
    tokenizer, go_on, asked = byte_tokenizer(b"<s>"), threading.Event(), StructuredOutputsParams(regex="a")
    made = Grammars(tokenizer.backend, tokenizer.vocab_size, [0])
    make = grammars.Grammar
    monkeypatch.setattr(grammars, "SECONDS", 0.3)
    monkeypatch.setattr(grammars, "Grammar", lambda *args: go_on.wait(20) and make(*args))
    for _ in range(grammars.AT_A_TIME):
        with pytest.raises(ValueError, match=r"^structured_outputs\.regex: compiling it takes more than 0\.3 s"):
            made.compile(asked)
    with pytest.raises(ValueError, match=r"^structured_outputs\.regex: others are being compiled"):
        made.compile(asked)
    go_on.set()
    monkeypatch.setattr(grammars, "SECONDS", 20)
    assert made.compile(asked)
