"""Scheduling policy, step by step, on plain data: who computes what, and who makes way for whom."""

import json
import random

import pytest

from minipaged.memory import PREFIX_CACHES, KVCacheManager
from minipaged.requests.beam_search_params import BeamSearchParams
from minipaged.requests.request import Request, RequestRefused
from minipaged.requests.sampling_params import SampledToken, SamplingParams
from minipaged.scheduling.plan import StepOutput
from minipaged.scheduling.scheduler import Scheduler

END = 0  # end of text
WORD = 7  # what the model says, if nothing else is told


class Engine:
    """A scheduler, and the few lines of an engine around it."""

    def __init__(self, num_blocks=100, block_size=4, num_cpu_blocks=0, watermark=0.0, cache="none", **settings):
        index = PREFIX_CACHES[cache]
        self.memory = KVCacheManager(num_blocks, block_size, num_cpu_blocks, cache=index(block_size) if index else None)
        self.scheduler = Scheduler(self.memory, watermark=watermark, **settings)
        self.requests: list[Request] = []
        self.say: dict[str, int] = {}  # request id -> the token that the model says next

    def add(self, name, prompt=4, max_tokens=8, n=1, beams=None, salt=None):
        """prompt: tokens, or how many."""
        samples = SamplingParams(n=n, max_tokens=max_tokens)
        params = BeamSearchParams(beams, max_tokens=max_tokens) if beams else samples
        tokens = list(range(1, prompt + 1)) if isinstance(prompt, int) else prompt
        number = len(self.requests)
        request = Request(name, number, tokens, params, max_tokens, frozenset({END}), cache_salt=salt)
        self.scheduler.add(request)
        self.requests.append(request)
        return request

    def step(self):
        """One step. Returns its plan, or None if there was nothing to do."""
        if not self.scheduler.has_unfinished:
            return None
        plan, output = self.scheduler.schedule(), StepOutput()
        self.memory.check()
        for s in plan.sequences:
            if s.draw:
                output.tokens[s.seq_id] = [[SampledToken(self.say.get(s.request_id, WORD))]] * s.draw.num_draws
            if s.num_candidates:  # the best two come from the best beam, and so on
                output.candidates[s.seq_id] = [(WORD + rank, -1.0 - rank / 8) for rank in range(s.num_candidates)]
        self.scheduler.update(plan, output)
        self.memory.check()
        return plan

    def until(self, happens):
        """Step until happens(plan), and return that plan."""
        while plan := self.step():
            if happens(plan):
                return plan
        raise AssertionError("it never happened")

    def run(self, limit=500):
        """To the end. Returns all plans."""
        plans = []
        while plan := self.step():
            plans.append(plan)
            assert len(plans) < limit, "it goes on and on"
        assert self.memory.num_free == self.memory.num_blocks and not self.memory.sequences()
        assert self.memory.usage().cpu_used == 0
        return plans

    def queues(self):
        s = self.scheduler
        return [[r.request_id for r in queue] for queue in (s.waiting, s.running, s.swapped)]


def computed(plan):
    """{request id: tokens that each of its sequences computes}."""
    result = {}
    for s in plan.sequences:
        result.setdefault(s.request_id, []).append(len(s.token_ids))
    return result


# ---- joining, and the budget ---------------------------------------------------------------------------------


def test_requests_join_and_leave_at_every_step():
    engine = Engine()
    engine.add("a", prompt=5, max_tokens=3)
    assert computed(engine.step()) == {"a": [5]}
    engine.add("b", prompt=6, max_tokens=3)
    plan = engine.step()
    assert computed(plan) == {"a": [1], "b": [6]} and plan.admitted == ["b"]
    assert computed(engine.step()) == {"a": [1], "b": [1]}
    assert computed(engine.step()) == {"b": [1]}  # a has its three tokens and is gone
    assert engine.step() is None
    assert [seq.output_token_ids for r in engine.requests for seq in r.sequences] == [[WORD] * 3] * 2


def test_the_last_token_is_drawn_but_never_computed():
    engine = Engine(num_blocks=2, block_size=4)
    engine.add("a", prompt=4, max_tokens=5)  # 9 tokens, 8 slots
    engine.run()
    assert engine.memory.usage().peak_used == 2


