"""What is answered, for /openapi.json: documentation. Answers are plain dicts, which nothing checks while it serves.

tests/test_server_api.py checks that they are what stands here, and nothing besides.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Finish = Literal["stop", "length", "abort", "error"]


class Told(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorInfo(Told):
    message: str
    type: str
    param: str | None = Field(description="the field that is wrong")
    code: int


class ErrorAnswer(Told):
    error: ErrorInfo


class CachedTokens(Told):
    cached_tokens: int = Field(description="tokens of prompts that were found in memory, or came from another engine")


class Usage(Told):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class PromptLogprob(Told):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionLogprobs(Told):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class Choice(Told):
    """What choices have in common. stop_reason: the stop string, or the id of one of stop_token_ids."""

    index: int
    finish_reason: Finish | None
    stop_reason: str | int | None = None
    token_ids: list[int] = Field(default=[], description="with return_token_ids=true")
    error: ErrorInfo | None = None


class CompletionChoice(Choice):
    text: str
    logprobs: CompletionLogprobs | None
    prompt_token_ids: list[int] = []
    prompt_logprobs: PromptLogprobs | None = None


class Answer(Told):
    id: str
    created: int
    model: str


class Completion(Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenLogprob(Told):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Told):
    content: list[ContentLogprob]


class Message(Told):
    role: Literal["assistant"]
    content: str


class ChatChoice(Choice):
    message: Message
    logprobs: ChatLogprobs | None


class ChatCompletion(Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] = []
    prompt_logprobs: PromptLogprobs | None = None


class Delta(Told):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChunkChoice(Choice):
    delta: Delta
    logprobs: ChatLogprobs | None


class ChatCompletionChunk(Answer):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] = []


class Model(Told):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class Models(Told):
    object: Literal["list"]
    data: list[Model]


class Tokenized(Told):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] = []


class Detokenized(Told):
    prompt: str


class Version(Told):
    version: str


class Nothing(Told):
    pass


WORDS = {
    400: "The request is wrong; param names the field.", 401: "The API key is missing or wrong.",
    404: "There is no such model.", 408: "The body did not come in time.", 413: "The body is too long.",
    429: "Too many wait: come again.", 500: "It could not be computed.",
    503: "The server is about to end, or the request waited for too long.",
}  # fmt: skip
RETRY = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}


def told(model: type[Told] | None, *errors: int, chunk: type[Told] | None = None) -> dict[int | str, dict[str, Any]]:
    """The answers of a route. chunk: what each event of a stream holds."""
    found: dict[int | str, dict[str, Any]] = {}
    if model:
        found[200] = {"model": model}
    if chunk:
        about = f"With stream=true: lines `data: {{...}}`, each a {chunk.__name__} or an error; then `data: [DONE]`."
        found[200] |= {"content": {"text/event-stream": {"itemSchema": _event(chunk)}}, "description": about}
    for status in errors:
        found[status] = {"model": ErrorAnswer, "description": WORDS[status]}
        if status in (429, 503):
            found[status]["headers"] = RETRY
    return found


CHUNKS: tuple[type[Told], ...] = (CompletionChunk, ChatCompletionChunk)  # what stands in events only


def _event(chunk: type[Told]) -> dict[str, Any]:
    refs = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in (chunk, ErrorAnswer)]
    json_text = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": refs}}
    return {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": [{"const": "[DONE]"}, json_text]}}}
