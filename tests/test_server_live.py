"""What those who look at an engine are told: see server/live.py."""

import asyncio
import contextlib
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import make_folder

from minipaged import SamplingParams
from minipaged.async_llm import AsyncLLM
from minipaged.server import live as live_module
from minipaged.server.app import create_app
from minipaged.server.config import ServerConfig
from minipaged.server.live import Live, LiveEye
from minipaged.server.manners import House
from minipaged.viewer.page import part
from minipaged.viewer.state import merge_patch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("tiny")))


@contextlib.asynccontextmanager
async def living(folder, **options):
    """An engine, and all who look at it."""
    async with AsyncLLM(folder, **{"num_blocks": 64, "block_size": 4, **options}) as llm:
        yield Live(House(llm, ServerConfig(("tiny",)))), llm


async def generate(llm, prompt="Hello", request_id=None, **params):
    params = SamplingParams(ignore_eos=True, **{"max_tokens": 20, "seed": 1, **params})
    async for output in llm.generate(prompt, params, request_id):
        last = output
    return last


def applied(target, patch):
    """RFC 7386, word by word."""
    if not isinstance(patch, dict):
        return patch
    target = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            target.pop(name, None)
        else:
            target[name] = applied(target.get(name), value)
    return target


def data_of(piece: bytes):
    assert piece.startswith(b"data: ") and piece.endswith(b"\n\n")
    return json.loads(piece[6:])


async def read(looker, seconds=5):
    return await asyncio.wait_for(anext(looker), seconds)


async def until(what, seconds=3):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it doesn't come true"
        await asyncio.sleep(0.01)


