"""DeepSeek-V2, V2-Lite, V3 and R1: latent attention, shared and grouped experts.

Pipeline: config.json, tensor names -> [families.deepseek] -> ModelConfig, parameters.

Source: https://arxiv.org/abs/2405.04434 (V2), https://arxiv.org/abs/2412.19437 (V3).
"""

import math
from collections.abc import Mapping
from typing import Any

from jpaged.models.families.family import Family, Fields
from jpaged.models.families.fields import HF_ACTIVATIONS, refuse, required, sizes
from jpaged.models.families.llama import GATED_MLP, MLP_NORM, read_llama
from jpaged.models.families.rope import write_rope


def read_deepseek2(hf: Mapping[str, Any]) -> dict[str, Any]:
    """V2: softmax over all experts, the best of all or of the best groups."""
    # Its modelling files disagree on what this entry does; no published model has it.
    refuse(hf, norm_topk_prob=False, scoring_func="softmax")
    method = hf.get("topk_method") or "greedy"
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(
            "topk_method: expected 'greedy' or 'group_limited_greedy' in a "
            f"'deepseek_v2' model, got {method!r}"
        )
    fields = _read(hf, interleaved=True)
    if fields.get("num_experts"):
        is_grouped = method != "greedy"
        fields["normalized_routing"] = False
        fields["routing"] = {
            "scores": "softmax",
            "num_groups": required(hf, "n_group") if is_grouped else 1,
            "num_selected_groups": required(hf, "topk_group") if is_grouped else 1,
            "group_scores": "max",
            "scale": float(hf.get("routed_scaling_factor") or 1.0),
        }
    return fields


def read_deepseek3(hf: Mapping[str, Any]) -> dict[str, Any]:
    """V3, R1: sigmoid scores; a learned bias only decides which experts are used."""
    refuse(hf, scoring_func="sigmoid", topk_method="noaux_tc")
    fields = _read(hf, interleaved=bool(hf.get("rope_interleave", True)))
    if fields.get("num_experts"):
        fields["normalized_routing"] = bool(hf.get("norm_topk_prob", True))
        fields["routing"] = {
            "scores": "sigmoid",
            "num_groups": hf.get("n_group") or 1,
            "num_selected_groups": hf.get("topk_group") or 1,
            "group_scores": "top2",
            "has_correction": True,
            "scale": float(hf.get("routed_scaling_factor") or 1.0),
        }
    return fields


def _read(hf: Mapping[str, Any], *, interleaved: bool) -> dict[str, Any]:
    """The fields that both have. All heads read one latent: no num_key_value_heads."""
    refuse(hf, moe_layer_freq=1)
    latent = {
        "rank": required(hf, "kv_lora_rank"),
        "rope_dim": required(hf, "qk_rope_head_dim"),
        "nope_dim": required(hf, "qk_nope_head_dim"),
        "value_dim": required(hf, "v_head_dim"),
        "query_rank": None
        if hf.get("q_lora_rank") is None
        else required(hf, "q_lora_rank"),
        "interleaved": interleaved,
    }
    own = {"head_dim": latent["rope_dim"], "num_key_value_heads": None}
    fields = read_llama({**hf, **own})
    width = latent["nope_dim"] + latent["rope_dim"]
    fields |= {
        "latent": latent,
        "num_kv_heads": 1,
        "head_dim": latent["rank"] + latent["rope_dim"],
        "rotary_dim": latent["rope_dim"],
        "attention_scale": width**-0.5 * _score_scale(fields["rope_scaling"]),
    }
    if hf.get("n_routed_experts") is None:
        return fields
    layers = required(hf, "num_hidden_layers")
    shared, size = (
        hf.get("n_shared_experts") or 0,
        required(hf, "moe_intermediate_size"),
    )
    return fields | {
        "num_experts": required(hf, "n_routed_experts"),
        "num_experts_per_token": required(hf, "num_experts_per_tok"),
        "expert_size": size,
        "shared_expert_size": shared * size,
        "dense_layers": tuple(range(min(hf.get("first_k_dense_replace") or 0, layers))),
    }


def _score_scale(scaling: Mapping[str, Any] | None) -> float:
    """Factor of the scores in a model whose context is extended.

    Source: YaRN, https://arxiv.org/abs/2309.00071, section 3.4. The cosines and sines
    of other families have its square root.
    """
    if scaling is None or not scaling.get("mscale_all_dim") or scaling["factor"] <= 1:
        return 1.0
    grown = 0.1 * scaling["mscale_all_dim"] * math.log(scaling["factor"]) + 1.0
    return grown * grown


def write_deepseek2(fields: Fields) -> dict[str, Any]:
    """The entries of config.json that `read_deepseek2` reads."""
    routing = fields["routing"] or {}
    groups = routing.get("num_groups", 1)
    return _write(fields) | {
        "mlp_bias": fields["mlp_bias"],
        "topk_method": "greedy" if groups == 1 else "group_limited_greedy",
        "norm_topk_prob": False,
    }


