"""How the Triton kernels cut their work: numbers only, no Triton and no GPU."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import triton_tiles
from kernels.triton_tiles import RESIDENT, choose_splits, choose_tiles, power_of_2


def test_doctests():
    assert doctest.testmod(triton_tiles).failed == 0


@given(group=st.integers(1, 130), head_size=st.integers(1, 256), itemsize=st.sampled_from([2, 4]), few=st.booleans())
def test_tiles_hold_what_they_promise(group, head_size, itemsize, few):
    for decode in (True, False):
        tiles = choose_tiles(group, head_size, itemsize, decode, few)
        assert tiles.queries >= 1 and tiles.queries * group <= tiles.rows
        for side in (tiles.rows, tiles.keys):
            assert side >= 16 and side == power_of_2(side)  # what a product of tiles needs
        assert tiles.queries == 1 or not decode


@given(
    programs=st.integers(1, 5000), context=st.integers(0, 200_000), cores=st.integers(1, 200),
    min_keys=st.sampled_from([128, 1024]),
)  # fmt: skip
def test_splits(programs, context, cores, min_keys):
    splits = choose_splits(programs, context, cores, min_keys)
    assert 1 <= splits <= 128
    assert splits == 1 or context // splits >= min_keys
    if programs % (RESIDENT * cores) == 0:
        assert splits == 1  # full waves already


@pytest.mark.parametrize("programs", [1, 3, 8, 24, 100])
def test_splitting_fills_the_gpu_where_the_context_is_long(programs):
    splits = choose_splits(programs, 128_000, 132)
    assert programs * splits >= 0.9 * min(RESIDENT * 132, 128 * programs)
