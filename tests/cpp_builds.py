"""The C++ as other machines build it, kept between tests: a build takes half a minute of a processor."""

import os
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
