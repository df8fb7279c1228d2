"""The bench that puts two engines beside one."""

import json

import pytest
from tiny_model import make_folder

from minipaged.bench import disaggregation
from minipaged.bench.disaggregation import Contender, Engine, Seen, percentile


def test_two_engines_beside_one(tmp_path, capsys):
    folder = make_folder(tmp_path / "model")
    quick = ["--model", str(folder), "--vocab-size", "90", "--quick", "--requests", "5", "--rate", "20", "--json"]
    assert disaggregation.main(quick) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["load"], row["engines"]) for row in rows] == [
        (load, way) for load in ("stall", "poisson") for way in disaggregation.WAYS
    ]
    assert all(0 < row["gap_p50"] <= row["gap_p99"] and row["first_p50"] <= row["first_p99"] for row in rows)


def test_an_engine_that_ends_is_told_of(tmp_path, capfd):
    made = Contender()
    made.engines.append(Engine({"model": str(tmp_path / "nothing")}, 1, made.news))
    try:
        with pytest.raises(RuntimeError, match="an engine has ended"):
            made.wait_until_ready()
    finally:
        made.engines[0].end()
    assert "nothing" in capfd.readouterr().err


def test_what_is_told():
    assert [percentile([5.0, 1.0, 2.0, 4.0, 3.0], share) for share in (0.2, 0.21, 0.5, 0.99, 1.0)] == [1, 2, 3, 5, 5]
    seen = Seen([1.0, 2.0], [[1.5, 2.0, 4.0], [2.25]], [[7, 7, 7], [7]])
    assert seen.gaps == [0.5, 2.0] and seen.first == [0.5, 0.25] and seen.tokens_per_second == 4 / 3
