"""Mistral and Mixtral.

Pipeline: config.json, tensor names -> [families.mistral] -> ModelConfig, parameters.
"""

from collections.abc import Mapping
from typing import Any

from jpaged.models.families.family import Family, Fields
from jpaged.models.families.fields import refuse, required, sizes
from jpaged.models.families.llama import (
    ATTENTION,
    GATED_MLP,
    MLP_NORM,
    TOKEN_IDS,
    read_llama,
    write_llama,
)


def read_mistral(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Llama without biases; `sliding_window`, if given, holds for every layer."""
    refuse(hf, attention_bias=False, mlp_bias=False, layer_types=None)
    return read_llama(hf) | {"sliding_window": hf.get("sliding_window")}


def write_mistral(fields: Fields) -> dict[str, Any]:
    """The entries of config.json that `read_mistral` reads."""
    return write_llama(fields) | {"sliding_window": fields["sliding_window"]}


def read_mixtral(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Mistral with experts in every layer; the routing weights sum to 1."""
    return read_mistral(hf) | {
        "num_experts": required(hf, "num_local_experts"),
        "num_experts_per_token": required(hf, "num_experts_per_tok"),
        "expert_size": required(hf, "intermediate_size"),
    }


def write_mixtral(fields: Fields) -> dict[str, Any]:
    """The entries of config.json that `read_mixtral` reads."""
    return write_mistral(fields) | {
        "num_local_experts": fields["num_experts"],
        "num_experts_per_tok": fields["num_experts_per_token"],
    }


MISTRAL = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    read=read_mistral,
    write=write_mistral,
    layer_modules=ATTENTION | MLP_NORM | GATED_MLP,
    defaults=TOKEN_IDS | {"sliding_window": 4096},
    sizes={
        "mistral-7b": sizes(
            *(4096, 32, 32, 8, 14336, 32000),
            max_position_embeddings=32768,
            sliding_window=4096,
            rms_norm_eps=1e-5,
        ),
    },
)
MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    read=read_mixtral,
    write=write_mixtral,
    layer_modules=ATTENTION | MLP_NORM,
    router="block_sparse_moe.gate",
    experts={
        "gate": "block_sparse_moe.experts.{expert}.w1",
        "up": "block_sparse_moe.experts.{expert}.w3",
        "down": "block_sparse_moe.experts.{expert}.w2",
    },
    defaults=TOKEN_IDS
    | {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    },
    sizes={
        "mixtral-8x7b": sizes(
            *(4096, 32, 32, 8, 14336, 32000), max_position_embeddings=32768
        ),
        "mixtral-8x22b": sizes(
            *(6144, 56, 48, 8, 16384, 32000), max_position_embeddings=65536
        ),
    },
)
