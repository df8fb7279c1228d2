"""Several processes compute one model: the same tokens as one, whatever happens, and nobody is left behind.

--rank-examples 300 kills, stops and breaks off more often (6 by default).
"""

import contextlib
import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from multiprocessing.connection import Connection

import pytest
import torch
from rank_processes import children, gone_within, is_alive, open_files, until
from served import Served
from test_interrupts import Caller, interrupted
from tiny_model import make_folder

from minipaged import LLM, AsyncLLM, BeamSearchParams, SamplingParams
from minipaged.bench import ranks as bench
from minipaged.bench.ranks import measure, table, through_gloo
from minipaged.execution.engine_args import EngineArgs
from minipaged.execution.ranks import rank_zero, starting
from minipaged.execution.ranks import torchrun as meeting
from minipaged.execution.ranks.errors import RankError
from minipaged.execution.ranks.link import SAYS, Link
from minipaged.execution.ranks.orders import OrderReader, OrderWriter
from minipaged.execution.ranks.steps import StepThread
from minipaged.execution.ranks.team import Member, Team
from minipaged.models import ModelError
from minipaged.requests.sampling_params import PromptTargets
from minipaged.scheduling.plan import ScheduledSequence, StepPlan
from minipaged.server.app import create_app
from minipaged.server.config import ServerConfig
from minipaged.terminal.command import BadInput
from minipaged.terminal.loading import end_as_rank

