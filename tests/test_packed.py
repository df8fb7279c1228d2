"""Weights in small numbers: GGUF blocks beside the gguf package, products beside fp64, the same bits as floats."""

import dataclasses

import cpp_builds
import gguf
import numpy as np
import pytest
import torch

import kernels
from kernels import cpp, cpp_packed, reference
from kernels.packed import Packed, quantize, stack
from minipaged.models.gguf_blocks import TYPES, take_apart


@pytest.fixture(scope="module", params=["cpp", *cpp_builds.others()])
def backend(request):
    """A function products -> backend."""
    sanitize = request.config.getoption("--sanitize")
    if sanitize and request.param != "cpp":
        pytest.skip("for the sanitizers one face is enough")
    library = cpp_builds.library(request.param, sanitize)
    return lambda products="exact": cpp.CppBackend(torch.float32, library, products=products)


def blocks(kind: str, out: int, into: int, seed: int = 0, scale: float = 0.01) -> np.ndarray:
    """Random bytes in the layout of a GGUF type; fp16 scales are finite, and about `scale`."""
    rng = np.random.default_rng(seed)
    size = TYPES[kind][0]
    rows = rng.integers(0, 256, (out, into // (256 if "K" in kind else 32), size), dtype=np.uint8)
    places = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2]}
    for at in places.get(kind, [208]):
        scales = rng.normal(0, scale, rows.shape[:2]).astype(np.float16)
        rows[..., at : at + 2] = scales[..., None].view(np.uint8)
    return rows.reshape(out, -1)


def from_gguf(kind: str, out: int, into: int) -> Packed:
    packed = take_apart(kind, blocks(kind, out, into))
    assert packed is not None
    return packed


