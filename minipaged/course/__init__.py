"""The course: an engine in six assignments, and a grader for strangers' code.

    assignment.py     what an assignment is: parts, cases, and what was expected
    assignments/      the six of them: what is cut out, how it is tried, what it must answer, and the handouts
    cut.py            the package with parts cut out, and parts put in again: nothing is copied by hand
    starter.py        the folder that a student starts with
    submission.py     what a student hands in, and the tree of files in which it is tried
    inside/           what runs beside a student's code, in its process: a loop, drivers, and locks on all doors
    process.py        that process, seen from outside: questions, answers, limits
    checking.py       which parts work, and the smallest case that shows what doesn't
    report.py         the same in words, for a student
    grading.py        many submissions side by side
    formats.py        points as CSV, JSON, Gradescope's results.json, JUnit XML
    autograder.py     a zip for Gradescope, a workflow for GitHub Classroom
    contest/          assignment 6: a student's engine beside the reference, by turns
    likeness.py       how much of a submission is the reference, word for word
    words.py          strangers' text, made fit to be shown
    mutants.py        one-line faults of the reference, made by machine: what the tests of the course find
    running.py        a student's tree as a whole, for `generate` and `--mine`
    __main__.py       the command; commands.py does what the instructor's ones say
    INSTRUCTORS.md    how to grade a class, and how good the grader is
    THREATS.md        what a submission can do, and what it can't

A student's code runs in a process of its own, and that process knows neither the tests nor what they expect: it is
asked, it answers with numbers and lists, and whoever asked compares. So there is nothing to be patched or printed.
"""