def test_the_budget_is_shared_first_come_first_served():
    engine = Engine(max_num_seqs=4, max_num_batched_tokens=10)
    for name, prompt in (("a", 6), ("b", 3), ("c", 5)):
        engine.add(name, prompt=prompt)
    assert computed(engine.step()) == {"a": [6], "b": [3], "c": [1]}
    assert computed(engine.step()) == {"a": [1], "b": [1], "c": [4]}


def test_a_prompt_longer_than_a_step_is_computed_over_several_beside_the_others():
    engine = Engine(max_num_seqs=4, max_num_batched_tokens=10)
    engine.add("a", prompt=3)
    engine.step()
    b = engine.add("b", prompt=23)
    plans = [engine.step() for _ in range(4)]
    assert [computed(plan) for plan in plans] == [{"a": [1], "b": [k]} for k in (9, 9, 5, 1)]
    assert [plan.sequences[1].draw is not None for plan in plans] == [False, False, True, True]
    assert [plan.sequences[1].start for plan in plans] == [0, 9, 18, 23]
    assert b.sequences[0].output_token_ids == [WORD, WORD]


def test_decodes_first_then_the_prompt_under_way_then_new_ones():
    engine = Engine(max_num_seqs=4, max_num_batched_tokens=10)
    engine.add("a", prompt=4)
    engine.step()
    engine.add("long", prompt=30)
    assert computed(engine.step()) == {"a": [1], "long": [9]}
    engine.add("b", prompt=4)
    engine.add("c", prompt=20)
    plans = [engine.step() for _ in range(5)]
    assert [computed(plan) for plan in plans] == [
        {"a": [1], "long": [5], "b": [4]},  # a long one leaves half of the rest to short ones
        {"a": [1], "long": [8], "b": [1]},
        {"a": [1], "long": [8], "b": [1]},  # what is left of it would fit into a step: it is short now
        {"a": [1], "long": [1], "b": [1], "c": [7]},
        {"a": [1], "long": [1], "b": [1], "c": [7]},
    ]


def test_short_prompts_do_not_wait_for_a_very_long_one_nor_it_for_them():
    engine = Engine(max_num_seqs=8, max_num_batched_tokens=16, num_blocks=400)
    engine.add("first", prompt=600, max_tokens=1)
    second = engine.add("second", prompt=600, max_tokens=1)
    assert computed(engine.step()) == {"first": [16]}
    rng = random.Random(0)
    for number in range(40):
        short = engine.add(f"short {number}", prompt=rng.randint(1, 7), max_tokens=1)
        plan = engine.step()
        assert short.finished and not second.sequences[0].num_computed_tokens  # at once, though "second" came before
        assert computed(plan)["first"][0] >= 8  # half of the step
    for number in range(12):  # and if more of them come than half a step can take, the long one still has its half
        engine.add(f"more {number}", prompt=7, max_tokens=1)
        assert computed(engine.step())["first"][0] >= 8
    engine.run()


def test_a_long_prompt_that_waits_is_passed_by_short_ones_only():
    engine = Engine(max_num_seqs=8, max_num_batched_tokens=8, num_blocks=400)
    for name, prompt in (("long", 40), ("longer", 50), ("short", 3), ("long again", 30)):
        engine.add(name, prompt=prompt, max_tokens=1)
    assert computed(engine.step()) == {"long": [5], "short": [3]}
    first = {}
    for number, plan in enumerate(engine.run()):
        for name in computed(plan):
            first.setdefault(name, number)
    assert first["long"] < first["longer"] < first["long again"]


def test_without_chunks_a_prompt_waits_for_a_step_that_has_room_for_it():
    engine = Engine(max_num_seqs=4, max_num_batched_tokens=10, chunked_prefill=False)
    for name, prompt in (("a", 6), ("b", 5), ("c", 2), ("longer than a step", 12)):
        engine.add(name, prompt=prompt)
    plans = [engine.step() for _ in range(4)]
    assert [computed(plan) for plan in plans] == [
        {"a": [6]},
        {"a": [1], "b": [5], "c": [2]},
        {"a": [1], "b": [1], "c": [1], "longer than a step": [7]},
        {"a": [1], "b": [1], "c": [1], "longer than a step": [5]},
    ]


def test_every_running_sequence_is_sure_of_a_token():
    engine = Engine(max_num_seqs=5, max_num_batched_tokens=5)
    engine.add("long", prompt=20)
    engine.add("many", prompt=1, n=4)
    plans = [engine.step() for _ in range(6)]
    assert [computed(plan).get("many") for plan in plans] == [[1]] + [[1] * 4] * 5
    assert all(plan.num_tokens <= 5 for plan in plans)
    assert [computed(plan)["long"] for plan in plans] == [[4], [1], [1], [1], [1], [1]]


