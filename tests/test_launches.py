"""What `launched` sees of kernels under the interpreter, and what `compiled` says of them."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from minipaged.teaching.launches import compiled, launched  # noqa: E402


@triton.jit
def copy_kernel(out, x, n, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(out + i, tl.load(x + i, mask=(i < n) & (n > 0)), mask=i < n)


@triton.jit
def count_kernel(total, out, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(total, 1)
    else:
        tl.store(total, tl.load(total) + 1)
    tl.store(out + tl.program_id(0), tl.load(out + tl.program_id(0)))


@triton.jit
def product_kernel(out, x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    where = i[:, None] * N + i[None, :]
    tl.store(out + where, tl.dot(tl.load(x + where), tl.load(y + where)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_bytes_are_those_behind_the_mask(dtype):
    x, room = torch.ones(10, dtype=dtype), torch.zeros(30, dtype=dtype)
    with launched() as seen:
        copy_kernel[(3,)](room[5:], x, 10, TILE=4)
        copy_kernel[(1, 1)](torch.empty(4, dtype=dtype), room, 3, TILE=4)
    assert seen.kernels == ["copy_kernel", "copy_kernel"] and seen.programs == 4
    assert seen.loaded(x) == seen.stored(room[5:]) == 10 * x.itemsize
    assert seen.loaded(room) == 3 * x.itemsize and seen.stored(x) == 0
    assert seen.races() == 0


def test_races_are_places_that_two_programs_use():
    total, out = torch.zeros(1, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    for atomic, races in ((False, 1), (True, 0)):
        with launched() as seen:
            count_kernel[(5,)](total, out, ATOMIC=atomic)
        assert seen.races() == races and seen.stored(total) == 20
    with launched() as seen:  # one program each, one launch after the other
        for _ in range(3):
            count_kernel[(1,)](total, out, ATOMIC=False)
    assert seen.races() == 0 and total.item() == 13
    with launched() as seen:
        pass
    assert seen.programs == 0 and seen.races() == 0


def test_nothing_is_left_behind():
    from triton.runtime import interpreter

    before = interpreter.InterpreterBuilder.create_masked_load, interpreter.GridExecutor.__call__
    with pytest.raises(Exception, match="power of 2"), launched():
        copy_kernel[(1,)](torch.empty(4), torch.empty(4), 4, TILE=3)
    assert before == (interpreter.InterpreterBuilder.create_masked_load, interpreter.GridExecutor.__call__)


def test_compiled_tells_what_it_takes_or_what_is_wrong():
    launch = "product_kernel[1,](*[blank(64, 64, dtype=torch.float16)] * 3, N={})"
    [kernel] = compiled([product_kernel], launch.format(64))
    assert (kernel.name, kernel.num_warps, kernel.stack) == ("product_kernel", 4, 0)
    assert ".target sm_90" in kernel.ptx and 0 < kernel.registers <= 255 and kernel.shared > 0
    room = 65536 // (-(-kernel.registers // 8) * 1024), 233472 // (kernel.shared + 1024), 16
    assert kernel.fits == min(room) and kernel.usage().startswith("4 warps")
    with pytest.raises(ValueError, match="K >= 16"):
        compiled([product_kernel], launch.format(8))
