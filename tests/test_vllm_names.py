"""The tables of minipaged/VLLM.md against vLLM's names and ours: what is there by them is there, and no more."""

import inspect
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from minipaged import (
    LLM,
    AsyncLLM,
    BeamSearchParams,
    CompletionOutput,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
)
from minipaged.execution.engine_args import ALIASES, EngineArgs
from minipaged.execution.speculative_config import SpeculativeConfig
from minipaged.requests.sampling_params import Logprob
from minipaged.server.app import create_app
from minipaged.server.config import ServerConfig
from minipaged.server.protocol import ChatCompletionRequest, CompletionRequest

TEXT = (Path(__file__).parents[1] / "minipaged" / "VLLM.md").read_text(encoding="utf-8")

# Read from vLLM 0.32. Of LLM(...) these are the arguments that it names itself; it takes those of EngineArgs besides.
VLLM = {
    "LLM(...)": """
        model runner convert tokenizer tokenizer_mode skip_tokenizer_init trust_remote_code allowed_local_media_path
        allowed_media_domains tensor_parallel_size dtype quantization revision tokenizer_revision chat_template seed
        gpu_memory_utilization cpu_offload_gb offload_group_size offload_num_in_group offload_prefetch_step
        offload_params enforce_eager enable_return_routed_experts return_sampling_mask disable_custom_all_reduce
        hf_token hf_overrides mm_processor_kwargs pooler_config structured_outputs_config profiler_config
        attention_config kv_cache_memory_bytes compilation_config quantization_config logits_processors spec_method
        spec_model spec_tokens""",
    "speculative_config": """
        enforce_eager num_speculative_tokens model method draft_tensor_parallel_size tensor_parallel_size quantization
        moe_backend attention_backend kv_cache_dtype max_model_len revision code_revision
        index_share_for_mtp_iteration disable_padded_drafter_batch disable_eagle_block_drop
        use_local_argmax_reduction use_heterogeneous_vocab prompt_lookup_max prompt_lookup_min parallel_drafting
        target_model_config target_parallel_config num_speculative_tokens_per_batch_size draft_model_config
        draft_parallel_config suffix_decoding_max_tree_depth suffix_decoding_max_cached_requests
        suffix_decoding_max_spec_factor suffix_decoding_min_token_prob draft_load_config rejection_sample_method
        synthetic_acceptance_rates synthetic_acceptance_length enable_adaptive_verification draft_sample_method
        dspark_draft_topk""",
    "Methods of LLM": """
        generate chat beam_search get_tokenizer reset_prefix_cache enqueue enqueue_chat wait_for_completion get_metrics
        get_default_sampling_params get_world_size collective_rpc apply_model from_engine_args sleep wake_up
        release_kv_cache_memory start_profile stop_profile reset_mm_cache""",
    "Methods of AsyncLLM": """
        from_vllm_config from_engine_args shutdown get_num_unfinished_requests get_num_queued_tokens check_admission
        get_supported_tasks add_request generate abort notify_kv_transfer_request_rejected pause_generation
        resume_generation is_paused encode tokenizer get_tokenizer is_tracing_enabled do_log_stats check_health
        start_profile stop_profile reset_mm_cache reset_prefix_cache reset_encoder_cache sleep
        release_kv_cache_memory wake_up checkpoint_prepare checkpoint_restore is_sleeping compute_weight_checksums
        add_lora remove_lora list_loras pin_lora collective_rpc wait_for_requests_to_drain scale_elastic_ep
        handle_fault get_status is_running is_stopped errored dead_error init_weight_transfer_engine
        shutdown_weight_transfer_engine start_weight_update start_draft_weight_update update_weights
        finish_weight_update update_weight_version get_weight_version get_kv_event_sources""",
    "Arguments of generate": """
        prompts sampling_params use_tqdm lora_request priority tokenization_kwargs mm_processor_kwargs""",
    "SamplingParams": """
        n presence_penalty frequency_penalty repetition_penalty temperature watermarking top_p top_k min_p seed stop
        stop_token_ids ignore_eos max_tokens min_tokens logprobs prompt_logprobs prompt_logprob_token_ids
        prompt_logprob_start logprob_token_ids flat_logprobs detokenize skip_special_tokens
        spaces_between_special_tokens include_stop_str_in_output output_kind stream_interval skip_clone
        output_text_buffer_length structured_outputs logit_bias allowed_token_ids extra_args bad_words
        skip_reading_prefix_cache thinking_token_budget repetition_detection routed_experts_prompt_start
        trace_decode_token_ids""",
    "StructuredOutputsParams": """
        json regex choice grammar json_object disable_any_whitespace disable_additional_properties whitespace_pattern
        structural_tag""",
    "BeamSearchParams": """
        beam_width max_tokens ignore_eos temperature length_penalty include_stop_str_in_output structured_outputs
        skip_special_tokens watermarking""",
    "RequestOutput": """
        request_id prompt prompt_token_ids prompt_logprobs outputs finished metrics lora_request encoder_prompt
        encoder_prompt_token_ids num_cached_tokens num_cache_creation_tokens prompt_token_id_logprobs
        kv_transfer_params ec_transfer_params""",
    "CompletionOutput": """
        index text token_ids cumulative_logprob logprobs routed_experts finish_reason stop_reason lora_request
        sampling_mask spec_decode_metrics weight_versions""",
    "Logprob": "logprob rank decoded_token",
    "The server": """
        /abort_requests /classify /cohere/v2/chat /cohere/v2/chat/render /collective_rpc /detokenize /docs
        /fault_tolerance/apply /fault_tolerance/status /finish_weight_update /generative_scoring
        /get_world_size /health /inference/v1/generate /init_weight_transfer_engine /invocations /is_paused
        /is_scaling_elastic_ep /is_sleeping /kv_event_sources /load /metrics /pause /ping /pooling /ready
        /readyz /release_kv_cache_memory /rerank /reset_encoder_cache /reset_mm_cache /reset_prefix_cache
        /resume /scale_elastic_ep /score /server_info /shutdown_weight_transfer_engine /sleep
        /start_draft_weight_update /start_profile /start_weight_update /stop_profile /tokenize /tokenizer_info
        /update_weight_version /update_weights /v1/audio/transcriptions /v1/audio/translations
        /v1/chat/completions /v1/chat/completions/batch /v1/chat/completions/derender
        /v1/chat/completions/render /v1/completions /v1/completions/derender /v1/completions/render
        /v1/embeddings /v1/load_lora_adapter /v1/messages /v1/messages/count_tokens /v1/messages/render
        /v1/models /v1/rerank /v1/responses /v1/responses/render /v1/responses/{response_id}
        /v1/responses/{response_id}/cancel /v1/score /v1/systemone /v1/unload_lora_adapter /v2/embed /v2/rerank
        /version /wake_up /weight_checker /weight_info""",
    "Fields of /v1/completions": """
        model prompt echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream
        stream_options suffix temperature top_p user use_beam_search top_k min_p repetition_penalty
        watermarking length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens
        skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side
        allowed_token_ids prompt_logprobs logprob_token_ids bad_words prompt_embeds add_special_tokens
        response_format structured_outputs priority request_id session_id return_tokens_as_token_ids
        return_token_ids routed_experts_prompt_start return_token_offsets mm_payload return_mm_kwargs
        cache_salt kv_transfer_params ec_transfer_params vllm_xargs repetition_detection thinking_token_budget
        stream_interval""",
    "Fields of /v1/chat/completions": """
        messages model frequency_penalty logit_bias logprobs top_logprobs max_tokens max_completion_tokens n
        presence_penalty response_format seed stop stream stream_options temperature top_p tools tool_choice
        reasoning_effort thinking_token_budget include_reasoning parallel_tool_calls user use_beam_search top_k
        min_p repetition_penalty watermarking length_penalty stop_token_ids include_stop_str_in_output
        ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens
        truncation_side prompt_logprobs logprob_token_ids allowed_token_ids bad_words echo
        add_generation_prompt continue_final_message add_special_tokens documents chat_template
        chat_template_kwargs media_io_kwargs mm_processor_kwargs structured_outputs priority request_id
        session_id return_tokens_as_token_ids return_token_ids routed_experts_prompt_start return_token_offsets
        return_prompt_text mm_payload return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params
        vllm_xargs repetition_detection stream_interval""",
}
MORE = {"LLM(...)"}  # the table has names besides vLLM's own list: of EngineArgs
OURS = {
    "LLM(...)": EngineArgs,
    "speculative_config": SpeculativeConfig,
    "Methods of LLM": LLM,
    "Methods of AsyncLLM": AsyncLLM,
    "Arguments of generate": LLM.generate,
    "SamplingParams": SamplingParams,
    "StructuredOutputsParams": StructuredOutputsParams,
    "BeamSearchParams": BeamSearchParams,
    "RequestOutput": RequestOutput,
    "CompletionOutput": CompletionOutput,
    "Logprob": Logprob,
    "The server": create_app,
    "Fields of /v1/completions": CompletionRequest,
    "Fields of /v1/chat/completions": ChatCompletionRequest,
}
# The second table has what is not in the first one, or not the same.
BESIDES = {"Fields of /v1/chat/completions": "Fields of /v1/completions"}
COMPLETIONS_ONLY = {"prompt", "suffix", "prompt_embeds"}
NOT_LISTED = {"Methods of LLM", "Arguments of generate"}  # the table need not have all of ours

