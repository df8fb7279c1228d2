"""What Triton kernels did under the interpreter, and what a compiler for a GPU that is not there makes of them.

    with launched() as seen:
        kernel[2, G](out, keys, ...)
    seen.programs, seen.loaded(keys), seen.stored(out), seen.races()

    compiled([helper, kernel], "kernel[2, 8](blank(2, 64), ...)")         registers, shared memory, PTX

TRITON_INTERPRET=1 must be set before this file is imported, as before any import of Triton.
"""

import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

ROOT = Path(__file__).parents[2]


# --- run: every address is seen --------------------------------------------------------------------------------


@dataclass
class _Touch:
    """A load or a store of one program: where."""

    launch: int
    program: int
    kind: str  # "load", "store", "atomic"
    addresses: np.ndarray
    itemsize: int


@dataclass
class Launched:
    """The launches inside of `launched()`."""

    kernels: list[str] = field(default_factory=list)  # a name for each launch
    grids: list[tuple[int, ...]] = field(default_factory=list)
    touches: list[_Touch] = field(default_factory=list)

    @property
    def programs(self) -> int:
        return sum(int(np.prod(grid)) for grid in self.grids)

    def loaded(self, tensor: Tensor) -> int:
        """Bytes that programs loaded from the memory of `tensor`, which may be a part of something larger."""
        return self._bytes(tensor, "load")

    def stored(self, tensor: Tensor) -> int:
        return self._bytes(tensor, "store") + self._bytes(tensor, "atomic")

    def _bytes(self, tensor: Tensor, kind: str) -> int:
        storage = tensor.untyped_storage()
        begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        touches = [touch for touch in self.touches if touch.kind == kind]
        return sum(int(((t.addresses >= begin) & (t.addresses < end)).sum()) * t.itemsize for t in touches)

    def races(self) -> int:
        """Places that one program writes and another of the same launch reads or writes: whoever is first decides.

        What all change by atomic operations is no race.
        """
        found = 0
        for launch in range(len(self.kernels)):
            mine = [touch for touch in self.touches if touch.launch == launch]
            stores = [touch.addresses for touch in mine if touch.kind == "store"]
            if stores:
                pairs = [np.stack([t.addresses, np.full_like(t.addresses, t.program)]) for t in mine]
                users = np.unique(np.concatenate(pairs, 1), axis=1)  # (address, program), each once
                places, count = np.unique(users[0], return_counts=True)
                found += len(np.intersect1d(places[count > 1], np.concatenate(stores)))
        return found


@contextmanager
def launched() -> Iterator[Launched]:
    """What the kernels that are launched inside did."""
    seen = Launched()
    builder = interpreter.InterpreterBuilder

    def watched(kind: str, original: Any, pointers: int, mask: int | None) -> Any:
        def operation(self: Any, *args: Any) -> Any:
            where = args[pointers].data
            real = np.ones(1, bool) if mask is None or args[mask] is None else args[mask].data
            addresses = where[np.broadcast_to(real.astype(bool), where.shape)].astype(np.uint64).ravel()
            size = args[pointers].get_element_ty().primitive_bitwidth // 8
            program = int(np.ravel_multi_index(self.grid_idx, self.grid_dim))
            seen.touches.append(_Touch(len(seen.kernels) - 1, program, kind, addresses, max(size, 1)))
            return original(self, *args)

        return operation

    run = interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.kernels.append(self.fn.__name__)
        seen.grids.append(())
        run(self, *args, **kwargs)

    set_grid_dim = builder.set_grid_dim

    def grid(self: Any, *dims: int) -> None:
        seen.grids[-1] = dims
        set_grid_dim(self, *dims)

    operations = {
        "create_masked_load": ("load", 0, 1), "create_masked_store": ("store", 0, 2),
        "create_atomic_rmw": ("atomic", 1, 3), "create_atomic_cas": ("atomic", 0, None),
    }  # fmt: skip
    with ExitStack() as stack:
        for name, (kind, pointers, mask) in operations.items():
            stack.enter_context(mock.patch.object(builder, name, watched(kind, getattr(builder, name), pointers, mask)))
        stack.enter_context(mock.patch.object(builder, "set_grid_dim", grid))
        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", launch))
        yield seen


# --- compiled, not run -----------------------------------------------------------------------------------------


@dataclass
class Compiled:
    """What the compiler made of one launch."""

    name: str
    num_warps: int
    registers: int  # of each thread
    shared: int  # bytes of each program
    stack: int  # bytes of each thread that had no room in registers
    ptx: str

    @property
    def fits(self) -> int:
        """How many of its programs a multiprocessor of an H100 holds at a time."""
        return min(self._room().values())

    def usage(self) -> str:
        room = self._room()
        least = min(room, key=lambda what: room[what])
        taken = f"{self.num_warps} warps, {self.registers:3} registers a thread, {self.shared / 1024:5.1f} KB shared"
        return f"{taken}: {room[least]} fit ({least})"

    def _room(self) -> dict[str, int]:
        """Registers are given out in eights, and 1 KB of shared memory a program is the system's."""
        registers = -(-self.registers // 8) * 8 * 32 * self.num_warps
        shared = 228 * 1024 // (self.shared + 1024)
        return {"registers": 65_536 // registers, "shared memory": shared, "warps": 64 // self.num_warps}


def compiled(
    kernels: Sequence[Any], launches: str, constants: Mapping[str, float] | None = None, capability: int = 90
) -> list[Compiled]:
    """Compile what `launches`, a text of Python, would launch on a GPU; ValueError in the compiler's words.

    kernels: functions of the notebook that it needs. constants: global ones of theirs. In the text `blank(2, 3,
    dtype=torch.float16)` makes a tensor without memory; `torch`, `triton` and `tl` are there. capability: 90, an H100.
    The interpreter must be off for this, so it takes a Python of its own.
    """
    names = "".join(f"{name} = tl.constexpr({value!r})\n" for name, value in (constants or {}).items())
    sources = "\n\n".join(inspect.getsource(kernel.fn) for kernel in kernels)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "launches.py")
        path.write_text(f"CAPABILITY = {capability}\n{_BEFORE}\n{names}\n{sources}\n\n{launches}\n{_BEHIND}")
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1])
    return [Compiled(**row) for row in json.loads(done.stdout.splitlines()[-1])]


_BEFORE = """
import json, re, subprocess, sys, tempfile
import torch, triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver


class NamedGPU:
    def get_current_target(self):
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def blank(*shape, dtype=torch.int32):
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_only(self, *args, grid, warmup, **options):
    launched.append(run(self, *args, grid=grid, warmup=True, **options))


def say(kind, error, trace):
    while error.__cause__:
        error = error.__cause__
    print(error, file=sys.stderr)


sys.excepthook = say
launched, run = [], JITFunction.run
driver.set_active(NamedGPU())
JITFunction.run = compile_only
"""

_BEHIND = """
rows = []
for kernel in launched:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(name + r":(\\d+)", usage)[0]) for name in ("REG", "STACK"))
    meta = kernel.metadata
    rows.append(dict(name=kernel.name, num_warps=meta.num_warps, registers=registers, shared=meta.shared,
                     stack=stack, ptx=kernel.asm["ptx"]))
print(json.dumps(rows))
"""
