"""How many tokens are guessed, where their slots come from, and what becomes of them: on plain data, without a model.

The recall model (recall.py) has all of it at random; here stands what it is for.
"""

import pytest

from minipaged.memory import KVCacheManager
from minipaged.memory.prefix_cache import HashCache
from minipaged.requests.beam_search_params import BeamSearchParams
from minipaged.requests.request import Request
from minipaged.requests.sampling_params import SampledToken, SamplingParams
from minipaged.requests.sequence import Sequence
from minipaged.scheduling.plan import StepOutput
from minipaged.scheduling.scheduler import Scheduler
from minipaged.scheduling.speculation import FIRST_RATE, Speculation

END = 0


class Proposer:
    """Guesses what it is told: a list of tokens for each branch, the same for every sequence."""

    def __init__(self, *branches):
        self.branches = [list(branch) for branch in branches]

    def propose(self, seq, count, num_branches):
        return [branch[:count] for branch in self.branches[:num_branches]]

    def forget(self):
        pass


class Engine:
    """say: by request, what the model draws, from one position of the output to the next, over and over."""

    def __init__(self, *branches, num_blocks=50, block_size=4, cache=False, guesses=None, **settings):
        cache = HashCache(block_size) if cache else None
        self.memory = KVCacheManager(num_blocks, block_size, 0, cache=cache)
        how = {"num_speculative_tokens": 8, "num_branches": len(branches), "adaptive": False} | (guesses or {})
        self.speculation = Speculation(**how, proposer=Proposer(*branches))
        self.scheduler = Scheduler(self.memory, watermark=0.0, speculation=self.speculation, **settings)
        self.say, self.requests = {}, []

    def add(self, name, prompt=5, max_tokens=20, say=(7,), **params):
        params = SamplingParams(max_tokens=max_tokens, **params)
        request = Request(name, len(self.requests), list(range(1, prompt + 1)), params, max_tokens, frozenset({END}))
        self.scheduler.add(request)
        self.requests.append(request)
        self.say[name] = say
        return request

    def step(self):
        plan, output = self.scheduler.schedule(), StepOutput()
        self.memory.check()
        for s in plan.sequences:
            if s.num_drafts:
                output.drafts[s.seq_id] = s.draft_token_ids
            say, have = self.say[s.request_id], len(s.draw.output_token_ids) if s.draw else 0
            tokens = [SampledToken(say[(have + i) % len(say)]) for i in range(s.num_drafts + 1)]
            right = next((i for i, draft in enumerate(s.draft_token_ids) if draft != tokens[i].token_id), s.num_drafts)
            leader = s.seq_id if s.branch_of is None else s.branch_of
            if s.draw and len(output.tokens.get(leader, [[]])[0]) < right + 1:
                output.tokens[leader] = [tokens[: right + 1]] * s.draw.num_draws
                if s.branch_of is not None:
                    output.winners[leader] = s.seq_id
        self.scheduler.update(plan, output)
        self.memory.check()
        return plan

    def run(self, limit=100):
        plans = []
        while self.scheduler.has_unfinished:
            plans.append(self.step())
            assert len(plans) < limit
        assert self.memory.num_free == self.memory.num_blocks and not self.memory.sequences()
        return plans


def drafts(plan):
    return {s.request_id: s.draft_token_ids for s in plan.sequences if s.branch_of is None}


def test_right_guesses_come_with_one_token_more():
    engine = Engine([7, 7, 7])
    request = engine.add("a", max_tokens=9)
    assert drafts(engine.step()) == {"a": []}, "there is no token yet to guess behind"
    plan = engine.step()
    [s] = plan.sequences
    assert (s.token_ids, s.num_drafts, s.start, plan.num_tokens) == ([7, 7, 7, 7], 3, 5, 4)
    [seq] = request.sequences
    assert seq.output_token_ids == [7] * 5 and seq.num_computed_tokens == 9 == engine.memory.num_tokens(seq.seq_id)
    engine.run()
    assert seq.output_token_ids == [7] * 9 and seq.finish_reason == "length"


def test_wrong_guesses_leave_nothing_behind():
    engine = Engine([7, 9, 7], block_size=2)
    [seq] = engine.add("a").sequences
    engine.step()
    before = engine.memory.usage().used
    engine.step()
    assert seq.output_token_ids == [7, 7, 7] and engine.memory.num_tokens(seq.seq_id) == 5 + 2
    assert engine.memory.usage().used == before + 1, "of four slots only two stay"


def test_never_more_than_can_be_output():
    engine = Engine([7] * 8)
    engine.add("a", max_tokens=4)
    engine.step()
    assert drafts(engine.step()) == {"a": [7, 7]}, "the last of four tokens is never computed"


def test_an_end_among_the_guesses_is_an_end():
    engine = Engine([7, END, 7, 7])
    request = engine.add("a", say=(7, 7, END, 7))
    engine.step()
    engine.step()
    [seq] = request.sequences
    assert seq.output_token_ids == [7, 7, END] and seq.finish_reason == "stop" and request.finished


