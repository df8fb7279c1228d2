"""Decode graphs on a CPU: recording is played by calling again. What CUDA adds is tested where there is a GPU."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from tiny_model import make_folder

from kernels import Batch
from minipaged import LLM, SamplingParams
from minipaged.execution.decode_graphs import CudaRecorder, DecodeGraphs

PROMPTS = [[1 + (5 * i + 3 * k) % 90 for k in range(n)] for i, n in enumerate((1, 4, 9, 16, 17, 30))]
CPU = dict(device="cpu", dtype="fp32")  # also where there is a GPU
GREEDY = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (20, 3, 12, 9, 16, 7)]


def record_by_calling_again(compute):
    """Like a CUDA graph: the result stays where the recording left it, and is written anew by each replay."""
    result = compute().clone()

    def replay():
        result.copy_(compute())

    return replay, result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("kernels", ["torch", "cpp"])
@pytest.mark.parametrize("num_blocks", [200, 30])
def test_replayed_steps_give_the_same_tokens(folder, kernels, num_blocks):
    """Also when memory runs out, sequences fork, and blocks are copied and used again between replays."""
    settings = dict(kernels=kernels, block_size=4, num_blocks=num_blocks, max_num_seqs=6, debug=True)
    plain, replayed = LLM(folder, **CPU, **settings), LLM(folder, **CPU, **settings)
    runner = replayed.executor.runner
    graphs = DecodeGraphs(runner.model, runner.cache, 6, 1024, record_by_calling_again)
    runner.graphs = graphs
    samples = SamplingParams(n=3, seed=1, max_tokens=15, ignore_eos=True)
    for params in (GREEDY, samples):
        expected = [[o.token_ids for o in output.outputs] for output in plain.generate(PROMPTS, params)]
        assert [[o.token_ids for o in output.outputs] for output in replayed.generate(PROMPTS, params)] == expected
    assert graphs.sizes == [1, 2, 4, 6] and len(graphs.graphs) > 1


def test_what_does_not_fit_is_not_replayed(folder):
    llm = LLM(folder, **CPU, block_size=4, num_blocks=100, max_num_seqs=6)
    graphs = DecodeGraphs(llm.executor.runner.model, llm.executor.runner.cache, 2, 5, record_by_calling_again)
    llm.executor.runner.graphs = graphs
    seen = []
    graphs.run = lambda ids, *rest: seen.append(len(ids)) or DecodeGraphs.run(graphs, ids, *rest)
    llm.generate(PROMPTS, GREEDY)
    assert seen and max(seen) <= 2  # only where two sequences or fewer were left, with five blocks at most


class Seen:
    """Stands for a model: keeps what it is called with, and returns each row's position."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, positions, cache, batch):
        kept = (batch.slot_mapping, batch.query_start, batch.context_lens, batch.block_tables)
        self.calls.append((input_ids.clone(), Batch(*(tensor.clone() for tensor in kept)), batch.max_context_len))
        return positions[:, None].float()


def seen_graphs(max_num_seqs=6, **settings) -> tuple[Seen, DecodeGraphs]:
    model = Seen()
    settings = {"record": record_by_calling_again} | settings
    return model, DecodeGraphs(model, torch.zeros(1, 2, 1, 9, 4, 8), max_num_seqs, 5, **settings)


def decode(rows: int, width: int = 3, start: int = 10):
    """Inputs of a decode step: every number of a row is its own."""
    position = start + torch.arange(rows)
    tables = torch.arange(rows * width).view(rows, width) % 9
    return position + 100, position, Batch(position + 200, torch.arange(rows + 1), position + 1, tables)


def test_padding_rows_keep_nothing_of_an_earlier_batch():
    model, graphs = seen_graphs()
    for rows in (4, 3, 6, 5, 1):
        input_ids, positions, batch = decode(rows, start=10 * rows)
        assert graphs.run(input_ids, positions, batch).tolist() == positions[:, None].tolist()
        ids, seen, longest = model.calls[-1]
        size = len(ids)
        assert size == next(n for n in (1, 2, 4, 6) if n >= rows)
        assert ids[:rows].equal(input_ids) and seen.block_tables[:rows, :3].equal(batch.block_tables)
        assert seen.slot_mapping.tolist() == batch.slot_mapping.tolist() + [-1] * (size - rows)
        assert seen.context_lens.tolist() == batch.context_lens.tolist() + [0] * (size - rows)
        assert seen.query_start.tolist() == list(range(size + 1)) and longest == 5 * 4


