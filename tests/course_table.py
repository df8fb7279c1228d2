"""What the grader says of all solutions, right and wrong: a table for instructors.

    python -m tests.course_table
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from course_solutions import right, wrong  # noqa: E402

from minipaged.course.assignment import TITLES, load  # noqa: E402
from minipaged.course.checking import WORKS, check  # noqa: E402


def main() -> int:
    faults = 0
    for number in TITLES:
        assignment = load(number)
        if not assignment.parts:
            continue
        solutions = import_module(f"solutions.course_{number}")
        with ThreadPoolExecutor(2) as pool:
            submissions = [right(assignment, name, texts) for name, texts in solutions.RIGHT.items()]
            results = list(pool.map(lambda one: check(one, assignment, seed=1, locked=True), submissions))  # noqa: B023
            refused = [result.name for result in results if result.points < assignment.points]
            print(f"Assignment {number}: {len(results) - len(refused)} of {len(results)} right solutions accepted")
            tried = list(pool.map(lambda one: _found(one, assignment), solutions.WRONG))  # noqa: B023
        for one, parts in zip(solutions.WRONG, tried, strict=True):
            print(f"  {one.what}: {', '.join(parts) or 'ACCEPTED'}{' *' * bool(one.source)}")
        faults += len(refused) + sum(one.part not in parts for one, parts in zip(solutions.WRONG, tried, strict=True))
    print("*: real engines had it")
    return 1 if faults else 0


def _found(one, assignment) -> list[str]:
    result = check(wrong(assignment, one), assignment, seed=1, locked=True)
    return [part.part.name for part in result.parts if part.state != WORKS]


if __name__ == "__main__":
    sys.exit(main())
