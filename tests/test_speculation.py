"""Guesses change how many tokens a step gives, and never which: everything here is compared with an engine that guesses
nothing, by equality, whatever else is on.

SPECULATION_TRIES=500 looks longer.
"""

import os
import random
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import make_folder

from minipaged import LLM, SamplingParams
from minipaged.decoding.acceptance import accept
from minipaged.execution import answers
from minipaged.execution.runner import ModelRunner
from minipaged.execution.speculative_config import SpeculativeConfig
from minipaged.requests.sampling_params import BadLogits
from minipaged.train_head import main as train_head

TRIES = int(os.environ.get("SPECULATION_TRIES", 24))
WORDS = ["the cat sat on the mat. ", "a dog, a cat, a dog, a cat, ", "once more: the cat sat on ", "x=1; y=2; x=1; "]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and drafts for it: the same one, one that is nearly the same, and one that has nothing of it."""
    root = tmp_path_factory.mktemp("speculation")
    folders = {"model": make_folder(root / "model"), "same": root / "model"}
    shutil.copytree(root / "model", root / "near")
    weights = load_file(root / "near" / "model.safetensors")
    torch.manual_seed(1)
    noisy = {name: w + 0.005 * torch.randn_like(w) for name, w in weights.items()}
    save_file(noisy, root / "near" / "model.safetensors", metadata={"format": "pt"})
    folders |= {"near": root / "near", "far": make_far(root / "far", root / "model")}
    return folders | {"head": make_head(root / "head.safetensors", folders["model"])}


def make_head(file, folder):
    """A head for the model, hardly trained, and for two thirds of its vocabulary."""
    assert train_head(["--model", str(folder), "--out", str(file), "--minutes", "0.1", "--vocabulary", "64"]) == 0
    return file


def make_far(folder, model):
    """Another shape, one layer, and a vocabulary that is padded differently."""
    import transformers

    shutil.copytree(model, folder)
    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=4096, bos_token_id=None, eos_token_id=95,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def guesses(rng, folders):
    """A speculative_config."""
    how = {
        "num_speculative_tokens": rng.randint(1, 8), "num_branches": rng.choice([1, 1, 2, 3, 4]),
        "adaptive": rng.random() < 0.5,
    }  # fmt: skip
    if rng.random() < 0.4:
        low = rng.randint(1, 3)
        return how | {"method": "ngram", "prompt_lookup_min": low, "prompt_lookup_max": low + rng.randint(0, 2)}
    if rng.random() < 0.4:
        return how | {"method": "head", "model": str(folders["head"])}
    sampling = rng.choice([None, "greedy", "probabilistic"])
    model = str(folders[rng.choice(["same", "near", "near", "far"])])
    return how | {"method": "draft", "model": model, "draft_sample_method": sampling}


def job(rng):
    """A prompt, and what is asked for it."""
    prompt = "".join(rng.choice(WORDS) for _ in range(rng.randint(1, 3)))[: rng.randint(3, 60)].strip()
    limit = rng.randint(1, 30)
    params = {
        "max_tokens": limit, "seed": rng.randint(0, 99), "temperature": rng.choice([0, 0, 0.3, 1.0]),
        "min_tokens": rng.choice([0, 0, limit]), "stop": rng.choice([None, None, ["a", "zz"], ["e "]]),
        "stop_token_ids": rng.choice([None, None, [5, 11, 64]]), "ignore_eos": rng.random() < 0.5,
        "logprobs": rng.choice([None, None, 0, 3]), "prompt_logprobs": rng.choice([None, None, None, 2]),
    }  # fmt: skip
    if rng.random() < 0.4:
        params |= {
            "presence_penalty": rng.choice([0, 0.5]), "frequency_penalty": rng.choice([0, 0.3]),
            "repetition_penalty": rng.choice([1, 1.3]), "logit_bias": rng.choice([None, {7: 4.0}]),
            "bad_words": rng.choice([None, ["at"]]), "allowed_token_ids": rng.choice([None, list(range(60, 95))]),
        }  # fmt: skip
    if params["temperature"]:
        params |= {
            "n": rng.choice([1, 1, 3]), "top_k": rng.choice([0, 0, 5]), "top_p": rng.choice([1.0, 1.0, 0.8]),
            "min_p": rng.choice([0, 0, 0.05]),
        }  # fmt: skip
    return prompt, SamplingParams(**params)


def settings(rng):
    """How an engine may be set up; the pool is tiny now and then."""
    return {
        "block_size": rng.choice([1, 2, 4, 16]), "max_num_seqs": rng.choice([4, 8, 16]),
        "max_num_batched_tokens": rng.choice([16, 24, 64, 512]), "prefix_cache": rng.choice(["none", "hash", "radix"]),
        "preemption": rng.choice(["auto", "swap", "recompute"]), "chunked_prefill": rng.random() < 0.7,
        "schedule": rng.choice(["fcfs", "prefix"]),
    }  # fmt: skip


def pool(rng, jobs, block_size):
    longest = max((p.n or 1) * (len(prompt) + (p.max_tokens or 1)) for prompt, p in jobs)
    return -(-longest // block_size) + rng.choice([4, 10, 100])


def told(outputs):
    """All that an answer says."""
    return [(one.prompt_logprobs, [asdict_of(o) for o in one.outputs], one.error) for one in outputs]


def asdict_of(output):
    return {k: v for k, v in asdict(output).items() if not k.startswith("_")}


def run(llm, jobs):
    return told(llm.generate([prompt for prompt, _ in jobs], [params for _, params in jobs]))


@pytest.fixture(scope="module")
def plain(folders):
    return LLM(str(folders["model"]), block_size=16, num_blocks=400, prefix_cache="none", max_num_seqs=64)


@pytest.mark.parametrize("seed", range(TRIES))
def test_the_same_answers_with_guesses_and_without(folders, plain, seed):
    if not plain.executor.runner.backend.same_bits:
        pytest.skip("only equal numbers give equal tokens: the C++ backend is not there")
    rng = random.Random(seed)
    jobs = [job(rng) for _ in range(rng.randint(1, 6))]
    wanted, how, setting = run(plain, jobs), guesses(rng, folders), settings(rng)
    setting["num_blocks"] = pool(rng, jobs, setting["block_size"])
    with LLM(str(folders["model"]), speculative_config=how, debug=True, **setting) as llm:
        for _ in range(2):  # the second time with what the prefix cache has
            assert run(llm, jobs) == wanted, (how, setting)
        llm.memory.check()
        assert llm.memory.usage().used == 0


def one_too_many(drafts, drawn):
    """The token behind a wrong guess is taken, too."""
    tokens = accept(drafts, drawn)
    return tokens + [row[0] for row in drawn[len(tokens) : len(tokens) + 1] if not isinstance(row, BadLogits)]


def the_same_number_again(draw, drafts):
    """The same random number, and the same past, at every position."""
    return [draw] * (len(drafts) + 1)


def wrong_branch(seq_id, family, output):
    """The first branch stays, whoever was right."""
    RIGHT_TAKE(seq_id, family, output)
    if output.winners.pop(seq_id, None) is None and len(family) > 1:
        output.winners[seq_id] = family[1][0].seq_id


RIGHT_TAKE = answers._take
BROKEN = {
    "one token too many": ("accept", one_too_many),
    "a random number twice": ("draws_behind", the_same_number_again),
    "the wrong branch": ("_take", wrong_branch),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_that_finds_what_is_broken(folders, plain, monkeypatch, broken):
    monkeypatch.setattr(answers, *BROKEN[broken])
    with pytest.raises((AssertionError, IndexError)):
        for seed in range(12):
            test_the_same_answers_with_guesses_and_without(folders, plain, seed)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("method", ["ngram", "draft", "head"])
def test_on_other_backends(folders, kernels, method):
    """Their numbers may differ by a rounding where more rows are computed. These prompts are no near ties."""
    count = 4 if kernels == "triton" else 24
    known = [ord(sign) - 33 for sign in "adogx=1;,"]  # an n-gram of one token is always found
    jobs = [("a dog, x=1;", SamplingParams(temperature=0, max_tokens=count, allowed_token_ids=known, logprobs=1))]
    jobs.append(("dog x=1; a,", SamplingParams(seed=1, max_tokens=count, allowed_token_ids=known)))
    how = {"method": method, "num_speculative_tokens": 2, "num_branches": 2, "adaptive": False}
    how |= {} if method == "ngram" else {"model": str(folders[{"draft": "near"}.get(method, method)])}
    how |= {"prompt_lookup_min": 1} if method == "ngram" else {}
    setting = {"kernels": kernels, "block_size": 4, "num_blocks": 60}
    try:
        with LLM(str(folders["model"]), **setting) as llm:
            wanted = run(llm, jobs)
    except ValueError as error:
        pytest.skip(str(error))
    with LLM(str(folders["model"]), speculative_config=how, debug=True, **setting) as llm:
        answers = run(llm, jobs)
        assert llm.stats().speculation.num_drafts
    tokens = [[[o["token_ids"] for o in outputs] for _, outputs, _ in one] for one in (answers, wanted)]
    assert tokens[0] == tokens[1]


def test_nan_behind_a_guess_ends_the_request_where_it_would_without(folders):
    """Its tokens before that are there, and nobody else notices."""
    jobs = [(prompt.strip(), SamplingParams(temperature=0, max_tokens=16)) for prompt in WORDS]

    def answers(how=None, bad=-1):
        """What the model says; where it would say `bad`, its logits are NaN."""
        with LLM(str(folders["model"]), block_size=4, num_blocks=100, speculative_config=how) as llm:
            logits = llm.executor.runner.model.logits

            def broken(hidden):
                values = logits(hidden)
                return values.masked_fill((values.argmax(-1) == bad).unsqueeze(1), torch.nan)

            llm.executor.runner.model.logits = broken
            return run(llm, jobs)

    _, [whole], _ = answers()[0]
    bad = whole["token_ids"][7]
    plain = answers(bad=bad)
    assert any("NaN" in str(error) for *_, error in plain)
    for model in ("same", "near"):
        how = {"method": "draft", "model": str(folders[model]), "num_speculative_tokens": 4, "adaptive": False}
        assert answers(how, bad) == plain


# ---- what a proposer remembers moves with the blocks ----------------------------------------------------------------


def guessed(llm, jobs):
    """Everything that was guessed, by who it was for and where."""
    found = {}

    def note(plan, output):
        for s in plan.sequences:
            # What is not there is NaN in debug mode, and from that nothing is guessed.
            assert len(output.drafts.get(s.seq_id, ())) == s.num_to_draft, "some of ours are missing"
            if s.num_to_draft:
                key = tuple(s.draw.prompt_token_ids), s.draw.seed, s.draw.index, s.start
                found.setdefault(key, []).append(output.drafts[s.seq_id])

    llm.observers.append(note)
    run(llm, jobs)
    return found


@pytest.mark.parametrize("method", ["draft", "head"])
def test_guesses_are_the_same_with_hits_forks_copies_and_swaps(folders, method):
    """They depend on a sequence's own tokens alone: what a proposer keeps of them is where their blocks are."""
    rng = random.Random(5)
    beginning = "".join(rng.choice(WORDS) for _ in range(4))
    jobs = [
        (beginning[: rng.randint(20, 60)], SamplingParams(seed=i, n=1 + i % 3, max_tokens=40, temperature=0.5))
        for i in range(14)
    ]
    model = str(folders["near" if method == "draft" else method])
    how = {"method": method, "model": model, "num_speculative_tokens": 3, "adaptive": False}
    common = {"speculative_config": how, "debug": True, "block_size": 4}
    with LLM(str(folders["model"]), num_blocks=1000, prefix_cache="none", **common) as llm:
        if not llm.executor.runner.backend.same_bits:
            pytest.skip("only equal numbers give equal guesses")
        wanted = guessed(llm, jobs)
    small = {"num_blocks": 60, "preemption": "swap", "max_num_batched_tokens": 64, "prefix_cache": "radix"}
    with LLM(str(folders["model"]), **small, **common) as llm:
        found = guessed(llm, jobs)
        stats = llm.stats()
    assert stats.prefixes.found and stats.memory.copies and stats.memory.swapped_in_blocks
    compared = 0
    for key in found.keys() & wanted.keys():
        for ours, theirs in zip(found[key], wanted[key], strict=False):
            length = min(len(ours), len(theirs))  # a lack of room may shorten them
            assert ours[:length] == theirs[:length], "ours are others"
            compared += length
    assert compared > 400