def grouped(out: int, into: int, bits: int, group: int, zeros: bool, half: bool) -> Packed:
    """As GPTQ and AWQ have it."""
    random = torch.Generator().manual_seed(into)
    codes = torch.randint(0, 1 << bits, (out, into), generator=random, dtype=torch.uint8)
    scale = torch.rand(out, into // group, generator=random) * 0.02 + 1e-3
    zero = torch.randint(0, 1 << bits, scale.shape, generator=random, dtype=torch.uint8) if zeros else 1 << bits - 1
    return Packed(codes, bits, scale.half() if half else scale, zero)


def float8(out: int, into: int) -> Packed:
    """All codes but the two NaNs, denormal numbers among them."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 127 != 127].repeat(out * into // 254 + 1)[: out * into].view(out, into)
    return Packed(codes.contiguous(), 8, torch.linspace(0.001, 0.02, out)[:, None], float8=True)


def uneven(packed: Packed) -> Packed:
    """With a minimum so much larger than its scale that the short way would lose bits."""
    scale = packed.scale.clone()
    minimum = packed.minimum.clone()
    scale[::3, 0], minimum[::3, 0] = 3 * 2.0**-24, 3000
    return dataclasses.replace(packed, scale=scale, minimum=minimum)


def shuffled(packed: Packed) -> Packed:
    random = torch.Generator().manual_seed(2)
    return dataclasses.replace(packed, order=torch.randperm(packed.shape[1], generator=random))


MATRICES = {
    **{kind: lambda out, into, kind=kind: from_gguf(kind, out, into) for kind in TYPES},
    "Q4_1, uneven": lambda out, into: uneven(from_gguf("Q4_1", out, into)),
    "4 bits, groups of 64": lambda out, into: grouped(out, into, 4, 64, True, True),
    "4 bits, fp32 scales": lambda out, into: grouped(out, into, 4, 128, True, False),
    "4 bits, whole rows": lambda out, into: grouped(out, into, 4, into, False, True),
    "4 bits, in another order": lambda out, into: shuffled(grouped(out, into, 4, 32, True, True)),
    "8 bits, groups of 32": lambda out, into: grouped(out, into, 8, 32, True, False),
    "8 bits, whole rows": lambda out, into: quantize(torch.randn(out, into), 8),
    "4 bits at loading": lambda out, into: quantize(torch.randn(out, into), 4),
    "fp8": float8,
}  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
def test_gguf_blocks_are_what_the_gguf_package_says(kind):
    rows = blocks(kind, 9, 512)
    theirs = torch.from_numpy(gguf.dequantize(rows, gguf.GGMLQuantizationType[kind]).copy())
    assert torch.equal(take_apart(kind, rows).dequantize(), theirs)


def test_types_without_kernels_stay_with_the_gguf_package():
    assert take_apart("IQ4_NL", np.zeros((2, 18), np.uint8)) is None
    assert take_apart("Q4_0", np.zeros(18, np.uint8)) is None  # no matrix


@pytest.mark.parametrize("rows", [1, 2, 7, 13, 100])
@pytest.mark.parametrize("name", MATRICES)
def test_exact_products_are_those_of_the_floats_to_the_last_bit(backend, name, rows):
    torch.manual_seed(rows)
    packed, x, y = MATRICES[name](75, 768), torch.randn(rows, 768), torch.randn(rows, 75)
    bias = torch.randn(75)
    weight = packed.dequantize()
    assert backend().packs(packed)
    product, floats = backend().linear(packed, bias), backend().linear(weight, bias)
    assert isinstance(product, cpp_packed.PackedMatrix)
    if packed.order is None:
        assert torch.equal(product(x), floats(x))
        assert torch.equal(product(x, add_to=y.clone()), floats(x, add_to=y.clone()))
    expected = x.double() @ weight.double().T + bias.double()
    # The bound of a sum of n products in floats, and no more: n eps times the sum of their sizes.
    bound = 768 * 2**-24 * (x.double().abs() @ weight.double().abs().T + bias.abs().double())
    assert ((product(x) - expected).abs() <= bound).all()
    assert torch.equal(product(x)[-1:], product(x[-1:]))  # alone and in company


@pytest.mark.parametrize("rows", [1, 2, 5, 14])
@pytest.mark.parametrize("name", [name for name in MATRICES if name != "fp8"])
def test_int8_products_are_those_of_rounded_activations(backend, name, rows):
    torch.manual_seed(rows)
    packed, x = MATRICES[name](75, 768), torch.randn(rows, 768)
    x[0, 5] = 40.0  # an outlier makes its 32 neighbours coarse, and no others
    product = backend("int8").linear(packed)
    rounded = reference.round_to_int8(x if packed.order is None else x[:, packed.order])
    if packed.order is not None:
        rounded = torch.empty_like(rounded).index_copy_(1, packed.order, rounded)
    expected = rounded.double() @ packed.dequantize().double().T
    size = rounded.double().abs() @ packed.dequantize().double().abs().T
    terms = (rounded.abs().double() @ packed.scales().repeat_interleave(packed.group_size, 1).double().abs().T) * 255
    assert ((product(x) - expected).abs() <= 1e-6 * (size + terms)).all()
    assert torch.equal(product(x)[-1:], product(x[-1:]))
    error = (product(x) - x @ packed.dequantize().T).norm() / (x @ packed.dequantize().T).norm()
    assert 1e-4 < error < 0.05  # it is another product, and not far from it


def test_int8_products_keep_what_is_no_number(backend):
    x = torch.randn(4, 64)
    x[1, 3], x[2, 40], x[3] = torch.nan, torch.inf, 0
    for name in ("Q4_0", "Q8_0"):
        y = backend("int8").linear(MATRICES[name](40, 64))(x)
        assert y[0].isfinite().all() and not y[1:3].isfinite().any() and (y[3] == 0).all()


@pytest.mark.parametrize("name", MATRICES)
def test_rows_are_an_embedding(backend, name):
    packed = MATRICES[name](75, 256)
    rows = torch.tensor([[74, 0, 31], [32, 33, 0]])
    embedding = backend().embedding(packed)
    assert torch.equal(embedding[rows], packed.dequantize()[rows])
    assert torch.equal(packed[rows], packed.dequantize()[rows])
    assert embedding[rows[:0]].shape == (0, 3, 256)


def test_matrices_made_alike_become_one_and_others_stand_side_by_side(backend):
    like = [from_gguf("Q4_K", out, 256) for out in (40, 24)]
    other = from_gguf("Q6_K", 24, 256)
    assert [w.shape for w in stack([*like, other])] == [(64, 256), (24, 256)]
    x, y, bias = torch.randn(3, 256), torch.randn(3, 88), torch.randn(88)
    floats = torch.cat([packed.dequantize() for packed in (*like, other)])
    several = backend().linear([*like, other], bias)
    assert torch.equal(several(x), backend().linear(floats, bias)(x))
    assert torch.equal(several(x, add_to=y.clone()), y + several(x))
    zeros = [grouped(32, 256, 4, 64, True, True), grouped(32, 256, 4, 64, False, True)]
    [one] = stack(zeros)
    assert torch.equal(one.dequantize(), torch.cat([packed.dequantize() for packed in zeros]))


@pytest.mark.parametrize(
    ("packed", "fits"),
    [
        (grouped(8, 96, 4, 96, False, True), True),
        (grouped(8, 96, 4, 48, False, True), False),  # a group is no power of two
        (grouped(8, 64, 4, 16, False, True), False),
        (grouped(8, 48, 8, 48, False, True), False),  # no whole units
        (dataclasses.replace(float8(8, 64), codes=torch.full((8, 64), 255, dtype=torch.uint8)), False),  # NaN
    ],
)
def test_what_has_no_product_becomes_floats(packed, fits):
    backend = kernels.load("cpp")
    assert backend.packs(packed) is fits
    x = torch.randn(2, packed.shape[1])
    weight = packed.dequantize()
    assert torch.allclose(backend.linear(packed)(x), x @ weight.T, atol=1e-5, equal_nan=True)
    assert not kernels.TorchBackend().packs(packed)
    assert torch.allclose(kernels.TorchBackend().linear(packed)(x), x @ weight.T, atol=1e-5, equal_nan=True)


def test_rounding_at_loading_is_to_the_nearest_code():
    weight = torch.randn(64, 256) * torch.logspace(-3, 1, 64)[:, None]
    eight, four = quantize(weight, 8), quantize(weight, 4)
    assert ((eight.dequantize() - weight).abs() <= eight.scale * 0.501).all()
    step = four.scale.float().repeat_interleave(32, 1)
    assert ((four.dequantize() - weight).abs() <= step * 0.51 + weight.abs() * 2**-10).all()  # ends are fp16
    constant = quantize(torch.full((2, 32), 0.5), 4)
    assert torch.equal(constant.dequantize(), torch.full((2, 32), 0.5))
    assert torch.equal(quantize(torch.zeros(2, 32), 8).dequantize(), torch.zeros(2, 32))


def test_both_ways_to_make_floats_are_taken():
    backend = kernels.load("cpp")
    forms = {name: backend.linear(make(40, 256)).matrix.form for name, make in MATRICES.items()}
    assert {forms[kind] for kind in TYPES if "K" not in kind} == {cpp_packed.SHORT}
    assert forms["Q4_1, uneven"] == cpp_packed.PLAIN and forms["fp8"] == cpp_packed.FLOAT8


def test_bytes_are_those_of_the_file():
    """Codes, scales and minima of Q4_1: 20 bytes for 32 weights, as in the file; of the K-quants a few more."""
    backend = kernels.load("cpp")
    more = {"Q4_0": 1.0, "Q4_1": 1.0, "Q5_0": 1.0, "Q8_0": 1.0, "Q4_K": 1.03, "Q5_K": 1.03, "Q6_K": 1.0}
    for kind, most in more.items():
        matrix = backend.linear(from_gguf(kind, 256, 512))
        kept = matrix.words.nbytes + sum(tensor.nbytes for tensor in matrix.kept)
        assert kept <= most * TYPES[kind][0] * 256 * 512 / (256 if "K" in kind else 32), kind


def test_packed_products_under_sanitizers(request):
    cpp_builds.again_under_sanitizers(__file__, request)
