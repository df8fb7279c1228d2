"""Whether a file can be parsed, tried where nobody is hurt: what is nested without end, or takes for ever, ends this
process and not the grader's.

    python -I -S probe.py < FILE          says as JSON why it can't be used; "" if it can
"""

import ast
import json
import os
import sys
import warnings

SECONDS, MEMORY = 1, 1 << 29
DEEPEST = 400  # calls: less than Python's own limit, so that there is room for whoever parses it deep in other calls


def fault(source):
    """In words. Whoever parses it later may turn it into text again, too: so that is tried as well."""
    try:
        ast.unparse(ast.parse(source))
    except SyntaxError as error:
        line = f"\n    {error.text.rstrip()}" if error.text else ""
        return f"line {error.lineno or 1}: {error.msg}{line}"
    except RecursionError:
        return "it can't be read: it is nested too deeply"
    except (ValueError, MemoryError) as error:  # a NUL, a number without end
        return f"it can't be read: {error or 'it needs too much memory'}"
    return ""


def limit():
    import resource

    for what, most in (resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_DATA, MEMORY), (resource.RLIMIT_CORE, 0):
        resource.setrlimit(what, (most, most))


if __name__ == "__main__":
    if os.name == "posix":
        limit()
    sys.setrecursionlimit(DEEPEST)
    warnings.simplefilter("ignore")
    print(json.dumps(fault(sys.stdin.buffer.read().decode())), flush=True)
    os._exit(0)  # without taking the tree apart again