def write_deepseek3(fields: Fields) -> dict[str, Any]:
    """The entries of config.json that `read_deepseek3` reads."""
    return _write(fields) | {
        "rope_interleave": fields["latent"]["interleaved"],
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": fields["normalized_routing"],
        "num_nextn_predict_layers": 0,
    }


def _write(fields: Fields) -> dict[str, Any]:
    latent, routing = fields["latent"], fields["routing"] or {}
    num_experts, size = fields["num_experts"], fields["expert_size"]
    dense = len(fields["dense_layers"]) if num_experts else fields["num_layers"]
    entries = {
        "num_key_value_heads": fields["num_heads"],
        "intermediate_size": fields["intermediate_size"],
        "hidden_act": HF_ACTIVATIONS[fields["activation"]],
        "rms_norm_eps": fields["norm_eps"],
        "attention_bias": fields["qkv_bias"],
        "initializer_range": fields["initializer_range"],
        "kv_lora_rank": latent["rank"],
        "q_lora_rank": latent["query_rank"],
        "qk_rope_head_dim": latent["rope_dim"],
        "qk_nope_head_dim": latent["nope_dim"],
        "v_head_dim": latent["value_dim"],
        "first_k_dense_replace": dense,
        **write_rope({**fields, "rotary_dim": None}),
    }
    if not num_experts:
        return entries | {"n_routed_experts": None}
    return entries | {
        "n_routed_experts": num_experts,
        "n_shared_experts": fields["shared_expert_size"] // size,
        "num_experts_per_tok": fields["num_experts_per_token"],
        "moe_intermediate_size": size,
        "moe_layer_freq": 1,
        "n_group": routing["num_groups"],
        "topk_group": routing["num_selected_groups"],
        "routed_scaling_factor": routing["scale"],
    }


_MODULES = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.query_down": "self_attn.q_a_proj",
    "attention.query_down_norm": "self_attn.q_a_layernorm",
    "attention.query_up": "self_attn.q_b_proj",
    "attention.latent": "self_attn.kv_a_proj_with_mqa",
    "attention.latent_norm": "self_attn.kv_a_layernorm",
    "attention.key_up attention.value_up": "self_attn.kv_b_proj",
    "attention.out": "self_attn.o_proj",
    **MLP_NORM,
    **GATED_MLP,
    "experts.shared.gate": "mlp.shared_experts.gate_proj",
    "experts.shared.up": "mlp.shared_experts.up_proj",
    "experts.shared.down": "mlp.shared_experts.down_proj",
    "experts.correction": "mlp.gate.e_score_correction_bias",
}
_EXPERTS = {
    "gate": "mlp.experts.{expert}.gate_proj",
    "up": "mlp.experts.{expert}.up_proj",
    "down": "mlp.experts.{expert}.down_proj",
}


# Numbers that all published models have.
_LATENT = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def _sizes(*size: int, mscale: float, **more: Any) -> dict[str, Any]:
    """Sizes of a published model, see `fields.sizes`."""
    hidden, layers, heads, *rest = size
    scaling = {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }
    return sizes(
        *(hidden, layers, heads, heads, *rest),
        max_position_embeddings=163840,
        rope_scaling=scaling,
        **_LATENT,
        **more,
    )


def _sizes2(*size: int, **more: Any) -> dict[str, Any]:
    ids = {"bos_token_id": 100000, "eos_token_id": 100001}
    own = {"first_k_dense_replace": 1, "n_shared_experts": 2, "num_experts_per_tok": 6}
    return _sizes(*size, 102400, mscale=0.707, **ids, **own, **more)


DEEPSEEK2 = Family(
    architecture="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    read=read_deepseek2,
    write=write_deepseek2,
    layer_modules=_MODULES,
    router="mlp.gate",
    experts=_EXPERTS,
    defaults={
        "bos_token_id": 1,
        "eos_token_id": 2,
        "first_k_dense_replace": 0,
        "q_lora_rank": 1536,
        **_LATENT,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1407,
    },
    sizes={
        "deepseek-v2-lite": _sizes2(
            *(2048, 27, 16, 10944),
            q_lora_rank=None,
            n_routed_experts=64,
            moe_intermediate_size=1408,
        ),
        "deepseek-v2": _sizes2(
            *(5120, 60, 128, 12288),
            q_lora_rank=1536,
            n_routed_experts=160,
            moe_intermediate_size=1536,
            topk_method="group_limited_greedy",
            n_group=8,
            topk_group=3,
            routed_scaling_factor=16.0,
        ),
    },
)
DEEPSEEK3 = Family(
    architecture="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    read=read_deepseek3,
    write=write_deepseek3,
    layer_modules=_MODULES,
    router="mlp.gate",
    experts=_EXPERTS,
    has_extra_layers=True,
    defaults={
        "bos_token_id": 0,
        "eos_token_id": 1,
        "max_position_embeddings": 4096,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        **_LATENT,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    sizes={
        "deepseek-v3": _sizes(
            *(7168, 61, 128, 18432, 129280),
            mscale=1.0,
            q_lora_rank=1536,
        ),
    },
)
