"""Beams in the simulation of serving systems: against BeamSearch alone, and against memory counted block by block."""

import doctest
import random
from itertools import pairwise

import numpy as np
import pytest
from tiny_model import make_folder

from minipaged.decoding.beam_search import BeamSearch
from minipaged.experiments import beams, divergence
from minipaged.experiments.beams import CountedPaged, PagedBeams, Sharing, saving
from minipaged.experiments.divergence import (
    CHUNK,
    WIDTHS,
    Candidates,
    Divergence,
    Search,
    Step,
    count_blocks,
    figures,
    fit,
)
from minipaged.experiments.hardware import SERVERS
from minipaged.experiments.loads import Job, jobs
from minipaged.experiments.simulation import simulate
from minipaged.experiments.systems import kept
from minipaged.llm import LLM
from minipaged.requests.beam_search_params import BeamSearchParams


@pytest.mark.parametrize("module", [beams, divergence])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


# --- candidates -----------------------------------------------------------------------------------------------------


def test_candidates_are_a_models_best_first():
    for offered in map(Candidates(4).at, range(2 * CHUNK)):
        assert len(offered) == 4
        for beam in offered:
            assert [token for token, _ in beam] == list(range(8))
            assert all(a >= b for (_, a), (_, b) in pairwise(beam)) and beam[0][1] < 0
            assert sum(np.exp([logprob for _, logprob in beam])) < 1


def test_candidates_depend_on_seed_request_step_and_rank_and_on_nothing_else():
    steps = [0, 1, CHUNK - 1, CHUNK, 3 * CHUNK + 5]
    there, back = Candidates(3, seed=5, request=7), Candidates(3, seed=5, request=7)
    first = {step: there.at(step) for step in steps}
    assert {step: back.at(step) for step in reversed(steps)} == first
    others = [Candidates(3, 6, 7), Candidates(3, 5, 8), Candidates(3, 7, 5)]
    drawn = [*first.values(), *(other.at(step) for other in others for step in steps)]
    beam_rows = [tuple(logprob for _, logprob in beam) for offered in drawn for beam in offered]
    assert len(set(beam_rows)) == len(beam_rows) == 3 * 4 * len(steps)


@pytest.mark.parametrize("model", [Divergence(), Divergence(3.0, 0.5, 0.1), Divergence(1.5, 0.1, 0.5)])
def test_the_fit_finds_what_candidates_were_made_with(model):
    found = fit([divergence.made_up(6, 20, request, model) for request in range(60)])
    assert found.scale == pytest.approx(model.scale, rel=0.05)
    assert found.by_step == pytest.approx(model.by_step, abs=0.05)
    assert found.by_beam == pytest.approx(model.by_beam, abs=0.05)


REAL = {2: (1.72, 3.6, 31.3), 4: (3.18, 9.3, 45.2), 6: (4.70, 11.6, 49.5)}  # SmolLM2's, from the docstring


@pytest.mark.parametrize("width", WIDTHS)
def test_made_up_beams_meet_where_real_ones_do(width):
    ours = figures(divergence.made_up(width, 17, request) for request in range(60))
    parents, depth, saved = REAL[width]
    assert ours.parents == pytest.approx(parents, abs=0.1)
    assert ours.depth == pytest.approx(depth, rel=0.2)
    assert ours.saved == pytest.approx(saved, abs=1.5)
    line = next(line for line in divergence.__doc__.splitlines() if line.split()[:1] == [str(width)])
    assert [float(number) for number in line.split()[1::2]] == [parents, depth, saved]


def test_sharper_models_share_less():
    shares = [figures(divergence.made_up(4, 17, n, Divergence(scale)) for n in range(20)).saved for scale in (1, 2, 4)]
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1] + 3


# --- figures of a search --------------------------------------------------------------------------------------------


def test_figures_by_hand():
    one = Step([[-0.1]], [(1,), (2,)])  # the prompt's step has no parents to count
    two = Step([[-0.1], [-0.2]], [(1, 5), (1, 6)])
    three = Step([[-0.1], [-0.2]], [(1, 5, 5), (1, 6, 5)])
    assert figures([Search(2, 15, [one, two])]) == (1, 1, 12.5)  # the first block is full and the same: one of four
    assert figures([Search(2, 15, [one, two, three])]) == (1.5, pytest.approx(4 / 3), pytest.approx(50 / 3))


