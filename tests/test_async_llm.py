"""AsyncLLM: many who ask, in event loops of their own, and one thread that steps.

The oracle is LLM.generate on the same folder. Where a race is tested, the engine's thread is held between two steps.
"""

import asyncio
import contextlib
import dataclasses
import sys
import threading
import time

import pytest
from test_interrupts import told
from tiny_model import make_folder

from minipaged import LLM, AsyncLLM, BeamSearchParams, RequestOutputKind, SamplingParams
from minipaged.async_llm import EngineDeadError

SMALL = dict(block_size=4, num_blocks=24, num_cpu_blocks=24, max_num_seqs=6, watermark=0.0, debug=True)
LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
WISHES = [
    ("Once upon a time", SamplingParams(temperature=0, max_tokens=20)),
    ("Once upon a mine", SamplingParams(n=3, seed=1, max_tokens=12, frequency_penalty=0.5)),
    ([5, 6, 7, 8, 9], BeamSearchParams(3, max_tokens=8)),
    ("abcabcabc", SamplingParams(seed=2, max_tokens=30, stop=["e", "12"], min_tokens=1)),
    ("Once upon", SamplingParams(temperature=0, max_tokens=9, prompt_logprobs=2, logprobs=1)),
    ("z" * 40, SamplingParams(seed=3, max_tokens=25, stop=["q"], include_stop_str_in_output=True)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("async")))


@pytest.fixture(scope="module")
def alone(folder):
    llm = LLM(folder, block_size=4, num_blocks=200, prefix_cache="none")
    return lambda prompt, params: told(llm.generate([prompt], params)[0])


@contextlib.contextmanager
def engine(folder, **options):
    """It has to be empty in the end, and its thread alive."""
    llm = AsyncLLM(folder, **SMALL | options)
    try:
        yield llm
        assert llm._thread.is_alive(), "nothing may end the engine's thread"
        if not llm._stopped:
            wait_until_empty(llm)
    finally:
        llm.shutdown()
    assert not llm.waiting and not llm._readers


def wait_until_empty(llm):
    until = time.monotonic() + 20
    while llm.engine.has_unfinished_requests or llm.waiting or llm._readers or not llm._inbox.empty():
        assert time.monotonic() < until, f"left: {llm.engine._requests} {llm.waiting} {llm._readers}"
        time.sleep(0.005)

    def look():
        usage = llm.engine.stats().memory
        llm.engine.memory.check()
        assert usage.free == usage.num_blocks and usage.cpu_used == 0 and not llm.engine._texts

    asyncio.run(asyncio.wait_for(llm.call(look), 20))


def run(coroutine, seconds=30):
    return asyncio.run(asyncio.wait_for(coroutine, seconds))


async def last(outputs):
    async for output in outputs:
        latest = output
    return latest


@contextlib.contextmanager
def held(llm):
    """The engine's thread stands between two steps; what is asked meanwhile is done at once afterwards."""
    gate, stands = threading.Event(), threading.Event()
    llm._ask(lambda: (stands.set(), gate.wait(20)))
    assert stands.wait(20)
    try:
        yield
    finally:
        gate.set()


# --- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"prefix_cache": "radix"}, {"preemption": "swap"}, {"max_num_seqs": 3}])
def test_everybody_gets_what_they_get_alone(folder, alone, options):
    async def all_at_once(llm):
        return await asyncio.gather(*[last(llm.generate(*wish)) for wish in WISHES * 4])

    with engine(folder, **options) as llm:
        outputs = run(all_at_once(llm))
        assert sum(llm.engine.scheduler.num_preemptions.values()) > 0 or options == {"max_num_seqs": 3}
    assert [told(output) for output in outputs] == [alone(*wish) for wish in WISHES] * 4


def test_cumulative_delta_and_final_only(folder, alone):
    async def read(llm, kind):
        params = dataclasses.replace(LONG, output_kind=kind, logprobs=1)
        return [output async for output in llm.generate("abc", params)]

    with engine(folder) as llm:
        states, pieces, only = (run(read(llm, kind)) for kind in RequestOutputKind)
    wanted = alone("abc", dataclasses.replace(LONG, logprobs=1))
    assert told(states[-1]) == wanted and [told(one) for one in only] == [wanted]
    lengths = [len(state.outputs[0].token_ids) for state in states]
    assert lengths == sorted(set(lengths)) and not any(state.finished for state in states[:-1])
    assert "".join(piece.outputs[0].text for piece in pieces) == only[0].outputs[0].text
    assert sum((piece.outputs[0].token_ids for piece in pieces), []) == only[0].outputs[0].token_ids
    assert sum((piece.outputs[0].logprobs for piece in pieces), []) == only[0].outputs[0].logprobs


