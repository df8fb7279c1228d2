"""The texts of all requests that are not finished, up to date with their tokens."""

from collections.abc import Callable, Iterable
from functools import partial

from minipaged.decoding.beam_search import Hypothesis
from minipaged.requests.request import Request
from minipaged.requests.sampling_params import SamplingParams
from minipaged.requests.sequence import Sequence
from minipaged.text.detokenizer import StreamDecoder
from minipaged.text.outputs import Answer, BeamOutput, CompletionOutput, GrowingOutput
from minipaged.text.sequence_text import SequenceText
from minipaged.text.tokenizer import Tokenizer

Finish = Callable[[Request, Sequence, str, str], None]


class Texts:
    """finish: called for a sequence that a stop string ends, with "stop" and the string."""

    def __init__(self, tokenizer: Tokenizer, finish: Finish):
        self._tokenizer, self._finish = tokenizer, finish
        self._by_id: dict[int, SequenceText] = {}
        # By request, and in it by identity: each hypothesis is decoded once, if anybody looks at it.
        self._hypotheses: dict[str, dict[int, tuple[Hypothesis, str]]] = {}

    def __len__(self) -> int:
        return len(self._by_id) + len(self._hypotheses)

    def answer(self, request: Request) -> Answer:
        """Read the new tokens of a request; see what it has to say then."""
        if request.search:
            return Answer(request, self._beams(request), self._tokenizer)
        for seq in request.sequences:
            self._read(request, seq)
        outputs: list[CompletionOutput] = [
            GrowingOutput(seq, self._by_id[seq.seq_id], self._tokenizer) for seq in request.sequences
        ]
        return Answer(request, outputs, self._tokenizer)

    def forget(self, request: Request) -> None:
        for seq in request.sequences:
            self._by_id.pop(seq.seq_id, None)
        self._hypotheses.pop(request.request_id, None)

    def _read(self, request: Request, seq: Sequence) -> None:
        """Up to where a stop string ends the text: what was drawn behind it never was."""
        params = request.params
        assert isinstance(params, SamplingParams)
        text = self._by_id.get(seq.seq_id)
        if text is None:
            text = self._by_id[seq.seq_id] = SequenceText(self._tokenizer, request.prompt_token_ids, params)
        tokens = seq.output_token_ids
        for count in range(text.num_tokens + 1, len(tokens) + 1):
            last = count == len(tokens)
            silent = last and seq.finish_reason == "stop" and not params.include_stop_str_in_output
            silent = silent or not params.detokenize
            stop = text.add(tokens[count - 1], silent, check_stops=count > params.min_tokens)
            if stop is not None:
                del tokens[count:], seq.sampled[count:]
                if seq.finish_reason is None:
                    self._finish(request, seq, "stop", stop)
                seq.finish_reason, seq.stop_reason = "stop", stop
                return
            if last and seq.finish_reason is not None:
                text.finish()

    def _beams(self, request: Request) -> list[CompletionOutput]:
        """The best hypotheses; and while fewer are finished than were asked for, the best beams that run."""
        search = request.search
        assert search is not None
        if request.error:
            return [CompletionOutput(0, "", [], finish_reason="error")]
        found = search.hypotheses()
        running = [] if request.finished else [beam for beam in search.running if beam.token_ids]
        outputs = [self._hypothesis(request, index, one) for index, one in enumerate(found)]
        for index, beam in enumerate(running[: search.num_wanted - len(found)], len(found)):
            text = partial(self._decode, request, beam.token_ids)
            outputs.append(BeamOutput(index, beam.token_ids, beam.score, text))
        if request.finished and not outputs:  # aborted before anything was found
            outputs = [CompletionOutput(0, "", [], finish_reason=request.sequences[0].finish_reason)]
        return outputs

    def _hypothesis(self, request: Request, index: int, h: Hypothesis) -> CompletionOutput:
        known = self._hypotheses.setdefault(request.request_id, {})

        def text() -> str:
            if id(h) not in known:
                known[id(h)] = h, self._decode(request, h.token_ids)
            return known[id(h)][1]

        stop = None if h.stop_token_id is None else request.stop_reason(h.stop_token_id)
        return BeamOutput(index, h.token_ids, h.cumulative_logprob, text, h.finish_reason, stop, h.score)

    def _decode(self, request: Request, tokens: Iterable[int]) -> str:
        decoder = StreamDecoder(self._tokenizer, request.prompt_token_ids, request.params.skip_special_tokens)
        return "".join(map(decoder.add, tokens)) + decoder.flush()
