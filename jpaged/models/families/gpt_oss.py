"""gpt-oss, unquantised.

Pipeline: config.json, tensor names -> [families.gpt_oss] -> ModelConfig, parameters.
"""

from collections.abc import Mapping
from typing import Any

from jpaged.models.families.family import Family, Fields
from jpaged.models.families.fields import (
    all_but_every,
    read_layer_types,
    required,
    sizes,
    write_layer_types,
)
from jpaged.models.families.llama import (
    ATTENTION,
    MLP_NORM,
    read_llama,
    without_mlp_bias,
)


def read_gpt_oss(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Llama with attention sinks, a window in every other layer, and experts."""
    return (
        read_llama(hf)
        | read_layer_types(hf, all_but_every(2))
        | {
            "attention_sinks": True,
            "mlp_bias": False,
            "num_experts": required(hf, "num_local_experts"),
            "num_experts_per_token": required(hf, "num_experts_per_tok"),
            "expert_size": required(hf, "intermediate_size"),
            "expert_bias": True,
            "swiglu_limit": float(hf.get("swiglu_limit", 7.0)),
            "swiglu_alpha": float(hf.get("swiglu_alpha", 1.702)),
        }
    )


def write_gpt_oss(fields: Fields) -> dict[str, Any]:
    """The entries of config.json that `read_gpt_oss` reads."""
    return without_mlp_bias(fields) | {
        "sliding_window": fields["sliding_window"],
        "layer_types": write_layer_types(fields),
        "num_local_experts": fields["num_experts"],
        "num_experts_per_tok": fields["num_experts_per_token"],
        "swiglu_limit": fields["swiglu_limit"],
        "swiglu_alpha": fields["swiglu_alpha"],
    }


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    yarn = {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    }
    return sizes(
        *(2880, layers, 64, 8, 2880, 201088),
        num_local_experts=experts,
        max_position_embeddings=131072,
        rope_scaling=yarn,
    )


GPT_OSS = Family(
    architecture="GptOssForCausalLM",
    model_type="gpt_oss",
    read=read_gpt_oss,
    write=write_gpt_oss,
    layer_modules=ATTENTION | MLP_NORM | {"attention.sinks": "self_attn.sinks"},
    router="mlp.router",
    experts={
        "gate up": "mlp.experts.gate_up_proj",
        "down": "mlp.experts.down_proj",
    },
    stacks_experts=True,
    defaults={
        "head_dim": 64,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "attention_bias": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
    },
    sizes={"gpt-oss-20b": _gpt_oss(24, 32), "gpt-oss-120b": _gpt_oss(36, 128)},
)