def test_who_reads_slowly_finds_the_newest_state_and_all_pieces(folder):
    async def read(llm):
        params = dataclasses.replace(LONG, output_kind=RequestOutputKind.DELTA)
        pieces = []
        async for output in llm.generate("abc", params):
            pieces.append(output)
            time.sleep(0.1)  # the whole loop stands, and the engine does not
        return pieces

    with engine(folder) as llm:
        pieces = run(read(llm))
    assert 2 <= len(pieces) < 30 and sum(len(piece.outputs[0].token_ids) for piece in pieces) == 60


def test_errors_are_those_of_generate(folder):
    async def ask(llm, *args, **kwargs):
        await last(llm.generate(*args, **kwargs))

    with engine(folder) as llm:
        for args, kwargs, words in (
            (([4] * 5000,), {}, "max_model_len"), (("a", SamplingParams(n=7)), {}, "max_num_seqs"),
            (("a",), {"cache_salt": ""}, "cache_salt"), (([999],), {}, "999"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=words):
                run(ask(llm, *args, **kwargs))


# --- who leaves, and what is aborted --------------------------------------------------------------------------------


def steps_after_leaving(llm, leave):
    """Steps that are computed once a reader has left."""

    async def read():
        outputs = llm.generate("abc", dataclasses.replace(LONG, max_tokens=80))
        await leave(outputs)
        return llm.engine.totals.num_steps

    before = run(read())
    wait_until_empty(llm)
    return llm.engine.totals.num_steps - before


async def closes(outputs):
    await anext(outputs)
    await outputs.aclose()


async def is_cancelled(outputs):
    await anext(outputs)
    task = asyncio.ensure_future(last(outputs))
    await asyncio.sleep(0.01)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await outputs.aclose()


async def breaks(outputs):
    async for _ in outputs:
        break
    await outputs.aclose()


@pytest.mark.parametrize("leave", [closes, is_cancelled, breaks])
def test_who_leaves_aborts_within_one_step(folder, leave):
    with engine(folder) as llm:
        assert steps_after_leaving(llm, leave) <= 1
        with pytest.MonkeyPatch.context() as patch:  # and if nobody told the engine, this would show it
            patch.setattr(llm, "_end", lambda stream: None)
            assert steps_after_leaving(llm, leave) > 1


def test_abort_by_name_ends_who_runs_and_who_waits(folder):
    async def two(llm):
        tasks = [asyncio.ensure_future(last(llm.generate("abc", LONG, name))) for name in ("runs", "waits")]
        while len(llm._readers) < 2:
            await asyncio.sleep(0.001)
        await llm.abort(["waits", "unknown"])
        await llm.abort("runs")
        return await asyncio.gather(*tasks)

    with engine(folder, max_num_seqs=1) as llm:
        runs, waits = run(two(llm))
    assert runs.outputs[0].finish_reason == waits.outputs[0].finish_reason == "abort"
    assert waits.outputs[0].token_ids == [] and len(runs.outputs[0].token_ids) < 60


def test_a_name_that_comes_again_before_its_abort_was_told(folder):
    """All in one breath between two steps: the abort, and another request with the same name."""

    async def both(llm):
        first = asyncio.ensure_future(last(llm.generate("abc", LONG, "name")))
        while "name" not in llm._readers:
            await asyncio.sleep(0.001)
        with held(llm):
            ending = asyncio.ensure_future(llm.abort("name"))
            await asyncio.sleep(0)
            second = llm.submit([llm.engine._intake.request("zzz", LONG, "name", None, ())])
        await ending
        with contextlib.closing(second), pytest.raises(ValueError, match="'name' is in use"):
            await last(second)
        return await first

    with engine(folder) as llm:
        assert run(both(llm)).outputs[0].finish_reason == "abort"


def test_of_two_with_the_same_name_the_first_is_served(folder, alone):
    async def both(llm):
        with held(llm):
            requests = [llm.engine.prepare("abc", LONG, "name") for _ in range(2)]
            streams = [llm.submit([request]) for request in requests]
        with pytest.raises(ValueError, match="'name' is in use"):
            await last(streams[1])
        streams[1].close()
        return await last(streams[0])

    with engine(folder) as llm:
        assert told(run(both(llm))) == alone("abc", LONG)


def test_closing_late_does_no_harm_to_who_has_the_name_now(folder, alone):
    async def both(llm):
        first = llm.submit([llm.engine.prepare("abc", LONG, "name")])
        while not llm.engine.totals.num_finished or llm._readers:
            await asyncio.sleep(0.001)
        second = asyncio.ensure_future(last(llm.generate("abc", LONG, "name")))
        while "name" not in llm._readers:
            await asyncio.sleep(0.001)
        first.close()  # it was never read
        return await second

    with engine(folder) as llm:
        assert told(run(both(llm))) == alone("abc", LONG)


def test_all_or_none_of_a_list(folder):
    async def ask(llm):
        requests = [llm.engine.prepare("abc", LONG, name) for name in ("a", "b", "a")]
        with contextlib.closing(llm.submit(requests)) as stream, pytest.raises(ValueError, match="'a' is in use"):
            await stream.begin()
        await last(llm.generate("abc", LONG, "a"))

    with engine(folder) as llm:
        run(ask(llm))
        assert llm.engine.totals.num_finished == 1


def test_a_list_comes_out_whole_and_begins_with_the_first(folder, alone):
    async def ask(llm):
        requests = [llm.engine.prepare(*wish) for wish in WISHES]
        with contextlib.closing(llm.submit(requests)) as stream:
            await stream.begin()
            found = {output.request_id: output async for output in stream}
        return [told(found[request.request_id]) for request in requests]

    with engine(folder) as llm:
        assert run(ask(llm)) == [alone(*wish) for wish in WISHES]


def test_closing_wakes_who_reads(folder):
    async def ask(llm):
        stream = llm.submit([llm.engine.prepare("abc", dataclasses.replace(LONG, max_tokens=80))])
        await anext(stream)
        reading = asyncio.ensure_future(last(stream))
        await asyncio.sleep(0.01)
        stream.close()
        stream.close()
        await asyncio.wait_for(asyncio.gather(reading, return_exceptions=True), 5)

    with engine(folder) as llm:
        run(ask(llm))


# --- event loops ----------------------------------------------------------------------------------------------------


def test_two_event_loops(folder, alone):
    found = {}

    def one(number):
        async def ask():
            return await asyncio.gather(*[last(llm.generate(*wish)) for wish in WISHES])

        found[number] = run(ask())

    with engine(folder) as llm:
        threads = [threading.Thread(target=one, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    wanted = [alone(*wish) for wish in WISHES]
    assert [[told(output) for output in found[number]] for number in range(3)] == 3 * [wanted]


def test_a_loop_that_is_closed_in_the_middle(folder, alone):
    async def begin(llm):
        stream = llm.submit([llm.engine.prepare("abc", dataclasses.replace(LONG, max_tokens=80), "lost")])
        await anext(stream)
        return stream

    with engine(folder) as llm:
        loop = asyncio.new_event_loop()
        stream = loop.run_until_complete(begin(llm))
        loop.close()
        output = run(last(llm.generate("abc", LONG)))
        wait_until_empty(llm)
        assert told(output) == alone("abc", LONG) and llm.engine.totals.num_finished == 1
        stream.close()


# --- the end --------------------------------------------------------------------------------------------------------


def test_shutdown_tells_all_who_wait(folder):
    async def wait_for_it(llm):
        tasks = [asyncio.ensure_future(last(llm.generate("abc", LONG))) for _ in range(20)]
        while len(llm._readers) < 20:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(llm.shutdown)
        for found in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(found, EngineDeadError) and "shut down" in str(found)
        for asked in (last(llm.generate("abc")), llm.stats(), llm.abort("x"), llm.check_health()):
            with pytest.raises(EngineDeadError):
                await asked
        assert llm.errored and not llm.is_running and not llm.waiting

    llm = AsyncLLM(folder, **SMALL)
    run(wait_for_it(llm))
    llm.shutdown()


def test_who_comes_while_it_ends_never_hangs(folder):
    """Some are served, the others are told; nobody waits, and nobody is counted as waiting."""

    def crowd(llm, ends):
        async def one(number):
            await asyncio.sleep(number % 7 / 1000)
            try:
                if number % 3:
                    return (await last(llm.generate("abc", dataclasses.replace(LONG, max_tokens=3)))).finished
                return await llm.call(lambda: True)
            except EngineDeadError:
                return False

        async def all_of_them():
            return await asyncio.gather(*[one(number) for number in range(40)])

        ends += run(all_of_them(), 20)

    for trial in range(4):
        llm, ends = AsyncLLM(folder, **SMALL), []
        threads = [threading.Thread(target=crowd, args=(llm, ends)) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(trial / 100)
        llm.shutdown()
        for thread in threads:
            thread.join(30)
        assert len(ends) == 120 and not llm.waiting


def test_as_a_context(folder):
    async def ask():
        async with AsyncLLM(folder, **SMALL) as llm:
            await llm.check_health()
            assert (await llm.stats()).num_running == 0 and llm.is_running
            await llm.reset_prefix_cache()
            return llm, await last(llm.generate("abc", LONG))

    llm, output = run(ask())
    assert output.finished and not llm._thread.is_alive()


# --- what goes wrong in the thread ----------------------------------------------------------------------------------


class Fails:
    """An executor that fails in some steps."""

    def __init__(self, llm, steps, error=RuntimeError):
        self.steps, self.count, self.error, self.execute = set(steps), 0, error, llm.engine.executor.execute
        llm.engine.executor.execute = self

    def __call__(self, plan):
        self.count += 1
        if self.count in self.steps:
            raise self.error("the device fell asleep")
        return self.execute(plan)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, SystemExit])
def test_a_step_that_fails_once_or_twice_is_done_again(folder, alone, error):
    async def all_at_once(llm):
        return await asyncio.gather(*[last(llm.generate(*wish)) for wish in WISHES])

    with engine(folder) as llm:
        Fails(llm, [2, 5, 6, 9], error)
        outputs = run(all_at_once(llm))
        run(llm.check_health())
    assert [told(output) for output in outputs] == [alone(*wish) for wish in WISHES]


def test_after_three_in_a_row_all_are_told_and_it_goes_on(folder, alone):
    async def some(llm):
        with held(llm):
            streams = [llm.submit([llm.engine.prepare("abc", LONG)]) for _ in range(9)]
        found = await asyncio.gather(*map(last, streams), return_exceptions=True)
        assert [type(one) for one in found] == 9 * [EngineDeadError] and "fell asleep" in str(found[0])
        with pytest.raises(EngineDeadError, match="fell asleep"):
            await llm.check_health()
        assert llm.errored and not llm.engine.has_unfinished_requests and not llm.waiting
        output = await last(llm.generate("abc", LONG))
        await llm.check_health()
        return output

    with engine(folder, max_num_seqs=4) as llm:
        Fails(llm, [2, 3, 4])
        assert told(run(some(llm))) == alone("abc", LONG)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", [RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY])
def test_an_observer_that_fails_costs_nobody_an_answer(folder, alone, error, kind):
    def fails(plan, output):
        raise error("the disk is full")

    with engine(folder) as llm:
        llm.engine.observers.append(fails)
        output = run(last(llm.generate("abc", dataclasses.replace(LONG, output_kind=kind))))
        assert told(output) == alone("abc", LONG)


def test_a_call_gets_what_it_raises_and_does_nothing_if_it_was_cancelled(folder):
    async def calls(llm):
        for error in (ValueError, SystemExit, KeyboardInterrupt, asyncio.CancelledError):
            answer = asyncio.ensure_future(llm.call(raises(error)))
            done, _ = await asyncio.wait({answer}, timeout=5)
            assert done and (answer.cancelled() or isinstance(answer.exception(), error))
        with held(llm):
            cancelled = asyncio.ensure_future(llm.call(lambda: happened.append("it")))
            await asyncio.sleep(0)
            cancelled.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await cancelled
        return await llm.call(lambda: "fine")

    def raises(error):
        def what():
            raise error("as it should be")

        return what

    happened = []
    with engine(folder) as llm, contextlib.suppress(SystemExit):
        assert run(calls(llm)) == "fine" and not happened


# --- text that grows in one thread and is read in another -----------------------------------------------------------


def test_text_is_never_torn(folder):
    """Every state that a reader finds begins with all that it found before, however the threads meet."""

    async def read(llm, seed):
        params = SamplingParams(
            seed=seed, n=2, max_tokens=150, stop=["ab", "q7", "~~"], min_tokens=20, ignore_eos=True, logprobs=0,
        )  # fmt: skip
        known = {0: ("", []), 1: ("", [])}
        async for output in llm.generate("abc", params):
            for _ in range(3):  # others, at other moments
                await asyncio.sleep(0)
            for one in output.outputs:
                text, tokens = known[one.index]
                assert one.text.startswith(text) and one.token_ids[: len(tokens)] == tokens
                assert len(one.logprobs) == len(one.token_ids) == one.num_tokens
                known[one.index] = one.text, one.token_ids
        return seed, known

    async def all_at_once(llm):
        return await asyncio.gather(*[read(llm, seed) for seed in range(12)])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with engine(folder, max_num_seqs=16, num_blocks=400, debug=False) as llm:
            found = run(all_at_once(llm))
    finally:
        sys.setswitchinterval(interval)
    with LLM(folder, block_size=4, num_blocks=200) as llm:
        for seed, known in found[:4]:
            params = SamplingParams(
                seed=seed, n=2, max_tokens=150, stop=["ab", "q7", "~~"], min_tokens=20, ignore_eos=True,
            )  # fmt: skip
            [whole] = llm.generate(["abc"], params)
            assert known == {one.index: (one.text, one.token_ids) for one in whole.outputs}