def names_of(section):
    """What we have."""
    ours = OURS[section]
    if section == "LLM(...)":
        return {field.name for field in fields(EngineArgs)} | ALIASES.keys()
    if section == "The server":
        config = SimpleNamespace(vocab_size=9)
        engine = SimpleNamespace(observers=[], config=config, max_model_len=9, tokenizer=None)
        app = create_app(SimpleNamespace(engine=engine), ServerConfig())
        return {re.sub(r":path", "", route.path) for route in app.routes} - {"/openapi.json", "/live"}
    if section.startswith("Fields of"):
        return {*ours.model_fields}
    if section == "Methods of AsyncLLM":
        return {name for name in dir(ours) if not name.startswith("_")} | {"engine", "waiting"}
    if section == "Methods of LLM":
        return {name for name in dir(ours) if not name.startswith("_")}
    if is_dataclass(ours):
        properties = {name for name, value in vars(ours).items() if isinstance(value, property)}
        hidden = {"greedy", "penalises", "stop_strings", "guesses_greedily", "kind"}  # for the engine, not for users
        return {field.name for field in fields(ours)} | (properties - hidden)
    return {*inspect.signature(ours).parameters} - {"self"}


def read(section):
    """What the section's tables say: {name: "yes", "no" or ours}, and the names that are only here."""
    [body] = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
    said, only = {}, set()
    for row in re.findall(r"^\|(.*)\|$", body, re.M):
        cells = [cell.strip() for cell in row.split("|")]
        names = re.findall(r"`([\w/{}]+)`", cells[0])
        if len(cells) == 2:
            only |= {*names}
        for name in names if len(cells) == 3 else ():
            assert name not in said, f"{name} stands there twice"
            said[name] = cells[1]
    if section in BESIDES:
        others, others_only = read(BESIDES[section])
        said = {name: here for name, here in others.items() if name not in COMPLETIONS_ONLY} | said
        only |= others_only
    return said, only


