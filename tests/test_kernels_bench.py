"""The kernels' bench: its arithmetic, its checks, and a whole run on a CPU through the real entry point."""

import argparse
import contextlib
import doctest
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kernels
from kernels.bench import __main__ as bench
from kernels.bench import cells, peers, runner, tables, timing
from kernels.bench.cells import SHAPES, Grid, Shape, Work
from kernels.bench.timing import Contender, Times, WrongKernel, measure

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TINY = Grid((1, 3), (20,), (2,), (40, 48), (9, 33), (2, 40), block_sizes=(1, 16, 256), prefill_tokens=40)
SHAPE = Shape("tiny", 6, 2, 8)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A copy and stretches as short as can be, and no cache to overflow."""
    monkeypatch.setitem(timing.COPIED, "cpu", 1 << 16)
    monkeypatch.setitem(timing.MULTIPLIED, "cpu", 32)
    monkeypatch.setitem(timing.STRETCH, "cpu", 1e-4)
    monkeypatch.setattr(bench, "cache_bytes", lambda device: 3000)
    monkeypatch.setattr(bench, "QUICK", TINY)


def runner_of(backend=None, dtype=torch.float32, **settings) -> runner.Bench:
    settings = {"cache_bytes": 3000, "rounds": 2} | settings
    return runner.Bench(backend or kernels.TorchBackend("cpu", dtype), CPU, dtype, **settings)


# --- a run --------------------------------------------------------------------------------------------------


def run(capsys, *args: str, status: int = 0) -> tuple[str, str]:
    assert bench.main(["--device", "cpu", "--kernels", "torch", *args]) == status
    return capsys.readouterr()


def test_a_run_as_json(capsys):
    out, progress = run(capsys, "--quick", "--json", "--model", "smollm2", "llama3-8b")
    report = json.loads(out)
    assert {"kernels": "torch", "dtype": "fp32", "rounds": bench.QUICK_ROUNDS}.items() <= report.items()
    assert report["machine"]["torch"] == torch.__version__ and report["machine"]["device"] == "cpu"
    rows = report["results"]
    assert len(progress.splitlines()) == len(rows) == 2 * (2 + 2 + 2 + 3)
    found = [(r["what"], r["batch"], r["context"], r["queries"], r["block_size"]) for r in rows]
    half = [("decode", 1, 20, 1, 16), ("decode", 3, 20, 1, 16)] * 2
    half += [("prefill", 4, 9, 9, 16), ("prefill", 1, 33, 33, 16)] * 2
    half += [("contiguous", 2, 40, 1, 16), ("contiguous", 2, 48, 1, 16)] * 2
    assert found == half + [("paging", 2, 40, 1, 1), ("paging", 2, 40, 1, 16), ("paging", 2, 40, 1, 256)] * 2
    timed = {"decode": set(), "prefill": {"sdpa", "product"}, "contiguous": {"sdpa"}, "paging": {"ordered"}}
    for row in rows:
        assert row["seconds"].keys() == row["spread"].keys() == {"copy", "ours"} | timed[row["what"]]
        assert all(seconds > 0 for seconds in row["seconds"].values())
        read = row["batch"] * row["context"] * 2 * (8 * 128 if row["model"] == "llama3-8b" else 3 * 64) * 4
        assert row["bandwidth"] == pytest.approx(read / row["seconds"]["ours"])
        assert row["copy_bandwidth"] == pytest.approx(2 * (1 << 16) / row["seconds"]["copy"])
        assert row["of_copy"] == pytest.approx(row["bandwidth"] / row["copy_bandwidth"])
        if row["what"] in ("prefill", "contiguous"):
            assert row["of_peer"] == pytest.approx(row["seconds"]["sdpa"] / row["seconds"]["ours"])
        if row["what"] == "prefill":
            assert row["tflops"]["product"] == pytest.approx(2 * 32**3 / row["seconds"]["product"] / 1e12)
            assert row["of_product"] == pytest.approx(row["tflops"]["ours"] / row["tflops"]["product"])
    assert report["left_out"].keys() == {"flex (contiguous)"}


def test_a_run_as_a_table(capsys):
    out, _ = run(capsys, "--quick", "--model", "smollm2", "--dtype", "bf16", "--what", "paging", "prefill")
    lines = out.splitlines()
    assert lines[0].startswith("kernels torch in bf16 on ") and f"torch {torch.__version__}, Triton" in lines[0]
    assert lines[2] == tables.TITLES["prefill"]
    assert " ".join(lines[3].split()) == "model batch context us spread TFLOP/s of product peer its TFLOP/s ours is"
    assert [line.split()[:3] for line in lines[4:6]] == [["smollm2", "4", "9"], ["smollm2", "1", "33"]]
    assert lines[7] == tables.TITLES["paging"]
    assert [line.split()[3] for line in lines[9:12]] == ["1", "16", "256"]
    assert "\x1b" not in out and not any(line.endswith(" ") for line in lines)


def test_a_terminal_gets_the_same_cells_in_colour(capsys, monkeypatch):
    report = json.loads(run(capsys, "--quick", "--model", "smollm2", "--what", "contiguous", "--json")[0])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    tables.print_report(report)
    drawn = capsys.readouterr().out
    assert all(f"{1e6 * row['seconds']['ours']:.1f}" in drawn for row in report["results"]) and "n/a" in drawn


def test_what_does_not_fit_is_skipped_and_said(capsys, monkeypatch):
    monkeypatch.setattr(runner, "free_bytes", lambda device: 60_000)
    out, progress = run(capsys, "--quick", "--model", "smollm2", "--what", "decode")
    assert "skipped" not in out.splitlines()[4]  # 1 x 20 tokens: two blocks of 16 x 1536 bytes fit
    assert "skipped: smollm2, 3 x 20: needs 0.0 GiB" in out and "3 x 20, block size 16: skipped" in progress
    report = json.loads(run(capsys, "--quick", "--model", "smollm2", "--what", "decode", "--json")[0])
    assert [("skipped" in row, "seconds" in row) for row in report["results"]] == [(False, True), (True, False)]


def test_what_there_is_no_time_for_is_skipped(capsys, monkeypatch):
    now = iter([0.0, 1.0, 2.5, 3.0])
    monkeypatch.setattr(bench.time, "monotonic", lambda: next(now))
    args = ("--quick", "--model", "smollm2", "--what", "decode", "prefill", "--limit", "2")
    monkeypatch.setattr(bench, "QUICK", Grid((1, 3), (20,), (), (), (9,), (2, 40), prefill_tokens=9))
    rows = json.loads(run(capsys, *args, "--json")[0])["results"]
    assert [row.get("skipped") for row in rows] == [None, "no time was left", "no time was left"]
    assert "seconds" in rows[0] and (rows[1]["batch"], rows[2]["what"]) == (3, "prefill")


def test_sizes_of_a_run(capsys):
    """--smoke is over at once, whatever the machine's caches; the points leave FlexAttention out."""
    rows = json.loads(run(capsys, "--smoke", "--json", "--model", "smollm2")[0])["results"]
    assert [(row["what"], row["batch"], row["context"]) for row in rows] == [
        ("decode", 2, 20), ("prefill", 1, 9), ("contiguous", 1, 20), ("paging", 1, 20)
    ]  # fmt: skip
    assert not cells.POINTS.flex and all(grid.flex for grid in (*cells.GRIDS.values(), cells.QUICK))
    one = runner_of(flex=False)
    assert "flex" not in one.contiguous(Work(SHAPE, 1, 20))["seconds"] and one.left_out == {}
    with pytest.raises(SystemExit):
        bench.main(["--smoke", "--quick"])


