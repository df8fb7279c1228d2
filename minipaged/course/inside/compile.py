"""Starts a compiler on a stranger's C++, which may name any file of the machine in an `#include`: so files are locked.

    python -I -S compile.py SETTINGS          a file of JSON; see contest/tree.py, which writes it
"""

import json
import os
import sys


def main():
    with open(sys.argv.pop()) as file:
        settings = json.load(file)
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import locks

    if settings["locked"]:
        locks.lock_files(settings["readable"], writable=settings["writable"])
    os.execv(settings["command"][0], settings["command"])


if __name__ == "__main__":
    main()
