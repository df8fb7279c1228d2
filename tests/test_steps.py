"""python -m minipaged.bench.steps: what it counts, and what it prints."""

import json

import pytest
import torch
from tiny_model import make_folder

from minipaged.bench import steps


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "READ", 1 << 16)
    return str(make_folder(tmp_path / "tiny"))


def test_bytes_are_those_of_weights_and_caches(tiny):
    ways = ["file", "int8", "kv-int8"]
    rows = {row["way"]: row for row in steps.measure(tiny, ways, [3], [40], 1)}
    slots = 3 * 48  # whole blocks
    assert rows["file"]["bytes"] - rows["kv-int8"]["bytes"] == 2 * 2 * 2 * slots * (4 * 8 - (8 + 4))
    weights = rows["file"]["bytes"] - 2 * 2 * 2 * slots * 32
    assert weights >= 4 * (2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48) + 2 * 96 * 32 - 96 * 32)
    assert rows["int8"]["bytes"] < rows["file"]["bytes"]
    assert all(row["of_bound"] == row["bytes"] / row["read_speed"] / row["seconds"] for row in rows.values())


def test_a_step_is_the_models_own(tiny):
    """A cache of the quantized kind holds numbers like those of the other: the model reads them, and all are finite."""
    for way in ("file", "kv-int8", "kv-fp8"):
        one = steps.make(way, tiny)
        one.prepare(2, 33)
        with torch.inference_mode():
            assert one() > 0
            hidden = one.model(*one.inputs, one.cache, one.batch)
        assert hidden.isfinite().all()


def test_what_it_prints(tiny, capsys):
    flags = ["--model", tiny, "--ways", "file", "int8", "--batch", "1", "--context", "20", "--repeat", "1"]
    assert steps.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tiny}, ") and "GB/s" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["file", "int8"]
    assert steps.main([*flags, "--json"]) == 0
    assert [row["way"] for row in json.loads(capsys.readouterr().out)] == ["file", "int8"]


def test_bad_input_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps, "READ", 1 << 16)
    assert steps.main(["--model", str(tmp_path / "none.gguf")]) == 2
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        steps.main(["--batch", "0"])
    assert "0 is not a number from 1 on" in capsys.readouterr().err
