"""Whether a file can be parsed, tried where nobody is hurt: what is nested without end, or takes for ever, ends this
process and not the grader's.

    python -I -S probe.py < FILE          says as JSON why it can't be used; "" if it can
"""

import ast
import json
import os
import resource
import sys
import warnings

SECONDS, MEMORY = 5, 1 << 29


def fault(source):
    """In words. Whoever parses it later may turn it into text again, too: so that is tried as well."""
    try:
        ast.unparse(ast.parse(source))
    except SyntaxError as error:
        line = f"\n    {error.text.rstrip()}" if error.text else ""
        return f"line {error.lineno}: {error.msg}{line}"
    except (ValueError, RecursionError, MemoryError) as error:  # a NUL, nested without end, numbers without end
        return f"it can't be read: {error or type(error).__name__}"
    return ""


if __name__ == "__main__":
    for what, most in (resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_DATA, MEMORY), (resource.RLIMIT_CORE, 0):
        resource.setrlimit(what, (most, most))
    warnings.simplefilter("ignore")
    print(json.dumps(fault(sys.stdin.buffer.read().decode())))
    sys.stdout.flush()
    os._exit(0)  # without taking the tree apart again
