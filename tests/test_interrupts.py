"""Broken off anywhere, the engine is whole: each request goes on with the right tokens and text, or is gone.

An exception is raised at a random line of minipaged, as Ctrl-C or a signal's handler may do it, while requests are
added, computed, streamed, aborted and answered. Whatever the caller still has a name for must come out as it would have
without. MINIPAGED_INTERRUPTS=20000 looks longer.
"""

import os
import random
import sys
from collections import Counter

import pytest
from tiny_model import make_folder

from minipaged import LLM, BeamSearchParams, SamplingParams
from minipaged.memory import KVCacheManager

TRIALS = int(os.environ.get("MINIPAGED_INTERRUPTS", "2400"))
PACKAGE = os.sep + "minipaged" + os.sep


class Interrupt(BaseException):
    """Somebody pressed Ctrl-C."""


def interrupted(call, after: int):
    """Call, and raise Interrupt at the `after`-th line of minipaged. Returns (result, None) or (None, where it was)."""
    count, where = 0, None

    def trace(frame, event, argument):
        nonlocal count, where
        if PACKAGE not in frame.f_code.co_filename:
            return None
        if event == "line":
            count += 1
            if count == after:
                where = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
                raise Interrupt
        return trace

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        return call(), None
    except Interrupt:
        return None, where
    finally:
        sys.settrace(old)


def wishes(rng: random.Random):
    """A prompt and what is asked of it."""
    prompt = [rng.choice([5, 6, 7])] * rng.randint(1, 9) + [rng.randint(4, 60) for _ in range(rng.randint(1, 20))]
    length = rng.randint(1, 12)
    match rng.choice(["greedy", "samples", "beams", "stop", "logprobs", "form"]):
        case "greedy":
            return prompt, SamplingParams(temperature=0, max_tokens=length)
        case "samples":
            return prompt, SamplingParams(n=3, seed=rng.randrange(99), max_tokens=length, frequency_penalty=0.5)
        case "beams":
            return prompt, BeamSearchParams(3, max_tokens=length, length_penalty=0.0)
        case "stop":
            return prompt, SamplingParams(seed=rng.randrange(99), max_tokens=20, stop=["e", "a", "12"], min_tokens=1)
        case "form":
            form = {"regex": "[a-e]{3,9}(x|12)"}
            return prompt, SamplingParams(n=2, seed=rng.randrange(99), max_tokens=length, structured_outputs=form)
        case "logprobs":
            return prompt, SamplingParams(temperature=0, max_tokens=length, prompt_logprobs=2, logprobs=1)


def told(output):
    """All that a caller can see of it, but times."""
    outputs = [(o.index, o.text, o.token_ids, o.finish_reason, o.stop_reason, str(o.logprobs)) for o in output.outputs]
    return output.prompt_token_ids, outputs, str(output.prompt_logprobs), output.error


class Caller:
    """Somebody who uses an engine and is interrupted all the time."""

    def __init__(self, llm: LLM, alone: LLM, seed: int):
        self.llm, self.alone, self.rng = llm, alone, random.Random(seed)
        self.open: dict[str, tuple] = {}  # what was added by hand and not answered yet
        self.lines: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        self.answered = 0

    def interrupt(self, name, call):
        """At any of its lines, or not at all; how many there are is learnt on the way."""
        most = self.lines[name] or 2000
        after = self.rng.randint(1, most + most // 8) if self.rng.random() < 0.7 else sys.maxsize
        result, where = interrupted(call, after)
        if where is not None:
            self.places[where] += 1
            self.lines[name] = max(self.lines[name], after)
        return result

    def expect(self, wish):
        [output] = self.alone.generate([wish[0]], wish[1])
        return told(output)

    def check(self, wish, output):
        assert told(output) == self.expect(wish), f"interrupted last at {list(self.places)[-3:]}"
        self.answered += 1

    def act(self):
        llm, rng = self.llm, self.rng
        match rng.choices(["add", "step", "generate", "stream", "abort", "reset"], [10, 60, 4, 4, 4, 1])[0]:
            case "add" if len(self.open) < 12:
                wish = wishes(rng)
                if name := self.interrupt("add", lambda: llm.add_request(*wish)):
                    self.open[name] = wish
            case "step":
                for output in self.interrupt("step", llm.step) or ():
                    self.take(output)
            case "generate":
                wish = wishes(rng)
                for output in self.interrupt("generate", lambda: llm.generate([wish[0]] * 2, wish[1])) or ():
                    if isinstance(wish[1], BeamSearchParams) or output.outputs[0].finish_reason:
                        self.check(wish, output)
            case "stream":
                wish = wishes(rng)
                outputs = self.interrupt("stream", lambda: list(llm.stream([wish[0]], wish[1])))
                if outputs:
                    self.check(wish, outputs[-1])
            case "abort" if self.open:
                name = rng.choice(list(self.open))
                self.interrupt("abort", lambda: llm.abort(name))
                llm.abort(name)
                del self.open[name]
            case "reset":
                self.interrupt("reset", llm.reset_prefix_cache)

    def take(self, output):
        assert output.request_id in self.open, "an answer for a request that nobody has a name for"
        if output.finished:
            self.check(self.open.pop(output.request_id), output)

    def finish(self):
        while self.llm.has_unfinished_requests:
            for output in self.llm.step():
                self.take(output)
        assert not self.open, "it was added, and never answered"
        usage = self.llm.stats().memory
        assert usage.free == usage.num_blocks and usage.cpu_used == 0 and not self.llm._texts
        self.llm.memory.check()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("interrupts"))


