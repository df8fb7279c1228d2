"""A model that does nothing but remember, and what it should say. See recall.py for how it is used.

`RecallRunner` takes the place of the runner. Its keys and values are plain Python: the entry of a slot is the
(token, position) that was computed there, and a digest of all that this token read of the positions before it,
as a deeper layer's would be. The next token is a hash of everything read back through the page table, so one
wrong slot anywhere, or one right slot too late, and the output is another. A slot that was freed, or never
written, must not be read at all.

What a request should give is computed beside it by `expected`, from its true history and without any memory.
"""

import random
from collections import Counter
from dataclasses import replace
from typing import Any

from minipaged.decoding.acceptance import draws_behind
from minipaged.decoding.beam_search import BeamSearch
from minipaged.requests.beam_search_params import BeamSearchParams
from minipaged.requests.request import Request
from minipaged.requests.sampling_params import Draw, SampledToken
from minipaged.requests.sequence import Sequence
from minipaged.scheduling.plan import ScheduledSequence, StepOutput, StepPlan

Entry = tuple[int, int, int]  # token, position, digest of what it read
NEVER, FREED = "never written", "freed"
END, STOP, CUT, WORD = 0, 1, 2, 3  # end of text, a stop token, a token that completes a stop string, the others
ODDS = 60  # one token in so many is END, one STOP, and one CUT


# --- the model ------------------------------------------------------------------------------------------------


def read_on(digest: int, token: int, position: int, past: int) -> int:
    """The digest of a context and one more entry."""
    return hash((digest, token, position, past))


def next_token(digest: int, seed: int, sample: int, prompt: list[int], output: list[int], forbidden: Any) -> int:
    number = hash((digest, seed, sample, tuple(prompt), tuple(output)))
    kind = number % ODDS
    return kind if kind < WORD and kind not in forbidden else WORD + number // ODDS % 1_000_000


def best_tokens(digest: int, count: int) -> list[tuple[int, float]]:
    """The likeliest tokens with falling log-probabilities; now and then there are stop tokens among them."""
    best, logprob = [], 0.0
    for rank in range(count):
        number = hash((digest, rank))
        logprob -= 0.01 + (number >> 16) % 65536 / 65536
        special = number % 20 if number % 20 in (END, STOP) else None
        token = 100 * (number % 1_000_003) + rank + WORD
        best.append((token if special is None or special in dict(best) else special, logprob))
    return best


