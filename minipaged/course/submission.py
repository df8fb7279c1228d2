"""What a student hands in, and the tree of files in which it is tried.

A submission is a folder in which the assignment's files are found: where the starter put them, or anywhere, as an
upload of single files is. Everything else in the tree is the reference, but for what would give the assignment away.
"""

import ast
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import minipaged
from minipaged.course import cut
from minipaged.course.assignment import Assignment

ROOT = Path(minipaged.__file__).parents[1]
PACKAGES = ("minipaged", "kernels")
NEVER = ("__pycache__", "course", "bench", "experiments", "teaching", "*.json", "*.pyc")  # in no student's tree
LONGEST = 1 << 20  # bytes of a file


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
    submission = Submission(folder.resolve().name)
    for file in assignment.files:
        found = _find(folder, file)
        if isinstance(found, str):
            submission.faults[file] = found
            continue
        try:
            if found.stat().st_size > LONGEST:
                raise ValueError(f"it has more than {LONGEST:,} bytes")
            source = found.read_text(encoding="utf-8")
            submission.sources[file] = source
            ast.parse(source)
        except SyntaxError as error:
            line = f"\n    {error.text.rstrip()}" if error.text else ""
            submission.faults[file] = f"line {error.lineno}: {error.msg}{line}"
        except (OSError, ValueError, RecursionError, MemoryError) as error:  # not UTF-8, a NUL, nested without end
            submission.faults[file] = f"it can't be read: {error}"
    return submission


def _find(folder: Path, file: str) -> Path | str:
    """Where the starter puts it, else the only file below whose path ends like this; or why there is none."""
    for place in (folder / "src" / file, folder / file):
        if place.is_file():
            return place
    parts = Path(file).parts
    candidates = [path for path in folder.rglob(parts[-1]) if path.is_file() and not path.is_symlink()]
    for length in range(len(parts), 0, -1):
        alike = [path for path in candidates if path.parts[-length:] == parts[-length:]]
        if len(alike) == 1:
            return alike[0]
        if alike:
            return f"there are several: {', '.join(str(path.relative_to(folder)) for path in alike[:3])}"
    return f"there is no {parts[-1]}"


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
