"""The whole engine, against transformers on the same weights, and against itself under every circumstance."""

import itertools
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from kernels.packed import floats
from minipaged import LLM, BeamSearchParams, RequestRefused, SamplingParams
from minipaged.execution import pool_size
from minipaged.models import Llama, ModelConfig, open_checkpoint

SENTENCES = ["the quick brown fox jumps over the lazy dog", "pages and blocks, blocks and pages", "a b c d e f"]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<end>{% endfor %}"
VOCAB, END, LENGTH = 320, 0, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama of strong opinions, with a byte-level BPE tokenizer of its own. Nearly all it says is ASCII."""
    folder = tmp_path_factory.mktemp("engine")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<end>", "<s>"]
    backend.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=END,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    printable = [t for t in range(VOCAB) if (text := backend.decode([t])) and text.isascii() and text.isprintable()]
    model.lm_head.weight.data *= 0.2
    model.lm_head.weight.data[printable] *= 10.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def oracle(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def make(folder):
    """make(**settings): an engine with small blocks, checked at every step."""
    return lambda path=folder, **settings: LLM(
        str(path), **{"block_size": 4, "num_blocks": 200, "max_num_seqs": 32, "debug": True, **settings}
    )


@pytest.fixture(scope="module")
def llm(make):
    return make()


PROMPTS = [[2 + (7 * i + 3 * k * k + k) % 94 for k in range(n)] for i, n in enumerate((1, 3, 4, 7, 12, 17, 30))]
GREEDY = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)


def generate(oracle, prompt, **options):
    """What transformers says after the prompt."""
    options = {"max_new_tokens": LENGTH, "do_sample": False, "pad_token_id": END, **options}
    inputs = torch.tensor([prompt])
    return oracle.generate(inputs, attention_mask=torch.ones_like(inputs), **options)


@pytest.fixture(scope="module")
def greedy(oracle):
    """The greedy tokens of all prompts, as transformers has them."""
    return [generate(oracle, p, eos_token_id=None)[0, len(p) :].tolist() for p in PROMPTS]


def tokens(outputs):
    return [[one.token_ids for one in output.outputs] for output in outputs]


def finish(llm):
    """Step to the end. Returns {request id: its last output}."""
    last = {}
    while llm.has_unfinished_requests:
        last.update({output.request_id: output for output in llm.step()})
    assert_empty(llm)
    return last


def assert_empty(llm):
    usage = llm.stats().memory
    assert usage.free == usage.num_blocks and usage.cpu_used == 0 and not llm.has_unfinished_requests
    assert not llm._texts and not llm._requests


# ---- greedy: the same tokens, whatever happens -------------------------------------------------------------------


def test_greedy_equals_transformers(llm, greedy):
    outputs = llm.generate(PROMPTS, GREEDY)
    assert tokens(outputs) == [[row] for row in greedy]
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        [one] = output.outputs
        assert output.finished and output.prompt_token_ids == prompt and output.prompt is None
        assert (one.finish_reason, one.stop_reason, one.index) == ("length", None, 0)
        whole = llm.tokenizer.decode(prompt + one.token_ids, skip_special_tokens=True)
        assert whole.endswith(one.text) and one.text == llm.tokenizer.decode(one.token_ids)
    assert len(set(map(tuple, greedy))) == len(PROMPTS) and max(len(set(row)) for row in greedy) > LENGTH // 2
    assert_empty(llm)


@pytest.mark.parametrize("block_size", [1, 2, 4, 16, 64])
def test_greedy_is_the_same_with_any_block_size(make, greedy, block_size):
    llm = make(block_size=block_size, num_blocks=-(-400 // block_size))
    assert tokens(llm.generate(PROMPTS, GREEDY)) == [[row] for row in greedy]
    assert_empty(llm)


@pytest.mark.parametrize("cache", ["none", "hash", "radix"])
@pytest.mark.parametrize(
    "mode, cpu, blocks, budget",
    [
        (mode, cpu, blocks, budget)
        for (mode, cpu), (blocks, budget) in itertools.product(
            [("recompute", 0), ("swap", None), ("swap", 6), ("auto", None)], [(14, 8), (14, 2048), (20, 33)]
        )
    ],
)
def test_greedy_is_the_same_when_memory_runs_out(make, greedy, mode, cpu, blocks, budget, cache):
    llm = make(
        num_blocks=blocks, num_cpu_blocks=cpu, preemption=mode, max_num_seqs=8, max_num_batched_tokens=budget,
        watermark=0.0, prefix_cache=cache,
    )  # fmt: skip
    outputs = llm.generate(PROMPTS, GREEDY)
    assert tokens(outputs) == [[row] for row in greedy]
    stats = llm.stats()
    assert stats.num_preemptions["swap" if mode == "swap" else "recompute"] > 0
    assert stats.memory.peak_used >= blocks - 1
    assert sum(output.metrics.num_preemptions for output in outputs) == sum(stats.num_preemptions.values())
    moved = stats.memory.swapped_out_blocks
    assert moved >= stats.memory.swapped_in_blocks >= (mode == "swap")  # what is still found is not moved back
    assert cache != "none" or moved == stats.memory.swapped_in_blocks
    again = moved - stats.memory.swapped_in_blocks + stats.prefixes.recovered
    assert (again > 0 and stats.memory.evicted > 0) == (cache != "none")
    assert mode != "swap" or cpu is None or stats.num_preemptions["recompute"] > 0  # swap space ran out
    assert_empty(llm)


def test_greedy_is_the_same_alone_together_and_staggered(llm, greedy):
    assert [tokens(llm.generate([prompt], GREEDY))[0][0] for prompt in PROMPTS] == greedy
    assert [one for [one] in tokens(llm.generate(PROMPTS[::-1], GREEDY))] == greedy[::-1]
    rng, last, ids = random.Random(1), {}, []
    for prompt in PROMPTS:
        ids.append(llm.add_request(prompt, GREEDY))
        for _ in range(rng.randrange(6)):
            last.update({output.request_id: output for output in llm.step()})
    last.update(finish(llm))
    assert [last[name].outputs[0].token_ids for name in ids] == greedy


def test_new_memory_is_poison(make):
    assert make(num_blocks=20).executor.runner.cache.isnan().all()


@pytest.mark.parametrize("move", ["copy_blocks", "move_blocks"])
def test_poison_shows_memory_that_was_not_moved(make, monkeypatch, move):
    llm = make(num_blocks=20, preemption="swap", watermark=0)
    params = SamplingParams(n=2, seed=1, max_tokens=20)
    llm.generate(PROMPTS[:5], params)
    usage = llm.stats().memory
    assert usage.copies > 0 and usage.swapped_in_blocks > 0
    monkeypatch.setattr(llm.executor.runner.backend, move, lambda *args: None)
    outputs = llm.generate(PROMPTS[:5], params)
    broken = [output for output in outputs if output.error]
    assert broken and all("NaN" in output.error for output in broken)
    assert all(any(o.finish_reason == "error" for o in output.outputs) for output in broken)
    assert_empty(llm)  # even so


@pytest.mark.parametrize("settings", [{"debug": False}, {"max_num_seqs": 1}, {"max_num_batched_tokens": 32}])
def test_greedy_is_the_same_with_any_setting(make, greedy, settings):
    assert tokens(make(**settings).generate(PROMPTS, GREEDY)) == [[row] for row in greedy]


def test_a_gpu_does_not_pin_all_memory_to_swap_to(monkeypatch):
    monkeypatch.setattr(pool_size, "free_memory", {"cpu": 400, "cuda": 9000}.__getitem__)
    assert pool_size.choose_num_cpu_blocks(None, 70, 10, "cpu") == 70  # taken only as they are used
    assert pool_size.choose_num_cpu_blocks(None, 70, 10, "cuda") == 10  # a quarter of 400 bytes
    assert pool_size.choose_num_cpu_blocks(None, 7, 10, "cuda") == 7
    assert [pool_size.choose_num_cpu_blocks(n, 70, 10, "cuda") for n in (0, 30, 99)] == [0, 30, 70]
    for device in ("cpu", "cuda"):  # what is computed again needs no room elsewhere
        assert [pool_size.choose_num_cpu_blocks(n, 70, 10, device, "recompute") for n in (None, 30)] == [0, 0]


def test_the_kv_pool_may_be_given_in_bytes(make, greedy):
    bytes_per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, kv heads, head size, bytes of a float
    llm = make(num_blocks=None, kv_cache_memory=30 * 4 * bytes_per_token + 5)
    assert llm.memory.num_blocks == 30 and llm.stats().block_bytes == 4 * bytes_per_token
    assert tokens(llm.generate(PROMPTS, GREEDY)) == [[row] for row in greedy]


# ---- samples -----------------------------------------------------------------------------------------------------


def test_seeded_samples_are_the_same_in_any_company(make, llm):
    params = [
        SamplingParams(n=1 + i % 3, temperature=0.5 + 0.3 * i, top_p=0.9, seed=i, max_tokens=16, ignore_eos=True)
        for i in range(len(PROMPTS))
    ]
    alone = [tokens(llm.generate([p], one))[0] for p, one in zip(PROMPTS, params, strict=True)]
    assert tokens(llm.generate(PROMPTS, params)) == alone
    assert len({tuple(row) for rows in alone for row in rows}) == sum(p.n for p in params)  # all different
    for mode in ("recompute", "swap"):
        tight = make(num_blocks=20, max_num_seqs=8, max_num_batched_tokens=9, preemption=mode, watermark=0)
        assert tokens(tight.generate(PROMPTS, params)) == alone
        assert tight.stats().num_preemptions[mode] > 3
        assert_empty(tight)


def test_the_engines_seed_decides_where_a_request_has_none(make):
    params = SamplingParams(max_tokens=8)
    first, second, other = (tokens(make(seed=s).generate(PROMPTS, params)) for s in (5, 5, 6))
    assert first == second != other


def test_samples_compute_the_prompt_once_and_share_it(make):
    llm, seen = make(), Counter()

    def watch(plan, output):
        seen["prompt"] += sum(len(s.token_ids) for s in plan.sequences if s.start < 17)
        seen["copies"] += len(plan.copies)
        seen["shared"] = max(seen["shared"], llm.stats().memory.shared)

    llm.observers.append(watch)
    [output] = llm.generate([PROMPTS[5]], SamplingParams(n=4, seed=1, max_tokens=6, ignore_eos=True))
    assert len(PROMPTS[5]) == 17 and seen == {"prompt": 17, "copies": 3, "shared": 5}
    assert [one.index for one in output.outputs] == [0, 1, 2, 3] and llm.stats().num_prompt_tokens == 17
    assert llm.stats().memory.peak_used == 4 + 4 * 2  # 4 full blocks together, and of the next 6 tokens 2 each
    assert_empty(llm)


# ---- beam search -------------------------------------------------------------------------------------------------


def beams(oracle, prompt, params, eos):
    width = params.beam_width
    out = generate(
        oracle, prompt, num_beams=width, num_return_sequences=width, max_new_tokens=params.max_tokens,
        length_penalty=params.length_penalty, early_stopping=params.early_stopping, eos_token_id=eos,
        return_dict_in_generate=True, output_scores=True, custom_generate=type(oracle)._beam_search,
    )  # fmt: skip
    lengths = (out.beam_indices >= 0).sum(1).tolist()
    rows = [row[len(prompt) :][:n] for row, n in zip(out.sequences.tolist(), lengths, strict=True)]
    return rows, out.sequences_scores.tolist()


@pytest.mark.parametrize("tight", [False, True])
def test_beam_search_equals_transformers_among_other_requests(make, oracle, greedy, tight):
    eos = [row[3] for row in greedy[:3]]  # tokens that the model likes
    llm = make(num_blocks=60, max_num_batched_tokens=40) if tight else make()
    prompts, params = [], []
    for width, penalty, early in zip(
        range(1, 9), (1.0, 0.5, 2.0, 1.0, 0.0, 1.0, -1.0, 1.5), (False, True, "never", False) * 2, strict=True
    ):
        prompts += [PROMPTS[width % 7], PROMPTS[(3 * width) % 7]]
        params.append(
            BeamSearchParams(
                width, max_tokens=14, length_penalty=penalty, early_stopping=early, stop_token_ids=eos, ignore_eos=True
            )
        )
        params.append(GREEDY if width % 2 else SamplingParams(n=2, seed=width, max_tokens=9))
    outputs = llm.generate(prompts, params)
    reasons = Counter()
    for prompt, output, one in zip(prompts, outputs, params, strict=True):
        if isinstance(one, BeamSearchParams):
            rows, scores = beams(oracle, prompt, one, eos)
            assert [o.token_ids for o in output.outputs] == rows, one
            assert [o.score for o in output.outputs] == pytest.approx(scores, abs=1e-4, rel=1e-5)
            assert all(o.cumulative_logprob <= 0 and o.index == i for i, o in enumerate(output.outputs))
            reasons.update((o.finish_reason, o.stop_reason in eos) for o in output.outputs)
        elif one is GREEDY:
            assert output.outputs[0].token_ids == greedy[PROMPTS.index(prompt)]
    assert set(reasons) == {("stop", True), ("length", False)} and min(reasons.values()) > 5
    assert (sum(llm.stats().num_preemptions.values()) > 0) == tight
    assert_empty(llm)


def test_the_n_best_beams_are_returned(llm):
    params = BeamSearchParams(4, max_tokens=8, ignore_eos=True)
    [whole], [best] = llm.generate([PROMPTS[5]], params), llm.generate([PROMPTS[5]], BeamSearchParams(4, 8, True, n=2))
    assert tokens([best])[0] == tokens([whole])[0][:2]
    assert [o.text for o in best.outputs] == [llm.tokenizer.decode(o.token_ids) for o in best.outputs]


# ---- where an output ends ------------------------------------------------------------------------------------------


def expected_stop(pieces, stop):
    """(number of tokens, text before the stop string) of an output whose tokens add these pieces of text."""
    text = ""
    for count, piece in enumerate(pieces, 1):
        text += piece
        if stop in text:
            return count, text[: text.index(stop)]
    raise AssertionError(f"{stop!r} does not occur")


def test_stop_strings_cut_exactly_also_across_tokens(llm, greedy):
    prompt, row = PROMPTS[5], greedy[5]
    text = llm.tokenizer.decode(row)
    pieces = [llm.tokenizer.decode([token]) for token in row]
    assert "".join(pieces) == text and text.isascii()
    stops = sorted({text[i : i + length] for length in (1, 2, 3, 5, 8) for i in range(0, len(text) - length, 3)})
    for keep in (False, True):
        params = [
            SamplingParams(
                temperature=0, max_tokens=LENGTH, ignore_eos=True, stop=[stop, "never said"],
                include_stop_str_in_output=keep,
            )
            for stop in stops
        ]  # fmt: skip
        crossing = 0
        for stop, output in zip(stops, llm.generate([prompt] * len(stops), params), strict=True):
            [one], (count, before) = output.outputs, expected_stop(pieces, stop)
            assert one.text == before + (stop if keep else ""), stop
            assert (one.finish_reason, one.stop_reason) == ("stop", stop)
            assert one.token_ids == row[:count]  # with all of the token that completed it
            crossing += not any(stop in piece for piece in pieces)
        assert crossing > 10
    assert_empty(llm)


def test_a_stop_string_counts_on_the_last_token_too(llm, greedy):
    text = llm.tokenizer.decode(greedy[5][:6])
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, stop=text[-2:])
    [one] = llm.generate(PROMPTS[5], params)[0].outputs
    assert (one.text, one.finish_reason, one.stop_reason) == (text[:-2], "stop", text[-2:])


def test_stop_strings_wait_for_min_tokens(llm, greedy):
    text = llm.tokenizer.decode(greedy[5])
    pieces = [llm.tokenizer.decode([token]) for token in greedy[5]]
    letter = next(letter for letter in text if text.count(letter) > 2)
    places = [count for count, piece in enumerate(pieces, 1) if letter in piece]
    for least in (0, places[0] - 1, places[0], places[1] - 1, places[1]):
        params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True, stop=letter, min_tokens=least)
        [one] = llm.generate(PROMPTS[5], params)[0].outputs
        assert len(one.token_ids) == next(place for place in places if place > least)  # as in vLLM


def test_streamed_text_never_shrinks_nor_shows_what_is_cut_later(llm, greedy):
    text = llm.tokenizer.decode(greedy[5])
    stop = text[9:14]
    prompts = PROMPTS + [PROMPTS[5]] * 2
    params = [
        *[SamplingParams(n=2, seed=i, max_tokens=LENGTH, stop=["e", "th", ", "]) for i in range(len(PROMPTS))],
        SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True, stop=stop),
        SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True, stop=text[9:13] + "#"),  # only nearly
    ]
    history: dict[str, list] = {}
    for output in llm.stream(prompts, params):
        history.setdefault(output.request_id, []).append(output)
    assert len(history) == len(prompts)
    for outputs in history.values():
        assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
        for one in outputs[-1].outputs:
            shown = [o.outputs[one.index].text for o in outputs]
            assert all(new.startswith(old) for old, new in itertools.pairwise(shown))  # so all begin the last
            ids = [o.outputs[one.index].token_ids for o in outputs]
            assert all(new[: len(old)] == old for old, new in itertools.pairwise(ids))
    *_, (*running, cut), (*_, whole) = history.values()
    assert cut.outputs[0].text == text[:9] == running[-1].outputs[0].text[:9]
    assert any(len(o.outputs[0].text) < len(llm.tokenizer.decode(o.outputs[0].token_ids)) for o in running)
    assert whole.outputs[0].text == text and whole.outputs[0].finish_reason == "length"
    assert_empty(llm)


def test_streaming_ends_with_what_generate_returns(llm):
    params = [SamplingParams(n=2, seed=3, temperature=1.5, max_tokens=20), BeamSearchParams(3, max_tokens=9)]
    final = [o for o in llm.stream([PROMPTS[1], PROMPTS[3]], params) if o.finished]
    final.sort(key=lambda output: int(output.request_id))
    assert [o.outputs for o in llm.generate([PROMPTS[1], PROMPTS[3]], params)] == [o.outputs for o in final]


@pytest.fixture(scope="module")
def ending(make, folder, greedy, tmp_path_factory):
    """The same model with another end of text: one that it says, at the sixth token of prompt 5."""
    copy = tmp_path_factory.mktemp("ending") / "model"
    shutil.copytree(folder, copy)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps({**values, "eos_token_id": greedy[5][5]}))
    return make(copy)


def test_end_of_text_ends_an_output(ending, oracle, greedy):
    end = greedy[5][5]
    cut = greedy[5].index(end) + 1
    params = SamplingParams(temperature=0, max_tokens=LENGTH)
    for prompt, output in zip(PROMPTS, ending.generate(PROMPTS, params), strict=True):
        [one], expected = output.outputs, generate(oracle, prompt, eos_token_id=end)[0, len(prompt) :].tolist()
        assert one.token_ids == expected
        assert (one.finish_reason, one.stop_reason) == ("stop" if expected[-1] == end else "length", None)
    assert output.metrics.num_preemptions == 0
    [one] = ending.generate(PROMPTS[5], params)[0].outputs
    assert one.token_ids == greedy[5][:cut] and one.finish_reason == "stop"
    assert one.text == ending.tokenizer.decode(greedy[5][: cut - 1])  # the end of text is no text
    [kept] = ending.generate(PROMPTS[5], SamplingParams(temperature=0, include_stop_str_in_output=True))[0].outputs
    assert kept.text == ending.tokenizer.decode(greedy[5][:cut])
    assert tokens(ending.generate(PROMPTS[5], GREEDY)) == [[greedy[5]]]  # ignore_eos


@pytest.mark.parametrize("more", [-3, 0, 1, 2, 9])
def test_min_tokens(ending, oracle, greedy, more):
    """The end of text would come after some tokens; so many, or that many more or less, must stand before it."""
    end, prompt = greedy[5][5], PROMPTS[5]
    least = greedy[5].index(end) + more
    expected = generate(oracle, prompt, eos_token_id=end, min_new_tokens=least)[0, len(prompt) :].tolist()
    params = SamplingParams(temperature=0, max_tokens=LENGTH, min_tokens=least)
    [one] = ending.generate(prompt, params)[0].outputs
    assert one.token_ids == expected and end not in expected[:least]
    assert (expected == greedy[5][: greedy[5].index(end) + 1]) == (more <= 0)


def test_stop_token_ids(llm, greedy):
    row = greedy[5]
    at = next(i for i, token in enumerate(row) if i >= 4 and token not in row[:i])
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True, stop_token_ids=[row[at]])
    [one] = llm.generate(PROMPTS[5], params)[0].outputs
    assert one.token_ids == row[: at + 1] and one.text == llm.tokenizer.decode(row[:at])
    assert (one.finish_reason, one.stop_reason) == ("stop", row[at])


def test_a_pool_beyond_the_memory_is_refused(make):
    with pytest.raises(ValueError, match=r"a pool of 10000000000 blocks takes \d+ MiB, and only \d+ MiB are free"):
        make(num_blocks=10**10)


def test_max_tokens_and_the_models_length(make, greedy):
    llm = make(max_model_len=40)
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=None, ignore_eos=True))
    assert [len(o.outputs[0].token_ids) for o in outputs] == [40 - len(prompt) for prompt in PROMPTS]
    [one] = llm.generate(PROMPTS[6], GREEDY)[0].outputs  # 30 tokens: 10 are left of the 24
    assert one.token_ids == greedy[6][:10] and one.finish_reason == "length"
    [one] = llm.generate(PROMPTS[6], SamplingParams(temperature=0, max_tokens=1))[0].outputs
    assert one.token_ids == greedy[6][:1]


def test_logprobs_are_those_of_transformers(llm, oracle, greedy):
    params = [SamplingParams(temperature=t, seed=1, max_tokens=8, logprobs=k) for t, k in ((0, 3), (1.3, 0), (1.3, 5))]
    for output, one_params in zip(llm.generate([PROMPTS[3]] * 3, params), params, strict=True):
        [one] = output.outputs
        with torch.no_grad():
            rows = oracle(torch.tensor([PROMPTS[3] + one.token_ids])).logits[0, len(PROMPTS[3]) - 1 : -1]
        rows = rows.log_softmax(-1)
        own = rows[range(len(one.token_ids)), one.token_ids]
        assert one.cumulative_logprob == pytest.approx(own.sum().item(), abs=1e-3)
        for row, token, found in zip(rows, one.token_ids, one.logprobs, strict=True):
            assert found.keys() == set(row.topk(one_params.logprobs).indices.tolist()) | {token}
            assert [one.logprob for one in found.values()] == pytest.approx([row[t].item() for t in found], abs=1e-4)
            assert [one.rank for one in found.values()] == [1 + int((row > row[t]).sum()) for t in found]
            assert [one.decoded_token for one in found.values()] == [llm.tokenizer.decode([t], False) for t in found]
    [one] = llm.generate(PROMPTS[3], GREEDY)[0].outputs
    assert one.logprobs is None and one.cumulative_logprob is None


# ---- requests come and go ----------------------------------------------------------------------------------------


def test_abort_ends_a_request_at_once_and_leaves_the_others(llm, greedy):
    ids = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS]
    beam = llm.add_request(PROMPTS[0], BeamSearchParams(4, max_tokens=30))
    for _ in range(5):
        llm.step()
    used = llm.stats().memory.used
    llm.abort(ids[6])
    llm.abort(beam)
    assert llm.stats().memory.used <= used - 9 and llm.stats().num_running == 6
    waiting = llm.add_request(PROMPTS[2], GREEDY)
    llm.abort(waiting)
    llm.abort(waiting)
    llm.abort("nobody")
    last = finish(llm)
    assert [last[name].outputs[0].token_ids for name in ids[:6]] == greedy[:6]
    assert not {ids[6], beam, waiting} & set(last)


def test_closing_a_stream_frees_everything(llm):
    stream = llm.stream(PROMPTS, SamplingParams(n=3, max_tokens=50))
    next(stream)
    assert llm.stats().memory.used > 20 and llm.has_unfinished_requests
    stream.close()
    assert_empty(llm)


def test_a_stream_ends_when_its_requests_are_aborted(llm):
    seen = []
    for output in llm.stream(PROMPTS[:3], GREEDY):
        seen.append((output.request_id, output.finished, output.outputs[0].finish_reason))
        if not output.finished:
            llm.abort(output.request_id)
            for other in {name for name, *_ in seen} - {output.request_id}:
                llm.abort(other)
    names = sorted({name for name, *_ in seen})
    assert len(names) == 3 and sorted(seen) == sorted(
        (name, done, "abort" if done else None) for name in names for done in (False, True)
    )
    assert_empty(llm)


def test_after_an_abort_nothing_old_is_told(llm):
    """All three have a first token after the same step; the others are aborted while the first one is looked at."""
    seen = []
    for output in llm.stream(PROMPTS[:3], GREEDY):
        if not seen:
            for request_id in list(llm._requests):
                llm.abort(request_id)
        seen.append((output.request_id, output.finished))
    assert [finished for _, finished in seen] == [False, True, True, True]
    assert_empty(llm)


def test_generate_answers_for_what_was_aborted_too(llm, greedy):
    """The answers fit the prompts one to one."""
    def abort_the_second(plan, output):
        if plan.num_tokens and len(llm._requests) == 3:
            llm.abort(sorted(llm._requests, key=int)[1])

    llm.observers.append(abort_the_second)
    try:
        outputs = llm.generate(PROMPTS[:3], GREEDY)
    finally:
        llm.observers.clear()
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "abort", "length"]
    assert [outputs[i].outputs[0].token_ids for i in (0, 2)] == [greedy[0], greedy[2]]
    assert [o.prompt_token_ids for o in outputs] == PROMPTS[:3]


def test_others_go_on_beside_generate(llm, greedy):
    llm.add_request(PROMPTS[1], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True), request_id="mine")
    llm.step()
    assert tokens(llm.generate(PROMPTS[2], GREEDY)) == [[greedy[2]]]
    assert llm.has_unfinished_requests
    assert finish(llm)["mine"].outputs[0].token_ids[:LENGTH] == greedy[1]


@pytest.mark.parametrize("late", [False, True])
def test_after_a_step_that_failed_all_goes_on(make, greedy, monkeypatch, late):
    """It broke before anything was computed, or after all was: what it computed must not be trusted, nor lost."""
    llm = make(num_blocks=24, max_num_seqs=8, max_num_batched_tokens=16, preemption="swap", watermark=0)
    execute, failures = llm.executor.runner.execute, [3, 4, 9, 20, 30, 40]

    def fails(plan):
        broken = plan.step in failures
        output = execute(plan) if late or not broken else None
        if broken:
            raise MemoryError
        return output

    monkeypatch.setattr(llm.executor.runner, "execute", fails)
    ids, last = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS], {}
    errors = 0
    while llm.has_unfinished_requests:
        try:
            last.update({output.request_id: output for output in llm.step()})
        except MemoryError:
            errors += 1
    assert errors == len(failures) and [last[name].outputs[0].token_ids for name in ids] == greedy
    assert llm.stats().memory.swapped_out_blocks > 0
    assert_empty(llm)


def test_a_scheduler_that_finds_nothing_to_do_is_a_mistake(make, monkeypatch):
    llm = make()
    llm.add_request([1], GREEDY)
    monkeypatch.setattr(llm.scheduler.admission, "let_in", lambda step, room: None)
    with pytest.raises(RuntimeError, match="has work and found nothing to do"):
        llm.step()


def test_a_step_without_work_does_nothing(llm):
    assert not llm.has_unfinished_requests and llm.step() == []


def test_request_ids(llm):
    assert llm.add_request(PROMPTS[0], GREEDY, request_id="mine") == "mine"
    with pytest.raises(ValueError, match="request_id 'mine' is in use"):
        llm.add_request(PROMPTS[0], GREEDY, request_id="mine")
    number = int(llm.add_request(PROMPTS[0], GREEDY)) + 2
    llm.add_request(PROMPTS[0], GREEDY, request_id=str(number))  # a name that the engine would take next
    assert len({llm.add_request(PROMPTS[0], GREEDY) for _ in range(3)} | {str(number)}) == 4
    assert len(finish(llm)) == 6
    assert llm.add_request(PROMPTS[0], GREEDY, request_id="mine") == "mine"  # free again
    finish(llm)


BAD = [  # prompt, its parameters, what the error says; then those that could be served by a larger engine
    ([], {}, ["empty"]),
    ([1, 320], {}, ["token id 320 in the prompt: must be an integer from 0 to 319"]),
    ([-1], {}, ["token id -1"]),
    ([1, True], {}, ["token id True"]),
    (5.5, {}, ["must be text, token ids or chat messages, not 5.5"]),
    (None, {}, ["not None"]),
    ([{"role": "user"}], {}, ["chat message 0"]),
]
TOO_MUCH = [
    ([1] * 128, {}, ["the prompt has 128 tokens", "128 (max_model_len)"]),
    ([1] * 90, {"n": 19, "max_tokens": 38}, ["212 blocks", "90 prompt tokens", "38 output", "19 seq", "200"]),
    ([1], {"n": 33}, ["wants 33 sequences at once, but max_num_seqs is 32"]),
]


@pytest.mark.parametrize("prompt, params, messages", BAD + TOO_MUCH)
def test_a_bad_request_is_refused_and_none_of_the_call_runs(llm, prompt, params, messages):
    good, bad = SamplingParams(), SamplingParams(**params)
    calls = [([prompt], bad, ""), ([PROMPTS[1], prompt, PROMPTS[2]], [good, bad, good], "prompt 1: ")]
    for prompts, each, place in calls:
        with pytest.raises(ValueError) as refused:
            llm.generate(prompts, each)
        assert str(refused.value).startswith(place)
        assert all(message in str(refused.value) for message in messages), refused.value
        assert isinstance(refused.value, RequestRefused) == ((prompt, params, messages) in TOO_MUCH)
        assert_empty(llm)


def test_params_are_one_for_all_or_one_for_each(llm, greedy):
    with pytest.raises(ValueError, match="^2 prompts but 3 params: give one for all or one for each"):
        llm.generate(PROMPTS[:2], [GREEDY] * 3)
    with pytest.raises(ValueError, match="params must be SamplingParams or BeamSearchParams, not 5"):
        llm.generate(PROMPTS[:2], [GREEDY, 5])
    two = llm.generate(PROMPTS[:2], [GREEDY, SamplingParams(temperature=0, max_tokens=2)])
    assert tokens(two) == [[greedy[0]], [greedy[1][:2]]]
    assert llm.generate([]) == [] and len(llm.generate("the fox")[0].outputs[0].token_ids) <= 16  # the default
    assert_empty(llm)


def test_a_prompt_is_text_tokens_or_messages(make, folder, llm, tmp_path):
    text = "the quick brown dog"
    messages = [{"role": "user", "content": text}]
    rendered = f"[user] {text}<end>"
    ids, chat_ids = llm.tokenizer.encode(text), llm.tokenizer.encode(rendered, add_special_tokens=False)
    assert END in chat_ids and ids[0] == 1 and 1 not in chat_ids  # templates write their special tokens themselves
    outputs = llm.generate([text, ids, messages, chat_ids], GREEDY)
    assert [o.prompt for o in outputs] == [text, None, rendered, None]
    assert [o.prompt_token_ids for o in outputs] == [ids, ids, chat_ids, chat_ids]
    assert outputs[0].outputs == outputs[1].outputs != outputs[2].outputs == outputs[3].outputs
    for one, many in ((text, [text]), (ids, [ids]), (messages, [messages])):  # one prompt is a list of one
        assert tokens(llm.generate(one, GREEDY)) == tokens(llm.generate(many, GREEDY))
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        make(copy).generate(messages, GREEDY)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"block_size": 0}, "block_size=0: must be an integer of at least 1"),
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"num_cpu_blocks": -1}, "num_cpu_blocks=-1: must be None or an integer of at least 0"),
        ({"max_model_len": 0}, "max_model_len=0"),
        ({"kv_cache_memory": 10**6}, "give num_blocks or kv_cache_memory, not both"),
        ({"num_blocks": None, "kv_cache_memory": 10}, "kv_cache_memory=10: one block takes 1024 bytes"),
        ({"dtype": "int8"}, "dtype='int8': must be one of auto, fp32, bf16, fp16"),
        ({"device": "tpu"}, "device='tpu': must be one of auto, cpu, cuda"),
        ({"preemption": "never"}, "preemption='never'"),
    ],
)
def test_bad_settings_are_refused_by_name(make, settings, message):
    with pytest.raises(ValueError) as refused:
        make(**settings)
    assert message in str(refused.value)


# ---- the account -------------------------------------------------------------------------------------------------


def test_stats_agree_with_what_happened(make):
    settings = {"num_blocks": 24, "max_num_seqs": 8, "num_cpu_blocks": 40, "watermark": 0, "preemption": "swap"}
    llm, seen = make(**settings, prefix_cache="none"), Counter()

    def watch(plan, output):
        stats = llm.stats()
        m = stats.memory
        assert m.free + m.used == m.num_blocks == 24 and m.cpu_used <= m.cpu_total == 24  # no use for more
        assert m.tokens_stored <= m.used * 4 and m.waste_percent == pytest.approx(
            100 * (1 - m.tokens_stored / (4 * m.used)) if m.used else 0
        )
        assert stats.num_waiting + stats.num_running + stats.num_swapped + stats.num_finished <= len(PROMPTS)
        seen.update(steps=1, copies=len(plan.copies), out=len(plan.swap_out), back=len(plan.swap_in))
        seen["prompts"] += len(plan.admitted)
        seen["tokens"] += sum(len(row) for row in output.tokens.values())
        seen["most"] = max(seen["most"], stats.contiguous_blocks)

    llm.observers.append(watch)
    outputs = llm.generate(PROMPTS, SamplingParams(n=2, seed=2, max_tokens=20, ignore_eos=True))
    stats = llm.stats()
    m = stats.memory
    assert (stats.num_waiting, stats.num_running, stats.num_swapped) == (0, 0, 0)
    assert stats.num_steps == seen["steps"] and stats.num_finished == seen["prompts"] == len(PROMPTS)
    assert stats.num_prompt_tokens == sum(map(len, PROMPTS))
    assert stats.num_output_tokens == seen["tokens"] == sum(len(o.token_ids) for r in outputs for o in r.outputs)
    assert (m.copies, m.swapped_out_blocks, m.swapped_in_blocks) == (seen["copies"], seen["out"], seen["back"])
    assert seen["out"] == seen["back"] > 0 and stats.num_preemptions == {
        "swap": sum(o.metrics.num_preemptions for o in outputs), "recompute": 0,
    }  # fmt: skip
    assert stats.peak.usage.used == m.peak_used <= 24 and seen["most"] <= 8 * 32  # 128 tokens, blocks of 4
    assert stats.peak.contiguous_blocks in range(32, 257) and stats.contiguous_blocks == 0
    assert all(seconds > 0 for seconds in vars(stats.times).values())


def test_metrics_are_in_order(make):
    llm = make(max_num_seqs=2)
    outputs = llm.generate(PROMPTS, GREEDY)
    for output in outputs:
        m = output.metrics
        assert m.arrival_time <= m.first_scheduled_time < m.first_token_time < m.finished_time
        assert 0 <= m.queue_time < m.time_to_first_token
        assert output.time_per_output_token == pytest.approx((m.finished_time - m.first_token_time) / (LENGTH - 1))
    queued = [output.metrics.queue_time for output in outputs]
    assert queued[6] > queued[0]
    [one] = llm.generate(PROMPTS[0], SamplingParams(max_tokens=1))
    assert one.time_per_output_token is None


# ---- the real model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    """With so little memory that the test below can't do without preemptions."""
    return LLM(num_blocks=14, block_size=4, max_model_len=56, preemption="auto", watermark=0, debug=True)


