"""vLLM's names: arguments and methods of its LLM, and what they are called here.

Pipeline: user -> [vllm names] -> llm. Host only.

A value is accepted if it means here what it means there. Any other value raises an
error that names what to use instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jpaged.names import Foreign
from jpaged.parallel.mesh import make_mesh
from jpaged.validation import integer

_LEAVE_OUT = "leave it out"
_COMPILED = (
    "all steps are compiled by XLA, and the programs are cached (docs/compilation.md); "
    "leave it out"
)
_HUB = "download it with `hf download` and pass the folder"
_CHUNKS = (
    "a prompt is computed in chunks of at most max_prompt_chunk or "
    "max_num_batched_tokens tokens; leave it out"
)
_SPECULATION = "set speculative_config={'method': ..., 'num_speculative_tokens': ...}"
_HOSTS = "call jax.distributed.initialize() and pass mesh=jpaged.make_mesh(...)"
_LORA = "merge the adapter into the weights; LoRA is not supported"
_TEXT = "only text is supported"
_SWAP = (
    "set preemption='swap' and num_swap_blocks, the number of KV blocks in host memory"
)


def _no(*equal: Any, instead: str) -> Foreign:
    """An argument without an equal here, except for some values."""
    return Foreign(equal, instead=instead)


LLM_ARGUMENTS: Mapping[str, Foreign] = {
    # the same under another name
    "gpu_memory_utilization": Foreign((None,), "memory_fraction"),
    "num_gpu_blocks_override": Foreign((None,), "num_blocks"),
    "kv_cache_dtype": Foreign((None,), "kv_dtype"),
    "scheduling_policy": Foreign((None,), "policy"),
    "preemption_mode": Foreign((None,), "preemption"),
    "attention_backend": Foreign((None,), "attention"),
    # permissions and switches whose effect is always given
    "trust_remote_code": Foreign((True, False)),  # no code of a checkpoint is run
    "disable_log_stats": Foreign((True, False)),  # they are counted, never logged
    "disable_custom_all_reduce": Foreign((True, False)),  # XLA's collectives
    "use_v2_block_manager": Foreign((True,), instead=_LEAVE_OUT),
    "use_tqdm_on_load": Foreign(
        (True, None), instead="leave it out: the bar disappears when loading is done"
    ),
    "enable_chunked_prefill": _no(True, None, instead=_CHUNKS),
    # sizes of parallelism; see `llm_arguments`
    "pipeline_parallel_size": _no(
        1, None, instead="use mesh=jpaged.make_mesh(tensor=..., data=...)"
    ),
    "enable_expert_parallel": _no(
        False, None, instead="use mesh=jpaged.make_mesh(expert=...)"
    ),
    "distributed_executor_backend": _no(None, "uni", instead=_HOSTS),
    # memory
    "swap_space": _no(0, None, instead=_SWAP),
    "cpu_offload_gb": _no(
        0, None, instead="set quantization='int8', or a mesh of several devices"
    ),
    "kv_cache_memory_bytes": _no(None, instead="set num_blocks"),
    "calculate_kv_scales": _no(
        False, None, instead="kv_dtype='int8' and 'fp8' have a scale per token and head"
    ),
    # compilation
    "enforce_eager": _no(False, None, instead=_COMPILED),
    "compilation_config": _no(None, {}, 0, instead=_COMPILED),
    "max_seq_len_to_capture": _no(None, instead=_COMPILED),
    "cuda_graph_sizes": _no(None, [], instead=_COMPILED),
    "cudagraph_capture_sizes": _no(None, [], instead=_COMPILED),
    "async_scheduling": _no(
        None, instead="many steps run in one device call; leave it out"
    ),
    "num_scheduler_steps": _no(
        1, None, instead="many steps run in one device call; leave it out"
    ),
    "scheduler_delay_factor": _no(0, instead=_LEAVE_OUT),
    "max_num_partial_prefills": _no(1, None, instead=_CHUNKS),
    "long_prefill_token_threshold": _no(0, None, instead="set max_prompt_chunk"),
    # the model and its files
    "task": _no("auto", "generate", None, instead="only generation is supported"),
    "runner": _no("auto", "generate", None, instead="only generation is supported"),
    "convert": _no("auto", "none", None, instead="only generation is supported"),
    "model_impl": _no("auto", None, instead="only the models of docs/models.md"),
    "load_format": _no(
        "auto",
        "safetensors",
        "hf",
        None,
        instead="pass a folder with safetensors, or model='random:NAME' for random "
        "weights",
    ),
    "config_format": _no("auto", "hf", None, instead="convert the folder"),
    "download_dir": _no(None, instead="set the environment variable HF_HOME"),
    "revision": _no(None, "main", instead=_HUB),
    "code_revision": _no(None, instead=_HUB),
    "tokenizer_revision": _no(None, "main", instead=_HUB),
    "hf_token": _no(None, False, instead="set the environment variable HF_TOKEN"),
    "hf_overrides": _no(
        None, {}, instead="edit config.json, or pass a Decoder of jpaged.load_model"
    ),
    "hf_config_path": _no(None, instead="put config.json into the model's folder"),
    "rope_scaling": _no(None, {}, instead="set rope_scaling in config.json"),
    "rope_theta": _no(None, instead="set rope_theta in config.json"),
    "tokenizer_mode": _no(
        "auto", "hf", "fast", None, instead="only tokenizer.json is supported"
    ),
    "skip_tokenizer_init": _no(
        False,
        instead="pass token ids, and SamplingParams(detokenize=False) for no text",
    ),
    "served_model_name": _no(
        None, instead="name it with `python -m jpaged.server`, not here"
    ),
    "device": _no(
        "auto", None, instead="set the environment variable JAX_PLATFORMS, e.g. cuda"
    ),
    "disable_sliding_window": _no(False, None, instead="remove it from config.json"),
    "override_generation_config": _no(None, {}, instead="pass SamplingParams"),
    # what jpaged has one of, or none
    "guided_decoding_backend": _no(
        None, "auto", instead="there is only jpaged.structured"
    ),
    "structured_outputs_config": _no(
        None, {}, instead="there is only jpaged.structured"
    ),
    "guided_decoding": _no(None, instead="pass SamplingParams(structured_outputs=...)"),
    "structured_outputs": _no(
        None, instead="pass SamplingParams(structured_outputs=...)"
    ),
    "logits_processors": _no(
        None, [], instead="AlgorithmParams runs a decoding function of your own"
    ),
    "speculative_model": _no(None, instead=_SPECULATION),
    "num_speculative_tokens": _no(None, instead=_SPECULATION),
    "ngram_prompt_lookup_max": _no(None, instead=_SPECULATION),
    "ngram_prompt_lookup_min": _no(None, instead=_SPECULATION),
    "enable_lora": _no(False, None, instead=_LORA),
    "max_loras": _no(1, None, instead=_LORA),
    "max_lora_rank": _no(16, None, instead=_LORA),
    "enable_prompt_adapter": _no(False, None, instead="use a prompt"),
    "limit_mm_per_prompt": _no(None, {}, instead=_TEXT),
    "mm_processor_kwargs": _no(None, {}, instead=_TEXT),
    "allowed_local_media_path": _no("", None, instead=_TEXT),
    "enable_prompt_embeds": _no(False, None, instead="pass token ids"),
    "override_pooler_config": _no(None, instead="only generation is supported"),
    "pooler_config": _no(None, instead="only generation is supported"),
    "enable_sleep_mode": _no(
        False, None, instead="LLM.close() frees the memory; create another LLM later"
    ),
    "kv_transfer_config": _no(None, instead=_LEAVE_OUT),
    "kv_events_config": _no(
        None, instead="RequestOutput.events has a request's events"
    ),
    "disable_async_output_proc": _no(False, None, instead=_LEAVE_OUT),
    "disable_cascade_attn": Foreign((None, True), "cascade", lambda value: not value),
    "disable_hybrid_kv_cache_manager": Foreign(
        (None, False), "cache_groups", lambda value: not value
    ),
    "worker_cls": _no("auto", None, instead=_LEAVE_OUT),
    "worker_extension_cls": _no("", None, instead=_LEAVE_OUT),
    "model_loader_extra_config": _no(None, {}, instead=_LEAVE_OUT),
    "additional_config": _no(None, {}, instead=_LEAVE_OUT),
}

# Arguments whose None means the default there.
_OPTIONAL = (
    "block_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "enable_prefix_caching",
)
_PARALLEL = {"tensor_parallel_size": "tensor", "data_parallel_size": "data"}
PARALLEL_NAMES = tuple(_PARALLEL)


def llm_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an LLM with a mesh in place of vLLM's parallel sizes.

    Raises:
      ValueError: a size is invalid, there are too few devices, or there is a mesh too.
    """
    found = {
        name: value
        for name, value in given.items()
        if name not in _PARALLEL and not (name in _OPTIONAL and value is None)
    }
    sizes = {
        name: integer(name, given[name], low=1)
        for name in _PARALLEL
        if given.get(name) is not None
    }
    sizes = {name: size for name, size in sizes.items() if size > 1}
    if not sizes:
        return found
    axes = ", ".join(f"{_PARALLEL[name]}={size}" for name, size in sizes.items())
    advice = f"{next(iter(sizes))}: use mesh=jpaged.make_mesh({axes})"
    if found.get("mesh") is not None:
        raise ValueError(f"{advice}; expected one of both, got a mesh too")
    return found | {"mesh": _mesh(sizes, advice)}


