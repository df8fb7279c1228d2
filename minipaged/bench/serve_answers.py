"""What clients are told, and what they bring back: plain data, so that figures can be made of it anywhere."""

from dataclasses import dataclass, field

CAN_NOT_CONNECT, BROKEN_OFF, TOO_SLOW = "can't connect", "broken off", "timed out"
WRONG_LENGTH, NO_SENSE, NOT_SENT = "wrong length", "no sense", "not sent"


@dataclass(frozen=True)
class Arrivals:
    """When the requests of a load are sent: as `clients` come free, or at `times`, in seconds from the beginning."""

    label: str
    clients: int | None = None
    times: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Target:
    """url: up to the port. model: by the name that the server has for it. patience: seconds without a byte."""

    url: str
    model: str
    patience: float = 600.0


@dataclass
class Answer:
    """What became of one request. Times are seconds of one clock.

    times: when tokens came, one for each event that brought some. num_tokens: what the server counted, or what came.
    failure: its kind, or None; said: more about it.
    """

    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    num_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    failure: str | None = None
    said: str = ""


@dataclass
class Played:
    """A load that was sent. seconds: from the first request to the end of the last.

    cpu_seconds: of this process. most_open: connections at once, the most there were.
    """

    answers: list[Answer]
    seconds: float
    cpu_seconds: float
    most_open: int
