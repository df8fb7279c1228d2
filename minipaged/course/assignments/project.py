"""Assignment 6: the whole package is the student's. There are no parts: contest.py says what it is worth."""

from minipaged.course.assignment import Assignment

ASSIGNMENT = Assignment(
    number=6,
    title="Project: faster or fairer",
    parts=(),
    chapters=(10, 11, 12, 13, 14, 15),
    hours="10 to 30",
    imports=("torch",),
    memory=4 << 30,
)
