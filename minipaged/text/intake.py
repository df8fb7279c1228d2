"""From what a caller gives to a `Request`, or to an error that says what would be right."""

import random
from collections.abc import Container
from itertools import count

from minipaged.decoding.grammar import Grammar, Grammars
from minipaged.requests.request import Request, RequestRefused
from minipaged.requests.sampling_params import SamplingParams
from minipaged.text.inputs import Params, Prompt, bad_word_ids, encode, kept_tokens
from minipaged.text.tokenizer import Tokenizer


class Intake:
    """What all requests of an engine have to keep to.

    num_blocks, block_size: the pool. max_logprobs: how many a request may ask for; -1: any number.
    seed: for the requests that have none of their own.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...], max_model_len: int,
        num_blocks: int, block_size: int, max_logprobs: int, seed: int | None,
    ):  # fmt: skip
        self.tokenizer, self.vocab_size, self.eos_token_ids = tokenizer, vocab_size, frozenset(eos_token_ids)
        self.max_model_len, self.num_blocks, self.block_size = max_model_len, num_blocks, block_size
        self.max_logprobs = max_logprobs
        self.grammars = Grammars(tokenizer.backend, vocab_size, self.eos_token_ids)
        self._random, self._arrivals = random.Random(seed), count()

    def request(
        self, prompt: Prompt, params: Params, request_id: str | None, cache_salt: str | None, taken: Container[str]
    ) -> Request:
        """A request that has its place in the order of arrivals. taken: ids that are in use."""
        params.check(self.vocab_size, self.max_logprobs)
        if cache_salt is not None and (not isinstance(cache_salt, str) or not cache_salt):
            raise ValueError(f"cache_salt={cache_salt!r}: must be None or a string that is not empty")
        if request_id is not None and not (isinstance(request_id, str) and request_id):
            raise ValueError(f"request_id={request_id!r}: must be None or a string that is not empty")
        if request_id in taken:
            raise ValueError(f"request_id {request_id!r} is in use")
        keep = kept_tokens(params, self.max_model_len)
        text, token_ids, own_salt = encode(prompt, self.tokenizer, self.vocab_size, keep)
        room = self.max_model_len - len(token_ids)
        if room < 1:
            raise RequestRefused(
                f"the prompt has {len(token_ids)} tokens, and with at least one output token "
                f"the most is {self.max_model_len} (max_model_len)"
            )
        grammar = self._grammar(params)
        seed, arrival = getattr(params, "seed", None), next(self._arrivals)
        request = Request(
            request_id=request_id or next(name for n in count(arrival) if (name := str(n)) not in taken),
            arrival=arrival,
            prompt_token_ids=token_ids,
            params=params,
            max_tokens=min(params.max_tokens or room, room),
            eos_token_ids=self.eos_token_ids,
            seed=self._random.getrandbits(63) if seed is None else seed,
            prompt=text,
            cache_salt=own_salt or cache_salt,
            bad_word_ids=bad_word_ids(params, self.tokenizer),
            grammar=grammar,
        )
        if params.max_tokens is None:  # as many as there is room for, in the pool too
            most = request.most_tokens(self.num_blocks, self.block_size)
            request.max_tokens = max(1, min(room, most))
        return request

    def _grammar(self, params: Params) -> Grammar | None:
        """Compiling takes long, milliseconds to a second; it needs no lock of the engine's."""
        asked = params.structured_outputs if isinstance(params, SamplingParams) else None
        if asked is None:
            return None
        if not (self.eos_token_ids or params.stop_token_ids):
            raise ValueError("structured_outputs: the model has no end-of-text token to end it; give stop_token_ids")
        return self.grammars.compile(asked)
