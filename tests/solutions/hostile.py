"""Submissions that don't want to be tried. Each is a text that is put before every file of an assignment, in which all
that is a student's to write answers with `_answer()`, and which ends with `_after()`. ROOT, PORT and VICTIM are where
the package lies, where a server listens, and a file that belongs to the same user.
"""

import re

from course_solutions import starters

from minipaged.course.assignment import Assignment
from minipaged.course.submission import Submission

BEGIN = """
import sys, os, time, signal, ctypes, threading, types, json, gc
def _answer(): return None
def _after(): pass
def _call(*numbers): return ctypes.CDLL(None).syscall(*[ctypes.c_long(x) if isinstance(x, int) else x for x in numbers])
def _pipe(): return next(x for x in gc.get_objects() if type(x).__name__ == "BufferedWriter" and x.fileno() > 2)
def _say(line): os.write(_pipe().fileno(), line.encode() + b"\\n")
def _try(*works):
    for work in works:
        try: work()
        except Exception as error: print(type(error).__name__)
"""

KINDS = {
    # ---- somebody else answers
    "answers in the driver's place": "for n in range(1, 400): _say(json.dumps({'id': n, 'answer': []}))",
    "answers for ever and reads nothing": "n = 0\nwhile True: n += 1; _say(json.dumps({'id': n, 'answer': None}))",
    "answers, and never reads what it is asked": "_say('{\"id\": 1, \"answer\": 0}')\ntime.sleep(1e6)",
    "answers with what it was asked": """
import driver
class Echo(dict):
    def __missing__(self, name): return lambda case: case
sys.modules['__main__'].getattr = lambda module, name, *rest: (lambda case: next(iter(case.values())))""",
    "makes JSON say yes": "json.dumps = lambda *a, **k: '{\"id\": 1, \"answer\": true, \"points\": 100}'",
    "patches what looks at the answers": """
import observe
observe.plain = observe.outcome = sys.modules['__main__'].plain = lambda *a, **k: {'raised': None}""",
    "errors of no form": "for n in range(1, 9): _say(json.dumps({'id': n, 'raised': [n]}))",
    "an error that isn't text": """
for n in range(1, 9): _say(json.dumps({'id': n, 'raised': dict(kind=n, said={}, where=[])}))""",
    "canned answers": "def _answer(): return [0, 1, 2, 3]",
    "always a ValueError": "def _answer(): raise ValueError('no')",
    "objects that are equal to everything": """
class Yes(int):
    __eq__ = __le__ = __ge__ = __bool__ = __contains__ = lambda *a: True
    __hash__ = int.__hash__
def _answer(): return Yes()""",
    "no number": "def _answer(): return float('nan')",
    # ---- it never was a test
    "prints fake results and exits 0": "print('100 of 100 points, all tests passed'); os._exit(0)",
    "raises SystemExit": "def _answer(): sys.exit(0)",
    "patches pytest and its friends": """
fake = types.ModuleType('pytest'); fake.main = lambda *a: 0
sys.modules.update(pytest=fake, unittest=fake, doctest=fake)
import builtins; builtins.AssertionError = type('Fine', (Exception,), {})""",
    # ---- where the answers are
    "reads the reference": """
def _take():
    exec(open(os.path.join(ROOT, *__name__.split('.')) + '.py').read(), globals())
def _after(): _try(_take)""",
    "reads the reference's bytecode": """
import marshal
def _take():
    name = __name__.rpartition('.')
    folder = os.path.join(ROOT, *name[0].split('.'), '__pycache__')
    tag = sys.implementation.cache_tag
    exec(marshal.loads(open(f'{folder}/{name[2]}.{tag}.pyc', 'rb').read()[16:]), globals())
def _after(): _try(_take)""",
    "imports the installed package": """
def _take():
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith('minipaged')}
    path, sys.path[:] = sys.path[:], [ROOT, *(p for p in sys.path if 'tree' not in p)]
    try: globals().update(vars(__import__(__name__, fromlist=['x'])))
    finally: sys.path[:] = path; sys.modules.update(ours)
def _after(): _try(_take)""",
    "reads the grader's process": """
import glob
for name in ('environ', 'cmdline', 'mem', 'maps', 'fd/0', 'cwd/README.md', 'root/etc/passwd'):
    for who in (os.getppid(), 1, 'self/../%d' % os.getppid()):
        _try(lambda: print('LEAK', open(f'/proc/{who}/{name}', 'rb').read(9)))
_try(lambda: print('LEAK', open('/proc/self/root' + VICTIM).read()), lambda: print('LEAK', open(VICTIM).read()))""",
    "reads other submissions": """
import glob
for place in ('/tmp', '/var/tmp', '/home', '/root', os.path.dirname(VICTIM), '..', '../..'):
    _try(lambda: print('LEAK', os.listdir(place)))""",
    "asks another Python": """
import subprocess
_try(lambda: print('LEAK', subprocess.check_output([sys.executable, '-c', 'print(1)'])),
     lambda: os.system('touch ' + VICTIM))""",
    "asks the network": """
import socket, urllib.request
_try(lambda: urllib.request.urlopen(f'http://127.0.0.1:{PORT}/').read(),
     lambda: socket.create_connection(('127.0.0.1', PORT)).send(b'hello'),
     lambda: socket.socket(socket.AF_UNIX).bind('left'), lambda: socket.socketpair())""",
    # ---- breaking the machine, or the grader
    "forks": "while True: os.fork()",
    "leaves a daemon": "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1e6)",
    "threads without end": """
threading.stack_size(65536)
def _more():
    while True: threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()
_try(_more)""",
    "hangs when it is imported": "while True: pass",
    "hangs when it is called, and hears no signal": """
for n in range(1, 65): _try(lambda: signal.signal(n, signal.SIG_IGN))
def _answer():
    while True:
        try: time.sleep(1e6)
        except BaseException: pass""",
    "stops itself": "signal.raise_signal(signal.SIGSTOP)",
    "takes all memory, and tries again": """
held = []
while True:
    try: held.append(bytearray(1 << 28))
    except MemoryError: held.append(bytearray(1 << 20)) if len(held) < 9 else time.sleep(1)""",
    "takes memory that is shared": """
import mmap
def _take():
    m = mmap.mmap(-1, 64 << 30)
    for at in range(0, 64 << 30, 4096): m[at] = 1
_try(_take)""",
    "fills the disk": """
for place in ('.', '..', '/tmp', '/var/tmp', '/dev/shm', os.path.dirname(VICTIM)):
    def _fill():
        with open(place + '/LEFT', 'wb') as file:
            while True: file.write(bytes(1 << 20))
    _try(_fill, lambda: os.mkdir(place + '/LEFT'), lambda: os.symlink('/', place + '/LEFT'))""",
    "an answer without end": "while True: os.write(_pipe().fileno(), b'[' * 65536)",
    "an answer nested without end": """
_say('{"id": 1, "answer": ' + '[' * 1000000 + ']' * 1000000 + '}')
time.sleep(1e6)""",
    "an answer with a number without end": """
_say('{"id": 1, "answer": ' + '9' * 1000000 + '}')
time.sleep(1e6)""",
    "prints without end": "while True: os.write(2, b'x' * 65536)",
    "closes all pipes and goes on": "os.closerange(0, 256)\nwhile True: time.sleep(1)",
    "kills the grader": """
for who in (os.getppid(), -1, 0):
    _try(lambda: os.kill(who, signal.SIGKILL), lambda: os.killpg(os.getpgid(os.getppid()), 9))
print(_call(234, os.getppid(), os.getppid(), 9), _call(129, os.getppid(), 9, bytes(128)))
print(_call(101, 16, os.getppid(), 0, 0))
import fcntl
r, w = os.pipe()
_try(lambda: fcntl.fcntl(r, fcntl.F_SETOWN, os.getppid()), lambda: fcntl.fcntl(r, 10, 9))""",
    "spoils files of the same user": """
_try(lambda: os.chmod(VICTIM, 0), lambda: os.utime(VICTIM, (0, 0)), lambda: os.truncate(VICTIM, 0),
     lambda: os.unlink(VICTIM), lambda: os.rename(VICTIM, VICTIM + 'x'), lambda: os.chown(VICTIM, 1, 1),
     lambda: os.setxattr(VICTIM, 'user.x', b''), lambda: open(VICTIM, 'w'), lambda: os.link(VICTIM, 'LEFT'))
print(_call(90, VICTIM.encode(), 0), _call(76, VICTIM.encode(), 0))""",
    "leaves queues, semaphores and keys": """
print(_call(68, 0x686f7374, 0o1666), _call(64, 0x686f7374, 1, 0o1666), _call(29, 0x686f7374, 4096, 0o1666))
print(_call(240, b'hostile', 0o102, 0o666, 0), _call(248, b'user', b'hostile', b'y', 1, -4))""",
    "runs what is in memory": """
def _run():
    handle = os.memfd_create('x')
    os.write(handle, open('/bin/true', 'rb').read())
    os.execv(f'/proc/self/fd/{handle}', ['x'])
_try(_run, lambda: os.execv('/bin/true', ['true']), lambda: os.posix_spawn('/bin/true', ['true'], {}))""",
    "widens its limits": """
import resource
for what in range(16):
    _try(lambda: resource.setrlimit(what, (-1, -1)), lambda: resource.prlimit(os.getppid(), what, (0, 0)))
print(_call(160, 2, bytes([255] * 16)))
_try(lambda: os.setpriority(0, 0, -20), lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(9)))""",
    "makes calls of the 32-bit kind": """
import mmap
page = mmap.mmap(-1, 4096, flags=0x22, prot=7)
page.write(b'\\xb8\\x02\\0\\0\\0\\xcd\\x80\\xc3')  # fork
print('LEAK', ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())""",
    "crashes": "def _answer(): return ctypes.string_at(0)",
    "recurses without end": "sys.setrecursionlimit(10 ** 9)\ndef _answer(): return _answer()",
    "never ends": """
import atexit
def _loop():
    while True: pass
atexit.register(_loop)
class Immortal:
    def __del__(self): _loop()
keep = Immortal()
def _answer(): sys.exit(0)""",
    "raises what can't be shown": """
class Bad(Exception):
    def __str__(self): return '\\ud800\\x1b[2J\\0' * 99
def _answer(): raise Bad""",
    "raises what takes for ever to show": """
class Bad(Exception):
    def __str__(self):
        while True: pass
def _answer(): raise Bad""",
}


def submission(assignment: Assignment, text: str, **names: object) -> Submission:
    """names: what the text may use, as constants."""
    constants = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    stub = re.compile(r'raise NotImplementedError\("assignment .* is yours to write"\)')
    sources = {}
    for file, source in starters(assignment).items():
        future = "from __future__ import annotations\n" if "from __future__" in source else ""
        body = stub.sub("return _answer()", source.replace(future, "") if future else source)
        sources[file] = f"{future}{BEGIN}{constants}{text}\n{body}\n_after()\n"
    return Submission("hostile", sources)
