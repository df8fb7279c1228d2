"""The live comparison: memory in runs, padded batches, the account of every slot, and a small run of it all."""

import doctest
import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.experiments import __main__ as command
from minipaged.experiments import live, live_client, live_record, live_report, live_systems
from minipaged.experiments.gallery import data_of
from minipaged.experiments.live import LiveSettings, scaled_jobs
from minipaged.experiments.live_client import Client, Tenant, account
from minipaged.experiments.live_systems import SYSTEMS, ContiguousKVCacheManager, batch_size, install
from minipaged.experiments.loads import Job
from minipaged.memory import Allocated, IntegrityError, KVCacheManager, MisuseError, NoSpace
from minipaged.requests.request import Request
from minipaged.scheduling.plan import StepPlan
from minipaged.scheduling.scheduler import Scheduler
from tests.recall_model import RecallRunner, expected
from tests.tiny_model import make_folder

BLOCKS, SIZE, LONGEST = 16, 4, 16  # 4 requests of 4 blocks
FEW = [Job(0.0, 3, 4), Job(0.0, 5, 2), Job(0.0, 2, 7), Job(0.0, 4, 3), Job(0.0, 1, 5), Job(0.0, 6, 1)]


class Engine:
    """What the client needs of `LLM`, over the recall model: a step takes a second of a clock that else stands."""

    def __init__(self, num_blocks=BLOCKS, block_size=SIZE, budget=64):
        self.memory = KVCacheManager(num_blocks, block_size)
        self.scheduler = Scheduler(self.memory, 8, budget)
        self.runner = RecallRunner(num_blocks, block_size, 0)
        self.observers, self.requests, self.plans, self.now = [], {}, [], 0.0
        self.step_seconds, self.interrupt_at = 1.0, math.inf

    def add_request(self, prompt, params, request_id):
        request = Request(request_id, len(self.requests), prompt, params, params.max_tokens, frozenset({0}))
        self.requests[request_id] = request
        self.scheduler.add(request)

    @property
    def has_unfinished_requests(self):
        return self.scheduler.has_unfinished

    def step(self):
        if len(self.plans) >= self.interrupt_at:
            raise KeyboardInterrupt
        plan = self.scheduler.schedule()
        assert plan.sequences, "nothing to do, and work is left"
        self.memory.check()
        output = self.runner.execute(plan)
        changed = self.scheduler.update(plan, output)
        self.memory.check()
        self.plans.append(plan)
        self.now += self.step_seconds
        for observer in self.observers:
            observer(plan, output)
        return [self._output(request) for request in changed]

    def _output(self, request):
        tokens = list(request.sequences[0].output_token_ids)
        return SimpleNamespace(
            request_id=request.request_id, finished=request.finished, outputs=[SimpleNamespace(token_ids=tokens)]
        )

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def serve(name, jobs, engine=None, longest=LONGEST):
    """A run of a system on the recall model."""
    engine = engine or Engine()
    prompts = [[100 * number + i for i in range(job.prompt)] for number, job in enumerate(jobs, start=1)]
    client = Client(engine, SYSTEMS[name], jobs, prompts, longest, engine.clock, engine.sleep)
    client.run()
    assert not engine.memory.sequences() and engine.memory.num_free == engine.memory.num_blocks
    return client


def jobs_of(sizes):
    """Jobs of (seconds after the one before, prompt, output)."""
    now, jobs = 0.0, []
    for gap, prompt, output in sizes:
        now += gap
        jobs.append(Job(now, prompt, output))
    return jobs


LOADS = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 3.0, 20.0]), st.integers(1, 8), st.integers(1, 8)), min_size=1,
                 max_size=12).map(jobs_of)  # fmt: skip


# ---- memory in runs ------------------------------------------------------------------------------------------


