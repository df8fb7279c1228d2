"""Outputs of a form: which tokens a JSON schema, a regex, a list of choices or a grammar allows next.

`Grammars` compiles what a request asks for; of what it compiled, a `Matcher` follows one sequence and gives the mask
that lies over its logits (step 1 of sampling.py). The work on grammars is llguidance's, which walks a trie of the
bytes of all tokens. What is to be known:

- A mask is a function of the output's tokens alone. A matcher remembers which it has consumed; asked for others, it
  rolls back to what they have in common. So nobody tells it of forks, preemptions, wrong guesses, or of a step that
  was broken off.
- Where the text that must follow is certain, only the token is allowed that the tokenizer would write it with; and of
  several tokens for the same bytes only one ever is.
- The model's end-of-text tokens may come where the grammar may end, and nowhere else. So may a request's own
  stop_token_ids; elsewhere those come if they are a text that fits. Where it must end, nothing else may come.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import Any

from minipaged.requests.structured_outputs import Mask, StructuredOutputsParams

MOST_COMPILED = 64  # that are kept. A large one takes some MB and half a second
MOST_CHARACTERS = 256 * 1024  # of a grammar. llguidance calls itself for a rule in a rule, some KB of stack each time:
STACK_BYTES = 512 * 1024 * 1024  # it ends the process where the stack ends. Of what isn't touched nothing is taken
SECONDS = 10.0  # that one may take to compile
AT_A_TIME = 4  # so many are compiled
END = "<|the end of all texts, for llguidance|>"


class Grammars:
    """Compiles grammars for one model, each once. It may be used from several threads at a time.

    backend: a tokenizers.Tokenizer, byte-level or with byte fallback. vocab_size, eos_token_ids: the model's.
    """

    def __init__(self, backend: Any, vocab_size: int, eos_token_ids: Collection[int] = ()):
        self._backend, self._vocab_size, self._eos_token_ids = backend, vocab_size, eos_token_ids
        self._tokenizer: Any = None  # llguidance's, which takes a second to build
        self._compiled: OrderedDict[StructuredOutputsParams, Grammar] = OrderedDict()
        # Ctrl-C may strike between a lock and its release: then the same thread must still be able to go on.
        self._lock, self._building = threading.RLock(), threading.RLock()
        self._compiling = threading.Semaphore(AT_A_TIME)  # only threads that no signal reaches wait for it

    def compile(self, params: StructuredOutputsParams) -> "Grammar":
        """ValueError names the field, and says in one line what is wrong or not supported.

        No lock is held meanwhile: two that compile the same at once both do, and nobody waits for a large one.
        """
        with self._lock:
            if params in self._compiled:
                self._compiled.move_to_end(params)
                return self._compiled[params]
        tokenizer = self._for_llguidance()
        try:
            _must_be_short(params)
            found = self._apart(lambda: Grammar(tokenizer, _source(params)))
        except ValueError as error:
            raise ValueError(f"structured_outputs.{params.kind}: {_one_line(str(error))}") from None
        with self._lock:
            self._compiled[params] = found
            while len(self._compiled) > MOST_COMPILED:
                self._compiled.popitem(last=False)
        return found

    def _apart(self, work: Callable[[], "Grammar"]) -> "Grammar":
        """In a thread with a deep stack. It can't be broken off: who has waited for long enough leaves it alone."""
        found: Future[Grammar] = Future()
        begun = threading.Event()

        def do() -> None:
            if self._compiling.acquire(timeout=SECONDS):  # else who asked has stopped waiting, too
                begun.set()
                try:
                    found.set_result(work())
                except BaseException as error:
                    found.set_exception(error)
                finally:
                    self._compiling.release()

        with self._building:
            before = threading.stack_size(STACK_BYTES)
            try:
                threading.Thread(target=do, name="grammar", daemon=True).start()
            finally:
                threading.stack_size(before)
        try:
            return found.result(SECONDS)
        except TimeoutError:
            what = "compiling it takes" if begun.is_set() else "others are being compiled, for"
            raise ValueError(f"{what} more than {SECONDS:g} s") from None

    def _for_llguidance(self) -> Any:
        """It wants to know of an end-of-text token: if the model has none, one is added."""
        import llguidance

        with self._building:
            if self._tokenizer is None:
                backend = type(self._backend).from_str(self._backend.to_str())
                ends = [t for t in self._eos_token_ids if backend.id_to_token(t) is not None]
                largest = max(backend.get_vocab().values())
                try:
                    if not ends:
                        backend.add_special_tokens([END])
                        ends = [backend.token_to_id(END)]
                        if ends[0] <= largest:
                            raise ValueError("it has no end-of-text token, and no room for one")
                    size = 1 + max(self._vocab_size - 1, largest, *ends)
                    self._tokenizer = llguidance.LLTokenizer(backend.to_str(), n_vocab=size, eos_token=ends)
                except ValueError as error:
                    raise ValueError(f"structured_outputs: not with this model's tokenizer: {error}") from None
            return self._tokenizer


