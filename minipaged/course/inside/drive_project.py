"""What the contest is played with: an engine that gets requests while it works. Lines of JSON, both ways.

    {"open": options}                      make the engine         {"ready": true}
    {"round": number}                      nothing of before counts
    {"add": id, "text": ..., "tokens": n}  a request arrives       {"id": id, "new": [token ids], "end": whether}  ...
    {"count": true}                        after a round           {"blocks": the most in use}
"""

import json
import os
import select

from minipaged import LLM, SamplingParams


class Asked:
    """What waits in a pipe, line by line, without waiting for it."""

    def __init__(self, pipe):
        self._pipe, self._rest = pipe.fileno(), b""

    def lines(self, wait):
        """EOFError if nothing can come any more."""
        if not wait and not select.select([self._pipe], [], [], 0)[0]:
            return []
        more = os.read(self._pipe, 1 << 20)
        if not more:
            raise EOFError
        *whole, self._rest = (self._rest + more).split(b"\n")
        return [json.loads(line) for line in whole]


def stream(asked, said):
    def say(**what):
        said.write(json.dumps(what).encode() + b"\n")
        said.flush()

    asked, told = Asked(asked), {}
    [first] = asked.lines(wait=True)
    llm = LLM(**first["open"])
    say(ready=True)
    while True:
        for line in asked.lines(wait=not llm.has_unfinished_requests):
            if "round" in line:
                llm.reset_prefix_cache()
            elif "add" in line:
                told[line["add"]] = 0
                add(llm, line)
            else:
                peak = llm.stats().peak.usage
                say(blocks=peak.used if peak else 0)
        for output in llm.step() if llm.has_unfinished_requests else []:
            tokens = output.outputs[0].token_ids
            say(id=int(output.request_id), new=tokens[told[int(output.request_id)] :], end=output.finished)
            told[int(output.request_id)] = len(tokens)


def add(llm, line):
    """As a chat, where the model knows what that is."""
    text = line["text"]
    prompt = [{"role": "user", "content": text}] if llm.tokenizer.has_chat_template else text
    llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=line["tokens"]), str(line["add"]))