@pytest.fixture(scope="module")
def alone(folder):
    return LLM(str(folder), block_size=4, num_blocks=200, prefix_cache="none")


def make(folder, seed):
    """Every second one guesses: the model itself is the draft, which is often right."""
    rng = random.Random(seed)
    guesses = [
        None, {"method": "draft", "model": folder, "num_speculative_tokens": 3, "num_branches": 2, "adaptive": False},
        None, {"method": "ngram", "prompt_lookup_min": 1, "num_branches": 3, "num_speculative_tokens": 4},
        None, {"method": "draft", "model": folder, "num_speculative_tokens": 5, "adaptive": False},
    ][seed % 6]  # fmt: skip
    return LLM(
        str(folder), block_size=4, num_blocks=rng.choice([24, 30, 60]), max_num_seqs=rng.choice([4, 16]), watermark=0.0,
        max_num_batched_tokens=rng.choice([16, 64]), preemption=rng.choice(["swap", "recompute", "auto"]),
        prefix_cache=rng.choice(["none", "hash", "radix"]), schedule=rng.choice(["fcfs", "prefix"]), debug=True,
        speculative_config=guesses,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_broken_off_at_any_line_nothing_is_wrong_or_left_behind(folder, alone, seed):
    caller = Caller(make(folder, seed), alone, seed)
    while sum(caller.places.values()) < TRIALS // 6:
        caller.act()
    caller.finish()
    assert caller.answered > 10 and len(caller.places) > min(100, TRIALS // 20)


SHORT = [5, 6, 7, 8, 9], SamplingParams(n=2, seed=3, max_tokens=1, logprobs=1)


GUESSED = [5, 6, 7, 8, 9], SamplingParams(temperature=0, max_tokens=5, logprobs=1)


def every_line_of_the_last_step(llm, alone, short=SHORT):
    """The step in which a request is finished, broken off at each of its lines in turn."""
    wanted, after = told(alone.generate([short[0]], short[1])[0]), 1
    while True:
        name = llm.add_request(*short)
        if short is GUESSED:  # all that is missing after its first token is guessed at once
            llm.step()
        outputs, where = interrupted(llm.step, after)
        while outputs is None or not outputs[0].finished:
            outputs = llm.step()
        assert [o.request_id for o in outputs] == [name] and told(outputs[0]) == wanted, where
        assert not llm.has_unfinished_requests and llm.step() == []
        if where is None:
            return after
        after += 1


def test_the_last_step_of_a_request_is_broken_off_at_every_line(folder, alone):
    assert every_line_of_the_last_step(make(folder, 0), alone) > 200


def test_a_step_of_guesses_is_broken_off_at_every_line(folder, alone):
    llm = make(folder, 5)
    assert every_line_of_the_last_step(llm, alone, GUESSED) > 500
    assert llm.stats().speculation.num_accepted_tokens > 1000


@pytest.mark.parametrize("broken", ["start over keeps memory", "tokens are not taken back"])
def test_the_test_finds_what_is_not_made_whole(folder, alone, monkeypatch, broken):
    if broken == "start over keeps memory":
        monkeypatch.setattr(KVCacheManager, "reset", lambda self: None)
    else:
        monkeypatch.setattr(LLM, "_take_back", lambda self, notes: self._start_over())
    with pytest.raises((AssertionError, ValueError, LookupError, RuntimeError)):
        for seed in range(100, 120):
            caller = Caller(make(folder, seed), alone, seed)
            for _ in range(300):
                caller.act()
            caller.finish()


def test_the_test_finds_an_answer_that_is_lost(folder, alone, monkeypatch):
    monkeypatch.setattr("minipaged.text.mailbox.Mailbox.not_taken", lambda self: None)
    with pytest.raises((AssertionError, IndexError)):
        every_line_of_the_last_step(make(folder, 0), alone)


# ---- without a trace: what else may go wrong in a step --------------------------------------------------------------


def test_an_observer_that_fails_costs_nobody_an_answer(folder, alone):
    llm = make(folder, 1)

    def fails(plan, output):
        raise OSError("the disk is full")

    llm.observers.append(fails)
    name, outputs = llm.add_request(*SHORT), []
    with pytest.raises(OSError, match="disk"):
        llm.step()
    assert llm.has_unfinished_requests
    outputs = llm.step()  # nothing is left to be computed, so nothing is observed
    assert [(o.request_id, o.finished) for o in outputs] == [(name, True)] and not llm.has_unfinished_requests


def test_a_text_that_cannot_be_made_ends_its_own_request(folder, alone, monkeypatch):
    llm = make(folder, 2)
    decode = llm.tokenizer.decode

    def fails(ids, *args):
        if 12 in ids:
            raise UnicodeError("no such sign")
        return decode(ids, *args)

    bad = llm.add_request([12, 12, 12], SamplingParams(temperature=0, max_tokens=5))
    good = llm.add_request(*SHORT)
    monkeypatch.setattr(llm.tokenizer, "decode", fails)
    last = {}
    while llm.has_unfinished_requests:
        last |= {output.request_id: output for output in llm.step()}
    monkeypatch.undo()
    assert last[bad].outputs[0].finish_reason == "error" and "no such sign" in last[bad].error
    assert told(last[good]) == told(alone.generate([SHORT[0]], SHORT[1])[0])
    assert llm.stats().memory.used == 0
