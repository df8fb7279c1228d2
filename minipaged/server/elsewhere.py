"""Fields that OpenAI's or vLLM's API has and this server has not: with which values they ask for nothing, and why not.

Clients send such values, and they do no harm. Any other is refused, so that nobody believes that it did something.
"""

from collections.abc import Mapping
from typing import Any

# A type instead of a value: all of its kind. Such fields tell the server something that no answer depends on.
Neutral = Mapping[str, tuple[Any, ...]]
HINT = (None, str)

OF_BOTH: Neutral = {
    "ec_transfer_params": (None, {}),
    "logits_processors": (None, []), "logprob_token_ids": (None, []), "metadata": (None, {}),
    "mm_payload": (None, "tensors", "none"), "mm_processor_kwargs": (None, {}), "priority": (None, 0),
    "repetition_detection": (None,), "return_mm_kwargs": (None, bool), "return_token_offsets": (None, False),
    "return_tokens_as_token_ids": (None, False), "routed_experts_prompt_start": (None, 0), "session_id": HINT,
    "spaces_between_special_tokens": (None, True), "store": (None, False), "stream_interval": (None, 1),
    "thinking_token_budget": (None, -1), "truncation_side": (None, "left"), "vllm_xargs": (None, {}),
    "watermarking": (None, False), "safety_identifier": HINT, "prompt_cache_key": HINT,
    "prompt_cache_retention": (None, "in_memory", "in-memory"), "prompt_cache_options": (None, {}),
    "service_tier": (None, "auto", "default"), "guided_json": (None,), "guided_regex": (None,),
    "guided_choice": (None, []), "guided_grammar": (None,), "guided_json_object": (None, False),
    "guided_decoding_backend": (None,), "guided_whitespace_pattern": (None,),
}  # fmt: skip
OF_COMPLETIONS: Neutral = {
    **OF_BOTH, "suffix": (None, ""), "best_of": (None, 1), "max_completion_tokens": (None,),
    "prompt_embeds": (None, []),
}  # fmt: skip
OF_TEMPLATES: Neutral = {
    "chat_template": (None,), "chat_template_kwargs": (None, {}), "continue_final_message": (None, False),
    "documents": (None, []), "media_io_kwargs": (None, {}), "mm_processor_kwargs": (None, {}), "tools": (None, []),
}  # fmt: skip
OF_CHATS: Neutral = {
    **OF_BOTH, **OF_TEMPLATES, "audio": (None,), "echo": (None, False), "function_call": (None, "none", "auto"),
    "functions": (None, []), "include_reasoning": (None, bool), "modalities": (None, ["text"]), "moderation": (None,),
    "parallel_tool_calls": (None, bool), "prediction": (None,), "reasoning_effort": (None, "none"),
    "return_prompt_text": (None, False), "tool_choice": (None, "none", "auto"), "verbosity": (None, "medium"),
    "web_search_options": (None,),
}  # fmt: skip

INSTEAD = {  # what does it here, or why nothing does
    "best_of": "n samples are all returned; use_beam_search searches",
    "continue_final_message": "put the beginning of the answer into a prompt of /v1/completions",
    "logprob_token_ids": "logprobs=-1 tells of every token, if the engine's max_logprobs allows",
    "max_completion_tokens": "it is max_tokens in /v1/completions",
    "priority": "requests are served in the order in which they come",
    "prompt_embeds": "give text or token ids",
    "truncation_side": "the last tokens are kept",
    "tools": "the model is not told of tools; response_format keeps an answer to a schema",
    **{f"guided_{kind}": f'it is structured_outputs={{"{kind}": ...}} here'
       for kind in ("json", "regex", "choice", "grammar", "json_object", "whitespace_pattern")},
}  # fmt: skip
INSTEAD["functions"] = INSTEAD["tools"]


def asks_for_nothing(value: Any, values: tuple[Any, ...]) -> bool:
    """
    >>> asks_for_nothing(False, (None, False)), asks_for_nothing(0, (None, False)), asks_for_nothing("x", HINT)
    (True, False, True)
    """
    for one in values:
        if type(value) is one if isinstance(one, type) else (type(value) is type(one) and value == one):
            return True
    return False