ROOM = {"block_size": 4, "num_blocks": 60, "max_num_seqs": 16}
PROMPTS = [[5, 6, 7, 8, 9], [1, 2, 3], list(range(30)), [5, 6, 7, 8, 9, 10, 11, 12] * 3]
GREEDY = SamplingParams(temperature=0, max_tokens=16)
WISHES = [
    SamplingParams(temperature=0, max_tokens=16, logprobs=2, prompt_logprobs=2),
    SamplingParams(seed=1, n=3, max_tokens=12, frequency_penalty=0.5),
    SamplingParams(seed=2, max_tokens=9, structured_outputs={"regex": "[a-e]{3,9}(x|12)"}),
    BeamSearchParams(3, max_tokens=8),
]
DRAFT = {"method": "draft", "num_speculative_tokens": 3, "num_branches": 2, "adaptive": False}
NGRAM = {"method": "ngram", "prompt_lookup_min": 1, "num_branches": 2, "num_speculative_tokens": 3}
SMALL = {"num_blocks": 26, "watermark": 0.0, "max_num_batched_tokens": 16}
MECHANISMS = {
    "hash, swap": (2, SMALL | {"prefix_cache": "hash", "preemption": "swap", "debug": True}),
    "radix, recompute, ngram": (3, SMALL | {"prefix_cache": "radix", "preemption": "recompute", "debug": True,
                                            "speculative_config": NGRAM}),
    "draft, int8 cache": (2, {"kv_cache_dtype": "int8", "preemption": "swap", "speculative_config": DRAFT}),
    "int8 weights, fp8 cache": (2, {"quantization": "int8", "kv_cache_dtype": "fp8"}),
    "PyTorch's kernels": (2, {"kernels": "torch", "chunked_prefill": False}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder(tmp_path_factory.mktemp("ranks")))


@pytest.fixture(autouse=True)
def nobody_is_left_behind():
    yield
    if len(children()) > 1:  # that of `pairs`
        gc.collect()
        assert len(children()) <= 1, "ranks are left"


@pytest.fixture(scope="module")
def pairs(folder):
    """Two ranks, each a process: made anew for whoever finds them dead."""
    made = []

    def living():
        if made and not_healthy(made[0]):
            made.pop().close()
        if not made:
            made.append(LLM(folder, tensor_parallel_size=2, **ROOM))
        return made[0]

    yield living
    for llm in made:
        llm.close()


@pytest.fixture
def pair(pairs):
    return pairs()


def pids(llm):
    return [member.pid for member in llm.executor._ranks.team.members]


def told(output):
    outputs = [(o.index, o.text, o.token_ids, o.finish_reason) for o in output.outputs]
    return outputs, [sorted(best) for best in (output.prompt_logprobs or []) if best]


def numbers(output):
    """All logprobs of an answer."""
    places = [o.logprobs for o in output.outputs if o.logprobs] + [output.prompt_logprobs or []]
    return torch.tensor([one.logprob for place in places for best in place if best for one in best.values()])


def ask_all(llm):
    return [output for wish in WISHES for output in llm.generate(PROMPTS, wish)]


# ---- the same as one process ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_same_tokens_as_one_process(folder, name):
    size, options = MECHANISMS[name]
    guesses = options.get("speculative_config")
    if guesses is DRAFT:
        options = options | {"speculative_config": DRAFT | {"model": folder}}
    options = ROOM | options
    with LLM(folder, **options) as alone, LLM(folder, tensor_parallel_size=size, **options) as llm:
        assert len(pids(llm)) == size - 1
        assert llm.block_bytes >= alone.block_bytes
        for one, many in zip(ask_all(alone), ask_all(llm), strict=True):
            assert told(many) == told(one)
            torch.testing.assert_close(numbers(many), numbers(one), rtol=0, atol=0.05 if "cache" in name else 1e-4)
        stats = llm.stats()
        assert "num_blocks" not in options or not guesses or stats.speculation.num_accepted_tokens > 0
        assert stats.memory.used == 0
        if options.get("watermark") == 0.0:
            assert sum(stats.num_preemptions.values()) > 0


def test_ranks_add_up_through_gloo_where_there_is_no_compiler(folder, capfd):
    with through_gloo(), LLM(folder, **ROOM) as alone, LLM(folder, tensor_parallel_size=2, **ROOM) as llm:
        assert [told(o) for o in ask_all(llm)] == [told(o) for o in ask_all(alone)]
    assert "ranks add up through gloo, which is slower: for comparison" in capfd.readouterr().err


def test_the_same_bits_in_any_company(pair):
    """Whoever else is there, however the prompt is cut: sums are in the order of ranks for any number of rows."""
    prompt, params = PROMPTS[2], SamplingParams(temperature=0, max_tokens=12, logprobs=5, prompt_logprobs=3)
    [alone] = pair.generate([prompt], params)
    pair.reset_prefix_cache()
    [among, *_] = pair.generate([prompt, *PROMPTS, *PROMPTS, list(range(40))], params)
    assert torch.equal(numbers(alone), numbers(among)) and told(alone) == told(among)


def test_the_real_model_with_heads_that_do_not_come_out_even_and_a_head_that_guesses():
    options, greedy = {"num_blocks": 64, "max_model_len": 512}, SamplingParams(temperature=0, max_tokens=12)
    prompts = ["The capital of France is", "Name a colour:"]
    with LLM(**options) as alone:
        wanted = [o.outputs[0].token_ids for o in alone.generate(prompts, greedy)]
    with LLM(tensor_parallel_size=2, speculative_config={"method": "head"}, **options) as llm:
        got = llm.generate(prompts, greedy)
        assert llm.stats().speculation.num_accepted_tokens > 0
    assert [o.outputs[0].token_ids for o in got] == wanted


# ---- broken off -----------------------------------------------------------------------------------------------------


def test_broken_off_at_any_line_all_ranks_are_in_step(folder, pair, request):
    """As in test_interrupts, whose caller this is."""
    with LLM(folder, tensor_parallel_size=2, block_size=4, num_blocks=200, prefix_cache="none") as other:
        caller = Caller(pair, other, 7)
        while sum(caller.places.values()) < 25 * request.config.getoption("--rank-examples"):
            caller.act()
        caller.finish()
        assert caller.answered > 10
        pair.executor.check_health()


def test_ctrl_c_in_the_middle_of_steps_breaks_off_none_of_them(folder, pair, request):
    """Real signals, at moments when C++ computes and waits."""
    with LLM(folder, **ROOM) as alone:
        wanted = [told(o) for o in alone.generate(PROMPTS, WISHES[1])]
    rng, broken = random.Random(3), 0
    for _ in range(5 * request.config.getoption("--rank-examples")):
        timer = threading.Timer(rng.uniform(0, 0.05), signal.raise_signal, [signal.SIGINT])
        with contextlib.suppress(KeyboardInterrupt):
            timer.start()
            try:
                pair.generate(PROMPTS, WISHES[1])
            finally:
                timer.join()
            time.sleep(0.01)
            broken -= 1
        broken += 1
        assert [told(o) for o in pair.generate(PROMPTS, WISHES[1])] == wanted
    assert broken > 0


def test_who_is_broken_off_leaves_when_the_step_is_over():
    steps, seen = StepThread(), []

    def work():
        time.sleep(0.3)
        seen.append("done")

    def check():
        if not seen:
            seen.append("asked")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        steps.do(partial(time.sleep, 1e-3), lambda: None)
        steps.do(work, lambda: time.sleep(0.05) or check())
    assert seen == ["asked", "done"]
    steps.end()


def test_what_has_not_begun_when_it_is_broken_off_is_never_done():
    steps, seen, held = StepThread(), [], threading.Event()
    first = threading.Thread(target=steps.do, args=(held.wait, lambda: None))
    first.start()

    def check():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        steps.do(lambda: seen.append("never"), check)
    held.set()
    first.join()
    assert steps.do(lambda: seen.append("later"), lambda: None) is None and seen == ["later"]
    steps.end()


# ---- a rank that dies -----------------------------------------------------------------------------------------------


def ends(llm, seconds):
    """Ask until it ends with an error, in time: the error."""
    end = time.monotonic() + seconds
    with pytest.raises(RankError) as raised:
        while time.monotonic() < end:
            llm.generate(PROMPTS, GREEDY)
    return str(raised.value)


def test_a_rank_that_dies_at_any_moment_ends_all_with_its_name(folder, request):
    before = open_files()
    for example in range(max(1, request.config.getoption("--rank-examples") // 2)):
        rng, size = random.Random(example), 3 - example % 2
        sig = [signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV][(example + example // 3) % 3]
        with through_gloo() if example % 3 == 0 else contextlib.nullcontext():
            llm = LLM(folder, tensor_parallel_size=size, rank_timeout=1, debug=rng.random() < 0.5, **ROOM)
        all_of_them, victim = pids(llm), rng.randrange(1, size)
        threading.Timer(rng.uniform(0, 0.3), os.kill, [all_of_them[victim - 1], sig]).start()
        said = ends(llm, 20)
        assert f"rank {victim} (pid {all_of_them[victim - 1]}) " in said
        assert ("said nothing for" if sig == signal.SIGSTOP else f"was killed by signal {sig}") in said
        assert gone_within(2, all_of_them)
        for use in (partial(llm.generate, [[1]]), partial(llm.add_request, [1]), llm.check_health):
            with pytest.raises(RankError) as again:
                use()
            assert str(again.value) == said
        llm.close()
        assert not children().keys() & {*all_of_them}
        llm = None
    gc.collect()
    assert until(lambda: len(open_files()) <= len(before), 5), set(open_files().items()) - set(before.items())


def test_a_rank_that_dies_while_nobody_asks_is_noticed(pairs):
    pair = pairs()
    os.kill(pids(pair)[0], signal.SIGKILL)
    assert until(lambda: not_healthy(pair), 3)
    with pytest.raises(RankError, match=r"rank 1 \(pid \d+\) was killed by signal 9"):
        pair.generate([[1, 2]])


def not_healthy(llm):
    try:
        llm.check_health()
    except RankError:
        return True
    return False


def test_a_rank_that_raises_says_why(pair):
    """It is ordered to read a block that there is not, as no scheduler does."""
    pair.executor._ranks.team.order(OrderWriter().write(StepPlan(0, swap_out=[(10**6, 0)])))
    assert until(lambda: not_healthy(pair), 5)
    with pytest.raises(RankError, match=r"rank 1 \(pid \d+\) failed: \w+Error: "):
        pair.check_health()


def test_an_error_in_rank_0s_own_step_ends_all(pair, monkeypatch):
    monkeypatch.setattr(pair.executor.runner.masks, "start", lambda sequences: 1 / 0)
    with pytest.raises(RankError, match="rank 0, the engine's own process, failed: ZeroDivisionError"):
        pair.generate([[1, 2, 3]])
    assert gone_within(3, pids(pair))


def test_an_error_before_anybody_was_told_ends_nobody(pair, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pair.executor.runner, "_move_memory", lambda plan: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pair.generate([[1, 2, 3]])
    assert pair.generate([[1, 2, 3]], GREEDY)[0].finished


def test_rank_0_stopped_for_a_while_is_no_ranks_fault(folder):
    """Nobody listened meanwhile, so nobody was silent; a machine that sleeps stops all of them."""
    script = f"""
        import time
        from minipaged import LLM
        with LLM({folder!r}, tensor_parallel_size=2, rank_timeout=1, block_size=4, num_blocks=60) as llm:
            print(*[member.pid for member in llm.executor._ranks.team.members], flush=True)
            input()
            print(len(llm.generate([[1, 2, 3]])), flush=True)
    """
    with running(script) as process:
        other = int(process.stdout.readline())
        os.kill(other, signal.SIGSTOP)
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.1)
        os.kill(other, signal.SIGCONT)
        assert process.communicate("go\n", timeout=20)[0] == "1\n"


# ---- the end --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(script, command=(sys.executable, "-c"), **options):
    """A process of its own session, whose output is read. It is killed in the end."""
    process = subprocess.Popen(
        [*command, textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True, **options,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


ENDS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "without close": "1 / 0",
    "in the middle of a step": "threading.Timer(0.2, os._exit, [3]).start()\nwhile True: llm.generate([[1, 2, 3]] * 4)",
}


@pytest.mark.parametrize("end", ENDS)
def test_rank_0_ends_and_so_do_the_others(folder, end):
    script = f"""
import os, signal, sys, threading
from minipaged import LLM
llm = LLM({folder!r}, tensor_parallel_size=2, block_size=4, num_blocks=60)
llm.generate([[1, 2, 3]])
print(*[member.pid for member in llm.executor._ranks.team.members], flush=True)
input()
{ENDS[end]}
"""
    with running(script) as process:
        others = [int(pid) for pid in process.stdout.readline().split()]
        assert len(others) == 1 and all(map(is_alive, others))
        process.communicate("go\n", timeout=20)
    assert gone_within(3, others)


def test_who_is_forgotten_leaves_nobody(folder):
    before = len(open_files()), threading.active_count()
    llm = LLM(folder, tensor_parallel_size=2, **ROOM)
    others = pids(llm)
    del llm
    gc.collect()
    assert gone_within(3, others)
    assert (len(open_files()), threading.active_count()) == before


def test_closed_in_the_middle_of_a_step(folder):
    llm = LLM(folder, tensor_parallel_size=2, **ROOM)
    others = pids(llm)
    raised = []

    def ask_on():
        try:
            while True:
                llm.generate(PROMPTS, GREEDY)
        except RuntimeError as error:
            raised.append(str(error))

    asking = threading.Thread(target=ask_on)
    asking.start()
    time.sleep(0.1)
    llm.close()
    asking.join(10)
    assert not asking.is_alive() and "closed" in raised[0] and gone_within(3, others)


@pytest.mark.parametrize("seconds", [0.02, 0.5])
def test_broken_off_while_it_loads(folder, seconds):
    timer = threading.Timer(seconds, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(20):
            LLM(folder, tensor_parallel_size=2, **ROOM).close()
    timer.join()
    assert until(lambda: len(children()) <= 1, 5)


def test_closing_is_broken_off_at_many_lines(folder):
    with LLM(folder, tensor_parallel_size=2, **ROOM) as llm:
        other, places = pids(llm)[0], set()
        for after in range(1, 60, 5):
            _, where = interrupted(llm.close, after)
            places.add(where)
        llm.close()
        assert len(places) > 5 and gone_within(1, [other])


def test_a_process_that_was_forked_from_rank_0_has_no_ranks(pair):
    forked = os.fork()
    if not forked:
        try:
            pair.generate([[1, 2]])
        except RankError as error:
            pair.close()
            os._exit(0 if "forked" in str(error) else 2)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 0
    assert pair.generate([[1, 2]], GREEDY)[0].finished


# ---- what is refused, and how it is said ----------------------------------------------------------------------------


def test_broken_off_twice_while_ranks_are_started_none_is_left(monkeypatch):
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    class Team:
        is_ours = True

        def close(self):
            ended.set()

    def start(*args):
        begun.set()
        go_on.wait(10)
        return Team(), None

    def wait(steps, job, check):
        begun.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(rank_zero, "start_here", start)
    monkeypatch.setattr(rank_zero.RankZero, "_share_threads", lambda zero, size: 1)
    monkeypatch.setattr(StepThread, "_wait", wait)
    with pytest.raises(KeyboardInterrupt):
        rank_zero.RankZero(EngineArgs("x", tensor_parallel_size=2), "cpu")
    go_on.set()
    assert ended.wait(5)


def test_a_rank_that_says_nonsense_ends_the_team():
    link, theirs = Link.pair()
    team = Team([Member(1, link, os.getpid())], silence=10)
    try:
        Link(Connection(theirs.detach())).send(SAYS, b"{")
        assert until(lambda: team.failure is not None, 5) and "can't understand the others" in team.failure
    finally:
        team.close()


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2"])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="tensor_parallel_size=.*: must be an integer of at least 1"):
        EngineArgs(tensor_parallel_size=size)


@pytest.mark.parametrize("seconds", [0, -1, "x", float("nan"), True])
def test_timeouts_that_are_none(seconds):
    with pytest.raises(ValueError, match="rank_timeout=.*: must be a number of seconds, at least 1"):
        EngineArgs(rank_timeout=seconds)


def test_what_is_wrong_with_a_model_is_said_as_ever(folder, tmp_path):
    with pytest.raises(ModelError, match="tensor_parallel_size=5"):
        LLM(folder, tensor_parallel_size=5)
    with pytest.raises(ModelError):
        LLM(str(tmp_path), tensor_parallel_size=2)
    with pytest.raises(ValueError, match="only .* MiB are free"):
        LLM(folder, tensor_parallel_size=2, num_blocks=10**9)


def test_what_only_a_worker_finds_wrong_reaches_the_caller_as_such(folder, monkeypatch):
    told_args = dict(starting.__dict__)["start_here"]

    def start(size, silence, device, threads, args):
        return told_args(size, silence, device, threads, args | {"model": "/no/such/model"})

    monkeypatch.setattr("minipaged.execution.ranks.rank_zero.start_here", start)
    with pytest.raises(ModelError, match="rank 1: /no/such/model does not exist"):
        LLM(folder, tensor_parallel_size=2, **ROOM)


def test_the_size_of_the_pool_is_that_of_all_ranks(folder):
    """3 ranks and 2 key/value heads: one of them is kept twice."""
    with LLM(folder, tensor_parallel_size=3, kv_cache_memory=40 * 1536, block_size=4) as llm:
        assert llm.block_bytes == 1536 and llm.memory.num_blocks == 40


# ---- through the doors ----------------------------------------------------------------------------------------------


def ask(url, body=None):
    """Status and text."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_server_says_that_its_ranks_are_dead(folder):
    llm = AsyncLLM(folder, tensor_parallel_size=2, **ROOM)
    served = Served(create_app(llm, ServerConfig(model_names=("tiny",))))
    try:
        asked = {"model": "tiny", "prompt": "Hello", "max_tokens": 5}
        assert ask(served.url + "v1/completions", asked)[0] == 200
        os.kill(pids(llm.engine)[0], signal.SIGKILL)
        assert until(lambda: ask(served.url + "health")[0] == 503, 5)
        status, said = ask(served.url + "v1/completions", asked)
        assert status >= 500 and "was killed by signal 9" in str(said)
    finally:
        served.close()


def test_the_command_ends_with_a_sentence(folder):
    command = [sys.executable, "-m", "minipaged.generate", "--model", folder, "--tensor-parallel-size"]
    with running("5", command=command) as process:
        said = process.communicate("x", timeout=60)[1]
    assert process.returncode == 2 and "tensor_parallel_size=5" in said and "Traceback" not in said


# ---- torchrun -------------------------------------------------------------------------------------------------------

ASK = """
import os, signal, sys, threading
from minipaged import LLM, SamplingParams
folder, what = sys.argv[1:3]
with LLM(folder, tensor_parallel_size=2, block_size=4, num_blocks=60, rank_timeout=2) as llm:
    [member] = llm.executor._ranks.team.members
    if what == "kill":
        threading.Timer(0.2, os.kill, [member.pid, signal.SIGKILL]).start()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, for our own words come first
    try:
        while True:
            outputs = llm.generate([[5, 6, 7], [1, 2, 3]], SamplingParams(temperature=0, max_tokens=8))
            if what != "kill":
                break
        print([o.outputs[0].token_ids for o in outputs], flush=True)
    except RuntimeError as error:
        print(type(error).__name__, error, flush=True)
        sys.exit(1)
print(os.environ["RANK"], "goes on")
"""


def torchrun(*options):
    return [sys.executable, "-m", "torch.distributed.run", *options]


def free_port():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@pytest.fixture
def script(tmp_path):
    (tmp_path / "ask.py").write_text(ASK)
    return str(tmp_path / "ask.py")


@pytest.fixture
def wanted(folder):
    with LLM(folder, **ROOM) as alone:
        outputs = alone.generate([[5, 6, 7], [1, 2, 3]], SamplingParams(temperature=0, max_tokens=8))
    return [o.outputs[0].token_ids for o in outputs]


def started(command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    return running(command[-1], command=command[:-1], env=environment)


def test_torchrun_on_one_machine(folder, script, wanted):
    with started(torchrun("--standalone", "--nproc-per-node", "2", script, folder, "ask")) as process:
        said, complaints = process.communicate(timeout=60)
    assert process.returncode == 0, complaints
    assert said == f"{wanted}\n0 goes on\n"


def test_torchrun_on_two_machines_whose_command_reads_its_prompt(folder):
    """Rank 0 alone reads it."""
    with LLM(folder, **ROOM) as alone:
        text = alone.generate(["Hello"], SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].text
    where = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    what = ["-m", "minipaged.generate", "--model", folder, "--raw", "--max-tokens", "8", "--tensor-parallel-size", "2"]
    first = torchrun(*where, "--node-rank", "0", *what)
    second = torchrun(*where, "--node-rank", "1", *what)
    with started(first) as one, started(second) as two:
        two.stdin.close()
        two.stdin = None
        assert one.communicate("Hello", timeout=60)[0] == text + "\n"
        assert two.communicate(timeout=20)[0] == "" and (one.returncode, two.returncode) == (0, 0)


def test_torchrun_with_a_rank_that_dies(folder, script):
    with started(torchrun("--standalone", "--nproc-per-node", "2", script, folder, "kill")) as process:
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and said.startswith("RankError rank 1 (pid ") and "went away" in said


def test_strangers_keep_no_ranks_from_meeting(monkeypatch):
    """One says nothing, one doesn't know the key."""
    monkeypatch.setattr(meeting, "SECONDS_TO_SAY_WHO", 1)
    monkeypatch.setattr(meeting, "SECONDS_TO_MEET", 5)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    store, met = torch.distributed.HashStore(), []
    waiting = threading.Thread(target=lambda: met.extend(meeting._wait_for_all(store, 2)), daemon=True)
    waiting.start()
    found = json.loads(store.get("link"))
    with contextlib.ExitStack() as stack:
        said = [b"\0\0\0\3abc", b""]
        for words in said:
            stack.enter_context(socket.create_connection(("127.0.0.1", found["port"]))).sendall(words)
        link = meeting._linked(socket.create_connection(("127.0.0.1", found["port"])))
        stack.callback(link.close)
        threading.Thread(target=meeting._introduce, args=(link, found["key"], 1), daemon=True).start()
        waiting.join(4)
        assert [member.rank for member in met] == [1]
        met[0].link.close()


def test_torchrun_has_started_another_number(folder, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="tensor_parallel_size=2: torchrun has started 4 processes"):
        LLM(folder, tensor_parallel_size=2)
    LLM(folder, **ROOM).close()  # each an engine of its own
    with pytest.raises(BadInput, match="torchrun has started 4 processes: give --tensor-parallel-size 4"):
        end_as_rank(folder, {"tensor_parallel_size": 1})  # but a command line would answer four times


def test_a_bench_of_one_rank_is_none(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ranks", "--ranks", "1"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert "--ranks: at least 2" in capsys.readouterr().err


# ---- what is told ---------------------------------------------------------------------------------------------------


def sequence(seq_id, tokens, start, table, size=4, **more):
    slots = [table[p // size] * size + p % size for p in range(start, start + len(tokens))]
    return ScheduledSequence(seq_id, "", tokens, start, slots, table, **more)


def test_an_order_says_all_that_a_rank_needs():
    table = [3, 1, 7]
    plan = StepPlan(
        5, [(1, 2), (3, 4)], [9, 8, 7], [(5, 6)], [(7, 8)],
        [sequence(4, [1, 2, 3], 6, table, num_candidates=1, num_drafts=2),
         sequence(-2, list(range(9)), 0, [5, 6, 0], targets=PromptTargets(1, [0] * 8, 0))],
    )  # fmt: skip
    writer, reader = OrderWriter(), OrderReader(4)
    assert {**vars(reader.read(writer.write(plan))), "step": 5} == vars(plan)


def test_a_page_table_is_told_once():
    table, writer, reader = list(range(100)), OrderWriter(), OrderReader(4)
    sizes, tables = [], []
    for step in range(4):
        if step == 2:
            table = [*table, 500]
        order = writer.write(StepPlan(step, sequences=[sequence(1, [7], 396 + step, table)]))
        sizes.append(len(order))
        tables.append(reader.read(order).sequences[0].block_table)
    assert sizes[1] == sizes[3] == 4 * 13 and sizes[0] > 400 and sizes[2] > 400
    assert tables[0] is tables[1] and tables[2] is tables[3] == table


def test_who_was_away_for_a_step_is_told_its_table_again():
    writer, reader = OrderWriter(), OrderReader(4)
    for sequences in ([sequence(1, [7], 0, [5])], [sequence(2, [7], 0, [6])], [sequence(1, [8], 1, [5])]):
        plan = StepPlan(0, sequences=sequences)
        assert reader.read(writer.write(plan)) == plan


def test_what_the_bench_measures(folder):
    rows = measure(folder, 2, [1, 3], 2, 1)
    assert [(row["batch"], row["way"]) for row in rows] == [
        (batch, way) for batch in (1, 3) for way in ("one process", "shared memory", "gloo")
    ]
    for row in rows:
        assert row["step_ms"] > 0 and (row["way"] != "one process" or row["times"] == 1)
    layers, hidden, vocabulary = 2, 32, 64  # rank 0's share
    for row in rows[1:3]:
        assert row["sums"] == 2 * layers + 1 + 1  # the embedding's; and the logits, gathered
        assert row["brought"] == 4 * ((2 * layers + 1) * hidden + vocabulary)
        assert row["order"] == 4 * (4 + 8 + 1) and row["difference"] < 1e-4
    assert len(table(rows)) == 7
