"""Every Triton kernel, as the engine launches it for real models, compiles for the GPUs it is meant for; no GPU needed.

The launchers themselves run, on tensors without memory (device "meta"), so the tile sizes, the warps and what
Triton assumes of sizes and strides are those of a real launch. Two things are replaced: the driver, by one that only
names its GPU, and the launch, by the compilation before it. What comes out is read: PTX, and what its assembler used.

The interpreter, under which test_triton.py runs, must be chosen before triton is imported, and so must its absence:
each GPU's kernels are compiled in a process of their own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GPUS = [80, 90]  # compute capability 8.0 (A100) and 9.0 (H100)
MODELS = {"SmolLM2-135M": (9, 3, 64), "Llama-3-8B": (32, 8, 128), "GPT-2": (12, 12, 64)}  # H, G, D
LAUNCHES = {"decode": (1, 1), "split decode": (1, 8), "prefill": (500, 1), "short prefill": (5, 4)}  # queries, splits
CASES = [(model, "bfloat16", launch) for model in MODELS for launch in LAUNCHES]
CASES += [("Llama-3-8B", "float16", launch) for launch in LAUNCHES]
CASES += [("Llama-3-8B", f"bfloat16 over {kind}", launch) for kind in ("int8", "fp8") for launch in LAUNCHES]
CASES += [("SmolLM2-135M", "float32", launch) for launch in LAUNCHES] + [("Llama-3-8B", "float32", "prefill")]
NAMES = [" ".join(case) for case in CASES]
# Packed weights: with a zero point for each group of 128, one for all, or FP8 with a scale for each row.
PACKED = ["4-bit bfloat16 few", "4-bit bfloat16 many", "4-bit float16 few", "4-bit float16 many", "4-bit float32 many",
          "8-bit bfloat16 many", "8-bit float16 few", "FP8 bfloat16 few", "FP8 float16 many"]  # fmt: skip
PRODUCTS = {80: r"mma\.sync\S*\.{0}\.{0}", 90: r"(mma\.sync|wgmma\.mma_async)\S*\.{0}\.{0}"}
SHORT = {"bfloat16": "bf16", "float16": "f16"}
OTHERS = {"write": "_write_kernel", "write int8": "_write_codes_kernel", "write fp8": "_write_codes_kernel"}
OTHERS |= {"copy": "_copy_kernel", "move": "_copy_kernel", "copy int8": "_copy_kernel"}


def can(capability, name):
    """GPUs before 8.9 can't read a cache in fp8, and the backend says so; they could write one."""
    return capability >= 89 or "over fp8" not in name




