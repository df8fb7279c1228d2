"""The Triton product with packed weights against the plain reference, and that against fp64.

Under the interpreter (see test_triton.py) shapes are as small as tiles allow; on a GPU the same cases and larger ones.
"""

import doctest
import os

import pytest
import torch

from kernels import reference
from kernels.packed import Packed

pytest.importorskip("triton", reason="Triton is not installed")
GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

from kernels import triton_packed  # noqa: E402
from kernels.triton_backend import TritonBackend  # noqa: E402
from kernels.triton_packed import PackedLinear, pack, takes, tile_k  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the largest number of the answer


def make(out, into, bits, group, zero="groups", float8=False, minimum=False, order=False, dtype=torch.float16, seed=0):
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (out, into), generator=random, dtype=torch.uint8)
    if float8:
        codes[codes & 127 == 127] = 0x81  # no NaN; but numbers too small for a normal e4m3
    groups = into // group
    scale = (torch.rand(out, groups, generator=random) / 8 + 0.01).to(dtype)
    if zero == "groups":
        zero = torch.randint(0, 1 << bits, (out, groups), generator=random, dtype=torch.uint8)
    least = torch.randn(out, groups, generator=random).to(dtype) if minimum else None
    columns = torch.randperm(into, generator=random) if order else None
    return Packed(codes, bits, scale, zero, least, order=columns, float8=float8).to(torch.device(DEVICE))


def check(packed, tokens, dtype, bias=False, add=False):
    random = torch.Generator().manual_seed(1)
    out, into = packed.shape
    x = torch.randn(tokens, 2 * into, generator=random).to(DEVICE, dtype)[:, :into]  # rows apart, as a view has them
    extra = torch.randn(out, generator=random).to(DEVICE, dtype) if bias else None
    before = torch.randn(tokens, out, generator=random).to(DEVICE, dtype)
    exact = x.double() @ packed.dequantize().double().t() + (extra.double() if bias else 0)
    scale = float(exact.abs().max())
    assert (reference.packed_linear(x, packed, extra) - exact).abs().max() <= TOLERANCE[dtype] * scale
    linear = PackedLinear(packed, extra)
    y = before.clone()
    answer = linear(x, add_to=y) if add else linear(x)
    assert answer.dtype == dtype and (not add or answer is y)
    exact = exact + before.double() if add else exact
    assert (answer - exact).abs().max() <= TOLERANCE[dtype] * scale


KINDS = {  # name: (outputs, inputs, options)
    "4 bits": (20, 64, dict(bits=4, group=32)),
    "4 bits, one zero": (16, 64, dict(bits=4, group=64, zero=8)),
    "4 bits, groups of 16": (16, 48, dict(bits=4, group=16)),  # three tiles: the last pair lacks one
    "4 bits, a minimum": (16, 64, dict(bits=4, group=32, zero=0, minimum=True)),
    "4 bits, one group of an odd size": (16, 72, dict(bits=4, group=72)),
    "4 bits, sorted": (16, 64, dict(bits=4, group=32, order=True)),
    "8 bits": (20, 48, dict(bits=8, group=48)),  # tiles of 16
    "8 bits, one zero": (16, 100, dict(bits=8, group=100, zero=128)),
    "FP8": (20, 70, dict(bits=8, group=70, zero=0, float8=True, dtype=torch.float32)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_product(kind, dtype):
    out, into, options = KINDS[kind]
    check(make(out, into, **options), 3, dtype)


@pytest.mark.parametrize("tokens", [1, 16, 17, 40])
def test_any_number_of_tokens_with_bias_and_added(tokens):
    check(make(16, 32, 4, 32), tokens, torch.float16, bias=True, add=tokens % 2 == 0)
    assert PackedLinear(make(16, 32, 4, 32))(torch.zeros(0, 32, device=DEVICE)).shape == (0, 16)


@pytest.mark.skipif(not GPU, reason="too large for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 500])
@pytest.mark.parametrize("kind", ["4 bits", "8 bits", "FP8"])
def test_product_of_a_real_size(kind, tokens, dtype):
    check(make(4096, 2048, **KINDS[kind][2] | {"group": 2048 if kind == "FP8" else 128}), tokens, dtype, bias=True)


def test_every_fp8_number_is_itself():
    """All 254 of them, the ones below the normal numbers, too: to the bit."""
    codes = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)
    codes[codes & 127 == 127] = 0
    packed = Packed(codes, 8, torch.ones(256, 1), float8=True).to(torch.device(DEVICE))
    x = torch.zeros(1, 16, device=DEVICE)
    x[0, 5] = 1.0
    assert torch.equal(PackedLinear(packed)(x)[0], packed.dequantize()[:, 5])


@pytest.mark.parametrize(("bits", "tile"), [(4, 16), (8, 16), (4, 64)])
def test_packing_keeps_every_code_where_the_kernel_looks(bits, tile):
    codes = torch.randint(0, 1 << bits, (3, 100), dtype=torch.uint8)
    packed = pack(codes, bits, tile)
    for k in range(100):
        at, j = divmod(k, tile)
        found = packed[:, k] if bits == 8 else packed[:, at // 2 * tile + j] >> 4 * (at % 2) & 15
        assert torch.equal(found, codes[:, k])


def test_doctests():
    assert doctest.testmod(triton_packed).failed == 0


def test_a_tile_lies_in_one_group():
    assert [tile_k(make(1, 96 * 4, 4, group)) for group in (16, 32, 48, 96, 128)] == [16, 32, 16, 32, 64]
    assert tile_k(make(1, 100, 4, 100)) == 64 and tile_k(make(1, 8, 4, 8)) == 16


def test_what_it_does_not_take_is_said():
    backend = TritonBackend(DEVICE, torch.float16)
    good = make(16, 64, 4, 32)
    assert takes(good) and backend.packs(good) is (torch.device(DEVICE).type == "cuda")
    outer = Packed(good.codes, 4, torch.ones(16, 8, dtype=torch.uint8), outer=(torch.ones(16, 1).half(), None))
    for other in (make(16, 48, 4, 24), make(16, 64, 6, 32), outer):
        assert not backend.packs(other)
        with pytest.raises(ValueError, match="takes codes of 4 or 8 bits in groups of a multiple of 16"):
            triton_packed.PackedLinear(other)
    x = torch.randn(2, 48, device=DEVICE, dtype=torch.float16)
    expected = reference.packed_linear(x, make(16, 48, 4, 24))
    torch.testing.assert_close(backend.linear(make(16, 48, 4, 24))(x), expected, rtol=2e-3, atol=2e-2)  # of floats
    with pytest.raises(ValueError, match="not across"):
        triton_packed.PackedLinear(good.t())
    with pytest.raises(ValueError, match="does not fit"):
        backend.linear(good)(torch.zeros(1, 65, device=DEVICE))


def test_the_backend_multiplies_several_at_once():
    """Of one x, as q, k and v are of theirs, each with its own kind of codes."""
    parts = [make(16, 64, 4, 32), make(20, 64, 8, 64, zero=128, order=True)]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).to(DEVICE, torch.float16)
    bias = torch.arange(36.0, device=DEVICE).half()
    linear = TritonBackend(DEVICE, torch.float16).linear(parts, bias)
    expected = torch.cat([reference.packed_linear(x, part) for part in parts], 1) + bias
    torch.testing.assert_close(linear(x), expected, rtol=2e-3, atol=2e-2)
    y = torch.ones(3, 36, device=DEVICE, dtype=torch.float16)
    assert linear(x, add_to=y) is y
    torch.testing.assert_close(y, expected + 1, rtol=2e-3, atol=2e-2)