# ---- the budget -----------------------------------------------------------------------------------------------------


def test_guesses_come_after_everybodys_own_token_and_before_new_prompts():
    engine = Engine([7] * 3, max_num_seqs=4, max_num_batched_tokens=12)
    for name in "ab":
        engine.add(name, prompt=4)
    engine.step()
    engine.add("c", prompt=9)
    plan = engine.step()
    assert drafts(plan) == {"a": [7] * 3, "b": [7] * 3, "c": []}
    assert {s.request_id: s.num_own for s in plan.sequences} == {"a": 1, "b": 1, "c": 4}
    for name in "de":
        engine.add(name, prompt=4)
    engine.step()
    plan = engine.step()
    assert plan.num_tokens <= 12 and all(s.num_own for s in plan.sequences)


def test_with_no_budget_left_nothing_is_guessed():
    engine = Engine([7] * 3, max_num_seqs=3, max_num_batched_tokens=4)
    for name in "abc":
        engine.add(name, prompt=1)
    engine.step()
    assert drafts(engine.step()) == {"a": [7], "b": [], "c": []}
    engine.run()


def test_a_long_prompt_under_way_leaves_guesses_their_tokens():
    engine = Engine([7] * 3, max_num_seqs=4, max_num_batched_tokens=12, num_blocks=100)
    engine.add("a", prompt=4, max_tokens=60)
    engine.step()
    engine.add("b", prompt=50)
    for _ in range(3):
        plan = engine.step()
        assert drafts(plan)["a"] == [7] * 3 and plan.num_tokens == 12


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_nobody_makes_way_for_a_guess():
    engine = Engine([7] * 8, block_size=4, num_blocks=8, max_num_seqs=4)
    for name in "abc":  # five blocks each at the end, and there are eight
        engine.add(name, prompt=6, max_tokens=12)
    plain = Engine(block_size=4, num_blocks=8, max_num_seqs=4, guesses={"num_branches": 1})
    for name in "abc":
        plain.add(name, prompt=6, max_tokens=12)
    engine.run()
    plain.run()
    guessed, without = (sum(e.scheduler.num_preemptions.values()) for e in (engine, plain))
    assert guessed <= without
    assert [s.output_token_ids for r in engine.requests for s in r.sequences] == [[7] * 12] * 3


def test_where_no_block_is_free_what_is_left_of_the_last_one_is_used():
    engine = Engine([7] * 8, block_size=4, num_blocks=3)
    engine.add("a", prompt=9, max_tokens=4)  # 12 slots in the end, and one is its own token's
    engine.step()
    assert drafts(engine.step()) == {"a": [7, 7]}
    engine = Engine([7] * 8, block_size=4, num_blocks=4, max_num_seqs=2)
    engine.add("a", prompt=5, max_tokens=8)
    engine.add("b", prompt=5, max_tokens=8)
    engine.step()
    assert drafts(engine.step()) == {"a": [7, 7], "b": [7, 7]}, "slots 6 and 7 of the second block of each"


def test_only_what_was_right_can_be_found():
    engine = Engine([7, 7, 9, 9, 9, 9], block_size=2, cache=True)
    request = engine.add("a", prompt=4)
    engine.step()
    engine.step()
    [seq] = request.sequences
    assert seq.output_token_ids == [7] * 4
    history = [1, 2, 3, 4, 7, 7, 7]
    assert engine.memory.find([*history, 7]).num_tokens == 6 and engine.memory.find([*history, 9]).num_tokens == 6
    assert engine.memory.find([1, 2, 3, 4, 7, 9]).num_tokens == 4


def test_at_the_end_as_much_can_be_found_as_without_guesses():
    found = []
    for branches in ((), ([7] * 5,)):
        engine = Engine(*branches, block_size=2, cache=True, guesses={"num_branches": 1})
        engine.add("a", prompt=4, max_tokens=8)
        engine.run()
        found.append(engine.memory.find([1, 2, 3, 4] + [7] * 8).num_tokens)
    assert found == [10, 10]  # the last token is never computed, and a block of two waits for it


# ---- branches -------------------------------------------------------------------------------------------------------


def test_the_branch_that_is_right_becomes_the_sequence():
    engine = Engine([9, 9], [7, 7], [8], block_size=4)
    [seq] = engine.add("a", prompt=6).sequences
    engine.step()
    [table] = [engine.memory.block_table(seq.seq_id)]
    plan = engine.step()
    own, right, other = plan.sequences
    assert [s.token_ids for s in (own, right, other)] == [[7, 9, 9], [7, 7, 7], [7, 8]]
    assert right.branch_of == other.branch_of == own.seq_id == seq.seq_id and own.branch_of is None
    assert {s.block_table[0] for s in plan.sequences} == {table[0]}, "full blocks are shared"
    assert len({s.block_table[1] for s in plan.sequences}) == 3 and len(plan.copies) == 2, "the last one is copied"
    assert seq.output_token_ids == [7, 7, 7, 7] and engine.memory.block_table(seq.seq_id) == right.block_table
    assert engine.memory.sequences() == [seq.seq_id]
    counts = engine.speculation.counts
    assert (counts.num_drafts, counts.num_draft_tokens, counts.num_accepted_tokens) == (1, 5, 2)