def test_shared_blocks_are_those_with_equal_beginnings():
    rng = random.Random(0)
    for _ in range(200):
        size, prompt, length = rng.randint(1, 5), rng.randint(1, 9), rng.randint(1, 9)
        paths = [tuple(rng.randint(0, 1) for _ in range(length)) for _ in range(3)]
        texts = [(*range(-prompt, 0), *path) for path in paths]
        blocks = [text[: start + size] for text in texts for start in range(0, len(text), size)]
        assert count_blocks(prompt, paths, size) == (len(set(blocks)), len(blocks))
        together = next((n for n in range(length) if len({path[n] for path in paths}) > 1), length)
        assert figures([Search(3, prompt, [Step([[0.0]] * 3, paths)])]).depth == length - together


def test_searches_of_a_real_model_are_recorded(tmp_path):
    llm = LLM(str(make_folder(tmp_path)), device="cpu", num_blocks=200, max_num_seqs=24, seed=0)
    before = list(llm.observers)
    searches = divergence.measured(llm, ["a b", "c"], output=9)
    assert [search.width for search in searches] == [2, 2, 4, 4, 6, 6] and llm.observers == before
    for search in searches:
        assert [len(step.paths[0]) for step in search.steps] == list(range(1, 9))
        assert [len(step.logprobs) for step in search.steps] == [1] + [search.width] * 7
        assert all(len(beam) == 2 * search.width for step in search.steps for beam in step.logprobs)
        for (_, old), (_, new) in pairwise(search.steps):
            assert {path[:-1] for path in new} <= set(old) and len(set(new)) == search.width
    assert "real" in divergence.table(searches, divergence.MEASURED, 2)


# --- the system -----------------------------------------------------------------------------------------------------


def alone(width, output, seed, request):
    """Survivors of every step, and how it ends, without any memory."""
    search, steps = BeamSearch(BeamSearchParams(width, output, ignore_eos=True), output, ()), []
    candidates = Candidates(width, seed, request)
    for step in range(output):
        search.advance(candidates.at(step)[: len(search.running)])
        steps.append([beam.token_ids for beam in search.running])
    return steps, search.hypotheses()


def random_jobs(rng):
    return [Job(0.0, rng.randint(1, 20), rng.randint(1, 25)) for _ in range(9)]


def drive(system, some, inspect=None):
    """One job comes in each iteration. Returns the requests, and (job, the iteration in which it ended)."""
    requests, ended, waiting = [], [], list(some)
    for iteration in range(10_000):
        if waiting:
            system.submit(waiting.pop(0))
            requests.append(system.scheduler.waiting[-1])
        work = system.plan()
        if work is None:
            assert not waiting
            return requests, ended
        system.memory.check()
        if inspect:
            inspect(work, requests)
        ended += [(job, iteration) for job in system.finish(work.iterations)]
    raise AssertionError("it goes on and on")