def test_at_most_max_num_seqs_run_and_all_of_a_request_count():
    engine = Engine(max_num_seqs=5)
    engine.add("a", n=3, max_tokens=4)
    engine.add("b", n=3, max_tokens=4)  # 3 + 3 are too many
    engine.add("c", n=1, max_tokens=4)  # would fit, but nobody overtakes
    assert engine.step().admitted == ["a"] and engine.queues() == [["b", "c"], ["a"], []]
    for _ in range(3):
        assert engine.step().admitted == []
    assert engine.step().admitted == ["b", "c"]


def test_samples_that_ended_make_room():
    engine = Engine(max_num_seqs=4)
    a = engine.add("a", n=3)
    engine.add("b", n=2)
    engine.step()
    engine.scheduler.finish(a, a.sequences[1], "stop")
    assert engine.step().admitted == ["b"]


def test_nobody_overtakes_the_first_that_waits_for_memory():
    engine = Engine(num_blocks=4, block_size=4)
    engine.add("a", prompt=8, max_tokens=4)
    engine.add("big", prompt=12, max_tokens=1)
    engine.add("small", prompt=2, max_tokens=2)
    assert engine.step().admitted == ["a"]
    assert engine.queues()[0] == ["big", "small"]
    admitted = [name for plan in engine.run() for name in plan.admitted]
    assert admitted == ["big", "small"]


def test_the_watermark_keeps_blocks_free_at_an_admission_only():
    engine = Engine(num_blocks=10, block_size=4, watermark=0.25)  # 3 blocks
    engine.add("a", prompt=16, max_tokens=1)  # 4 blocks
    engine.add("b", prompt=12, max_tokens=20)  # 3, and 3 are left
    engine.add("c", prompt=4, max_tokens=20)  # 1, and 2 would be left
    assert engine.step().admitted == ["a", "b"]
    assert engine.step().admitted == ["c"]  # a is gone
    alone = Engine(num_blocks=4, block_size=4, watermark=0.9)
    alone.add("whole pool", prompt=16, max_tokens=1)
    assert alone.step().admitted == ["whole pool"]
    growing = Engine(num_blocks=4, block_size=4, watermark=0.9)
    growing.add("a", prompt=1, max_tokens=16)
    assert len(growing.run()) == 16  # running sequences may have them


# ---- samples and beams share ---------------------------------------------------------------------------------


def test_samples_share_the_prompt_and_copy_on_write():
    engine = Engine(block_size=4)
    engine.add("a", prompt=6, n=3, max_tokens=4)
    first = engine.step()
    assert computed(first) == {"a": [6]} and first.sequences[0].draw.num_draws == 3
    usage = engine.memory.usage()
    assert (usage.used, usage.shared) == (2, 2)
    second = engine.step()
    assert computed(second) == {"a": [1, 1, 1]} and len(second.copies) == 2  # the last of them writes in place
    full, last = first.sequences[0].block_table
    assert [s.block_table[0] for s in second.sequences] == [full] * 3
    assert {source for source, _ in second.copies} == {last}
    assert {s.block_table[1] for s in second.sequences} == {last} | {target for _, target in second.copies}
    assert [s.draw.index for s in second.sequences] == [0, 1, 2] and engine.step().copies == []


def test_beams_are_forked_and_freed():
    engine = Engine(block_size=4)
    a = engine.add("a", prompt=4, beams=3, max_tokens=4)
    engine.step()
    assert [seq.output_token_ids for seq in a.sequences] == [[WORD], [WORD + 1], [WORD + 2]]
    plan = engine.step()
    assert computed(plan) == {"a": [1, 1, 1]} and all(s.num_candidates == 6 for s in plan.sequences)
    assert [seq.output_token_ids for seq in a.sequences] == [[7, 7], [7, 8], [8, 7]]
    assert engine.memory.usage().shared == 2  # the prompt's, and that of beam 0 of which two go on
    engine.run()
    assert a.search.done and a.finished and len(a.search.hypotheses()) == 3


# ---- making way ------------------------------------------------------------------------------------------------