def faults(section, said, only, ours):
    """What is wrong with a section, in words."""
    found = []
    for name, here in said.items():
        if here == "yes" and name not in ours:
            found.append(f"{name} isn't here, the table says it is")
        if here != "yes" and name in ours:
            found.append(f"{name} is here, the table says it isn't")
        if here not in ("yes", "no") and re.fullmatch(r"as `([\w/]+)`", here).group(1) not in ours:
            found.append(f"{name}: there is no {here}")
    vllm = {*VLLM[section].split()}
    found += [f"vLLM has {name}: the table says nothing of it" for name in vllm - said.keys()]
    found += [f"vLLM has no {name}" for name in said.keys() - vllm if section not in MORE]
    found += [f"{name} isn't here, or is vLLM's" for name in only if name not in ours or name in vllm]
    told = said.keys() | only if section not in NOT_LISTED else ours
    return found + [f"{name} is here: the table says nothing of it" for name in ours - told]


@pytest.mark.parametrize("section", VLLM)
def test_the_table_says_what_is(section):
    assert faults(section, *read(section), names_of(section)) == []


def test_every_section_is_read():
    assert re.findall(r"^## (.*)$", TEXT, re.M) == [*VLLM] == [*OURS]


def test_a_wrong_table_is_found():
    said, only = read("SamplingParams")
    ours = names_of("SamplingParams")

    def broken(said=said, only=only, ours=ours):
        return faults("SamplingParams", said, only, ours)

    assert broken() == []
    assert broken(said | {"n": "no"}) == ["n is here, the table says it isn't"]
    assert broken(said | {"skip_clone": "yes"}) == ["skip_clone isn't here, the table says it is"]
    assert broken(said | {"skip_clone": "as `more`"}) == ["skip_clone: there is no as `more`"]
    assert broken({k: v for k, v in said.items() if k != "skip_clone"}) == [
        "vLLM has skip_clone: the table says nothing of it"
    ]
    assert broken(said | {"best_of": "no"}) == ["vLLM has no best_of"]
    assert broken(only=only | {"colour"}) == ["colour isn't here, or is vLLM's"]
    assert broken(ours=ours | {"colour"}) == ["colour is here: the table says nothing of it"]
    assert broken(ours=ours - {"n"}) == ["n isn't here, the table says it is"]
