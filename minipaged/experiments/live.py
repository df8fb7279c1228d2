"""The paper's comparison, live: three memory systems, one engine, one model, this machine, this clock.

The systems stand in live_systems.py. All get the same requests, with the lengths of ShareGPT's scaled to a model
length that a small machine can compute: by max_model_len / 2048, so that a request is as small beside what is
reserved for it as in the paper. Systems take turns at each rate, since a machine's speed drifts.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from random import Random

import torch

from minipaged.bench.report import machine
from minipaged.experiments.live_client import Client
from minipaged.experiments.live_report import LiveResult, LiveRow, report, summarize
from minipaged.experiments.live_systems import SYSTEMS, batch_size
from minipaged.experiments.loads import LONGEST, Job, jobs
from minipaged.llm import LLM

__all__ = ["QUICK", "LiveSettings", "load", "report", "run", "scaled_jobs"]

Progress = Callable[[str, float], None]  # called with: what is going on, and the share that is done, 0 to 1
MAX_NUM_SEQS = 256  # more than memory holds: it alone sets the limit
WARMUP = 8  # requests


@dataclass(frozen=True)
class LiveSettings:
    """What is compared, and on what. ValueError if a value can't be.

    model, dtype, device, kernels: see `LLM`.
    num_blocks, block_size: the memory for keys and values, the same for every system.
    max_model_len: tokens of prompt and answer together at most, and what static and contiguous reserve.
    rates: requests a second; math.inf: all at once. None: all at once, and then `shares` of the requests a second
        that the fastest system answered there. So the picture looks alike on slow machines and on fast ones.
    num_requests: at each rate. threads: None is PyTorch's choice.
    seed: of lengths, arrivals and tokens. The default's 32 requests have about the means that many more would have.
    """

    model: str = "smollm2"
    dtype: str = "fp32"
    device: str = "auto"
    kernels: str = "auto"
    num_blocks: int = 64
    block_size: int = 16
    max_model_len: int = 256
    rates: tuple[float, ...] | None = None
    shares: tuple[float, ...] = (0.25, 0.75, 2.0)
    num_requests: int = 32
    seed: int = 1
    threads: int | None = None
    systems: tuple[str, ...] = ("static", "contiguous", "paged")

    def __post_init__(self) -> None:
        for name, least in (("num_blocks", 1), ("block_size", 1), ("max_model_len", 2), ("num_requests", 1)):
            if type(value := getattr(self, name)) is not int or value < least:
                raise ValueError(f"{name}={value!r}: must be an integer of at least {least}")
        if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
            raise ValueError(f"threads={self.threads!r}: must be None or an integer of at least 1")
        for rate in self.rates or ():
            if not rate > 0:
                raise ValueError(f"rates: {rate!r} must be more than 0 (math.inf: all at once)")
        for share in self.shares:
            if not 0 < share < math.inf:
                raise ValueError(f"shares: {share!r} must be a number of more than 0")
        self._check_systems()

    def _check_systems(self) -> None:
        if unknown := [name for name in self.systems if name not in SYSTEMS]:
            raise ValueError(f"systems: {', '.join(unknown)}: must be of {', '.join(SYSTEMS)}")
        if not self.systems or len(set(self.systems)) < len(self.systems) or self.rates == ():
            raise ValueError(f"systems={self.systems}, rates={self.rates}: at least one of each, and no system twice")
        if not batch_size(self.num_blocks, self.block_size, self.max_model_len):
            piece = 1 << (self.num_blocks.bit_length() - 1)
            raise ValueError(
                f"num_blocks={self.num_blocks}: a request of max_model_len={self.max_model_len} reserves "
                f"{-(-self.max_model_len // self.block_size)} blocks of {self.block_size} tokens in one piece, and the "
                f"largest piece of a buddy allocator has {piece} here"
            )


QUICK = LiveSettings(num_requests=12, shares=(1.0,))


def scaled_jobs(settings: LiveSettings, rate: float) -> list[Job]:
    """The requests: the same lengths at every rate, and never more than max_model_len in all.

    >>> once, twice = (scaled_jobs(LiveSettings(num_requests=100), rate) for rate in (1.0, 2.0))
    >>> [job[1:] for job in once] == [job[1:] for job in twice], max(sum(job[1:]) for job in once) <= 256
    (True, True)
    >>> {job.arrival for job in scaled_jobs(LiveSettings(), math.inf)}
    {0.0}
    """
    count, length = settings.num_requests, settings.max_model_len
    drawn = jobs("sharegpt", 1.0, 2.0 * count + 100, settings.seed)[:count]  # twice as many as wanted, and more
    scaled = [[max(1, tokens * length // LONGEST) for tokens in job[1:]] for job in drawn]
    return [Job(job.arrival / rate, *sizes) for job, sizes in zip(drawn, scaled, strict=True)]


def run(settings: LiveSettings, progress: Progress) -> LiveResult:
    """Load the model once, and run every system at every rate. Prints nothing; Ctrl-C passes through.

    ValueError if the model can't be loaded, or reads less than max_model_len tokens.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    progress(f"loading {settings.model}", 0.0)
    llm = load(settings)
    random, given = Random(settings.seed), scaled_jobs(settings, math.inf)
    prompts = [[random.randrange(llm.config.vocab_size) for _ in range(job.prompt)] for job in given]
    _warm_up(llm, settings, prompts)
    rows = _compare(llm, settings, prompts, progress)
    return LiveResult(
        rows=rows,
        machine=machine(torch.get_num_threads())
        | {"device": llm.executor.device, "kernels": llm.executor.runner.backend.name},
        settings=asdict(settings) | {"rates": list(dict.fromkeys(row.rate for row in rows))},
        mean_prompt=sum(job.prompt for job in given) / len(given),
        mean_output=sum(job.output for job in given) / len(given),
        kv_bytes=settings.num_blocks * llm.block_bytes,
        most_contiguous=batch_size(settings.num_blocks, settings.block_size, settings.max_model_len),
    )