def crowded(*sizes, num_blocks=4, max_tokens=8, **settings):
    """Requests a, b, ... of (prompt, n) after their first step, in a pool of blocks of 4."""
    engine = Engine(num_blocks=num_blocks, block_size=4, **settings)
    for name, (prompt, n) in zip("abcdef", sizes, strict=False):
        engine.add(name, prompt=prompt, n=n, max_tokens=max_tokens)
    engine.step()
    return engine


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_the_latest_arrival_makes_way(mode):
    engine = crowded((4, 1), (4, 1), (8, 1), preemption=mode, num_cpu_blocks=9)
    plan = engine.step()  # two more blocks are wanted
    assert plan.preempted == [("c", mode)] and computed(plan) == {"a": [1], "b": [1]}
    assert engine.scheduler.num_preemptions[mode] == 1
    assert engine.requests[2].metrics.num_preemptions == 1
    assert engine.queues() == ([["c"], ["a", "b"], []] if mode == "recompute" else [[], ["a", "b"], ["c"]])
    assert len(plan.swap_out) == (2 if mode == "swap" else 0) and len(plan.freed) == 2
    engine.run()
    assert all(r.sequences[0].output_token_ids == [WORD] * 8 for r in engine.requests)


def test_as_many_make_way_as_are_needed_and_no_more():
    engine = crowded((8, 1), (4, 1), (4, 1), (4, 1), num_blocks=5)
    assert engine.step().preempted == [("d", "recompute"), ("c", "recompute")]  # d for a, and c for b
    assert engine.queues()[:2] == [["c", "d"], ["a", "b"]]


def test_the_latest_arrival_makes_way_for_itself_too():
    engine = crowded((3, 1), (4, 1), num_blocks=2, max_tokens=5)
    plan = engine.step()
    assert plan.preempted == [("b", "recompute")] and computed(plan) == {"a": [1]}


def test_nobody_is_admitted_in_a_step_that_preempts():
    engine = crowded((4, 1), (8, 1), num_blocks=3, max_tokens=5)
    engine.add("late", prompt=1)
    plan = engine.step()
    assert plan.preempted == [("b", "recompute")] and plan.admitted == []
    assert engine.queues()[0] == ["b", "late"]  # who was preempted keeps its place


def test_all_sequences_of_a_request_go_together():
    engine = crowded((8, 1), (8, 3), num_blocks=5, max_tokens=5, preemption="swap", num_cpu_blocks=9)
    plan = engine.step()
    assert plan.preempted == [("b", "swap")] and computed(plan) == {"a": [1]}
    assert len(plan.swap_out) == 2  # shared blocks are moved once
    assert all(engine.memory.is_swapped(seq.seq_id) for seq in engine.requests[1].sequences)
    plans = engine.run()
    back = next(plan for plan in plans if plan.resumed)
    assert back.resumed == ["b"] and len(back.swap_in) == 2 and computed(back) == {"b": [1, 1, 1]}


def test_auto_swaps_several_and_recomputes_one():
    several = crowded((12, 1), (4, 3), num_blocks=4, max_tokens=5, num_cpu_blocks=9, preemption="auto")
    assert several.step().preempted == [("b", "swap")]
    one = crowded((12, 1), (4, 1), num_blocks=4, max_tokens=5, num_cpu_blocks=9, preemption="auto")
    assert one.step().preempted == [("b", "recompute")]


@pytest.mark.parametrize("mode", ["swap", "auto"])
def test_without_swap_space_all_is_recomputed(mode):
    engine = crowded((12, 1), (4, 3), (4, 3), num_blocks=5, max_tokens=5, num_cpu_blocks=1, preemption=mode)
    plan = engine.step()
    assert plan.preempted == [("c", "swap"), ("b", "recompute")]  # c takes the only block of swap space
    assert engine.scheduler.num_preemptions == {"swap": 1, "recompute": 1}
    engine.run()
    assert all(len(seq.output_token_ids) == 5 for r in engine.requests for seq in r.sequences)


def test_newcomers_wait_while_others_are_swapped_out():
    engine = crowded((8, 1), (8, 1), num_blocks=4, max_tokens=5, num_cpu_blocks=9, preemption="swap")
    assert engine.step().preempted == [("b", "swap")]
    engine.add("late", prompt=1, max_tokens=1)
    while engine.queues()[2] == ["b"]:
        assert engine.queues()[0] == ["late"] and engine.memory.num_free >= 1  # there would be room for it
        plan = engine.step()
    assert plan.resumed == ["b"] and plan.admitted == ["late"]
    engine.run()