class RecallRunner:
    """`execute(plan)` like ModelRunner, but it remembers instead of computing.

    drafter: guesses where the plan leaves that to the runner.
    """

    def __init__(self, num_blocks: int, block_size: int, num_cpu_blocks: int, drafter: "Drafter | None" = None):
        self.gpu: list[list[Any]] = [[NEVER] * block_size for _ in range(num_blocks)]
        self.cpu: list[list[Any]] = [[NEVER] * block_size for _ in range(num_cpu_blocks)]
        self.block_size, self.drafter = block_size, drafter

    def execute(self, plan: StepPlan) -> StepOutput:
        self._move(plan)
        sequences = self.with_drafts(plan.sequences)
        for s in sequences:  # a first layer: all write before any reads
            for position, (token, slot) in enumerate(zip(s.token_ids, s.slots, strict=True), s.start):
                self._write(slot, (token, position, 0))
        output = StepOutput()
        families: dict[int, list[tuple[ScheduledSequence, list[list[SampledToken]]]]] = {}
        for s in sequences:  # and a second: what was read becomes part of what is written
            digests = self._read(s)[s.num_own - 1 :]
            if s.num_drafts:
                output.drafts[s.seq_id] = s.draft_token_ids
            if s.draw:
                rows = [self._draw(digest, draw) for digest, draw in
                        zip(digests, draws_behind(s.draw, s.draft_token_ids), strict=True)]  # fmt: skip
                families.setdefault(s.seq_id if s.branch_of is None else s.branch_of, []).append((s, rows))
            if s.num_candidates:
                output.candidates[s.seq_id] = best_tokens(digests[0], s.num_candidates)
        for seq_id, family in families.items():
            answer_family(seq_id, family, output)
        return output

    def with_drafts(self, sequences: list[ScheduledSequence]) -> list[ScheduledSequence]:
        """The same, and where the runner shall guess, it does."""
        branches = Counter(s.branch_of for s in sequences)
        found, guesses = [], {}
        for s in sequences:
            if not s.num_to_draft:
                found.append(s)
                continue
            if s.branch_of is None:
                d, most = s.draw, 1 + branches[s.seq_id]
                guesses[s.seq_id] = iter(self.drafter.guess(
                    d.prompt_token_ids, d.output_token_ids, d.seed, d.index, s.num_to_draft, most
                ))  # fmt: skip
            guess = next(guesses[s.seq_id if s.branch_of is None else s.branch_of], [])[: s.num_to_draft]
            tokens = s.token_ids + guess
            found.append(replace(s, token_ids=tokens, slots=s.slots[: len(tokens)], num_drafts=len(guess)))
        return found

    def _draw(self, digest: int, d: Draw) -> list[SampledToken]:
        history = d.prompt_token_ids, d.output_token_ids, d.too_short
        return [SampledToken(next_token(digest, d.seed, d.index + i, *history)) for i in range(d.num_draws)]

    def _move(self, plan: StepPlan) -> None:
        for source, target in plan.swap_out:
            self.cpu[target] = self.gpu[source].copy()
        for block in plan.freed:
            self.gpu[block] = [FREED] * self.block_size
        for source, target in plan.swap_in:
            self.gpu[target], self.cpu[source] = self.cpu[source], [FREED] * self.block_size
        for source, target in plan.copies:
            self.gpu[target] = self.gpu[source].copy()

    def _write(self, slot: int, entry: Entry) -> None:
        self.gpu[slot // self.block_size][slot % self.block_size] = entry

    def _read(self, s: ScheduledSequence) -> list[int]:
        """The digest of all up to each token that is computed."""
        entries = [entry for block in s.block_table for entry in self.gpu[block]][: s.context_len]
        assert len(entries) == s.context_len, f"{s}: the page table is too short"
        digest, digests = 0, []
        for where, entry in enumerate(entries):
            assert isinstance(entry, tuple), f"{s}: position {where} reads a slot that was {entry}"
            token, position, past = entry
            if where >= s.start:
                past = digest
                self._write(s.slots[where - s.start], (token, position, past))
            digest = read_on(digest, token, position, past)
            if where >= s.start:
                digests.append(digest)
        return digests


def answer_family(seq_id: int, family: list[Any], output: StepOutput) -> None:
    """The tokens of one sequence, from what was drawn for it and its branches: the rule, written down once more."""
    (_, rows), *_ = family
    if len(rows[0]) > 1:
        output.tokens[seq_id] = [[token] for token in rows[0]]
        return
    best = [rows[0][0]]
    for s, drawn in family:
        tokens = [drawn[0][0]]
        for guess, row in zip(s.draft_token_ids, drawn[1:], strict=True):
            if guess != tokens[-1].token_id:
                break
            tokens.append(row[0])
        if len(tokens) > len(best):
            best = tokens
            if s.branch_of is not None:
                output.winners[seq_id] = s.seq_id
    output.tokens[seq_id] = [best]


class Drafter:
    """Guesses that are right, wrong, or each right with a chance of `share`; sometimes fewer than asked for, or none.

    In the place of an n-gram proposer, or within the RecallRunner in that of a model. requests: whose sequences.
    """

    def __init__(self, share: float, rng: random.Random, requests: list[Request]):
        self.share, self.rng, self.requests = share, rng, requests

    def propose(self, seq: Sequence, count: int, num_branches: int) -> list[list[int]]:
        [request] = [r for r in self.requests if seq in r.sequences]
        if self.rng.random() < 0.1:
            return []
        history = seq.prompt_token_ids, seq.output_token_ids
        return self.guess(*history, request.seed, seq.index, count, num_branches)

    def forget(self) -> None:
        pass

    def guess(
        self, prompt: list[int], output: list[int], seed: int, sample: int, count: int, num_branches: int
    ) -> list[list[int]]:
        tokens, digest, right = list(output), digest_of(prompt + output), []
        for _ in range(self.rng.randint(1, count)):
            token = next_token(digest, seed, sample, prompt, tokens, ())
            right.append(token)
            digest = digest_of([token], len(prompt) + len(tokens), digest)
            tokens.append(token)
        guess = [token if self.rng.random() < self.share else WORD + self.rng.randint(0, 9) for token in right]
        others = [[WORD + 10 + i] * self.rng.randint(1, count) for i in range(self.rng.randint(0, num_branches - 1))]
        place = self.rng.randint(0, len(others))
        return [*others[:place], guess, *others[place:]]


# --- what should come out -------------------------------------------------------------------------------------


def digest_of(tokens: list[int], start: int = 0, digest: int = 0) -> int:
    for position, token in enumerate(tokens, start):
        digest = read_on(digest, token, position, digest)
    return digest


def expected(request: Request) -> list[tuple[list[int], str | None]]:
    """(tokens, finish reason) of each output of a request that nobody aborts."""
    if isinstance(request.params, BeamSearchParams):
        return [(list(h.token_ids), h.finish_reason) for h in expected_search(request).hypotheses()]
    return [expected_sample(request, index) for index in range(request.params.n)]


def expected_sample(request: Request, index: int) -> tuple[list[int], str]:
    prompt, output = request.prompt_token_ids, []
    digest = digest_of(prompt)
    stops = {*(request.params.stop_token_ids or ()), *(() if request.params.ignore_eos else [END])}
    while True:
        forbidden = stops if len(output) < request.params.min_tokens else ()
        token = next_token(digest, request.seed, index, prompt, output, forbidden)
        output.append(token)
        if token in stops:
            return output, "stop"
        if len(output) == request.max_tokens:
            return output, "length"
        if token == CUT:
            return output, "cut"
        digest = digest_of([token], len(prompt) + len(output) - 1, digest)


def expected_search(request: Request) -> BeamSearch:
    search = BeamSearch(request.params, request.max_tokens, request.eos_token_ids)
    digests = {(): digest_of(request.prompt_token_ids)}
    while not search.done:
        search.advance([best_tokens(digests[b.token_ids], search.num_candidates) for b in search.running])
        for tokens, _ in search.running:
            at = len(request.prompt_token_ids) + len(tokens) - 1
            digests[tokens] = digest_of([tokens[-1]], at, digests[tokens[:-1]])
    return search
