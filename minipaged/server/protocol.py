"""What may be asked: OpenAI's fields, and vLLM's beyond them. What isn't here is refused, by its name.

A field that is known elsewhere may still be given a value that asks for nothing: see elsewhere.py.
"""

import difflib
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from minipaged.server.elsewhere import INSTEAD, OF_CHATS, OF_COMPLETIONS, OF_TEMPLATES, Neutral, asks_for_nothing

# Lists are read up to their first mistake: a million of them would take seconds, and a gigabyte. They have limits where
# each further one costs something in every step, that all who are in it pay for, or is a request of its own.
Ids = Annotated[list[int], Field(fail_fast=True)]
Few = Annotated[list[str], Field(fail_fast=True, max_length=64)]
Texts = Annotated[list[str], Field(fail_fast=True, max_length=1024)]
FewIds = Annotated[list[int], Field(fail_fast=True, max_length=1024)]
ManyIds = Annotated[list[int], Field(fail_fast=True, max_length=2**18)]
Prompts = Annotated[list[Ids], Field(fail_fast=True, max_length=1024)]
Messages = Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=4096)]
Name = Annotated[str, Field(pattern=r"^[!-~]{1,200}$")]  # it stands in the log, among others


class Strict(BaseModel):
    """Types are taken at their word, and no field is passed over."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)
    ELSEWHERE: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        names = {field.alias or name for name, field in cls.model_fields.items()}
        for name in data.keys() - names:
            if name not in cls.ELSEWHERE:
                near = difflib.get_close_matches(name[:40], names, 1)
                meant = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"{name[:200]}: there is no such field{meant}")
            if not asks_for_nothing(data[name], cls.ELSEWHERE[name]):
                why = f": {INSTEAD[name]}" if name in INSTEAD else ""
                raise ValueError(f"{name}: is not supported by this server{why}")
        return {name: value for name, value in data.items() if name in names}


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(Strict):
    """name, description and strict are OpenAI's: an output keeps to the schema in any case."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _a_schema_if_one_is_meant(self) -> Self:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("json_schema: must have a schema")
        if self.type != "json_schema" and self.json_schema is not None:
            raise ValueError('json_schema: only with type="json_schema"')
        return self


class StructuredOutputs(Strict):
    """vLLM's: one of the first five. See StructuredOutputsParams."""

    ELSEWHERE = {"disable_additional_properties": (None, False), "structural_tag": (None,)}
    json_: str | dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None


class Sampling(Strict):
    """What /v1/completions and /v1/chat/completions have in common. None: the default of SamplingParams."""

    model: str | None = None
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: str | Few | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=1024)] | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: FewIds | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: int | None = None
    allowed_token_ids: ManyIds | None = None
    bad_words: Texts | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    kv_transfer_params: dict[str, Any] | None = None
    request_id: Name | None = None
    use_beam_search: bool | None = None
    # ours, of beam search: see BeamSearchParams
    beam_width: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None

    @model_validator(mode="after")
    def _options_belong_together(self) -> Self:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options: only with stream=true")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs: not with stream=true")
        for name in ("beam_width", "length_penalty", "early_stopping"):
            if getattr(self, name) is not None and not self.use_beam_search:
                raise ValueError(f"{name}: only with use_beam_search=true")
        if self.stream and (self.kv_transfer_params or {}).get("do_remote_decode"):
            raise ValueError("kv_transfer_params: do_remote_decode is not for stream=true: the whole answer says where")
        if self.response_format and self.response_format.type != "text" and self.structured_outputs:
            raise ValueError("structured_outputs: response_format says the same thing; give one of them")
        return self


class CompletionRequest(Sampling):
    ELSEWHERE = OF_COMPLETIONS
    prompt: str | Texts | Ids | Prompts
    logprobs: int | None = None
    echo: bool | None = False

    @model_validator(mode="after")
    def _blocks_are_of_one_prompt(self) -> Self:
        several = isinstance(self.prompt, list) and len(self.prompt) > 1 and not isinstance(self.prompt[0], int)
        if self.kv_transfer_params and several:
            raise ValueError("kv_transfer_params: they are of one prompt; send the others by themselves")
        return self


class ChatCompletionRequest(Sampling):
    ELSEWHERE = OF_CHATS
    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = True

    @model_validator(mode="after")
    def _logprobs_belong_together(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens: max_completion_tokens says something else; give one of them")
        return self


class TokenizeRequest(Strict):
    """One of prompt and messages."""

    ELSEWHERE = OF_TEMPLATES
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = True
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either prompt or messages")
        return self


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: ManyIds


class AbortRequest(Strict):
    request_id: str | Texts