@given(st.integers(1, 24), st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), max_size=30))
def test_runs_follow_each_other_never_overlap_and_are_refused_only_where_no_hole_is_left(num_blocks, moves):
    memory = ContiguousKVCacheManager(num_blocks, SIZE, [reservation for reservation, _ in moves])
    owner = {}  # of each block, what rounding takes included
    for seq_id, (reservation, ending) in enumerate(moves):
        blocks = -(-reservation // SIZE)
        piece = 1 << (blocks - 1).bit_length()
        holes = [start for start in range(0, num_blocks - piece + 1, piece)
                 if not any(start + i in owner for i in range(piece))]  # fmt: skip
        answer = memory.allocate(seq_id, 1, keep_free=num_blocks)
        assert isinstance(answer, Allocated if holes else NoSpace)
        if holes:
            start = answer.blocks[0]
            assert start in holes and answer.blocks == list(range(start, start + blocks))
            owner.update(dict.fromkeys(range(start, start + piece), seq_id))
            assert memory.append({seq_id: reservation - 1}).copies == []
            assert memory.slots(seq_id, 0, reservation) == list(range(start * SIZE, start * SIZE + reservation))
        memory.check()
        running = sorted(set(owner.values()))
        if running and ending:
            gone = running[ending % len(running)]
            memory.free(gone)
            owner = {block: seq_id for block, seq_id in owner.items() if seq_id != gone}
        memory.check()
    assert memory.num_free == num_blocks - sum(-(-moves[seq_id][0] // SIZE) for seq_id in set(owner.values()))


def test_a_reservation_is_the_most_that_a_sequence_can_have():
    memory = ContiguousKVCacheManager(BLOCKS, SIZE, [10, 10])
    with pytest.raises(MisuseError, match="10 slots reserved, not 11"):
        memory.allocate(0, 11)
    memory.allocate(0, 8)
    memory.allocate(1, 9)
    with pytest.raises(MisuseError, match="sequence 1 has 10 slots reserved, not 11"):
        memory.append({0: 2, 1: 2})
    assert memory.num_tokens(0) == 8, "all or nothing"
    memory.append({0: 2, 1: 1})
    assert (memory.num_tokens(0), memory.num_tokens(1)) == (10, 10)


def test_what_contiguous_memory_can_not_do_is_refused_and_damage_is_found():
    memory = ContiguousKVCacheManager(BLOCKS, SIZE, [8, 8])
    memory.allocate(0, 1)
    memory.allocate(1, 1)
    with pytest.raises(MisuseError, match="shared"):
        memory.fork(0, 2)
    with pytest.raises(MisuseError, match="preempted"):
        memory.swap_out([0])
    memory._gpu.tables[0].blocks[1] = 2
    with pytest.raises(IntegrityError, match="not contiguous"):
        memory.check()
    memory._gpu.tables[0].blocks[:] = [2, 3]
    with pytest.raises(IntegrityError, match="two runs"):
        memory.check()


# ---- the account ---------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 9), st.integers(0, 40), st.integers(1, 4))
def test_every_slot_of_a_request_is_in_exactly_one_part(stored, pads, more, block_size):
    reservation = pads + stored + more
    capacity = -(-reservation // block_size) * block_size
    before = None
    for num_tokens in range(1, reservation + 1):
        parts = Tenant(stored, pads, reservation).account(num_tokens, capacity)
        assert min(asdict(parts).values()) >= 0 and sum(asdict(parts).values()) == capacity
        assert parts.tokens == len(range(pads, min(num_tokens, pads + stored)))  # neither pads nor surplus
        assert parts.tokens + parts.reserved == stored and parts.external == capacity - reservation
        assert before is None or before.tokens <= parts.tokens
        before = parts


def test_a_table_that_overlaps_another_is_noticed():
    one = SimpleNamespace(request_id="0", block_table=[0, 1], context_len=5)
    plan = StepPlan(1, sequences=[one, SimpleNamespace(request_id="1", block_table=[1, 2], context_len=5)])
    with pytest.raises(RuntimeError, match="of 4 blocks of 4"):
        account(plan, [Tenant(8), Tenant(8)], 4, 4)
    assert account(StepPlan(1, sequences=[one]), [Tenant(6)], 4, 4) == live_client.Account(5, 1, 2, 8)


@given(st.sampled_from(list(SYSTEMS)), LOADS)
def test_every_system_answers_all_and_gives_account_of_all_memory_at_every_moment(name, jobs):
    client = serve(name, jobs)
    assert {n: len(tokens) for n, tokens in client.tokens.items()} == {n: job.output for n, job in enumerate(jobs)}
    for moment in client.moments:
        parts = asdict(moment.account)
        assert sum(parts.values()) == BLOCKS * SIZE and min(parts.values()) >= 0
        assert name in ("static", "contiguous") or parts["internal"] <= 12 * SIZE * moment.running
    assert sum(moment.seconds for moment in client.moments) == pytest.approx(client.llm.now)
    assert client.llm.now == pytest.approx(max(client.finished[n] + job.arrival for n, job in enumerate(jobs)))
    assert all(0 < client.first[n] <= client.finished[n] for n in client.tokens)
    row = live_report.summarize(name, math.inf, client, None)
    assert sum(row.account.values()) == pytest.approx(100)
    tokens = sum(moment.account.tokens * moment.seconds for moment in client.moments)
    assert row.account["tokens"] == pytest.approx(100 * tokens / row.seconds / (BLOCKS * SIZE))


# ---- the systems ---------------------------------------------------------------------------------------------


@given(LOADS)
def test_memory_does_not_change_what_is_said(jobs):
    paged = serve("paged", jobs)
    for name in ("contiguous", "contiguous-pow2", "contiguous-oracle"):
        assert serve(name, jobs).tokens == paged.tokens
    for number, tokens in paged.tokens.items():
        wanted = expected(paged.llm.requests[str(number)])[0][0]
        assert tokens[: len(wanted)] == wanted  # which ends early where a stop string would end it


def test_contiguous_reserves_the_most_paged_takes_what_it_needs():
    contiguous, paged = serve("contiguous", FEW), serve("paged", FEW)
    first = contiguous.llm.plans[0]
    assert [s.block_table for s in first.sequences] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert max(moment.running for moment in contiguous.moments) == batch_size(BLOCKS, SIZE, LONGEST) == 4
    # 14 tokens of the 6 + 6 + 8 + 6 that there will be; the rest of the 64 slots is reserved in vain.
    assert contiguous.moments[0].account == live_client.Account(14, 12, 38, 0)
    assert contiguous.moments[0].waiting == 2 and paged.moments[0].waiting == 0
    # All six: 3 + 5 + 2 + 4 + 1 + 6 tokens in 1 + 2 + 1 + 1 + 1 + 2 blocks. Of the 11 slots that are empty in these,
    # 1 + 1 + 2 + 0 + 3 + 0 are going to be used.
    assert paged.moments[0].account == live_client.Account(21, 7, 4, (16 - 8) * SIZE)
    assert sum(paged.finished.values()) < sum(contiguous.finished.values())


def test_requests_leave_and_join_contiguous_memory_at_every_step():
    client = serve("contiguous", FEW)
    ended = [n for n in range(4) if FEW[n].output == 2]
    assert [plan.admitted for plan in client.llm.plans[:3]] == [["0", "1", "2", "3"], [], ["4"]] and ended == [1]


@pytest.mark.parametrize("name,tokens,first", [("", 16, 2), ("-pow2", 1 + 4, 4), ("-oracle", 1 + 3 - 1, 8)])
def test_smaller_reservations_let_more_in(name, tokens, first):
    jobs = [Job(0.0, 1, 3)] * 10
    assert SYSTEMS["contiguous" + name].reserve(jobs[0], LONGEST) == tokens
    assert len(serve("contiguous" + name, jobs, Engine(num_blocks=8)).llm.plans[0].sequences) == first


# ---- padded batches ------------------------------------------------------------------------------------------


def test_a_padded_batch_computes_pads_and_surplus_and_ends_as_one():
    client = serve("static", FEW)
    plans = client.llm.plans
    assert [[len(s.token_ids) for s in plan.sequences] for plan in plans[:7]] == [[5] * 4] + [[1] * 4] * 6
    assert [[len(s.token_ids) for s in plan.sequences] for plan in plans[7:]] == [[6] * 2] + [[1] * 2] * 4
    assert [client.finished[n] for n in range(6)] == [7.0] * 4 + [12.0] * 2 == [client.first[n] for n in range(6)]
    pads = [s.token_ids[: 5 - FEW[n].prompt] for n, s in enumerate(plans[0].sequences)]
    assert pads == [[0, 0], [], [0, 0, 0], [0]]
    assert [moment.waiting for moment in client.moments] == [2] * 7 + [0] * 5
    # As in the contiguous test, 14 useful tokens and 12 to come: pads are among the other 38.
    assert client.moments[0].account == live_client.Account(14, 12, 38, 0)
    assert client.moments[6].account == live_client.Account(26, 0, 38, 0)


@given(LOADS)
def test_padded_batches_never_mix(jobs):
    client = serve("static", jobs)
    batches, cost = [], 0
    for plan in client.llm.plans:
        names = [s.request_id for s in plan.sequences]
        if plan.admitted:
            batches.append(names)
            assert plan.admitted == names, "somebody joined"
            assert len({len(s.token_ids) for s in plan.sequences}) == 1
        assert names == batches[-1], "somebody left"
    assert [int(name) for batch in batches for name in batch] == list(range(len(jobs)))
    for batch in batches:
        own = [jobs[int(name)] for name in batch]
        assert len(batch) <= 4
        cost += len(batch) * (max(job.prompt for job in own) + max(job.output for job in own) - 1)
        assert len({client.finished[int(name)] + jobs[int(name)].arrival for name in batch}) == 1
    assert sum(moment.computed for moment in client.moments) == cost


def test_a_padded_batch_is_computed_in_one_step_however_small_steps_are():
    client = serve("static", [Job(0.0, 12, 2)] * 4, Engine(budget=8))
    assert [plan.num_tokens for plan in client.llm.plans] == [48, 4]


def test_padding_never_takes_a_request_beyond_the_longest():
    jobs = [Job(0.0, 12, 2), Job(0.0, 2, 12), Job(0.0, 2, 2)]
    client = serve("static", jobs)
    assert [plan.admitted for plan in client.llm.plans if plan.admitted] == [["0"], ["1", "2"]]


# ---- time ----------------------------------------------------------------------------------------------------


def test_requests_are_sent_when_they_are_due_and_time_counts_from_then():
    jobs = [Job(2.0, 3, 2), Job(2.5, 3, 3), Job(50.0, 3, 1)]
    client = serve("paged", jobs)
    assert client.first == {0: 1.0, 1: 1.5, 2: 1.0}  # the second one came in the middle of a step
    assert client.finished == {0: 2.0, 1: 3.5, 2: 1.0}
    assert [(m.seconds, m.running, m.waiting) for m in client.moments] == [
        (2.0, 0, 0), (1.0, 1, 0), (1.0, 2, 0), (1.0, 1, 0), (1.0, 1, 0), (44.0, 0, 0), (1.0, 1, 0),
    ]  # fmt: skip
    row = live_report.summarize("paged", 0.5, client, None)
    assert row.mean_running == pytest.approx(6 / 51) and row.waiting == 0 and row.account_waiting is None
    assert row.latency == {"p50": 1.0, "p90": 3.5 / 3, "p99": 3.5 / 3}


def test_means_are_weighted_by_time():
    engine = Engine()
    engine.step_seconds = 0.5
    row = live_report.summarize("paged", 1.0, serve("paged", [Job(1.0, 4, 3), Job(1.5, 4, 1)], engine), None)
    assert row.seconds == 2.5 and row.mean_running == (1.0 * 0 + 0.5 * 1 + 0.5 * 2 + 0.5 * 1) / 2.5
    assert row.account["tokens"] == pytest.approx(100 * 0.5 * (4 + (5 + 4) + 6) / 2.5 / (BLOCKS * SIZE))


def test_a_run_that_is_interrupted_leaves_nothing_behind_and_a_busy_engine_keeps_its_memory():
    engine = Engine()
    engine.interrupt_at = 3
    with pytest.raises(KeyboardInterrupt):
        serve("contiguous", FEW, engine)
    assert engine.observers == []
    with pytest.raises(ValueError, match="unfinished"):
        install(engine, SYSTEMS["paged"], FEW, LONGEST)


def test_an_answer_that_is_too_short_is_no_result():
    client = serve("paged", FEW)
    client.tokens[2].pop()
    with pytest.raises(RuntimeError, match="a mistake"):
        live_report.summarize("paged", 1.0, client, None)


# ---- all of it -----------------------------------------------------------------------------------------------

SMALL = LiveSettings(num_blocks=16, max_model_len=64, num_requests=24, threads=1, rates=(math.inf, 200.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("live"), max_model_len=64))


@pytest.fixture(scope="module")
def result(folder):
    said = []
    found = live.run(replace(SMALL, model=folder), lambda text, share: said.append((text, share)))
    assert [share for _, share in said] == pytest.approx([0, 0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert said[1][0] == "all at once: static" and said[-1][0] == "200 requests/s: paged"
    return found


def test_a_small_run(result):
    systems = ["static", "contiguous", "paged"]
    assert [(row.rate, row.system) for row in result.rows] == [(rate, s) for rate in (None, 200.0) for s in systems]
    jobs = scaled_jobs(SMALL, math.inf)
    for row in result.rows:
        assert row.num_requests == 24 and row.output_tokens == sum(job.output for job in jobs)
        assert sum(row.account.values()) == pytest.approx(100)
        assert row.peak_running <= 4 or row.system == "paged"
    static, contiguous, paged = result.rows[:3]
    assert contiguous.same_tokens == 24 and static.same_tokens is paged.same_tokens is None
    once = sum(job.prompt + job.output - 1 for job in jobs)
    assert static.computed_tokens > once == contiguous.computed_tokens <= paged.computed_tokens
    assert paged.peak_running > 4 == contiguous.peak_running and result.most_contiguous == 4
    assert paged.account_waiting["tokens"] > contiguous.account_waiting["tokens"]


def test_a_result_is_plain_data(result):
    again = json.loads(json.dumps(asdict(result), allow_nan=False))
    assert again["rows"][0]["rate"] is None and again["settings"]["rates"] == [None, 200.0]


def test_tables_and_pictures(result):
    from matplotlib.figure import Figure

    speed, memory = live_report.tables(result)
    for table in (speed, memory):
        assert {len(row) for row in table.rows} == {len(table.header)} and len(table.rows) == 6
    for row, cells in zip(result.rows, memory.rows, strict=True):
        assert sum(float(cell) for cell in cells[1:5]) == pytest.approx(100, abs=0.3)
        assert cells[0] == f"{'200' if row.rate else 'all at once'}, {row.system}"
    assert max(len(line) for line in live.report(result).text().splitlines()) <= 120
    median, tail, bars = Figure().subplots(1, 3)
    live_report.draw(result, median, tail, bars)
    assert [list(line.get_xdata()) for line in median.lines] == [[200.0]] * 3
    assert [line.get_ydata()[0] for line in tail.lines] == [1000 * row.latency["p90"] for row in result.rows[3:]]
    assert {"static", "contiguous", "paged"} <= {text.get_text() for text in bars.texts}


# ---- pages ---------------------------------------------------------------------------------------------------


def test_who_watches_a_run_sees_its_memory_and_goes_with_it():
    engine, seen = Engine(), []

    def watch(llm):
        assert isinstance(llm.memory, ContiguousKVCacheManager), "it is installed"
        return lambda plan, output: seen.append(plan)

    prompts = [[number] * job.prompt for number, job in enumerate(FEW)]
    Client(engine, SYSTEMS["contiguous"], FEW, prompts, LONGEST, engine.clock, engine.sleep, watch=watch).run()
    assert seen == engine.plans and engine.observers == []
    engine.interrupt_at = len(engine.plans) + 2
    with pytest.raises(KeyboardInterrupt):
        Client(engine, SYSTEMS["contiguous"], FEW, prompts, LONGEST, engine.clock, engine.sleep, watch=watch).run()
    assert engine.observers == []


def runs_in(page):
    return {one["header"]["settings"]["memory"]: one for one in data_of(page)}


def test_each_system_is_recorded_beside_paged(folder, tmp_path):
    said = []
    page = tmp_path / "live.html"
    pages = live_record.record(replace(SMALL, model=folder, num_requests=8), page, lambda *told: said.append(told))
    assert pages == [page, tmp_path / "live-static.html"]
    assert said == [(f"recording, not measured: {name}", pytest.approx(number / 3))
                    for number, name in enumerate(("static", "contiguous", "paged"))]  # fmt: skip
    assert [list(runs_in(one)) for one in pages] == [["contiguous", "paged"], ["static", "paged"]]
    for run in {**runs_in(pages[0]), **runs_in(pages[1])}.values():
        assert run["title"] == live_record.TITLES[run["header"]["settings"]["memory"]] and run["header"]["lesson"]
    contiguous, paged = runs_in(page).values()
    tables = [line["patch"]["tables"] for line in (contiguous["lines"][0], paged["lines"][0])]
    assert list(tables[0]) == ["A", "B", "C", "D"] and {len(table["blocks"]) for table in tables[0].values()} == {4}
    assert len(paged["lines"][0]["did"]["computed"]) == 8, "all of them at once"
    for table in tables[1].values():
        assert len(table["blocks"]) == -(-table["tokens"] // 16)
    static = runs_in(pages[1])["static"]["lines"]
    assert len({tuple(line["did"]["computed"]) for line in static}) == 2, "two batches"
    assert sum(len(line["did"].get("finished", ())) for line in contiguous["lines"]) == 8


def test_one_system_alone_has_a_page(folder, tmp_path):
    settings = replace(SMALL, model=folder, num_requests=2, systems=("paged",))
    assert live_record.record(settings, tmp_path / "p", lambda *told: None) == [tmp_path / "p"]
    assert list(runs_in(tmp_path / "p")) == ["paged"]


def test_the_command_records_what_it_has_measured(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(live, "QUICK", replace(SMALL, model=folder, num_requests=2, rates=(math.inf,)))
    page = tmp_path / "page.html"
    assert command.main(["live", "--quick", "--out", str(tmp_path / "out"), "--html", str(page)]) == 0
    assert f"{tmp_path / 'out' / 'live.svg'}, {page}, {tmp_path / 'page-static.html'}" in capsys.readouterr().err
    nowhere = str(tmp_path / "no" / "page")
    for arguments, words in (
        (["live", "--html", nowhere], f"cannot write the page {nowhere}: No such file"),
        (["fig2", "--html", str(page)], "--html is for live, not for fig2"),
    ):
        with pytest.raises(SystemExit) as ended:
            command.main([*arguments, "--out", str(tmp_path / "out")])
        assert ended.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


# ---- settings ------------------------------------------------------------------------------------------------


def test_rates_follow_the_machine(folder):
    settings = replace(SMALL, model=folder, rates=None, shares=(2.0,), systems=("paged",), num_requests=3)
    result = live.run(settings, lambda text, share: None)
    first, second = result.rows
    assert first.rate is None and second.rate == pytest.approx(2 * 3 / first.seconds, rel=0.05)
    assert result.settings["rates"] == [None, second.rate]


@pytest.mark.parametrize(
    "wrong,words",
    [
        ({"num_blocks": 15}, "num_blocks=15.*max_model_len=256 reserves 16 blocks.*has 8 here"),
        ({"num_blocks": 24, "max_model_len": 300}, "reserves 19 blocks.*has 16"),
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"max_model_len": 1}, "max_model_len=1: must be an integer of at least 2"),
        ({"num_requests": 2.5}, "num_requests=2.5"),
        ({"threads": 0}, "threads=0"),
        ({"rates": (1.0, 0.0)}, "rates: 0.0"),
        ({"rates": (math.nan,)}, "rates: nan"),
        ({"rates": ()}, "at least one"),
        ({"shares": (math.inf,)}, "shares: inf"),
        ({"systems": ("paged", "orca")}, "systems: orca: must be of static, "),
        ({"systems": ("paged", "paged")}, "no system twice"),
    ],
)
def test_bad_settings_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        LiveSettings(**wrong)


def test_a_model_that_reads_less_is_refused(folder):
    with pytest.raises(ValueError, match="max_model_len=128: .* reads 64 tokens"):
        live.run(replace(SMALL, model=folder, max_model_len=128), lambda text, share: None)


@pytest.mark.parametrize("module", [live, live_client, live_report, live_systems])
def test_doctests(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed
