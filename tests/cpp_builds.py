"""The C++ as other machines build it, kept between tests: a build takes half a minute of a processor."""

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kernels import cpp_build
from minipaged import cache_folder

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1")
FACES = {  # by the floats in a vector
    "cpp": (),
    "cpp 4": ("-DLANES=4",),
    "cpp 8": ("-DLANES=8", "-Wno-psabi"),
    "cpp 16": ("-DLANES=16", "-Wno-psabi"),
}


def others() -> list[str]:
    """The faces beside "cpp" that differ from it: the machine's own width is that one again, to the last byte."""
    command = ["c++", "-march=native", "-dM", "-E", "-xc++", os.devnull]
    try:
        known = subprocess.run(command, capture_output=True, text=True).stdout.split()
    except OSError:
        known = []
    own = "cpp 16" if "__AVX512F__" in known else "cpp 8" if "__AVX__" in known else "cpp 4"
    return [face for face in FACES if face not in ("cpp", own)]


def library(face: str, sanitize: bool = False) -> Path:
    """The library of that face, or a skipped test. Its name holds a hash of the sources: nothing old is ever taken."""
    mine = face == "cpp" and not sanitize  # what the package itself builds, and keeps
    shelf = Path(tempfile.gettempdir(), f"minipaged-kernels-{os.getuid()}")
    shelf.mkdir(parents=True, exist_ok=True)
    try:
        with open(shelf / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two workers that need the same one don't both build it
            flags = cpp_build.FLAGS + FACES[face] + SANITIZERS * sanitize
            return cpp_build.build(cache_folder() / "kernels" if mine else shelf, print, flags)
    except cpp_build.BuildFailed as error:
        pytest.skip(str(error))


def again_under_sanitizers(file: str, request) -> None:
    """The tests of a file again, in a process whose memory is watched: a read or write outside of a tensor ends it."""
    if request.config.getoption("--sanitize"):
        pytest.skip("this is that process")
    watcher = subprocess.run(["c++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(watcher):
        pytest.skip("no address sanitizer")
    environment = os.environ | {"LD_PRELOAD": watcher, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "pytest", "-x", "--sanitize", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
