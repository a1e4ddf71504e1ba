"""Small configs of every family, as arguments of transformers, for the parity tests.

`SIZES` has the config of each family by model_type. `CASES` has, by name, a model_type
and changes to its config. All windows and trained lengths are shorter than the prompts
of 50 tokens. The last case of each family also runs in the engine (`PAGED`).
"""

from typing import Any

_BASE = {
    "vocab_size": 128,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GATED = _BASE | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16}
_FEW_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
_ALTERNATING = {"num_hidden_layers": 4, "sliding_window": 8}
_LATENT = _BASE | {
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
}
SIZES: dict[str, dict[str, Any]] = {
    "llama": _GATED,
    "mistral": _GATED | {"sliding_window": 8},
    "mixtral": _GATED | _FEW_EXPERTS | {"sliding_window": None},
    "qwen2": {**_GATED, "hidden_size": 64},
    "qwen3": _GATED,
    "qwen3_moe": _GATED
    | {"num_experts_per_tok": 2, "num_experts": 6, "moe_intermediate_size": 24},
    "gemma": _GATED,
    # The caps are low enough to affect these small logits and scores.
    "gemma2": _GATED
    | _ALTERNATING
    | {
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 0.5,
    },
    "gemma3_text": _GATED
    | _ALTERNATING
    | {"query_pre_attn_scalar": 24, "sliding_window_pattern": 3},
    "phi3": {**_GATED, "hidden_size": 64, "sliding_window": 8},
    "gpt_oss": _GATED
    | _FEW_EXPERTS
    | {
        "sliding_window": 8,
        "swiglu_limit": 1.5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "truncate": False,
        },
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT | {"n_group": 4, "topk_group": 2},
    "opt": _BASE | {"ffn_dim": 64, "word_embed_proj_dim": 48},
    "gpt2": {
        "vocab_size": 128,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.05 * i for i in range(6)],
    "long_factor": [2.0 + 0.5 * i for i in range(6)],
    "partial_rotary_factor": 0.75,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_linear": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 4.0,
                "rope_theta": 10000.0,
            }
        },
    ),
    "llama_dynamic": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "dynamic",
                "factor": 4.0,
                "rope_theta": 10000.0,
            }
        },
    ),
    "llama_yarn_mscale": (
        "llama",
        {
            "rope_parameters": YARN
            | {"mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 16.0}
        },
    ),
    "llama_llama3": ("llama", {"head_dim": 32, "rope_parameters": LLAMA3}),
    "llama_yarn": ("llama", {"rope_parameters": YARN}),
    "mistral_without_window": ("mistral", {"sliding_window": None}),
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {}),
    "mixtral_window": ("mixtral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2_window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3_window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_moe_mixed": (
        "qwen3_moe",
        {
            "num_hidden_layers": 3,
            "mlp_only_layers": [0],
            "use_sliding_window": True,
            "sliding_window": 8,
        },
    ),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
    "gemma3_linear": (
        "gemma3_text",
        {
            "final_logit_softcapping": 0.5,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "linear",
                    "factor": 8.0,
                    "rope_theta": 1e6,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("phi3", {}),
    "phi3_longrope": (
        "phi3",
        {
            "sliding_window": None,
            "original_max_position_embeddings": 128,
            "rope_parameters": LONGROPE,
        },
    ),
    "gpt_oss": ("gpt_oss", {}),
    "deepseek_v2_lite": ("deepseek_v2", {"q_lora_rank": None}),
    "deepseek_v2": (
        "deepseek_v2",
        {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 4.0,
            "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
        },
    ),
    "deepseek_v3_halves": (
        "deepseek_v3",
        {
            "q_lora_rank": None,
            "rope_interleave": False,
            "norm_topk_prob": False,
            "attention_bias": True,
            "n_group": 1,
            "topk_group": 1,
            "rope_parameters": YARN | {"mscale": 0.9, "mscale_all_dim": 1.1},
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "opt": ("opt", {}),
    "opt_without_biases": ("opt", {"enable_bias": False}),
    "opt_350m_shape": (
        "opt",
        {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    ),
    "gpt2": ("gpt2", {}),
}


def has_experts(kind: str) -> bool:
    """Whether a family has experts; transformers has several products for them."""
    return "num_experts_per_tok" in SIZES[kind]