def _mesh(sizes: Mapping[str, int], advice: str) -> Mesh:
    try:
        return make_mesh(**{_PARALLEL[name]: size for name, size in sizes.items()})
    except ValueError as error:
        raise ValueError(
            f"{advice}, which needs as many devices; {len(jax.devices())} are visible: "
            f"{error}"
        ) from error


_TOKENIZE = _no(None, {}, instead="SamplingParams(truncate_prompt_tokens=...) shortens")
REQUEST_ARGUMENTS: Mapping[str, Foreign] = {
    "sampling_params": Foreign((None,), "params"),
    "use_tqdm": Foreign((None,), "progress"),
    "lora_request": _no(None, instead=_LORA),
    "prompt_adapter_request": _no(None, instead="use a prompt"),
    "priority": _no(None, instead="set SamplingParams(priority=...)"),
    "tokenization_kwargs": _TOKENIZE,
    "guided_options_request": _no(
        None, instead="set SamplingParams(structured_outputs=...)"
    ),
    "prompt_token_ids": Foreign((None,), "prompts"),
    "mm_processor_kwargs": _no(None, {}, instead=_TEXT),
    "concurrency_limit": _no(None, instead="set LLM(max_num_seqs=...)"),
    "chat_template_content_format": _no(
        "auto",
        "string",
        "openai",
        instead="a template that reads text parts gets them, others get their text",
    ),
    "add_special_tokens": _no(
        False,
        instead="the template writes the special tokens; encode the text yourself",
    ),
}

# Methods and attributes of vLLM's LLM: what to use here.
LLM_METHODS: Mapping[str, str] = {
    "encode": "only generation is supported; get_tokenizer().encode(text) tokenizes",
    "embed": "only generation is supported",
    "classify": "only generation is supported; score() compares continuations",
    "reward": "only generation is supported",
    "llm_engine": "use submit() and stream() for requests, stats() for statistics",
    "get_metrics": "use stats()",
    "start_profile": "use jax.profiler.start_trace(folder)",
    "stop_profile": "use jax.profiler.stop_trace()",
    "sleep": "use close(), and create another LLM later",
    "wake_up": "create another LLM",
    "set_tokenizer": "pass LLM(tokenizer=...)",
    "collective_rpc": "the model is the attribute `model`, a Flax NNX module",
    "apply_model": "the model is the attribute `model`, a Flax NNX module",
    "preprocess_chat": "use get_tokenizer().apply_chat_template(messages)",
    "enqueue": "use submit()",
    "wait_for_completion": "use Request.output() of what submit() returns",
    "abort_request": "use abort()",
    "model_config": "use model.config and config",
}
