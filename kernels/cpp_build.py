"""Builds the C++ of kernels/cpu on first use.

It is plain C++ on plain memory, with no header of PyTorch: it builds in seconds, fits every version of PyTorch, and
needs nothing but a compiler. Where there is none, `build` raises BuildFailed and PyTorch serves.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path

SOURCES = sorted(Path(__file__).with_name("cpu").glob("*"))  # none in a tree that was cut for the course
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
SECONDS = 300  # a compiler that takes longer hangs


class BuildFailed(RuntimeError):
    """The C++ file can't be built here; the message says why."""


def build(folder: Path, notice: Callable[[str], None], flags: tuple[str, ...] = FLAGS) -> Path:
    """The shared library of kernels/cpu in `folder`, built if it isn't there yet. BuildFailed if that is impossible.

    Its name holds a hash of all that it depends on: source, flags, compiler, processor. It appears by a rename,
    complete, so a second process that builds at the same time does no harm.

    MINIPAGED_LIBRARY names one that is built already, for a process that may start no compiler: it is taken as it is.
    """
    if ready := os.environ.get("MINIPAGED_LIBRARY"):
        return Path(ready)
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise BuildFailed("no C++ compiler (c++, g++, clang++ or $CXX)")
    sources = [path.read_bytes() for path in SOURCES]
    known = (*sources, repr(flags).encode(), _output([compiler, "--version"]), _processor())
    target = folder / f"cpu-{hashlib.sha256(b'/'.join(known)).hexdigest()[:16]}.so"
    if target.is_file():
        return target
    notice(f"building the C++ kernels with {compiler} (once; kept in {folder})")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as temporary:
            built = Path(temporary) / target.name
            files = [path for path in SOURCES if path.suffix == ".cpp"]
            objects = [str(built.with_name(f"{path.stem}.o")) for path in files]
            commands = [[compiler, *flags, "-c", str(path), "-o", o] for path, o in zip(files, objects, strict=True)]
            with ThreadPool() as pool:
                pool.map(_output, commands)  # side by side
            _output([compiler, *flags, *objects, "-o", str(built)])
            if not built.is_file():
                raise BuildFailed(f"{compiler} failed: no library came out")
            os.replace(built, target)
    except OSError as error:
        raise BuildFailed(f"cannot write to {folder}: {error.strerror}; set MINIPAGED_CACHE") from None
    return target


def _output(command: list[str]) -> bytes:
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(f"{command[0]} does not run: {error}") from None
    if done.returncode:
        first = next((line for line in done.stderr.decode(errors="replace").splitlines() if "error" in line), "")
        raise BuildFailed(f"{command[0]} failed: {first[:200] or done.returncode}")
    return done.stdout


def _processor() -> bytes:
    """-march=native builds for this processor: a home folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return "/".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})).encode()


def load(path: Path) -> ctypes.CDLL:
    """The library's functions, told the types of their arguments."""
    library = ctypes.CDLL(str(path))
    p, i, n, x = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
    library.cpu_linear.argtypes = [p, p, i, p, p, n, n, n, i, i]
    library.cpu_attention.argtypes = [p, i, n, p, i, p, p, p, p, *[n] * 7, x, i]
    library.cpu_rms_norm.argtypes = [p, i, n, p, x, p, n, n, i]
    library.cpu_rope_and_write.argtypes = [p, p, p, i, n, n, n, p, p, p, i, p, *[n] * 6, x, x, i]
    library.cpu_silu_and_mul.argtypes = [p, i, p, n, n, i]
    library.cpu_pack.argtypes = [p, n, n, i, p, i]
    library.cpu_packed_linear.argtypes = library.cpu_packed_linear_int8.argtypes = [p, p, p, p, n, i, i]
    library.cpu_packed_rows.argtypes = [p, p, n, p]
    library.ranks_memory.argtypes, library.ranks_memory.restype = [n, n], n
    library.ranks_bring.argtypes = [p, n, n, n, n, p, n]
    library.ranks_wait.argtypes = [p, n, n, n]
    library.ranks_add.argtypes = [p, n, n, n, p, n, i]
    library.ranks_copy.argtypes = [p, n, n, n, n, p, n]
    return library
