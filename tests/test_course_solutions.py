"""The grader is graded: no right solution is refused, no wrong one accepted, and no part pays for another."""

from importlib import import_module, resources

import pytest
from course_solutions import right, wrong
from course_table import counts, mistakes

from minipaged.course.assignment import TITLES, load
from minipaged.course.checking import FAILS, WORKS, check

NUMBERS = [number for number in TITLES if number < 6]
SOLUTIONS = {number: import_module(f"solutions.course_{number}") for number in NUMBERS}
SEEDS = (0, 1)  # the students' and one that they don't have
RIGHT = [(number, name) for number in NUMBERS for name in SOLUTIONS[number].RIGHT]
WRONG = [(number, one) for number in NUMBERS for one in SOLUTIONS[number].WRONG]


@pytest.mark.parametrize(("number", "name"), RIGHT)
def test_a_right_solution_gets_all_points(number, name):
    assignment = load(number)
    submission = right(assignment, name, SOLUTIONS[number].RIGHT[name])
    assert not submission.unwritten(assignment)
    for seed in SEEDS:
        result = check(submission, assignment, seed, locked=True)
        assert all(part.state == WORKS for part in result.parts), result
        assert result.points == assignment.points


@pytest.mark.parametrize(("number", "one"), WRONG, ids=lambda value: getattr(value, "what", value))
def test_a_wrong_solution_loses_its_part(number, one):
    assignment = load(number)
    result = check(wrong(assignment, one), assignment, seed=1, locked=True)
    states = {part.part.name: part.state for part in result.parts}
    assert states.pop(one.part) == FAILS
    assert all(state == WORKS for name, state in states.items() if name not in one.also), states


@pytest.mark.parametrize("number", NUMBERS)
def test_there_are_enough_of_both(number):
    assert len(SOLUTIONS[number].RIGHT) >= 3
    assert len(SOLUTIONS[number].WRONG) >= 15


def test_the_page_for_instructors_lists_them_all():
    """Written by `python -m tests.course_table --page`."""
    page = (resources.files("minipaged.course") / "INSTRUCTORS.md").read_text(encoding="utf-8")
    for line in [*counts(), *mistakes()]:
        assert line.strip() in page