def test_all_sizes_are_recorded_before_they_are_needed_and_the_largest_first():
    recorded = []

    def record(compute):
        recorded.append(len(compute()))
        return record_by_calling_again(compute)

    model, graphs = seen_graphs(max_num_seqs=20, record=record)
    graphs.record_all()
    assert recorded == [20, 16, 8, 4, 2, 1] == list(graphs.graphs)
    for _, batch, _ in model.calls:  # on padding: nothing is written, and nothing read
        assert set(batch.slot_mapping.tolist()) == {-1} and set(batch.context_lens.tolist()) == {0}
    with torch.inference_mode():
        graphs.run(*decode(11))
    assert len(recorded) == 6


@pytest.mark.parametrize("early", [False, True])
def test_what_cannot_be_recorded_runs_without_graphs_for_good(early):
    tried, said = [], []

    def record(compute):
        tried.append(len(compute()))
        if len(tried) == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")
        return record_by_calling_again(compute)

    _, graphs = seen_graphs(record=record, notice=said.append)
    if early:
        graphs.record_all()
    for rows in (1, 1, 2, 4, 6):
        inputs = decode(rows)
        assert graphs.fits(inputs[2]) == (len(tried) < 2)
        if graphs.fits(inputs[2]):
            assert graphs.run(*inputs).tolist() == inputs[1][:, None].tolist()  # the step that breaks it, too
    why = "RuntimeError while recording: operation not permitted when stream is capturing"
    assert said == [f"decode steps run without CUDA graphs: {why}"]
    assert len(tried) == 2 and not graphs.graphs


def test_a_break_while_recording_is_no_reason_to_give_up_graphs():
    _, graphs = seen_graphs(record=lambda compute: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        graphs.run(*decode(2))
    assert graphs.fits(decode(2)[2])


class FakeCuda:
    """torch.cuda as far as a recording uses it: streams are names."""

    def __init__(self, monkeypatch):
        self.pools, self.used, self.stream = 0, [], "default"
        fakes = dict(graph_pool_handle=self.new_pool, Stream=lambda: SimpleNamespace(wait_stream=lambda other: None),
                     current_stream=self.current, set_stream=self.set_stream, graph=self.graph,
                     CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
                     stream=lambda stream: contextlib.nullcontext())  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def new_pool(self):
        self.pools += 1
        return f"pool {self.pools}"

    def current(self):
        return SimpleNamespace(name=self.stream, wait_stream=lambda other: None)

    def set_stream(self, stream):
        self.stream = stream.name

    @contextlib.contextmanager
    def graph(self, graph, pool):
        self.used.append(pool)
        self.stream = "capture"
        yield  # as the real one: what raises in it leaves the stream as it is
        self.stream = "default"


def test_recordings_share_a_pool_and_leave_no_stream_behind(monkeypatch):
    cuda, model = FakeCuda(monkeypatch), Seen()
    calls = model.calls
    graphs = DecodeGraphs(model, torch.zeros(1, 2, 1, 9, 4, 8), 4, 5, notice=lambda line: None)
    graphs.record_all()
    assert cuda.used == ["pool 1"] * 3 and cuda.stream == "default" and len(calls) == 6  # each once before, to compile
    other = DecodeGraphs(model, torch.zeros(1, 2, 1, 9, 4, 8), 4, 5, notice=lambda line: None)
    other.model = lambda *args: 1 / 0 if cuda.stream == "capture" else None
    other.record_all()
    assert cuda.used[3:] == ["pool 2"] and cuda.stream == "default" and other.broken


def test_an_engine_whose_graphs_break_gives_the_same_tokens(folder):
    settings = dict(block_size=4, num_blocks=200, max_num_seqs=6, kernels="torch")
    plain, replayed = LLM(folder, **CPU, **settings), LLM(folder, **CPU, **settings)
    runner, said = replayed.executor.runner, []

    def record(compute):
        if len(compute()) < 4:
            raise RuntimeError("no")
        return record_by_calling_again(compute)

    runner.graphs = DecodeGraphs(runner.model, runner.cache, 6, 1024, record, said.append)
    tokens = [[o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY)] for llm in (plain, replayed)]
    assert tokens[0] == tokens[1] and len(said) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(folder):
    expected = LLM(folder, device="cuda", dtype="fp32", cuda_graphs=False).generate(PROMPTS, GREEDY)
    llm = LLM(folder, device="cuda", dtype="fp32")
    assert llm.executor.runner.graphs is not None and isinstance(llm.executor.runner.graphs.record, CudaRecorder)
    outputs = llm.generate(PROMPTS, GREEDY)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]
    assert llm.executor.runner.graphs.graphs