def test_swapped_out_requests_come_back_in_order_and_go_on():
    engine = crowded((12, 1), (4, 3), (4, 3), num_blocks=5, max_tokens=5, num_cpu_blocks=9)
    assert engine.step().preempted == [("c", "swap"), ("b", "swap")]
    plans = engine.run()
    assert [name for plan in plans for name in plan.resumed] == ["b", "c"]
    for plan in plans:
        assert all(s.start > 0 for s in plan.sequences)  # nothing is computed again
        for name in plan.resumed:
            assert computed(plan)[name] == [1, 1, 1]


def test_what_was_set_aside_for_a_victim_is_somebody_elses():
    engine = Engine(num_blocks=8, max_num_seqs=3, max_num_batched_tokens=6)
    for name, prompt, longest in (("a", 4, 12), ("b", 20, 2), ("c", 5, 8)):
        engine.add(name, prompt=prompt, max_tokens=longest)
    plan = engine.until(lambda plan: plan.preempted)
    assert plan.preempted == [("c", "recompute")] and computed(plan) == {"a": [1], "b": [5]}  # all six


def test_whoever_comes_back_keeps_to_the_budget():
    engine = Engine(num_blocks=7, num_cpu_blocks=9, max_num_seqs=4, max_num_batched_tokens=14)
    engine.add("a", prompt=8, max_tokens=10)
    engine.add("b", prompt=4, max_tokens=10)
    engine.add("c", prompt=4, max_tokens=9, n=2)
    engine.until(lambda plan: ("c", "swap") in plan.preempted)
    engine.until(lambda plan: ("b", "recompute") in plan.preempted)
    plan = engine.step()
    assert computed(plan) == {"b": [13]} and engine.memory.num_free == 7  # b ends, and c needs two tokens
    assert engine.step().resumed == ["c"]
    engine.run()


def test_a_request_joins_only_if_it_is_not_preempted_at_once():
    """A group that was preempted, and a prompt longer than a step, wait for room for all that they have."""
    engine = crowded((12, 1), (4, 3), num_blocks=5, max_tokens=5, preemption="recompute")
    plans = engine.run()
    assert [name for plan in plans for name, _ in plan.preempted] == ["b"]
    assert [name for plan in plans for name in plan.admitted] == ["b"]
    engine = Engine(num_blocks=6, block_size=4, max_num_seqs=2, max_num_batched_tokens=4)
    engine.add("a", prompt=4, max_tokens=5)
    engine.add("long", prompt=24, max_tokens=1)
    plans = engine.run()
    assert not any(plan.preempted for plan in plans) and plans[5].admitted == ["long"]


def test_whoever_arrived_first_comes_back_first_swapped_out_or_not():
    engine = crowded((8, 1), (4, 1), (4, 2), num_blocks=4, max_tokens=5, num_cpu_blocks=9)
    assert engine.step().preempted == [("c", "swap"), ("b", "recompute")]
    returns = [name for plan in engine.run() for name in plan.resumed + plan.admitted]
    assert returns == ["b", "c"]


def test_recomputation_computes_prompt_and_output_at_once():
    engine = crowded((4, 1), (4, 1), num_blocks=4)
    plan = engine.until(lambda plan: plan.preempted)
    b = engine.requests[1].sequences[0]
    assert plan.preempted == [("b", "recompute")] and b.num_computed_tokens == 0
    assert b.output_token_ids == [WORD] * 5
    again = next(plan for plan in engine.run() if "b" in plan.admitted)
    [s] = [s for s in again.sequences if s.request_id == "b"]
    assert (s.start, s.token_ids) == (0, b.prompt_token_ids + [WORD] * 5)
    assert s.draw.num_draws == 1 and s.draw.index == 0


def test_samples_are_recomputed_by_one_that_the_others_fork():
    engine = crowded((12, 1), (6, 3), num_blocks=8, max_tokens=5, preemption="recompute")
    plan = engine.until(lambda plan: plan.preempted)
    b = engine.requests[1]
    assert plan.preempted == [("b", "recompute")] and [len(seq) for seq in b.sequences] == [9, 9, 9]
    plans = engine.run()
    first = next(index for index, plan in enumerate(plans) if "b" in plan.admitted)
    assert computed(plans[first])["b"] == [6] and plans[first].sequences[-1].draw is None  # the prompt, and no more
    rest = [s for s in plans[first + 1].sequences if s.request_id == "b"]
    assert [(s.start, len(s.token_ids), s.draw.num_draws, s.draw.index) for s in rest] == [
        (6, 3, 1, 0), (6, 3, 1, 1), (6, 3, 1, 2),
    ]  # fmt: skip
    assert len(plans[first + 1].copies) == 2


