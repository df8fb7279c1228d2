"""What a chaotic crowd asks of a server, what has to come out, and how its clients behave.

A few hundred wishes, each with its answer from the offline engine (LLM.generate, which nobody disturbs), so that it is
cheap to know the answer to any number of requests.
"""

import asyncio
import contextlib
import json
import random
from collections import Counter
from dataclasses import dataclass, field

from raw_http import Wire, ask, events, request

from minipaged import LLM, BeamSearchParams, SamplingParams

PATHS = {False: "/v1/completions", True: "/v1/chat/completions"}
BEGINNINGS = ("Once upon a time there was a fox", "abcabcabcabcabcabcabc", "The answer is 12, or 13, or 14; who")
ENDINGS = ("", " and", "!", "zq", " 7 7 7", "~x~")


@dataclass
class Wish:
    """body: what is asked. choices: (text, finish_reason, stop_reason, token ids, logprobs) of each."""

    chat: bool
    body: dict
    choices: list[tuple] = field(default_factory=list)
    cut: int = 0  # so many last characters of an aborted text may turn out to be the beginning of a stop string

    @property
    def fails(self):
        return self.choices[0][1] == "error"


def draw_wish(rng: random.Random):
    """(a wish, prompts or messages, parameters): the same thing said twice, for the server and for LLM."""
    text = rng.choice(BEGINNINGS)[: rng.randint(1, 35)] + rng.choice(ENDINGS)
    prompt, prompts, length = text, [text], rng.choice([1, 2, 5, 9, 14, 30])
    body, cut, chat = {"max_tokens": length, "return_token_ids": True}, 0, rng.random() < 0.2
    kinds = "greedy", "samples", "samples", "beams", "stop", "logprobs", "list", "ids", "bad", "echo", "form"
    kind = rng.choice(kinds)
    own = {"temperature": 0.0}
    if kind == "samples":
        own = {"n": rng.randint(1, 3), "seed": rng.randrange(9), "temperature": 1.5, "frequency_penalty": 0.5}
    elif kind == "stop":
        own = {"seed": rng.randrange(9), "stop": ["e", "a1", "~"], "min_tokens": 1}
        cut = 2
    elif kind == "logprobs":
        own["logprobs"] = 2
    elif kind == "list" and not chat:
        prompts = prompt = [text, text + "b", text[:1]][: rng.randint(2, 3)]
    elif kind == "ids" and not chat:
        prompt = [ord(c) - 33 if c != " " else 94 for c in text]
        prompts = [prompt]
    elif kind == "form":
        form = rng.choice([{"regex": "[a-f]{2,5}x|(ab)+[0-9]"}, {"choice": ["yes", "no", "yes, but"]}])
        own = {"structured_outputs": form, "seed": rng.randrange(9)}
    elif kind == "bad":  # nothing may be drawn: its end of text alone, and that not yet
        own = {"allowed_token_ids": [95], "min_tokens": 1}
    if kind == "beams":
        params = BeamSearchParams(beam_width=3, max_tokens=min(length, 8))
        body |= {"use_beam_search": True, "n": 3, "max_tokens": min(length, 8)}
    else:
        params = SamplingParams(max_tokens=length, **own)
        body |= own
    if chat and "logprobs" in own:
        body |= {"logprobs": True, "top_logprobs": 2}
    if rng.random() < 0.4:
        body["cache_salt"] = rng.choice(["tenant a", "tenant b"])
    if chat:
        body["messages"] = prompts = [{"role": "user", "content": text}]
    else:
        body |= {"prompt": prompt} | ({"echo": True} if kind == "echo" else {})
    return Wish(chat, body, cut=cut), prompts, params