STATES = st.recursive(
    st.integers(0, 3) | st.lists(st.integers(0, 2), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip
OBJECTS = st.dictionaries(st.sampled_from("abc"), STATES, max_size=3)


@given(OBJECTS, OBJECTS)
def test_a_patch_makes_the_new_of_the_old_and_says_nothing_of_what_stays(old, new):
    patch = merge_patch(old, new)
    assert applied(old, patch) == new
    assert merge_patch(old, old) == {} and all(old.get(name) != new.get(name) for name in patch)


def test_patches_add_up_to_the_state_of_the_engine(folder):
    async def go():
        async with living(folder) as (live, llm):
            llm.engine.observers.append(lambda *_: time.sleep(0.03))
            looker, state, kinds = live.look(), {}, set()
            asking = [asyncio.create_task(generate(llm, "Hi" * i, n=i)) for i in (1, 2, 3)]
            while not (all(task.done() for task in asking) and state and not state["requests"]):
                state = applied(state, data_of(await read(looker)))
                kinds |= {len([r for r in state["requests"].values() if r["state"] == "running"])}
                holders = [block for table in state["tables"].values() for block in table["blocks"]]
                assert len(set(holders)) == state["usage"]["used"]
                assert not {*map(str, holders)} & {*state["cached"]}
            now = await llm.call(LiveEye(llm.engine, "tiny").state)
            fixed = ("usage", "tables", "requests", "cached", "index", "num_finished", "prefixes", "model")
            assert {name: state[name] for name in fixed} == {name: now[name] for name in fixed}
            assert 3 in kinds and state["num_drawn"] == 120 and state["num_finished"] == 3

    asyncio.run(go())


def test_of_texts_tokens_and_ids_nothing_is_told_but_what_the_page_made_up(folder):
    async def go():
        async with living(folder) as (live, llm):
            llm.engine.observers.append(lambda *_: time.sleep(0.02))
            looker, pieces = live.look(), []
            first, second = "secret-id", "page-0123abcd-7-fedcba9876543210"
            asking = [asyncio.create_task(generate(llm, "hush-hush", name)) for name in (first, second)]
            while not all(task.done() for task in asking):
                pieces.append(await read(looker))
            told = b"".join(pieces).decode()
            assert "0123abcd-7" in told, "the page knows its own by this"
            answer = asking[0].result()
            for hidden in ("secret-id", "fedcba98", "hush", answer.outputs[0].text, str(answer.prompt_token_ids)[1:-1]):
                assert hidden not in told and hidden not in told.replace(",", ", ")

    asyncio.run(go())


def test_a_request_that_comes_and_ends_in_one_step_is_told_of_without_its_id(folder):
    async def go():
        async with living(folder) as (live, llm):
            looker = live.look()
            pieces = [await read(looker)]
            await generate(llm, "hush", "secret-id", max_tokens=1)
            pieces.append(await read(looker))
            assert data_of(pieces[1])["num_finished"] == 1 and "admitted" in str(data_of(pieces[1])["events"])
            assert b"secret-id" not in b"".join(pieces)

    asyncio.run(go())


def test_what_the_steps_did_is_told_once_and_of_all_of_them(folder):
    async def go():
        async with living(folder, num_blocks=28, num_cpu_blocks=40) as (live, llm):
            llm.engine.observers.append(lambda *_: time.sleep(0.02))
            plans, looker, state, told = [], live.look(), {}, []
            llm.engine.observers.append(lambda plan, _: plans.append(plan))
            asking = [asyncio.create_task(generate(llm, "Hello" * i, n=i, max_tokens=30)) for i in (1, 2, 3)]
            while not (all(task.done() for task in asking) and state and not state["requests"]):
                state = applied(state, data_of(await read(looker)))
                told.append(state["did"])
            for name in ("copies", "freed", "swap_out", "swap_in"):
                happened = [list(one) if name != "freed" else one for plan in plans for one in getattr(plan, name)]
                assert [one for did in told for one in did.get(name, ())] == happened, name
            admitted = [name for did in told for name in did.get("admitted", ())]
            assert sorted({*admitted}) == ["A", "B", "C"] and any(did.get("copies") for did in told)
            computed = [len(s.token_ids) for plan in plans for s in plan.sequences]
            assert sum(own for did in told for _, own, _ in did.get("computed", {}).values()) == sum(computed)
            reasons = {name: why for did in told for name, why in did.get("finished", {}).items()}
            assert reasons == dict.fromkeys("ABC", "length")
            await generate(llm, max_tokens=1)
            state = applied(state, data_of(await read(looker)))
            assert "copies" not in state["did"], "it is not told again"

    asyncio.run(go())


def test_why_a_request_failed_may_have_its_text_in_it_and_is_not_told(folder, monkeypatch):
    async def go():
        async with living(folder) as (live, llm):
            execute = llm.engine.executor.execute

            def failing(plan):
                output = execute(plan)
                output.errors.update({s.seq_id: "hush" for s in plan.sequences})
                return output

            monkeypatch.setattr(llm.engine.executor, "execute", failing)
            looker = live.look()
            told = await read(looker)
            with contextlib.suppress(Exception):
                await generate(llm)
            state = applied(data_of(told), data_of(await read(looker)))
            assert state["num_finished"] == 1 and "hush" not in str(state)

    asyncio.run(go())


def test_it_costs_nothing_while_nobody_looks_and_who_goes_away_is_forgotten(folder):
    async def go():
        async with living(folder) as (live, llm):
            before = [*llm.engine.observers]
            lookers = [live.look() for _ in range(3)]
            for looker in lookers:
                await read(looker)
            assert live.num_lookers == 3 and len(llm.engine.observers) == len(before) + 1, "one for all"
            for looker in lookers:
                await looker.aclose()
            assert live.num_lookers == 0
            await until(lambda: llm.engine.observers == before)
            again = live.look()
            assert data_of(await read(again))["model"] == "tiny"
            await again.aclose()

    asyncio.run(go())


def test_an_idle_engine_is_told_once_and_then_a_comment_finds_out_who_is_gone(folder, monkeypatch):
    monkeypatch.setattr(live_module, "QUIET", 0.5)

    async def go():
        async with living(folder) as (live, llm):
            asked = []
            monkeypatch.setattr(llm, "call", lambda what, call=llm.call: (asked.append(what), call(what))[1])
            looker = live.look()
            assert (await read(looker)).startswith(b"data: ")
            for _ in range(2):
                assert (await read(looker)).startswith(b": ")
            assert len(asked) == 2, "the engine is asked by who comes, and not again"

    asyncio.run(go())


def test_a_busy_engine_is_looked_at_now_and_then_and_written_down_once_for_all(folder):
    async def go():
        async with living(folder) as (live, llm):
            llm.engine.observers.append(lambda *_: time.sleep(0.005))
            fast, fellow = live.look(), live.look()
            await read(fast), await read(fellow)
            asking, pieces, began = asyncio.create_task(generate(llm, max_tokens=150)), [], time.monotonic()
            while not asking.done():
                both = await asyncio.gather(read(fast), read(fellow))
                assert both[0] is both[1]
                pieces.append(both[0])
            assert len(pieces) <= (time.monotonic() - began) / live_module.PAUSE + 2
            assert len(pieces[2]) < 1200, "what stays is not told again"

    asyncio.run(go())


def test_who_reads_slowly_finds_the_newest(folder):
    async def go():
        async with living(folder) as (live, llm):
            slow, fast = live.look(), live.look()
            state = data_of(await read(slow))
            reading = asyncio.create_task(drain(fast))
            for i in range(4):
                await generate(llm, f"Nr. {i}")
                await asyncio.sleep(0.3)
            state = applied(state, data_of(await read(slow)))
            assert state["num_finished"] == 4 and state["num_drawn"] == 80
            reading.cancel()

    async def drain(looker):
        async for _ in looker:
            pass

    asyncio.run(go())


def test_a_step_that_fails_does_not_end_the_view(folder, monkeypatch):
    """It leaves sequences in memory that nobody has a name for yet."""

    async def go():
        async with living(folder) as (live, llm):
            llm.engine.observers.append(lambda *_: time.sleep(0.03))
            execute, failures = llm.engine.executor.execute, iter([RuntimeError("no"), RuntimeError("no")])

            def now_and_then(plan):
                for failure in failures if plan.admitted else ():
                    time.sleep(0.2)  # so that who looks comes right after it
                    raise failure
                return execute(plan)

            looker, state = live.look(), {"tables": {}}
            first = asyncio.create_task(generate(llm, max_tokens=30))
            while "A" not in state["tables"]:
                state = applied(state, data_of(await read(looker)))
            monkeypatch.setattr(llm.engine.executor, "execute", now_and_then)
            second = asyncio.create_task(generate(llm, max_tokens=3))
            while state["num_finished"] < 2:
                state = applied(state, data_of(await read(looker)))
            await first, await second

    asyncio.run(go())


def test_the_streams_end_with_the_server(folder):
    async def go():
        async with living(folder) as (live, llm):
            house, looker = live._house, live.look()
            await read(looker)
            house.closing = house.num_guests = True
            with pytest.raises(TimeoutError):
                await read(looker, 0.4)  # those under way are still shown
            looker, house.num_guests = live.look(), 0
            with pytest.raises(StopAsyncIteration):
                while True:
                    await read(looker, 2)

    asyncio.run(go())


def test_of_a_large_pool_it_is_not_told_which_block_is_whose(folder):
    async def go():
        async with living(folder, num_blocks=live_module.MOST_BLOCKS + 1) as (live, llm):
            llm.engine.observers.append(lambda *_: time.sleep(0.05))
            asking, looker, state = asyncio.create_task(generate(llm)), live.look(), {}
            while not state.get("tables"):
                state = applied(state, data_of(await read(looker)))
            assert state["tables"]["A"]["num_blocks"] >= 1 and "blocks" not in state["tables"]["A"]
            while state["num_finished"] == 0:
                assert not state["shows_blocks"] and state["cached"] == state["index"] == {}
                assert not {"copies", "freed", "evicted", "swap_in", "swap_out", "loading"} & {*state["did"]}
                state = applied(state, data_of(await read(looker)))
            await asking

    asyncio.run(go())


def test_the_page_has_the_parts_that_replay_a_trace_and_asks_nobody_else(folder):
    async def go():
        async with living(folder) as (_, llm):
            app = create_app(llm, ServerConfig())
            [route] = [route for route in app.routes if getattr(route, "path", None) == "/"]
            answer = route.endpoint()
            text = answer.body.decode()
            assert "{{" not in text and "src=" not in text
            for name in ("blocks.css", "common.js", "pool.js", "tables.js", "moves.js", "queues.js"):
                assert part(name) in text
            assert "connect-src 'self'" in answer.headers["Content-Security-Policy"]

    asyncio.run(go())


def test_the_route_stands_beside_the_page_and_in_no_schema(folder):
    async def go():
        async with living(folder) as (_, llm):
            for page in (True, False):
                app = create_app(llm, ServerConfig(page=page))
                assert ("/live" in [getattr(route, "path", None) for route in app.routes]) is page
                assert "/live" not in app.openapi()["paths"]

    asyncio.run(go())
