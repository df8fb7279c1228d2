"""The trace of a run: what was written is what was, and can be drawn again."""

import json

import pytest
import torch
from tiny_model import make_folder

from minipaged.draw import picture
from minipaged.generate import main as generate
from minipaged.memory import KVCacheManager
from minipaged.snapshot import Snapshot
from minipaged.trace import TraceError, main, read_trace


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.set_num_threads(1)
    return str(make_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def traced(model, tmp_path_factory):
    """A trace file that the command line wrote, and the snapshots that were true after each step."""
    file, truth = tmp_path_factory.mktemp("trace") / "run.jsonl", []
    lines = [{"prompt": f"prompt {i}", "n": 1 + i % 3, "ignore_eos": True, "seed": i} for i in range(5)]
    prompts = file.with_name("prompts")
    prompts.write_text("\n".join(map(json.dumps, lines)))

    with pytest.MonkeyPatch.context() as patch:
        of = Snapshot.of.__func__

        def remember(cls, memory, *rest, **more):
            tables = {i: (memory.num_tokens(i), memory.block_table(i), memory.is_swapped(i)) for i in memory.sequences()}
            truth.append((tables, memory.usage(), memory._gpu.allocator._ref_counts.copy()))
            return of(cls, memory, *rest, **more)

        patch.setattr(Snapshot, "of", classmethod(remember))
        flags = ["--prompts-file", str(prompts), "--max-tokens", "20", "--num-blocks", "26", "--block-size", "4"]
        assert generate(["--model", model, *flags, "--trace", str(file)]) == 0
    return file, truth