def _must_be_short(params: StructuredOutputsParams) -> None:
    size = sum(map(len, (params.json or "", params.regex or "", params.grammar or "", *(params.choice or ()))))
    if size > MOST_CHARACTERS:
        raise ValueError(f"it has {size} characters, and may have {MOST_CHARACTERS}")


def _source(params: StructuredOutputsParams) -> str:
    """What is asked, in llguidance's form."""
    import llguidance

    if params.kind.startswith("json"):
        options: Any = {"whitespace_flexible": not params.disable_any_whitespace, "lenient": False}
        if params.whitespace_pattern:
            options["whitespace_pattern"] = params.whitespace_pattern
        schema: Any = params.json or '{"type": "object"}'
        return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=options)
    if params.choice:
        rule = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in params.choice)
        return llguidance.LLMatcher.grammar_from_lark(f"start: {rule}")
    if params.regex:
        return llguidance.LLMatcher.grammar_from_lark(f"start: /{llguidance.regex_to_lark(params.regex, 'dw')}/")
    return llguidance.grammar_from("grammar", params.grammar or "")


def _one_line(error: str) -> str:
    """Without the pictures that llguidance draws of where it is."""
    first, *more = error.splitlines() or ["it can't be compiled"]
    return " ".join([first, *(line for line in more if line.startswith("error"))])[:300]


class Grammar:
    """A compiled one: where every matcher starts. ValueError if llguidance can't compile it."""

    def __init__(self, tokenizer: Any, source: str):
        import llguidance

        self._start = llguidance.LLMatcher(tokenizer, source, log_level=0)
        if self._start.is_error():
            raise ValueError(self._start.get_error())
        self.end_ids = tokenizer.eos_tokens
        self._start.compute_bitmask()  # what the first mask has to build is built once, and copied

    def start(self) -> Any:
        return self._start.deep_copy()


class Matcher:
    """Where one sequence stands in a grammar."""

    def __init__(self, grammar: Grammar):
        self.grammar = grammar
        self._state = grammar.start()
        self._consumed: list[int] = []

    def masks(self, output: Sequence[int], guesses: Sequence[int], end_ids: Collection[int]) -> list[Mask]:
        """For what comes behind the output, and behind each guess; none behind one that isn't allowed, or an end."""
        found = [self.mask(output, end_ids)]
        for place, guess in enumerate(guesses):
            if guess in end_ids or not is_allowed(found[-1], guess):
                break
            found.append(self.mask([*output, *guesses[: place + 1]], end_ids))
        return found

    def mask(self, output: Sequence[int], end_ids: Collection[int]) -> Mask:
        """For what comes behind the output, in which no token of end_ids stands."""
        self._go_to(list(output))
        bits = bytearray(self._state.compute_bitmask())
        if self._state.is_error():
            return Mask(b"", _one_line(self._state.get_error()))
        for token in self.grammar.end_ids:
            bits[token // 8] &= ~(1 << token % 8)
        if self._state.is_accepting():
            for token in end_ids:
                if token < 8 * len(bits):
                    bits[token // 8] |= 1 << token % 8
        return Mask(bytes(bits))

    def _go_to(self, tokens: list[int]) -> None:
        common = len(self._consumed)
        if tokens[:common] != self._consumed:
            pairs = zip(tokens, self._consumed, strict=False)
            common = next((i for i, (new, old) in enumerate(pairs) if new != old), min(len(tokens), common))
            if not self._state.rollback(len(self._consumed) - common):
                self._state, common = self.grammar.start(), 0
        self._state.consume_tokens(tokens[common:])
        self._consumed = tokens


def is_allowed(mask: Mask, token: int) -> bool:
    return token // 8 < len(mask.bits) and bool(mask.bits[token // 8] >> token % 8 & 1)
