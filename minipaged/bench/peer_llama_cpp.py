"""llama.cpp as a contender, through its C interface, which the package llama-cpp-python wraps.

Runs in an environment that need not have our packages. llama.cpp computes with the weights as the .gguf file stores
them (Q4_1, say), whatever dtype the others run in, and keeps keys and values in fp16, its default.

Its batch is much like ours: a row of tokens, each with its sequence and position. What a server does with it stands
here: each step takes one token of every sequence that generates, and fills up with prompts. All requests run at once,
in a cache that holds them whole. A beginning that prompts share is computed for each of them: llama.cpp's own server
finds only what the same slot had before.
"""

import ctypes
import time
from dataclasses import dataclass

import llama_cpp
import numpy as np

from minipaged.bench.contenders import BLOCK_SIZE, Options
from minipaged.bench.loads import Load, Run

MAX_BATCH_TOKENS = 512


@dataclass
class Sequence:
    """A request: prompt and output so far, of which `computed` tokens stand in the cache. length: in the end."""

    number: int
    tokens: list[int]
    length: int
    computed: int = 0
    first_token: float = 0.0


@llama_cpp.llama_log_callback
def _be_quiet(level, text, data) -> None:
    """Takes llama.cpp's log, and drops it."""


class LlamaCpp:
    """kv_bytes: its cache, made to fit the largest load."""

    def __init__(self, options: Options):
        llama_cpp.llama_log_set(_be_quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            options.model.encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"it can't load {options.model}")
        self.context = llama_cpp.llama_init_from_model(self.model, settings(options))
        if not self.context:
            raise RuntimeError(f"it can't make a cache for {options.most_requests} requests")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(MAX_BATCH_TOKENS, 0, 1)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        half = {"fp32": 2, "bf16": 1, "fp16": 1}[options.dtype]  # of the others' bytes for keys and values
        self.kv_bytes = llama_cpp.llama_n_ctx(self.context) * options.kv_bytes_per_token // half
        self.about = (
            f"llama-cpp-python {llama_cpp.__version__}, whatever the dtype: the weights as the file has them "
            f"({self._description()}), keys and values in fp16"
        )

    def _description(self) -> str:
        """Architecture, size and quantization."""
        text = ctypes.create_string_buffer(200)
        llama_cpp.llama_model_desc(self.model, text, len(text))
        return text.value.decode()

    def run(self, load: Load) -> Run:
        llama_cpp.llama_memory_clear(self.memory, True)
        requests = zip(load.prompts, load.lengths, strict=True)
        began = time.perf_counter()
        sequences = [Sequence(i, list(prompt), length) for i, (prompt, length) in enumerate(requests)]
        running = list(sequences)
        while running:
            self._step(running)
            running = [sequence for sequence in running if len(sequence.tokens) < sequence.length]
        seconds = time.perf_counter() - began
        return Run(
            tokens=[s.tokens[len(prompt) :] for s, prompt in zip(sequences, load.prompts, strict=True)],
            seconds=seconds,
            first_token=[sequence.first_token - began for sequence in sequences],
            kv_bytes=self.kv_bytes,
        )

    def _step(self, running: list[Sequence]) -> None:
        """One batch: those that generate first, then as much of the prompts as has room."""
        self.batch.n_tokens = 0
        rows = []  # (sequence that is computed to its end, the row in the batch of its last token)
        for sequence in sorted(running, key=lambda s: s.computed + 1 < len(s.tokens)):
            end = min(len(sequence.tokens), sequence.computed + MAX_BATCH_TOKENS - self.batch.n_tokens)
            for position in range(sequence.computed, end):
                self._add(sequence, position)
            sequence.computed = end
            if end == len(sequence.tokens):
                rows.append((sequence, self.batch.n_tokens - 1))
        status = llama_cpp.llama_decode(self.context, self.batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        for sequence, row in rows:
            sequence.tokens.append(self._most_likely(row))
            sequence.first_token = sequence.first_token or time.perf_counter()
            if len(sequence.tokens) == sequence.length:
                llama_cpp.llama_memory_seq_rm(self.memory, sequence.number, -1, -1)

    def _add(self, sequence: Sequence, position: int) -> None:
        batch, row = self.batch, self.batch.n_tokens
        batch.token[row] = sequence.tokens[position]
        batch.pos[row] = position
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = sequence.number
        batch.logits[row] = position + 1 == len(sequence.tokens)
        batch.n_tokens = row + 1

    def _most_likely(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())


def settings(options: Options):
    """llama.cpp's defaults, but for the sizes, the threads, and one cache for all sequences: measured to be no slower
    than one for each, and smaller.
    """
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = options.most_blocks * BLOCK_SIZE
    settings.kv_unified = True
    settings.n_batch = settings.n_ubatch = MAX_BATCH_TOKENS
    settings.n_seq_max = options.most_requests
    settings.n_threads = settings.n_threads_batch = options.threads
    return settings