@pytest.fixture(scope="module")
def real_oracle():
    """transformers' own Llama with the weights that we read (test_models.py reads them with transformers, too)."""
    checkpoint = open_checkpoint("smollm2")
    config = json.loads((Path(__file__).parent / "data" / "model_configs.json").read_text())
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config["SmolLM2-135M-Instruct"]["config"]))
    names = checkpoint.names(Llama.tensor_shapes(ModelConfig.from_hf(checkpoint.config)))
    weights = {name: floats(checkpoint.tensor(stored, torch.float32), torch.float32) for stored, name in names.items()}
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    model.tie_weights()
    return model.eval()


def test_the_real_model_equals_transformers(smollm2, real_oracle):
    prompts = ["The capital of France is", "def fibonacci(n):", "Once upon a time there was"]
    single, beam = SamplingParams(temperature=0, max_tokens=16), BeamSearchParams(3, max_tokens=12)
    first, searched, last = smollm2.generate(prompts, [single, beam, single])
    assert min(smollm2.stats().num_preemptions.values()) > 0
    for output in (first, last):
        prompt, [one] = output.prompt_token_ids, output.outputs
        assert one.token_ids == generate(real_oracle, prompt, max_new_tokens=16)[0, len(prompt) :].tolist()
    rows, scores = beams(real_oracle, searched.prompt_token_ids, beam, [2])
    assert [one.token_ids for one in searched.outputs] == rows
    assert [one.score for one in searched.outputs] == pytest.approx(scores, abs=1e-4, rel=1e-5)
    assert "return" in searched.outputs[0].text


def test_the_real_model_goes_on_from_what_it_said(smollm2, real_oracle):
    """The next turn finds prompt and answer of the one before, and says what transformers says after all of it."""
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    turn = smollm2.tokenizer.encode("Paris is the capital of")
    for more in ("", " And the largest river there"):
        turn = turn + smollm2.tokenizer.encode(more)
        [output] = smollm2.generate([turn], greedy)
        expected = generate(real_oracle, turn, max_new_tokens=12, eos_token_id=None)[0, len(turn) :].tolist()
        assert output.outputs[0].token_ids == expected
        turn = turn + expected
    assert output.metrics.num_cached_tokens == (5 + 12 - 1) // 4 * 4  # its last token was drawn, and never computed


def test_the_real_model_answers(smollm2):
    *_, last = smollm2.stream(
        [{"role": "user", "content": "What is the capital of France?"}], SamplingParams(temperature=0)
    )
    assert last.outputs[0].text == "The capital of France is Paris." and last.outputs[0].finish_reason == "stop"
