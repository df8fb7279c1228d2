"""What the command line says: results on standard output, the account of the memory on standard error.

And how it ends when nobody listens any more.
"""

import json
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from minipaged.memory import RadixCache
from minipaged.terminal.snapshot import letters

if TYPE_CHECKING:  # PyTorch takes seconds to import
    from minipaged.execution.stats import EngineStats
    from minipaged.llm import LLM
    from minipaged.terminal.prompts import Job
    from minipaged.text.outputs import CompletionOutput, RequestOutput

MOST_PREFIXES = 30  # lines of the tree of prefixes
# What a terminal would obey instead of showing it; a model can write anything.
CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n"), ord("\t")}, "\ufffd")


class Results:
    """Prints results in the order of the prompts, each when finished; or, if streaming, as the text grows.

    jobs: what was asked, in the order in which the requests were added: their ids are "0", "1", ...
    """

    def __init__(self, jobs: list["Job"], file: IO[str], as_json: bool, streaming: bool):
        self._jobs, self._file, self._as_json, self._streaming = jobs, file, as_json, streaming
        self._finished: dict[int, RequestOutput] = {}  # and not yet printed
        self._next = 0  # the job to be printed next
        self._streamed = 0  # characters that were printed
        self._ready = ""
        self.num_finished = 0
        self.num_cut = 0  # prompts with an output that reached its limit
        self.errors: list[str] = []  # of prompts whose answers broke

    def add(self, output: "RequestOutput") -> None:
        """Take what a step gave."""
        if self._streaming:
            self._ready += output.outputs[0].text[self._streamed :] + "\n" * output.finished
            self._streamed = len(output.outputs[0].text)
        elif output.finished:
            self._finished[int(output.request_id)] = output
        self.num_finished += output.finished
        if output.finished and output.error:
            self.errors.append(f"{self._jobs[int(output.request_id)].where}: {output.error}")
        self.num_cut += output.finished and any(one.finish_reason == "length" for one in output.outputs)
        while self._next in self._finished:
            self._ready += self._written(self._finished.pop(self._next))
            self._next += 1

    @property
    def ready(self) -> bool:
        """Whether there is something to print."""
        return bool(self._ready)

    def flush(self) -> None:
        """Print what is ready."""
        text, self._ready = self._ready, ""
        self._file.write(text.translate(CONTROLS) if self._file.isatty() else text)
        self._file.flush()

    def close(self) -> None:
        """Nothing more comes: print the rest, also of what was finished out of turn."""
        for _, output in sorted(self._finished.items()):
            self._ready += self._written(output)
        self._finished = {}
        if self._streaming and self._streamed and not self.num_finished:
            self._ready += "\n"
        self.flush()

    def _written(self, output: "RequestOutput") -> str:
        if self._as_json:
            return json.dumps(as_json(output), ensure_ascii=False) + "\n"
        many = len(self._jobs) > 1 or len(output.outputs) > 1
        return "".join((self._header(output, one) if many else "") + one.text + "\n" for one in output.outputs)

    def _header(self, output: "RequestOutput", one: "CompletionOutput") -> str:
        number = int(output.request_id)
        name, place = letters(number), f"prompt {number + 1}"
        if one.score is not None:
            place += f", beam {one.index + 1} with score {one.score:.3f}"
        elif len(output.outputs) > 1:
            name += str(one.index + 1)
            place += f", sample {one.index + 1}"
        return f"=== {name} ({place}): {self._jobs[number].title}\n"


def as_json(output: "RequestOutput") -> dict[str, Any]:
    """A finished request as plain data; times in seconds, logprobs as {token id: {logprob, rank, decoded_token}}."""
    plain = asdict(output)
    metrics = output.metrics
    return {
        "request_id": output.request_id,
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        **({"error": output.error} if output.error else {}),
        **({"prompt_logprobs": plain["prompt_logprobs"]} if plain["prompt_logprobs"] else {}),
        "outputs": [{k: v for k, v in one.items() if k != "logprobs" or v is not None} for one in plain["outputs"]],
        "metrics": {
            "queue_time": metrics.queue_time,
            "time_to_first_token": metrics.time_to_first_token,
            "time_per_output_token": output.time_per_output_token,
            "num_preemptions": metrics.num_preemptions,
            "num_cached_tokens": metrics.num_cached_tokens,
            "num_drafts": metrics.num_drafts,
            "num_draft_tokens": metrics.num_draft_tokens,
            "num_accepted_tokens": metrics.num_accepted_tokens,
        },
    }