@no_gpu
@pytest.mark.parametrize("args, message", [
    (["--device", "cuda"], "error: PyTorch sees no GPU here; --device cpu runs without one"),
    (["--device", "cpu", "--kernels", "cpp", "--dtype", "fp16"], "error: kernels in C++ compute fp32 and bf16, not"),
])  # fmt: skip
def test_what_cannot_be_had(capsys, args, message):
    assert bench.main(args) == 2
    said = capsys.readouterr()
    assert said.err.startswith(message) and said.out == "" and len(said.err.splitlines()) == 1


@pytest.mark.parametrize("args", [["--what", "everything"], ["--model", "gpt9"], ["--dtype", "int8"], ["--quic"]])
def test_bad_flags(capsys, args):
    with pytest.raises(SystemExit) as stopped:
        bench.main(args)
    assert stopped.value.code == 2 and args[-1] in capsys.readouterr().err


def test_ctrl_c():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "kernels.bench", "--device", "cpu", "--kernels", "torch", "--quick"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr and process.stderr.readline().startswith("decode smollm2, 1 x 128, block size 16: ")
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out, said.splitlines()[-1]) == (130, "", "interrupted")
    assert "Traceback" not in said


def test_the_defaults_are_what_was_promised():
    args = bench._parser().parse_args([])
    assert args == argparse.Namespace(
        device="auto",
        what=list(cells.WHAT),
        model=list(SHAPES),
        dtype=None,
        kernels="auto",
        quick=False,
        json=False,
        points=False,
        smoke=False,
        limit=None,
    )
    gpu = cells.GRIDS["cuda"]
    assert (min(gpu.batches), max(gpu.batches), min(gpu.contexts), max(gpu.contexts)) == (1, 256, 128, 32768)
    assert (gpu.lengths[0], gpu.lengths[-1]) == (512, 8192) and gpu.block_sizes == tuple(2**i for i in range(9))
    assert [(s.heads, s.kv_heads, s.head_size) for s in SHAPES.values()] == [(9, 3, 64), (32, 8, 128), (32, 32, 128)]