def draw_wishes(folder, count, seed=0) -> list[Wish]:
    """With their answers, which may not depend on anything but themselves."""
    rng, wishes = random.Random(seed), []
    with LLM(str(folder), block_size=4, num_blocks=200, prefix_cache="none") as llm:
        for _ in range(count):
            wish, prompts, params = draw_wish(rng)
            outputs = llm.chat(prompts, params) if wish.chat else llm.generate(prompts, params)
            for output in outputs:
                for one in output.outputs:
                    told = [place[t].logprob for place, t in zip(one.logprobs or [], one.token_ids, strict=False)]
                    text = (output.prompt if wish.body.get("echo") else "") + one.text
                    wish.choices.append((text, one.finish_reason, one.stop_reason, one.token_ids, told))
            wishes.append(wish)
    return wishes


# --- reading answers ------------------------------------------------------------------------------------------------


def told_by(choice, chat):
    """(text, finish_reason, stop_reason, token ids, logprobs) of a choice, or of a piece of one."""
    said = choice.get("message") or choice.get("delta") or {}
    logprobs = choice.get("logprobs") or {}
    numbers = [one["logprob"] for one in logprobs.get("content", ())] if chat else logprobs.get("token_logprobs", [])
    text = said.get("content", "") if chat else choice["text"]
    return [text, choice["finish_reason"], choice.get("stop_reason"), choice.get("token_ids", []), numbers]


def joined(pieces, chat):
    """The choices that pieces of a stream make up, as far as they go."""
    found = {}
    for piece in pieces:
        for choice in piece["choices"]:
            text, reason, stop, tokens, numbers = told_by(choice, chat)
            known = found.setdefault(choice["index"], ["", None, None, [], []])
            assert known[1] is None, "something came after the end of a choice"
            known[:] = known[0] + text, reason, stop, known[3] + tokens, known[4] + numbers
    return found


def check_choices(wish, found, whole=True, may_be_aborted=False):
    """Each is what the offline engine says, or a beginning of it."""
    aborted = any(one[1] == "abort" for one in found.values())  # before it was forked into its samples, perhaps
    if "use_beam_search" in wish.body and may_be_aborted:
        return  # what it had found until then, and nothing says that it was aborted
    assert not whole or aborted or sorted(found) == list(range(len(wish.choices))), "a choice is missing"
    for index, (text, reason, stop, tokens, numbers) in found.items():
        wanted = wish.choices[index]
        if reason == "abort" or reason is None:
            if "use_beam_search" not in wish.body:
                kept = text[: len(text) - wish.cut] if reason else text
                assert wanted[0].startswith(kept) and wanted[3][: len(tokens)] == tokens, (wish, text, tokens)
        else:
            assert (text, reason, stop, tokens) == wanted[:4], (wish, text, reason, stop, tokens)
            assert len(numbers) == len(wanted[4]), (wish, numbers)
            assert all(abs(a - b) < 1e-4 for a, b in zip(numbers, wanted[4], strict=True)), (wish, numbers)


# --- how clients behave ---------------------------------------------------------------------------------------------