@pytest.fixture(scope="module", params=GPUS, ids=lambda gpu: f"sm_{gpu}")
def compiled(request):
    """{case: [kernel]} for one GPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, __file__, str(request.param)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return request.param, json.loads(done.stdout.splitlines()[-1])


def of(compiled, name):
    if not can(compiled[0], name):
        pytest.skip("not on this GPU")
    return compiled[1][name]


def test_every_launch_compiles_for_its_gpu(compiled):
    capability, kernels = compiled
    assert set(kernels) == {name for name in [*NAMES, *PACKED, *OTHERS] if can(capability, name)}
    for name, parts in kernels.items():
        if name in NAMES:
            expected = ["_attention_kernel", "_merge_kernel"][: 2 if "split" in name or "short" in name else 1]
        elif name in PACKED:
            expected = ["_packed_kernel"]
        else:
            expected = [OTHERS[name]]
        assert [kernel["name"] for kernel in parts] == expected
        assert all(re.search(rf"\.target sm_{capability}a?\b", kernel["ptx"]) for kernel in parts)


@pytest.mark.parametrize("name", [*NAMES, *PACKED])
def test_products_run_on_tensor_cores(compiled, name):
    """But for fp32: rounded to TF32 it would no longer be fp32."""
    capability, dtype = compiled[0], name.split()[1]
    ptx = of(compiled, name)[0]["ptx"]
    if dtype == "float32":
        assert "mma" not in ptx and "tf32" not in ptx
    else:
        assert re.search(PRODUCTS[capability].format(SHORT[dtype]), ptx)
    if capability == 90 and " prefill" in name and "short" not in name and dtype != "float32":
        assert "wgmma" in ptx


@pytest.mark.parametrize("name", [*NAMES, *PACKED, *OTHERS])
def test_nothing_spills_and_addresses_have_64_bits(compiled, name):
    """Registers that do not suffice spill to a stack in memory, which is what the kernels wait for anyway."""
    for kernel in of(compiled, name):
        assert kernel["stack"] <= 64  # bytes a thread
        assert re.search(r"(mul\.wide|mad\.wide|mul\.lo|mad\.lo)\.[su]64|shl\.b64", kernel["ptx"])


@pytest.mark.parametrize("name", [name for name in NAMES if "16" in name])
def test_keys_and_values_come_in_16_bytes_a_thread_ahead_of_time(compiled, name):
    """Asynchronous copies (cp.async) of the widest kind, several iterations before they are needed."""
    ptx = of(compiled, name)[0]["ptx"]
    assert len(re.findall(r"cp\.async\.cg\.shared\.global[^;]*0x10", ptx)) >= 8


@pytest.mark.parametrize("name", PACKED)
def test_codes_come_ahead_of_time_in_whole_words(compiled, name):
    """Bytes loaded one by one would make a step of few tokens slower than with weights in floats."""
    ptx = compiled[1][name][0]["ptx"]
    wide = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*0x(?:4|8|10)\b", ptx)
    assert wide and not re.search(r"ld\.global\S*\.[bu]8\b", ptx)


def compile_all(capability):
    """{case: [kernel]}: runs in a process of its own."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from kernels import new_cache, triton_attention, triton_cache
    from kernels.packed import Packed
    from kernels.triton_packed import PackedLinear

    BYTES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

    class NamedGPU:
        """As much of a driver as a compilation asks for."""

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    launched = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        launched.append(run(self, *args, grid=grid, warmup=True, **options))

    def blank(*shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device="meta")

    def attend(heads, kv_heads, head_size, dtypes, queries, splits):
        dtype, _, kind = dtypes.partition(" over ")
        dtype = getattr(torch, dtype)
        qkv = blank(4 * queries, heads + 2 * kv_heads, head_size, dtype=dtype)
        [cache] = new_cache(1, 100_000, 16, kv_heads, head_size, BYTES.get(kind, dtype), "meta")
        tables = blank(5), blank(4), blank(4, 64)
        triton_attention.paged_attention(qkv[:, :heads], cache, *tables, 0.1, queries, 1000, splits)

    def multiply(kind, dtype, tokens):
        codes = blank(4096, 2048, dtype=torch.uint8)
        if kind == "FP8":
            packed = Packed(codes, 8, blank(4096, 1, dtype=torch.float32), float8=True)
        else:
            zero = blank(4096, 16, dtype=torch.uint8) if kind == "4-bit" else 128
            packed = Packed(codes, int(kind[0]), blank(4096, 16, dtype=torch.float16), zero)
        PackedLinear(packed, blank(4096, dtype=dtype))(blank(tokens, 2048, dtype=dtype))

    def collect(name, launch, *args):
        launched.clear()
        launch(*args)
        kernels[name] = [
            dict(name=kernel.name, ptx=kernel.asm["ptx"], stack=stack(kernel.asm["cubin"])) for kernel in launched
        ]

    kernels = {}
    driver.set_active(NamedGPU())
    JITFunction.run = compile_only
    for model, dtype, launch in CASES:
        if can(capability, name := f"{model} {dtype} {launch}"):
            collect(name, attend, *MODELS[model], dtype, *LAUNCHES[launch])
    for name in PACKED:
        kind, dtype, shape = name.split()
        collect(name, multiply, kind, getattr(torch, dtype), 500 if shape == "many" else 1)
    qkv = blank(4, 15, 64, dtype=torch.bfloat16)
    pool, other = (blank(30, 2, 3, blocks, 16, 64, dtype=torch.bfloat16) for blocks in (100_000, 500))
    collect("write", triton_cache.write_kv, qkv[:, 9:12], qkv[:, 12:], pool[0], blank(4))
    for kind, dtype in BYTES.items():
        cache = new_cache(30, 100_000, 16, 3, 64, dtype, "meta")
        collect(f"write {kind}", triton_cache.write_kv, qkv[:, 9:12], qkv[:, 12:], cache[0], blank(4))
    collect("copy int8", triton_cache.copy_blocks, cache, blank(40), blank(40))
    collect("copy", triton_cache.copy_blocks, pool, blank(40), blank(40))
    collect("move", triton_cache.move_blocks, pool, other, blank(7), blank(7))
    return kernels


def stack(cubin):
    """Bytes of stack of each thread, as the tool that comes with Triton reads them."""
    import tempfile

    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"STACK:(\d+)", shown)[0])


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
