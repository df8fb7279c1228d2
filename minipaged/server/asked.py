"""From what a client asks to what the engine takes: prompts, and parameters for them."""

from typing import Any

from minipaged.requests.beam_search_params import BeamSearchParams
from minipaged.requests.sampling_params import RequestOutputKind, SamplingParams
from minipaged.server.errors import ApiError, bad_request
from minipaged.server.protocol import ChatCompletionRequest, CompletionRequest, Sampling, TokenizeRequest
from minipaged.text.inputs import Params, Prompt, chat_text, tokenize
from minipaged.text.tokenizer import Tokenizer

SAME_NAMES = (
    "n", "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos",
    "include_stop_str_in_output", "skip_special_tokens", "truncate_prompt_tokens", "allowed_token_ids", "bad_words",
    "prompt_logprobs",
)  # fmt: skip
OF_BEAMS = (
    "n", "max_tokens", "ignore_eos", "stop_token_ids", "skip_special_tokens", "length_penalty", "early_stopping",
)  # fmt: skip


def params_of(body: CompletionRequest | ChatCompletionRequest) -> Params:
    """SamplingParams, or BeamSearchParams with use_beam_search. ValueError: see `refusal`."""
    fields = _given(body, SAME_NAMES)
    if isinstance(body, ChatCompletionRequest):
        fields["max_tokens"] = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        if body.logprobs:
            fields["logprobs"] = body.top_logprobs or 0
    else:
        fields |= _given(body, ("logprobs",))
        if body.echo and body.logprobs is not None:
            fields.setdefault("prompt_logprobs", body.logprobs)
        if body.echo and body.max_tokens == 0:
            fields["max_tokens"] = 1  # it is drawn, and not told
    if (structured := _structured(body)) is not None:
        fields["structured_outputs"] = structured
    if body.kv_transfer_params:
        fields["extra_args"] = {"kv_transfer_params": body.kv_transfer_params}
    if body.use_beam_search:
        return _beams(body, fields)
    kind = RequestOutputKind.CUMULATIVE if body.stream else RequestOutputKind.FINAL_ONLY
    return SamplingParams(**fields, output_kind=kind)


def refusal(error: ValueError, body: CompletionRequest | ChatCompletionRequest) -> ApiError:
    """What the engine says no to, by the names of the fields that were sent."""
    names = {"sequences": "n" if body.beam_width is None else "beam_width"}
    if isinstance(body, ChatCompletionRequest):
        names["logprobs"] = "top_logprobs"
        if body.max_tokens is None:
            names["max_tokens"] = "max_completion_tokens"
    elif body.echo and body.prompt_logprobs is None:
        names["prompt_logprobs"] = "logprobs"
    if body.use_beam_search and body.beam_width is None:
        names["beam_width"] = "n"
    if body.structured_outputs is None:
        names |= {"structured_outputs": "response_format", "structured_outputs.json_object": "response_format"}
        names["structured_outputs.json"] = "response_format.json_schema.schema"
    return bad_request(error, names, "messages" if isinstance(body, ChatCompletionRequest) else "prompt")


def _given(body: Sampling, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(body, name)) is not None}


def _beams(body: Sampling, fields: dict[str, Any]) -> BeamSearchParams:
    """Fields that are for draws must ask for nothing: nothing is drawn, so any seed is right."""
    nothing = {name: getattr(SamplingParams(), name) for name in SAME_NAMES} | {"seed": fields.get("seed")}
    for name, value in fields.items():
        greedy = name == "temperature" and value == 0
        neutral = value == nothing.get(name) or greedy or value in ([], {})
        if name not in (*OF_BEAMS, "extra_args") and not neutral:
            raise ValueError(f"{name}: not with use_beam_search")
    taken = {name: fields[name] for name in ("max_tokens", "extra_args") if name in fields}
    width = body.beam_width if body.beam_width is not None else body.n or 1
    return BeamSearchParams(beam_width=width, **_given(body, OF_BEAMS) | taken)


def _structured(body: Sampling) -> dict[str, Any] | None:
    """What SamplingParams(structured_outputs=...) takes."""
    if body.structured_outputs is not None:
        return body.structured_outputs.model_dump(by_alias=True, exclude_none=True)
    asked = body.response_format
    if asked is None or asked.type == "text":
        return None
    return {"json": asked.json_schema.schema_} if asked.json_schema else {"json_object": True}


def prompts_of(body: CompletionRequest, tokenizer: Tokenizer) -> list[Prompt]:
    """One or many; as text or token ids."""
    given: Any = body.prompt
    prompts: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if not prompts:
        raise ValueError("prompt: must be a text, a list of token ids, or a list of one of these")
    if body.add_special_tokens is False:
        return [_with_ids(one, tokenizer) if isinstance(one, str) else one for one in prompts]
    return prompts


def _with_ids(text: str, tokenizer: Tokenizer) -> Prompt:
    return {"prompt": text, "prompt_token_ids": tokenize(text, tokenizer, add_special_tokens=False)}


def conversation_of(body: ChatCompletionRequest | TokenizeRequest, tokenizer: Tokenizer) -> Prompt:
    text = chat_text(body.messages or [], tokenizer, body.add_generation_prompt is not False)
    return {"prompt": text, "prompt_token_ids": tokenize(text, tokenizer, body.add_special_tokens is True)}