def test_at_the_start_of_a_block_nothing_is_copied():
    engine = Engine([9], [7], block_size=4)
    engine.add("a", prompt=8)
    engine.step()
    assert engine.step().copies == []


def test_a_branch_of_a_sample_copies_what_its_sample_was_to_copy():
    engine = Engine([9], [7], block_size=4)
    engine.add("a", prompt=6, n=2, temperature=1.0)
    engine.step()
    plan = engine.step()
    assert len(plan.sequences) == 4 and len(plan.copies) == 3
    assert len({source for source, _ in plan.copies}) == 1, "no copy is made from a copy of the same step"
    engine.run()
    assert [s.output_token_ids for r in engine.requests for s in r.sequences] == [[7] * 20] * 2


def test_with_no_block_for_a_branch_there_is_none():
    engine = Engine([9], [7], block_size=4, num_blocks=2)
    engine.add("a", prompt=5, max_tokens=3)
    engine.step()
    assert [s.branch_of for s in engine.step().sequences] == [None]


# ---- how many -------------------------------------------------------------------------------------------------------


def how_many(acceptance, num_running, **settings):
    speculation = Speculation(8, **settings)
    seq = Sequence([1], acceptance=acceptance)
    return speculation.count(seq, 8, num_running)


def test_more_are_guessed_where_more_are_right_and_fewer_run():
    counts = [how_many(rate, 1) for rate in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 8 and len(set(counts)) > 4
    counts = [how_many(0.8, num_running) for num_running in (1, 4, 16, 64, 1000)]
    assert counts == sorted(counts, reverse=True) and counts[0] == 8 and counts[-1] == 0


def test_it_pays_as_the_roofline_says():
    """S sequences, free_rows F, a guess that is right with p: a step of S + F makes S tokens, one of 2 S + F makes
    S (1 + p). So the second is faster where p > S / (S + F)."""
    for num_running, free_rows in ((1, 24), (8, 24), (32, 24), (32, 256)):
        even = num_running / (num_running + free_rows)
        assert how_many(even + 0.01, num_running, free_rows=free_rows) >= 1
        assert how_many(even - 0.01, num_running, free_rows=free_rows) == 0
    assert how_many(0.5, 1, cost=0.6) == 0


def test_the_rate_follows_what_was_right():
    engine = Engine([9] * 3, guesses={"adaptive": True, "free_rows": 4})
    [seq] = engine.add("a", max_tokens=60).sequences
    assert seq.acceptance == FIRST_RATE
    plans = engine.run()
    guessed = [s.num_drafts for plan in plans for s in plan.sequences]
    assert guessed[1] > 1 and guessed[8:11] == [0] * 3, "it learns that nothing is right"
    assert 0 < sum(guessed[8:]) < len(guessed[8:]) / 4, "and tries again now and then"
    engine = Engine([7] * 8, guesses={"adaptive": True, "free_rows": 4})
    engine.add("a", max_tokens=60)
    guessed = [s.num_drafts for plan in engine.run() for s in plan.sequences]
    assert guessed[1] < 8 and max(guessed) == 8


def test_each_sequence_has_its_own_rate_and_samples_begin_with_their_prompts():
    engine = Engine([7] * 4, guesses={"adaptive": True})
    good, bad = engine.add("good", max_tokens=30), engine.add("bad", max_tokens=30, say=(8,))
    for _ in range(4):
        engine.step()
    assert good.sequences[0].acceptance > FIRST_RATE > bad.sequences[0].acceptance


def test_counts_by_position():
    engine = Engine([7, 7, 9, 7])
    request = engine.add("a", max_tokens=12)
    engine.run()
    counts = engine.speculation.counts
    assert counts.num_accepted_tokens_per_pos[:4] == [4, 3, 0, 0]
    assert (counts.num_drafts, counts.num_accepted_tokens) == (4, 7) and counts.num_draft_tokens == 4 + 4 + 4 + 1
    assert counts.acceptance_rate == pytest.approx(7 / 13) and counts.mean_acceptance_length == 1 + 7 / 4
    assert counts.acceptance_rate_per_pos[:3] == [1.0, 0.75, 0.0]
    metrics = request.metrics
    assert (metrics.num_drafts, metrics.num_draft_tokens, metrics.num_accepted_tokens) == (4, 13, 7)


def test_beams_have_nothing_guessed():
    engine = Engine([7] * 4)
    params = BeamSearchParams(2, max_tokens=3)
    request = Request("b", 0, [1, 2, 3], params, 3, frozenset({END}))
    engine.scheduler.add(request)
    engine.scheduler.schedule()
    assert engine.speculation.wishes([request], 1) == {}
