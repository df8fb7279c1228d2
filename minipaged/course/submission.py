"""What a student hands in, and the tree of files in which it is tried.

A submission is a folder in which the assignment's files are found: where the starter put them, or anywhere, as an
upload of single files is. Everything else in the tree is the reference, but for what would give the assignment away.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import minipaged
from minipaged.course import cut
from minipaged.course.assignment import Assignment
from minipaged.course.words import clean

ROOT = Path(minipaged.__file__).parents[1]
PACKAGES = ("minipaged", "kernels")
NEVER = ("__pycache__", "course", "bench", "experiments", "teaching", "*.json", "*.pyc")  # in no student's tree
LONGEST = 1 << 18  # bytes of a file
SECONDS_TO_PARSE = 30.0  # by the clock; the process itself has few seconds of processor time
MOST_FOLDERS, MOST_FILES, DEEPEST = 5_000, 10_000, 20  # in a submission, in a folder of it, within one another


@dataclass
class Submission:
    """sources: of the assignment's files, those that were found. faults: why a file can't be used, by file."""

    name: str
    sources: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)

    def unwritten(self, assignment: Assignment) -> set[str]:
        """The names, as `file:name`, that nobody has written yet."""
        missing = set()
        for file in assignment.files:
            names, source = assignment.cut(file), self.usable().get(file)
            missing |= {f"{file}:{name}" for name in (cut.unwritten(source, names) if source is not None else names)}
        return missing

    def usable(self) -> dict[str, str]:
        return {file: source for file, source in self.sources.items() if file not in self.faults}


def read(folder: Path, assignment: Assignment) -> Submission:
    """Errors of a single file are in the answer; OSError if there is no such folder."""
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder")
    submission = Submission(clean(folder.resolve().name))
    for file in assignment.files:
        try:
            found = _find(folder, file)
            if isinstance(found, str):
                submission.faults[file] = found
                continue
            submission.sources[file] = source = _text(found, folder)
            if fault := _fault(source):
                submission.faults[file] = clean(fault)
        except (OSError, ValueError, SyntaxError) as error:
            submission.faults[file] = clean(f"it can't be read: {error}")
    return submission


def _text(path: Path, folder: Path) -> str:
    """OSError, ValueError or SyntaxError if there is none, or if it isn't one's own."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError("it is a link to something else")
    with path.open("rb") as file:
        data = file.read(LONGEST + 1)
    if len(data) > LONGEST:
        raise ValueError(f"it has more than {LONGEST:,} bytes")
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)  # Python would follow a comment that says so
    if encoding not in ("utf-8", "utf-8-sig"):
        raise ValueError(f"it says that it is {encoding}, and not UTF-8")
    return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def _fault(source: str) -> str:
    """Why it can't be parsed, as of inside/probe.py. Afterwards it can be parsed here: that is no risk any more."""
    probe = resources.files("minipaged.course.inside") / "probe.py"
    with resources.as_file(probe) as path:
        command = [sys.executable, "-I", "-S", str(path)]
        try:
            done = subprocess.run(command, input=source.encode(), capture_output=True, timeout=SECONDS_TO_PARSE)
            return str(json.loads(done.stdout))
        except (subprocess.TimeoutExpired, ValueError):
            return "it can't be read: whoever tries it runs out of memory or time"


def _find(folder: Path, file: str) -> Path | str:
    """Where the starter puts it, else the only file below whose path ends like this; or why there is none."""
    for place in (folder / "src" / file, folder / file):
        if place.is_file():
            return place
    parts = Path(file).parts
    candidates = list(_files(folder, parts[-1]))
    for length in range(len(parts), 0, -1):
        alike = [path for path in candidates if path.parts[-length:] == parts[-length:]]
        if len(alike) == 1:
            return alike[0]
        if alike:
            return clean(f"there are several: {', '.join(str(path.relative_to(folder)) for path in alike[:3])}")
    return f"there is no {parts[-1]}"


def _files(folder: Path, name: str) -> Iterator[Path]:
    """Of this name, at or below the folder. ValueError if there is more below than a student could want."""
    for number, (path, folders, files) in enumerate(os.walk(folder)):
        if number > MOST_FOLDERS or len(files) > MOST_FILES:
            raise ValueError("there are far too many files in the folder")
        if len(Path(path).relative_to(folder).parts) >= DEEPEST:
            folders.clear()
        found = Path(path) / name
        if name in files and found.is_file() and not found.is_symlink():
            yield found


def build(
    tree: Path, assignment: Assignment, sources: dict[str, str], not_theirs: Collection[str], changed: dict[str, str]
) -> None:
    """Write the tree. not_theirs: names, as `file:name`, for which the reference stands.

    changed: other files that are not the reference's, such as a student's earlier assignments.
    """
    copy_package(tree, assignment.absent)
    for path, text in {**changed, **assignment.also}.items():
        _write(tree / path, text)
    for file, source in sources.items():
        names = [name for name in assignment.cut(file) if f"{file}:{name}" in not_theirs]
        helpers = assignment.helpers(file) if names else ()
        _write(tree / file, cut.filled(source, reference(file), names, helpers))
    _write(tree / "driver.py", assignment.driver_source)


def copy_package(tree: Path, absent: Collection[str] = (), root: Path = ROOT) -> None:
    """The reference, or the package at `root`, without what no student needs, and without what gives answers away."""
    skip = shutil.ignore_patterns(*NEVER)
    for package in PACKAGES:
        shutil.copytree(root / package, tree / package, ignore=skip, dirs_exist_ok=True)
    for path in absent:
        if (tree / path).is_dir():
            shutil.rmtree(tree / path)
        else:
            (tree / path).unlink()


def reference(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