@pytest.mark.parametrize("mode", ["auto", "swap", "recompute"])
@pytest.mark.parametrize("width, size", [(2, 1), (3, 4), (6, 16)])
def test_memory_changes_nothing_about_the_search(mode, width, size):
    rng = random.Random(f"{mode} {width} {size}")
    some = random_jobs(rng)
    worst = max(-(-kept(job) // size) * width for job in some)
    system = PagedBeams(worst * size, size, width, mode, seed=3)
    requests, ended = drive(system, some)
    assert sum(system.scheduler.num_preemptions.values()) > 0
    if mode == "recompute":
        assert system.scheduler.num_preemptions["swap"] == 0
    assert sorted(job for job, _ in ended) == sorted(some)
    for number, (job, request) in enumerate(zip(some, requests, strict=True)):
        assert request.search.hypotheses() == alone(width, job.output, 3, number)[1]
        assert {len(h.token_ids) for h in request.search.hypotheses()} == {job.output}
    assert system.memory.num_free == system.memory.num_blocks and not system.memory.sequences()
    assert system.num_running == system.num_waiting == 0


@pytest.mark.parametrize("mode", ["swap", "recompute"])
@pytest.mark.parametrize("width, size, spare", [(2, 3, 5), (4, 16, 7), (3, 2, 90)])
def test_every_slot_has_its_name(mode, width, size, spare):
    """The account, the plan and what is shared, painted slot by slot from page tables."""
    some = random_jobs(random.Random(width * size))
    worst = max(-(-kept(job) // size) * width for job in some)
    num_slots = (worst + spare) * size + size // 2
    system, expected = PagedBeams(num_slots, size, width, mode), Sharing()

    def inspect(work, requests):
        memory = system.memory
        names, held = ["external"] * num_slots, 0
        here = [seq for seq in memory.sequences() if not memory.is_swapped(seq)]
        for request in requests:
            for seq in request.live:
                if seq.seq_id in here:
                    table, tokens = memory.block_table(seq.seq_id), memory.num_tokens(seq.seq_id)
                    held += len(table)
                    last = kept(some[request.arrival])
                    for place in range(len(table) * size):
                        slot = table[place // size] * size + place % size
                        names[slot] = "tokens" if place < tokens else "reserved" if place < last else "internal"
        account = system.account()
        account.must_be(num_slots)
        assert {name: names.count(name) for name in vars(account)} == vars(account)
        used = len({block for seq in here for block in memory.block_table(seq)})
        expected.saved, expected.without = expected.saved + held - used, expected.without + held
        plan = system._plan
        assert (work.iterations, work.sequences) == (1, len(plan.sequences))
        assert work.tokens == plan.num_tokens and work.moved_blocks == len(plan.swap_in) + len(plan.swap_out)
        old = [s for s in plan.sequences if s.request_id not in plan.admitted]
        assert work.context == sum(memory.num_tokens(s.seq_id) for s in old)

    drive(system, some, inspect)
    assert system.sharing == expected
    assert (sum(system.scheduler.num_preemptions.values()) > 0) == (spare < 90)


def test_an_iteration_gives_each_beam_a_token_and_paths_tell_the_blocks():
    """Alone in memory: what is computed and shared follows from the search, and from nothing else."""
    width, prompt, output = 4, 19, 40
    system, iteration = PagedBeams(4096, width=width, seed=1), iter(range(output))
    steps, _ = alone(width, output, 1, 0)

    def inspect(work, requests):
        step = next(iteration)
        paths = steps[step - 1] if step else [()]
        beams_now = [tuple(seq.output_token_ids) for seq in requests[0].live]
        assert beams_now == paths
        assert (work.sequences, work.tokens) == ((len(paths), len(paths)) if step else (1, prompt))
        assert work.context == (len(paths) * (prompt + step) if step else 0)
        usage = system.memory.usage()
        assert (usage.used, usage.used + usage.blocks_saved_by_sharing) == count_blocks(prompt, paths)

    _, ended = drive(system, [Job(0.0, prompt, output)], inspect)
    assert ended == [(Job(0.0, prompt, output), output - 1)]


def test_the_seed_decides_about_the_beams_and_not_about_when_requests_end():
    some = jobs("alpaca", 10.0, 1.0)
    runs = [(system := PagedBeams(9000, width=4, seed=seed), drive(system, some)[1]) for seed in (1, 1, 2)]
    (a, ends), (b, same), (c, others) = runs
    assert a.sharing == b.sharing != c.sharing and ends == same == others


def test_a_simulation_ends_with_every_answer():
    some = jobs("alpaca", 6.0, 6.0)
    system, server = PagedBeams(SERVERS["13b"].num_slots, width=2), SERVERS["13b"]
    outcome = simulate(system, some, server)  # checks the account's sum at every step
    assert len(outcome.latencies) == len(some) and outcome.shares["internal"] < 5


# --- Figure 15 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 6])
def test_samples_share_the_full_blocks_of_their_prompt(samples):
    some = jobs("alpaca", 2.0, 40.0)
    system, saved, without = CountedPaged(SERVERS["13b"].num_slots, samples=samples), 0, 0
    simulate(system, some, SERVERS["13b"])
    for job in some:
        for step in range(job.output):
            rows = samples if step else 1
            saved += (rows - 1) * (job.prompt // 16)
            without += rows * -(-(job.prompt + step) // 16)
    assert system.sharing == Sharing(saved, without)


def test_more_sequences_save_more_and_beams_save_most():
    samples, beams = ([saving("alpaca", method, width, 25) for width in WIDTHS] for method in ("samples", "beams"))
    assert samples == sorted(samples) and beams == sorted(beams)
    assert all(s < b < 100 * (1 - 1 / width) for s, b, width in zip(samples, beams, WIDTHS, strict=True))
