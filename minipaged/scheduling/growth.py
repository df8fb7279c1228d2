"""What the tokens of a step do to the sequences: they grow, fork and end, and their memory with them."""

from minipaged.decoding.beam_search import memory_moves
from minipaged.memory import KVCacheManager
from minipaged.requests.request import Request
from minipaged.requests.sampling_params import SampledToken
from minipaged.requests.sequence import Sequence
from minipaged.scheduling.plan import StepOutput
from minipaged.scheduling.transfer import Transfers


class LiveSequences:
    """All sequences that have not ended, by id."""

    def __init__(self, memory: KVCacheManager, transfers: Transfers):
        self._memory, self._transfers = memory, transfers
        self._by_id: dict[int, Sequence] = {}
        self._next_id = 0

    def __getitem__(self, seq_id: int) -> Sequence:
        return self._by_id[seq_id]

    def __len__(self) -> int:
        return len(self._by_id)

    def start_over(self) -> None:
        """Nothing lives; ids are not given again."""
        self._by_id.clear()

    def add(self, seq: Sequence) -> Sequence:
        """Give it its id."""
        seq.seq_id = self.new_id()
        self._by_id[seq.seq_id] = seq
        return seq

    def new_id(self) -> int:
        """An id that nobody had. A branch has no more of a sequence than that."""
        self._next_id += 1
        return self._next_id - 1

    def end(self, request: Request, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """Its memory is free at once, wherever it is, but for what is kept for another engine."""
        seq.finish_reason, seq.stop_reason = reason, stop_reason
        self._transfers.request_finished(request, seq, reason, self._memory, self.new_id)
        self._forget(seq)

    def _forget(self, seq: Sequence) -> None:
        """It lives no more, and holds no memory, on the GPU or swapped out."""
        if seq.in_memory:
            self._memory.free(seq.seq_id)
            seq.in_memory = False
        del self._by_id[seq.seq_id]

    def grow(self, request: Request, output: StepOutput) -> bool:
        """Append what was drawn for a request. Returns whether there was anything."""
        if failed := [seq for seq in request.live if seq.seq_id in output.errors]:
            request.error = output.errors[failed[0].seq_id]
            for seq in request.live if request.search else failed:  # beams are nothing without each other
                self.end(request, seq, "error")
        if request.search:
            return self._grow_beams(request, output) if request.live else True
        if request.prompt_logprobs is not None:
            for seq in request.live:
                request.prompt_logprobs.extend(output.prompt_logprobs.get(seq.seq_id, ()))
        grown = [seq for seq in request.live if seq.seq_id in output.tokens]
        for seq in grown:
            self._append(request, seq, output)
        return bool(grown or failed)

    def _append(self, request: Request, seq: Sequence, output: StepOutput) -> None:
        """What one sequence has drawn; or n samples, when their prompt has just been computed: fork, then append.

        All have forked before the first token is appended; the children stand behind in `request.sequences`, with the
        indices 1, 2, ... Each row is appended and settled, and then its sequence ends if there is a reason.
        """
        rows = output.tokens[seq.seq_id]
        children = [self._fork(seq, index) for index in range(1, len(rows))]
        request.sequences.extend(children)
        for one, tokens in zip([seq, *children], rows, strict=True):
            reason, stop_reason = self._append_tokens(request, one, tokens)
            self._settle(one)
            if reason:
                self.end(request, one, reason, stop_reason)

    def _append_tokens(
        self, request: Request, seq: Sequence, tokens: list[SampledToken]
    ) -> tuple[str | None, int | None]:
        """Append them, to the end of the sequence at most; returns why it ended, if it did: "stop" and the request's
        `stop_reason` at one of its `stop_ids`, or "length" and None at the last of its `max_tokens`.
        """
        for token in tokens:
            seq.sampled.append(token)
            seq.output_token_ids.append(token.token_id)
            if token.token_id in request.stop_ids:
                return "stop", request.stop_reason(token.token_id)
            if len(seq.output_token_ids) >= request.max_tokens:
                return "length", None
        return None, None

    def _settle(self, seq: Sequence) -> None:
        """Of what was computed, only what became a token stays, and can be found; the newest is not computed yet."""
        slots = self._memory.num_tokens(seq.seq_id)
        seq.num_computed_tokens = min(slots, len(seq) - 1)
        surplus = slots - seq.num_computed_tokens
        if surplus:
            self._memory.take_back(seq.seq_id, surplus)
        self._memory.publish(seq.seq_id, seq.num_computed_tokens, seq.tokens)

    def _grow_beams(self, request: Request, output: StepOutput) -> bool:
        search, beams = request.search, request.sequences
        assert search is not None
        if any(beam.seq_id not in output.candidates for beam in beams):
            return False
        survivors = search.advance([output.candidates[beam.seq_id] for beam in beams])
        moves = memory_moves(survivors, len(beams))
        heirs = {new: self._fork(beams[old], new) for old, new in moves.fork}
        heirs.update({new: beams[old] for old, new in moves.keep})
        request.sequences = [heirs[new] for new in range(len(survivors))]
        for old in moves.free:
            self.end(request, beams[old], "dropped")
        for seq, survivor in zip(request.sequences, survivors, strict=True):
            seq.output_token_ids.append(survivor.token_id)
        return True

    def _fork(self, parent: Sequence, index: int) -> Sequence:
        child = self.add(parent.child(index))
        self._memory.fork(parent.seq_id, child.seq_id)
        return child