@pytest.mark.parametrize("forgotten", ["swap_in", "copies"])
@pytest.mark.parametrize("method", ["draft", "head"])
def test_and_that_would_be_noticed(folders, monkeypatch, method, forgotten):
    move = ModelRunner._move_memory

    def only_the_model(self, plan):
        pools = self.pools
        move(self, replace(plan, **{forgotten: []}))
        self.pools = pools[:1]
        for pool, cpu_pool in self.pools:
            if forgotten == "swap_in" and plan.swap_in:
                self.backend.move_blocks(cpu_pool, pool, *self._pairs(plan.swap_in))
            if forgotten == "copies" and plan.copies:
                self.backend.copy_blocks(pool, *self._pairs(plan.copies))
        self.pools = pools

    monkeypatch.setattr(ModelRunner, "_move_memory", only_the_model)
    with pytest.raises(AssertionError, match="ours"):
        test_guesses_are_the_same_with_hits_forks_copies_and_swaps(folders, method)


# ---- what can be wrong with what it is told -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ngram", "must be None or a dict such as {'method': 'ngram'}"),
        ({}, "method=None: must be one of ngram, draft, head"),
        ({"method": "eagle"}, "method='eagle': must be one of"),
        ({"method": 3}, "method=3: must be one of"),
        ({"method": "ngram", "num_speculative_token": 3}, "did you mean 'num_speculative_tokens'?"),
        ({"method": "ngram", "colour": 3}, "there are method, model"),
        ({"method": "ngram", "num_speculative_tokens": 0.5}, "num_speculative_tokens=0.5: must be an integer from 1"),
        ({"method": "ngram", "num_speculative_tokens": True}, "num_speculative_tokens=True: must be an integer from 1"),
        ({"method": "ngram", "num_branches": 9}, "num_branches=9: must be an integer from 1 to 8"),
        ({"method": "ngram", "prompt_lookup_min": 3, "prompt_lookup_max": 2}, "prompt_lookup_min=3: must be at most 2"),
        ({"method": "ngram", "prompt_lookup_max": 0}, "prompt_lookup_m.x?i?n?=0: must be an integer from 1"),
        ({"method": "ngram", "model": "x"}, "model is for draft and head, not for ngram"),
        ({"method": "ngram", "acceptance": "rejection"}, "acceptance='rejection' is for guesses that were drawn"),
        ({"method": "ngram", "acceptance": "luck"}, "acceptance='luck': must be one of draw, rejection"),
        ({"method": "ngram", "adaptive": 1}, "adaptive=1: must be True or False"),
        ({"method": "draft"}, "method 'draft' needs a model"),
        ({"model": "x", "prompt_lookup_max": 3}, "prompt_lookup_min is for ngram, not for draft"),
        ({"model": "x", "draft_sample_method": "luck"}, "draft_sample_method='luck': must be one of greedy"),
        ({"method": "ngram", "draft_sample_method": "greedy"}, "draft_sample_method is for draft and head"),
        (
            {"model": "x", "acceptance": "rejection", "draft_sample_method": "greedy"},
            "needs draft_sample_method='probabilistic'",
        ),
        ({"model": "x", "acceptance": "rejection", "num_branches": 2}, "judges one row of guesses: num_branches=1"),
    ],
)
def test_what_is_wrong_is_said(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SpeculativeConfig.of(given)


def test_what_is_right_is_understood():
    ngram = SpeculativeConfig.of({"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4})
    assert (ngram.prompt_lookup_min, ngram.prompt_lookup_max, ngram.num_speculative_tokens) == (4, 4, 5)
    assert SpeculativeConfig.of({"method": "draft_model", "model": "x"}) == SpeculativeConfig.of({"model": "x"})
    assert SpeculativeConfig.of(ngram) is ngram and SpeculativeConfig.of(None) is None


def test_a_draft_that_draws_alike_comes_to_the_same_tokens(folders):
    """The model itself as its draft is always right at any temperature, if it draws with the same random number."""
    jobs = [(prompt.strip(), SamplingParams(seed=i, max_tokens=30, ignore_eos=True)) for i, prompt in enumerate(WORDS)]
    rates = {}
    for method in ("probabilistic", "greedy"):
        how = {"model": str(folders["same"]), "adaptive": False, "draft_sample_method": method}
        with LLM(str(folders["model"]), speculative_config=how, block_size=4, num_blocks=100) as llm:
            if not llm.executor.runner.backend.same_bits:
                pytest.skip("only equal numbers give equal draws")
            run(llm, jobs)
            rates[method] = llm.stats().speculation.acceptance_rate
    assert rates["probabilistic"] == 1 and rates["greedy"] < 0.6


def test_a_draft_with_another_vocabulary_is_refused(folders, tmp_path):
    shutil.copytree(folders["near"], tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    text = file.read_text()
    file.write_text(text.replace('"A": 32', '"A": 33').replace('"B": 33', '"B": 32'))
    assert file.read_text() != text
    with pytest.raises(ValueError, match=r"2 tokens differ, such as 'A', which is 32 in the model and 33 in the draft"):
        LLM(str(folders["model"]), speculative_config={"model": str(tmp_path / "other")})


def test_a_draft_with_fewer_positions_is_refused(folders, tmp_path):
    short = make_folder(tmp_path / "short", max_model_len=64)
    with pytest.raises(ValueError, match="knows 64 positions, and the engine may need 4096: give max_model_len=64"):
        LLM(str(folders["model"]), speculative_config={"model": str(short)})
    with LLM(str(folders["model"]), speculative_config={"model": str(short)}, max_model_len=64, num_blocks=20) as llm:
        assert llm.generate("abc", SamplingParams(max_tokens=3))[0].finished


def test_what_a_proposer_keeps_counts_as_memory(folders):
    sizes = {}
    for name, how in (("none", None), ("draft", {"model": str(folders["near"])}),
                      ("head", {"method": "head", "model": str(folders["head"])})):  # fmt: skip
        with LLM(str(folders["model"]), speculative_config=how, num_blocks=10, block_size=4) as llm:
            sizes[name] = llm.block_bytes
            pools = llm.executor.runner.pools
            assert sum(pool.nbytes for pool, _ in pools) == 10 * llm.block_bytes
    assert sizes["draft"] == 2 * sizes["none"] and sizes["none"] < sizes["head"] < sizes["draft"] + 4 * 4 * 32


def test_rejection_gives_other_tokens_and_the_same_ones_at_temperature_0(folders):
    how = {"model": str(folders["near"]), "acceptance": "rejection", "adaptive": False, "num_speculative_tokens": 3}
    wish = {"max_tokens": 30, "logprobs": 2, "ignore_eos": True}
    sampled = [(prompt.strip(), SamplingParams(seed=i, **wish)) for i, prompt in enumerate(WORDS)]
    greedy = [(prompt.strip(), SamplingParams(temperature=0, **wish)) for prompt in WORDS]
    common = {"block_size": 4, "num_blocks": 100, "debug": True}
    with LLM(str(folders["model"]), **common) as llm:
        plain, plain_greedy = run(llm, sampled), run(llm, greedy)
    with LLM(str(folders["model"]), speculative_config=how, **common) as llm:
        assert run(llm, greedy) == plain_greedy
        answers = run(llm, sampled)
        assert answers != plain and llm.stats().speculation.num_accepted_tokens > 20
    for _, [output], _ in answers:
        assert len(output["token_ids"]) == len(output["logprobs"]) == 30
        assert all(token in one for token, one in zip(output["token_ids"], output["logprobs"], strict=True))


# ---- the real model -------------------------------------------------------------------------------------------------


def test_the_real_model_says_the_same_in_fewer_steps():
    """Alone and among others, greedy and by chance; and its own head is right often enough to be of use."""
    text = "The sun had set, and the sea was calm. Two boats lay on the sand, and a dog slept between them."
    questions = f"Say again, word by word: {text}", "Why is rain wet?"
    prompts = [[{"role": "user", "content": words}] for words in questions]
    params = [SamplingParams(temperature=0, max_tokens=40), SamplingParams(seed=3, max_tokens=40, top_p=0.9, n=2)]
    told, steps = {}, {}
    for method in (None, "ngram", "head"):
        how = method and {"method": method}
        with LLM("smollm2", dtype="fp32", num_blocks=100, speculative_config=how, debug=True) as llm:
            if method and not llm.executor.runner.backend.same_bits:
                pytest.skip("only equal numbers give equal tokens")
            told[method] = [[o.token_ids for o in one.outputs] for one in llm.generate(prompts, params)]
            before = llm.stats().num_steps
            llm.generate(prompts[:1], params[0])
            steps[method] = llm.stats().num_steps - before
    assert told["ngram"] == told["head"] == told[None]
    assert steps["ngram"] < 0.6 * steps[None] and steps["head"] < 0.8 * steps[None]