MALFORMED = [
    b"", b"{", b"[]", b"null", b'{"prompt": "a"', b"\xff\xfe{}", b'{"prompt": 5}', b'{"prompt": "a", "n": 0}',
    b'{"prompt": "a", "temperature": -1}', b'{"prompt": "a", "tools": [1]}', b'{"prompt": [], "max_tokens": 3}',
    b'{"prompt": "a", "max_tokens": 1e99}', b'{"prompt": "a", "stop": [""]}', b'{"prompt": "a", "modle": "x"}',
    b'{"prompt": "a", "model": "gpt-4"}', b'{"prompt": [[1], [999]]}', b'{"messages": "hi"}', b'{"prompt": [-1]}',
    b'{"prompt": "' + b"x" * 5000 + b'"}', b'{"prompt": "' + b"x" * 30000 + b'"}', b'{"prompt": "a", "logprobs": 999}',
    b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", b"[" * 3000, b'{"prompt": "a", "cache_salt": ""}',
    b'{"prompt": "\\ud800", "max_tokens": 0}', b'{"prompt": "a", "n": 50}', b'{"prompt": "", "max_tokens": 1}',
    b'{"prompt": "a", "structured_outputs": {"regex": "("}}', b'{"prompt": "a", "response_format": {"type": "json"}}',
    b'{"prompt": "a", "structured_outputs": {"json": {"type": "nothing"}}}',
]  # fmt: skip


class Crowd:
    """Many clients of a server. counts: what came of their requests."""

    def __init__(self, place, wishes, seed):
        self.place, self.port, self.wishes, self.seed = place, place.port, wishes, seed
        self.counts: Counter[str] = Counter()
        self._number = 0

    async def batch(self, count, at_once=24):
        gate = asyncio.Semaphore(at_once)

        async def one(number):
            rng = random.Random(self.seed * 1_000_003 + number)
            behaviour = rng.choices(list(BEHAVIOURS), BEHAVIOURS.values())[0]
            async with gate, asyncio.timeout(60):  # whoever hangs is found
                await behaviour(self, rng)

        numbers = range(self._number, self._number + count)
        self._number += count
        await asyncio.gather(*map(one, numbers))

    def draw(self, rng, stream=None, **more):
        """(a wish, whether as a stream, the bytes of its request)."""
        wish, stream = rng.choice(self.wishes), rng.random() < 0.5 if stream is None else stream
        return wish, stream, request(PATHS[wish.chat], wish.body | {"stream": stream} | more)

    def refused(self, status, headers):
        """There was no room, which is told at once, or after a while."""
        if status in (429, 503):
            assert int(headers["retry-after"]) >= 1
            self.counts[f"refused {status}"] += 1
        return status in (429, 503)

    def check(self, wish, stream, status, headers, body, names=0, may_be_aborted=False):
        """A whole answer. names: others have the request's id, too. may_be_aborted: by somebody else."""
        if self.refused(status, headers):
            return
        if names and status == 400:
            assert b"in use" in body
            self.counts["name in use"] += 1
        elif wish.fails and status == 500:
            assert b"forbidden" in body
            self.counts["failed alone"] += 1
        else:
            assert status == 200, (status, wish, body)
            found = (
                joined(events(body), wish.chat) if stream else
                {choice["index"]: told_by(choice, wish.chat) for choice in json.loads(body)["choices"]}
            )  # fmt: skip
            check_choices(wish, found, may_be_aborted=may_be_aborted)
            aborted = any(one[1] == "abort" for one in found.values())
            self.counts["aborted by another" if aborted else "failed alone" if wish.fails else "completed"] += 1

    # --- those who mean well

    async def reads(self, rng):
        wish, stream, data = self.draw(rng)
        wire = await Wire.open(self.port)
        await wire.send(data)
        self.check(wish, stream, *await wire.answer())
        wire.close()

    async def stays(self, rng):
        """Several requests on one connection; at once, or one after the other."""
        wire, asked, early = await Wire.open(self.port), [self.draw(rng) for _ in range(3)], rng.random() < 0.3
        if early:
            await wire.send(b"".join(data for *_, data in asked))
        for wish, stream, data in asked:
            if not early:
                await wire.send(data)
            self.check(wish, stream, *await wire.answer())
        wire.close()

    async def reads_slowly(self, rng):
        wish, _, data = self.draw(rng, stream=True)
        wire = await Wire.open(self.port, small=True)
        await wire.send(data)
        status, headers = await wire.head()
        if status != 200:
            self.check(wish, True, status, headers, await wire.body(headers))
        else:
            pieces = []
            while piece := await wire.chunk():
                pieces.append(piece)
                await asyncio.sleep(rng.random() * 0.02)
            self.check(wish, True, status, headers, b"".join(pieces))
        wire.close()

    async def aborts(self, rng):
        """Somebody else ends it by its name; and another one has the same name, perhaps."""
        name = f"name-{rng.randrange(10**9)}"
        wires = [await Wire.open(self.port) for _ in range(rng.choice([1, 1, 2]))]
        asked = [self.draw(rng, request_id=name) for _ in wires]
        for wire, (*_, data) in zip(wires, asked, strict=True):
            await wire.send(data)
        await asyncio.sleep(rng.choice([0, 0.001, 0.01, 0.03]))
        status, *_ = await ask(self.port, "/abort", {"request_id": [name, *(f"{name}-{i}" for i in range(3))]})
        assert status == 200
        for wire, (wish, stream, _) in zip(wires, asked, strict=True):
            self.check(wish, stream, *await wire.answer(), names=len(wires) - 1, may_be_aborted=True)
            wire.close()

    # --- those who leave

    async def leaves_in_its_body(self, rng):
        *_, data = self.draw(rng)
        await self._leave_after(rng, data[: rng.randrange(len(data))])

    async def leaves_at_once(self, rng):
        *_, data = self.draw(rng)
        await self._leave_after(rng, data)

    async def _leave_after(self, rng, data):
        wire = await Wire.open(self.port)
        await wire.send(data)
        await asyncio.sleep(rng.choice([0, 0, 0.001, 0.01, 0.03]))
        wire.close(rudely=rng.random() < 0.5)
        self.counts["left"] += 1

    async def leaves_in_a_stream(self, rng):
        wish, _, data = self.draw(rng, stream=True)
        wire, pieces, ended = await Wire.open(self.port), [], 0
        await wire.send(data)
        status, headers = await wire.head()
        if status == 500:
            self.check(wish, True, status, headers, await wire.body(headers))
        elif not self.refused(status, headers):
            most = rng.choice([1, 2, 5, 10**6])
            while len(pieces) < most and ended < len(wish.choices):  # at the latest when all but [DONE] was told
                chunk = [line.removeprefix(b"data: ") for line in (await wire.chunk()).split(b"\n\n") if line]
                pieces += [json.loads(line) for line in chunk if line != b"[DONE]"]
                ended = sum(choice["finish_reason"] is not None for piece in pieces for choice in piece["choices"])
            check_choices(wish, joined(pieces, wish.chat), whole=False)
            self.counts["left"] += 1
        wire.close(rudely=rng.random() < 0.5)

    # --- those who can't write

    async def writes_nonsense(self, rng):
        status, headers, said = await ask(self.port, rng.choice(list(PATHS.values())), rng.choice(MALFORMED))
        if not self.refused(status, headers):
            assert 400 <= status < 500 and said["error"]["code"] == status and said["error"]["message"], (status, said)
            self.counts[f"refused {status}"] += 1

    async def writes_no_http(self, rng):
        wire = await Wire.open(self.port)
        with contextlib.suppress(OSError):  # it may be closed already
            await wire.send(bytes(rng.randrange(256) for _ in range(rng.randint(1, 80))) + b"\r\n\r\n")
            wire.writer.write_eof()
            said = await wire.reader.read()
            assert not said or said.startswith(b"HTTP/1.1 400"), said
        wire.close()
        self.counts["no HTTP"] += 1

    async def stops_in_its_body(self, rng):
        *_, data = self.draw(rng)
        wire = await Wire.open(self.port)
        await wire.send(data[: -rng.randint(1, 5)])
        status, headers, said = await wire.answer()
        assert self.refused(status, headers) or status == 408, (status, said, data)
        self.counts["refused 408"] += status == 408
        wire.close()


BEHAVIOURS = {
    Crowd.reads: 40, Crowd.stays: 4, Crowd.reads_slowly: 4, Crowd.aborts: 6, Crowd.leaves_in_its_body: 6,
    Crowd.leaves_at_once: 12, Crowd.leaves_in_a_stream: 12, Crowd.writes_nonsense: 12, Crowd.writes_no_http: 2,
    Crowd.stops_in_its_body: 1,
}  # fmt: skip
