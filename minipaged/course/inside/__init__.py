"""What runs beside a student's code, in its process. Nothing here is secret, and nothing here decides anything.

`loop.py` is the process's main file, `locks.py` and `calls.py` close its doors, and the drivers do with a student's
code what a case says. They are copied beside the student's tree: from in there, nothing else of the course can be
reached. `probe.py` is the main file of another process, in which a file is parsed for the first time.
"""
