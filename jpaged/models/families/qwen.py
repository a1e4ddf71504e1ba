"""Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE.

Pipeline: config.json, tensor names -> [families.qwen] -> ModelConfig, parameters.
"""

from collections.abc import Mapping
from typing import Any

from jpaged.models.families.family import Family, Fields
from jpaged.models.families.fields import (
    read_layer_types,
    required,
    sizes,
    write_layer_types,
)
from jpaged.models.families.llama import (
    ATTENTION,
    GATED_MLP,
    MLP_NORM,
    QK_NORMS,
    read_llama,
    without_mlp_bias,
)


def read_qwen2(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Llama with biases of query, key and value; the later layers may have a window."""
    biases = {"qkv_bias": True, "out_bias": False, "mlp_bias": False}
    return read_llama(hf) | biases | read_layer_types(hf, _from_max_window_layers)


def read_qwen3(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Llama with norms of queries and keys, and windows as in Qwen2."""
    fields = read_llama(hf) | {"qk_norm": True, "mlp_bias": False}
    return fields | read_layer_types(hf, _from_max_window_layers)


def write_qwen(fields: Fields) -> dict[str, Any]:
    """The entries of config.json that `read_qwen2` and `read_qwen3` read."""
    return without_mlp_bias(fields) | {
        "use_sliding_window": fields["sliding_window"] is not None,
        "sliding_window": fields["sliding_window"],
        "layer_types": write_layer_types(fields),
    }


def read_qwen3_moe(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen3 with experts in some or all layers, and one window for all layers."""
    num_layers = required(hf, "num_hidden_layers")
    step = hf.get("decoder_sparse_step") or 1
    mlp_only = hf.get("mlp_only_layers") or []
    num_experts = hf.get("num_experts", hf.get("num_local_experts", 128))
    uses_window = bool(hf.get("use_sliding_window"))
    return read_llama(hf) | {
        "qk_norm": True,
        "mlp_bias": False,
        "sliding_window": hf.get("sliding_window") if uses_window else None,
        "num_experts": num_experts,
        "num_experts_per_token": required(hf, "num_experts_per_tok"),
        "expert_size": required(hf, "moe_intermediate_size"),
        "normalized_routing": bool(hf.get("norm_topk_prob", False)),
        "dense_layers": tuple(
            i for i in range(num_layers) if i in mlp_only or (i + 1) % step
        ),
    }


def write_qwen3_moe(fields: Fields) -> dict[str, Any]:
    """The entries of config.json that `read_qwen3_moe` reads."""
    return without_mlp_bias(fields) | {
        "use_sliding_window": fields["sliding_window"] is not None,
        "sliding_window": fields["sliding_window"],
        "num_experts": fields["num_experts"],
        "num_experts_per_tok": fields["num_experts_per_token"],
        "moe_intermediate_size": fields["expert_size"],
        "norm_topk_prob": fields["normalized_routing"],
        "mlp_only_layers": list(fields["dense_layers"]),
        "decoder_sparse_step": 1,
    }


def _from_max_window_layers(hf: Mapping[str, Any], layer: int) -> bool:
    return layer >= hf.get("max_window_layers", 28)


def _sizes(*size: int, positions: int, **more: Any) -> dict[str, Any]:
    more = {"rope_theta": 1e6, "max_position_embeddings": positions} | more
    return sizes(*size, **more)


def _small2(*size: int) -> dict[str, Any]:
    return _sizes(*size, 151936, positions=32768, tie_word_embeddings=True)


def _large2(*size: int) -> dict[str, Any]:
    return _sizes(*size, 152064, positions=131072)


def _qwen3(*size: int, **more: Any) -> dict[str, Any]:
    return _sizes(*size, 151936, positions=40960, **more)


_TIED = {"tie_word_embeddings": True}

QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    read=read_qwen2,
    write=write_qwen,
    layer_modules=ATTENTION | MLP_NORM | GATED_MLP,
    defaults={"use_sliding_window": False, "sliding_window": 4096},
    sizes={
        "qwen2.5-0.5b": _small2(896, 24, 14, 2, 4864),
        "qwen2.5-1.5b": _small2(1536, 28, 12, 2, 8960),
        "qwen2.5-3b": _small2(2048, 36, 16, 2, 11008),
        "qwen2.5-7b": _large2(3584, 28, 28, 4, 18944),
        "qwen2.5-14b": _large2(5120, 48, 40, 8, 13824),
        "qwen2.5-32b": _large2(5120, 64, 40, 8, 27648),
        "qwen2.5-72b": _large2(8192, 80, 64, 8, 29568),
    },
)
QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    read=read_qwen3,
    write=write_qwen,
    layer_modules=ATTENTION | QK_NORMS | MLP_NORM | GATED_MLP,
    defaults={"head_dim": 128, "use_sliding_window": False, "sliding_window": 4096},
    sizes={
        "qwen3-0.6b": _qwen3(1024, 28, 16, 8, 3072, **_TIED),
        "qwen3-1.7b": _qwen3(2048, 28, 16, 8, 6144, **_TIED),
        "qwen3-4b": _qwen3(2560, 36, 32, 8, 9728, **_TIED),
        "qwen3-8b": _qwen3(4096, 36, 32, 8, 12288),
        "qwen3-14b": _qwen3(5120, 40, 40, 8, 17408),
        "qwen3-32b": _qwen3(5120, 64, 64, 8, 25600),
    },
)
QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    read=read_qwen3_moe,
    write=write_qwen3_moe,
    layer_modules=ATTENTION | QK_NORMS | MLP_NORM | GATED_MLP,
    router="mlp.gate",
    experts={
        "gate": "mlp.experts.{expert}.gate_proj",
        "up": "mlp.experts.{expert}.up_proj",
        "down": "mlp.experts.{expert}.down_proj",
    },
    defaults={"num_experts_per_tok": 8, "moe_intermediate_size": 768},
    sizes={
        "qwen3-30b-a3b": _qwen3(
            *(2048, 48, 32, 4, 6144), head_dim=128, num_experts=128, norm_topk_prob=True
        ),
    },
)
