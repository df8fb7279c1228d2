"""What the grader says of all solutions, right and wrong: a table for instructors.

    python -m tests.course_table            try all of them (ten minutes on two cores)
    python -m tests.course_table --page     the lists of INSTRUCTORS.md: what there is, and what fails where
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from course_solutions import right, wrong  # noqa: E402

from minipaged.course.assignment import TITLES, load  # noqa: E402
from minipaged.course.checking import WORKS, check  # noqa: E402
from minipaged.course.mutants import mutants  # noqa: E402

NUMBERS = [number for number in TITLES if load(number).parts]


def solutions(number: int):
    return import_module(f"solutions.course_{number}")


def counts() -> Iterator[str]:
    """Rows of a table: how many solutions and mutants there are."""
    for number in NUMBERS:
        ours, assignment = solutions(number), load(number)
        every, harmless = len(mutants(assignment)), len(assignment.harmless)
        sourced = sum(bool(one.source) for one in ours.WRONG)
        yield f"| {number} | {len(ours.RIGHT)} | {len(ours.WRONG)} | {sourced} | {every - harmless} | {harmless} |"


def mistakes() -> Iterator[str]:
    """A list for each assignment: a mistake, the part that fails, where it happened."""
    for number in NUMBERS:
        yield f"**Assignment {number}**\n"
        for one in solutions(number).WRONG:
            yield f"- {one.what}: *{one.part}*" + (f" ([source]({one.source}))" if one.source else "")
        yield ""


def main(arguments: list[str]) -> int:
    if arguments == ["--page"]:
        print("\n".join([*counts(), "", *mistakes()]))
        return 0
    faults = 0
    for number in NUMBERS:
        assignment, ours = load(number), solutions(number)
        with ThreadPoolExecutor(2) as pool:
            submissions = [right(assignment, name, texts) for name, texts in ours.RIGHT.items()]
            accepted = [not parts for parts in pool.map(lambda one: _failing(one, assignment), submissions)]  # noqa: B023
            submissions = [wrong(assignment, one) for one in ours.WRONG]
            failing = list(pool.map(lambda one: _failing(one, assignment), submissions))  # noqa: B023
        print(f"Assignment {number}: {sum(accepted)} of {len(accepted)} right solutions accepted")
        for one, parts in zip(ours.WRONG, failing, strict=True):
            print(f"  {one.what}: {', '.join(parts) or 'ACCEPTED'}{' *' * bool(one.source)}", flush=True)
        faults += accepted.count(False)
        faults += sum(one.part not in parts for one, parts in zip(ours.WRONG, failing, strict=True))
    print("*: real engines had it")
    return 1 if faults else 0


def _failing(submission, assignment) -> list[str]:
    result = check(submission, assignment, seed=1, locked=True)
    return [part.part.name for part in result.parts if part.state != WORKS]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
