"""A student's tree as a whole, for `generate` and `--mine`: their parts, and the reference where there are none."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from minipaged.course import cut
from minipaged.course.assignment import load
from minipaged.course.starter import StarterError
from minipaged.course.submission import copy_package, read, reference


def made_whole(folder: Path, numbers: Iterable[int]) -> tuple[dict[str, str], list[str], list[str]]:
    """What is theirs of some assignments: whole files; the names that they wrote; those that they have not written.

    StarterError if one of the files can't be used.
    """
    sources: dict[str, str] = {}
    written: list[str] = []
    missing: list[str] = []
    for number in numbers:
        assignment = load(number)
        submission = read(folder, assignment)
        for file, fault in submission.faults.items():
            raise StarterError(f"{folder / 'src' / file}: {fault}")
        unwritten = submission.unwritten(assignment)
        for file, source in submission.sources.items():
            names = assignment.cut(file)
            left = [name for name in names if f"{file}:{name}" in unwritten]
            sources[file] = cut.filled(source, reference(file), left, assignment.helpers(file) if left else ())
            missing += left
            written += [name for name in names if name not in left]
    return sources, written, missing


def generate(folder: Path, numbers: list[int], arguments: list[str]) -> int:
    """Run `minipaged.generate` on what is in a student's folder: its exit status."""
    sources, written, missing = made_whole(folder, [number for number in numbers if number != 6])
    flags = [flag for flags in dict.fromkeys(load(number).generate for number in numbers) for flag in flags]
    all_of_it = f"all of {folder / 'src'}" if 6 in numbers else "nothing yet"
    print(f"yours: {', '.join(written) or all_of_it}", file=sys.stderr)
    if missing:
        print(f"the reference's, until you write them: {', '.join(missing)}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="minipaged-", ignore_cleanup_errors=True) as name:
        tree = Path(name)
        copy_package(tree)
        if 6 in numbers:
            copy_package(tree, root=folder / "src")
        else:
            for assignment in map(load, numbers):
                for file in assignment.generate_also:
                    (tree / file).write_text(assignment.also[file], encoding="utf-8")
        for file, source in sources.items():
            (tree / file).write_text(source, encoding="utf-8")
        command = [sys.executable, "-P", "-m", "minipaged.generate", *flags, *arguments]
        environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        with subprocess.Popen(command, env=environment) as process:
            try:
                return process.wait()
            except KeyboardInterrupt:  # it was told, too, and ends by itself
                process.send_signal(signal.SIGINT)
                return process.wait()
