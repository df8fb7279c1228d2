"""The C++ as other machines build it, kept between tests: a build takes half a minute of a processor."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kernels import cpp_build

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1")
FACES = {  # by the floats in a vector
    "cpp": (),
    "cpp 4": ("-DLANES=4",),
    "cpp 8": ("-DLANES=8", "-Wno-psabi"),
    "cpp 16": ("-DLANES=16", "-Wno-psabi"),
}


def library(face: str, sanitize: bool = False) -> Path:
    """The library of that face, or a skipped test. Its name holds a hash of the sources: nothing old is ever taken."""
    folder = Path(tempfile.gettempdir(), f"minipaged-kernels-{os.getuid()}")
    try:
        return cpp_build.build(folder, print, cpp_build.FLAGS + FACES[face] + SANITIZERS * sanitize)
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
