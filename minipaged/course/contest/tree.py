"""What takes part in the contest: a student's whole package, and its C++, built before the doors are closed."""

import json
import os
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

from kernels import cpp_build
from minipaged import cache_folder
from minipaged.course.assignment import Assignment
from minipaged.course.process import SYSTEM, readable
from minipaged.course.submission import PACKAGES, ROOT, copy_package

MOST_BYTES, MOST_FILES = 4 << 20, 1000  # that a student may hand in: no table of answers fits
SECONDS_TO_BUILD = 300
CPU = Path("kernels/cpu")


class Unfit(ValueError):
    """A submission that can't take part; the message says why."""


def build_tree(tree: Path, assignment: Assignment, folder: Path | None) -> None:
    """The reference, and over it what lies in `folder`, in src/ or at its top: all of a package, or a few files of it.

    Unfit if there is nothing, or too much.
    """
    copy_package(tree)
    if folder is not None:
        _copy_over(folder, tree)
    (tree / "driver.py").write_text(assignment.driver_source, encoding="utf-8")


def _copy_over(folder: Path, tree: Path) -> None:
    top = next((place for place in (folder / "src", folder) if any((place / name).is_dir() for name in PACKAGES)), None)
    if top is None:
        raise Unfit(f"there is neither {' nor '.join(PACKAGES)} in {folder}, nor in its src/")
    num_bytes = num_files = 0
    for file in sorted(path for name in PACKAGES for path in (top / name).rglob("*")):
        name = file.relative_to(top)
        if "__pycache__" in name.parts or file.suffix == ".pyc" or not _is_own(file, top):
            continue
        if _same(file, ROOT / name):
            continue
        num_bytes, num_files = num_bytes + file.stat().st_size, num_files + 1
        if num_bytes > MOST_BYTES or num_files > MOST_FILES:
            raise Unfit(f"what was changed has more than {MOST_BYTES >> 20} MiB or {MOST_FILES} files")
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, tree / name)


def _is_own(file: Path, top: Path) -> bool:
    """A file, and no link to somewhere else."""
    return file.is_file() and not any(path.is_symlink() for path in (file, *file.parents) if path.is_relative_to(top))


def _same(file: Path, other: Path) -> bool:
    return other.is_file() and file.stat().st_size == other.stat().st_size and file.read_bytes() == other.read_bytes()


def build_library(tree: Path, folder: Path, locked: bool) -> Path:
    """The C++ of a tree as a library: the package's own if nothing of it was changed. `cpp_build.FLAGS` are for all.

    Unfit if it can't be built; cpp_build.BuildFailed if nothing can.
    """
    ours = cpp_build.build(cache_folder() / "kernels", lambda line: None)
    sources = sorted((tree / CPU).iterdir())
    if len(sources) == len(cpp_build.SOURCES) and all(_same(path, ROOT / CPU / path.name) for path in sources):
        return ours
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), "")
    folder.mkdir()
    target, inside = folder / "cpu.so", resources.files("minipaged.course.inside")
    for name in ("compile.py", "locks.py"):
        (folder / name).write_bytes((inside / name).read_bytes())
    files = [str(path) for path in sources if path.suffix == ".cpp"]
    settings = {
        "command": [compiler, *cpp_build.FLAGS, *files, "-o", str(target)], "locked": locked,
        "readable": [*SYSTEM, *readable(), str(tree), os.path.dirname(os.path.realpath(compiler))],
        "writable": [str(folder)],
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(folder / "compile.py"), str(folder / "settings.json")],
            capture_output=True, timeout=SECONDS_TO_BUILD,
            env={"PATH": os.environ.get("PATH", ""), "TMPDIR": str(folder)},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Unfit(f"its C++ takes more than {SECONDS_TO_BUILD} seconds to build") from None
    if done.returncode or not target.is_file():
        raise Unfit(f"its C++ can't be built:\n{done.stderr.decode(errors='replace')[:1000]}")
    return target