def _compare(llm: LLM, settings: LiveSettings, prompts: list[list[int]], progress: Progress) -> list[LiveRow]:
    """All systems at all rates. progress: as in `run`."""
    rates = list(settings.rates or (math.inf,))
    turns = len(settings.systems) * (len(rates) if settings.rates else 1 + len(settings.shares))
    rows: list[LiveRow] = []

    def tell(text: str, done: int) -> None:
        progress(text, (len(rows) + done) / turns)

    while rates:
        rows += _take_turns(llm, settings, rates.pop(0), prompts, tell)
        if settings.rates is None and len(rows) == len(settings.systems):  # now it is known what the machine can do
            best = max(row.num_requests / row.seconds for row in rows)
            rates = [float(f"{share * best:.2g}") for share in settings.shares]
    return rows


def load(settings: LiveSettings) -> LLM:
    """An engine with the model, and the memory that all systems share out. ValueError as in `run`."""
    llm = LLM(
        settings.model,
        dtype=settings.dtype,
        device=settings.device,
        kernels=settings.kernels,
        block_size=settings.block_size,
        num_blocks=settings.num_blocks,
        num_cpu_blocks=0,
        max_model_len=settings.max_model_len,
        prefix_cache="none",  # so that memory is all that differs
        max_num_seqs=MAX_NUM_SEQS,
    )
    if llm.max_model_len < settings.max_model_len:
        raise ValueError(f"max_model_len={settings.max_model_len}: {settings.model} reads {llm.max_model_len} tokens")
    return llm


def _warm_up(llm: LLM, settings: LiveSettings, prompts: list[list[int]]) -> None:
    """What is made once (threads, buffers, kernels) is made now: a few of the requests, cut short."""
    short = [prompt[: settings.max_model_len // 2] for prompt in prompts[:WARMUP]]
    given = [Job(0.0, len(prompt), min(4, settings.max_model_len - len(prompt))) for prompt in short]
    for name in settings.systems:
        Client(llm, SYSTEMS[name], given, short, settings.max_model_len).run()


def _take_turns(
    llm: LLM, settings: LiveSettings, rate: float, prompts: list[list[int]], progress: Callable[[str, int], None]
) -> list[LiveRow]:
    """All systems at one rate. progress: called with how many are done."""
    given = scaled_jobs(settings, rate)
    clients: dict[str, Client] = {}
    for done, name in enumerate(settings.systems):
        what = "all at once" if rate == math.inf else f"{rate:g} requests/s"
        progress(f"{what}: {name}", done)
        clients[name] = Client(llm, SYSTEMS[name], given, prompts, settings.max_model_len)
        clients[name].run()
    return [summarize(name, rate, client, clients.get("paged")) for name, client in clients.items()]