def show_account(stats: "EngineStats", seconds: float, console: Console) -> None:
    """The account of a run: a table in a terminal, else plain text."""
    rows = account(stats, seconds)
    if not console.is_terminal:
        width = max(len(name) for name, _ in rows)
        text = "".join(f"  {name:<{width}}  {value}\n" for name, value in rows)
        print(f"memory account\n{text}", end="", file=console.file)
        return
    table = Table(title="memory account", title_justify="left", show_header=False)
    for name, value in rows:
        table.add_row(Text(name, "bold"), value)
    console.print(table)


def account(stats: "EngineStats", seconds: float) -> list[tuple[str, str]]:
    """What the memory held and did, in rows of (name, value). seconds: the time it took, without loading."""
    now, peak = stats.memory, stats.peak.usage or stats.memory
    size = stats.block_bytes
    used, reserved = peak.used * size, stats.peak.contiguous_blocks * size
    ratio = f", {reserved / used:,.1f} times as much" if used else ""
    kept = f", {now.cached:,} more can be found again" if now.cached else ""
    preemptions = ", ".join(f"{count} by {how}" for how, count in stats.num_preemptions.items())
    return [
        ("pool", f"{now.num_blocks:,} blocks of {now.block_size} tokens, {_size(now.num_blocks * size)}"),
        ("most in use", f"{peak.used:,} blocks, {100 * peak.used / now.num_blocks:.1f} %, {_size(used)}"),
        ("- stored in them", f"{peak.tokens_stored:,} tokens"),
        ("- waste", f"{peak.waste_percent:.1f} %: slots that were empty"),
        ("- shared", f"{peak.shared:,} blocks; without sharing {peak.blocks_saved_by_sharing:,} more in use"),
        ("- if contiguous", f"{_size(reserved)} at the maximum length{ratio}"),
        ("copied on write", f"{now.copies:,} blocks"),
        ("swapped", f"{now.swapped_out_blocks:,} blocks out, {now.swapped_in_blocks:,} in"),
        ("preemptions", preemptions),
        ("prefix cache", _prefixes(stats)),
        *_speculation(stats),
        ("in use now", f"{now.used:,} blocks{kept}"),
        ("tokens", f"{stats.num_prompt_tokens:,} of prompts, {stats.num_output_tokens:,} of outputs"),
        ("speed", f"{stats.num_output_tokens / max(seconds, 1e-9):,.1f} output tokens/s"),
        ("steps", f"{stats.num_steps:,}"),
    ]


def _prefixes(stats: "EngineStats") -> str:
    if stats.prefix_cache == "none":
        return "off"
    counts = stats.prefixes
    found = f"{counts.found:,} of {counts.queried:,} prompt tokens found, {100 * stats.prefix_hit_rate:.1f} %"
    again = f"; {counts.recovered:,} more after preemptions" if counts.recovered else ""
    return f"{found}{again}; {stats.memory.evicted:,} blocks evicted"


def _speculation(stats: "EngineStats") -> list[tuple[str, str]]:
    """Nothing if nothing is guessed."""
    if (counts := stats.speculation) is None:
        return []
    share = f"{counts.num_accepted_tokens:,} of {counts.num_draft_tokens:,} guessed tokens were right"
    rates = " ".join(f"{100 * rate:.0f}" for rate in counts.acceptance_rate_per_pos)
    return [
        ("speculation", f"{share}, {100 * counts.acceptance_rate:.1f} %"),
        ("- drafts", f"{counts.num_drafts:,}, with {counts.mean_acceptance_length:.2f} tokens each"),
        ("- right by position", f"{rates} %"),
    ]


def show_prefixes(llm: "LLM", console: Console) -> None:
    """What a radix tree holds: a line for each run of blocks, the first MOST_PREFIXES of them."""
    if isinstance(tree := llm.memory.cache, RadixCache):
        text = tree.draw(llm.tokenizer.decode, console.width, MOST_PREFIXES).translate(CONTROLS)
        print(f"prefixes in memory: {text}", file=console.file)


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 1024:,.1f} KiB"