# --- arithmetic ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [cells, tables, timing])
def test_doctests(module):
    failed, tried = doctest.testmod(module)
    assert failed == 0 < tried


def test_bytes_and_operations_by_hand():
    llama = SHAPES["llama3-8b"]
    assert Work(llama, 1, 1).kv_bytes(2) == 4096  # 8 heads x 128 numbers x 2 bytes, a key and a value
    assert Work(llama, 64, 4096).kv_bytes(2) == 2**30
    assert Work(llama, 2, 17, block_size=16).pool_bytes(4) == 2 * 32 * 8192
    assert Work(llama, 3, 1000).flops() == 3 * 1000 * 32 * 128 * 4  # decode: each query sees all
    assert Work(llama, 1, 512, queries=512).flops() == (512 * 513 // 2) * 32 * 128 * 4
    pairs = sum(1 for i in range(7, 10) for j in range(10) if j <= i)
    assert Work(llama, 1, 10, queries=3).flops() == pairs * 32 * 128 * 4


def test_layers_overflow_the_cache():
    work = Work(SHAPE, 1, 32)  # 32 x 2 x 2 x 8 x 4 = 4096 bytes a layer
    for cache, layers in ((1, 1), (1024, 1), (1025, 2), (10_000, 10), (1 << 30, runner.MOST_LAYERS)):
        inputs = runner_of(cache_bytes=cache).inputs(work)
        assert len(inputs.cache) == layers and torch.equal(inputs.cache[0], inputs.cache[-1])
    assert len(runner_of(cache_bytes=10_000).inputs(work, most_layers=4).cache) == 4


def test_tables_name_each_block_once():
    inputs = runner_of().inputs(Work(SHAPE, 3, 50, block_size=4))
    blocks = inputs.scrambled.block_tables
    assert blocks.shape == (3, 13) and sorted(blocks.flatten().tolist()) == list(range(39))
    assert inputs.ordered.block_tables.flatten().tolist() == list(range(39)) != blocks.flatten().tolist()


# --- a wrong kernel is not timed ----------------------------------------------------------------------------


class Broken(kernels.TorchBackend):
    name = "broken"

    def __init__(self, spoil):
        super().__init__("cpu", torch.float32)
        self.spoil, self.calls = spoil, 0

    def paged_attention(self, q, layer_cache, batch, scale):
        self.calls += 1
        out = super().paged_attention(q, layer_cache, batch, scale)
        self.spoil(out)
        return out


SPOILED = {
    "one number not a number": lambda out: out[-1, -1, -1].fill_(torch.nan),
    "one head of the last token": lambda out: out[-1, 2].mul_(1.001),
    "two heads mixed up": lambda out: out[:, :2].copy_(out[:, :2].flip(1)),
    "unwritten": lambda out: out.zero_(),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
@pytest.mark.parametrize("what", cells.WHAT)
def test_a_wrong_kernel_is_refused(what, spoil):
    backend = Broken(spoil)
    work = Work(SHAPE, 2, 20, queries=20 if what == "prefill" else 1)
    with pytest.raises(WrongKernel, match="the kernels of backend broken are wrong, and a wrong kernel is not timed"):
        getattr(runner_of(backend), what)(work)
    assert backend.calls == 1


def test_a_kernel_that_fails_is_an_exit_status_and_the_others_are_measured(capsys, monkeypatch):
    def spoil(out):
        if len(out) == 3:
            raise MemoryError("out of\nshared memory")
        out.mul_(2 if len(out) == 1 else 1)

    monkeypatch.setattr(kernels, "load", lambda *args, **rest: Broken(spoil))
    out, progress = run(capsys, "--quick", "--model", "smollm2", "--what", "decode", "paging", status=1)
    wrong = "1 x 20: the kernels of backend broken are wrong, and a wrong kernel is not timed"
    assert f"failed: smollm2, {wrong}" in out and "failed: smollm2, 3 x 20: MemoryError: out of\n" in out
    assert sum(line.endswith(" us") for line in progress.splitlines()) == 3 == progress.count("paging")
    out, _ = run(capsys, "--quick", "--json", "--model", "smollm2", "--what", "decode", status=1)
    rows = json.loads(out)["results"]
    assert [row["failed"][:6] for row in rows] == ["the ke", "Memory"] and "seconds" not in rows[0]


class Unscaled(kernels.TorchBackend):
    def paged_attention(self, q, layer_cache, batch, scale):
        return super().paged_attention(q, layer_cache, batch, 1.1 * scale)


def test_a_wrong_scale_is_noticed_in_each_dtype():
    for dtype in runner.TOLERANCE:
        with pytest.raises(WrongKernel):
            runner_of(Unscaled("cpu", dtype), dtype).decode(Work(SHAPE, 2, 20))


# --- peers --------------------------------------------------------------------------------------------------


def contiguous(shape=SHAPE, batch=3, context=300):
    one = runner_of()
    inputs = one.inputs(Work(shape, batch, context))
    _, out = one.ours(Work(shape, batch, context), inputs, inputs.scrambled)
    return one, inputs.q, one.contiguous_kv(inputs), out


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("shape, context", [(SHAPE, 256), (Shape("mha", 2, 2, 16), 300)])
def test_flex_attention_computes_the_same(shape, context):
    _, q, kv, out = contiguous(shape, context=context)
    peer = peers.flex_peer(q, kv, context, compiled=False)
    assert len(peer.calls) == len(kv)
    assert runner.relative_error(peer.rows(peer.calls[-1]()), out) < 1e-5


def test_peers_that_fail_or_differ_are_left_out():
    one, q, kv, out = contiguous()
    right = peers.contiguous_decode_peers(q, kv, 300)["sdpa"]
    wrong = peers.Peer([lambda: 1.01 * out], lambda out: out)
    assert one.peers("x", {"right": right, "wrong": lambda: wrong, "no": lambda: 1 / 0}, out).keys() == {"right"}
    assert one.left_out.keys() == {"wrong (x)", "no (x)"}
    assert one.left_out["no (x)"] == "not available: division by zero" and "off by 0.01" in one.left_out["wrong (x)"]


# --- time ---------------------------------------------------------------------------------------------------


def test_contenders_run_in_turns():
    log: list[str] = []
    contenders = {name: Contender([lambda name=name: log.append(name)] * 2) for name in "ab"}
    times = measure(contenders, CPU, rounds=3, seconds=1e-9)
    assert "".join(log) == "aabb" + "aabb" + "aabb" * 3  # warm-up, how long does it take, three rounds
    assert all(len(times[name].seconds) == 3 for name in "ab")


def test_time_of_one_call(monkeypatch):
    monkeypatch.setattr(timing, "wall_clock", lambda work: (work(), lambda: 12.0)[1])
    times = measure({"a": Contender([lambda: None] * 4)}, CPU, rounds=2, seconds=36.0)
    assert times["a"].seconds == [1.0, 1.0]  # 12 s for 3 passes of 4 calls
    assert (Times([3.0, 1.0, 2.0]).median, Times([3.0, 1.0, 2.0]).spread) == (2.0, 1.0)


@pytest.fixture
def fake_gpu(monkeypatch):
    """torch.cuda as far as timing uses it; what is called goes into the log. A replay takes 2 ms, all else no time."""
    log: list[str] = []
    now = SimpleNamespace(ms=0.0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")
            self.at = now.ms

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            return end.at - self.at

    class Graph:
        def replay(self):
            log.append("replay")
            now.ms += 2.0

    @contextlib.contextmanager
    def graph(graph):
        log.append("capture")
        yield
        log.append("captured")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = dict(Event=Event, CUDAGraph=Graph, graph=graph, Stream=lambda device: stream, stream=contextlib.nullcontext,
                 current_stream=lambda device: stream, set_stream=lambda s: None)  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    return log, now


def test_a_gpu_is_not_waited_for_while_time_is_taken(fake_gpu):
    log, _ = fake_gpu
    times = measure({"a": Contender([lambda: log.append("call")] * 2)}, torch.device("cuda"), rounds=2, seconds=0.006)
    timed = ["record", "replay", "replay", "replay", "record"]
    assert log == [
        "call", "call", "synchronize", "capture", "call", "call", "captured", "replay", "synchronize",  # made ready
        "record", "replay", "record", "synchronize", *timed, *timed, "synchronize", "synchronize",
    ]  # fmt: skip
    assert times["a"].seconds == pytest.approx([0.001, 0.001]) and times["a"].in_graph


def test_what_cannot_be_captured_is_timed_without_a_graph(fake_gpu, monkeypatch):
    log, now = fake_gpu

    def call(waits):
        if waits and log[-1] == "capture":
            raise RuntimeError("operation not permitted when stream is capturing")
        now.ms += 4.0

    contenders = {"told": Contender([lambda: call(False)], in_graph=False), "found": Contender([lambda: call(True)])}
    times = measure(contenders, torch.device("cuda"), rounds=1, seconds=0.02)
    assert not times["told"].in_graph and not times["found"].in_graph and log.count("capture") == 1
    assert times["told"].seconds == times["found"].seconds == pytest.approx([0.004])
