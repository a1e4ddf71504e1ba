"""Foreign parameters: those of vLLM and transformers, and what they are called here.

Pipeline: user -> [foreign params] -> params. Host only.
"""

from __future__ import annotations

from jpaged.names import Foreign, absent

_BEAMS = (
    "pass BeamSearchParams(beam_width=..., max_tokens=...) in place of SamplingParams"
)
_LEAVE_OUT = "leave it out"
_SCORES = "logprobs=-1 reports all tokens (with LLM(max_logprobs=-1))"

SAMPLING = {
    # older versions of vLLM
    "guided_decoding": Foreign((None,), "structured_outputs"),
    "best_of": Foreign(
        (None, 1),
        instead="set n, and choose by the outputs' cumulative_logprob",
        same_as="n",
    ),
    "use_beam_search": absent(False, None, instead=_BEAMS),
    "length_penalty": absent(1.0, None, instead=_BEAMS),
    "early_stopping": absent(False, None, instead=_BEAMS),
    # current version of vLLM
    "skip_clone": Foreign((True, False)),  # parameters are never copied or changed
    "extra_args": absent(None, {}, instead=_LEAVE_OUT),
    "flat_logprobs": absent(False, instead="logprobs are always lists of dicts"),
    "logprob_token_ids": absent(None, instead=_SCORES),
    "prompt_logprob_token_ids": absent(None, instead="prompt_logprobs=-1 reports all"),
    "prompt_logprob_start": absent(None, instead="read a slice of prompt_logprobs"),
    "stream_interval": absent(
        None, 1, instead="LLM.stream yields as slices of steps end"
    ),
    "skip_reading_prefix_cache": absent(
        None, False, instead="LLM(enable_prefix_caching=False), or reset_prefix_cache()"
    ),
    "thinking_token_budget": absent(None, -1, instead="set max_tokens"),
    "repetition_detection": absent(
        None, instead="set repetition_penalty or frequency_penalty"
    ),
    "routed_experts_prompt_start": absent(0, None, instead=_LEAVE_OUT),
    "trace_decode_token_ids": absent(
        None, instead="LLM.score returns the log-probabilities of given tokens"
    ),
    # transformers
    "max_new_tokens": Foreign(ours="max_tokens"),
    "min_new_tokens": Foreign((None,), "min_tokens"),
    "num_return_sequences": Foreign(ours="n"),
    "do_sample": absent(
        True, instead="temperature=0 is greedy decoding, and values above 0 sample"
    ),
    "num_beams": absent(1, None, instead=_BEAMS),
    "eos_token_id": absent(None, instead="set stop_token_ids, and ignore_eos=True"),
    "stop_strings": Foreign((None,), "stop"),
}

BEAM_SEARCH = {
    "temperature": absent(0, 0.0, 1.0, None, instead="beam search does not sample"),
    "include_stop_str_in_output": absent(
        False, instead="token_ids include the token that ended a beam"
    ),
    "num_beams": Foreign(ours="beam_width"),
    "max_new_tokens": Foreign(ours="max_tokens"),
    "num_return_sequences": Foreign(ours="num_return"),
    "n": Foreign(ours="num_return"),
    "stop": absent(None, (), [], instead="set stop_token_ids"),
}

STRUCTURED = {
    "json_object": Foreign((None, False), "json", lambda value: {"type": "object"}),
    "grammar": absent(None, instead="write it as regex or as a JSON schema"),
    "structural_tag": absent(None, instead="write it as regex"),
    "whitespace_pattern": absent(
        None, instead="JSON is generated in one form; write another one as regex"
    ),
    "disable_any_whitespace": absent(False, instead=_LEAVE_OUT),
    "disable_additional_properties": absent(
        False, instead='add "additionalProperties": false to the schema'
    ),
    "backend": absent(None, "auto", instead="there is only jpaged.structured"),
    "disable_fallback": Foreign((True, False)),
}
