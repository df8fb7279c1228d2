"""The pictures of the memory: they say what is in it, and they fit the screen. The live view, too."""

import io
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny_model import make_folder

from minipaged import LLM, BeamSearchParams, SamplingParams
from minipaged.memory import HashCache, KVCacheManager, NoSpace, Prefix
from minipaged.terminal.draw import block_map, page_tables, picture
from minipaged.terminal.snapshot import Observer, Snapshot, letters
from minipaged.terminal.watch import EventLines, ProgressLine, Watch, can_draw


def plain(lines):
    return [line.plain.rstrip() for line in lines]


@pytest.fixture
def figure_8():
    """Figure 8 of the paper: two samples share the first of their blocks, and the second was copied."""
    memory = KVCacheManager(num_blocks=8, block_size=4, free_order=[7, 1, 3])
    memory.allocate(1, 7)
    memory.fork(1, 2)
    memory.append({1: 1, 2: 1})
    memory.append({2: 1})
    return Snapshot.of(memory, {1: "A1", 2: "A2"}, running=["A"], waiting=["B", "C"])


def test_a_picture_word_for_word(figure_8):
    assert picture(figure_8, "Figure 8", ["step 2: copied"]).plain.splitlines() == [
        "Figure 8  running A  waiting B C  swapped -",
        "[*****###############...................] 4 of 8 blocks in use, 1 of them shared",
        "13 tokens, waste 19 %, sharing saves 1 | copied 1, swapped 0 out 0 in",
        "",
        "BLOCKS of 4 tokens: A1 held by sequence A1, A* shared by several of A's, . free",
        " 0  A2 A2 .  A1 .  .  .  A*",
        "",
        "PAGE TABLES tokens: blocks in order, * shared, (n/4) only n slots filled",
        "A1     8: 7* 3",
        "A2     9: 7* 1 0(1/4)",
        "",
        "step 2: copied",
    ]


def test_cached_blocks():
    """Those that nobody holds, and that can be found again: in the map, in the bar, in numbers, within 80 columns."""
    memory = KVCacheManager(num_blocks=16, block_size=4, cache=HashCache(4))
    for seq, tokens in enumerate([range(9), range(100, 118)]):
        memory.allocate(seq, len(tokens), prefix=memory.find(tokens))
        memory.publish(seq, len(tokens), lambda start, count, tokens=tokens: tokens[start : start + count])
    memory.free(0)
    memory.fork(1, 2)
    snapshot = Snapshot.of(memory, {1: "A1", 2: "A2"})
    assert snapshot.cached == [1, 0]
    lines = picture(snapshot, "Cached").plain.splitlines()
    assert re.fullmatch(r"\[\*+:+\.+\] 5 of 16 blocks in use, 5 of them shared, 2 cached", lines[1])
    assert lines[4] == "BLOCKS of 4 tokens: A1 of sequence A1, A* of several of A's, : cached, . free"
    assert "".join(lines[5].split()) == "0::.A*A*A*A*A*........"
    assert plain(block_map(snapshot, width=26, rows=1))[1] == "  0 ::.aaaaa........"
    memory.reset_prefix_cache()
    assert "cached" not in picture(Snapshot.of(memory, {1: "A1", 2: "A2"})).plain


def test_colours_change_nothing_but_colours(figure_8):
    def shown(**options):
        console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="256", **options)
        console.print(picture(figure_8))
        return console.file.getvalue()

    colour, none = shown(no_color=False), shown(no_color=True)
    assert "38;5" in colour or "48;5" in colour or "\x1b[30;4" in colour
    assert not re.search(r"\x1b\[[0-9;]*[34][0-9]", none)
    assert re.sub(r"\x1b\[[0-9;]*m", "", colour) == re.sub(r"\x1b\[[0-9;]*m", "", none)


