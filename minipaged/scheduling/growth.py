"""What the tokens of a step do to the sequences: they grow, fork and end, and their memory with them."""

from minipaged.decoding.beam_search import memory_moves
from minipaged.memory import KVCacheManager
from minipaged.requests.request import Request
from minipaged.requests.sequence import Sequence
from minipaged.scheduling.plan import StepOutput


class LiveSequences:
    """All sequences that have not ended, by id."""

    def __init__(self, memory: KVCacheManager):
        self._memory = memory
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
        seq.seq_id = self._next_id
        self._next_id += 1
        self._by_id[seq.seq_id] = seq
        return seq

    def end(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """Its memory is free at once, wherever it is."""
        seq.finish_reason, seq.stop_reason = reason, stop_reason
        if seq.in_memory:
            self._memory.free(seq.seq_id)
            seq.in_memory = False
        del self._by_id[seq.seq_id]

    def grow(self, request: Request, output: StepOutput) -> bool:
        """Append what was drawn for a request. Returns whether there was anything."""
        if failed := [seq for seq in request.live if seq.seq_id in output.errors]:
            request.error = output.errors[failed[0].seq_id]
            for seq in request.live if request.search else failed:  # beams are nothing without each other
                self.end(seq, "error")
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
        """What one sequence has drawn; or n samples, when their prompt has just been computed: fork, then append."""
        rows = output.tokens[seq.seq_id]
        children = [self._fork(seq, index) for index in range(1, len(rows))]
        request.sequences.extend(children)
        for one, tokens in zip([seq, *children], rows, strict=True):
            for token in tokens:
                one.sampled.append(token)
                one.output_token_ids.append(token.token_id)
                if token.token_id in request.stop_ids:
                    self.end(one, "stop", request.stop_reason(token.token_id))
                    break
                if len(one.output_token_ids) >= request.max_tokens:
                    self.end(one, "length")
                    break
            else:
                self._take_back(one)

    def _take_back(self, seq: Sequence) -> None:
        """Of what was computed, only what became a token stays, and the newest token is never computed yet."""
        surplus = seq.num_computed_tokens - (len(seq) - 1)
        if surplus > 0:
            self._memory.take_back(seq.seq_id, surplus)
            seq.num_computed_tokens -= surplus

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
            self.end(beams[old], "dropped")
        for seq, survivor in zip(request.sequences, survivors, strict=True):
            seq.output_token_ids.append(survivor.token_id)
        return True

    def _fork(self, parent: Sequence, index: int) -> Sequence:
        child = self.add(parent.child(index))
        self._memory.fork(parent.seq_id, child.seq_id)
        return child