def test_beams_take_their_next_step_together_after_a_recomputation():
    settings = {"preemption": "recompute", "max_num_seqs": 5, "max_num_batched_tokens": 7}
    engine = Engine(num_blocks=7, block_size=4, **settings)
    engine.add("a", prompt=4, max_tokens=13)
    b = engine.add("b", prompt=4, beams=3, max_tokens=9)
    plan = engine.until(lambda plan: plan.preempted)
    length = len(b.sequences[0])
    assert plan.preempted == [("b", "recompute")] and length > 8
    plans = [plan for plan in engine.run() if "b" in computed(plan)]
    drawing = next(i for i, plan in enumerate(plans) if any(s.num_candidates for s in plan.sequences))
    counts = [computed(plan)["b"] for plan in plans[: drawing + 1]]
    assert counts[0] == [4] and counts[-1] == [1, 1, 1]  # first the prompt; then what they had; at last together
    assert sum(map(sum, counts[1:-1])) == 3 * (length - 1 - 4) and len(counts) > 3


# ---- saying no, and ending -----------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("n, prompt, max_tokens", [(1, 9, 7), (3, 9, 7), (3, 8, 8), (4, 1, 1), (2, 16, 2)])
def test_what_fits_exactly_finishes_and_one_block_less_is_refused(block_size, n, prompt, max_tokens):
    spacious = Engine(num_blocks=1000, block_size=block_size)
    spacious.add("a", prompt=prompt, max_tokens=max_tokens, n=n)
    spacious.run()
    need = spacious.memory.usage().peak_used  # what it really takes
    exact = Engine(num_blocks=need, block_size=block_size, watermark=0.5)
    exact.add("a", prompt=prompt, max_tokens=max_tokens, n=n)
    assert not any(plan.preempted for plan in exact.run())
    if need > 1:
        with pytest.raises(RequestRefused) as refused:
            Engine(num_blocks=need - 1, block_size=block_size).add("a", prompt, max_tokens, n)
        for number in (need, f"{prompt} prompt", f"{max_tokens} output", f"{n} seq", f"size {block_size}", need - 1):
            assert str(number) in str(refused.value)


def test_more_sequences_than_may_run_are_refused():
    engine = Engine(max_num_seqs=3)
    for wide in ({"n": 4}, {"beams": 4}):
        with pytest.raises(RequestRefused, match="wants 4 sequences at once, but max_num_seqs is 3"):
            engine.add("wide", **wide)
    assert not engine.scheduler.has_unfinished and engine.step() is None


@pytest.mark.parametrize("wide", [{}, {"n": 3}, {"beams": 3}])
def test_abort_frees_everything_at_once(wide):
    def states():
        """The same request waiting, just admitted, running, halfway through its prompt, and preempted."""
        for steps in (0, 1, 3):
            engine = Engine(num_blocks=9, max_num_batched_tokens=64)
            yield engine, engine.add("x", prompt=6, max_tokens=5, **wide), steps
        engine = Engine(num_blocks=9, max_num_seqs=4, max_num_batched_tokens=4)
        yield engine, engine.add("x", prompt=6, max_tokens=5, **wide), 1
        for mode in ("swap", "recompute"):
            engine = Engine(num_blocks=9, num_cpu_blocks=9, preemption=mode)
            engine.add("first", prompt=16, max_tokens=20)
            engine.add("second", prompt=4, max_tokens=20)
            yield engine, engine.add("x", prompt=6, max_tokens=5, **wide), 0

    where = []
    for engine, request, steps in states():
        for _ in range(steps):
            engine.step()
        if len(engine.requests) > 1:
            engine.until(lambda plan: any(name == "x" for name, _ in plan.preempted))
        where.append(["x" in queue for queue in engine.queues()])
        mine = {seq.seq_id for seq in request.sequences}
        engine.scheduler.abort(request)
        assert request.finished and not any("x" in queue for queue in engine.queues())
        assert not mine & set(engine.memory.sequences())
        assert engine.memory.usage().cpu_used == 0
        engine.run()
    waiting, running, swapped = [True, False, False], [False, True, False], [False, False, True]
    assert where == [waiting, running, running, running, swapped, waiting]