def test_swapped_sequences_are_not_in_the_map():
    memory = KVCacheManager(num_blocks=4, block_size=2, num_cpu_blocks=4)
    memory.allocate(0, 3)
    memory.fork(0, 1)
    memory.swap_out([0, 1])
    snapshot = Snapshot.of(memory)
    assert plain(block_map(snapshot))[1:] == [" 0  .  .  .  ."]
    assert plain(page_tables(snapshot))[1:] == [f"{name}     3: on the CPU 0* 1*(1/2)" for name in "AB"]


def test_free_rows_are_folded():
    memory = KVCacheManager(num_blocks=1000, block_size=16, free_order=[3, 500, 999])
    memory.allocate(0, 40)
    assert plain(block_map(Snapshot.of(memory)))[1:] == [
        "    0  .  .  .  A" + "  ." * 16,
        "   20 ... 480 free blocks, to 499",
        "  500  A" + "  ." * 19,
        "  520 ... 460 free blocks, to 979",
        "  980" + "  ." * 19 + "  A",
    ]


def test_a_pool_that_is_too_large_is_summarised():
    memory = KVCacheManager(num_blocks=1000, block_size=1)
    for seq, count in enumerate((100, 60, 340)):
        memory.allocate(seq, count)
    memory.fork(1, 3)
    names = {0: "A", 1: "B1", 2: "C", 3: "B2"}
    assert plain(block_map(Snapshot.of(memory, names), rows=5)) == [
        "BLOCKS, 3 to a sign: A of request A, a some of them shared, + of several, . free",
        "    0 " + "A" * 33 + "+" + "b" * 19 + "+" + "C" * 16,
        "  210 " + "C" * 70,
        "  420 " + "C" * 27 + "." * 43,
        "  630 " + "." * 70,
        "  840 " + "." * 54,
    ]


