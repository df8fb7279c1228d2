"""What a server is told: who may ask, and how much."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerConfig:
    """
    model_names: by which the model may be asked for; the first is the one that is told.
    api_keys: any of them opens what asks for one; none: everybody may ask.
    allowed_origins: pages of these origins may ask from a browser (CORS); "*": of all.
    header_seconds: how long a request's headers may take to come.
    max_body_bytes, body_seconds: of a request's body: how long, and how long it may take to come.
    max_queued_requests, max_queued_tokens: who comes when so many wait gets 429; tokens of prompts.
    max_queue_seconds: who waited so long gets 503.
    send_seconds: a reader who takes nothing for so long is left.
    drain_seconds: after SIGTERM, those under way have so long to end.
    log_text: prompts and answers go into the log, too.
    page: whether / shows one.
    """

    model_names: tuple[str, ...] = ("smollm2",)
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    header_seconds: float = 30.0
    max_body_bytes: int = 4 * 1024 * 1024
    body_seconds: float = 30.0
    max_queued_requests: int = 1024
    max_queued_tokens: int = 1024 * 1024
    max_queue_seconds: float = 300.0
    send_seconds: float = 60.0
    drain_seconds: float = 30.0
    log_text: bool = False
    page: bool = True