def test_ending_one_of_several_leaves_the_others():
    engine = Engine()
    a = engine.add("a", n=3, max_tokens=4)
    engine.step()
    engine.step()
    engine.scheduler.finish(a, a.sequences[0], "stop", "the end")
    assert not a.finished and computed(engine.step()) == {"a": [1, 1]}
    engine.run()
    assert [(len(s.output_token_ids), s.finish_reason, s.stop_reason) for s in a.sequences] == [
        (2, "stop", "the end"), (4, "length", None), (4, "length", None),
    ]  # fmt: skip


def test_end_of_text_and_stop_tokens_end_a_sequence():
    engine = Engine()
    a, b = engine.add("a"), engine.add("b")
    b.stop_ids = b.stop_ids | {5}
    engine.step()
    engine.say = {"a": END, "b": 5}
    engine.step()
    ends = [(seq.output_token_ids, seq.finish_reason, seq.stop_reason) for r in (a, b) for seq in r.sequences]
    assert ends == [([WORD, END], "stop", None), ([WORD, 5], "stop", 5)]  # the end of text has no reason of its own
    assert engine.step() is None and engine.memory.num_free == engine.memory.num_blocks


def test_a_plan_is_plain_data():
    engine = crowded((12, 1), (4, 3), num_blocks=5, max_tokens=5, num_cpu_blocks=9)
    plans = [engine.scheduler.schedule(), *engine.run()]
    for plan in plans:
        again = json.loads(json.dumps(plan.to_json()))
        assert again["step"] == plan.step and len(again["sequences"]) == len(plan.sequences)
    assert [plan.step for plan in plans] == list(range(2, 2 + len(plans)))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"preemption": "drop"}, "preemption='drop': must be one of auto, recompute, swap"),
        ({"max_num_seqs": 0}, "max_num_seqs=0: must be at least 1"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "max_num_batched_tokens=8: must be at least max_num_seqs=9"),
        ({"watermark": 1.0}, "watermark=1.0: must be at least 0 and less than 1"),
        ({"watermark": -0.1}, "watermark=-0.1"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError) as refused:
        Engine(**settings)
    assert message in str(refused.value)


# ---- several tokens in a step: the door for speculation --------------------------------------------------------------


def several(engine, name, said, tried=0):
    """A step in which a request gets several tokens; `tried` tokens were computed besides those that it knew."""
    plan = engine.scheduler.schedule()
    [s] = [s for s in plan.sequences if s.request_id == name]
    if tried:
        engine.memory.append({s.seq_id: tried})
        engine.scheduler.sequences[s.seq_id].num_computed_tokens += tried
    engine.scheduler.update(plan, StepOutput({s.seq_id: [[SampledToken(token) for token in said]]}))
    engine.memory.check()


@pytest.mark.parametrize(
    ("said", "kept", "reason"),
    [((7, 8, 9), [7, 8, 9], None), ((7, END, 9), [7, END], "stop"), ((7, 8, 9, 5, 6), [7, 8, 9, 5], "length")],
)
def test_a_sequence_may_get_several_tokens_up_to_its_end(said, kept, reason):
    engine = Engine(block_size=4)
    request = engine.add("a", prompt=6, max_tokens=4)
    several(engine, "a", said)
    [seq] = request.sequences
    assert (seq.output_token_ids, seq.finish_reason) == (kept, reason)
    assert [token.token_id for token in seq.sampled] == kept
    if reason is None:  # what it has more than one of is computed in the next step
        assert computed(engine.step()) == {"a": [3]}
    engine.run()
    assert engine.memory.usage().used == 0


@pytest.mark.parametrize(("tried", "said"), [(4, 1), (4, 3), (4, 5), (9, 2)])
def test_slots_of_what_was_only_tried_are_taken_back(tried, said):
    engine = Engine(block_size=4, num_blocks=10)
    request = engine.add("a", prompt=6, max_tokens=20)
    engine.step()
    several(engine, "a", [7] * said, tried)
    [seq] = request.sequences
    assert seq.num_computed_tokens == engine.memory.num_tokens(seq.seq_id) == 6 + said and len(seq) == 6 + 1 + said
    assert engine.memory.usage().used == -(-(6 + said) // 4)
    assert computed(engine.step()) == {"a": [1]}
    engine.run()
    assert len(seq.output_token_ids) == 20 and engine.memory.usage().used == 0
