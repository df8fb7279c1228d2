"""The account of the engine: what the memory holds and held, what was done, where the time went."""

from dataclasses import dataclass, field

from minipaged.memory import MemoryUsage
from minipaged.scheduling.admission import PrefixCounts
from minipaged.scheduling.speculation import SpeculationCounts
from minipaged.scheduling.transfer import TransferCounts


@dataclass
class Peak:
    """The moment at which most blocks were in use."""

    usage: MemoryUsage | None = None
    contiguous_blocks: int = 0  # what contiguous reservation would have taken at that moment

    def record(self, usage: MemoryUsage, contiguous_blocks: int) -> None:
        if self.usage is None or usage.used > self.usage.used:
            self.usage, self.contiguous_blocks = usage, contiguous_blocks


@dataclass
class Times:
    """Seconds since the beginning, by what they were spent on."""

    schedule: float = 0.0
    prepare: float = 0.0  # memory moves and batch building
    draft: float = 0.0  # guessing, by a draft model or a head
    model: float = 0.0
    sample: float = 0.0
    update: float = 0.0
    text: float = 0.0


@dataclass
class Totals:
    """What was done since the beginning."""

    num_steps: int = 0
    num_finished: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0


@dataclass(frozen=True)
class EngineStats:
    """What `LLM.stats` says. Memory is counted in blocks of block_bytes bytes."""

    memory: MemoryUsage
    peak: Peak
    block_bytes: int
    contiguous_blocks: int  # what contiguous reservation to the maximum length would take now
    num_waiting: int
    num_running: int
    num_swapped: int
    num_finished: int
    num_steps: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_preemptions: dict[str, int] = field(default_factory=dict)
    prefix_cache: str = "none"
    prefixes: PrefixCounts = field(default_factory=PrefixCounts)
    times: Times = field(default_factory=Times)
    speculation: SpeculationCounts | None = None  # None: nothing is guessed
    transfers: TransferCounts = field(default_factory=TransferCounts)

    @property
    def prefix_hit_rate(self) -> float:
        """The share of the prompt tokens looked for that were found in the prefix cache."""
        return self.prefixes.found / max(1, self.prefixes.queried)
