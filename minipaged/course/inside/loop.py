"""The main file of the process in which a student's code runs: questions in, answers out, one line of JSON each.

    python -I -S loop.py SETTINGS          a file of JSON; see process.py, which writes it

TREE has the student's package, and beside it driver.py, which does what a case says. Whatever the student's code
prints goes to standard error, and no answer is believed here: who asked compares. A driver that `streams` gets both
ends itself, and talks while it works.
"""

import contextlib
import importlib
import json
import os
import sys
import traceback


def raised(error, tree, files):
    """An exception: the last line of the student's files that it passed, and where it came from, if that is beyond."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(tree)]
    frames = [frame for frame in frames if not frame.filename.endswith("/driver.py")]
    theirs = [frame for frame in frames if frame.filename[len(tree) + 1 :] in files]
    shown = theirs[-1:] if theirs and theirs[-1] is frames[-1] else theirs[-1:] + frames[-1:]
    lines = [f"{one.filename[len(tree) + 1 :]}, line {one.lineno}, in {one.name}: {one.line}" for one in shown]
    return {"kind": type(error).__name__, "said": str(error)[:500], "where": "\n".join(lines)}


def say(said, number, answer):
    said.write(json.dumps({"id": number, **answer}).encode() + b"\n")
    said.flush()


def main():
    with open(sys.argv.pop()) as file:
        settings = json.load(file)
    asked, said = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # whoever prints talks to people
    sys.stdout = os.fdopen(1, "w", 1, encoding="utf-8", errors="replace", closefd=False)  # line by line
    sys.dont_write_bytecode = True
    sys.path[:] = [os.path.dirname(os.path.abspath(__file__)), *sys.path, *settings["packages"]]
    for name in settings["imports"]:
        with contextlib.suppress(ModuleNotFoundError):  # not every machine has all of them
            importlib.import_module(name)
    import locks
    from observe import doctests, plain

    locks.end_with_parent()
    if settings["seconds"]:
        locks.limit(settings["memory"], settings["seconds"])
    if settings["locked"]:
        locks.lock(settings["readable"], settings["listable"])
    tree = settings["tree"]
    sys.path.insert(0, tree)
    if settings["streams"]:
        importlib.import_module("driver").stream(asked, said)
        return
    driver = None
    say(said, 0, {"answer": "ready"})  # until here nothing of a student's has run
    for line in asked:
        question = json.loads(line)
        try:
            if driver is None:
                driver = importlib.import_module("driver")
            work = doctests if question["driver"] == "doctests" else getattr(driver, question["driver"])
            answer = {"answer": plain(work(question["case"]))}
        except MemoryError as error:
            answer = {"raised": {"kind": "MemoryError", "said": str(error) or "no memory is left", "where": ""}}
        except Exception as error:  # the student's: whoever asked tells them
            answer = {"raised": raised(error, tree, settings["files"])}
        say(said, question["id"], answer)


if __name__ == "__main__":
    main()