def random_snapshot(rng):
    """Any memory: sequences that share, swapped ones, pools of all sizes."""
    size = rng.choice([1, 4, 16])
    memory = KVCacheManager(rng.choice([1, 7, 60, 500, 20_000]), size, 2000, cache=HashCache(size))
    names = {}
    for seq in range(rng.randrange(70)):
        request = letters(rng.choice([seq, seq // 4, seq * 40]))
        if seq and rng.random() < 0.4 and (seqs := memory.sequences()):
            memory.fork(rng.choice(seqs), seq)
        elif isinstance(memory.allocate(seq, rng.choice([1, 10, 100, 1000]), prefix=Prefix()), NoSpace):
            continue
        elif rng.random() < 0.3:  # one that ended, and can be found again
            memory.publish(seq, memory.num_tokens(seq), lambda start, count, seq=seq: [seq] * count)
            memory.free(seq)
            continue
        names[seq] = f"{request}{seq}" if rng.random() < 0.5 else request
        if rng.random() < 0.1 and not memory.is_swapped(seq):
            memory.swap_out([seq])
    queues = {word: [letters(i) for i in range(rng.choice([0, 3, 200]))] for word in ("running", "waiting", "swapped")}
    return Snapshot.of(memory, names, **queues)


@settings(max_examples=60)
@given(seed=st.integers(0, 10**9), width=st.sampled_from([80, 80, 80, 40, 132]), height=st.integers(4, 60))
def test_pictures_fit_the_screen(seed, width, height):
    rng = random.Random(seed)
    snapshot = random_snapshot(rng)
    events = ["step 1: " + "x" * rng.choice([1, 300]) for _ in range(rng.randrange(4))]
    lines = picture(snapshot, "a title", events, width, height).plain.split("\n")
    assert len(lines) <= height and max(map(len, lines)) <= width
    if height >= 24:  # all sections are there
        assert any(line.startswith("PAGE TABLES") for line in lines)
        assert any(line.startswith("BLOCKS") for line in lines)
        assert not events or lines[-1].startswith("step 1: x")


@settings(max_examples=60)
@given(seed=st.integers(0, 10**9))
def test_the_map_says_who_holds_each_block(seed):
    snapshot = random_snapshot(random.Random(seed))
    holders, seen = snapshot.holders(), {}
    for line in plain(block_map(snapshot))[1:]:
        start, *cells = line.split()
        if cells[0] == "...":
            seen.update({int(start) + i: "." for i in range(int(cells[1]))})
        else:
            seen.update({int(start) + i: cell for i, cell in enumerate(cells)})
    assert seen.keys() == set(range(snapshot.usage.num_blocks))
    for block, cell in seen.items():
        names = holders.get(block, [])
        assert cell.endswith("*") == (len(names) > 1) and (cell in (".", ":")) == (not names)
        assert (cell == ":") == (block in snapshot.cached)
        assert len(names) != 1 or cell == names[0]


# --- following an engine ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return str(make_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture
def llm(folder):
    """An engine with more to do than fits into its memory: samples, beams, and single sequences."""
    llm = LLM(folder, num_blocks=24, block_size=4, max_num_seqs=8, preemption="auto", prefix_cache="none")
    for number in range(4):
        sampling = SamplingParams(n=3 if number % 2 else 1, max_tokens=18, seed=number, ignore_eos=True)
        llm.add_request(f"prompt {number}", sampling)
    llm.add_request("search", BeamSearchParams(beam_width=3, max_tokens=12, ignore_eos=True))
    return llm


def terminal(**options):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    size = {"width": 80, "height": 24, "force_terminal": True, "color_system": "256"}
    return Console(file=Terminal(), record=True, **{**size, "_environ": {"TERM": "xterm-256color"}, **options})


def test_watch_draws_frames_that_fit(llm):
    console = terminal()
    frames = []
    with Watch(llm, console) as watch:
        while llm.has_unfinished_requests:
            llm.step()
            frames.append(watch.frame().plain.split("\n"))
    assert all(len(frame) < 24 and max(map(len, frame)) <= 80 for frame in frames)
    text = "\n".join(line for frame in frames for line in frame)
    for word in (
        "running A",
        "waiting -",
        "swapped D",
        "A* shared",
        "on the CPU",
        "copied on write: ",
        "admitted",
        "swapped out to make room",
        "dropped to make room",
        "swapped in again",
        "E3",
        " finished",
    ):
        assert word in text, word
    assert llm.observers == []
    drawn = console.export_text()
    assert "step 1, " in drawn and "\n".join(frames[-1][1:]) in drawn  # the first and the last frame
    assert "\x1b[?25h" in console.file.getvalue()  # the cursor is back


def test_names_stay_with_their_sequences(llm):
    observer, seen = Observer(llm), {}

    def check(plan, output):
        observer.follow(plan, output)
        for seq, name in observer._names.items():
            assert seen.setdefault(seq, name) == name
        names = [table.name for table in observer.snapshot().tables]
        assert len(set(names)) == len(names) and set(names) <= allowed

    allowed = {"A", "B1", "B2", "B3", "C", "D1", "D2", "D3", "E1", "E2", "E3"}
    llm.observers.append(check)
    while llm.has_unfinished_requests:
        llm.step()
    assert set(seen.values()) == allowed
    assert len([name for name in seen.values() if name[0] == "E"]) > 3  # beams came and went


def test_progress_leaves_nothing_behind(llm):
    console = terminal()
    with ProgressLine(llm, console) as display:
        display._drawn = 0
        llm.step()
        assert display._live.is_started
        display.print(lambda: console.file.write("result"))
        assert not display._live.is_started
    assert "0 finished, " in console.file.getvalue() and "tokens/s" in console.file.getvalue()
    assert console.file.getvalue().rstrip().endswith("result")


def test_a_file_gets_lines(llm):
    console = Console(file=io.StringIO())
    assert not can_draw(console) and can_draw(terminal())
    assert not can_draw(terminal(_environ={"TERM": "dumb"}))
    with EventLines(llm, console):
        llm.step()
    assert console.file.getvalue().startswith("step 1: A B C D admitted [8 of 24 blocks in use]\n")
